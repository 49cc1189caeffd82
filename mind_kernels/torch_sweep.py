"""One sweep over the vocabulary: head, cross-entropy, KL and answer consistency, and their gradients, chunk by chunk.

Every fused operation of this package that takes hidden states is this sweep with other coefficients. For the rows n of
a chunk (S supervised rows in all; V vocabulary; H hidden size):

    z = softcap(logit_scale · (X Wᵀ + b))                                        # (m, H) @ (H, V) -> (m, V)
    G = ∂loss/∂(X Wᵀ + b), written over z                                        # elementwise, in fp32 blocks
    dX = G W                                                                     # (m, V) @ (V, H) -> (m, H)
    dW += Gᵀ X                                                                   # (V, m) @ (m, H) -> (V, H)

Since the loss is linear in the coefficients and they are known beforehand, gradients are made while the logits are at
hand: each row's logits are computed once. Three products of 2·S·H·V FLOP each (two when the head is frozen), plus one
for a TeacherHidden; peak extra memory: the gradients + max_logits_bytes (+ 4·V·H bytes of fp32 accumulator when a
16-bit weight gradient takes more than one chunk).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mind_kernels.chunking import BLOCK_ELEMENTS, Chunk, Rows, order_rows, plan_chunks
from mind_kernels.divergences import pairwise_jsd_and_gradient
from mind_kernels.reduction import RationaleReduction, statistics_dtype
from mind_kernels.teacher_rows import KLOptions, TeacherRows, apply_head_, project
from mind_kernels.teachers import Teacher, TeacherHidden


@dataclass(frozen=True)
class SweepOptions:
    """What the sweep computes, without the tensors that have gradients.

    loss = (cross_entropy_weight·Σ_r w_r·CE_r + kl_weight·Σ_r w_r·KL_r
            + consistency_weight·Σ_b Σ_{i<j} w_bi w_bj·JSD_bij) / num_questions
    """

    losses_shape: torch.Size  # of what is returned per rationale
    cross_entropy_weight: float = 0.0
    kl_weight: float = 0.0
    consistency_weight: float = 0.0
    num_questions: float = 1.0
    labels: Tensor | None = None  # (N,); None: no supervised row
    ignore_index: int = -100
    rationale_id: Tensor | None = None  # (N,) int64, with labels
    reduction: str = "mean"  # within a rationale
    answer_index: Tensor | None = None  # (B, K, A)
    teacher: Teacher | None = None
    kl: KLOptions = field(default_factory=KLOptions)
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    max_logits_bytes: int | None = None


class SweepResult(NamedTuple):
    cross_entropy: Tensor  # (R,) per rationale, reduced
    kl: Tensor  # (R,) per rationale, reduced, τ^p included
    jsd: Tensor | None  # (B, K, K) mean over the answer positions
    grad_hidden_states: Tensor | None  # all gradients are of loss / gradient_scale
    grad_lm_head_weight: Tensor | None
    grad_lm_head_bias: Tensor | None
    gradient_scale: float


class _Groups(NamedTuple):
    rows: list[Tensor]  # rows of each answer position
    members: list[Tensor]  # the perspectives they belong to
    question: list[int]
    num_positions: list[int]  # A of each question: positions at which any rationale is present


def _answer_groups(answer_index: Tensor, weights: Tensor, all_pairs: bool) -> _Groups:
    """Answer positions with at least two rationales to compare.

    A rationale of weight 0 enters no pair unless all_pairs, when the gradient of rationale_weights asks for its JSD.
    """
    present = answer_index >= 0
    num_positions = present.any(1).sum(-1).tolist()
    included = present if all_pairs else present & (weights != 0).unsqueeze(-1)
    groups = _Groups([], [], [], num_positions)
    for b, a in (included.sum(1) >= 2).nonzero().tolist():
        members = included[b, :, a].nonzero().squeeze(1)
        groups.rows.append(answer_index[b, members, a].long())
        groups.members.append(members)
        groups.question.append(b)
    return groups


class _Terms(NamedTuple):
    """Per row, in processing order: the label and the derivative of the loss by this row's CE and KL."""

    labels: Tensor  # (n,) 0 where not supervised
    invalid: Tensor | None  # (n,) bool: label outside [0, V), on devices where that is not an error
    cross_entropy: Tensor  # (n,)
    kl: Tensor | None  # (n,)

    def rows(self, start: int, stop: int) -> _Terms:
        block = slice(start, stop)
        invalid = None if self.invalid is None else self.invalid[block]
        kl = None if self.kl is None else self.kl[block]
        return _Terms(self.labels[block], invalid, self.cross_entropy[block], kl)


