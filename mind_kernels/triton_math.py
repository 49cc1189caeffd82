"""Elementwise mathematics that several Triton kernels share, all in fp32.

A constant stands behind what it multiplies: from Triton 3.8 on its interpreter makes a constant of constant × tensor.

Kernels count in bits: a logit is multiplied by log₂e as it comes in, and 2^x is then one instruction, where eˣ takes
four more that guard the smallest numbers and change the base. What leaves a kernel is in nats.

A row is read in blocks of BLOCK_V tokens as (lanes, WIDTH): a lane's WIDTH tokens are neighbours in memory and end up
in one thread, which finds their maximum before it takes any exponential. Whole blocks come first and need no mask, then
comes what is left of V:

    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V
    for IS_REST in tl.static_range(2):
        for v in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):

A second pass over a row goes from its end to its beginning, so that it starts with what was read last and is still in
the second-level cache; what is read for the last time, or written, is what the cache may give up first:

        for w in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
            v = w if IS_REST else WHOLE - BLOCK_V - w
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
WIDTH: tl.constexpr = tl.constexpr(8)  # one 16-byte load of 16-bit numbers

SHORT_ROW = 2**17  # bytes

# Where an online maximum starts: finite, so that −inf − maximum is −inf and never NaN.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


def block_size(V: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(V)))


def row_launch(z: Tensor, load_bytes: int, warps: int = 8, registers: int = 128) -> dict[str, int]:
    """BLOCK_V and launch of a kernel whose programs take one row of z (m, V) each, load_bytes a thread at a time.

    A second pass finds a row in the second-level cache if all rows in flight fit it. Short rows do with several
    programs of 8 warps a multiprocessor, of which some load while others wait for their sums; 128 registers leave room
    for two of the largest kernels. Of long rows fewer may be in flight, so these get `warps`, of which one or two
    programs fill a multiprocessor's 65,536 registers. HIP knows no such option, and AMD has 256 MB behind that cache.
    """
    V, tokens = z.shape[-1], max(WIDTH.value, load_bytes // z.element_size())
    if torch.version.hip:
        return {"BLOCK_V": block_size(V, 256 * tokens), "num_warps": 8}
    if V * z.element_size() <= SHORT_ROW:
        warps, registers = 8, 128
    return {"BLOCK_V": block_size(V, 32 * warps * tokens), "num_warps": warps, "maxnreg": registers}


@triton.jit
def block_offsets(BLOCK_V: tl.constexpr):  # (lanes, WIDTH) int32
    return tl.arange(0, BLOCK_V // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_stored(ptr, o_v, V: tl.constexpr, IS_REST: tl.constexpr, IS_LAST: tl.constexpr = False):
    """In the dtype of memory; 0 beyond V. IS_LAST: it is not read again."""
    POLICY: tl.constexpr = "evict_first" if IS_LAST else ""
    if IS_REST:
        b = tl.load(ptr + o_v, mask=o_v < V, other=0.0, eviction_policy=POLICY)
    else:
        b = tl.load(ptr + o_v, eviction_policy=POLICY)
    return b


@triton.jit
def load_block(ptr, o_v, V: tl.constexpr, IS_REST: tl.constexpr, IS_LAST: tl.constexpr = False):
    """load_stored in fp32."""
    return load_stored(ptr, o_v, V, IS_REST, IS_LAST).to(tl.float32)


@triton.jit
def store_block(ptr, o_v, b, V: tl.constexpr, IS_REST: tl.constexpr):
    if IS_REST:
        tl.store(ptr + o_v, b.to(ptr.dtype.element_ty), mask=o_v < V, eviction_policy="evict_first")
    else:
        tl.store(ptr + o_v, b.to(ptr.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def load_logits(
    ptr,
    o_v,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    V: tl.constexpr,
    IS_REST: tl.constexpr,
    IS_LAST: tl.constexpr = False,
):
    """Final logits in the unit of scale and softcap; −inf beyond V."""
    b_z = apply_head(load_stored(ptr, o_v, V, IS_REST, IS_LAST), scale, softcap, HAS_SOFTCAP)
    if IS_REST:
        b_z = tl.where(o_v < V, b_z, float("-inf"))
    return b_z


@triton.jit
def put_label(b, o_block, label, v, value, BLOCK_V: tl.constexpr):
    """b, of the tokens from v on, with `value` in the label's place.

    Of all blocks of a row one holds the label: the others skip two instructions an element.
    """
    if (label >= v) & (label < v + BLOCK_V):
        b = tl.where(o_block == label - v, value, b)
    return b


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0 with the digits of a small x: log(u)·x/(u − 1), u = 1 + x rounded (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log2_1p(w):
    """log₂(1 + w) for 0 ≤ w ≤ 1, to 2.1e-7 of itself: w times a polynomial, in nine instructions.

    tl.log2 takes some 25, as it also knows numbers below 2⁻¹²⁶, negative ones and NaN, and 1 + w drops a small w.
    """
    b = w * 0.007549080532044172 - 0.042566657066345215
    b = b * w + 0.11285553127527237
    b = b * w - 0.19711840152740479
    b = b * w + 0.27564114332199097
    b = b * w - 0.3584083914756775
    b = b * w + 0.48069295287132263
    b = b * w - 0.7213401794433594
    return (b * w + 1.4426950216293335) * w


@triton.jit
def softplus2(x):
    """log₂(1 + 2ˣ) = max(x, 0) + log₂(1 + 2^−|x|)."""
    return tl.maximum(x, 0.0) + log2_1p(tl.exp2(-tl.abs(x)))


@triton.jit
def tanh(x):
    """(1 − e)/(1 + e) with e = exp(−2|x|); the series to x⁷ below 0.2, where 1 − e loses digits."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    x2 = x * x
    small = x * (1.0 - x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.2, small, tl.where(x < 0.0, -large, large))


