"""The matrix products of the sweep, and what a device and a version of PyTorch can do of them.

Operands are of one dtype; a result is rounded once, to the dtype of `out`:

    16 bits -> 16 bits   the vendor's product; on a CPU without instructions for it, fp32 products of widened tiles
    16 bits -> fp32      CUDA from compute capability 8.0 on; elsewhere products of widened operands
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TILE = 8192  # vocabulary rows of a product that is made tile by tile
CPU_TILE = 512  # of one whose operands are widened: small beside a chunk's logits


def has_wide_products(device: torch.device) -> bool:
    """Whether a 16-bit product with an fp32 result is to be had: cuBLAS from compute capability 8.0 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def adds_wide_products(device: torch.device) -> bool:
    """Whether such a product can be added to an fp32 matrix in place: before 2.10 PyTorch wants that in 16 bits too."""
    return has_wide_products(device) and torch.__version__ >= "2.10"


@functools.cache
def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of this dtype.

    Where it has none (bf16: x86 without AVX-512 or AMX), PyTorch's product takes ten times that of fp32 and as much
    memory again as its operands.
    """
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:  # (a, b) @ (b, c) -> (a, c)
    """out = left @ right, or out += left @ right. A wider `out` is not added to, and its device has_wide_products."""
    if out.dtype != left.dtype:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    if left.device.type == "cpu" and not cpu_computes(left.dtype):
        return _product_of_widened(left, right, out, add)
    return torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)


def _product_of_widened(left: Tensor, right: Tensor, out: Tensor, add: bool) -> Tensor:
    """The longest of the three dimensions tile by tile."""
    (a, b), c = left.shape, right.shape[1]
    if b >= max(a, c):  # a sum over tiles
        total = out.float() if add else torch.zeros(a, c, dtype=torch.float32, device="cpu")
        for i in range(0, b, CPU_TILE):
            total.addmm_(left[:, i : i + CPU_TILE].float(), right[i : i + CPU_TILE].float())
        return out.copy_(total)
    if a > c:  # (left @ right)ᵀ = rightᵀ @ leftᵀ
        _product_of_widened(right.t(), left.t(), out.t(), add)
        return out
    left = left.float()
    for i in range(0, c, CPU_TILE):
        part, tile = left @ right[:, i : i + CPU_TILE].float(), out[:, i : i + CPU_TILE]
        tile.add_(part) if add else tile.copy_(part)
    return out


def project(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:  # (m, H) @ (H, V) -> (m, V)
    """X Wᵀ + b, rounded once to the dtype of `out`."""
    if out.dtype != hidden_states.dtype:
        return _project_wide(hidden_states, weight, bias, out)
    if bias is None:
        return product(hidden_states, weight.t(), out)
    if hidden_states.device.type == "cpu" and not cpu_computes(out.dtype):
        return product(hidden_states, weight.t(), out.copy_(bias), add=True)
    return torch.addmm(bias, hidden_states, weight.t(), out=out)


def _project_wide(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if has_wide_products(out.device):
        product(hidden_states, weight.t(), out)
    else:  # the products of the widened operands are the same, at the wider type's speed
        X = hidden_states.to(out.dtype)
        for v in range(0, len(weight), TILE):
            torch.mm(X, weight[v : v + TILE].to(out.dtype).t(), out=out[:, v : v + TILE])
    return out if bias is None else out.add_(bias)
