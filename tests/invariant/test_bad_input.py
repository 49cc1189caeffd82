"""Bad input of `mind train`: one line that says what is wrong, status 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from mind.cli import main

from ..mind.tiny import raw_records, tiny_student, tiny_tokenizer
from .tiny_run import flags, make_inputs, run, write_jsonl

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIND_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line about the error."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line
    ]  # Hugging Face's bars
    assert len(lines) == 1 and lines[0].startswith("mind: error: "), lines
    return lines[0].removeprefix("mind: error: ")


def assert_nothing_written(folder: Path) -> None:
    assert not folder.exists() or os.listdir(folder) == []


# ---------------------------------------------------------------------------------------------------------------------
# Data


def change(**fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Changes the second record."""
    return lambda records: records[1].update(fields)


def change_rationale(**fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda records: records[1]["rationales"][1].update(fields)


@pytest.mark.parametrize(
    ("break_records", "message"),
    [
        (lambda records: records[1].pop("answer"), "data.jsonl:2: answer: the field is missing, wanted a string"),
        (change(question=7), "data.jsonl:2: question: wanted a string, got int"),
        (change(rationales=[]), "data.jsonl:2: rationales: question 'q1' has no rationale, wanted at least one"),
        (change(id="q0"), "data.jsonl:2: id: 'q0' is already used at "),
        (change_rationale(text=" "), "data.jsonl:2: rationales[1].text: is empty, wanted text"),
        (
            change_rationale(perspective="formal_symbolic"),
            "'formal_symbolic' occurs twice in question 'q1', wanted once",
        ),
        (change_rationale(answer="9"), "data.jsonl:2: rationales[1].answer: '9' is not the question's answer '2'"),
        (change_rationale(text="so " * 600), "question 'q1': perspective 'intuitive' takes "),
    ],
)
def test_records(
    break_records: Callable[[list[dict[str, Any]]], None],
    message: str,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = raw_records(13)
    break_records(records)
    write_jsonl(tmp_path / "data.jsonl", records)
    given = refused(flags(inputs, tmp_path / "out", data=tmp_path / "data.jsonl", num_heldout=0), capsys)
    assert message in given
    assert_nothing_written(tmp_path / "out")


def test_a_malformed_line(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(raw_records(1)[0]) + '\n{"id": "q1",\n')
    given = refused(flags(inputs, tmp_path / "out", data=tmp_path / "data.jsonl"), capsys)
    assert given.startswith(f"{tmp_path}/data.jsonl:2: malformed JSON at column ")
    assert_nothing_written(tmp_path / "out")


def test_heldout_questions(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = refused(flags(inputs, tmp_path / "out", heldout=inputs / "data.jsonl"), capsys)
    assert given == f"{inputs}/data.jsonl: held-out question 'q0' is training question 'q0', wanted others"
    given = refused(flags(inputs, tmp_path / "out", num_heldout=13), capsys)
    assert given.startswith(f"{inputs}/data.jsonl: has 13 questions, wanted more than num_heldout = 13")
    foreign = raw_records(1, ("poetry",))[0] | {"question": "What?"}
    write_jsonl(tmp_path / "heldout.jsonl", [foreign])
    given = refused(flags(inputs, tmp_path / "out", heldout=tmp_path / "heldout.jsonl"), capsys)
    assert "perspective 'poetry' is not one of formal_symbolic, " in given
    write_jsonl(tmp_path / "heldout.jsonl", [{"id": "s", "question": "Where?", "answer": "St. Ives"}])
    given = refused(flags(inputs, tmp_path / "out", heldout=tmp_path / "heldout.jsonl", student="no/such"), capsys)
    assert given.startswith("question 's': answer 'St. Ives' is read back as 'St' from ")
    assert_nothing_written(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Settings and models


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.5}, "beta: given 1.5, wanted a number in [0, 1]"),
        ({"beta": math.nan}, "beta: given nan, wanted a number in [0, 1]"),
        ({"tau": 0}, "tau: given 0.0, wanted a positive number"),
        ({"tau_student": -1}, "tau_student: given -1.0, wanted a positive number"),
        ({"consistency_weight": -0.1}, "consistency_weight: given -0.1, wanted a number that is not negative"),
        ({"kl_weight": 0.5}, "teacher: given none with kl_weight = 0.5, wanted one exactly when it is above 0"),
        ({"golden_perspective": "poetry"}, "golden_perspective: given 'poetry', wanted one of formal_symbolic, "),
        ({"method": "magic"}, "argument --method: invalid choice: 'magic'"),
        ({"student": "no/such"}, "student 'no/such' cannot be loaded: "),
        ({"teacher": "no/such", "kl_weight": 0.5}, "teacher 'no/such' cannot be loaded: "),
        ({"encoder": "no/such"}, "encoder 'no/such' cannot be found: "),
        ({"data": "no.jsonl"}, "no.jsonl: no such file or folder"),
        ({"seed": -1}, "seed: given -1, wanted 0 to 4294967295"),
        ({"learning_rate": -1}, "learning_rate: given -1.0, wanted a number that is not negative"),
        ({"save_strategy": "best"}, "save_strategy: given 'best', wanted no, steps or epoch: "),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy: given 'group_by_length', wanted random",
        ),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
            "dataloader_drop_last: given 10 questions and batches of 64, which leaves no batch, wanted a smaller",
        ),
        (
            {"optim": "adamw_anyprecision"},
            "optim: given 'adamw_anyprecision' with optim_args None, which cannot be used: ValueError: Please install",
        ),
        (
            {"optim": "sgd", "optim_args": "momentum=x"},
            "optim: given 'sgd' with optim_args 'momentum=x', which cannot be used: ValueError: could not convert",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type: given 'cosine_with_min_lr' with lr_scheduler_kwargs None, which cannot be used: Value",
        ),
        ({"lr_scheduler_kwargs": '{"cycles": 1}'}, "lr_scheduler_type: given 'cosine' with lr_scheduler_kwargs {'cyc"),
        (
            {"lr_scheduler_kwargs": '{"num_cycles": "x"}'},
            "lr_scheduler_type: given 'cosine' with lr_scheduler_kwargs {'num_cycles': 'x'}, which cannot be used",
        ),
        (
            {"lr_scheduler_kwargs": '{"num_cycles": "x"}', "max_steps": -1, "warmup_steps": 40},
            "lr_scheduler_type: given 'cosine' with lr_scheduler_kwargs {'num_cycles': 'x'}, which cannot be used",
        ),
        ({"accelerator_config": '{"dispatch_batches": true}'}, "accelerator_config: given dispatch_batches = True, "),
        ({"accelerator_config": '{"even_batches": false}'}, "accelerator_config: given even_batches = False, wanted"),
        ({"accelerator_config": '{"split_batches": true}'}, "accelerator_config: given split_batches = True, wanted"),
        ({"accelerator_config": "no.json"}, "No such file or directory: 'no.json'"),
        (
            {"dataloader_num_workers": 2},
            "dataloader_num_workers: given 2, wanted 0: questions are tokenised and in memory",
        ),
        ({"push_to_hub": True}, "push_to_hub: given True, wanted False: what is uploaded is renamed meanwhile; upload"),
        ({"report_to": "wandx"}, "report_to: given 'wandx', wanted none, all or what is installed: "),
        ({"report_to": "neptune"}, "report_to: given 'neptune', wanted none, all or what is installed: "),
        (
            {"torch_compile_backend": "foo"},
            "torch_compile_backend: given 'foo', wanted one of aot_eager, ",
        ),
        ({"torch_compile_mode": "foo"}, "torch_compile_mode: given 'foo', wanted one of default, "),
        ({"resume_from_checkpoint": "true"}, "holds no whole checkpoint, wanted one"),
        (
            {"resume_from_checkpoint": "no/such"},
            "resume_from_checkpoint: no/such is no folder, wanted a checkpoint or true",
        ),
    ],
)
def test_settings(
    changes: dict[str, Any], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(flags(inputs, tmp_path / "out", **changes), capsys)
    assert_nothing_written(tmp_path / "out")


def test_the_output_folder_is_taken(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    given = refused(flags(inputs, tmp_path), capsys)
    assert given.startswith(
        f"output_dir: {tmp_path} is not empty, wanted a new or empty folder, or --resume_from_checkpo"
    )
    assert os.listdir(tmp_path) == ["notes.txt"]
    notes = tmp_path / "notes.txt"
    assert refused(flags(inputs, notes), capsys) == f"output_dir: {notes} is a file, wanted a new or empty folder"
    given = refused(flags(inputs, notes / "a" / "b"), capsys)
    assert given == f"output_dir: {notes}/a/b: {notes} is no folder that can be written to, wanted one"
    given = refused(flags(inputs, tmp_path / "notes.txt"), capsys)
    assert given == f"output_dir: {tmp_path}/notes.txt is a file, wanted a new or empty folder"


def save_student(folder: Path, **changes: Any) -> Path:
    tiny_student(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_teacher_with_another_tokenizer(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = save_student(tmp_path / "teacher")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = refused(flags(inputs, tmp_path / "out", teacher=teacher, kl_weight=1), capsys)
    assert given == (
        f"teacher '{teacher}': token {vocabulary['b']} of the student is 'a', which the teacher has as its token "
        f"{vocabulary['a']}; wanted one with the student's tokenizer"
    )
    assert_nothing_written(tmp_path / "out")


def test_a_teacher_with_too_few_tokens(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = save_student(tmp_path / "teacher", vocab_size=250, eos_token_id=None, pad_token_id=None)
    given = refused(flags(inputs, tmp_path / "out", teacher=teacher, kl_weight=1), capsys)
    assert given == ("teacher: has 250 tokens in its vocabulary, wanted at least the 258 of the student's tokenizer")
    assert_nothing_written(tmp_path / "out")


def test_a_tokenizer_of_another_student(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels that are not below V."""
    student = save_student(tmp_path / "student", vocab_size=200, eos_token_id=None, pad_token_id=None)
    given = refused(flags(inputs, tmp_path / "out", student=student), capsys)
    assert given.startswith("student ") or "wanted tokens below the student's vocabulary of 200" in given, given
    assert_nothing_written(tmp_path / "out")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError: unexpected '}'"),
        ("{{ raise_exception('no system turn') }}", "TemplateError: no system turn"),
        ("{{ messages[7].content }}", "UndefinedError: "),
        ("{{ 1 + messages[0].content }}", "TypeError: unsupported operand"),
    ],
)
def test_a_chat_template_that_is_broken(
    template: str, reason: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = save_student(tmp_path / "student")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(student)
    told = f"tokenizer '{student}': its chat template cannot be used: {reason}"
    assert told in refused(flags(inputs, tmp_path / "out", student=student), capsys)
    output = tmp_path / "out.jsonl"
    asked = ["--data", str(inputs / "data.jsonl"), "--output", str(output)]
    assert told in refused(["evaluate", "--student", str(student), *asked], capsys)
    assert told in refused(["generate", "--teacher", str(student), *asked, "--max_tokens", "8"], capsys)
    assert_nothing_written(tmp_path / "out")
    assert not output.exists()


@pytest.mark.parametrize(
    ("weight", "row", "message"),
    [
        ("lm_head.weight", 0, "model: LlamaForCausalLM's own logits hold NaN or Inf, wanted finite ones"),
        ("model.embed_tokens.weight", 18, "step 1: the student's loss is nan, wanted a finite number; questions 'q3'"),
    ],
)
def test_a_student_that_is_not_finite(
    weight: str, row: int, message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 18 is the token "3"."""
    student = AutoModelForCausalLM.from_pretrained(inputs / "student")
    student.get_parameter(weight).data[row, 0] = math.nan
    student.save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    settings = {"student": tmp_path / "student", "num_heldout": 0, "num_measured": 13}
    assert message in refused(flags(inputs, tmp_path / "out", **settings), capsys)
    assert_nothing_written(tmp_path / "out")


def test_a_loss_that_becomes_nan(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0, "save_strategy": "steps", "save_steps": 1}
    given = refused(flags(inputs, tmp_path, **settings), capsys)
    assert given.startswith("step 2: the ") and "wanted a finite number; questions 'q" in given
    # What came before the error is there and whole.
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "log.jsonl", "metrics.json"]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 1
    assert "after" not in json.loads((tmp_path / "metrics.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Resuming another run


@pytest.fixture(scope="module")
def checkpoint(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MIND_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        run(inputs, folder, max_steps=1, save_strategy="steps", save_steps=1)
    return folder / "checkpoint-1"


def rename(records: list[dict[str, Any]], old: str, new: str | None) -> list[dict[str, Any]]:
    """The records with another name for a perspective, or without it."""
    for record in records:
        for rationale in list(record["rationales"]):
            if rationale["perspective"] == old and new is None:
                record["rationales"].remove(rationale)
            elif rationale["perspective"] == old:
                rationale["perspective"] = new
    return records


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        (
            rename(raw_records(13), "planning", None),
            {},
            "has K = 4 perspectives (formal_symbolic, intuitive, ",
        ),
        (
            rename(raw_records(13), "planning", "socratic"),
            {},
            "perspective 'planning' is unknown, the data has ",
        ),
        (raw_records(13), {"method": "no_cons"}, "was trained with method 'mind', wanted 'no_cons'"),
        (
            raw_records(13),
            {"num_heldout": 4},
            "metrics.json: tells the accuracy on 3 other held-out questions, wanted the 4",
        ),
        (
            raw_records(13),
            {"num_measured": 1},
            "metrics.json: tells the losses on 2 held-out questions, wanted those of this run on 1 held-out questions",
        ),
        (
            raw_records(13),
            {"max_new_tokens": 9},
            "metrics.json: tells the accuracy with max_new_tokens = 8, wanted this run's 9",
        ),
        (
            raw_records(13),
            {"use_lora": True},
            "was trained with no LoRA, wanted LoRA of rank 16 as use_lora and lora_r say",
        ),
        (raw_records(13), {"assistant_hidden_size": 32}, "its teaching assistant has hidden_size = 16, wanted 32"),
    ],
)
def test_a_checkpoint_of_another_run(
    records: list[dict[str, Any]],
    changes: dict[str, Any],
    message: str,
    checkpoint: Path,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "data.jsonl", records)
    given = refused(
        flags(inputs, tmp_path / "out", data=tmp_path / "data.jsonl", resume_from_checkpoint=checkpoint, **changes),
        capsys,
    )
    assert message in given and str(checkpoint.parent) in given
    assert_nothing_written(tmp_path / "out")


def test_not_a_checkpoint(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    given = refused(flags(inputs, tmp_path / "out", resume_from_checkpoint=tmp_path / "empty"), capsys)
    wanted = "wanted a checkpoint written by MindTrainer without save_only_model"
    assert given == f"{tmp_path}/empty: holds no mind_state.pt, {wanted}"


# ---------------------------------------------------------------------------------------------------------------------
# The process


def test_the_console_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mind", "train", "--use_cpu", "--beta=2"],
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mind: error: beta: given 2.0, wanted a number in [0, 1]\n"


def test_a_bug_keeps_its_traceback(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that this project did not raise on purpose is not made to look like bad input."""
    monkeypatch.setattr("mind.run.perspectives_of", lambda records: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(flags(inputs, tmp_path))
