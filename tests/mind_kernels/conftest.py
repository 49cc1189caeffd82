from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the shapes here are too small to share


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty is full of NaN, so that an output nobody wrote is seen."""

    def poison(create):
        def poisoned(*args, **kwargs):
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(math.nan)  # PyTorch's own may require a gradient
            return tensor

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def compiled_kernels() -> Iterator[None]:
    """With MIND_PTX_TARGET=sm_90 the kernels run as compiled for it (bench/ptx.py), not in Triton's interpreter."""
    target = os.environ.get("MIND_PTX_TARGET")
    if target is None:
        yield
        return
    from bench.ptx import emulated

    with emulated(target):
        yield
