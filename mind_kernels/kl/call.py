"""What the two paths of ta_weighted_kl share: the call and the budget."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mind_kernels.chunking import DEFAULT_MAX_LOGITS_BYTES, to_device
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.teachers import Teacher


@dataclass(frozen=True)
class KLCall:
    """One call of ta_weighted_kl, without the tensors that have gradients."""

    teacher: Teacher
    kl: KLOptions
    rationale_id: Tensor  # (N,) int64
    supervised: Tensor  # (N,) bool
    supervised_index: Tensor | None  # (n,) int64 on the host: where it is True
    reduction: str
    max_logits_bytes: int | None
    backend: str  # "torch" | "triton"

    @property
    def rows(self) -> Tensor:  # (n,) int64, the supervised rows
        if self.supervised_index is None:
            return self.supervised.nonzero().squeeze(1)
        return to_device(self.supervised_index.long(), self.supervised.device)


def teacher_chunk_rows(head: Tensor, num_rows: int, max_logits_bytes: int | None) -> int:
    """Rows of teacher logits that are projected at a time."""
    budget = max_logits_bytes or DEFAULT_MAX_LOGITS_BYTES
    row_bytes = head.shape[0] * head.dtype.itemsize
    if budget < row_bytes:
        raise ValueError(f"max_logits_bytes: given {budget}, wanted at least {row_bytes} for one row of teacher logits")
    return min(budget // row_bytes, max(num_rows, 1))
