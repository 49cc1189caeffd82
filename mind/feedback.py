"""What each micro-batch of a training run reports, and the means that are logged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mind.assistant import calibration_loss, rank_correlation
from mind.collator import QuestionBatch
from mind.config import MindConfig
from mind_kernels import PrunedChunk
from mind_kernels.chunking import to_device


@dataclass(frozen=True)
class Feedback:
    """What one micro-batch reports, kept until the end of its optimiser step."""

    batch: QuestionBatch
    scores: Tensor | None  # (B, K), None without a teaching assistant
    weights: Tensor  # (B, K), α
    losses: Tensor  # (B, K) fp32 nats per token, on the student's device; read only where measured
    measured: Tensor  # (B, K) bool
    parts: Tensor  # (3,) cross-entropy, consistency, KL: shares of the optimiser step's, on the student's device
    pruned: Sequence[PrunedChunk] = ()  # with gradient_tolerance: what became of each chunk of logits

    def losses_or_nan(self) -> Tensor:
        """(B, K) losses, NaN for a rationale that was not measured; on the student's device."""
        unmeasured = to_device(self.batch.mask & ~self.measured, self.losses.device)
        return self.losses.masked_fill(unmeasured, torch.nan)


def summarise(
    feedback: Sequence[Feedback], config: MindConfig, perspectives: Sequence[str], *, steps: float
) -> dict[str, Tensor]:
    """What is logged, each as (sum, what the sum is divided by), so that steps and ranks can be added up. In nats.

    cross_entropy, consistency, kl: the loss's parts before their weights, per optimiser step (`consistency` is the
        symmetric KL in mcc_kd, and not measured where its weight is 0; `kl` only with a teacher)
    selected_rationales: |I| per question. weight_entropy: of α, per question
    supervised_tokens_per_second: the divisor is 0 here, the caller adds the seconds
    with gradient_tolerance, per row of logits with a gradient: kept_share of the vocabulary in the backward products,
        certificate (the dropped part of the logit gradient's norm), dense_share (rows in chunks that stayed dense)
    perspective_selected/<name>: the share of its rationales that were selected
    perspective_loss/<name>: the student's mean token cross-entropy, over the rationales that were measured
    and with a teaching assistant:
    perspective_score/<name>; and over the questions all of whose rationales were measured: meta_loss: L_meta;
        rank_correlation: of score and loss, −1 when perfectly calibrated

    steps: the optimiser steps that `feedback` spans.

    Returns (2,) fp64 on the host for each name. Waits for the student's device.
    """
    mask = torch.cat([item.batch.mask for item in feedback])
    weights = torch.cat([item.weights for item in feedback])
    measured = torch.cat([item.measured for item in feedback])
    losses = torch.cat([item.losses for item in feedback]).cpu()
    cross_entropy, consistency, kl = torch.stack([item.parts for item in feedback]).sum(0).tolist()
    tokens = sum(item.batch.target_tokens(item.weights > 0) for item in feedback)
    # Each part is already divided by the questions of its step.
    totals = {"cross_entropy": (cross_entropy, steps)}
    if config.method == "mcc_kd" or config.fused_consistency_weight > 0:
        totals["consistency"] = (consistency, steps)
    if config.kl_weight > 0:
        totals["kl"] = (kl, steps)
    totals["selected_rationales"] = ((weights > 0).sum().item(), len(weights))
    totals["weight_entropy"] = (torch.special.entr(weights).sum().item(), len(weights))
    totals["supervised_tokens_per_second"] = (tokens, 0)
    chunks = [chunk for item in feedback for chunk in item.pruned]
    if chunks:
        rows = torch.tensor([chunk.rows for chunk in chunks], dtype=torch.float64)
        kept_share, certificate = torch.stack([chunk.shares for chunk in chunks]).cpu().unbind(-1)
        num_rows = rows.sum().item()
        totals["kept_share"] = (rows.dot(kept_share).item(), num_rows)
        totals["certificate"] = (rows.dot(certificate).item(), num_rows)
        totals["dense_share"] = (rows[kept_share == 1].sum().item(), num_rows)
    for k, name in enumerate(perspectives):
        totals[f"perspective_selected/{name}"] = ((weights[:, k] > 0).sum().item(), mask[:, k].sum().item())
        totals[f"perspective_loss/{name}"] = (losses[measured[:, k], k].sum().item(), measured[:, k].sum().item())
    if config.uses_assistant:
        scores = torch.cat([item.scores for item in feedback if item.scores is not None])
        for k, name in enumerate(perspectives):
            totals[f"perspective_score/{name}"] = (scores[mask[:, k], k].sum().item(), mask[:, k].sum().item())
        known = (measured == mask).all(-1)
        scores, losses, mask = scores[known], losses[known], mask[known]
        meta_loss = calibration_loss(scores, losses, mask, tau=config.tau, direction=config.calibration_direction)
        totals["meta_loss"] = (meta_loss.item() * len(scores) if len(scores) else 0.0, len(scores))
        correlation = rank_correlation(scores, losses, mask)
        totals["rank_correlation"] = (correlation.nansum().item(), (~correlation.isnan()).sum().item())
    return {name: torch.tensor(pair, dtype=torch.float64) for name, pair in totals.items()}


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory this process has held: on the GPU, or resident in RAM. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
