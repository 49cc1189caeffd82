"""fused_linear_cross_entropy by its formula: the whole (N, V) logits, autograd's gradients."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_logits(
    hidden_states: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    lm_head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:  # (..., V)
    z = logit_scale * F.linear(hidden_states, lm_head_weight, lm_head_bias)
    return z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)


def reduce_rationales(
    row_losses: Tensor,  # (..., T) or (N,)
    shift_labels: Tensor,  # the same
    ignore_index: int,
    rationale_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Σ_r w_r·L_r and L_r, each rationale's mean (or sum) over its supervised rows."""
    if cu_seqlens is None:
        segments = list(
            zip(
                row_losses.reshape(-1, row_losses.shape[-1]),
                shift_labels.reshape(-1, row_losses.shape[-1]),
                strict=True,
            )
        )
        shape = row_losses.shape[:-1]
    else:
        bounds = cu_seqlens.tolist()
        segments = [(row_losses[a:b], shift_labels[a:b]) for a, b in pairwise(bounds)]
        shape = torch.Size((len(segments),)) if rationale_weights is None else rationale_weights.shape
    losses = []
    for values, labels in segments:
        kept = values[labels != ignore_index]
        losses.append(kept.sum() / (max(len(kept), 1) if reduction == "mean" else 1))
    rationale_losses = torch.stack(losses).reshape(shape)
    if rationale_weights is None:
        rationale_weights = torch.full_like(rationale_losses, 1 / rationale_losses.numel())
    return (rationale_weights * rationale_losses).sum(), rationale_losses


def reference_linear_cross_entropy(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    shift_labels: Tensor,
    *,
    rationale_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    z = reference_logits(hidden_states, lm_head_weight, lm_head_bias, logit_scale, logit_softcap)
    row_losses = F.cross_entropy(
        z.flatten(0, -2), shift_labels.flatten().long(), ignore_index=ignore_index, reduction="none"
    )
    row_losses = row_losses.view(shift_labels.shape)
    return reduce_rationales(row_losses, shift_labels, ignore_index, rationale_weights, cu_seqlens, reduction)
