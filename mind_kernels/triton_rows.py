"""What lies between the products of a chunk, in Triton: logits in, losses out, gradients over them."""

from __future__ import annotations

from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch import Tensor

from mind_kernels.chunking import Chunk, to_device
from mind_kernels.consistency.triton_path import pairwise_jsd
from mind_kernels.cross_entropy.triton_path import PairGradient, cross_entropy_
from mind_kernels.linear_kl.triton_path import dense_kl_, topk_kl_
from mind_kernels.plan import Plan, RowLosses, SweepOptions
from mind_kernels.teacher_rows import TeacherRows, rows_of
from mind_kernels.teachers import TeacherHidden, TeacherTopK

# fp32 sums of pairs held at a time: enough positions for a full GPU, small beside the logits.
PAIR_BYTES = 64 * 2**20


class TritonRows:
    """One launch for all rows of a chunk; its answer positions go first, a batch at a time, with their pairs."""

    def __init__(self, plan: Plan, options: SweepOptions, losses: RowLosses):
        self.plan, self.options, self.losses = plan, options, losses
        if plan.pair_weights is not None:
            self._make_tables(plan.pair_weights)

    def _make_tables(self, pair_weights: Tensor) -> None:
        """Which row stands where in the (positions, K) table of all answer positions; K filled up to a power of two."""
        groups, offsets, device = self.plan.groups, self.plan.rows.group_offsets, pair_weights.device
        K = pair_weights.shape[1]
        K_filled = max(2, 1 << (K - 1).bit_length())
        host = torch.device("cpu")  # where the groups are, whatever the default device
        table = torch.full((len(groups.rows), K_filled), -1, device=host)
        for g, members in enumerate(groups.members):
            table[g, members] = torch.arange(offsets[g], offsets[g + 1], device=host)
        entries = torch.cat([g * K_filled + members for g, members in enumerate(groups.members)] or [table.view(-1)])
        share = torch.tensor([1 / groups.num_positions[b] for b in groups.question], dtype=torch.float32, device=host)
        self.table, self.entries = to_device(table, device), to_device(entries, device)
        self.questions = to_device(torch.tensor(groups.question, dtype=torch.int64, device=host), device)
        self.share = to_device(share, device)
        self.pair_weights = F.pad(pair_weights, (0, K_filled - K) * 2).contiguous()

    def __call__(
        self,
        z_chunk: Tensor,  # (m, V) raw product; overwritten
        G_chunk: Tensor,  # (m, V) written with ∂loss/∂product when the chunk needs a gradient; may be z_chunk itself
        chunk: Chunk,
        teacher_rows: TeacherRows | None,
    ) -> None:
        offsets, start = self.plan.rows.group_offsets, chunk.start
        while start < min(chunk.stop, offsets[-1]):
            first = last = bisect_left(offsets, start)
            most = max(PAIR_BYTES // (4 * z_chunk.shape[1]), offsets[first + 1] - start)
            while last + 1 < len(offsets) and offsets[last + 1] <= min(chunk.stop, start + most):
                last += 1
            stop = offsets[last]
            within = slice(start - chunk.start, stop - chunk.start)
            z, d = z_chunk[within], G_chunk[within]
            pairs = self._pairs(z, first, last, start, chunk.needs_gradient)
            self._rows(z, d, start, stop, chunk, teacher_rows, pairs)
            start = stop
        if start < chunk.stop:
            rest = slice(start - chunk.start, None)
            self._rows(z_chunk[rest], G_chunk[rest], start, chunk.stop, chunk, teacher_rows, None)
        if chunk.needs_gradient and self.losses.grad_bias is not None:
            self.losses.grad_bias.add_(G_chunk.sum(0, dtype=self.losses.grad_bias.dtype))

    def _pairs(self, z: Tensor, first: int, last: int, start: int, needs_gradient: bool) -> PairGradient | None:
        """The JSDs of answer positions first to last, added to their questions, and what their rows' gradient needs."""
        options, table, questions = self.options, self.table[first:last], self.questions[first:last]
        entries = self.entries[start : start + len(z)] - first * table.shape[1]
        jsd, gradient = pairwise_jsd(
            z,
            torch.where(table < 0, -1, table - start),
            entries,
            questions,
            self.pair_weights,
            logit_scale=options.logit_scale,
            logit_softcap=options.logit_softcap,
            needs_gradient=needs_gradient,
        )
        assert self.losses.jsd is not None
        B, K, _ = self.losses.jsd.shape
        of_question = (questions == torch.arange(B, device=z.device).unsqueeze(1)) * self.share[first:last]  # (B, P)
        jsd = (of_question[:, :, None, None] * jsd[:, :K, :K]).sum(1)
        self.losses.jsd.add_(jsd + jsd.mT)
        return gradient

    def _rows(
        self,
        z: Tensor,  # of rows start to stop
        d: Tensor,
        start: int,
        stop: int,
        chunk: Chunk,
        teacher_rows: TeacherRows | None,
        pairs: PairGradient | None,
    ) -> None:
        """Cross-entropy and KL of these rows, and the gradient of all terms."""
        options = self.options
        terms = self.plan.terms.rows(start, stop)
        loss, kl_loss = self.losses.cross_entropy[start:stop], self.losses.kl[start:stop]
        if teacher_rows is None or terms.kl is None:
            cross_entropy_(
                z,
                d,
                terms.labels,
                terms.cross_entropy,
                loss,
                logit_scale=options.logit_scale,
                logit_softcap=options.logit_softcap,
                pairs=pairs,
                needs_gradient=chunk.needs_gradient,
            )
            return

        teacher, V = teacher_rows.teacher, z.shape[1]
        has_cross_entropy = options.cross_entropy_weight != 0
        if isinstance(teacher, TeacherTopK):
            index = teacher_rows.index[start - chunk.start : stop - chunk.start]
            topk_kl_(
                z,
                d,
                rows_of(teacher.token_ids, index),
                rows_of(teacher.logprobs, index).float(),
                teacher.tail,
                terms.labels,
                terms.cross_entropy,
                terms.kl,
                loss,
                kl_loss,
                options.kl,
                logit_scale=options.logit_scale,
                logit_softcap=options.logit_softcap,
                pairs=pairs,
                needs_gradient=chunk.needs_gradient,
            )
            return
        scale, softcap = 1.0, None
        if isinstance(teacher, TeacherHidden):
            scale, softcap = teacher.logit_scale, teacher.logit_softcap
        teacher_logits, index = teacher_rows.dense(start - chunk.start, stop - chunk.start)
        dense_kl_(
            z,
            torch.arange(len(z), device=z.device),
            d,
            teacher_logits,
            index,
            terms.labels if has_cross_entropy else None,
            terms.cross_entropy if has_cross_entropy else None,
            terms.kl,
            loss if has_cross_entropy else None,
            kl_loss,
            options.kl,
            V_shared=teacher.vocab_size or V,
            logit_scale=options.logit_scale,
            logit_softcap=options.logit_softcap,
            teacher_scale=scale,
            teacher_softcap=softcap,
            pairs=pairs,
            needs_gradient=chunk.needs_gradient,
        )
