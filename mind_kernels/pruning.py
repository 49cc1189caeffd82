"""A backward pass over the columns of the vocabulary that matter, with a certificate.

Once the student is trained, most columns of a chunk's logit gradient G (m, V) are nearly 0: softmax puts its mass on
few tokens, and the rows of a question share them. With kept columns K and the dropped part D of G,

    dX = G_K W_K + λ r (Wᵀq)ᵀ        dW_K += G_Kᵀ X,  dW += λ q (Xᵀr)ᵀ        r = D 1,  q = Dᵀ 1

Certificate: ‖D‖_F ≤ tolerance · ‖G‖_F, from the sums of squares of all columns, computed for every chunk. The columns
of the targets are always kept. λ = rᵀDq / (‖r‖²‖q‖²) makes λ r qᵀ the multiple of r qᵀ that is nearest to D, so that
‖D − λ r qᵀ‖ ≤ ‖D‖; for cross-entropy it is 1/Σr to a few per cent, which leaves the sums of rows and columns as they
were. It costs 4·m·V FLOP and puts a gradient in every row of dW, without which an adaptive optimiser would not move the
rare tokens at all.

A chunk stays dense where more columns would be kept than pays off, or where its numbers are too small or too large to
compute the certificate.

The choice is made on the device without a wait. The products of this file are PyTorch's, which need the number of kept
columns on the host: on a GPU that is one wait a chunk. Those of triton_columns.py read it on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mind_kernels.products import TILE, product, project

BREAK_EVEN = 0.5  # kept share from which gathering costs more than it saves,
BREAK_EVEN_16_BITS = 0.25  # on a CPU whose 16-bit products are quick
SAFETY = 1 - 2**-10  # allows for far more than the rounding of the fp32 column sums
UNITS = 2**60  # of which ‖G‖² is made
SAMPLE_ROWS = 64  # of a chunk, from which a CPU tells whether to leave it dense
SMALLEST = 1e-25  # below this share of ‖G‖², squares that underflow could add up to something
TILE_ELEMENTS, TILE_ROWS = 2**19, 64  # of fp32 copies that stay in a core's cache


@dataclass(frozen=True)
class GradientPruning:
    """What `gradient_tolerance` may say beside the tolerance.

    tolerance: in each chunk, the most that the norm of the dropped part may be of the logit gradient's; 0: dense.
    correction: replace the dropped part by its nearest rank-1 matrix of the same row and column pattern. Leave it on to
        train: without it the dropped tokens are never told to become less likely (experiments/RESULTS.md).
    prune_weight_gradient: False keeps the product of lm_head_weight's gradient dense.

    Raises: ValueError when tolerance is not in [0, 1).
    """

    tolerance: float
    correction: bool = True
    prune_weight_gradient: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"gradient_tolerance: given {self.tolerance}, wanted a number in [0, 1)")


@dataclass(frozen=True, eq=False)
class PrunedChunk:
    """What became of one chunk with a gradient. Recording it waits for nothing, looking at a share for the device."""

    rows: int
    shares: Tensor  # (2,) fp64: kept_share, certificate

    @property
    def kept_share(self) -> float:
        """Of the V columns; 1 in a dense chunk."""
        return self.shares[0].item()

    @property
    def certificate(self) -> float:
        """‖D‖_F / ‖G‖_F; 0 in a dense chunk."""
        return self.shares[1].item()


_records: ContextVar[list[PrunedChunk] | None] = ContextVar("records", default=None)


@contextmanager
def record_pruning() -> Iterator[list[PrunedChunk]]:
    """Collects what became of each chunk of the losses computed within, in order."""
    records: list[PrunedChunk] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def resolve_pruning(gradient_tolerance: float | GradientPruning) -> GradientPruning | None:
    """None where the backward pass is dense.

    Raises: ValueError or TypeError naming gradient_tolerance.
    """
    if isinstance(gradient_tolerance, bool) or not isinstance(gradient_tolerance, (int, float, GradientPruning)):
        raise TypeError(f"gradient_tolerance: given {type(gradient_tolerance).__name__}, wanted a number in [0, 1)")
    if not isinstance(gradient_tolerance, GradientPruning):
        gradient_tolerance = GradientPruning(gradient_tolerance)
    return gradient_tolerance if gradient_tolerance.tolerance > 0 else None


class Dropped(NamedTuple):
    """Which columns of a chunk are dropped, on the chunk's device."""

    order: Tensor  # (V,) int64: columns by Σ_n G², the smallest first, the targets last
    num_dropped: Tensor  # () int64: so many of them, the first; 0 where the chunk is dense
    certificate: Tensor  # () fp64, ‖D‖_F / ‖G‖_F; 0 where the chunk is dense

    def record(self, rows: int) -> None:
        records = _records.get()
        if records is not None:
            kept_share = 1 - self.num_dropped.double() / len(self.order)
            records.append(PrunedChunk(rows, torch.stack([kept_share, self.certificate])))


