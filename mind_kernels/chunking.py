"""Which rows reach the head, in which order, and how many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Large enough for efficient products (1,024 rows at V = 262,144 in bf16), small beside the gradients.
DEFAULT_MAX_LOGITS_BYTES = 512 * 2**20
# The logits of a TeacherHidden enter no further product, so they are made for one part of a chunk at a time.
PARTS = 4  # in a chunk
PART_ROWS = 256  # in a part at least, so that the product that makes its logits stays efficient
# Elementwise work goes over the logits in blocks. On a CPU a thread's share of one, with all its fp32 copies, stays in
# cache from pass to pass; smaller ones would be more calls than arithmetic.
BLOCK_ELEMENTS = 2**19
ALIASED_BYTES, PAD_BYTES = 2**16, 256


def block_rows(V: int, device: torch.device, max_logits_bytes: int | None, has_copies: bool) -> int:
    """Rows of a block: on a CPU whole ones for each thread, since a row's softmax is the work of one.

    Half as many where logits and probabilities are kept side by side (has_copies). Their fp32 logits take at most a
    64th of the budget; on a device, where each pass is a launch, just that.
    """
    budget = max_logits_bytes or DEFAULT_MAX_LOGITS_BYTES
    rows = budget // (64 * 4 * V)
    if device.type == "cpu":
        elements = BLOCK_ELEMENTS // 2 if has_copies else BLOCK_ELEMENTS
        rows = min(rows, max(1, elements // V) * torch.get_num_threads())
    return max(1, rows)


def row_buffer(rows: int, V: int, dtype: torch.dtype, device: torch.device, backend: str) -> Tensor:  # (rows, V)
    """Empty logits. For the kernels rows begin at multiples of 16 numbers, whatever V: loads are of 16 bytes then.

    In PyTorch on a CPU those of fp32 and fp64 do not begin at multiples of 64 KiB, as they would for V = 49,152 or
    262,144: the numbers of a column would all fall on one set of a core's cache, and a product goes over columns.
    """
    stride = V
    if backend == "triton":
        stride = -(-V // 16) * 16
    elif device.type == "cpu" and dtype.itemsize >= 4 and V * dtype.itemsize % ALIASED_BYTES == 0:
        stride = V + PAD_BYTES // dtype.itemsize
    return torch.empty(rows, stride, dtype=dtype, device=device)[:, :V]


class Scratch:
    """(rows, V) buffers by name, made once: on several cores it costs more to map memory anew than to go over it."""

    def __init__(self, rows: int, V: int, dtype: torch.dtype, device: torch.device):
        self.numel, self.dtype, self.device = rows * V, dtype, device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        return self.buffers[name][: shape.numel()].view(shape)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy for which the host does not wait: from pinned memory, in the order of the device's own work."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class Rows(NamedTuple):
    """Rows in the order of processing: answer groups first, other rows with a gradient, then forward-only rows."""

    order: Tensor  # (n,) int64: flat row of hidden_states
    is_supervised: Tensor  # (n,) bool
    group_offsets: list[int]  # groups are order[offsets[g]:offsets[g + 1]]; [0] when there is none
    num_with_gradient: int  # order[:num_with_gradient] need a backward


class Chunk(NamedTuple):
    start: int
    stop: int
    needs_gradient: bool


def order_rows(
    is_supervised: Tensor,  # (N,) bool
    has_gradient: Tensor,  # (N,) bool: supervised with a coefficient other than 0
    groups: Sequence[Tensor],  # rows of one answer position each, on the host
    groups_have_gradient: bool,
    device: torch.device,  # of the result
) -> Rows:
    """Compaction: rows that are neither supervised nor part of an answer group never reach the head.

    How many rows there are decides the launches, so the host must know it: with the two (N,) tensors on the host
    nothing waits for the device.
    """
    sizes = [len(rows) for rows in groups]
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    grouped = torch.cat(list(groups)) if groups else torch.empty(0, dtype=torch.int64, device="cpu")
    grouped = to_device(grouped, is_supervised.device)
    rest = is_supervised.clone()
    rest[grouped] = False
    active = (rest & has_gradient).nonzero().squeeze(1)
    passive = (rest & ~has_gradient).nonzero().squeeze(1)
    order = torch.cat([grouped, active, passive])
    with_gradient = len(active) + (len(grouped) if groups_have_gradient or len(active) else 0)
    is_supervised = is_supervised[order]
    if order.device != device:
        order, is_supervised = to_device(order, device), to_device(is_supervised, device)
    return Rows(order, is_supervised, offsets, with_gradient)


def plan_chunks(
    rows: Rows, bytes_per_row: int, max_logits_bytes: int | None, teacher_bytes_per_row: int = 0
) -> list[Chunk]:
    """Equal chunks within the budget; no answer group is split; rows with and without a gradient never share one.

    teacher_bytes_per_row: of logits that are projected for one part of a chunk at a time, see `teacher_parts`.
    """
    budget = max_logits_bytes or DEFAULT_MAX_LOGITS_BYTES
    group = _largest_group(rows)
    most = budget // (bytes_per_row + teacher_bytes_per_row)
    if len(rows.order) and most < group:
        raise ValueError(
            f"max_logits_bytes: given {budget}, wanted at least {group * (bytes_per_row + teacher_bytes_per_row)} "
            f"({group} rows of {bytes_per_row + teacher_bytes_per_row} bytes of logits that must be held together)"
        )
    if teacher_bytes_per_row:  # chunk rows + part rows · teacher bytes within the budget
        beside_least = (budget - max(PART_ROWS, group) * teacher_bytes_per_row) // bytes_per_row
        beside_share = PARTS * (budget - teacher_bytes_per_row) // (PARTS * bytes_per_row + teacher_bytes_per_row)
        most = max(most, min(beside_least, beside_share))
    chunks: list[Chunk] = []
    for begin, end, needs_gradient in (
        (0, rows.num_with_gradient, True),
        (rows.num_with_gradient, len(rows.order), False),
    ):
        if begin < end:
            size = -(-(end - begin) // -(-(end - begin) // most))
            chunks += _cut(Chunk(begin, end, needs_gradient), size, rows.group_offsets)
    return chunks


def teacher_parts(chunk: Chunk, rows: Rows) -> list[Chunk]:
    """The parts of a chunk whose teacher logits are held together; no answer group is split."""
    size = max(PART_ROWS, _largest_group(rows), -(-(chunk.stop - chunk.start) // PARTS))
    return _cut(chunk, size, rows.group_offsets)


def _largest_group(rows: Rows) -> int:
    return max((b - a for a, b in zip(rows.group_offsets, rows.group_offsets[1:], strict=False)), default=1)


def _cut(chunk: Chunk, size: int, group_offsets: list[int]) -> list[Chunk]:
    """Pieces of at most `size` rows, or of one group that is larger."""
    starts = set(group_offsets)
    pieces: list[Chunk] = []
    start = chunk.start
    while start < chunk.stop:
        stop = min(start + size, chunk.stop)
        while stop < min(group_offsets[-1], chunk.stop) and stop not in starts:
            stop -= 1
        if stop <= start:  # a group larger than an even share but within the budget
            stop = min(offset for offset in group_offsets if offset > start)
        pieces.append(Chunk(start, stop, chunk.needs_gradient))
        start = stop
    return pieces
