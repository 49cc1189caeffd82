"""ta_weighted_kl as one differentiable operation, whichever path makes its losses and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mind_kernels.arguments import current_device
from mind_kernels.autograd import refuse_second_derivative, with_tensors, without_tensors
from mind_kernels.kl.call import KLCall
from mind_kernels.kl.torch_path import torch_divergences
from mind_kernels.reduction import multiply_, weighted_sum


def _divergences(
    logits: Tensor,  # (..., V)
    rationale_weights: Tensor,
    options: KLCall,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None, float | Tensor]:  # per rationale (R,), ∂loss/∂logits (..., V) / scale, scale
    if options.backend == "triton":
        from mind_kernels.kl.triton_path import triton_divergences

        with current_device(logits.device):
            return triton_divergences(logits, rationale_weights, options, need_gradient)
    return torch_divergences(logits, rationale_weights, options, need_gradient)


def kl_loss_and_gradients(
    logits: Tensor, rationale_weights: Tensor, options: KLCall, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:  # Σ_r w_r·D_r, D (R,), ∂loss/∂logits (..., V) / scale, scale
    losses, grad_logits, scale = _divergences(logits, rationale_weights, options, need_gradient)
    return weighted_sum(rationale_weights.reshape(-1).to(losses.dtype), losses), losses, grad_logits, scale


class _TAWeightedKL(torch.autograd.Function):
    """As in the sweep, the first backward takes the gradient made in forward; another one makes it anew."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (..., V)
        rationale_weights: Tensor,
        options: KLCall,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        need_gradient = grad_enabled and ctx.needs_input_grad[0]
        loss, losses, *ctx.gradient = kl_loss_and_gradients(logits, rationale_weights, options, need_gradient)
        ctx.options, option_tensors = without_tensors(options)
        ctx.losses, ctx.weights_like = losses, (rationale_weights.shape, rationale_weights.dtype)
        ctx.save_for_backward(logits, rationale_weights, *option_tensors)
        rationale_losses = losses.view(rationale_weights.shape).clone()  # the caller's own
        ctx.mark_non_differentiable(rationale_losses)
        return loss, rationale_losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (grad_logits, scale), ctx.gradient = ctx.gradient, (None, 1.0)
        grad_weights = None
        if ctx.needs_input_grad[0]:
            if grad_logits is None:
                logits, rationale_weights, *option_tensors = ctx.saved_tensors
                options = with_tensors(ctx.options, option_tensors)
                _, grad_logits, scale = _divergences(logits, rationale_weights, options, True)
            assert grad_logits is not None
            multiply_(grad_logits, grad_loss * scale, ctx.options.backend)
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.weights_like
            grad_weights = (grad_loss * ctx.losses).reshape(shape).to(dtype)
        return grad_logits, grad_weights, None, None


def weighted_kl(
    student_logits: Tensor,  # (..., V)
    rationale_weights: Tensor,
    options: KLCall,
) -> tuple[Tensor, Tensor]:  # Σ_r w_r·D_r, D in the shape of the weights
    if torch.compiler.is_compiling():
        from mind_kernels.operators import compiled_kl_loss

        return compiled_kl_loss(student_logits, rationale_weights, options)
    # In Function.forward grad mode is off, so whether a graph is wanted is asked here.
    return _TAWeightedKL.apply(student_logits, rationale_weights, options, torch.is_grad_enabled())
