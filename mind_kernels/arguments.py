"""What every operation checks of its arguments, and the two layouts reduced to one.

Errors name the argument, what was given and what is wanted.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import numbers
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mind_kernels.reduction import statistics_dtype

HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up here: torch.compile cannot in PyTorch 2.11
BACKENDS = ("auto", "torch", "triton")
MAX_PERSPECTIVES = 8  # the most that the Triton kernel of pairs holds: 16 rows and their sums spill
DIVERGENCES = ("forward", "reverse", "jsd")
REDUCTIONS = ("mean", "sum")
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def can_look(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device and without breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_autocast_on(device: torch.device) -> bool:
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace in PyTorch 2.11.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, where Triton launches wherever its tensors are. Compiled code does so itself."""
    is_ours = device.type == "cuda" and not torch.compiler.is_compiling()
    return torch.cuda.device(device) if is_ours else nullcontext()


def product_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of the products with the head: autocast's where it is on."""
    if is_autocast_on(hidden_states.device) and hidden_states.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden_states.device.type)
    return hidden_states.dtype


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: given {type(tensor).__name__}, wanted a torch.Tensor")
    # Known by its method: torch.distributed need not be there.
    if not torch.compiler.is_compiling() and hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name}: given a {type(tensor).__name__}, wanted a plain tensor: its full_tensor(), or for FSDP2's "
            "parameters a call from the forward of the module they are sharded with"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: given {tensor.dtype}, wanted one of bfloat16, float16, float32, float64")


