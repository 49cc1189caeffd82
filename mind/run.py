"""One run of `mind train`: read, measure, train, measure again, save, report.

What it leaves in output_dir:
    student/          the trained student (AutoModelForCausalLM.from_pretrained), its tokenizer, the teaching assistant
    metrics.json      the measurements before and after, every held-out answer, seconds of each phase
    log.jsonl         what each step logged, up to the last checkpoint while the run trains
    perspectives.png  score and loss of each perspective over training
    checkpoint-<n>/   to resume from
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mind.checkpoint import PARTIAL_PREFIX, publish
from mind.config import MindConfig
from mind.data import DataError, MindDataset, Record, check_answer, load_records, perspectives_of
from mind.encoder import RationaleEncoder
from mind.evaluation import measure_accuracy
from mind.generate.topk import TopKTeacher
from mind.problems import generate_records
from mind.prompting import token_that_differs
from mind.report import LOG_FILE, METRICS_FILE, PICTURE_FILE, draw, read_metrics, table, write_log, write_metrics
from mind.students import is_quantised, load_student
from mind.trainer import MindTrainer

if TYPE_CHECKING:
    from mind.cli import RunArguments

STUDENT_FOLDER = "student"


def distil(run: RunArguments, config: MindConfig) -> dict[str, Any]:
    """Runs everything and returns what metrics.json holds.

    Raises: ValueError or TypeError naming the file, field or argument that cannot be used; then nothing is written but
        what a killed run would also leave.
    """
    if run.load_in_4bit and not config.use_lora:
        raise ValueError("load_in_4bit: given True without use_lora, wanted both: weights of 4 bits do not learn")
    checkpoint = _open_output(config)
    clock = _Clock()
    with clock("data"):
        records, heldout = _read_data(run, config)
    with clock("student"):
        # Weights that are only read, in the dtype of the products; fp16 has too narrow a range for some models'.
        frozen = torch.bfloat16 if config.bf16 else torch.float32
        dtype, attention = frozen if config.use_lora else torch.float32, run.attn_implementation
        student, tokenizer = load_student(
            run.student, dtype=dtype, attn_implementation=attention, load_in_4bit=run.load_in_4bit
        )
        if is_quantised(student) and not getattr(student, "is_loaded_in_4bit", False):
            method = student.config.quantization_config.quant_method.value
            raise ValueError(
                f"student {run.student!r} is quantised by {method}, wanted bitsandbytes' 4 bits, or none: at its end "
                "the run merges the adapters"
            )
        teacher: PreTrainedModel | TopKTeacher | None = None
        if run.teacher is not None:
            teacher, own = load_student(run.teacher, dtype=frozen, attn_implementation=attention, role="teacher")
            difference = token_that_differs(tokenizer, own, "the student", "the teacher")
            if difference is not None:
                raise ValueError(f"teacher {run.teacher!r}: {difference}; wanted one with the student's tokenizer")
    perspectives = perspectives_of(records)
    measured = [record for record in heldout if record.rationales][: run.num_measured]
    measured_on = f"{len(measured)} held-out questions"
    if not measured:
        measured = records[: run.num_measured]
        measured_on = f"{len(measured)} training questions"
    progress = not config.disable_tqdm
    with clock("features"):
        encoder = RationaleEncoder(run.encoder, device=config.device) if config.uses_assistant else None

        def encode(some: Sequence[Record]) -> MindDataset:
            features = None if encoder is None else encoder.encode(some, perspectives, progress=progress)
            return MindDataset(
                some,
                tokenizer,
                features=features,
                perspectives=perspectives,
                prompt_format=config.prompt_format,
                max_length=config.max_length,
                progress=progress,
            )

        dataset, measured_dataset = encode(records), encode(measured)
        encoder = None  # and its memory on the device is the student's
    if run.teacher_topk is not None:
        teacher = TopKTeacher(run.teacher_topk, dataset.questions, perspectives, kl_temperature=config.kl_temperature)
    trainer = MindTrainer(student, config, dataset, processing_class=tokenizer, teacher=teacher)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress:
        trainer.add_callback(_ProgressBar())
    writes = trainer.is_world_process_zero()
    if writes:
        trainer.add_callback(_LogFile())

    def measure() -> dict[str, Any]:
        return _measure(trainer, tokenizer, heldout, measured_dataset, run.max_new_tokens, progress)

    metrics = None if checkpoint is None else _read_before(checkpoint, heldout, measured_on, run.max_new_tokens)
    if metrics is None:
        with clock("before"):
            before = measure()
        metrics = {
            "student": run.student,
            "method": config.method,
            "questions": len(records),
            "measured_on": measured_on,
            "max_new_tokens": run.max_new_tokens,
            "before": before,
        }
        if writes:
            write_metrics(config.output_dir, metrics)
    with clock("training"):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if writes and trainer.state.log_history:  # of a run that stops at an error it may tell why
                write_log(config.output_dir, trainer.state.log_history)
    with clock("after"):
        metrics["after"] = measure()
    with clock("saving"):
        _save_student(trainer)
        if writes:
            draw(config.output_dir, trainer.state.log_history, perspectives)
    metrics["seconds"] = clock.seconds
    if writes:
        write_metrics(config.output_dir, metrics)
        _print_report(config, metrics)
    return metrics


def _open_output(config: MindConfig) -> str | None:
    """The checkpoint to resume from, or None for a fresh run.

    Raises: ValueError when the folder is taken or there is nothing to resume from.
    """
    folder, resume = config.output_dir, config.resume_from_checkpoint
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"output_dir: {folder} is a file, wanted a new or empty folder")
    above = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(f"output_dir: {folder}: {above} is no folder that can be written to, wanted one")
    if resume is None or resume.lower() == "false":
        if config.should_save and os.path.isdir(folder) and os.listdir(folder):
            raise ValueError(
                f"output_dir: {folder} is not empty, wanted a new or empty folder, "
                "or --resume_from_checkpoint true to go on with the run in it"
            )
        return None
    if resume.lower() == "true":
        checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        if checkpoint is None:
            raise ValueError(f"resume_from_checkpoint: {folder} holds no whole checkpoint, wanted one")
        return checkpoint
    if not os.path.isdir(resume):
        raise ValueError(f"resume_from_checkpoint: {resume} is no folder, wanted a checkpoint or true")
    return os.path.abspath(resume)


def _read_data(run: RunArguments, config: MindConfig) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records); of the latter none when no accuracy is to be measured."""
    seed = config.seed if config.data_seed is None else config.data_seed
    if run.data is None:
        records = _generate(run.num_questions, run.max_difficulty, seed, "train")
    else:
        records = load_records(run.data)
    if run.heldout is not None:
        heldout = load_records(run.heldout, require_rationales=False)
    elif run.num_heldout == 0:
        heldout = []
    elif run.data is None:
        heldout = _generate(run.num_heldout, run.max_difficulty, seed, "heldout")
    else:
        if len(records) <= run.num_heldout:
            raise DataError(
                f"{run.data}: has {len(records)} questions, wanted more than num_heldout = {run.num_heldout} that are "
                "split off: lower it, or give --heldout"
            )
        chosen = set(random.Random(seed).sample(range(len(records)), run.num_heldout))
        heldout = [record for i, record in enumerate(records) if i in chosen]
        records = [record for i, record in enumerate(records) if i not in chosen]
        # A perspective that occurs in these questions alone is not one of the training's.
        trained = perspectives_of(records)
        heldout = [
            replace(record, rationales=tuple(item for item in record.rationales if item.perspective in trained))
            for record in heldout
        ]
    seen = {record.question: record.id for record in records}
    for record in heldout:
        check_answer(record, config.prompt_format)
        if record.question in seen:
            raise DataError(
                f"{run.heldout or run.data}: held-out question {record.id!r} is training question "
                f"{seen[record.question]!r}, wanted others"
            )
    return records, heldout


