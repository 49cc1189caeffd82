"""ta_weighted_kl: a TA-weighted divergence from a teacher on logits that are already at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from mind_kernels.arguments import (
    REDUCTIONS,
    check_budget,
    check_choice,
    check_divergence,
    check_floating,
    check_labels,
    check_supervised_index,
    choose_backend,
    require,
    resolve_rationales,
)
from mind_kernels.kl.call import KLCall
from mind_kernels.kl.function import weighted_kl
from mind_kernels.module import LossModule
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.teachers import Teacher, check_teacher

__all__ = ["TAWeightedKL", "ta_weighted_kl"]


def ta_weighted_kl(
    student_logits: Tensor,  # (..., T, V), or (N, V) with cu_seqlens
    teacher: Teacher,
    rationale_weights: Tensor | None = None,  # (...), or (R,) or (B, K) with cu_seqlens
    *,
    shift_labels: Tensor | None = None,  # (..., T), or (N,)
    cu_seqlens: Tensor | None = None,  # (R + 1,)
    supervised_index: Tensor | None = None,  # (n,), on the host
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_power: int = 2,
    ignore_index: int = -100,
    reduction: str = "mean",
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """fused_linear_kl without its head: Σ_r w_r·D_r over the rows of student_logits.

    student_logits: final logits (scaled, capped), finite, bf16, fp16, fp32 or fp64; any leading axes, the last of them
        time.
    shift_labels: only say which rows count (label ≠ ignore_index); None: all of them.
    max_logits_bytes: budget for the logits that TeacherHidden projects, 512 MiB by default; other teachers need none.
    The other arguments and the errors are those of fused_linear_kl.

    Returns (loss, rationale_losses): a scalar, differentiable in student_logits and rationale_weights; and the detached
    D_r in nats per token (τ^p included), in the shape of the weights. Both fp32 (fp64 for fp64).

    Peak extra memory: the gradient of student_logits, which may be a slice, and a block of a few MiB. With "triton" a
    copy of a slice where no gradient is wanted, and for a TeacherTopK one of 64 MiB of rows at a time.
    Raises: ValueError or TypeError naming the argument, what was given and what is wanted. Its backward pass
    RuntimeError under create_graph=True: there is no second derivative.
    Source: as fused_linear_kl.
    """
    check_floating("student_logits", student_logits)
    require(student_logits.ndim >= 2, f"student_logits: given shape {tuple(student_logits.shape)}, wanted (..., T, V)")
    check_choice("reduction", reduction, REDUCTIONS)
    check_divergence(divergence, beta, temperature, temperature_power)
    check_budget(max_logits_bytes)
    rows_shape, V = student_logits.shape[:-1], student_logits.shape[-1]
    check_teacher(teacher, rows_shape, V, student_logits.device, temperature)
    if shift_labels is None:  # all rows, as the host then knows
        require(
            supervised_index is None,
            "supervised_index: given without shift_labels, wanted with them (or all rows count)",
        )
        ignore_index = -100
        shift_labels = torch.zeros(rows_shape, dtype=torch.int64, device=student_logits.device)
        supervised_index = torch.arange(rows_shape.numel(), device="cpu")
    check_labels(shift_labels, rows_shape, V, ignore_index, student_logits.device)
    check_supervised_index(supervised_index, shift_labels, ignore_index)
    rationale_id, weights = resolve_rationales(rows_shape, cu_seqlens, rationale_weights, student_logits)
    options = KLCall(
        teacher=teacher,
        kl=KLOptions(divergence, beta, temperature, temperature_power),
        rationale_id=rationale_id,
        supervised=shift_labels.reshape(-1) != ignore_index,
        supervised_index=supervised_index,
        reduction=reduction,
        max_logits_bytes=max_logits_bytes,
        backend=choose_backend(backend, student_logits),
    )
    return weighted_kl(student_logits, weights, options)


class TAWeightedKL(LossModule):
    """ta_weighted_kl as a module: made with the settings, called with the tensors, all named as there."""

    def __init__(
        self,
        *,
        divergence: str = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_power: int = 2,
        ignore_index: int = -100,
        reduction: str = "mean",
        max_logits_bytes: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.temperature_power = temperature_power
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.max_logits_bytes = max_logits_bytes
        self.backend = backend

    def forward(
        self,
        student_logits: Tensor,
        teacher: Teacher,
        rationale_weights: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        supervised_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return ta_weighted_kl(
            student_logits,
            teacher,
            rationale_weights,
            shift_labels=shift_labels,
            cu_seqlens=cu_seqlens,
            supervised_index=supervised_index,
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            temperature_power=self.temperature_power,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            max_logits_bytes=self.max_logits_bytes,
            backend=self.backend,
        )
