"""The losses as operators of torch.library, mind_kernels::linear_loss and ::kl_loss, which torch.compile takes whole.

How many rows a loss works on depends on its labels, so a compiler cannot look inside; it need not, as each operator is
one sweep whose launches fill the device. An operator's inputs are tensors and plain values, so options travel as the
list of their tensors and one line of JSON. Its results are the losses and the gradients of its differentiable inputs,
made in the forward pass as ever; its backward multiplies them by the incoming gradient (out of place, as a compiled
graph must: under a compiler the gradients exist twice for a moment).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from mind_kernels.arguments import check_answer_index, check_labels, check_supervised_index
from mind_kernels.autograd import refuse_second_derivative
from mind_kernels.kl.call import KLCall
from mind_kernels.kl.function import kl_loss_and_gradients
from mind_kernels.linear_sweep import LinearLosses, linear_loss_and_gradients
from mind_kernels.plan import SweepOptions
from mind_kernels.pruning import GradientPruning
from mind_kernels.reduction import statistics_dtype
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.teachers import TeacherHidden, TeacherLogits, TeacherTopK, check_token_ids

# Launches depend on how many rows there are, which a replayed graph would not ask again: a compiler that makes graphs
# (mode="reduce-overhead") leaves these operators between them.
NO_CUDA_GRAPH = (torch.Tag.cudagraph_unsafe,)

_NESTED = {kind.__name__: kind for kind in (KLOptions, GradientPruning, TeacherHidden, TeacherLogits, TeacherTopK)}


def _pack(options: Any) -> tuple[list[Tensor | None], dict[str, Any]]:
    """A dataclass as its tensors, in the order of its fields, and a dictionary of everything else."""
    tensors: list[Tensor | None] = []
    plain: dict[str, Any] = {}
    for field in fields(options):
        name, value = field.name, getattr(options, field.name)
        if isinstance(value, Tensor):
            tensors.append(value.detach())  # never differentiated
            plain[name] = {"tensor": len(tensors) - 1}
        elif isinstance(value, torch.dtype):
            plain[name] = {"dtype": str(value).removeprefix("torch.")}
        elif isinstance(value, tuple(_NESTED.values())):
            inner, described = _pack(value)
            plain[name] = {"kind": type(value).__name__, "first": len(tensors), "fields": described}
            tensors += inner
        else:
            plain[name] = value
    return tensors, plain


@torch.compiler.assume_constant_result  # of plain values, which a compiler does not follow into the encoder
def _as_json(plain: dict[str, Any]) -> str:
    return json.dumps(plain)


def _unpack(kind: Any, tensors: Sequence[Tensor | None], plain: dict[str, Any]) -> Any:
    values = {}
    for name, value in plain.items():
        if isinstance(value, dict) and "tensor" in value:
            value = tensors[value["tensor"]]
        elif isinstance(value, dict) and "dtype" in value:
            value = getattr(torch, value["dtype"])
        elif isinstance(value, dict):
            value = _unpack(_NESTED[value["kind"]], tensors[value["first"] :], value["fields"])
        values[name] = value
    return kind(**values)


def _scale_like(loss: Tensor, scale: float | Tensor) -> Tensor:
    """A result of its own. A number is not copied to the device, which would wait: it is written there."""
    return scale.to(loss.dtype, copy=True) if isinstance(scale, Tensor) else loss.new_full((), scale)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns a tensor in each place."""
    return like.new_empty(0) if gradient is None else gradient