def columns_to_drop(
    square: Tensor,  # (V,) Σ_n G²
    targets: Tensor,  # (m,) int64, columns that are kept whatever they hold
    pruning: GradientPruning,
    break_even: float = BREAK_EVEN,
) -> Dropped:
    """As many columns as the certificate allows, or none. Waits for nothing."""
    V = len(square)
    order_by = square.index_fill(0, targets.clamp(0, V - 1), torch.inf)
    order = order_by.argsort()
    # In units of 2⁻⁶⁰ ‖G‖², rounded up: a scan of integers is exact in whatever order a device makes it.
    ascending = square[order].double()
    total = ascending.sum()
    dropped_square = (ascending * (UNITS / total)).ceil().long().cumsum(0)  # ‖D‖² of the first so many, at most
    share = SAFETY * pruning.tolerance**2
    free = V - torch.isinf(order_by).sum()  # inf is also what a column beyond all measure holds
    found = (dropped_square <= int(share * UNITS)).sum().clamp(max=free)
    is_sure = (share * total > SMALLEST) & (share * total < torch.inf)  # False for NaN
    num_dropped = torch.where(is_sure & (V - found <= break_even * V), found, 0)
    is_dropped = torch.arange(V, device=square.device) < num_dropped
    certificate = torch.where(num_dropped > 0, (ascending.where(is_dropped, 0.0).sum() / total).sqrt(), 0.0)
    return Dropped(order, num_dropped, certificate)