class _BlockLosses(NamedTuple):
    cross_entropy: Tensor | None  # (m,)
    kl: Tensor | None  # (m,)
    jsd: Tensor | None  # (m, m)


def _block_losses(
    z: Tensor,  # (m, V) statistics dtype: the raw product; overwritten with ∂loss/∂product when need_gradient
    terms: _Terms,  # of these rows
    options: SweepOptions,
    teacher_rows: TeacherRows | None,
    start: int,  # of these rows within the chunk
    pair_weights: Tensor | None,  # (m, m) when these rows are one answer position
    need_gradient: bool,
) -> _BlockLosses:
    apply_head_(z, options.logit_scale, options.logit_softcap)
    softcap_slope = None
    if need_gradient and options.logit_softcap is not None:
        softcap_slope = 1 - (z / options.logit_softcap).square_()  # d/du c·tanh(u/c) = 1 − tanh²

    kl = jsd = gradient_other = None
    if teacher_rows is not None and terms.kl is not None:
        kl, gradient_other = teacher_rows.divergence(z, start, start + len(z), need_gradient)
        if gradient_other is not None:
            gradient_other.mul_(terms.kl.unsqueeze(-1))
    if pair_weights is not None:
        jsd, gradient_pairs = pairwise_jsd_and_gradient(torch.log_softmax(z, -1), pair_weights, need_gradient)
        if gradient_pairs is not None:
            gradient_other = gradient_pairs if gradient_other is None else gradient_other.add_(gradient_pairs)

    cross_entropy = None
    if options.cross_entropy_weight != 0:
        cross_entropy = _cross_entropy_(z, terms, need_gradient)
        if need_gradient and gradient_other is not None:
            z.add_(gradient_other)
    elif need_gradient:
        z.zero_() if gradient_other is None else z.copy_(gradient_other)
    if need_gradient:
        if softcap_slope is not None:
            z.mul_(softcap_slope)
        if options.logit_scale != 1.0:
            z.mul_(options.logit_scale)
    return _BlockLosses(cross_entropy, kl, jsd)


def _cross_entropy_(z: Tensor, terms: _Terms, need_gradient: bool) -> Tensor:  # (m, V) -> (m,)
    """CE = lse(z) − z_y per row; z ← coefficient·(softmax(z) − onehot(y)) when need_gradient."""
    labels = terms.labels.unsqueeze(-1)
    z_label = z.gather(-1, labels)
    row_max = z.amax(-1, keepdim=True)
    z.sub_(row_max).exp_()
    total = z.sum(-1, keepdim=True)
    label_log_prob = z_label.sub_(row_max).sub_(total.log())
    if need_gradient:
        coefficient = terms.cross_entropy.unsqueeze(-1)
        z.mul_(coefficient / total)
        # expm1 keeps the digits of p_y − 1 for a confident student.
        z.scatter_(-1, labels, coefficient * torch.expm1(label_log_prob))
    cross_entropy = label_log_prob.squeeze(-1).neg()
    if terms.invalid is not None:
        cross_entropy.masked_fill_(terms.invalid, math.nan)
    return cross_entropy


class _WeightGradient:
    """dW += Gᵀ X over the chunks, in fp32 (fp64 for fp64), with one downcast at the end.

    One chunk is one product and needs no accumulator: its inner sum is already fp32. A CPU has no 16-bit product with
    an fp32 result, so there each chunk's partial is rounded once before it is added.
    """

    TILE = 8192  # vocabulary rows of a 16-bit partial held at a time

    def __init__(self, V: int, H: int, compute_dtype: torch.dtype, device: torch.device, single_chunk: bool):
        direct = single_chunk or compute_dtype in (torch.float32, torch.float64)
        self.total = torch.empty(V, H, dtype=compute_dtype if direct else torch.float32, device=device)
        self.tile = None if direct else torch.empty(min(self.TILE, V), H, dtype=compute_dtype, device=device)
        self.empty = True

    def add(self, G: Tensor, X: Tensor) -> None:  # (V, m) @ (m, H) -> (V, H)
        if self.tile is None:
            torch.addmm(self.total, G.t(), X, beta=0.0 if self.empty else 1.0, out=self.total)
        else:
            for v in range(0, len(self.total), self.TILE):
                total = self.total[v : v + self.TILE]
                partial = torch.mm(G[:, v : v + self.TILE].t(), X, out=self.tile[: len(total)])
                total.copy_(partial) if self.empty else total.add_(partial)
        self.empty = False

    def finish(self, dtype: torch.dtype) -> Tensor:
        return self.total.zero_().to(dtype) if self.empty else self.total.to(dtype)


