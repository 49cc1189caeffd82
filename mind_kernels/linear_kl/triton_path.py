"""Between the products, with a teacher: a row's KL, reverse KL or JSD and its cross-entropy in one Triton program.

One kernel for both losses: a second one would read the student's logits again, and would need its gradient kept apart
until the first has no more use for the logits, 2·e·V bytes a row written and read more.

Top-k: the listed tokens are gathered and their logits replaced by −inf, so that a kernel's sum over the row is the
tail's, with all digits; D over the k + 1 outcomes is a matter of (m, k) tensors; a second kernel writes the gradient of
the tail's tokens, and the listed ones' is put in their places.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mind_kernels.cross_entropy.triton_path import PairGradient
from mind_kernels.divergences import divergence_and_gradient
from mind_kernels.teacher_rows import NEG, KLOptions, apply_head_, padded_ids, topk_log_probs
from mind_kernels.triton_math import (
    LN2,
    LOG2E,
    LOWEST,
    WIDTH,
    apply_head,
    block_offsets,
    label_loss,
    load_block,
    load_logits,
    load_stored,
    online_mean,
    online_sum,
    put_label,
    row_launch,
    softcap_slope,
    softplus2,
    store_block,
    sum_of_lanes,
)


def launch(z: Tensor, divergence: str) -> dict[str, int]:
    """One 16-byte load of each of two rows; where rows are long, one program a multiprocessor.

    Twice as many threads for the forward KL of 16-bit logits, where 64 registers are enough for one; of fp32 logits a
    thread loads twice the bytes, and its sums at two temperatures need more.
    """
    fits = divergence == "forward" and z.element_size() == 2
    return row_launch(z, 16, warps=32, registers=64) if fits else row_launch(z, 16, warps=16)


@triton.jit
def log_student_over_mixture(b_log_t, b_log_s, log_odds_beta, log_one_minus_beta):
    """log₂(s/m) = −log₂(1−β) − log₂(1 + t/s·β/(1−β)),  m = (1−β)s + βt never formed."""
    return -log_one_minus_beta - softplus2(b_log_t - b_log_s + log_odds_beta)


@triton.jit
def dense_kl_kernel(
    z_ptr, stride_zn, z_row_ptr,  # (·, V) bare products, (m,) int64: which of their rows
    d_ptr, stride_dn,  # (·, V) ∂loss/∂product, written in the same rows; may be z itself
    t_ptr, stride_tn, t_row_ptr,  # (·, V_t) the teacher's, (m,) int64
    label_ptr,  # (m,) int64
    coefficient_ptr, kl_coefficient_ptr,  # (m,) fp32: ∂loss/∂(cross-entropy), ∂loss/∂(τ^p·D) of the row
    pair_ptr, stride_pn, pair_mean_ptr,  # (m, V), (m,) fp32
    loss_ptr, kl_loss_ptr,  # (m,) fp32
    logit_scale,
    logit_softcap,
    teacher_scale,
    teacher_softcap,
    inverse_temperature,
    loss_scale,  # τ^p
    beta,
    log_odds_beta,  # log₂(β/(1−β))
    log_one_minus_beta,  # log₂
    V: tl.constexpr,
    V_SHARED: tl.constexpr,  # the tokens that D is over
    DIVERGENCE: tl.constexpr,
    HAS_CROSS_ENTROPY: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_SOFTCAP: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Formulas as in divergences.py. First pass: all log-sum-exps, and D but for the JSD, whose sums need them first.

    With zs, zt at temperature τ:  KL(t‖s) = Σ t(zt − zs) − lse_t + lse_s,  KL(s‖t) = Σ s(zs − zt) + lse_t − lse_s.
    """
    i_n = tl.program_id(0).to(tl.int64)
    z_row = tl.load(z_row_ptr + i_n)
    z_ptr += z_row * stride_zn
    d_ptr += z_row * stride_dn
    t_ptr += tl.load(t_row_ptr + i_n) * stride_tn
    scale, softcap = logit_scale * LOG2E, logit_softcap * LOG2E
    teacher_scale, teacher_softcap = teacher_scale * LOG2E, teacher_softcap * LOG2E
    # At temperature 1 over the whole vocabulary the cross-entropy's log-sum-exp and softmax are the divergence's too.
    ONE_SOFTMAX: tl.constexpr = HAS_CROSS_ENTROPY and not HAS_TEMPERATURE and V_SHARED == V
    ONE_LSE: tl.constexpr = ONE_SOFTMAX and DIVERGENCE != "reverse"  # whose mean is made with a sum of its own
    if HAS_CROSS_ENTROPY:
        label = tl.load(label_ptr + i_n)
        is_label_valid = (label >= 0) & (label < V)
        label = tl.where(is_label_valid, label, 0).to(tl.int32)
        z_label = apply_head(tl.load(z_ptr + label), scale, softcap, HAS_SOFTCAP)

    o_block = block_offsets(BLOCK_V)
    # Blocks of tokens that student and teacher share; then the rest, whose loads are masked.
    WHOLE: tl.constexpr = V_SHARED // BLOCK_V * BLOCK_V
    b_zero = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    b_max, b_sum = b_zero + LOWEST, b_zero
    b_max_s, b_sum_s, b_max_t, b_sum_t, b_mean = b_zero + LOWEST, b_zero, b_zero + LOWEST, b_zero, b_zero
    for IS_REST in tl.static_range(2):
        for v in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
            o_v = v + o_block
            b_z = load_logits(z_ptr, o_v, scale, softcap, HAS_SOFTCAP, V, IS_REST)
            b_t = load_logits(t_ptr, o_v, teacher_scale, teacher_softcap, TEACHER_HAS_SOFTCAP, V_SHARED, IS_REST)
            b_s = b_z
            if HAS_TEMPERATURE:
                b_s, b_t = b_s * inverse_temperature, b_t * inverse_temperature
            if IS_REST and V_SHARED < V:
                b_s = tl.where(o_v < V_SHARED, b_s, float("-inf"))
            if DIVERGENCE == "forward":
                b_d = tl.where(b_t == float("-inf"), 0.0, b_t - b_s)
                b_max_t, b_sum_t, b_mean = online_mean(b_max_t, b_sum_t, b_mean, b_t, b_d)
            else:
                b_max_t, b_sum_t = online_sum(b_max_t, b_sum_t, b_t)
            if DIVERGENCE == "reverse":
                b_d = tl.where(o_v < V_SHARED, b_s - b_t, 0.0) if IS_REST else b_s - b_t
                b_max_s, b_sum_s, b_mean = online_mean(b_max_s, b_sum_s, b_mean, b_s, b_d)
            elif not ONE_LSE:
                b_max_s, b_sum_s = online_sum(b_max_s, b_sum_s, b_s)
            if HAS_CROSS_ENTROPY:
                b_others = put_label(b_z, o_block, label, v, float("-inf"), BLOCK_V)
                b_max, b_sum = online_sum(b_max, b_sum, b_others)

    if HAS_CROSS_ENTROPY:
        z_max, z_sum = sum_of_lanes(b_max, b_sum)
        loss, rest, lse = label_loss(z_label, z_max, z_sum)
        tl.store(loss_ptr + i_n, tl.where(is_label_valid, loss, float("nan")))
    t_max, t_sum = sum_of_lanes(b_max_t, b_sum_t)
    lse_t = t_max + tl.log2(t_sum)
    if ONE_LSE:
        lse_s = lse
    else:
        s_max, s_sum = sum_of_lanes(b_max_s, b_sum_s)
        lse_s = s_max + tl.log2(s_sum)

    if DIVERGENCE == "forward":
        divergence = tl.sum(b_mean * tl.exp2(b_max_t - t_max), axis=0) / t_sum - lse_t + lse_s
    elif DIVERGENCE == "reverse":
        divergence = tl.sum(b_mean * tl.exp2(b_max_s - s_max), axis=0) / s_sum + lse_t - lse_s
    else:
        b_kl_s, b_kl_t = b_zero, b_zero
        for IS_REST in tl.static_range(2):
            for w in range(WHOLE if IS_REST else 0, V_SHARED if IS_REST else WHOLE, BLOCK_V):
                o_v = (w if IS_REST else WHOLE - BLOCK_V - w) + o_block
                b_z = load_logits(z_ptr, o_v, scale, softcap, HAS_SOFTCAP, V_SHARED, IS_REST)
                b_t = load_logits(t_ptr, o_v, teacher_scale, teacher_softcap, TEACHER_HAS_SOFTCAP, V_SHARED, IS_REST)
                if HAS_TEMPERATURE:
                    b_z, b_t = b_z * inverse_temperature, b_t * inverse_temperature
                b_log_s, b_log_t = b_z - lse_s, b_t - lse_t
                b_p_t = tl.exp2(b_log_t)
                b_ratio = log_student_over_mixture(b_log_t, b_log_s, log_odds_beta, log_one_minus_beta)
                b_of_s = tl.exp2(b_log_s) * b_ratio
                b_of_t = tl.where(b_p_t > 0.0, b_p_t * (b_log_t - b_log_s + b_ratio), 0.0)
                if IS_REST:
                    b_of_s = tl.where(o_v < V_SHARED, b_of_s, 0.0)
                    b_of_t = tl.where(o_v < V_SHARED, b_of_t, 0.0)
                b_kl_s += tl.sum(b_of_s, axis=1)
                b_kl_t += tl.sum(b_of_t, axis=1)
        kl_s = tl.sum(b_kl_s, axis=0)
        divergence = beta * tl.sum(b_kl_t, axis=0) + (1.0 - beta) * kl_s
    tl.store(kl_loss_ptr + i_n, divergence * (LN2 * loss_scale))

    if NEEDS_GRADIENT:
        kl_coefficient = tl.load(kl_coefficient_ptr + i_n) * loss_scale * inverse_temperature * logit_scale
        if DIVERGENCE != "forward":  # whose gradients have a difference of logarithms as a factor
            kl_coefficient *= LN2
        if HAS_CROSS_ENTROPY:
            coefficient = tl.load(coefficient_ptr + i_n) * logit_scale
        if HAS_PAIRS:
            pair_ptr += i_n * stride_pn
            pair_mean = tl.load(pair_mean_ptr + i_n)
        for IS_REST in tl.static_range(2):
            for w in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
                # Down after one pass up; up again after the JSD's second.
                v = w if IS_REST or DIVERGENCE == "jsd" else WHOLE - BLOCK_V - w
                o_v = v + o_block
                b_z = load_logits(z_ptr, o_v, scale, softcap, HAS_SOFTCAP, V, IS_REST, IS_LAST=True)
                b_t = load_logits(
                    t_ptr, o_v, teacher_scale, teacher_softcap, TEACHER_HAS_SOFTCAP, V_SHARED, IS_REST, IS_LAST=True
                )
                if HAS_TEMPERATURE:
                    b_log_s, b_log_t = b_z * inverse_temperature - lse_s, b_t * inverse_temperature - lse_t
                else:
                    b_log_s, b_log_t = b_z - lse_s, b_t - lse_t
                b_p_s = tl.exp2(b_log_s)
                if DIVERGENCE == "forward":
                    b_d = b_p_s - tl.exp2(b_log_t)
                elif DIVERGENCE == "reverse":  # which may be infinite, and 0·inf would be NaN
                    b_d = tl.where(kl_coefficient == 0.0, 0.0, b_p_s * (b_log_s - b_log_t - divergence))
                else:
                    b_ratio = log_student_over_mixture(b_log_t, b_log_s, log_odds_beta, log_one_minus_beta)
                    b_d = (1.0 - beta) * b_p_s * (b_ratio - kl_s)
                b_d *= kl_coefficient
                if IS_REST:
                    b_d = tl.where(o_v < V_SHARED, b_d, 0.0)
                if HAS_CROSS_ENTROPY:
                    b_p = b_p_s if ONE_SOFTMAX else tl.exp2(b_z - lse)
                    b_d = put_label(b_d + coefficient * b_p, o_block, label, v, b_d - coefficient * rest, BLOCK_V)
                    if HAS_PAIRS:
                        b_pair = load_block(pair_ptr, o_v, V, IS_REST, IS_LAST=True)
                        b_d += 0.5 * logit_scale * b_p * (b_pair - pair_mean)
                if HAS_SOFTCAP:
                    b_d *= softcap_slope(b_z, softcap)
                store_block(d_ptr, o_v, b_d, V, IS_REST)


