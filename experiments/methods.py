"""Every method of the configuration on one real student at equal budgets of trained tokens.

    python -m experiments.methods --folder DATA [--data svamp] [--seeds 0 1 2] [--methods mind no_fusion …]
    python -m experiments.methods --folder DATA --learning_rates 5e-5 1e-4 2e-4 --methods no_fusion --seeds 100

A trained token is one that is read in a forward pass with a gradient: rationale and answer of what was selected, and
the prompt once a question, as share_prompt reads it. Training stops with the first optimiser step that reaches the
budget. The schedule is constant after its warm-up, since how many steps a budget lasts depends on what is selected.
What a teaching assistant has the student read forward-only is counted beside. One file a run under results/methods/: a
sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from experiments.common import Splits, accuracy, add_data_arguments, fingerprint, load_splits, run_once
from mind.config import MindConfig
from mind.data import MindDataset, Record, perspectives_of
from mind.encoder import RationaleEncoder
from mind.students import load_student
from mind.trainer import MindTrainer

METHODS = ("mind", "no_fusion", "instant_loss", "instant_meta", "no_attention", "no_cons", "single_path", "mcc_kd")
UNTRAINED = "untrained"  # measured, with a budget of nothing
LOGGED = ("cross_entropy", "consistency", "selected_rationales", "weight_entropy", "meta_loss", "rank_correlation")


@dataclass(frozen=True)
class Settings:
    """Beside these, MindConfig's defaults."""

    student: str
    data: str
    method: str
    seed: int
    token_budget: int
    learning_rate: float
    questions_per_step: int
    beta: float
    tau_student: float
    questions: str  # fingerprint
    feedback_share: float = MindConfig.feedback_share
    perspectives: str = ""  # trained on, joined by "+"; "": all


def file_name(settings: Settings) -> str:
    """Without ".json": all of the settings but the questions, those after questions_per_step where not the default."""
    name = f"{Path(settings.student).name}-{settings.data}-{settings.token_budget}-{settings.method}-s{settings.seed}"
    name += f"-lr{settings.learning_rate:g}-q{settings.questions_per_step}"
    if (settings.beta, settings.tau_student) != (MindConfig.beta, MindConfig.tau_student):
        name += f"-beta{settings.beta:g}-tau{settings.tau_student:g}"
    if settings.feedback_share != MindConfig.feedback_share:
        name += f"-feedback{settings.feedback_share:g}"
    return f"{name}-{settings.perspectives}" if settings.perspectives else name


class _Budget(TrainerCallback):
    """Counts what the student reads, and stops training at the budget."""

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        self.trained = self.forward_only = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"].numel()  # of shared prompts, which have no padding
        if torch.is_grad_enabled():
            self.trained += tokens
        else:
            self.forward_only += tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.trained >= self.token_budget


def run(settings: Settings, splits: Splits, device: str) -> dict[str, Any]:
    """One student, trained and measured."""
    set_seed(settings.seed)
    student, tokenizer = load_student(settings.student)
    start = time.perf_counter()
    outcome: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        untrained = settings.method == UNTRAINED
        config = MindConfig(
            method="no_fusion" if untrained else settings.method,  # type: ignore[arg-type]
            seed=settings.seed,
            learning_rate=settings.learning_rate,
            beta=settings.beta,
            tau_student=settings.tau_student,
            feedback_share=settings.feedback_share,
            per_device_train_batch_size=settings.questions_per_step,
            gradient_accumulation_steps=1,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=4,
            num_train_epochs=1000,
            shared_head=splits.exchangeable,
            share_prompt=True,
            bf16=True,
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            output_dir=folder,
        )
        perspectives = perspectives_of((*splits.train, *splits.validation))
        encoder = RationaleEncoder() if config.uses_assistant else None

        def encode(records: list[Record]) -> MindDataset:
            features = None if encoder is None else encoder.encode(records, perspectives)
            return MindDataset(records, tokenizer, features=features, perspectives=perspectives)

        budget = _Budget(settings.token_budget)
        dataset = encode(splits.train)
        trainer = MindTrainer(student, config, dataset, processing_class=tokenizer, callbacks=[budget])
        trainer.remove_callback(PrinterCallback)
        if not untrained:
            trainer.train()
            history = [entry for entry in trainer.state.log_history if "cross_entropy" in entry]
            outcome |= {
                "steps": trainer.state.global_step,
                "trained_tokens": budget.trained,
                "forward_only_tokens": budget.forward_only,
                "training_seconds": round(time.perf_counter() - start),
                "log": {name: [round(e[name], 4) for e in history if name in e] for name in LOGGED},
            }
        validation = encode(splits.validation)
        losses = trainer.measure_losses(validation)  # (questions, K)
        outcome["validation_loss"] = losses.nanmean().item()
        outcome["validation_losses"] = dict(zip(perspectives, losses.nanmean(0).tolist(), strict=True))
        if trainer.calibrator is not None:
            outcome["scores"] = dict(zip(perspectives, trainer.score(validation).mean(0).tolist(), strict=True))
    student.to(torch.bfloat16)  # as it would be served, and a quarter less time than casting in every step
    if settings.seed < 100:  # others choose settings, and what chooses sees no test question
        outcome["test"] = accuracy(student, tokenizer, splits.test, 75, device)
        outcome["ood"] = accuracy(student, tokenizer, splits.ood, 50, device)
    else:
        outcome["validation"] = accuracy(student, tokenizer, splits.validation, 60, device)
    outcome["seconds"] = round(time.perf_counter() - start)
    return outcome


def with_perspectives(splits: Splits, names: Sequence[str]) -> Splits:
    """Training questions with the rationales of these alone; of all where none is named. Others are as they were.

    Raises: ValueError for a name that a training question lacks.
    """
    if not names:
        return splits
    train = []
    for record in splits.train:
        known = perspectives_of([record])
        if not set(names) <= set(known):
            raise ValueError(f"--perspectives: given {', '.join(names)}, wanted of {', '.join(known)}")
        train.append(replace(record, rationales=tuple(r for r in record.rationales if r.perspective in names)))
    return splits._replace(train=train)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*METHODS, UNTRAINED))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="from 100 on: measured on validation questions alone"
    )
    parser.add_argument("--token_budget", type=int, default=60_000)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--questions_per_step", type=int, default=4)
    parser.add_argument("--beta", type=float, default=MindConfig.beta)
    parser.add_argument("--tau_student", type=float, default=MindConfig.tau_student)
    parser.add_argument("--feedback_share", type=float, default=MindConfig.feedback_share)
    parser.add_argument(
        "--perspectives", nargs="+", default=[], metavar="NAME", help="of the rationales to train on; default: all"
    )
    options = parser.parse_args(arguments)
    device = options.device
    splits = with_perspectives(load_splits(options), options.perspectives)
    for seed, rate, method in itertools.product(options.seeds, options.learning_rates, options.methods):
        settings = Settings(
            options.student,
            options.data,
            method,
            seed,
            options.token_budget,
            rate,
            options.questions_per_step,
            options.beta,
            options.tau_student,
            fingerprint(splits),
            options.feedback_share,
            "+".join(options.perspectives),
        )
        file = options.results / "methods" / f"{file_name(settings)}.json"
        run_once(file, settings, lambda settings=settings: run(settings, splits, device), device)  # type: ignore[misc]


if __name__ == "__main__":
    main()
