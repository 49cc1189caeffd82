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

NUM_ROWS = {"cpu": 1024, "cuda": 16_384}
OURS = [name for name, provider in PROVIDERS.items() if provider.is_ours]


@pytest.mark.parametrize("provider", [*OURS, "pytorch"])
@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
@pytest.mark.parametrize("head", ["smollm2-135m", "qwen2.5-1.5b"])
def test_forward_and_backward(head: str, loss: Any, provider: str, benchmark: Any) -> None:
    device, dtype = default_device(), torch.bfloat16
    case = LossCase(head, loss)
    try:
        call = PROVIDERS[provider].prepare(case, device, dtype)
    except Unavailable as error:
        pytest.skip(str(error))
    given = make_inputs(case, NUM_ROWS[device] // (1 if head == "smollm2-135m" else 4), dtype, device)
    errors = relative_errors(run_once(call, given), reference(given, given.row_weights))
    assert excess(errors, allowed_errors(case, given, dtype, device)) == ""

    clock, roofline = Clock(device), Roofline(given)
    products: list[float] = []
    steps: list[float] = []
    benchmark.group = f"{head} {loss}"
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
