"""fused_linear_kl: the head and a TA-weighted divergence from a teacher without an (N, V) tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from mind_kernels.arguments import (
    REDUCTIONS,
    check_choice,
    check_divergence,
    check_head,
    check_labels,
    check_logits_dtype,
    check_supervised_index,
    choose_backend,
    product_dtype,
    resolve_rationales,
)
from mind_kernels.linear_sweep import linear_loss
from mind_kernels.module import LossModule
from mind_kernels.plan import SweepOptions
from mind_kernels.pruning import GradientPruning, resolve_pruning
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.teachers import Teacher, check_teacher

__all__ = ["FusedLinearKL", "fused_linear_kl"]


def fused_linear_kl(
    hidden_states: Tensor,  # (..., T, H), or (N, H) with cu_seqlens
    lm_head_weight: Tensor,  # (V, H)
    teacher: Teacher,
    shift_labels: Tensor,  # (..., T), or (N,)
    *,
    rationale_weights: Tensor | None = None,  # (...), or (R,) or (B, K) with cu_seqlens
    cu_seqlens: Tensor | None = None,  # (R + 1,)
    supervised_index: Tensor | None = None,  # (n,), on the host
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_power: int = 2,
    lm_head_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    gradient_tolerance: float | GradientPruning = 0.0,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Σ_r w_r·D_r,  D_r = 1/n_r Σ_t τ^p · D(teacher_t, student_t) over the supervised rows of rationale r.

    With t = softmax(teacher logits/τ), s = softmax(student logits/τ), M = (1−β)s + βt:

        divergence "forward"   KL(t ‖ s)
                   "reverse"   KL(s ‖ t)
                   "jsd"       β·KL(t ‖ M) + (1−β)·KL(s ‖ M),  0 < β < 1

    "jsd" vanishes at both ends of β; what TRL and Liger compute for their beta 0 is "forward", for 1 "reverse".

    teacher: TeacherHidden (both heads projected chunk by chunk), TeacherLogits or TeacherTopK, rows as the student's;
        never differentiated.
    shift_labels: only say which rows count (label ≠ ignore_index); values as in fused_linear_cross_entropy.
    temperature: τ > 0, both sides. temperature_power: p, 0 or 2.
    lm_head_bias: finite; −inf for a token, which cross-entropy takes as probability 0, may make the loss inf or NaN.
    The other arguments, the memory and the errors are those of fused_linear_cross_entropy; TeacherHidden needs room for
    both rows of logits within max_logits_bytes.

    Returns (loss, rationale_losses): a scalar, differentiable in hidden_states, lm_head_weight, lm_head_bias and
    rationale_weights; and the detached D_r in nats per token (τ^p included), in the shape of the weights.

    Raises: ValueError or TypeError naming the argument, what was given and what is wanted. Its backward pass
    RuntimeError under create_graph=True: there is no second derivative.
    Source: Hinton et al. 2015 (arXiv 1503.02531) for τ², Agarwal et al. 2024 (arXiv 2306.13649) for JSD_β; gradients in
    this folder's README.md.
    """
    check_head(hidden_states, lm_head_weight, lm_head_bias, logit_scale, logit_softcap, max_logits_bytes)
    check_logits_dtype(logits_dtype, hidden_states)
    check_choice("reduction", reduction, REDUCTIONS)
    check_divergence(divergence, beta, temperature, temperature_power)
    rows_shape = hidden_states.shape[:-1]
    V = lm_head_weight.shape[0]
    check_teacher(teacher, rows_shape, V, hidden_states.device, temperature)
    check_labels(shift_labels, rows_shape, V, ignore_index, hidden_states.device)
    check_supervised_index(supervised_index, shift_labels, ignore_index)
    rationale_id, weights = resolve_rationales(rows_shape, cu_seqlens, rationale_weights, hidden_states)
    options = SweepOptions(
        compute_dtype=product_dtype(hidden_states),
        kl_weight=1.0,
        labels=shift_labels.reshape(-1),
        ignore_index=ignore_index,
        rationale_id=rationale_id,
        supervised_index=supervised_index,
        reduction=reduction,
        teacher=teacher,
        kl=KLOptions(divergence, beta, temperature, temperature_power),
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        logits_dtype=logits_dtype,
        pruning=resolve_pruning(gradient_tolerance),
        max_logits_bytes=max_logits_bytes,
        backend=choose_backend(backend, hidden_states),
    )
    losses = linear_loss(hidden_states, lm_head_weight, lm_head_bias, weights, options)
    return losses.loss, losses.kl


class FusedLinearKL(LossModule):
    """fused_linear_kl as a module: made with the settings, called with the tensors, all named as there."""

    def __init__(
        self,
        *,
        divergence: str = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_power: int = 2,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        logits_dtype: torch.dtype | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        gradient_tolerance: float | GradientPruning = 0.0,
        max_logits_bytes: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.temperature_power = temperature_power
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.logits_dtype = logits_dtype
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.gradient_tolerance = gradient_tolerance
        self.max_logits_bytes = max_logits_bytes
        self.backend = backend

    def forward(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        teacher: Teacher,
        shift_labels: Tensor,
        *,
        rationale_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        supervised_index: Tensor | None = None,
        lm_head_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return fused_linear_kl(
            hidden_states,
            lm_head_weight,
            teacher,
            shift_labels,
            rationale_weights=rationale_weights,
            cu_seqlens=cu_seqlens,
            supervised_index=supervised_index,
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            temperature_power=self.temperature_power,
            lm_head_bias=lm_head_bias,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            logits_dtype=self.logits_dtype,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            gradient_tolerance=self.gradient_tolerance,
            max_logits_bytes=self.max_logits_bytes,
            backend=self.backend,
        )
