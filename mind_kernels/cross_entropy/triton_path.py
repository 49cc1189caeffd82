"""Between the products: a row's cross-entropy and its gradient written over its logits, one Triton program a row.

A chunk has hundreds to thousands of rows, several for every multiprocessor, so a row is not split over programs: no
partial sums, no second launch, and the second pass over a row finds what is left of it in the cache. Deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mind_kernels.triton_math import LOWEST, WIDE_ROW, apply_head, head_slope, label_loss, online_sum

# Elements of a row taken at a time: 8 for each of 512 threads, one 16-byte load of 16-bit logits. 16 spill with a cap.
MAX_BLOCK_V = 4096


class PairGradient(NamedTuple):
    """The consistency gradient of the rows of a launch: ½·P ∘ (sum − mean), see consistency/triton_path.py."""

    sum: Tensor  # (m, V) fp32
    mean: Tensor  # (m,) fp32


def block_size(V: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(V)))


@triton.jit
def cross_entropy_kernel(
    z_ptr, stride_zn,  # (m, V) bare products
    d_ptr, stride_dn,  # (m, V) ∂loss/∂product, written; may be z itself
    label_ptr,  # (m,) int64
    coefficient_ptr,  # (m,) fp32: ∂loss/∂(this row's cross-entropy)
    pair_ptr, stride_pn, pair_mean_ptr,  # (m, V), (m,) fp32
    loss_ptr,  # (m,) fp32
    logit_scale,
    logit_softcap,
    V: tl.constexpr,  # one head has one V: what is known of its remainder costs nothing
    HAS_SOFTCAP: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """loss = lse(z) − z_y;  ∂loss/∂u = (c·(softmax(z) − onehot(y)) + pairs)·dz/du.  A label outside [0, V) is NaN."""
    i_n = tl.program_id(0).to(tl.int64)
    z_ptr += i_n * stride_zn
    d_ptr += i_n * stride_dn
    label = tl.load(label_ptr + i_n)
    is_label_valid = (label >= 0) & (label < V)
    label = tl.where(is_label_valid, label, 0)
    z_label = apply_head(tl.load(z_ptr + label), logit_scale, logit_softcap, HAS_SOFTCAP)

    o_block = tl.arange(0, BLOCK_V)
    b_max = tl.full((BLOCK_V,), LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_V,), tl.float32)
    for v in range(0, V, BLOCK_V):
        o_v = v + o_block
        b_z = apply_head(tl.load(z_ptr + o_v, mask=o_v < V, other=0.0), logit_scale, logit_softcap, HAS_SOFTCAP)
        b_z = tl.where((o_v < V) & (o_v != label), b_z, float("-inf"))
        b_max, b_sum = online_sum(b_max, b_sum, b_z)
    z_max = tl.max(b_max, axis=0)
    z_sum = tl.sum(b_sum * tl.exp(b_max - z_max), axis=0)
    loss, rest, lse = label_loss(z_label, z_max, z_sum)
    tl.store(loss_ptr + i_n, tl.where(is_label_valid, loss, float("nan")))

    if NEEDS_GRADIENT:
        coefficient = tl.load(coefficient_ptr + i_n)
        if HAS_PAIRS:
            pair_ptr += i_n * stride_pn
            pair_mean = tl.load(pair_mean_ptr + i_n)
        for v in range(0, V, BLOCK_V):
            o_v = v + o_block
            b_z = apply_head(tl.load(z_ptr + o_v, mask=o_v < V, other=0.0), logit_scale, logit_softcap, HAS_SOFTCAP)
            b_p = tl.exp(b_z - lse)
            b_d = coefficient * tl.where(o_v == label, -rest, b_p)
            if HAS_PAIRS:
                b_pair = tl.load(pair_ptr + o_v, mask=o_v < V, other=0.0)
                b_d += 0.5 * b_p * (b_pair - pair_mean)
            b_d *= head_slope(b_z, logit_scale, logit_softcap, HAS_SOFTCAP)
            tl.store(d_ptr + o_v, b_d.to(d_ptr.dtype.element_ty), mask=o_v < V)


def cross_entropy_(
    z: Tensor,  # (m, V) bf16, fp16 or fp32, bare products
    d: Tensor,  # (m, V) ∂loss/∂product, written when needs_gradient; may be z itself
    labels: Tensor,  # (m,) int64
    coefficient: Tensor,  # (m,) fp32
    loss: Tensor,  # (m,) fp32, written
    *,
    logit_scale: float,
    logit_softcap: float | None,
    pairs: PairGradient | None,
    needs_gradient: bool,
) -> None:
    """Bytes: e·V read for the loss, e·V read again (in part from cache) and e·V written for the gradient."""
    m, V = z.shape
    assert z.stride(1) == d.stride(1) == 1
    assert labels.is_contiguous() and coefficient.is_contiguous() and loss.is_contiguous()
    pair_sum, pair_mean = (coefficient, coefficient) if pairs is None else pairs
    cross_entropy_kernel[(m,)](
        z, z.stride(0),
        d, d.stride(0),
        labels,
        coefficient,
        pair_sum, pair_sum.stride(0), pair_mean,
        loss,
        logit_scale,
        1.0 if logit_softcap is None else logit_softcap,
        V=V,
        HAS_SOFTCAP=logit_softcap is not None,
        HAS_PAIRS=pairs is not None,
        NEEDS_GRADIENT=needs_gradient,
        BLOCK_V=block_size(V, MAX_BLOCK_V),
        **WIDE_ROW,
    )  # fmt: skip
