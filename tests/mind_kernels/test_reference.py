"""Every operation, dtype, layout and teacher against the fp64 reference: losses and every gradient, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mind_kernels import (
    answer_consistency,
    fused_linear_cross_entropy,
    fused_linear_kl,
    mind_loss,
    multi_rationale_log_softmax,
    ta_weighted_kl,
)
from mind_kernels.combined.reference import reference_mind_loss
from mind_kernels.consistency.reference import reference_answer_consistency
from mind_kernels.cross_entropy.reference import reference_linear_cross_entropy
from mind_kernels.kl.reference import reference_kl
from mind_kernels.linear_kl.reference import reference_linear_kl
from mind_kernels.log_softmax.reference import reference_log_softmax
from mind_kernels.teachers import Teacher, TeacherHidden, TeacherLogits, TeacherTopK
from mind_kernels.testing import MindCase, assert_as_good_as_plain, random_case, random_teacher

# (B, K, T, H, V, A), each with its reason
SHAPES = {
    "aligned-B2-K4-T16-H32-V128": (2, 4, 16, 32, 128, 4),
    "ragged-B3-K3-T7-H13-V41": (3, 3, 7, 13, 41, 2),
    "one-row-B1-K1-T1-H5-V11": (1, 1, 1, 5, 11, 1),
    "eight-perspectives-B2-K8-T9-H16-V50": (2, 8, 9, 16, 50, 3),
    "real-vocabulary-B1-K2-T6-H24-V49152": (1, 2, 6, 24, 49152, 2),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# What rounding alone may cost when same-dtype PyTorch happens to be exact: one rounding of the result.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
TEACHERS = ["hidden", "logits", "topk", "topk-renormalize"]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cast_teacher(teacher: Teacher, dtype: torch.dtype) -> Teacher:
    if isinstance(teacher, TeacherHidden):
        assert teacher.lm_head_bias is not None
        return TeacherHidden(
            teacher.hidden_states.to(dtype),
            teacher.lm_head_weight.to(dtype),
            teacher.lm_head_bias.to(dtype),
            teacher.logit_scale,
            teacher.logit_softcap,
        )
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.logits.to(dtype))
    return TeacherTopK(teacher.token_ids, teacher.logprobs.to(dtype), tail=teacher.tail)


def pack_teacher(teacher: Teacher) -> Teacher:
    if isinstance(teacher, TeacherHidden):
        return TeacherHidden(
            teacher.hidden_states.flatten(0, -2),
            teacher.lm_head_weight,
            teacher.lm_head_bias,
            teacher.logit_scale,
            teacher.logit_softcap,
        )
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.logits.flatten(0, -2))
    return TeacherTopK(teacher.token_ids.flatten(0, -2), teacher.logprobs.flatten(0, -2), tail=teacher.tail)


def results(outputs: tuple[Tensor, ...], names: tuple[str, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named outputs and the gradients of the first by every leaf it depends on."""
    gradients = torch.autograd.grad(outputs[0], list(leaves.values()), allow_unused=True)
    found = dict(zip(names, (output.detach() for output in outputs), strict=True))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert gradient is not None, f"grad_{name} is missing"
        found[f"grad_{name}"] = gradient
    return found


