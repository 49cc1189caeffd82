"""fused_linear_cross_entropy: the head and the cross-entropy of weighted rationales without an (N, V) tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from mind_kernels.arguments import (
    REDUCTIONS,
    check_choice,
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

__all__ = ["FusedLinearCrossEntropy", "fused_linear_cross_entropy"]


def fused_linear_cross_entropy(
    hidden_states: Tensor,  # (..., T, H), or (N, H) with cu_seqlens
    lm_head_weight: Tensor,  # (V, H)
    shift_labels: Tensor,  # (..., T), or (N,)
    *,
    rationale_weights: Tensor | None = None,  # (...), or (R,) or (B, K) with cu_seqlens
    cu_seqlens: Tensor | None = None,  # (R + 1,)
    supervised_index: Tensor | None = None,  # (n,), on the host
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
    """Σ_r w_r·CE_r over rationales, with logits made and consumed chunk by chunk.

        CE_r = 1/n_r Σ_t −log softmax(z_t)[y_t],   z = softcap(logit_scale · (h Wᵀ + b)),   softcap(z) = c·tanh(z/c)

    over the n_r supervised tokens (label ≠ ignore_index) of rationale r; reduction "sum" leaves out 1/n_r, not w_r. The
    mean or sum over all tokens is that of rows flattened to (N, H).

    hidden_states: bf16, fp16, fp32 or fp64. Padded: any leading axes, the last of them time; a plain (N, H) is one
        rationale of weight 1. Packed: (N, H) with cu_seqlens.
    lm_head_weight: (V, H), the dtype of hidden_states; under autocast any, and the products are in autocast's dtype.
        Tied embeddings and a frozen head (requires_grad False: its gradient is not computed) work as they are.
    shift_labels: int64/int32 in [0, V) or ignore_index, already aligned with hidden_states. On a GPU a label outside
        makes the loss NaN, since an error would wait for the device.
    rationale_weights: w, used exactly as given; 1/R each by default. 0 costs a forward only.
    cu_seqlens: int32/int64, rising from 0 to N (which a GPU and a compiled graph do not check); segment r is rows
        cu_seqlens[r] to cu_seqlens[r + 1]; an empty segment has loss 0.
    supervised_index: int64/int32 (n,) on the CPU, the flat rows whose label is not ignore_index, in any order. With it
        no step on a GPU waits for the device; rows of weight 0 then cost a backward.
    logit_scale, logit_softcap: see the formula; None for no cap.
    logits_dtype: in which the logits are stored, by default the dtype of the products. torch.float32 with 16-bit
        products keeps the rounding of the logits out of the loss and the gradients. A logit then takes 6 bytes of
        max_logits_bytes instead of 2, and where a 16-bit product has no fp32 result (on a CPU) products are in fp32.
    gradient_tolerance: 0 (the exact dense backward), or how much of each chunk's logit gradient, by its Frobenius norm,
        the backward products may leave out: 2**-9 is a start for a trained student. A GradientPruning says more; see
        pruning.py for the certificate, the correction, and when a chunk stays dense.
    max_logits_bytes: budget for the logits alive at once, 512 MiB by default; smaller is slower.
    backend: "auto" (Triton kernels on a GPU where the package triton is installed, but for fp64; PyTorch elsewhere) |
        "torch" | "triton", which raises where it cannot run.

    Returns (loss, rationale_losses): a scalar, differentiable in hidden_states, lm_head_weight, lm_head_bias and
    rationale_weights; and the detached CE_r in nats per token, in the shape of the weights, 0 for a rationale without a
    supervised token. Both fp32 (fp64 for fp64).

    Peak extra memory: the gradients + max_logits_bytes (+ 4·V·H bytes when a 16-bit weight gradient is summed in fp32:
    over more than 40 chunks of logits, over several with logits_dtype=float32, or when it is pruned). Under autocast
    also a copy of the head in its dtype, 2·V·H bytes.
    Without a gradient: max_logits_bytes.

    Raises: ValueError or TypeError naming the argument, what was given and what is wanted. Its backward pass
    RuntimeError under create_graph=True: there is no second derivative. PyTorch refuses torch.func's transforms.
    Source: gradients in the forward pass follow from the loss's linearity; derivation in this folder's README.md.
    """
    check_head(hidden_states, lm_head_weight, lm_head_bias, logit_scale, logit_softcap, max_logits_bytes)
    check_logits_dtype(logits_dtype, hidden_states)
    check_choice("reduction", reduction, REDUCTIONS)
    rows_shape = hidden_states.shape[:-1]
    check_labels(shift_labels, rows_shape, lm_head_weight.shape[0], ignore_index, hidden_states.device)
    check_supervised_index(supervised_index, shift_labels, ignore_index)
    rationale_id, weights = resolve_rationales(rows_shape, cu_seqlens, rationale_weights, hidden_states)
    options = SweepOptions(
        compute_dtype=product_dtype(hidden_states),
        kl=KLOptions(),
        cross_entropy_weight=1.0,
        labels=shift_labels.reshape(-1),
        ignore_index=ignore_index,
        rationale_id=rationale_id,
        supervised_index=supervised_index,
        reduction=reduction,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        logits_dtype=logits_dtype,
        pruning=resolve_pruning(gradient_tolerance),
        max_logits_bytes=max_logits_bytes,
        backend=choose_backend(backend, hidden_states),
    )
    losses = linear_loss(hidden_states, lm_head_weight, lm_head_bias, weights, options)
    return losses.loss, losses.cross_entropy


class FusedLinearCrossEntropy(LossModule):
    """fused_linear_cross_entropy as a module: made with the settings, called with the tensors, all named as there."""

    def __init__(
        self,
        *,
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
        shift_labels: Tensor,
        *,
        rationale_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        supervised_index: Tensor | None = None,
        lm_head_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return fused_linear_cross_entropy(
            hidden_states,
            lm_head_weight,
            shift_labels,
            rationale_weights=rationale_weights,
            cu_seqlens=cu_seqlens,
            supervised_index=supervised_index,
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
