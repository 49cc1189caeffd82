"""A teacher's rows against a student's logits: the divergence and its gradient, for each form a teacher comes in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mind_kernels.arguments import can_look
from mind_kernels.chunking import Scratch
from mind_kernels.divergences import (
    RowSoftmax,
    divergence_and_gradient,
    logits_divergence_and_gradient,
    row_softmax,
)
from mind_kernels.products import project
from mind_kernels.teachers import Teacher, TeacherHidden, TeacherLogits, TeacherTopK

NEG = -1.0e4  # stands for the log of 0 in padded top-k entries: exp(NEG) is exactly 0 and NEG − NEG is not NaN


@dataclass(frozen=True)
class KLOptions:
    divergence: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    temperature_power: int = 2

    @property
    def loss_scale(self) -> float:  # τ_kd^p
        return self.temperature**self.temperature_power

    @property
    def gradient_scale(self) -> float:  # from dD/d(z/τ_kd) to τ_kd^p·dD/dz
        return self.temperature ** (self.temperature_power - 1)


def apply_head_(z: Tensor, logit_scale: float, logit_softcap: float | None) -> None:
    """z ← softcap(logit_scale · z), softcap(z) = c·tanh(z/c)."""
    if logit_softcap is None:
        if logit_scale != 1.0:
            z.mul_(logit_scale)
    else:
        z.mul_(logit_scale / logit_softcap).tanh_().mul_(logit_softcap)


def padded_ids(token_ids: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:  # (m, k), (m, k) -> (m, k), (m, 1)
    """int64 ids that can be gathered and put back, and where each row's first real one stands.

    A padded id is the first real one's, which changes nothing; in a row of only padding it is 0, since to look up −1
    would end all work on a GPU. A token that stands twice in a row, which would count twice, is an error on the host.
    """
    if can_look(token_ids):
        sorted_ids = token_ids.masked_fill(padded, -1).sort(-1).values
        twice = (sorted_ids.diff(dim=-1) == 0) & (sorted_ids[:, 1:] >= 0)
        if bool(twice.any()):
            raise ValueError(
                f"teacher.token_ids: given {int(sorted_ids[:, 1:][twice][0])} twice in a row, "
                "wanted each token once (leave out the second one)"
            )
    first = (~padded).to(torch.int8).argmax(-1, keepdim=True)
    ids = torch.where(padded, token_ids.gather(-1, first), token_ids).long()
    return ids.masked_fill_(padded.all(-1, keepdim=True), 0), first


def topk_log_probs(
    teacher_log_probs: Tensor,  # (m, k) at temperature 1, −inf padded
    tail: str,
    temperature: float,
    V: int,
) -> Tensor:  # (m, k + 1) for a bucket, (m, k) renormalised
    """The teacher's distribution over its support (and the tail bucket, log(1 − Σp)); padding becomes NEG.

    A row of only padding, or one whose probabilities sum to more than 1, is an error on the host and NaN where looking
    would wait for the device.
    """
    on_host = can_look(teacher_log_probs)
    padded = torch.isneginf(teacher_log_probs)
    if on_host and bool(padded.all(-1).any()):
        raise ValueError(
            "teacher.logprobs: given a row of only -inf, wanted a token in each (or its label ignore_index)"
        )
    if tail == "renormalize":
        log_probs = torch.log_softmax(teacher_log_probs / temperature, -1)  # NaN in a row of only padding
        return log_probs.masked_fill_(padded & ~padded.all(-1, keepdim=True), NEG)
    total = torch.logsumexp(teacher_log_probs, -1, keepdim=True)
    if on_host and bool((total > 0.01).any()):
        raise ValueError(
            f"teacher.logprobs: given a row whose probabilities sum to {float(total.max().exp()):.4f}, wanted at most 1"
        )
    rest = torch.log(-torch.expm1(total.clamp(max=0.0))).clamp_(min=NEG)  # log(1 − Σp), NEG where nothing is left
    if teacher_log_probs.shape[-1] >= V:  # a row that lists every token has no tail, and its sum is 1 but for rounding
        is_whole = (~padded).sum(-1, keepdim=True) >= V
        teacher_log_probs = teacher_log_probs - total.where(is_whole, 0.0)
        rest.masked_fill_(is_whole, NEG)
    if not on_host:
        rest.masked_fill_((total > 0.01) | torch.isneginf(total), torch.nan)
    return torch.cat([teacher_log_probs.masked_fill(padded, NEG), rest], -1)


def topk_divergence(
    z: Tensor,  # (m, V) logits
    token_ids: Tensor,  # (m, k)
    teacher_log_probs: Tensor,  # (m, k) −inf padded
    tail: str,
    options: KLOptions,
    need_gradient: bool,
    scratch: Scratch,
) -> tuple[Tensor, Tensor | None]:  # (m,), (m, V)
    """D over the support plus tail bucket and dD/d(z/τ); the teacher's dense row is never built.

    The tail's gradient is spread by the student's own probabilities within it: du/dz_v = exp(z_v − u), with the
    bucket's logit u = log Σ_tail exp z. All from u: 1 − Σp loses the digits of a small tail, and p_tail may underflow.
    """
    padded = torch.isneginf(teacher_log_probs)
    ids, _ = padded_ids(token_ids, padded)
    log_teacher = topk_log_probs(teacher_log_probs, tail, options.temperature, z.shape[-1])
    z_support = z.gather(-1, ids)
    if tail == "renormalize":
        log_student = torch.log_softmax((z_support / options.temperature).masked_fill_(padded, NEG), -1)
        log_student.masked_fill_(padded, NEG)
        loss, grad_support = divergence_and_gradient(
            log_teacher, log_student, options.divergence, options.beta, need_gradient
        )
        if grad_support is None:
            return loss, None
        return loss, scratch("teacher", z.shape).zero_().scatter_add_(-1, ids, grad_support)

    z_tail = scratch("teacher", z.shape).copy_(z).scatter_(-1, ids, -math.inf)
    of_tail = row_softmax(z_tail, z_tail)
    z_support.masked_fill_(padded, -math.inf)
    row_max = torch.maximum(of_tail.row_max, z_support.amax(-1, keepdim=True))
    log_tail = of_tail.row_max - row_max + of_tail.log_total  # u − row_max
    if z.shape[-1] <= ids.shape[-1]:  # there may be no tail in a row
        is_whole = torch.isneginf(of_tail.row_max)
        of_tail.probs.masked_fill_(is_whole, 0.0)
        log_tail.masked_fill_(is_whole, -math.inf)
    log_student = torch.log_softmax(torch.cat([z_support - row_max, log_tail], -1), -1)
    log_student.masked_fill_(torch.isneginf(log_student), NEG)
    loss, grad_buckets = divergence_and_gradient(
        log_teacher, log_student, options.divergence, options.beta, need_gradient
    )
    if grad_buckets is None:
        return loss, None
    grad_support = grad_buckets[:, :-1].masked_fill(padded, 0.0)
    return loss, of_tail.probs.mul_(grad_buckets[:, -1:]).scatter_add_(-1, ids, grad_support)


def rows_of(tensor: Tensor, index: Tensor) -> Tensor:  # (..., n), (m,) -> (m, n)
    """Rows by their flat index. Flattened first, a tensor that is a slice of another would be copied whole."""
    places: list[Tensor] = []
    for size in reversed(tensor.shape[1:-1]):
        places.append(index % size)
        index = index // size
    return tensor[(index, *reversed(places))]


class TeacherRows:
    """The teacher's side of one chunk: projected at once for TeacherHidden, gathered block by block otherwise."""

    def __init__(self, teacher: Teacher, options: KLOptions, index: Tensor, buffer: Tensor | None):
        self.teacher, self.options, self.index = teacher, options, index
        if isinstance(teacher, TeacherHidden):
            assert buffer is not None
            rows = rows_of(teacher.hidden_states, index)
            self.logits = project(rows, teacher.lm_head_weight, teacher.lm_head_bias, buffer[: len(index)])

    def dense(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A teacher's logits before its scale and cap, and which of their rows stand for start to stop of the chunk."""
        if isinstance(self.teacher, TeacherHidden):
            return self.logits, torch.arange(start, stop, device=self.index.device)
        assert isinstance(self.teacher, TeacherLogits)
        logits, index = self.teacher.logits, self.index[start:stop]
        shape, stride = logits.shape, logits.stride()
        if stride[-1] == 1 and all(stride[i] == shape[i + 1] * stride[i + 1] for i in range(logits.ndim - 2)):
            return logits.view(-1, shape[-1]), index  # rows at equal distances
        return rows_of(logits, index).contiguous(), torch.arange(len(index), device=index.device)

    def divergence(
        self,
        z: Tensor,  # (m, V) final logits, statistics dtype; left as they are
        start: int,  # of these rows within the chunk
        stop: int,
        need_gradient: bool,
        scratch: Scratch,
        student: RowSoftmax | None = None,  # of z, where it is known; left as it is
    ) -> tuple[Tensor, Tensor | None]:  # τ^p·D (m,), dD/d(z/τ) (m, V) of the columns that the teacher has
        """The gradient lacks `gradient_scale`, which the caller's own factor takes in, and lies in scratch."""
        options, teacher, dtype = self.options, self.teacher, z.dtype
        if isinstance(teacher, TeacherTopK):
            rows = self.index[start:stop]
            ids, log_probs = rows_of(teacher.token_ids, rows), rows_of(teacher.logprobs, rows).to(dtype)
            loss, grad = topk_divergence(z, ids, log_probs, teacher.tail, options, need_gradient, scratch)
            return loss.mul_(options.loss_scale), grad

        V = teacher.vocab_size or z.shape[-1]
        is_part = z.shape[-1] != V
        z = z[:, :V]
        z_teacher = scratch("teacher logits", z.shape)
        if isinstance(teacher, TeacherLogits):
            z_teacher.copy_(rows_of(teacher.logits[..., :V], self.index[start:stop]))
        else:
            z_teacher.copy_(self.logits[start:stop, :V])
            apply_head_(z_teacher, teacher.logit_scale, teacher.logit_softcap)
        if options.temperature != 1.0:
            z = torch.div(z, options.temperature, out=scratch("student logits", z.shape))
            z_teacher.div_(options.temperature)
        if student is None or is_part or options.temperature != 1.0:
            student = row_softmax(z, scratch("student", z.shape))
        loss, grad = logits_divergence_and_gradient(
            z_teacher, z, student, options.divergence, options.beta, need_gradient, scratch
        )
        return loss.mul_(options.loss_scale), grad
