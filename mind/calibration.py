"""Feedback-driven inertia calibration: how the teaching assistant learns from the student's losses.

The assistant is first warmed up alone on the frozen student's losses. Then it runs beside the student with a smaller
learning rate and a window of many questions between its steps, so the noise of a single batch is filtered.

Its weights do not change within a window, so the window's feedback is kept as it is (a row of losses a question) and
the gradient is taken when the window is full: the same gradient as accumulating it batch by batch, and nothing is read
back from the student's device before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mind.assistant import TeachingAssistant, calibration_loss, rank_correlation
from mind.collator import QuestionBatch, collate
from mind.config import MindConfig
from mind.data import MindDataset


class Calibrator:
    """The teaching assistant's optimiser, its window of feedback and what it last knew of the student.

    loss_table: (num_questions, K) fp32, the student's last known loss on each rationale of the dataset (its moving
        average when `loss_ema` > 0), NaN where none is known.
    average_gradients: called after each backward pass, before the step; averages the gradients of the ranks.
    """

    def __init__(
        self,
        assistant: TeachingAssistant,
        dataset: MindDataset,
        config: MindConfig,
        average_gradients: Callable[[TeachingAssistant], None] = lambda assistant: None,
    ) -> None:
        self.assistant, self.dataset, self.config = assistant, dataset, config
        self.average_gradients = average_gradients
        self.window = 1 if config.method == "instant_meta" else config.assistant_window  # 1: as often as the student
        self.optimizer = torch.optim.AdamW(assistant.parameters(), lr=config.assistant_learning_rate)
        self.loss_table = torch.full((len(dataset), len(dataset.perspectives)), torch.nan)
        self._indices: list[Tensor] = []  # of the questions in the window, (B,) each
        self._losses: list[Tensor] = []  # (B, K) each, on the student's device

    @torch.no_grad()
    def scores(self, batch: QuestionBatch) -> Tensor:
        """The assistant's scores (B, K), dropout off.

        Raises: ValueError when the questions have no features.
        """
        if batch.features is None:
            raise ValueError(f"question {batch.ids[0]!r} has no features, wanted RationaleEncoder's in its dataset")
        return self.assistant.eval()(batch.features, batch.mask)

    def warm_up(self, losses: Tensor) -> Iterator[dict[str, float]]:
        """Trains the assistant alone on the frozen student's losses (num_questions, K), NaN where there is none.

        A question whose losses are all NaN was not measured, and nothing is learned from it.

        Yields, after each epoch, the mean calibration loss (nats) and rank correlation of that epoch.
        """
        self.loss_table.copy_(losses)
        known = (~losses.isnan()).any(-1).nonzero().squeeze(-1)
        # Its own generator: every rank visits the questions in the same order.
        generator = torch.Generator().manual_seed(self.config.seed)
        for _ in range(self.config.assistant_warmup_epochs):
            totals = torch.zeros(3, dtype=torch.float64)
            for indices in known[torch.randperm(len(known), generator=generator)].split(self.config.assistant_window):
                loss, scores = self._step(indices, lr=self.config.assistant_warmup_lr)
                correlation = rank_correlation(scores, self.loss_table[indices], ~self.loss_table[indices].isnan())
                totals += torch.tensor([loss * len(indices), correlation.nansum(), (~correlation.isnan()).sum()])
            loss_sum, correlation_sum, correlation_count = totals.tolist()
            yield {
                "meta_loss": loss_sum / len(known),
                "rank_correlation": correlation_sum / correlation_count if correlation_count else float("nan"),
            }

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Adds the student's losses (B, K) on B questions (rows of the dataset) to the window.

        NaN: not measured. A question with such a rationale counts in the window, but nothing is learned from it.
        """
        self._indices.append(indices)
        self._losses.append(losses.detach())

    def step_if_due(self) -> None:
        """One step of the assistant when the window is full. Called once in each of the student's optimiser steps."""
        if sum(map(len, self._indices)) < self.window:
            return
        indices, losses = torch.cat(self._indices).cpu(), torch.cat(self._losses).cpu()
        self._indices, self._losses = [], []
        mask = torch.tensor([self.dataset[index].mask for index in indices.tolist()])
        is_measured = (~losses.isnan() | ~mask).all(-1)
        indices, losses, mask = indices[is_measured], losses[is_measured], mask[is_measured]
        if len(indices) == 0:
            return
        for index, row, exists in zip(indices.tolist(), losses, mask, strict=True):
            known = self.loss_table[index]
            average = self.config.loss_ema * known + (1 - self.config.loss_ema) * row
            average = torch.where(known.isnan(), row, average)
            self.loss_table[index] = torch.where(exists, average, torch.nan)
        self._step(indices, lr=self.config.assistant_learning_rate)

    def _step(self, indices: Tensor, lr: float) -> tuple[float, Tensor]:
        """(L_meta, scores) on these questions before the step."""
        batch = collate([self.dataset[i] for i in indices.tolist()])
        scores = self.assistant.train()(batch.features, batch.mask)
        loss = calibration_loss(
            scores,
            self.loss_table[indices],
            batch.mask,
            tau=self.config.tau,
            direction=self.config.calibration_direction,
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.average_gradients(self.assistant)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return loss.item(), scores.detach()

    def state_dict(self) -> dict[str, Any]:
        """All but the assistant's weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "loss_table": self.loss_table,
            "window_indices": [indices.cpu() for indices in self._indices],
            "window_losses": [losses.cpu() for losses in self._losses],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss_table.copy_(state["loss_table"])
        self._indices, self._losses = state["window_indices"], state["window_losses"]
