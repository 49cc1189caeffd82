"""mind_loss by its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mind_kernels.consistency.reference import reference_answer_consistency
from mind_kernels.cross_entropy.reference import reference_linear_cross_entropy
from mind_kernels.linear_kl.reference import reference_linear_kl
from mind_kernels.teachers import Teacher


def reference_mind_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    shift_labels: Tensor,
    *,
    rationale_weights: Tensor,
    cu_seqlens: Tensor | None = None,
    answer_index: Tensor | None = None,
    teacher: Teacher | None = None,
    consistency_weight: float = 0.1,
    kl_weight: float = 0.0,
    num_questions: float | None = None,
    ignore_index: int = -100,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_power: int = 2,
    **head: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # loss, cross_entropy, consistency, kl, rationale_losses
    Q = rationale_weights.shape[0] if num_questions is None else num_questions
    rows: dict[str, Any] = {
        "rationale_weights": rationale_weights,
        "cu_seqlens": cu_seqlens,
        "ignore_index": ignore_index,
    }
    cross_entropy, losses = reference_linear_cross_entropy(hidden_states, lm_head_weight, shift_labels, **rows, **head)
    consistency = kl = torch.zeros_like(cross_entropy)
    if answer_index is not None:
        consistency = reference_answer_consistency(
            hidden_states, lm_head_weight, answer_index, rationale_weights, num_questions=Q, **head
        )
    if teacher is not None:
        options: dict[str, Any] = {"divergence": divergence, "beta": beta, "temperature": temperature}
        options["temperature_power"] = temperature_power
        kl, _ = reference_linear_kl(hidden_states, lm_head_weight, teacher, shift_labels, **rows, **options, **head)
    cross_entropy, kl = cross_entropy / Q, kl / Q
    return cross_entropy + consistency_weight * consistency + kl_weight * kl, cross_entropy, consistency, kl, losses