def most_kept(V: int) -> int:
    """Columns that a buffer for the kept ones has: a multiple of 16, for aligned rows."""
    return -(-max(int(BREAK_EVEN * V), 1) // 16) * 16


class ChunkColumns(Protocol):
    """The kept columns K of one chunk and the correction of the others, for the products of the backward pass."""

    @property
    def row_factor(self) -> Tensor | None: ...  # (m,) λr, fp32; None: no correction

    @property
    def column_mass(self) -> Tensor | None: ...  # (V,) q, 0 where kept, fp32

    def grad_hidden_states(self, W: Tensor) -> Tensor:  # (V, H) -> (m, H)
        """G_K W_K + λ r (Wᵀq)ᵀ."""

    def add_grad_weight_(self, total: Tensor, X: Tensor) -> None:  # (V, H) += (V, m) @ (m, H)
        """total_K += G_Kᵀ X, each kept row once."""


class Columns(NamedTuple):
    """ChunkColumns in PyTorch, where the host knows how many are kept."""

    kept: Tensor  # (k,) int64, ascending
    G: Tensor  # (m, k)
    row_factor: Tensor | None
    column_mass: Tensor | None

    def grad_hidden_states(self, W: Tensor) -> Tensor:
        dX = self.G.new_empty(len(self.G), W.shape[1])
        product(self.G, W.index_select(0, self.kept), dX)  # (m, k) @ (k, H) -> (m, H)
        if self.row_factor is None or self.column_mass is None:
            return dX
        (mean,) = _times(W.t(), self.column_mass.unsqueeze(0))  # (H, V) @ (V,)
        return dX.to(mean.dtype).addr_(self.row_factor, mean)

    def add_grad_weight_(self, total: Tensor, X: Tensor) -> None:
        partial = torch.empty(len(self.kept), X.shape[1], dtype=total.dtype, device=X.device)
        total.index_add_(0, self.kept, project(self.G.t(), X.t(), None, partial))  # (k, m) @ (m, H)


def choose_columns(
    G: Tensor,  # (m, V) ∂loss/∂product
    targets: Tensor,  # (m,) int64, columns that are kept whatever they hold
    pruning: GradientPruning,
) -> Columns | None:
    """The fewest columns that meet the certificate; None where the chunk is better dense.

    Waits for the device, to learn how many they are. On a CPU a sample of a large chunk's rows is tried first: where
    these alone need more than break_even of the columns, the chunk is left dense at once, and an unsure student pays
    for no more than the sample.
    """
    m = len(G)
    break_even = BREAK_EVEN_16_BITS if G.device.type == "cpu" and G.dtype.itemsize == 2 else BREAK_EVEN
    if m >= 8 * SAMPLE_ROWS and G.device.type == "cpu":
        some = slice(0, m // SAMPLE_ROWS * SAMPLE_ROWS, m // SAMPLE_ROWS)
        dropped = columns_to_drop(_column_sums(G[some])[0], targets[some], pruning, break_even)
        if int(dropped.num_dropped) == 0:
            dropped.record(m)
            return None
    square, mass = _column_sums(G)
    dropped = columns_to_drop(square, targets, pruning, break_even)
    dropped.record(m)
    num_dropped = int(dropped.num_dropped)
    if num_dropped == 0:
        return None
    kept = dropped.order[num_dropped:].sort().values
    row_factor = column_mass = None
    if pruning.correction:
        column_mass = mass.index_fill_(0, kept, 0.0)
        is_dropped = torch.ones_like(mass).index_fill_(0, kept, 0.0)
        r, Dq = _times(G, torch.stack([is_dropped, column_mass]))
        row_factor = correction_factor(r, Dq, column_mass)
    # (m, k). index_select takes five times as long where rows do not lie end to end.
    kept_G = G.gather(1, kept.expand(m, -1))
    return Columns(kept, kept_G, row_factor, column_mass)


def correction_factor(
    r: Tensor,  # (m,) D 1
    Dq: Tensor,  # (m,)
    q: Tensor,  # (V,) Dᵀ 1
) -> Tensor:  # (m,) λr, λ = rᵀDq / (‖r‖²‖q‖²)
    norms = r.double().square().sum() * q.double().square().sum()  # fp32 would overflow
    return r * torch.where(norms > 0, r.double().dot(Dq.double()) / norms, 0.0).to(r.dtype)


def _column_sums(G: Tensor) -> tuple[Tensor, Tensor]:
    """(V,) Σ_n G² and (V,) Σ_n G, fp32 (fp64 for fp64)."""
    (m, V), dtype = G.shape, torch.promote_types(G.dtype, torch.float32)
    if G.device.type != "cpu":
        return torch.linalg.vector_norm(G, dim=0, dtype=dtype).square_(), G.sum(0, dtype=dtype)
    # A CPU's reduction over the first axis goes through memory for each row. These sums of every so many rows do not.
    rows = min(m, max(1, TILE_ELEMENTS // 2 // V))
    square, mass = torch.zeros(2, rows, V, dtype=dtype, device=G.device)
    wide = None if G.dtype == dtype else torch.empty(rows, V, dtype=dtype, device=G.device)
    for n in range(0, m, rows):
        block = G[n : n + rows]
        if wide is not None:
            block = wide[: len(block)].copy_(block)
        square[: len(block)].addcmul_(block, block)
        mass[: len(block)].add_(block)
    return square.sum(0), mass.sum(0)


def _times(A: Tensor, vectors: Tensor) -> Tensor:  # (a, b), (c, b) -> (c, a)
    """A times each vector, in the precision of the vectors; a 16-bit A is widened a tile at a time."""
    if A.dtype == vectors.dtype:
        return torch.mm(A, vectors.t()).t()
    (a, b), on_cpu, by_row = A.shape, A.device.type == "cpu", A.stride(1) == 1
    rows = min(a, TILE_ROWS) if on_cpu and by_row else a
    columns = min(b, max(1, TILE_ELEMENTS // rows) if on_cpu else TILE)
    wide = vectors.new_empty(rows, columns) if by_row else vectors.new_empty(columns, rows).t()
    total = vectors.new_zeros(len(vectors), a)
    for n in range(0, a, rows):
        for v in range(0, b, columns):
            tile = A[n : n + rows, v : v + columns]
            tile = wide[: tile.shape[0], : tile.shape[1]].copy_(tile)
            for sums, vector in zip(total, vectors, strict=True):
                sums[n : n + rows].addmv_(tile, vector[v : v + columns])
    return total
