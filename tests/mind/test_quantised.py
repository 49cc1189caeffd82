"""Students of 4 bits under LoRA (QLoRA), with bitsandbytes' own products on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import mind.run
from mind.cli import main
from mind.students import load_student

from ..invariant.tiny_run import flags, make_inputs, run
from .test_trainer import make_trainer
from .tiny import tiny_student, tiny_tokenizer

LORA: dict[str, Any] = {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "max_steps": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student/ in fp32, four/ and eight/ in so many bits, and what a run reads beside it."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    tiny_student(hidden_size=64, intermediate_size=128).save_pretrained(folder / "student")
    load_student(folder / "student", load_in_4bit=True)[0].save_pretrained(folder / "four")
    eight = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(folder / "student", quantization_config=eight).save_pretrained(
        folder / "eight"
    )
    for name in ("four", "eight"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def dequantised(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Name -> the values of each weight that is stored in 4 bits."""
    student, _ = load_student(folder, dtype=dtype, load_in_4bit=True)
    return {
        f"{name}.weight": bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in student.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def test_the_linear_layers_but_the_head_take_half_a_byte(inputs: Path) -> None:
    student, _ = load_student(inputs / "student", dtype=torch.bfloat16, load_in_4bit=True)
    linear = {name: p for name, p in student.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
    assert len(linear) == 2 * 7 and not any(p.requires_grad for p in linear.values())
    values = dequantised(inputs / "student")
    assert sum(p.nbytes for p in linear.values()) * 2 == sum(value.numel() for value in values.values())
    head = student.get_output_embeddings().weight
    assert (head.dtype, head.shape) == (torch.bfloat16, (300, 64))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("source", ["student", "four"])
def test_adapters_are_merged_into_what_they_were_trained_beside(
    source: str, bf16: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W = dequantised + (alpha / r)·B·A, whatever order a forward pass has put the 4 bits into."""
    # What a student is quantised from is read in the dtype of the products.
    before, adapters = dequantised(inputs / source, torch.bfloat16 if bf16 else torch.float32), {}
    merged = mind.run._merged

    def remember(student: Any) -> PreTrainedModel:
        adapters.update({name: value.clone() for name, value in get_peft_model_state_dict(student).items()})
        return merged(student)

    monkeypatch.setattr(mind.run, "_merged", remember)
    changes = LORA | {"load_in_4bit": source == "student", "bf16": bf16, "gradient_checkpointing": bf16}
    run(inputs, tmp_path, student=inputs / source, **changes)
    after, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert (
        not report["missing_keys"] and not report["unexpected_keys"] and "quantization_config" not in vars(after.config)
    )
    weights = after.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    for name, value in before.items():
        a, b = (adapters[f"base_model.model.{name.replace('weight', f'lora_{which}.weight')}"] for which in "AB")
        learned = 8 / 4 * b @ a
        assert learned.abs().max() > 1e-3
        torch.testing.assert_close(weights[name], value.float() + learned, rtol=0, atol=1e-6)


def test_gradients_after_an_evaluation(inputs: Path, tmp_path: Path) -> None:
    """They are those of the same weights in full: an evaluation on a CPU must not leave what passes no gradient."""
    values = dequantised(inputs / "student")
    dense, _ = load_student(inputs / "student")
    dense.load_state_dict(values, strict=False)
    gradients = []
    for student in (load_student(inputs / "student", load_in_4bit=True)[0], dense):
        model = make_trainer(tmp_path, student, use_lora=True, lora_r=4, method="no_fusion").model
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        ids = torch.arange(40).view(2, 20)
        with torch.no_grad():
            model.eval()(ids)
        model.train()(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * 2 * 7
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_a_run_that_goes_on(inputs: Path, tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run(inputs, tmp_path, load_in_4bit=True, **LORA | steps)
    first = (tmp_path / "student" / "model.safetensors").read_bytes()
    log = run(inputs, tmp_path, load_in_4bit=True, resume_from_checkpoint=True, **LORA | steps | {"max_steps": 4})
    assert max(row["step"] for row in log) == 4
    assert (tmp_path / "student" / "model.safetensors").read_bytes() != first


def test_a_teacher_of_4_bits(inputs: Path, tmp_path: Path) -> None:
    """Of the same weights: the KL is 0, but for products that a CPU may make in bf16, until the student has learned."""
    log = run(
        inputs, tmp_path, load_in_4bit=True, teacher=inputs / "four", kl_weight=0.5, **LORA | {"method": "no_fusion"}
    )
    kl = [row["kl"] for row in log if "kl" in row]
    assert kl[0] < 2e-3 < kl[-1], kl


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit: given True without use_lora, wanted both"),
        ({"student": "four"}, "use_lora: given False for a quantised model, wanted True: its weights do not learn"),
        ({"student": "eight", "use_lora": True}, "is quantised by bitsandbytes, wanted bitsandbytes' 4 bits, or none"),
    ],
)
def test_bad_input(
    changes: dict[str, Any], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {name: inputs / value if name == "student" else value for name, value in changes.items()}
    assert main(flags(inputs, tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mind: error: ") and message in error
    assert not (tmp_path / "run").exists()
