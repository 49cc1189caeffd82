"""multi_rationale_log_softmax in PyTorch, whose log_softmax keeps fp32 statistics of 16-bit rows."""

from __future__ import annotations

import torch
from torch import Tensor


def torch_log_softmax(
    logits: Tensor,  # (..., K, V)
    temperature: float,
    token_ids: Tensor | None,  # (..., K, S)
) -> Tensor:  # (..., K, V) or (..., K, S)
    if token_ids is None and temperature == 1.0:
        return torch.log_softmax(logits, dim=-1)
    # Divided in fp32: a 16-bit quotient would round every logit once more.
    exact = logits if logits.dtype == torch.float64 else logits.float()
    exact = exact / temperature
    if token_ids is None:
        return torch.log_softmax(exact, dim=-1).to(logits.dtype)
    lse = torch.logsumexp(exact, dim=-1, keepdim=True)
    return (exact.gather(-1, token_ids.long()) - lse).to(logits.dtype)