def _scaled(gradients: Sequence[Tensor], factor: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [(g * factor).to(g.dtype) if needed else None for g, needed in zip(gradients, needs, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Everything that takes hidden states


@torch.library.custom_op("mind_kernels::linear_loss", mutates_args=(), tags=NO_CUDA_GRAPH)
def _linear_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    rationale_weights: Tensor,
    option_tensors: Sequence[Tensor | None],
    settings: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = _unpack(SweepOptions, option_tensors, json.loads(settings))
    # Values, which a compiler does not have.
    if options.labels is not None:
        labels = options.labels
        check_labels(labels, labels.shape, len(lm_head_weight), options.ignore_index, hidden_states.device)
        check_supervised_index(options.supervised_index, labels, options.ignore_index)
    if options.answer_index is not None:
        check_answer_index(options.answer_index, rationale_weights, len(hidden_states))
    if isinstance(options.teacher, TeacherTopK):
        check_token_ids(options.teacher, len(lm_head_weight))
    inputs = hidden_states, lm_head_weight, lm_head_bias, rationale_weights
    losses, result, grad_weights = linear_loss_and_gradients(*inputs, options, list(needs))
    return (  # type: ignore[return-value]
        *(tensor.clone() for tensor in losses),  # an operator's results share no memory
        _scale_like(losses.loss, result.gradient_scale),
        _scale_like(losses.loss, result.head_gradient_scale),
        _or_empty(result.grad_hidden_states, hidden_states),
        _or_empty(result.grad_lm_head_weight, lm_head_weight),
        _or_empty(result.grad_lm_head_bias, hidden_states),
        grad_weights.clone() if needs[3] else rationale_weights.new_empty(0),
    )


@_linear_loss.register_fake
def _(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    rationale_weights: Tensor,
    option_tensors: Sequence[Tensor | None],
    settings: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    options = _unpack(SweepOptions, option_tensors, json.loads(settings))
    stats = statistics_dtype(options.compute_dtype)
    shape = rationale_weights.shape

    def new(*size: int) -> Tensor:
        return hidden_states.new_empty(size, dtype=stats)

    # The gradients of head and bias are contiguous, whatever they are.
    like_bias = lm_head_bias if lm_head_bias is not None and needs[2] else hidden_states
    return (
        new(), new(*shape), new(*shape), new(), new(), new(),
        torch.empty_like(hidden_states) if needs[0] else hidden_states.new_empty(0),
        lm_head_weight.new_empty(lm_head_weight.shape if needs[1] else (0,)),
        like_bias.new_empty(len(like_bias) if like_bias is lm_head_bias else 0),
        new(*shape) if needs[3] else rationale_weights.new_empty(0),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    ctx.no_gradients = [None] * len(inputs[4])
    ctx.weights_dtype = inputs[3].dtype
    ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative()
    scale, head_scale, for_hidden, *for_head, grad_weights = ctx.saved_tensors
    scaled = _scaled([for_hidden], grad_loss * scale, ctx.needs[:1])
    scaled += _scaled(for_head, grad_loss * head_scale, ctx.needs[1:3])
    (for_weights,) = _scaled([grad_weights], grad_loss, ctx.needs[3:])
    for_weights = None if for_weights is None else for_weights.to(ctx.weights_dtype)
    return *scaled, for_weights, ctx.no_gradients, None, None


_linear_loss.register_autograd(_backward, setup_context=_save)


def compiled_linear_loss(
    hidden_states: Tensor,  # (N, H)
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    rationale_weights: Tensor,
    options: SweepOptions,
) -> LinearLosses:
    """linear_loss as one operator."""
    inputs = hidden_states, lm_head_weight, lm_head_bias, rationale_weights
    needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    if not isinstance(options.num_questions, Tensor):  # it may be symbolic
        number = rationale_weights.new_full((), options.num_questions, dtype=statistics_dtype(options.compute_dtype))
        options = replace(options, num_questions=number)
    tensors, plain = _pack(options)
    loss, cross_entropy, kl, consistency, *_ = _linear_loss(*inputs, tensors, _as_json(plain), needs)
    return LinearLosses(loss, cross_entropy.detach(), kl.detach(), consistency.detach())


# ---------------------------------------------------------------------------------------------------------------------
# A divergence on logits


@torch.library.custom_op("mind_kernels::kl_loss", mutates_args=(), tags=NO_CUDA_GRAPH)
def _kl_loss(
    logits: Tensor,
    rationale_weights: Tensor,
    option_tensors: Sequence[Tensor | None],
    settings: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _unpack(KLCall, option_tensors, json.loads(settings))
    if isinstance(options.teacher, TeacherTopK):
        check_token_ids(options.teacher, logits.shape[-1])
    loss, losses, grad_logits, scale = kl_loss_and_gradients(logits, rationale_weights, options, needs[0])
    return loss, losses.clone(), _scale_like(loss, scale), _or_empty(grad_logits, logits)


@_kl_loss.register_fake
def _(
    logits: Tensor,
    rationale_weights: Tensor,
    option_tensors: Sequence[Tensor | None],
    settings: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = statistics_dtype(logits.dtype)
    loss, scale = logits.new_empty((), dtype=stats), logits.new_empty((), dtype=stats)
    losses = logits.new_empty(rationale_weights.numel(), dtype=stats)
    return loss, losses, scale, logits.new_empty(logits.shape if needs[0] else (0,))


def _kl_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    ctx.no_gradients = [None] * len(inputs[2])
    ctx.save_for_backward(inputs[1], *output[1:])


def _kl_backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative()
    weights, losses, scale, grad_logits = ctx.saved_tensors
    (for_logits,) = _scaled([grad_logits], grad_loss * scale, ctx.needs[:1])
    for_weights = (grad_loss * losses).reshape(weights.shape).to(weights.dtype) if ctx.needs[1] else None
    return for_logits, for_weights, ctx.no_gradients, None, None


_kl_loss.register_autograd(_kl_backward, setup_context=_kl_save)


def compiled_kl_loss(logits: Tensor, rationale_weights: Tensor, options: KLCall) -> tuple[Tensor, Tensor]:
    """weighted_kl as one operator."""
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (logits, rationale_weights)]
    tensors, plain = _pack(options)
    loss, losses, *_ = _kl_loss(logits, rationale_weights, tensors, _as_json(plain), needs)
    return loss, losses.detach().reshape(rationale_weights.shape)
