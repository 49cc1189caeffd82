"""For work on a kernel: one provider at a time under pytest-benchmark, whose saved runs show what a change did.

    python -m pytest bench --benchmark-autosave                 # before
    python -m pytest bench --benchmark-compare                  # after, on the same quiet machine

Every round stands beside a round of the bare products, so that `ratio` survives a noisy machine. What is published
comes from bench.losses, which compares all providers.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from bench.inputs import make_inputs
from bench.losses import default_device
from bench.measure import Clock, Roofline, allowed_errors, excess, reference, relative_errors, run_once
from bench.providers import PROVIDERS, Unavailable
from bench.shapes import LossCase

# head, loss, rows on a CPU, rows on a GPU
CASES = [
    ("smollm2-135m", "cross-entropy", 2048, 16_384),
    ("gemma3-270m", "cross-entropy", 1024, 16_384),
    ("smollm2-135m", "kl", 1024, 16_384),
    ("qwen2.5-1.5b", "cross-entropy", 256, 16_384),
]
OURS = [name for name, provider in PROVIDERS.items() if provider.is_ours]


@pytest.mark.parametrize("provider", [*OURS, "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("head", "loss", "rows_cpu", "rows_cuda"), CASES, ids=[f"{head}-{loss}" for head, loss, *_ in CASES]
)
def test_forward_and_backward(
    head: str, loss: Any, rows_cpu: int, rows_cuda: int, dtype: torch.dtype, provider: str, benchmark: Any
) -> None:
    device = default_device()
    case = LossCase(head, loss)
    try:
        call = PROVIDERS[provider].prepare(case, device, dtype)
    except Unavailable as error:
        pytest.skip(str(error))
    given = make_inputs(case, rows_cpu if device == "cpu" else rows_cuda, dtype, device)
    errors = relative_errors(run_once(call, given), reference(given, given.row_weights))
    assert excess(errors, allowed_errors(case, given, dtype, device)) == ""

    clock, roofline = Clock(device), Roofline(given)
    products: list[float] = []
    steps: list[float] = []
    benchmark.group = f"{head} {loss} {dtype}"
    benchmark.pedantic(
        lambda: steps.append(clock(lambda: run_once(call, given))),
        setup=lambda: products.append(roofline.times(clock)["both"]),
        rounds=5,
        iterations=1,
        warmup_rounds=1,
    )
    benchmark.extra_info["ratio"] = statistics.median(
        step / bare for step, bare in zip(steps[-5:], products[-5:], strict=True)
    )
