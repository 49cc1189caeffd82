"""A backward pass over the columns of the vocabulary that matter, with a certificate.

Of a chunk's logit gradient G (m, V), most columns are next to nothing once the student is trained: softmax puts its
mass on few tokens, and the rows of a question share them. With kept columns K and the dropped part D of G,

    dX = G_K W_K + λ r (Wᵀq)ᵀ        dW_K += G_Kᵀ X,  dW += λ q (Xᵀr)ᵀ        r = D 1,  q = Dᵀ 1

Certificate: ‖D‖_F ≤ tolerance · ‖G‖_F, from the sums of squares of all columns, computed for every chunk. The columns
of the targets are always kept. λ = rᵀDq / (‖r‖²‖q‖²) makes λ r qᵀ the multiple of r qᵀ that is nearest to D, so that
‖D − λ r qᵀ‖ ≤ ‖D‖; for cross-entropy it is 1/Σr to a few per cent, which leaves the sums of rows and columns as they
were. It costs 4·m·V FLOP and puts a gradient in every row of dW, without which an adaptive optimiser would not move the
rare tokens at all.

Where the kept share exceeds BREAK_EVEN, or numbers are too small or too large to be sure of, the chunk is dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BREAK_EVEN = 0.5  # kept share from which gathering costs more than it saves
SAFETY = 1 - 2**-10  # the column sums are fp32: far more than their rounding
SMALLEST = 1e-25  # below this share of ‖G‖², squares that underflow could add up to something
TILE_ROWS, TILE_COLUMNS = 64, 8192  # of squares that stay in a core's cache


@dataclass(frozen=True)
class GradientPruning:
    """What `gradient_tolerance` may say beside the tolerance.

    tolerance: in each chunk, the most that the norm of the dropped part may be of the logit gradient's; 0: dense.
    correction: replace the dropped part by its nearest rank-1 matrix of the same row and column pattern.
    prune_weight_gradient: False keeps the product of lm_head_weight's gradient dense.

    Raises: ValueError when tolerance is not in [0, 1).
    """

    tolerance: float
    correction: bool = True
    prune_weight_gradient: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"gradient_tolerance: given {self.tolerance}, wanted a number in [0, 1)")


class PrunedChunk(NamedTuple):
    """What became of one chunk with a gradient."""

    rows: int
    kept_share: float  # of the V columns; 1 in a dense chunk
    certificate: float  # ‖D‖_F / ‖G‖_F; 0 in a dense chunk


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
    if isinstance(gradient_tolerance, bool) or not isinstance(gradient_tolerance, int | float | GradientPruning):
        raise TypeError(f"gradient_tolerance: given {type(gradient_tolerance).__name__}, wanted a number in [0, 1)")
    if not isinstance(gradient_tolerance, GradientPruning):
        gradient_tolerance = GradientPruning(gradient_tolerance)
    return gradient_tolerance if gradient_tolerance.tolerance > 0 else None


class Columns(NamedTuple):
    """The kept columns of one chunk, and what stands for the others."""

    kept: Tensor  # (k,) int64, ascending
    G: Tensor  # (m, k)
    row_factor: Tensor | None  # (m,) λr, fp32
    column_mass: Tensor | None  # (V,) q, 0 where kept, fp32


def choose_columns(
    G: Tensor,  # (m, V) ∂loss/∂product
    targets: Tensor,  # (m,) int64, columns that are kept whatever they hold
    pruning: GradientPruning,
) -> Columns | None:
    """The fewest columns that meet the certificate; None where the chunk is better dense.

    Waits for the device to learn how many they are.
    """
    m, V = G.shape
    square, mass = _column_sums(G)
    order_by = square.clone()
    order_by[targets.clamp(0, V - 1)] = torch.inf
    order = order_by.argsort()
    dropped_square = square[order].double().cumsum(0)  # (V,) ‖D‖² when the first so many are dropped
    total = dropped_square[-1]
    budget = SAFETY * pruning.tolerance**2 * total
    free = V - torch.isinf(order_by).sum()  # inf is also what a column beyond all measure holds
    found = torch.searchsorted(dropped_square, budget, right=True).clamp(max=free)
    num_dropped, size = torch.stack([found.double(), budget]).tolist()
    num_dropped = int(num_dropped)
    sure = SMALLEST < size < torch.inf  # False for NaN
    if not sure or V - num_dropped > BREAK_EVEN * V:
        _record(m, 1.0, 0.0)
        return None
    certificate = float((dropped_square[num_dropped - 1] / total).sqrt()) if num_dropped else 0.0
    _record(m, 1 - num_dropped / V, certificate)
    kept = order[num_dropped:].sort().values
    row_factor = column_mass = None
    if pruning.correction:
        column_mass = mass.index_fill_(0, kept, 0.0)
        is_dropped = torch.ones_like(mass).index_fill_(0, kept, 0.0)
        r, Dq = _times(G, is_dropped), _times(G, column_mass)
        norms = r.double().square().sum() * column_mass.double().square().sum()  # fp32 would overflow
        row_factor = r * torch.where(norms > 0, r.double().dot(Dq.double()) / norms, 0.0).to(r.dtype)
    return Columns(kept, G.index_select(1, kept), row_factor, column_mass)


def grad_hidden_states(columns: Columns, W: Tensor) -> Tensor:  # (m, k) @ (k, H) -> (m, H)
    """G_K W_K + λ r (Wᵀq)ᵀ in fp32 (fp64 for fp64)."""
    dX = torch.mm(columns.G, W.index_select(0, columns.kept))
    if columns.row_factor is None or columns.column_mass is None:
        return dX
    mean = _times(W.t(), columns.column_mass)  # (H, V) @ (V,)
    return dX.to(mean.dtype).addr_(columns.row_factor, mean)


def _record(rows: int, kept_share: float, certificate: float) -> None:
    records = _records.get()
    if records is not None:
        records.append(PrunedChunk(rows, kept_share, certificate))


def _column_sums(G: Tensor) -> tuple[Tensor, Tensor]:
    """(V,) Σ_n G² and (V,) Σ_n G, fp32 (fp64 for fp64)."""
    (m, V), dtype = G.shape, torch.promote_types(G.dtype, torch.float32)
    if G.device.type != "cpu":
        return torch.linalg.vector_norm(G, dim=0, dtype=dtype).square_(), G.sum(0, dtype=dtype)
    # A CPU's reduction over the first axis goes through memory for each row; a product with a row of ones does not.
    square, mass = torch.zeros(2, 1, V, dtype=dtype)
    ones = torch.ones(1, min(TILE_ROWS, m), dtype=dtype)
    squares = torch.empty(TILE_ROWS, min(TILE_COLUMNS, V), dtype=dtype)
    for n in range(0, m, TILE_ROWS):
        for v in range(0, V, TILE_COLUMNS):
            tile = G[n : n + TILE_ROWS, v : v + TILE_COLUMNS].to(dtype)
            rows, columns = tile.shape
            s = torch.mul(tile, tile, out=squares[:rows, :columns])
            square[:, v : v + columns] += torch.mm(ones[:, :rows], s)
            mass[:, v : v + columns] += torch.mm(ones[:, :rows], tile)
    return square[0], mass[0]


def _times(A: Tensor, vector: Tensor) -> Tensor:  # (a, b) @ (b,) -> (a,)
    """A product in the precision of the vector; a 16-bit A is widened a tile at a time."""
    if A.dtype == vector.dtype:
        return torch.mv(A, vector)
    total = vector.new_zeros(A.shape[0])
    for b in range(0, A.shape[1], TILE_COLUMNS):
        total.addmv_(A[:, b : b + TILE_COLUMNS].to(vector.dtype), vector[b : b + TILE_COLUMNS])
    return total
