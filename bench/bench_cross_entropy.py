"""Linear cross-entropy, forward + backward: this project beside PyTorch's three ways, as ratios to the bare products.

Each round of a provider is paired with a round of the three bare matrix products of the same dtype, so that a ratio
compares neighbours in time:

    Z = X Wᵀ        (N, H) @ (H, V) -> (N, V)        2·N·H·V FLOP
    dX = Z W        (N, V) @ (V, H) -> (N, H)        2·N·H·V FLOP
    dW = Zᵀ X       (V, N) @ (N, H) -> (V, H)        2·N·H·V FLOP
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import CPU_CASES, Case
from mind_kernels import fused_linear_cross_entropy
from mind_kernels.chunking import DEFAULT_MAX_LOGITS_BYTES
from mind_kernels.testing import peak_extra_bytes, relative_error

DTYPES = [torch.float32, torch.bfloat16]
MiB = 2**20


def mind(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    return fused_linear_cross_entropy(X, W, labels)[0]


def pytorch(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(X, W), labels)


def pytorch_chunked(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(X, W, labels, options=torch.nn.LinearCrossEntropyOptions())


# The chunked one takes minutes: one round says enough.
PROVIDERS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "mind": (mind, 5),
    "F.cross_entropy(F.linear)": (pytorch, 3),
    "F.linear_cross_entropy, chunked": (pytorch_chunked, 1),
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(case.num_rows, case.hidden_size, generator=generator).to(dtype).requires_grad_()
    W = (torch.randn(case.vocab_size, case.hidden_size, generator=generator) * 0.05).to(dtype).requires_grad_()
    return X, W, torch.randint(0, case.vocab_size, (case.num_rows,), generator=generator)


def worst_error(provider: Any, X: Tensor, W: Tensor, labels: Tensor) -> float:
    """The largest relative error of loss, dX and dW against fp64 on the first 64 rows."""
    found = []
    for function, dtype in ((provider, X.dtype), (pytorch, torch.float64)):
        x, w = X[:64].detach().to(dtype).requires_grad_(), W.detach().to(dtype).requires_grad_()
        loss = function(x, w, labels[:64])
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, w))])
    return max(relative_error(given, exact) for given, exact in zip(*found, strict=True))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_linear_cross_entropy(case: Case, dtype: torch.dtype, provider: str, benchmark: Any, record: Any) -> None:
    function, rounds = PROVIDERS[provider]
    X, W, labels = inputs(case, dtype)
    error = worst_error(function, X, W, labels)
    # 1e-5: sums in another order are not wrong
    allowed = 4 * worst_error(pytorch, X, W, labels) + 1e-5
    assert error <= allowed, f"{provider}: relative error {error:.1e}, wanted at most {allowed:.1e}"

    x, w = X.detach(), W.detach()
    products: list[float] = []

    def bare_products() -> None:
        start = time.perf_counter()
        Z = x @ w.T
        gradients = Z @ w, Z.T @ x
        products.append(time.perf_counter() - start)
        del Z, gradients

    def step() -> None:
        X.grad = W.grad = None
        function(X, W, labels).backward()

    peak = peak_extra_bytes(step)
    bare_products()
    products.clear()
    benchmark.group = f"{case.name} {dtype}"
    benchmark.pedantic(step, setup=bare_products, rounds=rounds, iterations=1, warmup_rounds=0)
    times = benchmark.stats.stats.data
    ratio = statistics.median(time / bare for time, bare in zip(times, products, strict=True))
    gradients = (X.numel() + W.numel()) * dtype.itemsize
    benchmark.extra_info.update(ratio_to_products=ratio, peak_bytes=peak, relative_error=error)
    record(
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        provider=provider,
        seconds=statistics.median(times),
        products_seconds=statistics.median(products),
        ratio_to_products=ratio,
        peak_MiB=round(peak / MiB),
        gradients_MiB=round(gradients / MiB),
        budget_MiB=DEFAULT_MAX_LOGITS_BYTES // MiB if provider == "mind" else "-",
        worst_relative_error=error,
    )
