"""multi_rationale_log_softmax in PyTorch, whose log_softmax keeps fp32 statistics of 16-bit rows."""

from __future__ import annotations

import torch
from torch import Tensor


def torch_log_softmax(logits: Tensor, temperature: float) -> Tensor:  # (..., V) -> (..., V)
    if temperature == 1.0:
        return torch.log_softmax(logits, dim=-1)
    # Divided in fp32: a 16-bit quotient would round every logit once more.
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(exact / temperature, dim=-1).to(logits.dtype)
