"""Whole runs of `mind train` that must agree with each other. About half a minute on one core."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import mind.run
from mind.assistant import load_assistant
from mind.calibration import Calibrator
from mind.collator import QuestionBatch
from mind.data import EncodedQuestion
from mind.feedback import Feedback
from mind.report.files import read_runs
from mind.trainer import MindTrainer

from ..mind.tiny import PERSPECTIVES, raw_records
from .tiny_run import flags, make_inputs, run, write_jsonl

ROOT = str(Path(__file__).parents[2])
# A threshold that some rationales pass and others do not, so that selection is part of every trajectory.
SELECTIVE = {"beta": 0.9, "assistant_warmup_epochs": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIND_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def steps(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each optimiser step logged, but for what is measured by the clock or over the process."""
    measured = ("supervised_tokens_per_second", "peak_memory_bytes")
    return [
        {key: value for key, value in entry.items() if key not in measured} for entry in log if "cross_entropy" in entry
    ]


def assert_close(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    assert len(steps(one)) == len(steps(other)) == 20
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"epoch"}:  # Trainer rounds it up to whole accumulations
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["step"], key)


# ---------------------------------------------------------------------------------------------------------------------
# The fused loss against Hugging Face's own


class PlainTrainer(MindTrainer):
    """MindTrainer with the objective computed from Hugging Face's own loss and full logits, one rationale at a time."""

    def _plain(self, model: nn.Module, question: EncodedQuestion, k: int) -> tuple[Tensor, Tensor]:
        """(CE, log-probabilities (A, V) of what follows the rationale)."""
        ids = torch.tensor([question.prompt_ids + question.target_ids[k]])
        labels = ids.clone()
        labels[:, : len(question.prompt_ids)] = -100
        output = model(input_ids=ids, labels=labels)
        return output.loss, output.logits[0, -question.answer_length - 1 : -1].log_softmax(-1)

    @torch.no_grad()
    def _measure(self, questions: Any, wanted: Tensor) -> Tensor:
        losses = torch.zeros(wanted.shape)
        for b, k in wanted.nonzero().tolist():
            losses[b, k] = self._plain(self.model, questions[b], k)[0]
        return losses

    def compute_loss(
        self, model: Any, inputs: QuestionBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scores, weights, _ = self._weigh(inputs)
        losses = self._measure(inputs.questions, inputs.mask & (weights == 0))
        cross_entropy, consistency = torch.zeros(()), torch.zeros(())
        for b, question in enumerate(inputs.questions):
            answers = {}
            for k in (weights[b] > 0).nonzero().flatten().tolist():
                loss, answers[k] = self._plain(model, question, k)
                cross_entropy = cross_entropy + weights[b, k] * loss / num_items_in_batch
                losses[b, k] = loss.detach()
            for i, j in combinations(answers, 2):
                p, q = answers[i], answers[j]
                mixture = (0.5 * p.exp() + 0.5 * q.exp()).log()
                divergence = 0.5 * (p.exp() * (p - mixture) + q.exp() * (q - mixture)).sum(-1).mean()
                consistency = consistency + weights[b, i] * weights[b, j] * divergence / num_items_in_batch
        parts = torch.stack([cross_entropy, consistency, torch.zeros(())]).detach()
        self._since_step.append(Feedback(inputs, scores, weights, losses, inputs.mask, parts))
        return cross_entropy + self.args.consistency_weight * consistency


def test_twenty_steps_with_the_fused_loss_are_those_with_hugging_faces(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SELECTIVE | {"consistency_weight": 0.5}
    fused = run(inputs, tmp_path / "fused", **settings)
    monkeypatch.setattr(mind.run, "MindTrainer", PlainTrainer)
    plain = run(inputs, tmp_path / "plain", **settings)
    selected = {entry["selected_rationales"] for entry in steps(fused)}
    assert len(selected) > 1 and max(selected) < 4  # not simply all four
    assert all(entry["consistency"] > 0 for entry in steps(fused))
    assert steps(fused)[-1]["loss"] < 0.8 * steps(fused)[0]["loss"]  # it has moved
    assert_close(fused, plain, 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Equivalent settings


def test_four_at_once_are_one_at_a_time_accumulated(inputs: Path, tmp_path: Path) -> None:
    """Ten questions: every third step has only two."""
    at_once = run(inputs, tmp_path / "4x1", **SELECTIVE)
    accumulated = run(
        inputs, tmp_path / "1x4", per_device_train_batch_size=1, gradient_accumulation_steps=4, **SELECTIVE
    )
    assert_close(at_once, accumulated, 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming

# Another schedule would depend on max_steps.
RESUME = SELECTIVE | {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 5}


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MIND_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        run(inputs, folder, **RESUME)
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: student, teaching assistant, log and measurements."""
    for file in ("model.safetensors", "assistant.safetensors"):
        tensors, others = (load_file(folder / "student" / file) for folder in (one, other))
        assert tensors.keys() == others.keys()
        for name in tensors:
            assert torch.equal(tensors[name], others[name]), name
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    assert len(steps(logs[0])) == 20 and steps(logs[0]) == steps(logs[1])
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
    for part in metrics:
        del part["seconds"]
    assert metrics[0] == metrics[1]


def test_ten_steps_and_ten_more_are_twenty(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(inputs, tmp_path, **RESUME | {"max_steps": 10})
    calls = []
    warm_up, measure = Calibrator.warm_up, mind.run.measure_accuracy
    monkeypatch.setattr(Calibrator, "warm_up", lambda *args: calls.append("warm-up") or warm_up(*args))
    monkeypatch.setattr(
        mind.run, "measure_accuracy", lambda *args, **kwargs: calls.append("accuracy") or measure(*args, **kwargs)
    )
    run(inputs, tmp_path, **RESUME, resume_from_checkpoint="true")
    assert calls == ["accuracy"]  # after: neither the warm-up nor the measuring before is done again
    assert_same_run(whole, tmp_path)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads({threads})  # another number sums in another order
save = torch.save
def killed(content, path, *args, **kwargs):
    save(content, path, *args, **kwargs)
    if "checkpoint-10" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
from mind.cli import main
main(sys.argv[1:])
"""


def test_a_run_killed_while_saving_goes_on_from_the_last_whole_checkpoint(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(threads=torch.get_num_threads()), *flags(inputs, tmp_path, **RESUME)],
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-5", "log.jsonl", "metrics.json", "partial-checkpoint-10"]
    (left,) = read_runs([str(tmp_path)])  # mind report shows it up to the checkpoint
    assert left.history[-1]["step"] == 5 and "after" not in left.metrics
    run(inputs, tmp_path, **RESUME, resume_from_checkpoint="true")
    assert_same_run(whole, tmp_path)
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


# ---------------------------------------------------------------------------------------------------------------------
# What is left


@pytest.mark.parametrize("save_strategy", ["steps", "epoch"])
def test_a_finished_run_is_not_trained_any_further(save_strategy: str, inputs: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 2, "save_strategy": save_strategy, "save_steps": 2}  # of the 3 steps of an epoch
    run(inputs, tmp_path / "run", **changes)
    before = load_file(tmp_path / "run" / "student" / "model.safetensors")
    run(inputs, tmp_path / "run", **changes, resume_from_checkpoint=True)
    after = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in tmp_path.glob("run/checkpoint-*")] == ["checkpoint-2"]


def test_a_perspective_that_only_held_out_questions_have(inputs: Path, tmp_path: Path) -> None:
    """Whether a rare perspective is split off is chance, so it cannot be an error."""
    records = raw_records(13)
    records[4]["rationales"].append({"perspective": "rare", "text": "a rare way", "answer": "8"})
    write_jsonl(tmp_path / "data.jsonl", records)
    settings = {"data": tmp_path / "data.jsonl", "num_heldout": 12, "num_measured": 12, "max_steps": 1, "data_seed": 1}
    run(inputs, tmp_path / "run", **settings)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "q4" in [answer["id"] for answer in metrics["before"]["answers"]]
    assert list(metrics["before"]["perspective_loss"]) == list(PERSPECTIVES)


def test_names_that_hold_brackets(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table at the end shows them as they are, not as the terminal's markup."""
    names = ("[step 1]", "[/x]", ":rocket:")
    write_jsonl(tmp_path / "data.jsonl", raw_records(13, names))
    output = tmp_path / "[/v1] :rocket:"
    run(inputs, output, data=tmp_path / "data.jsonl", max_steps=1)
    shown = capsys.readouterr().out
    assert f"log        {output}/log.jsonl" in shown
    for name in names:
        assert f" {name} " in shown


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_saved_student_loads_and_generates(use_lora: bool, inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path, max_steps=2, use_lora=use_lora, num_heldout=0)
    folder = tmp_path / "student"
    student, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(inputs / "student").state_dict()
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    prompt = tokenizer("What is 2 and 2?", return_tensors="pt")
    generated = student.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1]
    assistant, perspectives = load_assistant(folder)
    assert len(perspectives) == assistant.num_perspectives == 4
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["before"]["accuracy"] is None and metrics["measured_on"] == "2 training questions"
    assert (tmp_path / "perspectives.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:bf16:UserWarning")  # a device without its instructions
def test_what_lora_adds_to_16_bits_is_saved_whole(inputs: Path, tmp_path: Path) -> None:
    """All of rank r; a sum rounded to bf16 is not."""
    run(inputs, tmp_path, max_steps=2, use_lora=True, lora_r=2, bf16=True, num_heldout=0)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    before = AutoModelForCausalLM.from_pretrained(inputs / "student").state_dict()
    for name, weight in before.items():
        assert after[name].dtype == torch.float32
        added = after[name] - weight.bfloat16().float()
        if name.endswith("_proj.weight"):
            singular_values = torch.linalg.svdvals(added)
            assert singular_values[1] > 0 and singular_values[2] < 1e-3 * singular_values[1], name
        else:
            assert not added.any(), name


@pytest.mark.parametrize("method", ["no_fusion", "instant_loss", "single_path", "mcc_kd"])
def test_a_method_without_a_teaching_assistant(method: str, inputs: Path, tmp_path: Path) -> None:
    log = run(inputs, tmp_path, method=method, max_steps=2)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["before"]["perspective_score"] is None and metrics["after"]["perspective_score"] is None
    assert metrics["after"]["perspective_loss"].keys() == metrics["before"]["perspective_loss"].keys()
    assert len(metrics["after"]["answers"]) == 3
    assert len([entry for entry in log if "cross_entropy" in entry]) == 2
    assert not (tmp_path / "student" / "assistant.safetensors").exists()