def dense_kl_(
    z: Tensor,  # (·, V) bare products
    z_rows: Tensor,  # (m,) int64
    d: Tensor,  # (·, V) ∂loss/∂product, rows z_rows written when needs_gradient; may be z itself
    teacher_logits: Tensor,  # (·, V_t) bare products
    teacher_rows: Tensor,  # (m,) int64
    labels: Tensor | None,  # (m,) int64
    coefficient: Tensor | None,  # (m,) fp32; None: no cross-entropy
    kl_coefficient: Tensor,  # (m,) fp32
    loss: Tensor | None,  # (m,) fp32, written
    kl_loss: Tensor,  # (m,) fp32, written: τ^p·D
    options: KLOptions,
    *,
    V_shared: int,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    pairs: PairGradient | None = None,
    needs_gradient: bool,
) -> None:
    """Bytes: student's and teacher's logits read twice (thrice for the JSD), e·V of gradient written."""
    m, V = len(z_rows), z.shape[1]
    assert z.stride(1) == d.stride(1) == teacher_logits.stride(1) == 1
    # A pointer that is not read still needs a tensor behind it.
    pair_sum, pair_mean = (kl_coefficient, kl_coefficient) if pairs is None else pairs
    beta = options.beta if options.divergence == "jsd" else 0.5
    dense_kl_kernel[(m,)](
        z, z.stride(0), z_rows,
        d, d.stride(0),
        teacher_logits, teacher_logits.stride(0), teacher_rows,
        z_rows if labels is None else labels,
        kl_coefficient if coefficient is None else coefficient, kl_coefficient,
        pair_sum, pair_sum.stride(0), pair_mean,
        kl_loss if loss is None else loss, kl_loss,
        logit_scale,
        1.0 if logit_softcap is None else logit_softcap,
        teacher_scale,
        1.0 if teacher_softcap is None else teacher_softcap,
        1.0 / options.temperature,
        options.loss_scale,
        beta,
        math.log2(beta / (1.0 - beta)),
        math.log2(1.0 - beta),
        V=V,
        V_SHARED=V_shared,
        DIVERGENCE=options.divergence,
        HAS_CROSS_ENTROPY=coefficient is not None,
        HAS_TEMPERATURE=options.temperature != 1.0,
        HAS_SOFTCAP=logit_softcap is not None,
        TEACHER_HAS_SOFTCAP=teacher_softcap is not None,
        HAS_PAIRS=pairs is not None,
        NEEDS_GRADIENT=needs_gradient,
        **launch(z, options.divergence),
    )  # fmt: skip


