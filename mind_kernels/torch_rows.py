"""What lies between the products of a chunk, in PyTorch on any device: logits in, losses out, gradients over them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mind_kernels.chunking import Chunk, Scratch, block_rows, to_device
from mind_kernels.divergences import RowSoftmax, pairwise_jsd_and_gradient, row_softmax, softplus
from mind_kernels.plan import Plan, RowLosses, SweepOptions, Terms
from mind_kernels.reduction import statistics_dtype
from mind_kernels.teacher_rows import TeacherRows, apply_head_
from mind_kernels.teachers import TeacherTopK

# A label's logit where the softmax is of the other tokens: finite, so that it is 0 and not NaN if they are all −inf.
LOWEST = -1.0e30


class _BlockLosses(NamedTuple):
    cross_entropy: Tensor | None  # (m,)
    kl: Tensor | None  # (m,)
    jsd: Tensor | None  # (m, m)


def _block_losses(
    z: Tensor,  # (m, V) statistics dtype: the raw product; overwritten with ∂loss/∂product when need_gradient
    terms: Terms,  # of these rows
    options: SweepOptions,
    teacher_rows: TeacherRows | None,
    start: int,  # of these rows within the chunk
    pair_weights: Tensor | None,  # (m, m) when these rows are one answer position
    need_gradient: bool,
    scratch: Scratch,
) -> _BlockLosses:
    apply_head_(z, options.logit_scale, options.logit_softcap)
    softcap_slope = None
    if need_gradient and options.logit_softcap is not None:
        # d/du c·tanh(u/c) = 1 − tanh²
        softcap_slope = torch.div(z, options.logit_softcap, out=scratch("slope", z.shape)).square_().neg_().add_(1)

    student = probs = cross_entropy = None
    if options.cross_entropy_weight != 0:
        labels = _Labels(terms.labels, z)
        is_read_again = teacher_rows is not None or pair_weights is not None
        others = row_softmax(labels.put_(z, LOWEST), scratch("whole student", z.shape) if is_read_again else z)
        if is_read_again:
            labels.put_(z, labels.logits)
        log_odds = others.row_max - labels.logits + others.log_total  # log (1 − p_y)/p_y
        probs, rest = others.probs, torch.sigmoid(log_odds)  # 1 − p_y with all digits, and so is the loss
        row_loss = softplus(log_odds)
        cross_entropy = labels.nan_where_invalid(row_loss)
        if teacher_rows is not None and not isinstance(options.teacher, TeacherTopK):  # a dense one reads it whole
            row_max = torch.maximum(others.row_max, labels.logits)
            labels.put_(probs.mul_(rest), torch.sigmoid(-log_odds))
            student = RowSoftmax(probs, row_max, labels.logits - row_max + row_loss)
    kl = jsd = gradient_kl = gradient_pairs = None
    if teacher_rows is not None and terms.kl is not None:
        kl, gradient_kl = teacher_rows.divergence(z, start, start + len(z), need_gradient, scratch, student)
    if pair_weights is not None:
        jsd, gradient_pairs = pairwise_jsd_and_gradient(torch.log_softmax(z, -1), pair_weights, need_gradient)
    if not need_gradient:
        return _BlockLosses(cross_entropy, kl, jsd)

    if probs is None:
        z.zero_()
    else:  # coefficient·(softmax(z) − onehot(y))
        at_label = terms.cross_entropy.unsqueeze(-1) * rest
        torch.mul(probs, at_label if student is None else terms.cross_entropy.unsqueeze(-1), out=z)
        labels.put_(z, -at_label)
    if gradient_kl is not None and terms.kl is not None:
        coefficient = (terms.kl * options.kl.gradient_scale).unsqueeze(-1)
        if options.kl.divergence == "reverse":  # which may be infinite, and 0·inf would be NaN
            gradient_kl.masked_fill_(coefficient == 0, 0.0)
        z[:, : gradient_kl.shape[-1]].addcmul_(gradient_kl, coefficient)
    if gradient_pairs is not None:
        z.add_(gradient_pairs)
    if softcap_slope is not None:
        z.mul_(softcap_slope)
    if options.logit_scale != 1.0:
        z.mul_(options.logit_scale)
    return _BlockLosses(cross_entropy, kl, jsd)


class _Labels:
    """index (m, 1) and logits (m, 1). On a device, where looking would wait, an invalid label makes its loss NaN."""

    def __init__(self, labels: Tensor, z: Tensor):
        self.index, self.invalid = labels.unsqueeze(-1), None
        if z.device.type != "cpu":
            self.invalid = (self.index < 0) | (self.index >= z.shape[-1])
            self.index = self.index.masked_fill(self.invalid, 0)
        self.logits = z.gather(-1, self.index)

    def put_(self, rows: Tensor, value: Tensor | float) -> Tensor:  # (m, V), (m, 1)
        """Writes in each row the label's place; returns rows."""
        return rows.scatter_(-1, self.index, value)

    def nan_where_invalid(self, losses: Tensor) -> Tensor:  # (m, 1) -> (m,)
        return (losses if self.invalid is None else losses.masked_fill(self.invalid, math.nan)).squeeze(-1)