def _generate(count: int, max_difficulty: float, seed: int, split: str) -> list[Record]:
    """The first `count` generated questions that are not too difficult."""
    for factor in (1, 4, 16, 64):
        rows = generate_records(factor * count, seed=seed, split=split)
        rows = [row for row in rows if row["difficulty"] <= max_difficulty]
        if len(rows) >= count:
            return load_records(rows[:count])
    raise ValueError(
        f"max_difficulty: given {max_difficulty}, which fewer than 1 in 64 questions meet, wanted a larger one"
    )


def _measure(
    trainer: MindTrainer,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[Record],
    dataset: MindDataset,
    max_new_tokens: int,
    progress: bool,
) -> dict[str, Any]:
    """A measurement as mind.report describes it."""
    losses = trainer.measure_losses(dataset)  # (num_questions, K), NaN where there is no rationale
    scores = trainer.score(dataset).masked_fill(losses.isnan(), torch.nan) if trainer.calibrator else None
    measurement: dict[str, Any] = {
        "accuracy": None,
        "answers": None,
        "perspective_loss": _means(losses, dataset.perspectives),
        "perspective_score": None if scores is None else _means(scores, dataset.perspectives),
    }
    if heldout:
        with trainer.accelerator.autocast():  # in the precision that the student is trained in
            result = measure_accuracy(
                trainer.model,
                tokenizer,
                heldout,
                prompt_format=trainer.args.prompt_format,
                max_new_tokens=max_new_tokens,
                batch_size=trainer.args.per_device_eval_batch_size,
                progress=progress and trainer.is_world_process_zero(),
            )
        measurement["accuracy"] = result.accuracy
        measurement["answers"] = [
            {"id": record.id, "wanted": record.answer, "given": given, "correct": correct}
            for record, given, correct in zip(heldout, result.answers, result.correct, strict=True)
        ]
    return measurement


