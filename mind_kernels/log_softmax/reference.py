"""multi_rationale_log_softmax by its formula."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_log_softmax(logits: Tensor, *, temperature: float = 1.0, token_ids: Tensor | None = None) -> Tensor:
    z = logits / temperature
    log_probs = z - torch.log(torch.exp(z - z.amax(-1, keepdim=True)).sum(-1, keepdim=True)) - z.amax(-1, keepdim=True)
    return log_probs if token_ids is None else log_probs.gather(-1, token_ids.long())
