"""Elementwise mathematics that several Triton kernels share, all in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 16 warps of 32 lanes with 128 registers each are the whole register file of an NVIDIA multiprocessor. Not told so, the
# compiler stops short of it and spills a few bytes; HIP knows no such option.
WIDE_ROW = {"num_warps": 16} if torch.version.hip else {"num_warps": 16, "maxnreg": 128}

# Where an online maximum starts: finite, so that −inf − maximum is −inf and never NaN.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0 with the digits of a small x: log(u)·x/(u − 1), u = 1 + x rounded (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|), to an absolute error of one ulp of 1."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """(1 − e)/(1 + e) with e = exp(−2|x|); the series to x⁷ below 0.2, where 1 − e loses digits."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    x2 = x * x
    small = x * (1.0 - x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.2, small, tl.where(x < 0.0, -large, large))


@triton.jit
def apply_head(u, logit_scale, logit_softcap, HAS_SOFTCAP: tl.constexpr):
    """z = softcap(logit_scale·u), u the bare product."""
    z = u.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = logit_softcap * tanh(z / logit_softcap)
    return z


@triton.jit
def head_slope(z, logit_scale, logit_softcap, HAS_SOFTCAP: tl.constexpr):
    """dz/du = logit_scale·(1 − (z/c)²)."""
    slope = logit_scale + 0.0 * z
    if HAS_SOFTCAP:
        slope = logit_scale * (1.0 - (z / logit_softcap) * (z / logit_softcap))
    return slope


@triton.jit
def online_sum(b_max, b_sum, b_z):
    """Σ exp(z − max) of every lane after one more z: one exponential, whichever of max and z is larger."""
    e = tl.exp(-tl.abs(b_z - b_max))
    return tl.maximum(b_max, b_z), tl.where(b_z > b_max, b_sum * e + 1.0, b_sum + e)


@triton.jit
def online_mean(b_max, b_sum, b_mean, b_z, b_d):
    """online_sum, and Σ exp(z − max)·d beside it."""
    e = tl.exp(-tl.abs(b_z - b_max))
    above = b_z > b_max
    b_mean = tl.where(above, b_mean * e + b_d, b_mean + e * b_d)
    return tl.maximum(b_max, b_z), tl.where(above, b_sum * e + 1.0, b_sum + e), b_mean


@triton.jit
def label_loss(z_label, z_max, z_sum):
    """(loss, 1 − p_label, lse) from the label's logit and Σ exp(z − z_max) over all other tokens.

    Leaving the label out of the sum keeps the digits of a confident student's loss and of p_label − 1.
    """
    top = tl.maximum(z_max, z_label)
    e_label = tl.exp(z_label - top)
    rest = z_sum * tl.exp(z_max - top)
    total = e_label + rest
    loss = tl.where(z_label >= z_max, log1p(rest / tl.maximum(e_label, 0.5)), top - z_label + tl.log(total))
    return loss, rest / total, top + tl.log(total)
