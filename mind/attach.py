"""Gives one Hugging Face causal language model the MIND loss, reversibly: the only file that alters such a model.

A causal language model is base(…) → hidden_states → head → logits, with

    logits = c·tanh(z/c),   z = logit_scale · (hidden_states Wᵀ + b)          (no cap: logits = z)

and only base, W, b, logit_scale and c are needed to hand hidden_states to mind_kernels instead of building the logits.
Base and head come from the model's own accessors, scale and cap from its config; whether that is all the model does is
checked once, in numbers, when the loss is attached. So no architecture is named here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mind.collator import SharedPrompts, shared_prompts, student_inputs
from mind.data import EncodedQuestion
from mind.prompt_attention import attention_mask, needs_autocast, prompt_attention, readable, use_own_attention
from mind_kernels import MindLoss

__all__ = ["MindAttachment", "MindOutput", "attach_mind_loss"]

_ATTRIBUTE = "_mind_attachment"


@dataclass
class MindOutput(ModelOutput):
    """What an attached model returns when it is given shift_labels; all in nats, see mind_kernels.mind_loss."""

    loss: Tensor | None = None  # () differentiable
    cross_entropy: Tensor | None = None  # () detached
    consistency: Tensor | None = None  # () detached
    kl: Tensor | None = None  # () detached
    rationale_losses: Tensor | None = None  # (B, K) detached
    last_hidden_state: Tensor | None = None  # (R, T, H) with its graph, when it was asked for


def attach_mind_loss(model: nn.Module, **loss_options: Any) -> MindAttachment:
    """Replace the forward of this one instance by one that also takes MIND's labels; its class stays as it is.

    With shift_labels, `model(input_ids, attention_mask, shift_labels=…, rationale_weights=…, …)` runs the base model
    and mind_kernels.mind_loss and returns a MindOutput; no (tokens, V) logits are built. Without, the original forward
    runs, generation included. Pictures and sounds (floating-point tensors that the model takes and its base does not)
    are refused. The tensors, for R rows of T tokens in input_ids:

    shift_labels: (R, T) int64, already aligned with hidden_states; −100 where there is nothing to learn.
    rationale_weights: (B, K), α: each question's weights sum to 1.
    cu_seqlens: (B·K + 1,) int32, boundaries of the rationales in the R·T flattened tokens; an empty segment for a
        rationale that is not in the batch. Without it, the rows are the rationales: R = B·K.
    answer_index: (B, K, A) int64 indices into the R·T flattened tokens, −1 = absent; best left on the CPU.
    supervised_index: (n,) int64 on the CPU, the flattened tokens whose label is not −100, so that the loss does not
        wait for a GPU to tell.
    teacher: TeacherHidden, TeacherLogits or TeacherTopK with the rows of the R·T flattened tokens (of (B, K, T) without
        cu_seqlens).
    num_questions: what the losses are divided by; B by default.
    shared_prompts: SharedPrompts, the same rationales for reading each prompt once; see MindAttachment.read.
    return_hidden_states: True puts last_hidden_state into the MindOutput.

    model: a PreTrainedModel, or one inside a PeftModel or DistributedDataParallel. Its head must be a plain nn.Linear.
        For FSDP2 attach first, then fully_shard the layers and the model (head and base in the model's own group).
        Attach after what replaces the head, such as resize_token_embeddings.
    loss_options: settings of mind_kernels.MindLoss. logit_scale and logit_softcap default to what the config says
        (logits_scaling, logit_scale, final_logit_softcapping).

    Raises: TypeError for another kind of model or an unknown option; ValueError when a loss is attached already, when
        the head is adapted, quantised or hooked, when peft's adapter is a learned prompt, or when the model's own
        logits are not what the found head gives.
    """
    model = _unwrap(model)
    name = type(model).__name__
    if _ATTRIBUTE in vars(model):
        raise ValueError(f"model: this {name} has a MIND loss already; wanted one without: call its detach() first")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name} has an encoder beside its decoder; wanted a causal language model")
    head = _plain_head(model)
    base = model.get_decoder()
    if base is model or base is head:
        what = "the model itself" if base is model else "its head"
        raise ValueError(f"model: {name}.get_decoder() gives {what}; wanted the part below the head")
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"model: {name} adds a router loss, which the MIND loss has not; wanted config.output_router_logits=False"
        )
    attachment = MindAttachment(
        model=model,
        base=base,
        head=head,
        loss=MindLoss(**(_logit_options(config) | loss_options)),
        original_forward=model.forward,
        forward=_make_forward(model.forward),
        unread=_parameter_names(model.forward) - _parameter_names(base.forward),
        shadowed_forward=vars(model).get("forward"),
    )
    attachment._check_logits()
    setattr(model, _ATTRIBUTE, attachment)
    model.forward = MethodType(attachment.forward, model)
    return attachment


@dataclass(eq=False)
class MindAttachment:
    """One model with the MIND loss attached; detach() gives the model its own forward back.

    copy.deepcopy copies both; to pickle the model itself, as torch.save(model) does, detach first.
    """

    model: PreTrainedModel
    base: nn.Module  # (R, T) tokens -> (R, T, H) hidden_states
    head: nn.Linear  # (R, T, H) -> (R, T, V), before scale and cap
    loss: MindLoss
    original_forward: Callable[..., Any]
    forward: Callable[..., Any]  # the function that is bound to the model
    unread: set[str]  # the model's own arguments that its base does not name
    shadowed_forward: Callable[..., Any] | None  # what stood in the instance's own dictionary before, if anything

    def detach(self) -> None:
        """Restore the model's own forward.

        Raises: ValueError when the loss is detached already, or when something else has wrapped forward since.
        """
        model = self.model
        name = type(model).__name__
        if vars(model).get(_ATTRIBUTE) is not self:
            raise ValueError(f"model: this MIND loss is no longer attached to its {name}; wanted one detach() only")
        if getattr(vars(model).get("forward"), "__func__", None) is not self.forward:
            raise ValueError(
                f"model: the forward of this {name} was wrapped after the MIND loss was attached; wanted it unwrapped "
                "first, as by accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
            )
        use_own_attention(self.base)
        if self.shadowed_forward is None:
            del model.forward
        else:
            model.forward = self.shadowed_forward
        delattr(model, _ATTRIBUTE)

    def read(self, inputs: dict[str, Any], shared_prompts: SharedPrompts | None = None) -> Tensor:
        """(R, T, H), what the base model makes of input_ids (R, T) and its other arguments by name.

        shared_prompts: the same rationales in one row of tokens, every prompt once and no padding, each read behind its
            prompt by mind.prompt_attention: the tokens of K rationales and one prompt instead of K of both. The rows
            that predict a token are the same to rounding, gradient included; all others are 0.

        Raises: ValueError when the base model's attention cannot do that.
        """
        if shared_prompts is None:
            hidden_states: Tensor = self.base(**{"use_cache": False} | inputs)[0]
            return hidden_states
        prompts = shared_prompts
        with prompt_attention(self.base):
            rows: Tensor = self.base(
                input_ids=prompts.input_ids,
                attention_mask=attention_mask(prompts),
                position_ids=prompts.position_ids,
                use_cache=False,
                shared_prompts=prompts,
            )[0][0]
        shape = inputs["input_ids"].shape
        hidden_states = rows.new_zeros(shape.numel(), rows.shape[-1])
        return hidden_states.index_copy(0, prompts.place, rows[prompts.source]).view(*shape, -1)

    def logits(self, hidden_states: Tensor, dtype: torch.dtype) -> Tensor:  # (…, H) -> (…, V)
        """The final logits of these rows: a product in the dtype of its operands, then scale and cap in `dtype`."""
        z = self.loss.logit_scale * F.linear(hidden_states, self.head.weight, self.head.bias).to(dtype)
        softcap = self.loss.logit_softcap
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    @torch.no_grad()
    def check_shared_prompts(self) -> None:
        """Compare both ways of reading three short rationales of two questions.

        Raises: ValueError when they differ by more than rounding, or as `read`.
        """
        name, size = type(self.base).__name__, self.head.out_features
        tokens = [index % size for index in range(40)]
        targets = (tuple(tokens[5:12]), tuple(tokens[12:18]), tuple(tokens[18:26]))
        questions = [
            EncodedQuestion("first", tuple(tokens[:5]), targets[:2], 1, 0),
            EncodedQuestion("second", tuple(tokens[26:]), (targets[2], ()), 1, 1),
        ]
        selected = torch.tensor([[True, True], [True, False]])
        batch = student_inputs(questions, selected, pad_token_id=0)
        device = self.head.weight.device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        prompts = SharedPrompts(*(tensor.to(device) for tensor in shared_prompts(questions, selected)))
        rows = batch["supervised_index"].to(device)
        with evaluation_mode(self.base), readable(self.base):  # dropout would tell two runs apart
            plain = self.read(inputs).flatten(0, 1)[rows]
            try:
                shared = self.read(inputs, prompts).flatten(0, 1)[rows]
            except (RuntimeError, TypeError) as error:
                # An attention of its own, which the mask of all sequences does not fit, or a forward without **kwargs.
                raise ValueError(
                    f"shared_prompts: {name} does not take the attention that its config names "
                    f"({str(error).splitlines()[0]}): read the prompts unshared"
                ) from error
        difference = (plain - shared).abs().max().item()
        # Eight roundings, in fp32 those of TF32 products. Layers multiply what rounding did, a trained SmolLM2's to
        # 1e-4 of the largest entry in plain fp32; what is read wrongly differs by far more.
        dtype = torch.bfloat16 if needs_autocast(self.base) else plain.dtype
        allowed = 8 * max(2**-10, torch.finfo(dtype).eps) * plain.abs().max().item()
        if not difference <= allowed:
            raise ValueError(
                f"shared_prompts: what {name} makes of rationales behind one prompt differs by up to "
                f"{difference:.3g} (allowed {allowed:.1g}) from reading them whole: read the prompts unshared"
            )

    def compute_loss(
        self,
        inputs: dict[str, Any],
        shift_labels: Tensor,  # (R, T)
        rationale_weights: Tensor | None,  # (B, K)
        cu_seqlens: Tensor | None,  # (B·K + 1,)
        shared_prompts: SharedPrompts | None = None,
        return_hidden_states: bool = False,
        **tensors: Any,  # answer_index, supervised_index, teacher, num_questions: as mind_loss takes them
    ) -> MindOutput:
        """The loss of what the base model makes of inputs (the original forward's arguments by name).

        Raises: ValueError naming the argument, or when the model has another head than when the loss was attached.
        """
        if self.model.get_output_embeddings() is not self.head:
            raise ValueError(
                f"model: the head of this {type(self.model).__name__} was replaced after the MIND loss was attached, "
                "as by resizing or adapting it; wanted the same: detach() and attach again"
            )
        if rationale_weights is None:
            raise ValueError("rationale_weights: given None with shift_labels, wanted a tensor of shape (B, K)")
        for name in ("labels", "num_items_in_batch"):
            if inputs.pop(name, None) is not None:
                raise ValueError(f"{name}: given with shift_labels, wanted shift_labels and num_questions alone")
        if inputs.get("output_router_logits"):
            raise ValueError("output_router_logits: given with shift_labels, wanted False: no router loss is added")
        inputs.pop("return_dict", None)  # MindOutput is the one thing returned
        for name, value in inputs.items():  # a picture, say, which the model puts into the embeddings
            if name in self.unread and isinstance(value, Tensor) and value.is_floating_point():
                raise ValueError(
                    f"{name}: given with shift_labels, wanted only what the {type(self.base).__name__} takes, the part "
                    "of the model that the MIND loss runs"
                )
        hidden_states = self.read(inputs, shared_prompts)  # (R, T, H)
        *rows, hidden_size = hidden_states.shape
        if shift_labels.numel() != hidden_states.shape[:-1].numel():
            raise ValueError(f"shift_labels: given shape {tuple(shift_labels.shape)}, wanted the input's {tuple(rows)}")
        if cu_seqlens is not None:
            shape: tuple[int, ...] = (-1,)
        elif rows[0] == rationale_weights.numel():
            shape = (*rationale_weights.shape, rows[1])  # (B, K, T)
        else:
            raise ValueError(
                f"rationale_weights: given shape {tuple(rationale_weights.shape)} without cu_seqlens, "
                f"wanted one weight for each of the input's {rows[0]} rows"
            )
        output = self.loss(
            hidden_states.reshape(*shape, hidden_size),
            self.head.weight,
            shift_labels.reshape(shape),
            lm_head_bias=self.head.bias,
            rationale_weights=rationale_weights,
            cu_seqlens=cu_seqlens,
            **tensors,
        )
        return MindOutput(**output._asdict(), last_hidden_state=hidden_states if return_hidden_states else None)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Compare the model's own logits of a few tokens with those of base, head, scale and cap.

        Both get the same hidden_states, multiplied so that the logits span about ±50: a cap or any other non-linearity
        then shows, which small logits would hide.
        """
        model, scale, softcap = self.model, self.loss.logit_scale, self.loss.logit_softcap
        name = type(model).__name__
        input_ids = torch.arange(4, device=model.device).remainder(self.head.out_features)[None]  # (1, 4)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
        with evaluation_mode(model), readable(self.base):  # dropout would tell two runs apart
            hidden_states = self.base(**inputs)[0]  # (1, 4, H)
            if hidden_states.shape[-1] != self.head.in_features:
                raise ValueError(
                    f"model: {name}'s get_decoder(), a {type(self.base).__name__}, ends in {hidden_states.shape[-1]} "
                    f"numbers a token and its head takes {self.head.in_features}; wanted nothing between the two"
                )
            gain = 50 / (scale * self.head(hidden_states)).abs().max().clamp_min(0.1).item()
            own_hidden_states = []

            def amplify(module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
                own_hidden_states.append(output[0])
                output["last_hidden_state"] = gain * output[0]
                return output

            handle = self.base.register_forward_hook(amplify)
            try:
                own_logits = self.original_forward(**inputs).logits.double()  # (1, 4, V)
            finally:
                handle.remove()
        if not own_hidden_states:
            raise ValueError(f"model: {name}'s forward does not call its get_decoder(), a {type(self.base).__name__}")
        logits = self.logits(gain * hidden_states, torch.float64)
        if own_logits.shape != logits.shape:
            own_shape, shape = tuple(own_logits.shape), tuple(logits.shape)
            raise ValueError(f"model: {name}'s own logits have shape {own_shape}, its head's have {shape}; wanted one")
        if not bool(own_logits.isfinite().all()):
            raise ValueError(f"model: {name}'s own logits hold NaN or Inf, wanted finite ones: are its weights whole?")
        difference = (own_logits - logits).abs().max().item()
        # A few roundings in the dtype of its products; an unknown scale or cap changes far more than that.
        dtype = torch.bfloat16 if needs_autocast(self.base) else self.head.weight.dtype
        allowed = max(1e-4, 4 * torch.finfo(dtype).eps) * own_logits.abs().max().item()
        if not difference <= allowed:
            raise ValueError(
                f"model: {name}'s own logits differ by up to {difference:.3g} (allowed {allowed:.1g}) from those of "
                f"its head with logit_scale={scale} and logit_softcap={softcap}; wanted equal ones: if another scale "
                "or cap makes them so, give it as logit_scale= or logit_softcap="
            )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DistributedDataParallel and PeftModel.

    Raises: TypeError for another kind of model; ValueError for adapters that are not inside it.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(inner, PeftModel):
        adapter = inner.active_peft_config
        if adapter.is_prompt_learning:  # the PeftModel puts them before the tokens, and not where the base is run
            raise ValueError(
                f"model: given a {type(adapter).__name__}, whose prompt the MIND loss would pass by; wanted adapters "
                "inside the layers, such as LoRA"
            )
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model: given a {type(model).__name__}, wanted a transformers PreTrainedModel")
    return inner


def _plain_head(model: PreTrainedModel) -> nn.Linear:
    """The model's head, which must be exactly a linear layer: the loss multiplies by its weight without calling it."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: {name} has no output embeddings; wanted a causal language model")
    kind = type(head)
    if kind.__module__.partition(".")[0] == "peft":
        raise ValueError(
            f"model: the head of this {name} is adapted (peft's {kind.__name__}); wanted it plain: leave it out of "
            "target_modules, modules_to_save and trainable_token_indices, or merge the adapter first"
        )
    if kind is not nn.Linear or type(head.weight) is not nn.Parameter or head.weight.element_size() < 2:
        raise ValueError(
            f"model: the head of this {name} is a {kind.__name__} with a {head.weight.dtype} "
            f"{type(head.weight).__name__}; wanted a plain nn.Linear, neither quantised nor wrapped; "
            "attach before fully_shard"
        )
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in vars(head):
        raise ValueError(f"model: the head of this {name} has hooks, which the loss would pass by; wanted them removed")
    return head


def _logit_options(config: PretrainedConfig) -> dict[str, Any]:
    """What the config says happens to the head's output, in mind_kernels' terms."""
    options: dict[str, Any] = {"logit_scale": 1.0, "logit_softcap": getattr(config, "final_logit_softcapping", None)}
    if getattr(config, "logit_scale", None) is not None:
        options["logit_scale"] = config.logit_scale
    elif getattr(config, "logits_scaling", None) is not None:
        options["logit_scale"] = 1 / config.logits_scaling
    return options


def _parameter_names(forward: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(forward).parameters)


def _make_forward(original_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function for MethodType: it reads its attachment off the instance, so that a copied model uses its own."""
    parameters = list(inspect.signature(original_forward).parameters.values())
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    def forward(
        self: PreTrainedModel,
        *args: Any,
        shift_labels: Tensor | None = None,
        rationale_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        answer_index: Tensor | None = None,
        supervised_index: Tensor | None = None,
        teacher: Any = None,
        num_questions: int | Tensor | None = None,
        shared_prompts: SharedPrompts | None = None,
        return_hidden_states: bool = False,
        **inputs: Any,
    ) -> Any:
        attachment: MindAttachment = getattr(self, _ATTRIBUTE)
        tensors = {
            "rationale_weights": rationale_weights,
            "cu_seqlens": cu_seqlens,
            "answer_index": answer_index,
            "supervised_index": supervised_index,
            "teacher": teacher,
            "num_questions": num_questions,
            "shared_prompts": shared_prompts,
        }
        if shift_labels is None:
            given = [name for name, value in tensors.items() if value is not None]
            if given:
                raise ValueError(f"shift_labels: given None with {', '.join(given)}, wanted a tensor of shape (R, T)")
            return attachment.original_forward(*args, **inputs)
        inputs |= dict(zip(names, args, strict=False))
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return attachment.compute_loss(inputs, shift_labels, return_hidden_states=return_hidden_states, **tensors)

    # generate() and Trainer read from the signature which inputs the model takes.
    own = [p for p in inspect.signature(forward).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    variadic = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = [p for p in parameters if p not in variadic]
    forward.__signature__ = inspect.Signature([self_parameter, *others, *own, *variadic])  # type: ignore[attr-defined]
    return forward
