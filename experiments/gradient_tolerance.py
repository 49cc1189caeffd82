"""Does training with a pruned backward pass give the same student? Losses, accuracy, drift of rare embeddings.

    python -m experiments.gradient_tolerance --folder DATA [--training full lora] [--seeds 0 1 2]

Each (training, seed) is trained with the exact gradient and then, on the same batches in the same order, with every
tolerance, with and without the rank-1 correction. A step reads some questions and of each the same number of its
rationales, drawn at random, with equal weights, so that nothing but the gradient differs. The control shows what any
other rounding does: the exact gradient in chunks of a few rows. Rare tokens are those that occur nowhere in the
training data, neither read nor written: their rows of the (tied) embedding move only by what the head's gradient says
of tokens that are never right. A sweep that was stopped goes on with what is missing, after training the exact student
of that seed again.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup, set_seed

from experiments.common import Splits, accuracy, add_data_arguments, fingerprint, load_splits, run_once
from mind.attach import attach_mind_loss
from mind.collator import student_inputs
from mind.data import EncodedQuestion, MindDataset
from mind.students import load_student
from mind.trainer import ON_DEVICE
from mind_kernels import GradientPruning, record_pruning

TOLERANCES = (2**-8, 2**-9, 2**-10)
CHUNKED_BYTES = 2 * 2**20  # of logits: some 20 rows of SmolLM2's vocabulary in bf16
LEARNING_RATES = {"full": 1e-4, "lora": 5e-4}


@dataclass(frozen=True)
class Settings:
    student: str
    data: str
    training: str  # "full" or "lora"
    seed: int
    tolerance: float
    correction: bool
    steps: int
    questions_per_step: int
    rationales_per_question: int
    learning_rate: float
    questions: str  # fingerprint
    max_logits_bytes: int | None = None

    @property
    def file(self) -> str:
        kind = "exact" if self.tolerance == 0 else f"{self.tolerance:.6f}" + ("" if self.correction else "-uncorrected")
        kind += "" if self.max_logits_bytes is None else "-chunked"
        return f"{Path(self.student).name}-{self.data}-{self.training}-s{self.seed}-{kind}.json"


class Trainee:
    """A student on its way through the settings' batches."""

    def __init__(self, settings: Settings, splits: Splits, device: str) -> None:
        set_seed(settings.seed)
        self.settings, self.device = settings, device
        student, self.tokenizer = load_student(settings.student)
        torch.nn.Module.to(student, device)
        self.dataset = MindDataset(splits.train, self.tokenizer)
        self.validation = MindDataset(splits.validation, self.tokenizer, perspectives=self.dataset.perspectives)
        embedding: Tensor = student.get_output_embeddings().weight
        rare = torch.ones(len(embedding), dtype=torch.bool)
        for question in self.dataset.questions:
            for ids in (question.prompt_ids, *question.target_ids):
                rare[list(ids)] = False
        self.rare = rare.to(device)
        self.embedding, self.rare_before = embedding, embedding.detach()[self.rare].clone()
        self.model: Any = student
        if settings.training == "lora":
            self.model = get_peft_model(
                student, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            )
        self.pruning = GradientPruning(settings.tolerance, correction=settings.correction)

    def train(self) -> dict[str, Any]:
        settings, order = self.settings, random.Random(self.settings.seed)
        attachment = attach_mind_loss(
            self.model,
            consistency_weight=0.0,
            gradient_tolerance=self.pruning,
            max_logits_bytes=settings.max_logits_bytes,
        )
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * settings.steps), settings.steps)
        losses, shares, certificates = [], [], []
        waiting: list[EncodedQuestion] = []
        self.model.train()
        start = time.perf_counter()
        for _ in range(settings.steps):
            while len(waiting) < settings.questions_per_step:
                waiting += order.sample(self.dataset.questions, len(self.dataset))
            questions = [waiting.pop(0) for _ in range(settings.questions_per_step)]
            selected = torch.stack([self._draw(question, order) for question in questions])
            with record_pruning() as chunks:
                output = self._forward(questions, selected)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(output.loss.item())
            shares += [chunk.kept_share for chunk in chunks]
            certificates += [chunk.certificate for chunk in chunks]
        seconds = time.perf_counter() - start
        validation_loss = self._validation_loss()
        attachment.detach()
        return {
            "losses": [round(loss, 5) for loss in losses],
            "validation_loss": validation_loss,
            "kept_share": sum(shares) / len(shares) if shares else 1.0,
            "certificate": max(certificates, default=0.0),
            "dense_chunks": sum(share == 1 for share in shares) if shares else settings.steps,
            "training_seconds": round(seconds),
        }

    def _draw(self, question: EncodedQuestion, order: random.Random) -> Tensor:
        """(K,) bool, rationales_per_question of those that the question has."""
        known = [k for k, is_there in enumerate(question.mask) if is_there]
        drawn = order.sample(known, min(self.settings.rationales_per_question, len(known)))
        return torch.zeros(len(question.mask), dtype=torch.bool).index_fill_(0, torch.tensor(drawn), True)

    def _forward(self, questions: Sequence[EncodedQuestion], selected: Tensor) -> Any:
        """The loss of the selected (B, K) rationales, all of a question with the same weight."""
        batch = student_inputs(questions, selected, self.tokenizer.pad_token_id or 0)
        batch |= {name: batch[name].to(self.device) for name in ON_DEVICE}
        weights = (selected / selected.sum(-1, keepdim=True)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16):
            return self.model(**batch, rationale_weights=weights)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Nats per token, the mean over all rationales."""
        self.model.eval()
        total, count = 0.0, 0
        for start in range(0, len(self.validation), 4):
            questions = self.validation.questions[start : start + 4]
            mask = torch.tensor([question.mask for question in questions])
            losses = self._forward(questions, mask).rationale_losses  # 0 where there is no rationale
            total, count = total + losses.sum().item(), count + int(mask.sum())
        return total / count

    def rare_drift(self) -> Tensor:
        """(rare tokens, H) fp64: how far their embeddings have moved."""
        return self.embedding.detach()[self.rare].double() - self.rare_before


def run_group(group: Sequence[Settings], splits: Splits, folder: Path, device: str) -> None:
    """One (training, seed): the exact gradient first, then what is compared with it."""
    exact, *others = group
    drift: dict[str, Tensor] = {}

    def run(settings: Settings) -> dict[str, Any]:
        trainee = Trainee(settings, splits, device)
        outcome = trainee.train()
        outcome["test"] = accuracy(trainee.model, trainee.tokenizer, splits.test, 75, device)
        if settings.training == "full":
            moved = trainee.rare_drift()
            reference = drift.setdefault("exact", moved)
            outcome["rare_tokens"] = len(moved)
            outcome["rare_drift"] = (moved.norm() / trainee.rare_before.norm()).item()
            outcome["rare_drift_cosine"] = torch.cosine_similarity(moved.flatten(), reference.flatten(), 0).item()
        return outcome

    is_missing = any(not (folder / settings.file).exists() for settings in others)
    if is_missing and exact.training == "full" and (folder / exact.file).exists():
        trainee = Trainee(exact, splits, device)
        trainee.train()
        drift["exact"] = trainee.rare_drift()
    for settings in group:
        run_once(folder / settings.file, settings, lambda settings=settings: run(settings), device)  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--training", nargs="+", default=["full", "lora"], choices=("full", "lora"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--questions_per_step", type=int, default=1)
    parser.add_argument("--rationales_per_question", type=int, default=1)
    parser.add_argument(
        "--uncorrected", type=float, nargs="*", default=TOLERANCES, help="tolerances without correction"
    )
    options = parser.parse_args(arguments)
    splits = load_splits(options)
    kinds: list[tuple[float, bool, int | None]] = [(tolerance, True, None) for tolerance in (0.0, *TOLERANCES)]
    kinds += [(tolerance, False, None) for tolerance in options.uncorrected]
    kinds += [(0.0, True, CHUNKED_BYTES)]
    for seed in options.seeds:
        for training in options.training:
            group = [
                Settings(
                    options.student,
                    options.data,
                    training,
                    seed,
                    tolerance,
                    correction,
                    options.steps,
                    options.questions_per_step,
                    options.rationales_per_question,
                    LEARNING_RATES[training],
                    fingerprint(splits),
                    max_logits_bytes,
                )
                for tolerance, correction, max_logits_bytes in kinds
            ]
            run_group(group, splits, options.results / "gradient_tolerance", options.device)


if __name__ == "__main__":
    main()