def check(given: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert given.keys() == exact.keys()
    for name in exact:
        assert_as_good_as_plain(name, given[name], plain[name], exact[name], factor=1.5, floor=FLOOR[dtype])


def run(function: Any, case: MindCase, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """function(case) in dtype. The weights α stay fp32 as in training, but for the fp64 reference."""
    cast = case.to(dtype)
    if dtype == torch.float64:
        cast.rationale_weights = cast.rationale_weights.detach().double().requires_grad_()
    outputs = function(cast)
    return results(outputs if isinstance(outputs, tuple) else (outputs,), names, cast.leaves())


def compare(fused: Any, reference: Any, shape: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
    case = random_case(*SHAPES[shape], dtype=dtype)
    exact = run(reference, case, names, torch.float64)
    plain = run(reference, case, names, dtype)
    check(run(fused, case, names, dtype), plain, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(shape: str, dtype: torch.dtype, layout: str, reduction: str) -> None:
    head = {"logit_scale": 1.3, "logit_softcap": 5.0, "reduction": reduction}

    def call(function: Any) -> Any:
        def on(case: MindCase) -> Any:
            cu_seqlens = case.cu_seqlens() if layout == "packed" else None
            rows = case.packed() if layout == "packed" else case
            return function(
                rows.hidden_states,
                rows.lm_head_weight,
                rows.shift_labels,
                rationale_weights=case.rationale_weights,
                cu_seqlens=cu_seqlens,
                lm_head_bias=case.lm_head_bias,
                **head,
            )

        return on

    names = ("loss", "rationale_losses")
    compare(call(fused_linear_cross_entropy), call(reference_linear_cross_entropy), shape, names, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_linear_kl(kind: str, divergence: str, temperature: float, dtype: torch.dtype) -> None:
    if kind == "topk" and temperature != 1:
        with pytest.raises(ValueError, match=r"temperature: given 2.0 with tail='bucket', wanted 1"):
            compare_linear_kl(kind, divergence, temperature, dtype)
    else:
        compare_linear_kl(kind, divergence, temperature, dtype)


def compare_linear_kl(kind: str, divergence: str, temperature: float, dtype: torch.dtype) -> None:
    def call(function: Any) -> Any:
        def on(case: MindCase) -> Any:
            teacher = cast_teacher(
                random_teacher(kind, random_case(*SHAPES[shape], dtype=dtype)), case.hidden_states.dtype
            )
            return function(
                case.hidden_states,
                case.lm_head_weight,
                teacher,
                case.shift_labels,
                rationale_weights=case.rationale_weights,
                divergence=divergence,
                beta=0.3,
                temperature=temperature,
                lm_head_bias=case.lm_head_bias,
                logit_softcap=6.0,
            )

        return on

    for shape in ("ragged-B3-K3-T7-H13-V41", "aligned-B2-K4-T16-H32-V128"):
        compare(call(fused_linear_kl), call(reference_linear_kl), shape, ("loss", "rationale_losses"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_ta_weighted_kl(kind: str, divergence: str, dtype: torch.dtype) -> None:
    def call(function: Any) -> Any:
        def on(case: MindCase) -> Any:
            dtype_of = case.hidden_states.dtype
            teacher = cast_teacher(random_teacher(kind, random_case(*SHAPES[shape], dtype=dtype)), dtype_of)
            # The case's hidden states stand for logits; the head only keeps the leaves in the graph.
            logits = torch.cat([case.hidden_states] * 4, -1)[..., : case.lm_head_weight.shape[0]]
            loss, losses = function(
                logits, teacher, case.rationale_weights, shift_labels=case.shift_labels, divergence=divergence, beta=0.6
            )
            return loss + 0 * case.lm_head_weight.sum() + 0 * case.lm_head_bias.sum(), losses

        return on

    shape = "aligned-B2-K4-T16-H32-V128"
    compare(call(ta_weighted_kl), call(reference_kl), shape, ("loss", "rationale_losses"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not shape.startswith("one-row")])
def test_answer_consistency(shape: str, dtype: torch.dtype) -> None:
    def call(function: Any) -> Any:
        def on(case: MindCase) -> Any:
            return function(
                case.hidden_states,
                case.lm_head_weight,
                case.answer_index,
                case.rationale_weights,
                lm_head_bias=case.lm_head_bias,
                logit_scale=2.0,
                num_questions=5,
            )

        return on

    compare(call(answer_consistency), call(reference_answer_consistency), shape, ("loss",), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", [None, *TEACHERS])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunks", ["one-chunk", "many-chunks"])
def test_mind_loss(
    kind: str | None, dtype: torch.dtype, layout: str, chunks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunks == "one-chunk":  # and a teacher's hidden states reach its head in four parts
        monkeypatch.setattr("mind_kernels.chunking.PART_ROWS", 1)

    def call(function: Any, **more: Any) -> Any:
        def on(case: MindCase) -> Any:
            teacher = None
            if kind is not None:
                teacher = cast_teacher(
                    random_teacher(kind, random_case(*SHAPES[shape], dtype=dtype)), case.hidden_states.dtype
                )
            rows, cu_seqlens = case, None
            if layout == "packed":
                rows, cu_seqlens = case.packed(), case.cu_seqlens()
                teacher = None if teacher is None else pack_teacher(teacher)
            return tuple(
                function(
                    rows.hidden_states,
                    rows.lm_head_weight,
                    rows.shift_labels,
                    rationale_weights=case.rationale_weights,
                    cu_seqlens=cu_seqlens,
                    answer_index=case.answer_index,
                    teacher=teacher,
                    lm_head_bias=case.lm_head_bias,
                    logit_scale=0.8,
                    logit_softcap=5.0,
                    consistency_weight=0.7,
                    kl_weight=0.0 if teacher is None else 0.4,
                    divergence="jsd",
                    beta=0.4,
                    num_questions=3,
                    **more,
                )
            )

        return on

    names = ("loss", "cross_entropy", "consistency", "kl", "rationale_losses")
    for shape in ("ragged-B3-K3-T7-H13-V41", "eight-perspectives-B2-K8-T9-H16-V50"):
        _, K, _, _, V, _ = SHAPES[shape]
        row_bytes = V * dtype.itemsize * (2 if kind == "hidden" else 1)
        budget = K * row_bytes if chunks == "many-chunks" else None  # a whole answer position must fit
        compare(call(mind_loss, max_logits_bytes=budget), call(reference_mind_loss), shape, names, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_log_softmax(temperature: float, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(3, 8, 101, generator=torch.Generator().manual_seed(0))).to(dtype)
    upstream = torch.randn(3, 8, 101, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(function: Any, z: Tensor) -> dict[str, Tensor]:
        z = z.clone().requires_grad_()
        log_probs = function(z, temperature=temperature)
        (gradient,) = torch.autograd.grad((log_probs * upstream.to(z.dtype)).sum(), z)
        return {"log_probs": log_probs.detach(), "grad_logits": gradient}

    given = run(multi_rationale_log_softmax, logits)
    assert given["log_probs"].dtype == dtype
    check(given, run(reference_log_softmax, logits), run(reference_log_softmax, logits.double()), dtype)
