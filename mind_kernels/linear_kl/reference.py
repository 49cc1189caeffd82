"""fused_linear_kl by its formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mind_kernels.cross_entropy.reference import reference_logits
from mind_kernels.kl.reference import reference_kl
from mind_kernels.teachers import Teacher


def reference_linear_kl(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    teacher: Teacher,
    shift_labels: Tensor,
    *,
    rationale_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    z = reference_logits(hidden_states, lm_head_weight, lm_head_bias, logit_scale, logit_softcap)
    return reference_kl(z, teacher, rationale_weights, shift_labels=shift_labels, cu_seqlens=cu_seqlens, **options)
