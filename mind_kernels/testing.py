"""What tests and benchmarks share: random cases, and the one rule of tolerance."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mind_kernels.teachers import Teacher, TeacherHidden, TeacherLogits, TeacherTopK


@dataclass
class MindCase:
    """The arguments of one mind_loss call, padded layout."""

    hidden_states: Tensor  # (B, K, T, H)
    lm_head_weight: Tensor  # (V, H)
    lm_head_bias: Tensor  # (V,)
    shift_labels: Tensor  # (B, K, T)
    rationale_weights: Tensor  # (B, K)
    answer_index: Tensor  # (B, K, A)

    def packed(self) -> MindCase:
        """The same rows as (N, H) with cu_seqlens = arange(0, N + 1, T)."""
        H = self.hidden_states.shape[-1]
        return MindCase(
            self.hidden_states.reshape(-1, H),
            self.lm_head_weight,
            self.lm_head_bias,
            self.shift_labels.reshape(-1),
            self.rationale_weights,
            self.answer_index,
        )

    def cu_seqlens(self) -> Tensor:
        B, K, T = self.shift_labels.shape
        return torch.arange(B * K + 1, dtype=torch.int32, device=self.shift_labels.device) * T

    def to(self, dtype: torch.dtype) -> MindCase:
        """Floating tensors as fresh leaves of this dtype; rounding to it is part of the case, not of the error."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype, copy=True).requires_grad_()

        return MindCase(
            leaf(self.hidden_states),
            leaf(self.lm_head_weight),
            leaf(self.lm_head_bias),
            self.shift_labels,
            self.rationale_weights.detach().clone().requires_grad_(),
            self.answer_index,
        )

    def leaves(self) -> dict[str, Tensor]:
        return {
            "hidden_states": self.hidden_states,
            "lm_head_weight": self.lm_head_weight,
            "lm_head_bias": self.lm_head_bias,
            "rationale_weights": self.rationale_weights,
        }


def random_case(
    B: int,
    K: int,
    T: int,
    H: int,
    V: int,
    A: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> MindCase:
    """Logits of order 1, a third of the rows unsupervised, weight 0 and an absent rationale where K allows."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, V, (B, K, T), generator=generator)
    labels[..., : T // 3] = -100
    weights = torch.rand(B, K, generator=generator, dtype=torch.float64) + 0.1
    answer_index = torch.arange(B * K).view(B, K, 1) * T + torch.arange(T - A, T)
    if K > 1:
        weights[0, 1] = 0
    if K > 2:
        labels[-1, 2] = -100
        weights[-1, 2] = 0
        answer_index[-1, 2] = -1
    weights = (weights / weights.sum(-1, keepdim=True)).float()
    case = MindCase(randn(B, K, T, H), randn(V, H) * H**-0.5, randn(V) * 0.1, labels, weights, answer_index)
    for name, tensor in vars(case).items():
        cast = tensor.to(dtype) if tensor.dtype == torch.float64 else tensor
        setattr(case, name, cast.to(device))
    return case


def random_teacher(kind: str, case: MindCase, *, seed: int = 1) -> Teacher:
    """kind: "hidden", "logits", "topk" (tail bucket, one padded entry a row) or "topk-renormalize"."""
    generator = torch.Generator().manual_seed(seed)
    rows, V = case.shift_labels.shape, case.lm_head_weight.shape[0]
    dtype, device = case.hidden_states.dtype, case.hidden_states.device

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    if kind == "hidden":
        return TeacherHidden(randn(*rows, 5), randn(V, 5), lm_head_bias=randn(V), logit_scale=0.7, logit_softcap=4.0)
    if kind == "logits":
        return TeacherLogits(randn(*rows, V))
    logprobs, token_ids = torch.log_softmax(randn(*rows, V).double(), -1).topk(min(4, V))
    logprobs = logprobs - 1e-3  # so that bf16 rounding cannot push the sum over 1
    if logprobs.shape[-1] > 1:
        logprobs[..., -1], token_ids[..., -1] = -torch.inf, -1
    tail = "renormalize" if kind == "topk-renormalize" else "bucket"
    return TeacherTopK(token_ids, logprobs.to(dtype), tail=tail)


def relative_error(given: Tensor, exact: Tensor) -> float:
    """‖given − exact‖ / ‖exact‖ in fp64 (the absolute error where exact is 0)."""
    given, exact = given.detach().double(), exact.detach().double()
    difference, size = torch.linalg.vector_norm(given - exact), torch.linalg.vector_norm(exact)
    return float(difference / size) if size > 0 else float(difference)


def assert_as_good_as_plain(
    name: str, given: Tensor, plain: Tensor, exact: Tensor, *, factor: float, floor: float
) -> None:
    """The rule of tolerance: error ≤ factor × the error of same-dtype PyTorch + floor, both against fp64.

    Where same-dtype PyTorch overflows it is no measure, and the floor alone must do.
    """
    assert given.shape == exact.shape, f"{name}: shape {tuple(given.shape)}, wanted {tuple(exact.shape)}"
    plain_error = relative_error(plain, exact)
    error, allowed = relative_error(given, exact), floor + (factor * plain_error if math.isfinite(plain_error) else 0)
    assert error <= allowed, f"{name}: relative error {error:.3e}, wanted at most {allowed:.3e}"


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """Peak resident memory of this process during function() above what it held before, in bytes (Linux).

    The kernel's high-water mark is reset first, so inputs and earlier peaks do not count. A page counts when it is
    touched, also a library's own code: call function() once before, where up to 16 MiB of that matter.
    """

    def status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    # glibc keeps up to 64 MiB of freed memory resident, which function() would be given without a trace.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS:")
    result = function()
    peak = status("VmHWM:")
    del result
    return peak - before


def repair_interpreter() -> None:
    """Two repairs of Triton's interpreter: loop bounds read from memory (with NumPy 2.4) and products of bf16.

    It takes a scalar's array of one element for a number, which NumPy no longer does, and multiplies the bits of bf16
    as integers. Source: github.com/triton-lang/triton/issues/9171.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def widened(operand: Any) -> Any:
        if operand.dtype != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *more: dot(self, widened(a), widened(b), *more)