@dataclass(frozen=True)
class _Plan:
    """Which rows, in which order, with which coefficients."""

    rows: Rows
    is_supervised: Tensor  # (n,) bool
    terms: _Terms
    groups: _Groups
    pair_weights: Tensor | None  # (B, K, K): ∂loss/∂(Σ over the question's positions of JSD_ij)
    reduce: RationaleReduction | None
    gradient_scale: float  # coefficients and gradients are of loss / gradient_scale


def _plan(
    N: int,
    V: int,
    weights: Tensor,  # (R,) statistics dtype
    options: SweepOptions,
    compute_dtype: torch.dtype,
    need_gradient: bool,
    need_grad_rationale_weights: bool,
) -> _Plan:
    device = weights.device
    supervised = torch.zeros(N, dtype=torch.bool, device=device)
    has_gradient = supervised
    reduce = None
    if options.labels is not None:
        assert options.rationale_id is not None
        supervised = options.labels != options.ignore_index
        per_question = weights / options.num_questions
        reduce = RationaleReduction(per_question, options.rationale_id, supervised, options.reduction)
        has_gradient = reduce.weight != 0 if need_gradient else has_gradient

    groups = _Groups([], [], [], [])
    pair_weights = None
    if options.answer_index is not None:
        alpha = weights.view(options.answer_index.shape[:2])
        groups = _answer_groups(options.answer_index, alpha, need_grad_rationale_weights)
        # ∂loss/∂JSD_ij at one position: consistency_weight·α_i α_j / (A·num_questions)
        positions = alpha.new_tensor(groups.num_positions).clamp_(min=1).view(-1, 1, 1)
        scale = options.consistency_weight / options.num_questions
        pair_weights = scale * alpha.unsqueeze(2) * alpha.unsqueeze(1) / positions
    rows = order_rows(supervised, has_gradient, groups.rows, groups_have_gradient=need_gradient)

    is_supervised = supervised[rows.order]
    cross_entropy = torch.zeros(len(rows.order), dtype=weights.dtype, device=device)
    labels = torch.zeros(len(rows.order), dtype=torch.int64, device=device)
    invalid = kl = None
    if options.labels is not None and reduce is not None:
        labels = torch.where(is_supervised, options.labels[rows.order], 0).long()
        if device.type != "cpu":
            invalid = (labels < 0) | (labels >= V)
            labels = labels.masked_fill(invalid, 0)
        row_weight = reduce.weight[rows.order]
        cross_entropy = options.cross_entropy_weight * row_weight
        kl = options.kl_weight * row_weight if options.teacher is not None else None

    # fp16 has no room for coefficients of 1/N: they are divided by the largest, which backward multiplies in.
    gradient_scale = 1.0
    if compute_dtype == torch.float16 and len(rows.order) > 0:
        coefficients = [c for c in (cross_entropy, kl, pair_weights) if c is not None]
        gradient_scale = max(float(c.abs().max()) for c in coefficients) or 1.0
        cross_entropy = cross_entropy / gradient_scale
        kl = None if kl is None else kl / gradient_scale
        pair_weights = None if pair_weights is None else pair_weights / gradient_scale
    terms = _Terms(labels, invalid, cross_entropy, kl)
    return _Plan(rows, is_supervised, terms, groups, pair_weights, reduce, gradient_scale)


def _blocks(chunk: Chunk, group_offsets: list[int], block_rows: int) -> Iterator[tuple[int, int, int | None]]:
    """(start, stop, group) in processing order: each answer group by itself, then block_rows at a time."""
    start = chunk.start
    while start < chunk.stop:
        if start < group_offsets[-1]:
            group = group_offsets.index(start)
            stop = group_offsets[group + 1]
            yield start, stop, group
        else:
            stop = min(start + block_rows, chunk.stop)
            yield start, stop, None
        start = stop


