"""What lies between the products of a chunk, in PyTorch on any device: logits in, losses out, gradients over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mind_kernels.chunking import BLOCK_ELEMENTS, Chunk, to_device
from mind_kernels.divergences import pairwise_jsd_and_gradient
from mind_kernels.plan import Plan, RowLosses, SweepOptions, Terms
from mind_kernels.reduction import statistics_dtype
from mind_kernels.teacher_rows import TeacherRows, apply_head_


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
) -> _BlockLosses:
    apply_head_(z, options.logit_scale, options.logit_softcap)
    softcap_slope = None
    if need_gradient and options.logit_softcap is not None:
        softcap_slope = 1 - (z / options.logit_softcap).square_()  # d/du c·tanh(u/c) = 1 − tanh²

    kl = jsd = gradient_other = None
    if teacher_rows is not None and terms.kl is not None:
        kl, gradient_other = teacher_rows.divergence(z, start, start + len(z), need_gradient)
        if gradient_other is not None:
            gradient_other.mul_(terms.kl.unsqueeze(-1))
    if pair_weights is not None:
        jsd, gradient_pairs = pairwise_jsd_and_gradient(torch.log_softmax(z, -1), pair_weights, need_gradient)
        if gradient_pairs is not None:
            gradient_other = gradient_pairs if gradient_other is None else gradient_other.add_(gradient_pairs)

    cross_entropy = None
    if options.cross_entropy_weight != 0:
        cross_entropy = _cross_entropy_(z, terms, need_gradient)
        if need_gradient and gradient_other is not None:
            z.add_(gradient_other)
    elif need_gradient:
        z.zero_() if gradient_other is None else z.copy_(gradient_other)
    if need_gradient:
        if softcap_slope is not None:
            z.mul_(softcap_slope)
        if options.logit_scale != 1.0:
            z.mul_(options.logit_scale)
    return _BlockLosses(cross_entropy, kl, jsd)


def _cross_entropy_(z: Tensor, terms: Terms, need_gradient: bool) -> Tensor:  # (m, V) -> (m,)
    """CE = lse(z) − z_y per row; z ← coefficient·(softmax(z) − onehot(y)) when need_gradient."""
    labels, invalid = terms.labels.unsqueeze(-1), None
    if z.device.type != "cpu":
        invalid = (terms.labels < 0) | (terms.labels >= z.shape[-1])
        labels = labels.masked_fill(invalid.unsqueeze(-1), 0)
    z_label = z.gather(-1, labels)
    row_max = z.amax(-1, keepdim=True)
    z.sub_(row_max).exp_()
    total = z.sum(-1, keepdim=True)
    label_log_prob = z_label.sub_(row_max).sub_(total.log())
    if need_gradient:
        coefficient = terms.cross_entropy.unsqueeze(-1)
        z.mul_(coefficient / total)
        # expm1 keeps the digits of p_y − 1 for a confident student.
        z.scatter_(-1, labels, coefficient * torch.expm1(label_log_prob))
    cross_entropy = label_log_prob.squeeze(-1).neg()
    if invalid is not None:
        cross_entropy.masked_fill_(invalid, math.nan)
    return cross_entropy


def _blocks(chunk: Chunk, group_offsets: list[int], block_rows: int) -> Iterator[tuple[int, int, int | None]]:
    """(start, stop, group) in processing order: each answer group by itself, then block_rows at a time."""
    start = chunk.start
    while start < chunk.stop:
        if start < group_offsets[-1]:
            group = group_offsets.index(start)
            stop = group_offsets[group + 1]
            yield start, stop, group
        else:
            stop = min(start + block_rows, chunk.stop)
            yield start, stop, None
        start = stop


class TorchRows:
    """Blocks of rows, each through all elementwise passes in fp32 while it is in a core's cache."""

    def __init__(self, plan: Plan, options: SweepOptions, V: int, logits_dtype: torch.dtype, losses: RowLosses):
        self.plan, self.options, self.losses = plan, options, losses
        self.block_rows = max(1, BLOCK_ELEMENTS // V)
        # 16-bit logits are taken to fp32 block by block; fp32 and fp64 ones are worked on where they are.
        stats = statistics_dtype(logits_dtype)
        scratch_rows = max([self.block_rows, *(len(group) for group in plan.groups.rows)])
        device = plan.terms.labels.device
        self.scratch = None if logits_dtype == stats else torch.empty(scratch_rows, V, dtype=stats, device=device)
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
            z = stored if self.scratch is None else self.scratch[: stop - start].copy_(stored)
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
                if self.scratch is not None or G_chunk is not z_chunk:
                    G_chunk[within] = z
