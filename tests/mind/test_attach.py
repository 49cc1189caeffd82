"""attach_mind_loss on tiny random models of many architectures, against Hugging Face's own logits and loss."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mind import attach, prompt_attention
from mind.attach import MindOutput, attach_mind_loss
from mind.collator import shared_prompts, student_inputs
from mind.data import EncodedQuestion
from mind_kernels import TeacherLogits

B, K, T, A, V = 2, 3, 10, 2, 61
CONSISTENCY = 0.7

_SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # logits of several units, so that a cap bends them
}
_GPT2_SIZES = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT_SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}
# What each is here for stands beside it.
ARCHITECTURES = {
    "llama": ("Llama", _SIZES),
    "qwen2": ("Qwen2", _SIZES),  # biases in attention
    "qwen3": ("Qwen3", _SIZES | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", _SIZES | {"sliding_window": 4}),
    "phi3": ("Phi3", _SIZES),  # fused projections
    "gemma2": ("Gemma2", _SIZES | {"sliding_window": 4, "final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", _SIZES | {"sliding_window": 4, "final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", _GPT2_SIZES),  # another base_model_prefix, order of arguments and config names
    "granite": ("Granite", _SIZES | {"logits_scaling": 4.0}),  # divides
    "jetmoe": ("JetMoe", _SIZES | {"kv_channels": 16, "num_local_experts": 2, "num_experts_per_tok": 2}),  # a view
    "cohere": ("Cohere", _SIZES | {"logit_scale": 0.25}),  # multiplies
    "phi": ("Phi", _SIZES),  # a bias in the head
    "opt": ("OPT", _OPT_SIZES),  # a decoder inside the base model
}


def build(name: str, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    architecture, sizes = ARCHITECTURES[name]
    prefix = "Gemma3Text" if architecture == "Gemma3" else architecture
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{prefix}Config")(**sizes))
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model.to(dtype).eval()  # no dropout, so that two runs agree


def batch(left_padding: int = 0) -> dict[str, Tensor]:
    """B·K rows of T tokens: row 0 padded on the left, the others by 0 to 2 on the right; the prompts unsupervised.

    Gemma 2's own fp64 attention gives NaN for a row that begins with padding, hence 0 by default.
    """
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, V, (B * K, T), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :left_padding] = 0
    for row in range(1, B * K):
        attention_mask[row, T - row % 3 :] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def shifted(labels: Tensor) -> Tensor:
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def mind_inputs(left_padding: int = 0) -> dict[str, Tensor]:
    """The same batch in MIND's form: α with a zero, answers of A tokens, one of them absent in one rationale."""
    inputs = batch(left_padding)
    shift_labels = shifted(inputs.pop("labels"))
    answer_index = torch.empty(B, K, A, dtype=torch.int64)
    for row, labels in enumerate(shift_labels):
        answer_index.view(B * K, A)[row] = row * T + (labels != -100).nonzero().flatten()[-A:]
    answer_index[1, 2, 0] = -1
    rationale_weights = torch.tensor([[0.5, 0.2, 0.3], [0.6, 0.0, 0.4]], dtype=torch.float64)
    return inputs | {
        "shift_labels": shift_labels,
        "rationale_weights": rationale_weights,
        "cu_seqlens": torch.arange(0, B * K * T + 1, T, dtype=torch.int32),
        "answer_index": answer_index,
    }


def expected_loss(logits: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, cross_entropy, consistency, rationale_losses) written out from the model's own logits (B·K, T, V)."""
    weights = inputs["rationale_weights"]
    log_probs = logits.log_softmax(-1)
    cross_entropy = torch.stack(
        [nn.functional.nll_loss(row, labels) for row, labels in zip(log_probs, inputs["shift_labels"], strict=True)]
    ).view(B, K)
    flat = log_probs.reshape(-1, V)
    consistency = logits.new_zeros(())
    for b in range(B):
        positions = inputs["answer_index"][b]  # (K, A)
        for i in range(K):
            for j in range(i + 1, K):
                divergences = []
                for a in range(A):
                    if positions[i, a] < 0 or positions[j, a] < 0:
                        continue
                    p, q = flat[positions[i, a]], flat[positions[j, a]]
                    m = torch.logaddexp(p, q) - torch.tensor(2.0).log()
                    divergences.append(0.5 * (p.exp() * (p - m)).sum() + 0.5 * (q.exp() * (q - m)).sum())
                consistency = consistency + weights[b, i] * weights[b, j] * torch.stack(divergences).sum() / A
    sft = (weights * cross_entropy).sum() / B
    consistency = consistency / B
    return sft + CONSISTENCY * consistency, sft, consistency, cross_entropy


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(actual: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float) -> None:
    """Error relative to the parameter's largest gradient, named by parameter.

    A gradient that is zero but for rounding, as a key bias's, is compared with a thousandth of the largest of all.
    """
    assert actual.keys() == wanted.keys()
    floor = 1e-3 * max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (actual[name] - gradient).abs().max() / gradient.abs().max().clamp_min(floor)
        assert error <= rtol, f"{name}: relative error {error:.2e}"


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("dtype", "left_padding", "rtol"), [(torch.float64, 0, 1e-9), (torch.float32, 3, 2e-4)], ids=["fp64", "fp32"]
)
def test_weighted_loss_equals_own_logits(name: str, dtype: torch.dtype, left_padding: int, rtol: float) -> None:
    model = build(name, dtype)
    inputs = mind_inputs(left_padding)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    loss, *parts = expected_loss(logits, inputs)
    wanted = gradients(loss, model)
    attach_mind_loss(model, consistency_weight=CONSISTENCY)
    output = model(**inputs)
    assert isinstance(output, MindOutput)
    torch.testing.assert_close(output.loss, loss, rtol=rtol, atol=0, check_dtype=False)
    for field, part in zip(("cross_entropy", "consistency", "rationale_losses"), parts, strict=True):
        torch.testing.assert_close(output[field], part, rtol=max(rtol, 1e-6), atol=1e-6, check_dtype=False, msg=field)
    assert output.kl == 0
    assert_gradients_close(gradients(output.loss, model), wanted, rtol)


