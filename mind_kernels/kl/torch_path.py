"""ta_weighted_kl in PyTorch on any device: blocks of rows, the gradient made with the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from mind_kernels.chunking import Scratch, block_rows
from mind_kernels.kl.call import KLCall, teacher_chunk_rows
from mind_kernels.reduction import RationaleReduction, fp16_scale, statistics_dtype
from mind_kernels.teacher_rows import TeacherRows, rows_of
from mind_kernels.teachers import TeacherHidden


def torch_divergences(
    logits: Tensor,  # (..., V), of any strides
    rationale_weights: Tensor,
    options: KLCall,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None, float | Tensor]:  # per rationale (R,), ∂loss/∂logits (..., V) / scale, scale
    """Rows of weight 0 get their loss but no gradient; rows that are not supervised are never read."""
    V, teacher = logits.shape[-1], options.teacher
    stats = statistics_dtype(logits.dtype)
    weights = rationale_weights.reshape(-1).to(stats)
    reduce = RationaleReduction(weights, options.rationale_id, options.supervised, options.reduction)
    scale = fp16_scale([reduce.weight], logits.dtype)
    coefficients = reduce.weight * options.kl.gradient_scale / scale
    rows = options.rows
    row_losses = torch.empty(len(rows), dtype=stats, device=logits.device)
    grad_logits = torch.zeros_like(logits, memory_format=torch.contiguous_format) if need_gradient else None
    grad_rows = None if grad_logits is None else grad_logits.view(-1, V)

    num_rows = block_rows(V, logits.device, options.max_logits_bytes, has_copies=True)
    scratch = Scratch(num_rows, V, stats, logits.device)
    chunk_rows, buffer = num_rows, None
    if isinstance(teacher, TeacherHidden):
        head = teacher.lm_head_weight
        chunk_rows = teacher_chunk_rows(head, len(rows), options.max_logits_bytes)
        buffer = torch.empty(chunk_rows, head.shape[0], dtype=head.dtype, device=logits.device)
    for chunk in range(0, len(rows), chunk_rows):
        index = rows[chunk : chunk + chunk_rows]
        teacher_rows = TeacherRows(teacher, options.kl, index, buffer)
        for start in range(0, len(index), num_rows):
            stop = min(start + num_rows, len(index))
            block = index[start:stop]
            z = scratch("logits", torch.Size([stop - start, V])).copy_(rows_of(logits, block))
            loss, grad = teacher_rows.divergence(z, start, stop, need_gradient, scratch)
            row_losses[chunk + start : chunk + stop] = loss
            if grad is not None and grad_rows is not None:
                coefficient = coefficients[block].unsqueeze(-1)
                if options.kl.divergence == "reverse":  # which may be infinite, and 0·inf would be NaN
                    grad.masked_fill_(coefficient == 0, 0.0)
                grad_rows[block, : grad.shape[-1]] = grad.mul_(coefficient).to(logits.dtype)
    return reduce(row_losses, rows), grad_logits, scale
