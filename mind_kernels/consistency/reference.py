"""answer_consistency by its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mind_kernels.cross_entropy.reference import reference_logits


def reference_answer_consistency(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    answer_index: Tensor,
    rationale_weights: Tensor,
    *,
    num_questions: float | None = None,
    **head: Any,
) -> Tensor:
    B, K, A = answer_index.shape
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    P = torch.softmax(reference_logits(rows, lm_head_weight, **head), -1)
    total = P.new_zeros(())
    for b in range(B):
        num_positions = max(int((answer_index[b] >= 0).any(0).sum()), 1)
        for a in range(A):
            for i in range(K):
                for j in range(i + 1, K):
                    row_i, row_j = answer_index[b, i, a], answer_index[b, j, a]
                    if row_i < 0 or row_j < 0:
                        continue
                    M = 0.5 * (P[row_i] + P[row_j])
                    jsd = sum(0.5 * (torch.xlogy(Q, Q) - torch.xlogy(Q, M)).sum() for Q in (P[row_i], P[row_j]))
                    total = total + rationale_weights[b, i] * rationale_weights[b, j] * jsd / num_positions
    return total / (B if num_questions is None else num_questions)
