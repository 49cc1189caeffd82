"""A gradient times what `backward` is given, in place, without a byte moved where that is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mind_kernels.arguments import current_device

BLOCK = 8192  # eight 16-byte loads of 16-bit numbers for each thread
MOST_PROGRAMS = 2048  # several for every multiprocessor; each ends at once where there is nothing to do


@triton.jit
def multiply_kernel(
    x_ptr,  # (n,), overwritten
    factor_ptr,  # ()
    n,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1.0:  # NaN too
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            o = start + tl.arange(0, BLOCK)
            b = tl.load(x_ptr + o, mask=o < n, other=0.0).to(tl.float32)
            tl.store(x_ptr + o, (b * factor).to(x_ptr.dtype.element_ty), mask=o < n)


def multiply_(x: Tensor, factor: Tensor) -> None:
    """x *= factor (), fp32. Bytes: 2·e·n, none where the device finds a factor of 1. x is contiguous."""
    assert x.is_contiguous()
    n = x.numel()
    if n:
        with current_device(x.device):
            multiply_kernel[(min(triton.cdiv(n, BLOCK), MOST_PROGRAMS),)](x, factor, n, BLOCK=BLOCK, num_warps=8)
