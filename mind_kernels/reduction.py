"""From rows to rationales and back: Σ_r w_r·L_r with L_r a mean or a sum over the rationale's supervised rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums, losses and log-sum-exps are fp32, for fp64 inputs fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_sum(weights: Tensor, losses: Tensor) -> Tensor:  # (R,), (R,) -> ()
    """Σ_r w_r·L_r with 0·inf = 0: a deselected rationale adds nothing, however far the teacher is."""
    return weights.dot(losses.masked_fill((weights == 0) & losses.isinf(), 0.0))


def fp16_scale(coefficients: Sequence[Tensor], dtype: torch.dtype) -> float | Tensor:
    """By what coefficients are divided before a gradient of this dtype is made; `backward` multiplies by it.

    1, but for fp16 the largest coefficient: those of 1/N would underflow.
    """
    coefficients = [c for c in coefficients if c.numel()]
    if dtype != torch.float16 or not coefficients:
        return 1.0
    largest = torch.stack([c.abs().amax() for c in coefficients]).amax()
    return torch.where(largest > 0, largest, 1.0)


def fp16_head_scale(
    hidden_states: Tensor,  # (N, H)
    rows: Tensor,  # (n,) those with a gradient
    largest: float,  # entry of G, of coefficients that fp16_scale has divided
    dtype: torch.dtype,
) -> float | Tensor:
    """A power of two by which X is divided in dW = Gᵀ X, and by which `backward` multiplies; 1 but for fp16.

    There a sum over thousands of rows of one label could overflow: its bound n·max|G|·max|X| is kept below 2¹⁵.
    """
    if dtype != torch.float16 or not len(rows):
        return 1.0
    norms = torch.linalg.vector_norm(hidden_states, torch.inf, dim=1, dtype=torch.float32)[rows]
    bound = norms.amax().clamp(min=1.0) * (len(rows) * largest / 2**15)
    exponent = torch.frexp(bound).exponent.clamp(min=0)  # bound < 2^exponent, unless it is inf or NaN, and so dW
    return torch.ldexp(torch.ones_like(bound), exponent)


def multiply_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """gradient *= factor (). The factor is what `backward` is given, as a rule 1: then nothing is read or written.

    On a CPU the host looks at the factor. On a GPU it would have to wait, so with "triton" a kernel looks. Without, and
    where the gradient is not contiguous, PyTorch multiplies by whatever the factor is.
    """
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return
    if backend == "triton" and gradient.is_contiguous():
        from mind_kernels import triton_multiply

        triton_multiply.multiply_(gradient, factor)
    else:
        gradient.mul_(factor)


def sums_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:  # (n,), (n,) int64 -> (size,)
    """The sum of the values of each index, added in the order in which they stand: the same from run to run.

    On a GPU index_add_ adds atomically, in any order, and an accumulating index_put_ sorts first. On a CPU index_add_
    keeps the order and index_put_ does not.
    """
    sums = values.new_zeros(size)
    if values.device.type == "cpu":
        return sums.index_add_(0, index, values)
    return sums.index_put_((index,), values, accumulate=True)


class RationaleReduction:
    """weight (N,): ∂(Σ_r w_r·L_r)/∂(loss of row n), 0 for a row that is not supervised.

    A rationale without a supervised row has L_r = 0.
    """

    def __init__(
        self,
        rationale_weights: Tensor,  # (R,) statistics dtype
        rationale_id: Tensor,  # (N,)
        supervised: Tensor,  # (N,) bool
        reduction: str,
    ):
        self.rationale_id = rationale_id
        self.num_rationales = len(rationale_weights)
        self.divisor = None
        if reduction == "mean":
            count = sums_by_index(supervised.to(rationale_weights.dtype), rationale_id, self.num_rationales)
            self.divisor = count.clamp_(min=1)  # n_r
            rationale_weights = rationale_weights / self.divisor
        self.weight = rationale_weights[rationale_id] * supervised

    def __call__(
        self,
        row_losses: Tensor,  # (n,) of supervised rows
        rows: Tensor,  # (n,) which rows of the N they are
    ) -> Tensor:  # (R,)
        losses = sums_by_index(row_losses, self.rationale_id[rows], self.num_rationales)
        return losses if self.divisor is None else losses / self.divisor