def _means(table: Tensor, perspectives: Sequence[str]) -> dict[str, float]:
    """Column means over what is not NaN; a perspective that occurs nowhere is left out."""
    means = zip(perspectives, table.nanmean(0).tolist(), strict=True)
    return {name: value for name, value in means if value == value}


def _read_before(
    checkpoint: str, heldout: Sequence[Record], measured_on: str, max_new_tokens: int
) -> dict[str, Any] | None:
    """The metrics of the run that wrote the checkpoint, as far as they go; None when it left none.

    Raises: ValueError when they are of other questions, or of answers of another length, than will be measured after.
    """
    folder = os.path.dirname(checkpoint)
    metrics = read_metrics(folder)
    if metrics is not None:
        path = os.path.join(folder, METRICS_FILE)
        given = [answer["id"] for answer in metrics["before"]["answers"] or []]
        if given != [record.id for record in heldout]:
            raise ValueError(
                f"{path}: tells the accuracy on {len(given)} other held-out questions, "
                f"wanted the {len(heldout)} of this run"
            )
        if metrics.get("measured_on") != measured_on:
            raise ValueError(
                f"{path}: tells the losses on {metrics.get('measured_on')}, wanted those of this run on {measured_on}"
            )
        longest = metrics.get("max_new_tokens", max_new_tokens)  # which early metrics lack
        if heldout and longest != max_new_tokens:
            raise ValueError(
                f"{path}: tells the accuracy with max_new_tokens = {longest}, wanted this run's {max_new_tokens}"
            )
    return metrics


def _save_student(trainer: MindTrainer) -> None:
    """<output_dir>/student, there whole or not at all; adapters are merged into it."""
    if trainer.args.use_lora and trainer.args.should_save:
        assert isinstance(trainer.model, PeftModel)
        trainer.model = _merged(trainer.model)
    partial = os.path.join(trainer.args.output_dir, PARTIAL_PREFIX + STUDENT_FOLDER)
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)  # of a run killed here
    trainer.save_model(os.path.join(partial, STUDENT_FOLDER))
    if trainer.args.should_save:
        publish(partial, trainer.args.output_dir, STUDENT_FOLDER)


def _merged(student: PeftModel) -> PreTrainedModel:
    """The student with its adapters within its weights, on the host.

    In fp32: of 16 bits, half a unit in the last place of a weight is more than most of what LoRA adds to it. Weights of
    4 bits are merged into as they were in training, not as they were before they were quantised.
    """
    if is_quantised(student.get_base_model()):
        adapters, settings = get_peft_model_state_dict(student), student.peft_config["default"]
        base = torch.nn.Module.to(student.unload(), "cpu").dequantize(torch.float32)
        vars(base).pop("_weight_conversions", None)  # of a student saved in 4 bits, which saving would undo
        student = get_peft_model(base, settings)
        set_peft_model_state_dict(student, adapters)
    return torch.nn.Module.to(student, "cpu", torch.float32).merge_and_unload()


def _print_report(config: MindConfig, metrics: dict[str, Any]) -> None:
    console, folder = Console(markup=False, emoji=False), Path(config.output_dir)  # names may hold brackets
    console.print(table(metrics))
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in metrics["seconds"].items())
    console.print(f"{sum(metrics['seconds'].values()):.0f} s: {phases}")
    for name, path in (
        ("student", folder / STUDENT_FOLDER),
        ("checkpoint", get_last_checkpoint(str(folder))),
        ("log", folder / LOG_FILE),
        ("metrics", folder / METRICS_FILE),
        ("picture", folder / PICTURE_FILE),
    ):
        if path is not None and os.path.exists(path):
            console.print(f"{name:<11}{path}", soft_wrap=True, highlight=False)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 1)


class _LogFile(TrainerCallback):
    """Writes log.jsonl with each checkpoint, for those who look at a run that still trains or was killed."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_log(args.output_dir, state.log_history)


class _ProgressBar(TrainerCallback):
    """One bar over the optimiser steps; what they log goes into log.jsonl, not onto the screen."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "cross_entropy" in logs:
            self.bar.set_postfix(
                loss=f"{logs['loss']:.3f}",
                selected=f"{logs['selected_rationales']:.1f}",
                tokens_per_s=f"{logs['supervised_tokens_per_second']:.0f}",
                refresh=False,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