def test_plain_loss_equals_own_loss(name: str) -> None:
    """One rationale that is the whole batch: Hugging Face's mean over the tokens, which it computes in fp32."""
    model = build(name)
    inputs = batch()
    own = model(**inputs).loss
    wanted = gradients(own, model)
    attach_mind_loss(model)
    output = model(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        shift_labels=shifted(inputs["labels"]),
        rationale_weights=torch.ones(1, 1, dtype=torch.float64),
        cu_seqlens=torch.tensor([0, B * K * T], dtype=torch.int32),
    )
    torch.testing.assert_close(output.loss, own, rtol=1e-6, atol=0, check_dtype=False)
    assert_gradients_close(gradients(output.loss, model), wanted, 1e-5)


def test_rows_are_rationales_without_cu_seqlens() -> None:
    model = build("llama")
    attach_mind_loss(model)
    inputs = mind_inputs()
    with_boundaries = model(**inputs).loss
    del inputs["cu_seqlens"]
    assert torch.equal(model(**inputs).loss, with_boundaries)


def test_unselected_rationales_are_not_in_the_batch() -> None:
    """Rationale (1, 1) has weight 0: leaving its row out, as an empty segment, changes only its own reported loss."""
    model = build("gpt2")  # fp64 throughout: others have norms in fp32, whose rounding depends on the number of rows
    attach_mind_loss(model, consistency_weight=CONSISTENCY)
    inputs = mind_inputs()
    whole = model(**inputs)
    wanted = gradients(whole.loss, model)
    gone = K + 1
    kept = [row for row in range(B * K) if row != gone]
    lengths = torch.full((B * K,), T)
    lengths[gone] = 0
    answer_index = inputs["answer_index"].clone()
    answer_index[1, 1] = -1
    answer_index[1, 2] = torch.where(answer_index[1, 2] < 0, -1, answer_index[1, 2] - T)
    some = model(
        **{key: inputs[key][kept] for key in ("input_ids", "attention_mask", "shift_labels")},
        rationale_weights=inputs["rationale_weights"],
        cu_seqlens=nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        answer_index=answer_index,
    )
    torch.testing.assert_close(some.loss, whole.loss, rtol=1e-12, atol=0)
    assert some.rationale_losses[1, 1] == 0
    assert_gradients_close(gradients(some.loss, model), wanted, 1e-9)


