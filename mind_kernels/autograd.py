"""What the autograd functions of this package share: options that hold tensors, and no second derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def refuse_second_derivative() -> None:
    """To be called first in a backward whose gradients were made in forward, where autograd takes them for constants.

    Raises: RuntimeError under create_graph=True, the only case in which autograd records what a backward does.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("backward: given create_graph=True, wanted False: there is no second derivative")


class _Saved(NamedTuple):
    place: int


def without_tensors(options: Any) -> tuple[Any, list[Tensor]]:
    """A copy of a dataclass without its tensors, and these, for ctx.save_for_backward.

    Autograd then frees the tensors with the graph and notices when one was changed in place. Tensors made in inference
    mode stay in the copy, as autograd refuses to save them.
    """
    tensors: list[Tensor] = []

    def bare(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_inference():
            tensors.append(value)
            return _Saved(len(tensors) - 1)
        return _map_fields(value, bare) if is_dataclass(value) else value

    return _map_fields(options, bare), tensors


def with_tensors(options: Any, tensors: Sequence[Tensor]) -> Any:
    """Undoes without_tensors."""

    def whole(value: Any) -> Any:
        if isinstance(value, _Saved):
            return tensors[value.place]
        return _map_fields(value, whole) if is_dataclass(value) else value

    return _map_fields(options, whole)


def _map_fields(options: Any, function: Callable[[Any], Any]) -> Any:
    mapped = copy.copy(options)
    vars(mapped).update({name: function(value) for name, value in vars(options).items()})
    return mapped