def _blocks(chunk: Chunk, group_offsets: list[int], block_rows: int) -> Iterator[tuple[int, int, int | None]]:
    """(start, stop, group) in processing order: each answer group by itself, then block_rows at a time."""
    for group in range(bisect_left(group_offsets, chunk.start), bisect_right(group_offsets, chunk.stop) - 1):
        yield group_offsets[group], group_offsets[group + 1], group
    for start in range(max(chunk.start, group_offsets[-1]), chunk.stop, block_rows):
        yield start, min(start + block_rows, chunk.stop), None


class TorchRows:
    """Blocks of rows, each through all elementwise passes in fp32 while it is in a core's cache."""

    def __init__(self, plan: Plan, options: SweepOptions, V: int, logits_dtype: torch.dtype, losses: RowLosses):
        self.plan, self.options, self.losses = plan, options, losses
        has_copies = options.teacher is not None or options.logit_softcap is not None
        self.block_rows = block_rows(V, plan.terms.labels.device, options.max_logits_bytes, has_copies)
        stats, device = statistics_dtype(logits_dtype), plan.terms.labels.device
        self.is_wide = logits_dtype == stats
        most_rows = max([self.block_rows, *(len(group) for group in plan.groups.rows)])
        self.scratch = Scratch(most_rows, V, stats, device)
        self.members: Sequence[Tensor] = ()  # of each answer position, on the device
        if plan.groups.members:
            sizes = [len(members) for members in plan.groups.members]
            self.members = to_device(torch.cat(plan.groups.members), device).split(sizes)

    def __call__(
        self,
        z_chunk: Tensor,  # (m, V) raw product; overwritten
        G_chunk: Tensor,  # (m, V) written with ∂loss/∂product when the chunk needs a gradient; may be z_chunk itself
        chunk: Chunk,
        teacher_rows: TeacherRows | None,
    ) -> None:
        plan, groups, losses = self.plan, self.plan.groups, self.losses
        for start, stop, group in _blocks(chunk, plan.rows.group_offsets, self.block_rows):
            within = slice(start - chunk.start, stop - chunk.start)
            stored = z_chunk[within]
            # 16-bit logits are taken to fp32 block by block; fp32 and fp64 ones are worked on where they are, if dense.
            in_place = self.is_wide and stored.is_contiguous()
            z = stored if in_place else self.scratch("logits", stored.shape).copy_(stored)
            pairs = None
            if group is not None and plan.pair_weights is not None:
                members, question = self.members[group], groups.question[group]
                pairs = plan.pair_weights[question][members][:, members]
            found = _block_losses(
                z,
                plan.terms.rows(start, stop),
                self.options,
                teacher_rows,
                start - chunk.start,
                pairs,
                chunk.needs_gradient,
                self.scratch,
            )
            if found.cross_entropy is not None:
                losses.cross_entropy[start:stop] = found.cross_entropy
            if found.kl is not None:
                losses.kl[start:stop] = found.kl
            if found.jsd is not None and losses.jsd is not None:
                losses.jsd[question, members.unsqueeze(1), members] += found.jsd / groups.num_positions[question]
            if chunk.needs_gradient:
                if losses.grad_bias is not None:
                    losses.grad_bias.add_(z.sum(0))
                if not in_place or G_chunk is not z_chunk:
                    G_chunk[within] = z