def test_teacher_and_num_questions_reach_the_loss() -> None:
    model = build("gemma2")
    inputs = mind_inputs()
    del inputs["answer_index"]
    teacher_logits = torch.randn(B * K * T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    log_p = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    log_t = teacher_logits.view(B * K, T, V).log_softmax(-1)
    per_token = (log_t.exp() * (log_t - log_p)).sum(-1)  # forward KL(teacher ‖ student)
    supervised = inputs["shift_labels"] != -100
    per_rationale = (per_token * supervised).sum(-1) / supervised.sum(-1)
    wanted = (inputs["rationale_weights"].view(-1) * per_rationale).sum() / 5
    attach_mind_loss(model, kl_weight=1.0, consistency_weight=0.0)
    output = model(**inputs, teacher=TeacherLogits(teacher_logits), num_questions=5)
    torch.testing.assert_close(output.kl, wanted, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(output.loss, output.cross_entropy + output.kl, rtol=1e-6, atol=0, check_dtype=False)


def test_losses_only_without_gradients() -> None:
    model = build("llama")
    attach_mind_loss(model)
    with torch.no_grad():
        output = model(**mind_inputs())
    assert not output.loss.requires_grad
    assert (output.rationale_losses > 0).all()


def test_head_is_never_called() -> None:
    model = build("gemma3")
    attach_mind_loss(model)
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    model(**mind_inputs()).loss.backward()
    assert not calls
    assert model.lm_head.weight.grad is not None


def test_attaching_leaves_modes_and_random_state() -> None:
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    attach_mind_loss(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_original_forward_and_generation_without_labels(name: str) -> None:
    model = build(name, torch.float32)
    inputs = batch(left_padding=3)
    left_padded = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    own = model(**inputs)
    generated = model.generate(**left_padded, max_new_tokens=5, do_sample=False, pad_token_id=0)
    signature = inspect.signature(model.forward)
    attachment = attach_mind_loss(model)
    assert list(signature.parameters) == [
        p for p in inspect.signature(model.forward).parameters if p in signature.parameters
    ]
    attached = model(**inputs)
    assert torch.equal(attached.logits, own.logits)
    assert torch.equal(attached.loss, own.loss)
    again = model.generate(**left_padded, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(again, generated)
    attachment.detach()
    assert inspect.signature(model.forward) == signature


def test_positional_arguments_follow_the_models_own_order() -> None:
    model = build("gpt2")  # (input_ids, past_key_values, attention_mask, …)
    attach_mind_loss(model)
    inputs = mind_inputs(left_padding=3)  # a lost mask would be seen
    by_name = model(**inputs).loss
    assert torch.equal(model(inputs.pop("input_ids"), None, inputs.pop("attention_mask"), **inputs).loss, by_name)


def test_detach_restores_this_instance_alone() -> None:
    model, other = build("llama"), build("llama")
    class_forward = type(model).forward
    attachment = attach_mind_loss(model)
    assert type(model).forward is class_forward
    assert "forward" not in vars(other)
    with pytest.raises(ValueError, match="has a MIND loss already"):
        attach_mind_loss(model)
    attachment.detach()
    assert vars(model).keys() == vars(other).keys()
    with pytest.raises(ValueError, match="no longer attached"):
        attachment.detach()
    attach_mind_loss(model)
    assert isinstance(model(**mind_inputs()), MindOutput)


def test_a_copy_uses_its_own_weights() -> None:
    model = build("llama")
    attach_mind_loss(model)
    clone = copy.deepcopy(model)
    before = clone(**mind_inputs()).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(clone(**mind_inputs()).loss, before)


def test_saved_model_loads_without_the_loss(tmp_path) -> None:
    model = build("gemma3", torch.float32)
    attach_mind_loss(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert "forward" not in vars(loaded)
    inputs = batch()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_gradient_checkpointing() -> None:
    model = build("llama").train()
    attach_mind_loss(model)
    wanted = gradients(model(**mind_inputs()).loss, model)
    model.gradient_checkpointing_enable()
    assert_gradients_close(gradients(model(**mind_inputs()).loss, model), wanted, 1e-12)


def test_autocast() -> None:
    model = build("gemma2", torch.float32)
    inputs = mind_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert logits.dtype == torch.bfloat16
    loss = expected_loss(logits.float(), inputs)[0]
    wanted = gradients(loss, model)
    attach_mind_loss(model, consistency_weight=CONSISTENCY)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    torch.testing.assert_close(output.loss, loss, rtol=5e-3, atol=0, check_dtype=False)
    assert_gradients_close(gradients(output.loss, model), wanted, 5e-2)


def test_bfloat16_model() -> None:
    """The check at attach allows the roundings of the model's dtype."""
    for name in ("gemma3", "granite", "cohere"):
        model = build(name, torch.bfloat16)
        attach_mind_loss(model)
        assert model(**mind_inputs()).loss.isfinite()


def test_accelerate_mixed_precision_wraps_and_unwraps() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model = build("llama", torch.float32)
        attachment = attach_mind_loss(model)
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        model = accelerator.prepare_model(model)
        output = model(**mind_inputs())
        accelerator.backward(output.loss)
        assert model.lm_head.weight.grad.isfinite().all()
        with pytest.raises(ValueError, match="wrapped after the MIND loss"):
            attachment.detach()
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        attachment.detach()
        assert "forward" not in vars(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-then-wrap", "wrap-then-attach"])
def test_distributed_data_parallel(tmp_path, attach_first: bool) -> None:
    model = build("llama")
    wanted_model = copy.deepcopy(model)
    attach_mind_loss(wanted_model)
    wanted = gradients(wanted_model(**mind_inputs()).loss, wanted_model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    wrapped = None
    try:
        if attach_first:
            attach_mind_loss(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        if not attach_first:
            attach_mind_loss(wrapped)
        assert_gradients_close(gradients(wrapped(**mind_inputs()).loss, model), wanted, 1e-12)
    finally:
        # Its reducer must not be the last owner of the process group: it would join the group's threads with the
        # interpreter's lock in its hand, which they may be waiting for.
        wrapped = None
        gc.collect()
        torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(tmp_path) -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    gc.collect()
    torch.distributed.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # gemma3: tied embeddings, and a cap
def test_fully_shard(architecture: str, one_rank: DeviceMesh) -> None:
    """Gradients of a student whose parameters are whole within its own forward alone."""
    model = build(architecture)
    wanted_model = copy.deepcopy(model)
    attach_mind_loss(wanted_model)
    wanted = gradients(wanted_model(**mind_inputs()).loss, wanted_model)
    attachment = attach_mind_loss(model)
    shard(model, one_rank)
    assert isinstance(model.get_output_embeddings().weight, DTensor)
    model(**mind_inputs()).loss.backward()
    got = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_gradients_close(got, wanted, 1e-12)
    attachment.detach()


def test_fully_shard_before_the_loss(one_rank: DeviceMesh) -> None:
    model = build("llama")
    shard(model, one_rank)
    with pytest.raises(ValueError, match=r"with a torch.float64 DTensor; wanted .*; attach before fully_shard"):
        attach_mind_loss(model)


def lora(**settings) -> PeftModel:
    model = get_peft_model(build("gemma3", torch.float32), LoraConfig(r=4, lora_alpha=8, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # zero at first, which would hide the adapter
    return model.eval()


def test_lora_on_all_linear_layers(tmp_path) -> None:
    model = lora(target_modules="all-linear")
    inputs = mind_inputs()
    loss, *_ = expected_loss(model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, inputs)
    wanted = gradients(loss, model)
    attach_mind_loss(model, consistency_weight=CONSISTENCY)
    output = model(**inputs)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=0, check_dtype=False)
    actual = gradients(output.loss, model)
    assert actual and all("lora_" in name for name in actual)
    assert_gradients_close(actual, wanted, 2e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("gemma3", torch.float32), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},  # tied: the head is wrapped as well
    ],
    ids=lambda settings: list(settings)[-1],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_adapted_head_is_refused_with_the_remedy(settings: dict) -> None:
    with pytest.raises(ValueError, match="leave it out of target_modules") as error:
        attach_mind_loss(lora(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("adapter", [PrefixTuningConfig, PromptTuningConfig])
def test_a_learned_prompt_is_refused(adapter: type[PeftConfig]) -> None:
    """It would be trained through the PeftModel's forward and left out wherever the base model is run."""
    model = get_peft_model(build("llama"), adapter(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=f"^model: given a {adapter.__name__}, .*; wanted adapters inside the layers"):
        attach_mind_loss(model)


def _resize(model: nn.Module) -> None:
    model.resize_token_embeddings(V + 3, mean_resizing=False)


def _adapt(**settings) -> Callable[[nn.Module], Any]:
    return lambda model: get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **settings))


@pytest.mark.parametrize(
    "change",
    [
        _resize,
        _adapt(modules_to_save=["lm_head"]),
        lambda model: get_peft_model(model, LoraConfig(target_modules=["lm_head"])),
    ],
    ids=["resized", "modules_to_save", "lora"],
)
def test_a_head_that_was_replaced_since_is_refused(change: Callable[[nn.Module], Any]) -> None:
    """The loss would go on with the head that it found, and what is trained since would get no gradient."""
    model = build("llama")
    attachment = attach_mind_loss(model)
    change(model)
    with pytest.raises(ValueError, match="the head of this LlamaForCausalLM was replaced") as error:
        model(**mind_inputs())
    assert "\n" not in str(error.value)
    attachment.detach()


def test_a_tied_head_may_be_resized() -> None:
    model = build("gemma3")
    attachment = attach_mind_loss(model)
    _resize(model)
    loss = model(**mind_inputs()).loss
    attachment.detach()
    attach_mind_loss(model)
    assert torch.equal(model(**mind_inputs()).loss, loss)


class QuantisedLinear(nn.Linear):
    pass


def test_heads_that_are_not_plain_are_refused() -> None:
    model = build("llama")
    model.lm_head = QuantisedLinear(32, V, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match="is a QuantisedLinear"):
        attach_mind_loss(model)
    model = build("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        attach_mind_loss(model)
    model = build("llama")
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match="has hooks"):
        attach_mind_loss(model)
    handle.remove()
    attach_mind_loss(model)


class ScaledLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output


class CappedLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


class ShiftedLlama(transformers.LlamaForCausalLM):
    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids + 1, **kwargs)


@pytest.mark.parametrize(
    ("model_class", "remedy"),
    [(ScaledLlama, {"logit_scale": 1.5}), (CappedLlama, {"logit_softcap": 30.0}), (ShiftedLlama, None)],
)
@pytest.mark.parametrize("initializer_range", [0.02, 0.3], ids=["small-logits", "large-logits"])
def test_logits_the_head_does_not_explain_are_refused(model_class, remedy, initializer_range: float) -> None:
    torch.manual_seed(0)
    model = model_class(transformers.LlamaConfig(**_SIZES | {"initializer_range": initializer_range}))
    with pytest.raises(ValueError, match=rf"{model_class.__name__}'s own logits differ by up to \d") as error:
        attach_mind_loss(model)
    assert "\n" not in str(error.value)
    assert "forward" not in vars(model)
    if remedy is not None:
        attach_mind_loss(model, **remedy)
        assert model(**mind_inputs()).loss.isfinite()


def test_router_loss_is_refused() -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**_SIZES | sizes, output_router_logits=True))
    with pytest.raises(ValueError, match="output_router_logits=False"):
        attach_mind_loss(model)
    model.config.output_router_logits = False
    attach_mind_loss(model)
    with pytest.raises(ValueError, match="output_router_logits: given with shift_labels, wanted False"):
        model(**mind_inputs(), output_router_logits=True)
    assert model(**mind_inputs(), output_router_logits=False).loss.isfinite()


def test_other_modules_and_options_are_refused() -> None:
    with pytest.raises(TypeError, match="given a Linear, wanted a transformers PreTrainedModel"):
        attach_mind_loss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        attach_mind_loss(build("llama").model)
    with pytest.raises(TypeError, match="consistency"):
        attach_mind_loss(build("llama"), consistency=0.1)


def test_heads_that_do_not_take_what_the_decoder_gives_are_refused() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    electra = transformers.ElectraConfig(is_decoder=True, embedding_size=8, num_attention_heads=2, **sizes)
    with pytest.raises(ValueError, match="ElectraModel, ends in 16 numbers a token and its head takes 8"):
        attach_mind_loss(transformers.ElectraForCausalLM(electra))
    t5 = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder beside its decoder"):
        attach_mind_loss(transformers.T5ForConditionalGeneration(t5))
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id"), 0)
    modern_bert = transformers.ModernBertDecoderConfig(num_attention_heads=2, **sizes, **tokens)
    with pytest.raises(ValueError, match=r"ModernBertDecoderForCausalLM.get_decoder\(\) gives its head"):
        attach_mind_loss(transformers.ModernBertDecoderForCausalLM(modern_bert))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rationale_weights": None}, "rationale_weights: given None"),
        ({"shift_labels": None}, "shift_labels: given None with rationale_weights"),
        ({"labels": torch.zeros(B * K, T, dtype=torch.int64)}, "labels: given with shift_labels"),
        ({"num_items_in_batch": 7}, "num_items_in_batch: given with shift_labels"),
        ({"shift_labels": torch.zeros(B * K, T - 1, dtype=torch.int64)}, r"shift_labels: given shape \(6, 9\)"),
        ({"cu_seqlens": None, "rationale_weights": torch.full((1, 4), 0.25)}, "wanted one weight for each"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    model = build("llama")
    attach_mind_loss(model)
    with pytest.raises(ValueError, match=message) as error:
        model(**mind_inputs() | change)
    assert "\n" not in str(error.value)


def test_a_picture_is_refused() -> None:
    """Its decoder takes any argument and reads tokens alone: the loss would be that of the placeholders."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**_SIZES)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=V - 1)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    attach_mind_loss(model)
    inputs = mind_inputs()
    assert model(**inputs).loss.isfinite()
    inputs["input_ids"][:, :4] = V - 1
    with pytest.raises(ValueError, match="pixel_values: given with shift_labels"):
        model(**inputs, pixel_values=torch.zeros(B * K, 3, 8, 8, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Every prompt read once


def questions() -> tuple[list[EncodedQuestion], Tensor]:
    """Prompts of 6, 3 and 9 tokens, targets of 3 to 7, and which are selected: of the second question one, in all 6."""
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, V, (count,), generator=generator).tolist())

    found = []
    for b, length in enumerate((6, 3, 9)):
        suffix = ids(A)
        targets = tuple(ids(1 + (2 * b + k) % 5) + suffix for k in range(K))
        found.append(EncodedQuestion(f"q{b}", ids(length), targets, A, b))
    return found, torch.tensor([[True, True, True], [False, True, False], [True, False, True]])


def objective(model: nn.Module, share: bool) -> tuple[MindOutput, dict[str, Tensor]]:
    asked, selected = questions()
    weights = selected / selected.sum(-1, keepdim=True)
    inputs = student_inputs(asked, selected, 0)
    extra = {"shared_prompts": shared_prompts(asked, selected)} if share else {}
    output = model(**inputs, **extra, rationale_weights=weights.double(), return_hidden_states=True)
    return output, gradients(output.loss, model)


@pytest.mark.parametrize("path", ["one_by_one", "long", "padded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_read_once_give_the_same_loss_and_gradients(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with and without scores that are written out; padded as on a GPU and within a graph."""
    if path == "long":
        monkeypatch.setattr(prompt_attention, "LONGEST_WRITTEN_OUT", 8)
    if path == "padded":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    # Gemma 2's own attention gives NaN in fp64, whose mask does not fit its fp32 softmax. Norms are fp32 in most.
    dtype, tolerance = (torch.float32, 2e-5) if name == "gemma2" else (torch.float64, 1e-6)
    model = build(name, dtype)
    attach_mind_loss(model, consistency_weight=CONSISTENCY)
    plain, plain_gradients = objective(model, share=False)
    shared, shared_gradients = objective(model, share=True)
    for part in ("loss", "cross_entropy", "consistency", "rationale_losses"):
        torch.testing.assert_close(shared[part], plain[part], rtol=tolerance, atol=tolerance)
    assert plain.consistency > 0
    for key, gradient in plain_gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(shared_gradients[key], gradient, rtol=0, atol=max(tolerance * scale, 1e-12))


def test_prompts_read_once_are_read_once() -> None:
    model = build("llama")
    attachment = attach_mind_loss(model)
    asked, selected = questions()
    read: list[Tensor] = []
    attachment.base.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    objective(model, share=True)
    tokens: list[int] = []
    for question, row in zip(asked, selected, strict=True):
        tokens += question.prompt_ids
        for k in range(K):
            tokens += question.target_ids[k][:-1] if row[k] else ()
    assert [ids.tolist() for ids in read] == [[tokens]]


def test_sequences_of_shared_prompts() -> None:
    """Prompt (0, 1) with rationales (2,) and, of one token, (), then a question's only rationale with its prompt."""
    asked = [
        EncodedQuestion("first", (5, 6), ((7, 8), (9,)), 1, 0),
        EncodedQuestion("second", (10, 11, 12), ((), (13, 14)), 1, 1),
    ]
    found = shared_prompts(asked, torch.tensor([[True, True], [False, True]]))
    wanted = {
        "input_ids": [[5, 6, 7, 10, 11, 12, 13]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3]],
        "query_index": [[0, 1, 0, 1], [2, 2, 2, 2], [3, 4, 5, 6]],
        "key_index": [[0, 1, 0, 1], [0, 1, 2, 0], [3, 4, 5, 6]],
        "output_index": [0, 1, 4, 8, 9, 10, 11],
        "key_rows": [0, 1, 0, 1, 2, 3, 4, 5, 6],
        "cu_seqlens_q": [0, 2, 3, 7],
        "cu_seqlens_k": [0, 2, 5, 9],
        "source": [1, 2, 1, 5, 6],
        "place": [1, 2, 6, 12, 13],
    }
    assert {name: tensor.tolist() for name, tensor in found._asdict().items()} == wanted
    seen = prompt_attention.attention_mask(found)[:, 0]
    assert seen[0, :2].tolist() == [[True, False, False, False], [True, True, False, False]]
    assert seen[1, 0].tolist() == [True, True, True, False]
    assert seen[2].equal(torch.ones(4, 4).tril().bool())
    assert seen.any(-1).all()


def test_rows_that_predict_nothing_are_zero() -> None:
    model = build("llama")
    attach_mind_loss(model)
    plain, _ = objective(model, share=False)
    shared, _ = objective(model, share=True)
    asked, selected = questions()
    labels = student_inputs(asked, selected, 0)["shift_labels"] != -100
    torch.testing.assert_close(
        shared.last_hidden_state.flatten(0, 1)[labels], plain.last_hidden_state.flatten(0, 1)[labels]
    )
    assert not shared.last_hidden_state.flatten(0, 1)[~labels].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_prompts_read_once_with_gradient_checkpointing(use_reentrant: bool) -> None:
    """Layers attend once more in the backward pass, after whatever else was read since."""
    model = build("llama").train()
    attachment = attach_mind_loss(model)
    asked, selected = questions()
    inputs = student_inputs(asked, selected, 0)
    once = inputs | {"shared_prompts": shared_prompts(asked, selected), "rationale_weights": selected.double()}
    wanted = gradients(model(**once).loss, model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss = model(**once).loss
    attachment.check_shared_prompts()
    with torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert_gradients_close(gradients(loss, model), wanted, 1e-12)


def test_the_model_keeps_its_own_attention() -> None:
    """What it reads without shared_prompts, generation included, and all it reads once the loss is detached."""
    model = build("gemma3")
    prompt = torch.tensor([[3, 4, 5, 6, 7, 8]])
    wanted, text = model(prompt).logits, model.generate(prompt, max_new_tokens=4, do_sample=False)
    attachment = attach_mind_loss(model)
    attachment.check_shared_prompts()
    assert model.config._attn_implementation == "sdpa"
    objective(model, share=True)
    assert model.config._attn_implementation == "mind_sdpa"
    assert model(prompt).logits.equal(wanted)
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).equal(text)
    attachment.detach()
    assert model.config._attn_implementation == "sdpa"


def test_eager_attention() -> None:
    """Its mask is added to the scores; sinks, which GPT-OSS has, are the module's own."""
    sizes = _SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
    torch.manual_seed(0)
    for config in (transformers.GptOssConfig(**sizes), transformers.LlamaConfig(**_SIZES)):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        attachment = attach_mind_loss(model)
        attachment.check_shared_prompts()
        plain, _ = objective(model, share=False)
        shared, _ = objective(model, share=True)
        torch.testing.assert_close(shared.loss, plain.loss, rtol=1e-5, atol=0)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """flash_attn_varlen_func as flash-attn documents it: (tokens, heads, d), causal from the last query and key on."""
    assert causal and dropout_p == 0.0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for s in range(len(cu_seqlens_q) - 1):
        q = query[cu_seqlens_q[s] : cu_seqlens_q[s + 1]].transpose(0, 1)
        k, v = (
            states[cu_seqlens_k[s] : cu_seqlens_k[s + 1]].repeat_interleave(groups, 1).transpose(0, 1)
            for states in (key, value)
        )
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        last = k.shape[1] - q.shape[1]
        distance = torch.arange(q.shape[1])[:, None] + last - torch.arange(k.shape[1])
        left, right = window_size
        seen = (distance >= 0) & ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("path", ["one_by_one", "long", "padded", "flash"])
def test_attention_dropout_of_prompts_read_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, attention_dropout=0.5))
    attach_mind_loss(model)
    shares: list[float] = []
    if path == "long":
        monkeypatch.setattr(prompt_attention, "LONGEST_WRITTEN_OUT", 8)
    if path == "padded":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if path == "flash":

        def attend(*args: Any, dropout_p: float, **settings: Any) -> Tensor:
            shares.append(dropout_p)
            return varlen_attention(*args, **settings)

        flash_attn = types.ModuleType("flash_attn")
        flash_attn.flash_attn_varlen_func = attend  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
        model.config._attn_implementation = "flash_attention_2"
    wanted, _ = objective(model.eval(), share=True)
    dropped, _ = objective(model.train(), share=True)
    if path == "flash":
        assert shares == [0.0, 0.0, 0.5, 0.5]
    else:
        assert not torch.isclose(dropped.loss, wanted.loss, rtol=1e-3)
    again, _ = objective(model.eval(), share=True)
    assert again.loss.equal(wanted.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["one_by_one", "long", "padded"])
def test_prompts_read_once_under_autocast(path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated queries and keys are fp32 there and values are not."""
    if path == "long":
        monkeypatch.setattr(prompt_attention, "LONGEST_WRITTEN_OUT", 8)
    if path == "padded":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = build("llama", torch.float32)
    attach_mind_loss(model, consistency_weight=CONSISTENCY)
    exact, exact_gradients = objective(model, share=False)

    def error(share: bool) -> tuple[float, float]:
        with torch.autocast("cpu", dtype=dtype):
            output, found = objective(model, share=share)
        off = sum((found[key] - wanted).square().sum() for key, wanted in exact_gradients.items())
        return abs(output.loss - exact.loss).item(), float(off) ** 0.5

    plain, shared = error(False), error(True)
    assert shared[0] <= 3 * plain[0] + 1e-2 and shared[1] <= 3 * plain[1]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_flash_attention_is_given_the_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn = types.ModuleType("flash_attn")
    flash_attn.flash_attn_varlen_func = varlen_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    model = build(name, torch.float32)
    model.config._attn_implementation = "eager"  # whose scores are capped as FlashAttention's are
    attach_mind_loss(model, consistency_weight=CONSISTENCY)
    plain, plain_gradients = objective(model, share=False)
    model.config._attn_implementation = "flash_attention_2"
    shared, shared_gradients = objective(model, share=True)
    assert model.config._attn_implementation == "mind_flash_attention_2"
    torch.testing.assert_close(shared.loss, plain.loss, rtol=2e-5, atol=0)
    for key, gradient in plain_gradients.items():
        torch.testing.assert_close(shared_gradients[key], gradient, rtol=0, atol=2e-5 * gradient.abs().max().item())


def test_flash_attention_unshared_is_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function looks its own name up, which is not the one that the config holds while prompts are shared."""
    model = build("llama")
    called: list[str] = []

    def attend(module: nn.Module, query: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, None]:
        called.append(module.config._attn_implementation)
        return query.transpose(1, 2), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "flash_attention_2", attend)
    model.config._attn_implementation = "mind_flash_attention_2"
    model(input_ids=torch.tensor([[3, 4]]))
    assert called == ["flash_attention_2"] * 2 and model.config._attn_implementation == "mind_flash_attention_2"


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.Lfm2Config(**_SIZES | {"layer_types": ["conv", "full_attention"]}),
        transformers.FalconH1Config(**_SIZES | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
        transformers.MiniMaxConfig(
            **_SIZES | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_local_experts": 2}
        ),
        transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=2),  # positions within its attention
    ],
    ids=lambda config: config.model_type,
)
def test_a_base_that_is_not_all_attention_is_refused(config: transformers.PretrainedConfig) -> None:
    attachment = attach_mind_loss(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match=r"^shared_prompts: tokens of \w+Model see others by more than an attention"):
        attachment.check_shared_prompts()


def test_a_base_with_a_state_is_refused() -> None:
    """One that says so of itself, however its layers are called and its attention is chosen."""
    attachment = attach_mind_loss(build("llama"))
    attachment.check_shared_prompts()
    attachment.base._is_stateful = True
    with pytest.raises(ValueError, match=r"^shared_prompts: tokens of LlamaModel see others by more than an attention"):
        attachment.check_shared_prompts()


def test_attention_sinks_with_flash_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn = types.ModuleType("flash_attn")
    flash_attn.flash_attn_varlen_func = varlen_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    sizes = _SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.AutoModelForCausalLM.from_config(transformers.GptOssConfig(**sizes))
    attachment = attach_mind_loss(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"^shared_prompts: GptOssAttention has attention sinks, which flash_attentio"):
        attachment.read({}, shared_prompts(*questions()))


def test_an_attention_that_cannot_share_prompts_is_refused() -> None:
    attachment = attach_mind_loss(build("llama"))
    attachment.base.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="LlamaModel was loaded with attn_implementation='flex_attention', wanted eag"):
        attachment.read({}, shared_prompts(*questions()))


class ForeignAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    """Of a module without the function that is a model's eager attention."""


def test_an_eager_attention_that_is_not_found_is_refused() -> None:
    """By the check and by a step; afterwards the model reads as before."""
    model = build("llama")
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.__class__ = ForeignAttention
    attachment = attach_mind_loss(model)
    wanted, _ = objective(model, share=False)
    message = rf"^shared_prompts: the module of ForeignAttention, {__name__}, has no eager_attention_forward, wanted"
    with pytest.raises(ValueError, match=message):
        attachment.check_shared_prompts()
    with pytest.raises(ValueError, match=message):
        objective(model, share=True)
    assert objective(model, share=False)[0].loss.equal(wanted.loss)


@pytest.mark.parametrize("name", ["Phimoe", "Qwen2Moe"])
def test_a_window_that_only_the_mask_knows_is_refused(name: str) -> None:
    """One longer than what the check reads, too."""
    sizes = _SIZES | {"num_experts_per_tok": 1, "sliding_window": 4096}
    sizes |= {"num_local_experts": 2} if name == "Phimoe" else {"num_experts": 2, "moe_intermediate_size": 16}
    config = getattr(transformers, f"{name}Config")(**sizes, use_sliding_window=True)
    attachment = attach_mind_loss(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="Attention is not given the sliding window of 4096 tokens that its config na"):
        attachment.check_shared_prompts()
    config = getattr(transformers, f"{name}Config")(**sizes | {"sliding_window": None})
    attach_mind_loss(transformers.AutoModelForCausalLM.from_config(config)).check_shared_prompts()


class PlainDecoder(nn.Module):
    """No PreTrainedModel, so without a config."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, **inputs: Any) -> Any:
        return self.decoder(**inputs)


class NamedDecoder(transformers.LlamaModel):
    """Takes no arguments but those that it names."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
    ) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)


