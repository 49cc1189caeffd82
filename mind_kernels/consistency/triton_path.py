"""Pairwise answer consistency between the products: all pairs of an answer position's rows in registers.

Two passes. The first makes each row's log-sum-exp. The second splits the vocabulary over programs, so that a single
position fills a GPU: one program holds one tile of the K rows, makes each of the K(K−1)/2 softplus once for both sides
of its pair, and writes

    sum_i = Σ_j w_ij·log(P_i/M_ij)     (its tile of V)
    Σ_v P_i·sum_i  and  ½ Σ_v (P_i·log(P_i/M_ij) + P_j·log(P_j/M_ij))     (partial, summed in fixed order afterwards)

The gradient ½·P_i ∘ (sum_i − Σ_v P_i·sum_i) is added by the kernel of the row's other losses, which has P_i at hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mind_kernels.cross_entropy.triton_path import PairGradient
from mind_kernels.triton_math import (
    LN2,
    LOG2E,
    LOWEST,
    WIDTH,
    apply_head,
    block_offsets,
    load_logits,
    online_sum,
    row_launch,
    softplus2,
    sum_of_lanes,
)

# One warp, whose sums need no barrier, and as many elements a lane as leave K rows of log-probabilities, probabilities
# and sums in registers: 4 at K = 8 spill on NVIDIA.
BLOCK_V = {2: 256, 4: 128, 8: 64}


@triton.jit
def lse_kernel(
    z_ptr, stride_zn,  # (m, V) bare products
    lse_ptr,  # (m,) fp32, in bits; written
    logit_scale,
    logit_softcap,
    V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """lse = log₂ Σ 2^z of the final logits z, in bits, of each row."""
    i_n = tl.program_id(0).to(tl.int64)
    z_ptr += i_n * stride_zn
    scale, softcap = logit_scale * LOG2E, logit_softcap * LOG2E
    o_block = block_offsets(BLOCK_V)
    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V
    b_sum = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    b_max = b_sum + LOWEST
    for IS_REST in tl.static_range(2):
        for v in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
            b_z = load_logits(z_ptr, v + o_block, scale, softcap, HAS_SOFTCAP, V, IS_REST)
            b_max, b_sum = online_sum(b_max, b_sum, b_z)
    z_max, z_sum = sum_of_lanes(b_max, b_sum)
    tl.store(lse_ptr + i_n, z_max + tl.log2(z_sum))


@triton.jit
def pairs_kernel(
    z_ptr, stride_zn,  # (m, V) bare products
    lse_ptr,  # (m,) fp32, in bits
    row_ptr,  # (P, K) int64: row of z, −1 where absent
    question_ptr,  # (P,) int64
    weight_ptr,  # (B, K, K) fp32
    sum_ptr, stride_sn,  # (m, V) fp32
    mean_ptr,  # (P, S, K) fp32
    jsd_ptr,  # (P, S, K, K) fp32, its upper triangle
    logit_scale,
    logit_softcap,
    V: tl.constexpr,
    K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of V of one answer position: the sums, means and JSDs above. The sums of absent rows are not written."""
    i_p, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_s * BLOCK_V + tl.arange(0, BLOCK_V)
    weight_ptr += tl.load(question_ptr + i_p) * K * K
    mean_ptr += (i_p * tl.num_programs(1) + i_s) * K
    jsd_ptr += (i_p * tl.num_programs(1) + i_s) * K * K
    scale, softcap = logit_scale * LOG2E, logit_softcap * LOG2E

    rows, log_probs, probs, sums = (), (), (), ()
    for i in tl.static_range(K):
        row = tl.load(row_ptr + i_p * K + i)
        m_v = (o_v < V) & (row >= 0)
        b_z = tl.load(z_ptr + row * stride_zn + o_v, mask=m_v, other=0.0)
        b_z = apply_head(b_z, scale, softcap, HAS_SOFTCAP)
        # 2^(−10⁴) is 0, and −10⁴ − (−10⁴) is not NaN.
        b_log_p = tl.where(m_v, b_z - tl.load(lse_ptr + row, mask=row >= 0, other=0.0), -1.0e4)
        rows = rows + (row,)  # noqa: RUF005  (the compiler knows no starred tuple)
        log_probs = log_probs + (b_log_p,)  # noqa: RUF005
        probs = probs + (tl.exp2(b_log_p),)  # noqa: RUF005
        sums = sums + (tl.zeros((BLOCK_V,), tl.float32),)  # noqa: RUF005

    for i in tl.static_range(K):
        for j in tl.static_range(i + 1, K):
            b_d = log_probs[j] - log_probs[i]
            b_ratio_i = 1.0 - softplus2(b_d)  # log₂(P_i/M) = 1 − log₂(1 + P_j/P_i)
            b_ratio_j = b_ratio_i + b_d
            is_pair = ((rows[i] >= 0) & (rows[j] >= 0)).to(tl.float32)
            jsd = tl.sum(probs[i] * b_ratio_i + probs[j] * b_ratio_j, axis=0) * (0.5 * LN2)
            tl.store(jsd_ptr + i * K + j, is_pair * jsd)
            if NEEDS_GRADIENT:
                weight = is_pair * tl.load(weight_ptr + i * K + j) * LN2
                sums = sums[:i] + (sums[i] + weight * b_ratio_i,) + sums[i + 1 :]  # noqa: RUF005
                sums = sums[:j] + (sums[j] + weight * b_ratio_j,) + sums[j + 1 :]  # noqa: RUF005
    if NEEDS_GRADIENT:
        for i in tl.static_range(K):
            tl.store(mean_ptr + i, tl.sum(probs[i] * sums[i], axis=0))
            tl.store(sum_ptr + rows[i] * stride_sn + o_v, sums[i], mask=(o_v < V) & (rows[i] >= 0))


