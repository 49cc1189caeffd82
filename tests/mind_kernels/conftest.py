from __future__ import annotations

import math

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