def test_a_decoder_that_is_a_plain_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    attachment = attach_mind_loss(model)
    wanted, _ = objective(model, share=False)
    attachment.detach()
    model.model = PlainDecoder(model.model)
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self.model)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: self.lm_head)
    attachment = attach_mind_loss(model)
    plain, _ = objective(model, share=False)
    torch.testing.assert_close(plain.loss, wanted.loss)
    with pytest.raises(ValueError, match="shared_prompts: tokens of PlainDecoder see others by more than an attention"):
        attachment.check_shared_prompts()
    attachment.detach()


def test_a_decoder_without_further_arguments_is_refused() -> None:
    model = build("llama")
    model.model.__class__ = NamedDecoder
    with pytest.raises(ValueError, match="NamedDecoder does not take the attention that its config names") as error:
        attach_mind_loss(model).check_shared_prompts()
    assert "\n" not in str(error.value)


def test_an_attention_of_its_own_is_refused() -> None:
    """Nemotron's layers choose theirs when they are made."""
    attachment = attach_mind_loss(transformers.NemotronForCausalLM(transformers.NemotronConfig(**_SIZES)))
    with pytest.raises(ValueError, match="NemotronModel does not take the attention that its config names") as error:
        attachment.check_shared_prompts()
    assert "\n" not in str(error.value)


def test_a_base_that_reads_another_thing_behind_its_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attachment = attach_mind_loss(build("llama"))
    attachment.check_shared_prompts()
    mask = attach.attention_mask
    blind = torch.tensor([1])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # else no mask is read on a CPU
    monkeypatch.setattr(attach, "attention_mask", lambda prompts: mask(prompts).index_fill(-1, blind, False))
    with pytest.raises(ValueError, match="shared_prompts: what LlamaModel makes of rationales behind one prompt diff"):
        attachment.check_shared_prompts()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes_the_check_in_16_bits(name: str) -> None:
    attachment = attach_mind_loss(build(name, torch.bfloat16))
    attachment.check_shared_prompts()
    assert not any(module.training for module in attachment.base.modules())


def test_shared_prompts_without_labels() -> None:
    model = build("llama")
    attach_mind_loss(model)
    asked, selected = questions()
    with pytest.raises(ValueError, match="shift_labels: given None with shared_prompts"):
        model(input_ids=torch.tensor([[3, 4]]), shared_prompts=shared_prompts(asked, selected))