@triton.jit
def tail_kernel(
    z_ptr, stride_zn,  # (m, V) bare products, −inf where a token is listed
    label_ptr,  # (m,) int64
    max_ptr, sum_ptr,  # (m,) fp32: Σ exp(z − max) over the tokens that are neither listed nor the label
    logit_scale,
    logit_softcap,
    V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of the tail, as its maximum (in nats) and its sum of exponentials, the label left out."""
    i_n = tl.program_id(0).to(tl.int64)
    z_ptr += i_n * stride_zn
    scale, softcap = logit_scale * LOG2E, logit_softcap * LOG2E
    label = tl.load(label_ptr + i_n).to(tl.int32)
    o_block = block_offsets(BLOCK_V)
    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V
    b_sum = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    b_max = b_sum + LOWEST
    for IS_REST in tl.static_range(2):
        for v in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
            o_v = v + o_block
            b_u = load_stored(z_ptr, o_v, V, IS_REST)
            b_z = apply_head(b_u, scale, softcap, HAS_SOFTCAP)
            b_z = tl.where(b_u.to(tl.float32) == float("-inf"), float("-inf"), b_z)
            b_z = put_label(b_z, o_block, label, v, float("-inf"), BLOCK_V)
            if IS_REST:
                b_z = tl.where(o_v < V, b_z, float("-inf"))
            b_max, b_sum = online_sum(b_max, b_sum, b_z)
    z_max, z_sum = sum_of_lanes(b_max, b_sum)
    tl.store(max_ptr + i_n, z_max * LN2)
    tl.store(sum_ptr + i_n, z_sum)


@triton.jit
def tail_gradient_kernel(
    z_ptr, stride_zn,  # (m, V) bare products, −inf where a token is listed
    d_ptr, stride_dn,  # (m, V) ∂loss/∂product, written, anything where a token is listed; may be z itself
    label_ptr,  # (m,) int64
    lse_ptr, p_tail_ptr, rest_ptr,  # (m,) fp32: log-sum-exp of the tail, its probability, 1 − p_label
    coefficient_ptr, grad_tail_ptr,  # (m,) fp32: of the cross-entropy, ∂loss/∂(the tail's log-sum-exp)
    pair_ptr, stride_pn, pair_mean_ptr,  # (m, V), (m,) fp32
    logit_scale,
    logit_softcap,
    V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """∂loss/∂u = (c·(p − onehot(y)) + grad_tail·q + pairs)·dz/du.

    q = exp(z − lse) ≤ 1 within the tail and p = p_tail·q: q has all digits where p and p_tail underflow.
    """
    i_n = tl.program_id(0).to(tl.int64)
    z_ptr += i_n * stride_zn
    d_ptr += i_n * stride_dn
    scale, softcap = logit_scale * LOG2E, logit_softcap * LOG2E
    label, rest = tl.load(label_ptr + i_n).to(tl.int32), tl.load(rest_ptr + i_n)
    lse = tl.load(lse_ptr + i_n) * LOG2E
    p_tail = tl.load(p_tail_ptr + i_n)
    coefficient, grad_tail = tl.load(coefficient_ptr + i_n) * logit_scale, tl.load(grad_tail_ptr + i_n) * logit_scale
    if HAS_PAIRS:
        pair_ptr += i_n * stride_pn
        pair_mean = tl.load(pair_mean_ptr + i_n)
    o_block = block_offsets(BLOCK_V)
    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V
    for IS_REST in tl.static_range(2):
        for v in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
            o_v = v + o_block
            b_z = load_logits(z_ptr, o_v, scale, softcap, HAS_SOFTCAP, V, IS_REST)
            b_q = tl.exp2(b_z - lse)
            b_p = p_tail * b_q
            b_d = grad_tail * b_q
            b_d = put_label(b_d + coefficient * b_p, o_block, label, v, b_d - coefficient * rest, BLOCK_V)
            if HAS_PAIRS:
                b_d += 0.5 * logit_scale * b_p * (load_block(pair_ptr, o_v, V, IS_REST) - pair_mean)
            if HAS_SOFTCAP:
                b_d *= softcap_slope(b_z, softcap)
            store_block(d_ptr, o_v, b_d, V, IS_REST)


def topk_kl_(
    z: Tensor,  # (m, V) bare products; overwritten
    d: Tensor,  # (m, V) ∂loss/∂product, written when needs_gradient; may be z itself
    token_ids: Tensor,  # (m, k)
    teacher_log_probs: Tensor,  # (m, k) fp32 at temperature 1, −inf padded
    tail: str,
    labels: Tensor,  # (m,) int64
    coefficient: Tensor,  # (m,) fp32, zeros where there is no cross-entropy
    kl_coefficient: Tensor,  # (m,) fp32
    loss: Tensor,  # (m,) fp32, written
    kl_loss: Tensor,  # (m,) fp32, written: τ^p·D
    options: KLOptions,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    pairs: PairGradient | None = None,
    needs_gradient: bool,
) -> None:
    """Bytes: e·V read twice and written once; k pairs a row beside them."""
    m, V = z.shape
    assert z.stride(1) == d.stride(1) == 1
    head: dict[str, Any] = {
        "V": V,
        "HAS_SOFTCAP": logit_softcap is not None,
        **row_launch(z, 16),
    }
    scale_and_softcap = logit_scale, 1.0 if logit_softcap is None else logit_softcap
    is_label_valid = (labels >= 0) & (labels < V)
    labels = torch.where(is_label_valid, labels, 0)
    padded = torch.isneginf(teacher_log_probs)
    ids, first = padded_ids(token_ids, padded)
    log_teacher = topk_log_probs(teacher_log_probs, tail, options.temperature, V)
    z_listed, z_label = z.gather(-1, ids).float(), z.gather(-1, labels.unsqueeze(-1)).float()
    apply_head_(z_listed, logit_scale, logit_softcap)
    apply_head_(z_label, logit_scale, logit_softcap)
    z.scatter_(-1, ids, -math.inf)
    z_max, z_sum = torch.empty_like(z_label), torch.empty_like(z_label)
    tail_kernel[(m,)](z, z.stride(0), labels, z_max, z_sum, *scale_and_softcap, **head)

    # Unnormalised exponentials: e_tail over the unlisted tokens, rest over all but the label.
    is_label = (ids == labels.unsqueeze(-1)) & ~padded
    top = torch.maximum(torch.maximum(z_max, z_label), z_listed.masked_fill(padded, -math.inf).amax(-1, keepdim=True))
    e_listed, e_label = (z_listed - top).exp().masked_fill(padded, 0.0), (z_label - top).exp()
    rest = z_sum * (z_max - top).exp() + e_listed.masked_fill(is_label, 0.0).sum(-1, keepdim=True)
    total = rest + e_label
    # log Σ_tail e^(z − top), in log space as a tail's exponentials may underflow.
    is_listed = is_label.any(-1, keepdim=True)
    log_tail = torch.logaddexp(z_max - top + z_sum.log(), (z_label - top).masked_fill_(is_listed, -math.inf))
    has_no_tail = torch.isneginf(log_tail)
    lse = top + total.log()
    row_loss = torch.where(e_label == 1.0, torch.log1p(rest), lse - z_label).squeeze(-1)
    loss.copy_(row_loss.masked_fill(~is_label_valid, math.nan))

    if tail == "renormalize":
        log_student = torch.log_softmax((z_listed / options.temperature).masked_fill(padded, NEG), -1)
        log_student.masked_fill_(padded, NEG)
    else:
        log_listed = (z_listed - lse).masked_fill(padded, NEG)
        log_student = torch.cat([log_listed, (log_tail - total.log()).masked_fill_(has_no_tail, NEG)], -1)
    D, grad = divergence_and_gradient(log_teacher, log_student, options.divergence, options.beta, needs_gradient)
    kl_loss.copy_(D.mul_(options.loss_scale))
    if grad is None:
        return

    grad.mul_((kl_coefficient * options.loss_scale / options.temperature).unsqueeze(-1))
    grad_tail = torch.zeros_like(total)
    if tail == "bucket":
        grad, grad_tail = grad[:, :-1], grad[:, -1:].contiguous()
    p_listed, rest = e_listed / total, rest / total
    grad = grad + coefficient.unsqueeze(-1) * torch.where(is_label, -rest, p_listed)
    if pairs is not None:
        grad = grad + 0.5 * p_listed * (pairs.sum.gather(-1, ids) - pairs.mean.unsqueeze(-1))
    slope = logit_scale if logit_softcap is None else logit_scale * (1 - (z_listed / logit_softcap).square())
    grad = grad * slope
    pair_sum, pair_mean = (lse, lse) if pairs is None else pairs
    tail_gradient_kernel[(m,)](
        z, z.stride(0),
        d, d.stride(0),
        labels,
        (log_tail + top).masked_fill_(has_no_tail, 0.0), log_tail.exp() / total, rest,
        coefficient, grad_tail,
        pair_sum, pair_sum.stride(0), pair_mean,
        *scale_and_softcap,
        **head,
        HAS_PAIRS=pairs is not None,
    )  # fmt: skip
    d.scatter_(-1, ids, torch.where(padded, grad.gather(-1, first), grad).to(d.dtype))