@triton.jit
def quick_tanh(x):
    """1 − 2/(1 + exp(2x)), to 1e-6: of 1, not of itself, which is far below what rounding to 16 bits did to x."""
    root = tl.rsqrt(1.0 + tl.exp2(x * (2.0 * LOG2E)))  # an instruction; a division is seven
    return 1.0 - root * root * 2.0


@triton.jit
def apply_head(u, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z = softcap(scale·u), u the bare product in the dtype it is stored in.

    In bits where scale and softcap come times log₂e.
    """
    z = u.to(tl.float32) * scale
    if HAS_SOFTCAP:
        x = z * (1.0 / softcap)
        z = (quick_tanh(x) if u.dtype.primitive_bitwidth == 16 else tanh(x)) * softcap
    return z


@triton.jit
def softcap_slope(z, softcap):
    """dz/d(scale·u) = 1 − (z/c)²."""
    t = z * (1.0 / softcap)
    return 1.0 - t * t


@triton.jit
def online_sum(b_max, b_sum, b_z):  # (lanes,), (lanes,), (lanes, WIDTH)
    """Σ 2^(z − max) of every lane after WIDTH more z: one exponential each, and one for what was summed before."""
    b_top = tl.maximum(b_max, tl.max(b_z, axis=1))
    return b_top, b_sum * tl.exp2(b_max - b_top) + tl.sum(tl.exp2(b_z - b_top[:, None]), axis=1)


@triton.jit
def online_mean(b_max, b_sum, b_mean, b_z, b_d):
    """online_sum, and Σ 2^(z − max)·d beside it."""
    b_top = tl.maximum(b_max, tl.max(b_z, axis=1))
    b_before, b_e = tl.exp2(b_max - b_top), tl.exp2(b_z - b_top[:, None])
    return b_top, b_sum * b_before + tl.sum(b_e, axis=1), b_mean * b_before + tl.sum(b_e * b_d, axis=1)


@triton.jit
def sum_of_lanes(b_max, b_sum):
    """(max, Σ 2^(z − max)) of a row from those of its lanes."""
    top = tl.max(b_max, axis=0)
    return top, tl.sum(b_sum * tl.exp2(b_max - top), axis=0)


@triton.jit
def label_loss(z_label, z_max, z_sum):
    """(loss in nats, 1 − p_label, lse in bits) from the label's logit and Σ 2^(z − z_max) over all other tokens.

    Leaving the label out of the sum keeps the digits of a confident student's loss and of p_label − 1.
    """
    top = tl.maximum(z_max, z_label)
    e_label = tl.exp2(z_label - top)
    rest = z_sum * tl.exp2(z_max - top)
    total = e_label + rest
    lse = top + tl.log2(total)
    loss = tl.where(z_label >= z_max, log1p(rest / tl.maximum(e_label, 0.5)), (lse - z_label) * LN2)
    return loss, rest / total, lse
