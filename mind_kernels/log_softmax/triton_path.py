"""Log-softmax of the K rows of a position in one Triton program, forward and backward, all tokens or selected ones.

One program walks over its position's rows one after another: they are neighbours in memory, and each is a loop over V
that fills the program's threads by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mind_kernels.arguments import current_device
from mind_kernels.autograd import refuse_second_derivative
from mind_kernels.triton_math import (
    LN2,
    LOG2E,
    LOWEST,
    WIDTH,
    block_offsets,
    block_size,
    load_block,
    load_logits,
    online_sum,
    row_launch,
    store_block,
    sum_of_lanes,
)


def launch(logits: Tensor) -> dict[str, int]:
    """Two 16-byte loads in flight for each thread; where rows are long, one program a multiprocessor, or two."""
    return row_launch(logits, 32, warps=16)


@triton.jit
def log_softmax_kernel(
    z_ptr,  # (P, K, V) contiguous
    id_ptr,  # (P, K, S) int64, contiguous
    out_ptr,  # (P, K, V), or (P, K, S) for selected tokens
    lse_ptr,  # (P, K) fp32, in bits; written
    inverse_temperature,
    K: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,  # selected tokens a row; 0: all of them
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """log p = z/τ − lse(z/τ). A selected id outside [0, V) gives NaN."""
    i_p = tl.program_id(0).to(tl.int64)
    o_block = block_offsets(BLOCK_V)
    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V
    for k in range(0, K):
        i_row = i_p * K + k
        p_row = z_ptr + i_row * V
        b_sum = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
        b_max = b_sum + LOWEST
        for IS_REST in tl.static_range(2):
            for v in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
                b_z = load_logits(p_row, v + o_block, inverse_temperature * LOG2E, 1.0, False, V, IS_REST)
                b_max, b_sum = online_sum(b_max, b_sum, b_z)
        z_max, z_sum = sum_of_lanes(b_max, b_sum)
        lse = z_max + tl.log2(z_sum)
        tl.store(lse_ptr + i_row, lse)
        lse *= LN2
        if S == 0:
            for IS_REST in tl.static_range(2):
                for w in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
                    o_v = (w if IS_REST else WHOLE - BLOCK_V - w) + o_block
                    b_z = load_block(p_row, o_v, V, IS_REST, IS_LAST=True) * inverse_temperature
                    store_block(out_ptr + i_row * V, o_v, b_z - lse, V, IS_REST)
        else:
            for s in range(0, S, BLOCK_S):
                o_s = s + tl.arange(0, BLOCK_S)
                b_id = tl.load(id_ptr + i_row * S + o_s, mask=o_s < S, other=0)
                m_id = (b_id >= 0) & (b_id < V)
                b_z = tl.load(p_row + b_id, mask=m_id, other=float("nan")).to(tl.float32) * inverse_temperature
                tl.store(out_ptr + i_row * S + o_s, (b_z - lse).to(out_ptr.dtype.element_ty), mask=o_s < S)


@triton.jit
def log_softmax_backward_kernel(
    z_ptr,  # (P, K, V)
    lse_ptr,  # (P, K) fp32, in bits
    d_out_ptr,  # (P, K, V); not read for selected tokens
    total_ptr,  # (P, K) fp32: Σ of d_out over the selected tokens; not read otherwise
    d_z_ptr,  # (P, K, V)
    inverse_temperature,
    K: tl.constexpr,
    V: tl.constexpr,
    IS_SELECTED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dz = (g − p·Σg)/τ; for selected tokens −p·Σg/τ, to which the caller adds their g/τ."""
    i_p = tl.program_id(0).to(tl.int64)
    o_block = block_offsets(BLOCK_V)
    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V
    for k in range(0, K):
        i_row = i_p * K + k
        lse = tl.load(lse_ptr + i_row)
        if IS_SELECTED:
            total = tl.load(total_ptr + i_row)
        else:
            b_total = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
            for IS_REST in tl.static_range(2):
                for v in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
                    b_total += tl.sum(load_block(d_out_ptr + i_row * V, v + o_block, V, IS_REST), axis=1)
            total = tl.sum(b_total, axis=0)
        for IS_REST in tl.static_range(2):
            for w in range(WHOLE if IS_REST else 0, V if IS_REST else WHOLE, BLOCK_V):
                o_v = (w if IS_REST else WHOLE - BLOCK_V - w) + o_block
                b_z = load_block(z_ptr + i_row * V, o_v, V, IS_REST, IS_LAST=True) * (inverse_temperature * LOG2E)
                b_d = -tl.exp2(b_z - lse) * total
                if not IS_SELECTED:
                    b_d += load_block(d_out_ptr + i_row * V, o_v, V, IS_REST, IS_LAST=True)
                store_block(d_z_ptr + i_row * V, o_v, b_d * inverse_temperature, V, IS_REST)


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, token_ids: Tensor | None) -> Tensor:
        logits = logits.contiguous()
        K, V = logits.shape[-2:]
        S = 0 if token_ids is None else token_ids.shape[-1]
        out = torch.empty(*logits.shape[:-1], V if token_ids is None else S, dtype=logits.dtype, device=logits.device)
        lse = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
        ids = lse if token_ids is None else token_ids.long().contiguous()
        if lse.numel():
            with current_device(logits.device):
                log_softmax_kernel[(lse.numel() // K,)](
                    logits, ids, out, lse, 1.0 / temperature,
                    K=K, V=V, S=S, BLOCK_S=block_size(S, 1024) if S else 16, **launch(logits),
                )  # fmt: skip
        ctx.save_for_backward(logits, lse, ids)
        ctx.temperature, ctx.is_selected = temperature, token_ids is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        logits, lse, ids = ctx.saved_tensors
        K, V = logits.shape[-2:]
        grad_out = grad_out.contiguous()
        total = grad_out.sum(-1, dtype=torch.float32) if ctx.is_selected else lse
        # Selected tokens get a second term: added in fp32 before the one rounding.
        dtype = torch.float32 if ctx.is_selected else logits.dtype
        grad_logits = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        if lse.numel():
            with current_device(logits.device):
                log_softmax_backward_kernel[(lse.numel() // K,)](
                    logits, lse, grad_out, total, grad_logits, 1.0 / ctx.temperature,
                    K=K, V=V, IS_SELECTED=ctx.is_selected, **launch(logits),
                )  # fmt: skip
        if ctx.is_selected:
            grad_logits.scatter_add_(-1, ids, grad_out.float() / ctx.temperature)
        return grad_logits.to(logits.dtype), None, None


def triton_log_softmax(
    logits: Tensor,  # (..., K, V)
    temperature: float,
    token_ids: Tensor | None,  # (..., K, S)
) -> Tensor:  # (..., K, V) or (..., K, S)
    """Bytes: e·V a row read twice and written once (selected: read once); backward g and z read, dz written."""
    return _LogSoftmax.apply(logits, temperature, token_ids)
