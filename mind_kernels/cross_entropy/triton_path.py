"""Between the products: a row's cross-entropy and its gradient written over its logits, one Triton program a row.

A chunk has hundreds to thousands of rows, several for every multiprocessor, so a row is not split over programs: no
partial sums, no second launch, and the second pass over a row finds what is left of it in the cache. Deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mind_kernels.triton_math import (
    LOG2E,
    LOWEST,
    WIDTH,
    apply_head,
    block_offsets,
    label_loss,
    load_block,
    load_logits,
    online_sum,
    put_label,
    row_launch,
    softcap_slope,
    store_block,
    sum_of_lanes,
)


def launch(z: Tensor, has_softcap: bool) -> dict[str, int]:
    """Two 16-byte loads in flight for each thread, one where a cap needs the registers; of long rows two programs a
    multiprocessor.
    """
    return row_launch(z, 16 if has_softcap else 32, warps=16, registers=64)


class PairGradient(NamedTuple):
    """The consistency gradient of the rows of a launch: ½·P ∘ (sum − mean), see consistency/triton_path.py."""

    sum: Tensor  # (m, V) fp32
    mean: Tensor  # (m,) fp32


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
    scale, softcap = logit_scale * LOG2E, logit_softcap * LOG2E
    label = tl.load(label_ptr + i_n)
    is_label_valid = (label >= 0) & (label < V)
    label = tl.where(is_label_valid, label, 0).to(tl.int32)
    z_label = apply_head(tl.load(z_ptr + label), scale, softcap, HAS_SOFTCAP)

    o_block = block_offsets(BLOCK_V)
    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V
    b_sum = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    b_max = b_sum + LOWEST
    for IS_REST in tl.static_range(2):
        for v in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
            b_z = load_logits(z_ptr, v + o_block, scale, softcap, HAS_SOFTCAP, V, IS_REST)
            b_others = put_label(b_z, o_block, label, v, float("-inf"), BLOCK_V)
            b_max, b_sum = online_sum(b_max, b_sum, b_others)
    z_max, z_sum = sum_of_lanes(b_max, b_sum)
    loss, rest, lse = label_loss(z_label, z_max, z_sum)
    tl.store(loss_ptr + i_n, tl.where(is_label_valid, loss, float("nan")))

    if NEEDS_GRADIENT:
        coefficient = tl.load(coefficient_ptr + i_n) * logit_scale
        if HAS_PAIRS:
            pair_ptr += i_n * stride_pn
            pair_mean = tl.load(pair_mean_ptr + i_n)
        for IS_REST in tl.static_range(2):
            for w in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
                v = w if IS_REST else WHOLE - BLOCK_V - w
                o_v = v + o_block
                b_z = load_logits(z_ptr, o_v, scale, softcap, HAS_SOFTCAP, V, IS_REST, IS_LAST=True)
                b_p = tl.exp2(b_z - lse)
                b_d = put_label(coefficient * b_p, o_block, label, v, -coefficient * rest, BLOCK_V)
                if HAS_PAIRS:
                    b_pair = load_block(pair_ptr, o_v, V, IS_REST, IS_LAST=True)
                    b_d += 0.5 * logit_scale * b_p * (b_pair - pair_mean)
                if HAS_SOFTCAP:
                    b_d *= softcap_slope(b_z, softcap)
                store_block(d_ptr, o_v, b_d, V, IS_REST)


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
        **launch(z, logit_softcap is not None),
    )  # fmt: skip
