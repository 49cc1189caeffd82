"""The examples run, and their losses are what plain PyTorch makes of the models' logits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, TrainingArguments

from .mind.tiny import tiny_student, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_student(max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def log_probs(model: Any, inputs: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(**inputs).logits[:, :-1][rows], -1)


def test_white_box_distillation(teacher_folder: str, tmp_path: Path) -> None:
    module = example("white_box_distillation")
    before, after = module.main(
        ["--teacher", teacher_folder, "--layers", "1", "--steps", "3", "--learning_rate", "1e-2"]
    )
    assert after < before

    teacher, student = tiny_student(), tiny_student(seed=1)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(0, 256, (3, 9), generator=generator), "attention_mask": torch.ones(3, 9).long()}
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    labels[0, 7:] = -100
    rows = labels[:, 1:] != -100
    log_t, log_s = (log_probs(model, batch, rows) for model in (teacher, student))
    wanted = F.nll_loss(log_s, labels[:, 1:][rows]) + 0.3 * F.kl_div(
        log_s, log_t, log_target=True, reduction="batchmean"
    )
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = module.DistillationTrainer(student, arguments, teacher=teacher, kl_weight=0.3)
    given = trainer.compute_loss(student, batch | {"labels": labels})
    torch.testing.assert_close(given, wanted)
    # A micro-batch of a step of 40 tokens counts for its share of them.
    share = trainer.compute_loss(student, batch | {"labels": labels}, num_items_in_batch=40)
    torch.testing.assert_close(share, wanted * rows.sum() / 40)
    share.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", ["reverse", "forward", "jsd"])
def test_on_policy_distillation(teacher_folder: str, name: str) -> None:
    module = example("on_policy_distillation")
    flags = ["--layers", "1", "--steps", "2", "--samples", "2", "--new_tokens", "5", "--divergence", name]
    losses = module.main(["--teacher", teacher_folder, *flags])
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)

    teacher = tiny_student()
    student = AutoModelForCausalLM.from_pretrained(teacher_folder, num_hidden_layers=1)
    end = 256
    written = torch.tensor([[5, 6, end, 257, 257], [7, 8, 9, 10, 11]])  # the first ends early
    sequences = torch.cat([torch.tensor([[257, 1, 2], [1, 2, 3]]), written], dim=1)  # and is padded on its left
    mask = torch.ones_like(sequences)
    mask[0, 0] = 0
    inputs = {"input_ids": sequences, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    rows = torch.tensor([[False] * 2 + [True] * 3 + [False] * 2, [False] * 2 + [True] * 5])
    log_t, log_s = (log_probs(model, inputs, rows) for model in (teacher, student))

    def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    middle = torch.log((log_s.exp() + log_t.exp()) / 2)
    wanted = {
        "reverse": kl(log_s, log_t),
        "forward": kl(log_t, log_s),
        "jsd": (kl(log_t, middle) + kl(log_s, middle)) / 2,
    }[name]
    given = module.divergence(student, teacher, sequences, mask, 3, end, name)
    torch.testing.assert_close(given, wanted)
