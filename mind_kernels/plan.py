"""What a sweep is to do before any product is made: which rows, in which order, with which coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mind_kernels.chunking import Rows, order_rows, to_device
from mind_kernels.pruning import GradientPruning
from mind_kernels.reduction import RationaleReduction, fp16_scale
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.teachers import Teacher


@dataclass(frozen=True)
class SweepOptions:
    """What the sweep computes, without the tensors that have gradients.

    loss = (cross_entropy_weight·Σ_r w_r·CE_r + kl_weight·Σ_r w_r·KL_r
            + consistency_weight·Σ_b Σ_{i<j} w_bi w_bj·JSD_bij) / num_questions
    """

    kl: KLOptions  # read with a teacher; no default, whose construction torch.compile could not trace
    compute_dtype: torch.dtype  # of the products
    cross_entropy_weight: float = 0.0
    kl_weight: float = 0.0
    consistency_weight: float = 0.0
    num_questions: float | Tensor = 1.0  # a 0-d tensor on a device is never looked at
    labels: Tensor | None = None  # (N,); None: no supervised row
    ignore_index: int = -100
    rationale_id: Tensor | None = None  # (N,) int64, with labels
    supervised_index: Tensor | None = None  # (n,) int64 on the host: which labels are not ignore_index
    reduction: str = "mean"  # within a rationale
    answer_index: Tensor | None = None  # (B, K, A)
    teacher: Teacher | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    logits_dtype: torch.dtype | None = None  # of the products' stored results; None: of the products
    pruning: GradientPruning | None = None  # of the backward products
    max_logits_bytes: int | None = None
    backend: str = "torch"  # "torch" | "triton": what is done between the products


class AnswerGroups(NamedTuple):
    rows: list[Tensor]  # rows of each answer position, on the host as the other three
    members: list[Tensor]  # the perspectives they belong to
    question: list[int]
    num_positions: list[int]  # A of each question: positions at which any rationale is present


def _answer_groups(answer_index: Tensor, weights: Tensor, all_pairs: bool) -> AnswerGroups:
    """Answer positions with at least two rationales to compare.

    A rationale of weight 0 enters no pair, with two exceptions: all_pairs, since the gradient of rationale_weights
    needs its JSD; and weights on a device beside an answer_index on the host, since to read them would wait. Its pairs
    are then made with weight 0.
    """
    all_pairs = all_pairs or answer_index.device != weights.device
    answer_index = answer_index.cpu()
    present = answer_index >= 0
    num_positions = present.any(1).sum(-1).tolist()
    included = present if all_pairs else present & (weights.cpu() != 0).unsqueeze(-1)
    groups = AnswerGroups([], [], [], num_positions)
    for b, a in (included.sum(1) >= 2).nonzero().tolist():
        members = included[b, :, a].nonzero().squeeze(1)
        groups.rows.append(answer_index[b, members, a].long())
        groups.members.append(members)
        groups.question.append(b)
    return groups


class Terms(NamedTuple):
    """Per row, in processing order: the label and the derivative of the loss by this row's CE and KL."""

    labels: Tensor  # (n,) int64, 0 where not supervised; outside [0, V) only on devices where that is not an error
    cross_entropy: Tensor  # (n,)
    kl: Tensor | None  # (n,)

    def rows(self, start: int, stop: int) -> Terms:
        block = slice(start, stop)
        kl = None if self.kl is None else self.kl[block]
        return Terms(self.labels[block], self.cross_entropy[block], kl)


class RowLosses(NamedTuple):
    """What the chunks fill in, in processing order."""

    cross_entropy: Tensor  # (n,)
    kl: Tensor  # (n,) τ^p included
    jsd: Tensor | None  # (B, K, K) mean over the answer positions
    grad_bias: Tensor | None  # (V,)


@dataclass(frozen=True)
class Plan:
    """Which rows, in which order, with which coefficients."""

    rows: Rows
    terms: Terms
    groups: AnswerGroups
    pair_weights: Tensor | None  # (B, K, K): ∂loss/∂(Σ over the question's positions of JSD_ij)
    reduce: RationaleReduction | None
    gradient_scale: float | Tensor  # coefficients and gradients are of loss / gradient_scale


def make_plan(
    N: int,
    weights: Tensor,  # (R,) statistics dtype
    options: SweepOptions,
    need_gradient: bool,
    need_grad_rationale_weights: bool,
) -> Plan:
    device = weights.device
    by_index = options.supervised_index is not None and device.type != "cpu"
    supervised = torch.zeros(N, dtype=torch.bool, device="cpu" if by_index else device)
    has_gradient = supervised
    reduce = None
    if options.labels is not None:
        assert options.rationale_id is not None
        is_label = options.labels != options.ignore_index
        per_question = weights / options.num_questions
        reduce = RationaleReduction(per_question, options.rationale_id, is_label, options.reduction)
        if by_index:  # the weights are not looked at
            supervised[options.supervised_index] = True
            has_gradient = supervised if need_gradient else torch.zeros_like(supervised)
        else:
            supervised = is_label
            has_gradient = reduce.weight != 0 if need_gradient else has_gradient

    groups = AnswerGroups([], [], [], [])
    pair_weights = None
    if options.answer_index is not None:
        alpha = weights.view(options.answer_index.shape[:2])
        groups = _answer_groups(options.answer_index, alpha, need_grad_rationale_weights)
        # ∂loss/∂JSD_ij at one position: consistency_weight·α_i α_j / (A·num_questions)
        num_positions = torch.tensor(groups.num_positions, dtype=alpha.dtype, device="cpu").clamp_(min=1)
        positions = to_device(num_positions, device).view(-1, 1, 1)
        scale = options.consistency_weight / options.num_questions
        pair_weights = scale * alpha.unsqueeze(2) * alpha.unsqueeze(1) / positions
    rows = order_rows(supervised, has_gradient, groups.rows, need_gradient, device)
    cross_entropy = torch.zeros(len(rows.order), dtype=weights.dtype, device=device)
    labels = torch.zeros(len(rows.order), dtype=torch.int64, device=device)
    kl = None
    if options.labels is not None and reduce is not None:
        labels = torch.where(rows.is_supervised, options.labels[rows.order], 0).long()
        row_weight = reduce.weight[rows.order]
        cross_entropy = options.cross_entropy_weight * row_weight
        kl = options.kl_weight * row_weight if options.teacher is not None else None

    gradient_scale = fp16_scale([c for c in (cross_entropy, kl, pair_weights) if c is not None], options.compute_dtype)
    if not isinstance(gradient_scale, float):
        cross_entropy = cross_entropy / gradient_scale
        kl = None if kl is None else kl / gradient_scale
        pair_weights = None if pair_weights is None else pair_weights / gradient_scale
    terms = Terms(labels, cross_entropy, kl)
    return Plan(rows, terms, groups, pair_weights, reduce, gradient_scale)
