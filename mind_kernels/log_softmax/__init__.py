"""multi_rationale_log_softmax: log-probabilities of K rationales' logits at the same positions."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mind_kernels.arguments import BACKENDS, check_choice, check_floating, require
from mind_kernels.log_softmax.torch_path import torch_log_softmax

__all__ = ["MultiRationaleLogSoftmax", "multi_rationale_log_softmax"]


def multi_rationale_log_softmax(
    logits: Tensor,  # (..., K, V)
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """log softmax(logits / temperature) over the vocabulary, for the K rationales of each position.

        log p_kv = z_kv/τ − log Σ_u exp(z_ku/τ),   dz_kv = (g_kv − p_kv Σ_u g_ku) / τ

    logits: (..., K, V), bf16, fp16, fp32 or fp64. temperature: τ > 0. backend: "auto" | "torch".
    Returns log-probabilities in nats, the shape and dtype of logits; statistics in fp32 (fp64 for fp64).
    Peak extra memory: the result, and once more a tensor of its size when temperature is not 1.
    Raises: ValueError or TypeError naming the argument, what was given and what is wanted.
    """
    check_floating("logits", logits)
    require(logits.ndim >= 2, f"logits: given shape {tuple(logits.shape)}, wanted (..., K, V)")
    require(
        math.isfinite(temperature) and temperature > 0,
        f"temperature: given {temperature}, wanted a finite number above 0",
    )
    check_choice("backend", backend, BACKENDS)
    return torch_log_softmax(logits, temperature)


class MultiRationaleLogSoftmax(nn.Module):
    """multi_rationale_log_softmax with its settings kept."""

    def __init__(self, *, temperature: float = 1.0, backend: str = "auto"):
        super().__init__()
        self.temperature = temperature
        self.backend = backend

    def forward(self, logits: Tensor) -> Tensor:
        return multi_rationale_log_softmax(logits, temperature=self.temperature, backend=self.backend)
