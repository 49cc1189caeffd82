"""ta_weighted_kl in PyTorch on any device: blocks of rows, the gradient made in forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mind_kernels.arguments import Rationales
from mind_kernels.chunking import BLOCK_ELEMENTS, DEFAULT_MAX_LOGITS_BYTES
from mind_kernels.reduction import RationaleReduction, statistics_dtype
from mind_kernels.teacher_rows import KLOptions, TeacherRows
from mind_kernels.teachers import Teacher, TeacherHidden


@dataclass(frozen=True)
class _Options:
    teacher: Teacher
    kl: KLOptions
    rationales: Rationales
    supervised: Tensor  # (N,) bool
    reduction: str
    max_logits_bytes: int | None
    grad_enabled: bool


def _divergences(
    logits: Tensor,  # (N, V)
    rationale_weights: Tensor,
    options: _Options,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # per rationale (R,), and ∂loss/∂logits (N, V)
    """Rows of weight 0 get their loss but no gradient; rows that are not supervised are never read."""
    V, teacher = logits.shape[-1], options.teacher
    stats = statistics_dtype(logits.dtype)
    weights = rationale_weights.reshape(-1).to(stats)
    reduce = RationaleReduction(weights, options.rationales.rationale_id, options.supervised, options.reduction)
    rows = options.supervised.nonzero().squeeze(1)
    row_losses = torch.empty(len(rows), dtype=stats, device=logits.device)
    grad_logits = torch.zeros_like(logits) if need_gradient else None

    block_rows = max(1, BLOCK_ELEMENTS // V)
    chunk_rows, buffer = block_rows, None
    if isinstance(teacher, TeacherHidden):
        head = teacher.lm_head_weight
        budget = DEFAULT_MAX_LOGITS_BYTES if options.max_logits_bytes is None else options.max_logits_bytes
        row_bytes = head.shape[0] * head.dtype.itemsize
        if budget < row_bytes:
            raise ValueError(
                f"max_logits_bytes: given {budget}, wanted at least {row_bytes} for one row of teacher logits"
            )
        chunk_rows = min(budget // row_bytes, max(len(rows), 1))
        buffer = torch.empty(chunk_rows, head.shape[0], dtype=head.dtype, device=logits.device)
    for chunk in range(0, len(rows), chunk_rows):
        index = rows[chunk : chunk + chunk_rows]
        teacher_rows = TeacherRows(teacher, options.kl, index, buffer)
        for start in range(0, len(index), block_rows):
            stop = min(start + block_rows, len(index))
            block = index[start:stop]
            loss, grad = teacher_rows.divergence(logits[block].to(stats), start, stop, need_gradient)
            row_losses[chunk + start : chunk + stop] = loss
            if grad is not None and grad_logits is not None:
                grad_logits[block] = grad.mul_(reduce.weight[block].unsqueeze(-1)).to(logits.dtype)
    return reduce(row_losses, rows), grad_logits


class _TAWeightedKL(torch.autograd.Function):
    """As in the sweep, the first backward takes the gradient made in forward; another one makes it anew."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rationale_weights: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        ctx.options = options
        need_gradient = options.grad_enabled and ctx.needs_input_grad[0]
        losses, ctx.grad_logits = _divergences(logits, rationale_weights, options, need_gradient)
        ctx.save_for_backward(logits, rationale_weights, losses)
        rationale_losses = losses.reshape(options.rationales.losses_shape)
        ctx.mark_non_differentiable(rationale_losses)
        return rationale_weights.reshape(-1).to(losses.dtype).dot(losses), rationale_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        logits, rationale_weights, losses = ctx.saved_tensors
        grad_logits, ctx.grad_logits = ctx.grad_logits, None
        grad_weights = None
        if ctx.needs_input_grad[0]:
            if grad_logits is None:
                _, grad_logits = _divergences(logits, rationale_weights, ctx.options, True)
            assert grad_logits is not None
            grad_logits.mul_(grad_loss)
        if ctx.needs_input_grad[1]:
            grad_weights = (grad_loss * losses).reshape(rationale_weights.shape).to(rationale_weights.dtype)
        return grad_logits, grad_weights, None


def torch_kl(
    student_logits: Tensor,  # (..., V)
    teacher: Teacher,
    rationales: Rationales,
    supervised: Tensor,  # (N,) bool
    kl: KLOptions,
    reduction: str,
    max_logits_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    options = _Options(teacher, kl, rationales, supervised, reduction, max_logits_bytes, torch.is_grad_enabled())
    return _TAWeightedKL.apply(student_logits.reshape(-1, student_logits.shape[-1]), rationales.weights, options)
