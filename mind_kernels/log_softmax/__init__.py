"""multi_rationale_log_softmax: log-probabilities of K rationales' logits at the same positions."""

from __future__ import annotations

from torch import Tensor

from mind_kernels.arguments import (
    can_look,
    check_device,
    check_floating,
    check_integer,
    check_temperature,
    choose_backend,
    require,
)
from mind_kernels.log_softmax.torch_path import torch_log_softmax
from mind_kernels.module import LossModule

__all__ = ["MultiRationaleLogSoftmax", "multi_rationale_log_softmax"]


def multi_rationale_log_softmax(
    logits: Tensor,  # (..., K, V)
    *,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,  # (..., K, S)
    backend: str = "auto",
) -> Tensor:
    """log softmax(logits / temperature) over the vocabulary, for the K rationales of each position.

        log p_kv = z_kv/τ − log Σ_u exp(z_ku/τ),   dz_kv = (g_kv − p_kv Σ_u g_ku) / τ

    logits: (..., K, V), bf16, fp16, fp32 or fp64. temperature: τ > 0.
    token_ids: (..., K, S) int64/int32 in [0, V): only the log-probabilities of these tokens. On a GPU an id outside
        gives NaN (Triton) or stops the device (PyTorch).
    backend: "auto" | "torch" | "triton", as in fused_linear_cross_entropy.

    Returns log-probabilities in nats, (..., K, V), or (..., K, S) for token_ids, in the dtype of logits; statistics in
    fp32 (fp64 for fp64).
    Peak extra memory: the result, and with "torch" and a temperature other than 1 an fp32 copy of logits, two of 16-bit
        ones; with "torch" and token_ids two. With "triton" 4 bytes a row, and a copy of logits that are not contiguous.
    The gradient of selected tokens is made in fp32, 4 bytes an element of logits, before it is rounded.
    Raises: ValueError or TypeError naming the argument, what was given and what is wanted. With "triton" the backward
    pass RuntimeError under create_graph=True: only "torch" has a second derivative.
    """
    check_floating("logits", logits)
    require(logits.ndim >= 2, f"logits: given shape {tuple(logits.shape)}, wanted (..., K, V)")
    check_temperature(temperature)
    if token_ids is not None:
        check_integer("token_ids", token_ids)
        check_device("token_ids", token_ids, logits.device)
        require(
            token_ids.shape[:-1] == logits.shape[:-1] and token_ids.ndim >= 2 and token_ids.shape[-1] >= 1,
            f"token_ids: given shape {tuple(token_ids.shape)}, wanted {(*logits.shape[:-1], 'S')} to match logits",
        )
        if can_look(token_ids):
            wrong = (token_ids < 0) | (token_ids >= logits.shape[-1])
            if bool(wrong.any()):
                raise ValueError(
                    f"token_ids: given {int(token_ids[wrong][0])}, wanted 0 <= id < V = {logits.shape[-1]}"
                )
    if choose_backend(backend, logits) == "triton":
        from mind_kernels.log_softmax.triton_path import triton_log_softmax

        return triton_log_softmax(logits, temperature, token_ids)
    return torch_log_softmax(logits, temperature, token_ids)


class MultiRationaleLogSoftmax(LossModule):
    """multi_rationale_log_softmax as a module: made with the settings, called with the tensors, all named as there."""

    def __init__(self, *, temperature: float = 1.0, backend: str = "auto"):
        super().__init__()
        self.temperature = temperature
        self.backend = backend

    def forward(self, logits: Tensor, *, token_ids: Tensor | None = None) -> Tensor:
        return multi_rationale_log_softmax(
            logits, temperature=self.temperature, token_ids=token_ids, backend=self.backend
        )