def check_integer(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: given {tensor.dtype}, wanted torch.int64 or torch.int32")


def check_device(name: str, tensor: Tensor, device: torch.device, like: str = "the first argument") -> None:
    require(tensor.device == device, f"{name}: given on {tensor.device}, wanted on {device} as {like}")


def check_number(name: str, value: object) -> None:
    """A plain number. A tensor is refused: as a setting it would silently lose its gradient."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: given {type(value).__name__}, wanted a number")


def check_budget(max_logits_bytes: int | None) -> None:
    if max_logits_bytes is not None and not isinstance(max_logits_bytes, int):
        raise TypeError(f"max_logits_bytes: given {type(max_logits_bytes).__name__}, wanted None or an int")
    require(
        max_logits_bytes is None or max_logits_bytes > 0,
        f"max_logits_bytes: given {max_logits_bytes}, wanted None or a positive number of bytes",
    )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name}: given {value!r}, wanted one of {', '.join(map(repr, choices))}")


def check_scale_and_softcap(prefix: str, logit_scale: float, logit_softcap: float | None) -> None:
    check_number(f"{prefix}logit_scale", logit_scale)
    if logit_softcap is not None:
        check_number(f"{prefix}logit_softcap", logit_softcap)
    require(
        math.isfinite(logit_scale) and logit_scale != 0,
        f"{prefix}logit_scale: given {logit_scale}, wanted a finite number other than 0",
    )
    require(
        logit_softcap is None or (math.isfinite(logit_softcap) and logit_softcap > 0),
        f"{prefix}logit_softcap: given {logit_softcap}, wanted None or a finite number above 0",
    )


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    require(
        math.isfinite(temperature) and temperature > 0,
        f"temperature: given {temperature}, wanted a finite number above 0",
    )


def check_divergence(divergence: str, beta: float, temperature: float, temperature_power: int) -> None:
    check_choice("divergence", divergence, DIVERGENCES)
    check_temperature(temperature)
    require(temperature_power in (0, 2), f"temperature_power: given {temperature_power}, wanted 0 or 2")
    if divergence == "jsd":
        check_number("beta", beta)
        require(
            0 < beta < 1,
            f"beta: given {beta}, wanted 0 < beta < 1 (what others call beta 0 is divergence 'forward', 1 'reverse')",
        )


def check_head(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    max_logits_bytes: int | None,
) -> None:
    """Dtypes, devices and shapes of what makes the student's logits."""
    check_floating("hidden_states", hidden_states)
    check_floating("lm_head_weight", lm_head_weight)
    require(hidden_states.ndim >= 2, f"hidden_states: given shape {tuple(hidden_states.shape)}, wanted (..., T, H)")
    H = hidden_states.shape[-1]
    require(
        lm_head_weight.ndim == 2 and lm_head_weight.shape[1] == H and lm_head_weight.shape[0] > 0,
        f"lm_head_weight: given shape {tuple(lm_head_weight.shape)}, wanted (V, {H}) to match hidden_states",
    )
    check_device("lm_head_weight", lm_head_weight, hidden_states.device)
    autocast = is_autocast_on(hidden_states.device)
    if not autocast and lm_head_weight.dtype != hidden_states.dtype:
        raise TypeError(
            f"lm_head_weight: given {lm_head_weight.dtype}, wanted {hidden_states.dtype} as hidden_states "
            "(outside autocast both must have one dtype)"
        )
    if lm_head_bias is not None:
        check_floating("lm_head_bias", lm_head_bias)
        require(
            lm_head_bias.shape == lm_head_weight.shape[:1],
            f"lm_head_bias: given shape {tuple(lm_head_bias.shape)}, wanted ({lm_head_weight.shape[0]},)",
        )
        check_device("lm_head_bias", lm_head_bias, hidden_states.device)
        if not autocast and lm_head_bias.dtype != hidden_states.dtype:
            raise TypeError(f"lm_head_bias: given {lm_head_bias.dtype}, wanted {hidden_states.dtype} as hidden_states")
    check_scale_and_softcap("", logit_scale, logit_softcap)
    check_budget(max_logits_bytes)


def choose_backend(backend: str, tensor: Tensor, num_perspectives: int = 1) -> str:
    """ "torch" or "triton"; each choice of "auto" is logged once.

    "auto" is "triton" on a GPU where the package is installed, unless the tensor is fp64 or more than MAX_PERSPECTIVES
    rationales are compared with each other.
    """
    chosen = _choose_backend(backend, tensor, num_perspectives)
    if backend == "auto" and not torch.compiler.is_compiling():
        _log_choice(chosen, str(tensor.device), tensor.dtype)
    return chosen


@functools.cache
def _log_choice(chosen: str, device: str, dtype: torch.dtype) -> None:
    logging.getLogger("mind_kernels").info("backend %r for %s on %s", chosen, dtype, device)


def _choose_backend(backend: str, tensor: Tensor, num_perspectives: int) -> str:
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return backend
    on_gpu = tensor.device.type == "cuda"  # HIP devices are called so too
    is_narrow = tensor.dtype != torch.float64
    if backend == "auto":
        fits = num_perspectives <= MAX_PERSPECTIVES
        return "triton" if HAS_TRITON and on_gpu and is_narrow and fits else "torch"
    require(HAS_TRITON, "backend: given 'triton' where the package triton is not installed, wanted 'auto' or 'torch'")
    require(is_narrow, "backend: given 'triton' with torch.float64, wanted bfloat16, float16 or float32 (or 'torch')")
    require(
        on_gpu or os.environ.get("TRITON_INTERPRET") == "1",
        f"backend: given 'triton' with a tensor on {tensor.device}, wanted one on a GPU (or TRITON_INTERPRET=1)",
    )
    require(
        num_perspectives <= MAX_PERSPECTIVES,
        f"answer_index: given K = {num_perspectives} rationales with backend 'triton', wanted at most "
        f"{MAX_PERSPECTIVES} (backend 'auto' or 'torch' has no limit)",
    )
    return backend


def check_labels(shift_labels: Tensor, rows_shape: torch.Size, V: int, ignore_index: int, device: torch.device) -> None:
    check_integer("shift_labels", shift_labels)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: given {type(ignore_index).__name__}, wanted an int")
    require(
        shift_labels.shape == rows_shape,
        f"shift_labels: given shape {tuple(shift_labels.shape)}, wanted {tuple(rows_shape)} as hidden_states has rows",
    )
    check_device("shift_labels", shift_labels, device)
    # On a GPU looking at a label would wait for the device: there an invalid label makes the loss NaN.
    if can_look(shift_labels):
        wrong = (shift_labels != ignore_index) & ((shift_labels < 0) | (shift_labels >= V))
        if bool(wrong.any()):
            row = int(wrong.flatten().nonzero()[0])
            raise ValueError(
                f"shift_labels: given {int(shift_labels.flatten()[row])} at flat row {row}, "
                f"wanted 0 <= label < {V} or ignore_index {ignore_index}"
            )


def resolve_rationales(
    rows_shape: torch.Size, cu_seqlens: Tensor | None, rationale_weights: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:  # (N,) int64, (...), (R,) or (B, K)
    """Both layouts made one: the rationale to which each flat row belongs, and the weights of the R rationales.

    cu_seqlens divides the rows of the packed layout, the leading axes those of the padded one. Losses per rationale are
    returned in the shape of the weights.
    rows: hidden states or logits, for their device and dtype.
    """
    device = rows.device
    if rationale_weights is not None:
        check_floating("rationale_weights", rationale_weights)
        check_device("rationale_weights", rationale_weights, device)
    if cu_seqlens is None:
        lead, T = rows_shape[:-1], rows_shape[-1]
        R = math.prod(lead)
        if rationale_weights is not None:
            require(
                rationale_weights.shape == lead,
                f"rationale_weights: given shape {tuple(rationale_weights.shape)}, "
                f"wanted {tuple(lead)}, the leading axes of hidden_states",
            )
        rationale_id = torch.arange(R, device=device).repeat_interleave(T)
        return rationale_id, _weights_or_mean(rationale_weights, lead, rows)

    check_integer("cu_seqlens", cu_seqlens)
    check_device("cu_seqlens", cu_seqlens, device)
    require(
        len(rows_shape) == 1,
        f"hidden_states: given rows of shape {tuple(rows_shape)} with cu_seqlens, wanted packed rows (N, H)",
    )
    require(
        cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 2,
        f"cu_seqlens: given shape {tuple(cu_seqlens.shape)}, wanted (R + 1,) with R >= 1",
    )
    N, R = rows_shape[0], cu_seqlens.numel() - 1
    lengths = cu_seqlens.diff().long()
    if can_look(cu_seqlens):
        require(
            int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == N and bool((lengths >= 0).all()),
            f"cu_seqlens: given {cu_seqlens[:4].tolist()}…{int(cu_seqlens[-1])}, wanted to rise from 0 to N = {N}",
        )
    if rationale_weights is not None:
        require(
            rationale_weights.numel() == R,
            f"rationale_weights: given shape {tuple(rationale_weights.shape)}, wanted {R}, one for each segment",
        )
    rationale_id = torch.arange(R, device=device).repeat_interleave(lengths, output_size=N)
    return rationale_id, _weights_or_mean(rationale_weights, torch.Size((R,)), rows)


def _weights_or_mean(rationale_weights: Tensor | None, shape: torch.Size, rows: Tensor) -> Tensor:
    if rationale_weights is not None:
        return rationale_weights
    return torch.full(shape, 1 / max(math.prod(shape), 1), dtype=statistics_dtype(rows.dtype), device=rows.device)


def check_question_weights(rationale_weights: Tensor) -> None:
    check_floating("rationale_weights", rationale_weights)
    require(
        rationale_weights.ndim == 2,
        f"rationale_weights: given shape {tuple(rationale_weights.shape)}, wanted (B, K)",
    )


def check_answer_index(answer_index: Tensor, rationale_weights: Tensor, N: int) -> None:
    check_integer("answer_index", answer_index)
    if answer_index.device.type != "cpu":  # where the host can read it, nothing waits for the device
        check_device("answer_index", answer_index, rationale_weights.device)
    require(
        answer_index.ndim == 3 and answer_index.shape[:2] == rationale_weights.shape,
        f"answer_index: given shape {tuple(answer_index.shape)}, "
        f"wanted (B, K, A) with (B, K) = {tuple(rationale_weights.shape)} as rationale_weights",
    )
    if can_look(answer_index):
        present = answer_index[answer_index != -1]
        if bool(((present < 0) | (present >= N)).any()):
            wrong = present[(present < 0) | (present >= N)]
            raise ValueError(f"answer_index: given row {int(wrong[0])}, wanted 0 <= row < {N} or -1 for absent")
        rows, counts = present.unique(return_counts=True)
        if bool((counts > 1).any()):
            raise ValueError(
                f"answer_index: given row {int(rows[counts > 1][0])} more than once, wanted each row at most once"
            )


def check_supervised_index(supervised_index: Tensor | None, shift_labels: Tensor, ignore_index: int) -> None:
    if supervised_index is None:
        return
    check_integer("supervised_index", supervised_index)
    require(
        supervised_index.ndim == 1 and supervised_index.device.type == "cpu",
        f"supervised_index: given shape {tuple(supervised_index.shape)} on {supervised_index.device}, "
        "wanted (n,) on the cpu: it is there so that the host knows",
    )
    if can_look(shift_labels):
        wanted = (shift_labels.flatten() != ignore_index).nonzero().squeeze(1)
        given = supervised_index.sort().values
        if not torch.equal(given, wanted.to(given.dtype)):
            raise ValueError(
                f"supervised_index: given {given.numel()} rows, wanted the {wanted.numel()} rows of shift_labels that "
                f"are not {ignore_index}, each once"
            )


def check_logits_dtype(logits_dtype: torch.dtype | None, hidden_states: Tensor) -> None:
    products = product_dtype(hidden_states)
    wanted = [products] if products in (torch.float32, torch.float64) else [products, torch.float32]
    require(
        logits_dtype is None or logits_dtype in wanted,
        f"logits_dtype: given {logits_dtype}, wanted None or {' or '.join(map(str, wanted))} "
        f"for products in {products}",
    )


def resolve_num_questions(num_questions: int | Tensor | None, B: int) -> float | Tensor:
    if num_questions is None:
        return float(max(B, 1))
    if isinstance(num_questions, Tensor):
        require(
            num_questions.ndim == 0,
            f"num_questions: given shape {tuple(num_questions.shape)}, wanted an int or a 0-d tensor",
        )
        if not can_look(num_questions):
            return num_questions
    elif torch.compiler.is_compiling() and isinstance(num_questions, int):  # it may be symbolic: no text is made of it
        require(num_questions > 0, "num_questions: wanted a number above 0")
        return num_questions
    else:
        check_number("num_questions", num_questions)
    value = float(num_questions)
    require(value > 0 and math.isfinite(value), f"num_questions: given {value}, wanted a number above 0")
    return value
