"""ta_weighted_kl in Triton: the kernels of linear_kl on logits that are already at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from mind_kernels.kl.call import KLCall, teacher_chunk_rows
from mind_kernels.linear_kl.triton_path import dense_kl_, topk_kl_
from mind_kernels.reduction import RationaleReduction, fp16_scale
from mind_kernels.teacher_rows import TeacherRows, rows_of
from mind_kernels.teachers import TeacherHidden, TeacherTopK

# Rows that a top-k teacher's kernels work on are copies: this many bytes of them at a time.
COPY_BYTES = 64 * 2**20


def triton_divergences(
    logits: Tensor,  # (..., V)
    rationale_weights: Tensor,
    options: KLCall,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None, float | Tensor]:  # per rationale (R,), ∂loss/∂logits (..., V) / scale, scale
    """The gradient is written over a copy of the logits that becomes the result. Rows not supervised are 0."""
    V, teacher, device = logits.shape[-1], options.teacher, logits.device
    weights = rationale_weights.reshape(-1).float()
    reduce = RationaleReduction(weights, options.rationale_id, options.supervised, options.reduction)
    rows = options.rows
    row_losses = torch.empty(len(rows), dtype=torch.float32, device=device)
    gradient_scale = fp16_scale([reduce.weight], logits.dtype)
    coefficients = reduce.weight[rows] / gradient_scale
    grad_logits = None
    if need_gradient:
        grad_logits = torch.where(options.supervised.view(*logits.shape[:-1], 1), logits, 0).contiguous()
    z = (logits if grad_logits is None else grad_logits).reshape(-1, V)

    if isinstance(teacher, TeacherTopK):
        chunk_rows = max(1, COPY_BYTES // (V * logits.element_size()))
        for start in range(0, len(rows), chunk_rows):
            block = slice(start, start + chunk_rows)
            index, z_copy = rows[block], z[rows[block]]
            none = torch.zeros(len(index), dtype=torch.float32, device=device)
            topk_kl_(
                z_copy,
                z_copy,
                rows_of(teacher.token_ids, index),
                rows_of(teacher.logprobs, index).float(),
                teacher.tail,
                torch.zeros(len(index), dtype=torch.int64, device=device),
                none,
                coefficients[block],
                torch.empty_like(none),
                row_losses[block],
                options.kl,
                needs_gradient=need_gradient,
            )
            if grad_logits is not None:
                z[index] = z_copy
        return reduce(row_losses, rows), grad_logits, gradient_scale

    chunk_rows, buffer = max(len(rows), 1), None
    scale, softcap = 1.0, None
    if isinstance(teacher, TeacherHidden):
        head, scale, softcap = teacher.lm_head_weight, teacher.logit_scale, teacher.logit_softcap
        chunk_rows = teacher_chunk_rows(head, len(rows), options.max_logits_bytes)
        buffer = torch.empty(chunk_rows, head.shape[0], dtype=head.dtype, device=device)
    for start in range(0, len(rows), chunk_rows):
        block = slice(start, start + chunk_rows)
        teacher_logits, teacher_rows = TeacherRows(teacher, options.kl, rows[block], buffer).dense(0, len(rows[block]))
        dense_kl_(
            z,
            rows[block],
            z,
            teacher_logits,
            teacher_rows,
            None,
            None,
            coefficients[block],
            None,
            row_losses[block],
            options.kl,
            V_shared=teacher.vocab_size or V,
            teacher_scale=scale,
            teacher_softcap=softcap,
            needs_gradient=need_gradient,
        )
    return reduce(row_losses, rows), grad_logits, gradient_scale