def pairwise_jsd(
    z: Tensor,  # (m, V) bare products of all rows of P answer positions; left as they are
    rows: Tensor,  # (P, K) int64: row of z, −1 where absent; K a power of two
    entries: Tensor,  # (m,) int64: where in rows.flatten() each row of z stands
    questions: Tensor,  # (P,) int64
    pair_weights: Tensor,  # (B, K, K) fp32
    *,
    logit_scale: float,
    logit_softcap: float | None,
    needs_gradient: bool,
) -> tuple[Tensor, PairGradient | None]:  # (P, K, K) JSD_ij for i < j, 0 elsewhere; the gradient of Σ w_ij·JSD_ij
    """Bytes: e·V a row read twice; 4·V a row written when needs_gradient."""
    (m, V), (P, K) = z.shape, rows.shape
    assert z.stride(1) == 1 and rows.is_contiguous() and pair_weights.is_contiguous()
    head = {"HAS_SOFTCAP": logit_softcap is not None}
    softcap = 1.0 if logit_softcap is None else logit_softcap
    lse = torch.empty(m, dtype=torch.float32, device=z.device)
    lse_kernel[(m,)](
        z, z.stride(0),
        lse,
        logit_scale,
        softcap,
        V=V,
        **head,
        **row_launch(z, 32),
    )  # fmt: skip
    splits = triton.cdiv(V, BLOCK_V[K])
    jsd = torch.zeros(P, splits, K, K, dtype=torch.float32, device=z.device)
    mean = torch.empty(P, splits, K, dtype=torch.float32, device=z.device) if needs_gradient else lse
    total = torch.empty(m, V, dtype=torch.float32, device=z.device) if needs_gradient else lse
    pairs_kernel[(P, splits)](
        z, z.stride(0),
        lse,
        rows,
        questions,
        pair_weights,
        total, total.stride(0),
        mean,
        jsd,
        logit_scale,
        softcap,
        V=V,
        K=K,
        **head,
        NEEDS_GRADIENT=needs_gradient,
        BLOCK_V=BLOCK_V[K],
        num_warps=1,
    )  # fmt: skip
    return jsd.sum(1), PairGradient(total, mean.sum(1).flatten()[entries]) if needs_gradient else None