def sweep(
    hidden_states: Tensor,  # (N, H)
    lm_head_weight: Tensor,  # (V, H)
    lm_head_bias: Tensor | None,  # (V,)
    rationale_weights: Tensor,  # (R,) or (B, K)
    options: SweepOptions,
    compute_dtype: torch.dtype,  # of the products
    needs_input_grad: Sequence[bool],  # of the four tensors
) -> SweepResult:
    """The losses, and the gradients that needs_input_grad asks for. See the head of this file."""
    need_grad_hidden_states, need_grad_weight, need_grad_bias, need_grad_rationale_weights = needs_input_grad
    need_gradient = need_grad_hidden_states or need_grad_weight or need_grad_bias
    (N, H), V = hidden_states.shape, lm_head_weight.shape[0]
    device, stats = hidden_states.device, statistics_dtype(compute_dtype)
    weights = rationale_weights.detach().reshape(-1).to(stats)
    plan = _plan(N, V, weights, options, compute_dtype, need_gradient, need_grad_rationale_weights)
    rows, groups = plan.rows, plan.groups

    bytes_per_row = V * compute_dtype.itemsize
    teacher_head = options.teacher.lm_head_weight if isinstance(options.teacher, TeacherHidden) else None
    if teacher_head is not None:
        bytes_per_row += teacher_head.shape[0] * teacher_head.dtype.itemsize
    chunks = plan_chunks(rows, bytes_per_row, options.max_logits_bytes)
    chunk_rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    block_rows = max(1, BLOCK_ELEMENTS // V)
    scratch_rows = max([block_rows, *(len(group) for group in groups.rows)])

    X_all = hidden_states.detach()
    W = lm_head_weight.detach().to(compute_dtype)
    b = None if lm_head_bias is None else lm_head_bias.detach().to(compute_dtype)
    logits = torch.empty(chunk_rows, V, dtype=compute_dtype, device=device)
    teacher_logits = None
    if teacher_head is not None:
        teacher_logits = torch.empty(chunk_rows, teacher_head.shape[0], dtype=teacher_head.dtype, device=device)
    # 16-bit logits are taken to fp32 block by block; fp32 and fp64 ones are worked on where they are.
    scratch = None if compute_dtype == stats else torch.empty(scratch_rows, V, dtype=stats, device=device)

    row_cross_entropy, row_kl = torch.zeros_like(plan.terms.cross_entropy), torch.zeros_like(plan.terms.cross_entropy)
    jsd = None if plan.pair_weights is None else torch.zeros_like(plan.pair_weights)
    grad_hidden_states = torch.zeros_like(X_all) if need_grad_hidden_states else None
    grad_bias = torch.zeros(V, dtype=stats, device=device) if need_grad_bias else None
    weight_gradient = None
    if need_grad_weight:
        single_chunk = sum(chunk.needs_gradient for chunk in chunks) <= 1
        weight_gradient = _WeightGradient(V, H, compute_dtype, device, single_chunk)

    for chunk in chunks:
        index = rows.order[chunk.start : chunk.stop]
        X = X_all[index].to(compute_dtype)
        z_chunk = project(X, W, b, logits[: len(index)])
        teacher_rows = None
        if options.teacher is not None:
            teacher_rows = TeacherRows(options.teacher, options.kl, index, teacher_logits)
        for start, stop, group in _blocks(chunk, rows.group_offsets, block_rows):
            stored = z_chunk[start - chunk.start : stop - chunk.start]
            z = stored if scratch is None else scratch[: stop - start].copy_(stored)
            pairs = None
            if group is not None and plan.pair_weights is not None:
                members, question = groups.members[group], groups.question[group]
                pairs = plan.pair_weights[question][members][:, members]
            terms = plan.terms.rows(start, stop)
            losses = _block_losses(z, terms, options, teacher_rows, start - chunk.start, pairs, chunk.needs_gradient)
            if losses.cross_entropy is not None:
                row_cross_entropy[start:stop] = losses.cross_entropy
            if losses.kl is not None:
                row_kl[start:stop] = losses.kl
            if losses.jsd is not None and jsd is not None:
                jsd[question, members.unsqueeze(1), members] += losses.jsd / groups.num_positions[question]
            if chunk.needs_gradient:
                if grad_bias is not None:
                    grad_bias += z.sum(0)
                if scratch is not None:
                    stored.copy_(z)
        if chunk.needs_gradient:
            if grad_hidden_states is not None:
                grad_hidden_states[index] = torch.mm(z_chunk, W).to(X_all.dtype)  # (m, V) @ (V, H) -> (m, H)
            if weight_gradient is not None:
                weight_gradient.add(z_chunk, X)
    del logits, teacher_logits, scratch

    cross_entropy, kl = torch.zeros_like(weights), torch.zeros_like(weights)
    if plan.reduce is not None:
        rows_of_losses = rows.order[plan.is_supervised]
        cross_entropy = plan.reduce(row_cross_entropy[plan.is_supervised], rows_of_losses)
        kl = plan.reduce(row_kl[plan.is_supervised], rows_of_losses)
    return SweepResult(
        cross_entropy,
        kl,
        jsd,
        grad_hidden_states,
        None if weight_gradient is None else weight_gradient.finish(lm_head_weight.dtype),
        None if grad_bias is None or lm_head_bias is None else grad_bias.to(lm_head_bias.dtype),
        plan.gradient_scale,
    )


class _LinearLoss(torch.autograd.Function):
    """The gradients are made in forward. The first backward hands them over (no copy of a (V, H) tensor); another
    backward through the same graph repeats the sweep, so it is correct and costs a sweep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,  # (N, H)
        lm_head_weight: Tensor,  # (V, H)
        lm_head_bias: Tensor | None,  # (V,)
        rationale_weights: Tensor,  # (R,) or (B, K)
        options: SweepOptions,
        compute_dtype: torch.dtype,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:4]]
        ctx.sweep_arguments = options, compute_dtype, needs
        tensors = hidden_states, lm_head_weight, lm_head_bias, rationale_weights
        with torch.autocast(hidden_states.device.type, enabled=False):
            result = sweep(*tensors, *ctx.sweep_arguments)
            weights = rationale_weights.reshape(-1).to(result.cross_entropy.dtype)
            # ∂loss/∂w_r = (CE_r + kl_weight·KL_r + consistency_weight·Σ_j w_j·JSD_rj) / num_questions
            grad_weights = options.cross_entropy_weight * result.cross_entropy + options.kl_weight * result.kl
            grad_weights = grad_weights / options.num_questions
            loss = weights.dot(grad_weights)
            consistency = weights.new_zeros(())
            if result.jsd is not None:
                alpha = weights.view(result.jsd.shape[:2])
                neighbours = torch.einsum("bij,bj->bi", result.jsd, alpha)
                consistency = 0.5 * (alpha * neighbours).sum() / options.num_questions
                loss = loss + options.consistency_weight * consistency
                grad_weights = grad_weights.add(
                    neighbours.reshape(-1), alpha=options.consistency_weight / options.num_questions
                )
        ctx.save_for_backward(*tensors)
        ctx.result = result
        ctx.grad_weights = grad_weights.view(rationale_weights.shape)
        parts = result.cross_entropy.reshape(options.losses_shape), result.kl.reshape(options.losses_shape), consistency
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        result, ctx.result = ctx.result, None
        tensors = ctx.saved_tensors
        if result is None:
            with torch.autocast(grad_loss.device.type, enabled=False):
                result = sweep(*tensors, *ctx.sweep_arguments)
        factor = grad_loss * result.gradient_scale
        gradients = [result.grad_hidden_states, result.grad_lm_head_weight, result.grad_lm_head_bias]
        # On a CPU looking at the factor is free and 1 is the rule; on a GPU it would wait for the device.
        if not (factor.device.type == "cpu" and float(factor) == 1.0):
            gradients = [None if gradient is None else gradient.mul_(factor) for gradient in gradients]
        grad_weights = (grad_loss * ctx.grad_weights).to(tensors[3].dtype) if ctx.needs_input_grad[3] else None
        return *gradients, grad_weights, None, None, None


class LinearLosses(NamedTuple):
    loss: Tensor  # () differentiable
    cross_entropy: Tensor  # per rationale, detached
    kl: Tensor  # per rationale, detached, τ^p included
    consistency: Tensor  # () detached, over num_questions


def linear_loss(
    hidden_states: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    lm_head_bias: Tensor | None,  # (V,)
    rationale_weights: Tensor,  # (R,) or (B, K)
    options: SweepOptions,
) -> LinearLosses:
    """The sweep as one differentiable operation, fp32 (fp64 for fp64) losses."""
    device = hidden_states.device.type
    compute_dtype = hidden_states.dtype
    if torch.is_autocast_enabled(device) and compute_dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(device)
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    # In Function.forward grad mode is off, so whether a graph is wanted is asked here.
    return LinearLosses(
        *_LinearLoss.apply(
            hidden_states,
            lm_head_weight,
            lm_head_bias,
            rationale_weights,
            options,
            compute_dtype,
            torch.is_grad_enabled(),
        )
    )
