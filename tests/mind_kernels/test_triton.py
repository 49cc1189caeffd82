"""Every Triton kernel and every public function with backend="triton" against the fp64 reference.

On a GPU the kernels run there; without one, in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mind_kernels import (
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    answer_consistency,
    fused_linear_cross_entropy,
    fused_linear_kl,
    mind_loss,
    multi_rationale_log_softmax,
    ta_weighted_kl,
)
from mind_kernels.chunking import Scratch
from mind_kernels.combined.reference import reference_mind_loss
from mind_kernels.consistency.reference import reference_answer_consistency
from mind_kernels.consistency.triton_path import pairwise_jsd
from mind_kernels.cross_entropy.reference import reference_linear_cross_entropy
from mind_kernels.cross_entropy.triton_path import PairGradient, cross_entropy_
from mind_kernels.divergences import pairwise_jsd_and_gradient
from mind_kernels.kl.reference import reference_kl
from mind_kernels.linear_kl.reference import reference_linear_kl
from mind_kernels.linear_kl.triton_path import dense_kl_, topk_kl_
from mind_kernels.log_softmax.reference import reference_log_softmax
from mind_kernels.teacher_rows import KLOptions, topk_divergence
from mind_kernels.teachers import Teacher
from mind_kernels.testing import MindCase, assert_as_good_as_plain, random_case, random_teacher, relative_error
from mind_kernels.triton_math import log2_1p, quick_tanh, tanh
from mind_kernels.triton_multiply import BLOCK, MOST_PROGRAMS, multiply_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (B, K, T, H, V, A), each with its reason
SHAPES = {
    "ragged-B2-K3-T4-H13-V41": (2, 3, 4, 13, 41, 2),
    "one-row-B1-K1-T1-H5-V11": (1, 1, 1, 5, 11, 1),
    "three-tiles-B1-K2-T2-H6-V20001": (1, 2, 2, 6, 20_001, 1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result. The interpreter cuts bf16 off where a GPU rounds: twice the error.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3, torch.float16: 1e-3}
TEACHERS = ["hidden", "logits", "topk", "topk-renormalize"]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE)


def close(name: str, given: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of dtype, norms compared."""
    error, allowed = relative_error(given, exact), 4 * FLOOR[dtype]
    assert error <= allowed, f"{name}: relative error {error:.2e}, wanted at most {allowed:.2e}"


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def functions_kernel(x_ptr, out_ptr, NAME: tl.constexpr):
    o = tl.program_id(0) * 512 + tl.arange(0, 512)
    x = tl.load(x_ptr + o)
    if NAME == "log2_1p":
        y = log2_1p(x)
    elif NAME == "tanh":
        y = tanh(x)
    else:
        y = quick_tanh(x)
    tl.store(out_ptr + o, y)


def values(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    functions_kernel[(len(x) // 512,)](x, out, NAME=name)
    x = x.double()
    return out.double(), torch.log1p(x) / math.log(2) if name == "log2_1p" else x.tanh()


def test_the_logarithm_of_the_divergences() -> None:
    """Its relative error, down to the smallest w: an absolute one would be no digits of a small divergence."""
    w = torch.cat([torch.linspace(0, 1, 3584), torch.logspace(-37, 0, 512)]).to(DEVICE)
    given, wanted = values("log2_1p", w)
    assert given[0] == 0
    assert float((given[1:] / wanted[1:] - 1).abs().max()) < 2.5e-7


def test_the_soft_cap() -> None:
    """Of fp32 logits with the digits of a small one, of 16-bit logits to 1e-6; both end at ±1."""
    ends = torch.tensor([0.0, torch.inf, -torch.inf, 88.0, -88.0, 500.0, -500.0, 3e38])
    x = torch.cat([torch.linspace(-12, 12, 3832), torch.logspace(-30, 2, 256), ends]).to(DEVICE)
    given, wanted = values("tanh", x)
    assert float((given - wanted).abs().where(wanted == 0, (given / wanted - 1).abs()).max()) < 1e-6
    given, wanted = values("quick_tanh", x)
    assert float((given - wanted).abs().max()) < 1.2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("n", [1, BLOCK, 2 * BLOCK + 17])
@pytest.mark.parametrize("programs", [1, MOST_PROGRAMS])
def test_multiply_kernel(n: int, programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mind_kernels.triton_multiply.MOST_PROGRAMS", programs)
    x = randn(n).to(dtype)
    for factor in (1.0, -2.0, 0.3, 0.0, math.nan):
        given = torch.tensor(factor, device=DEVICE)
        wanted, result = (x.float() * given).to(dtype), x.clone()
        multiply_(result, given)
        close(f"times {factor}", result.nan_to_num(7.0), wanted.nan_to_num(7.0), dtype)
        if factor in (1.0, -2.0, 0.0):
            assert torch.equal(result, wanted)


def head(u: Tensor, scale: float, softcap: float | None) -> Tensor:
    return scale * u if softcap is None else softcap * torch.tanh(scale * u / softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("m", "V"), [(3, 41), (2, 20_001), (1, 1)], ids=lambda n: str(n))
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("with_pairs", [False, True], ids=["plain", "pairs"])
def test_cross_entropy_kernel(m: int, V: int, dtype: torch.dtype, softcap: float | None, with_pairs: bool) -> None:
    z = randn(m, V, scale=3.0).to(dtype)
    labels, coefficient = torch.arange(m, device=DEVICE) * 7 % V, randn(m, seed=1).float()
    pairs = PairGradient(randn(m, V, seed=2).float(), randn(m, seed=3).float()) if with_pairs else None
    u = z.double().requires_grad_()
    final = head(u, 1.3, softcap)
    exact = F.cross_entropy(final, labels, reduction="none")
    (wanted,) = torch.autograd.grad((exact * coefficient).sum(), u, retain_graph=True)
    if pairs is not None:
        d_pairs = 0.5 * torch.softmax(final, -1) * (pairs.sum - pairs.mean.unsqueeze(-1))
        wanted = wanted + torch.autograd.grad(final, u, d_pairs)[0]
    loss = torch.empty(m, device=DEVICE)
    arguments: dict[str, Any] = {"logit_scale": 1.3, "logit_softcap": softcap, "pairs": pairs}
    before = z.clone()
    cross_entropy_(z, z, labels, coefficient, loss, **arguments, needs_gradient=False)
    assert torch.equal(z, before), "a forward-only row was written to"
    close("loss", loss, exact.detach(), torch.float32)
    apart = torch.full_like(z, math.nan, dtype=torch.bfloat16)
    cross_entropy_(z, apart, labels, coefficient, loss, **arguments, needs_gradient=True)
    assert torch.equal(z, before), "the gradient has a buffer of its own"
    close("gradient apart", apart, wanted, torch.bfloat16)
    cross_entropy_(z, z, labels, coefficient, loss, **arguments, needs_gradient=True)
    close("loss", loss, exact.detach(), torch.float32)
    close("gradient", z, wanted, dtype)


def test_cross_entropy_kernel_marks_an_invalid_label() -> None:
    z, loss = randn(3, 10).float(), torch.empty(3, device=DEVICE)
    labels = torch.tensor([-5, 10, 9], device=DEVICE)
    cross_entropy_(
        z, z, labels, torch.ones_like(loss), loss, logit_scale=1.0, logit_softcap=None, pairs=None, needs_gradient=True
    )
    assert loss.isnan().tolist() == [True, True, False] and z[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("V", "V_shared"), [(41, 41), (41, 33), (9000, 8997)], ids=["whole", "cut", "tiles"])
def test_dense_kl_kernel(divergence: str, temperature: float, V: int, V_shared: int, dtype: torch.dtype) -> None:
    m = 3 if V < 100 else 1
    z, t = randn(5, V, scale=2.0).to(dtype), randn(4, V_shared + 2, seed=1, scale=2.0).to(dtype)
    if divergence != "reverse":
        t[:, 3] = -math.inf
    rows, teacher_rows = torch.tensor([4, 0, 2], device=DEVICE)[:m], torch.tensor([1, 3, 0], device=DEVICE)[:m]
    labels = torch.tensor([40, 0, 17], device=DEVICE)[:m]
    coefficient, kl_coefficient = randn(m, seed=2).float(), randn(m, seed=3).float()
    options = KLOptions(divergence, 0.3, temperature)
    u = z[rows].double().requires_grad_()
    final = head(u, 0.9, 5.0)
    teacher = TeacherLogits(t[teacher_rows].double(), vocab_size=V_shared)
    kl = torch.stack(
        [
            reference_kl(
                final[n : n + 1],
                TeacherLogits(teacher.logits[n : n + 1], vocab_size=V_shared),
                divergence=divergence,
                beta=0.3,
                temperature=temperature,
            )[0]
            for n in range(m)
        ]
    )
    cross_entropy = F.cross_entropy(final, labels, reduction="none")
    wanted = torch.autograd.grad((kl * kl_coefficient).sum() + (cross_entropy * coefficient).sum(), u)[0]
    loss, kl_loss, untouched = torch.empty(m, device=DEVICE), torch.empty(m, device=DEVICE), z.clone()
    arguments = (t, teacher_rows, labels, coefficient, kl_coefficient, loss, kl_loss, options)
    settings: dict[str, Any] = {"V_shared": V_shared, "logit_scale": 0.9, "logit_softcap": 5.0}
    apart = torch.full_like(z, math.nan, dtype=torch.bfloat16)
    dense_kl_(z, rows, apart, *arguments, **settings, needs_gradient=True)
    assert torch.equal(z, untouched), "the gradient has a buffer of its own"
    close("gradient apart", apart[rows], wanted, torch.bfloat16)
    dense_kl_(z, rows, z, *arguments, **settings, needs_gradient=True)
    close("cross_entropy", loss, cross_entropy.detach(), torch.float32)
    close("kl", kl_loss, kl.detach(), torch.float32)
    close("gradient", z[rows], wanted, dtype)
    others = [n for n in range(5) if n not in rows.tolist()]
    assert torch.equal(z[others], untouched[others])


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_topk_kernels(divergence: str, tail: str) -> None:
    z = randn(3, 41, scale=2.0).float()
    log_probs, ids = torch.log_softmax(randn(3, 41, seed=1, scale=2.0), -1).topk(5)
    log_probs[1, 3:], ids[1, 3:] = -math.inf, -7
    labels = torch.stack([ids[0, 2], ids[1, 0], torch.tensor(40, device=DEVICE)])  # listed, listed, not listed
    coefficient, kl_coefficient, options = randn(3, seed=2).float(), randn(3, seed=3).float(), KLOptions(divergence)
    u = z.double().requires_grad_()
    final = head(u, -1.1, 4.0)
    cross_entropy = F.cross_entropy(final, labels, reduction="none")
    kl, d_kl = topk_divergence(
        final.detach(), ids, log_probs, tail, options, True, Scratch(3, 41, torch.float64, final.device)
    )
    assert d_kl is not None
    d_final = d_kl * kl_coefficient.unsqueeze(-1)
    (wanted,) = torch.autograd.grad(
        [(cross_entropy * coefficient).sum(), final], u, [torch.ones((), device=DEVICE), d_final]
    )
    loss, kl_loss = torch.empty(3, device=DEVICE), torch.empty(3, device=DEVICE)
    apart = torch.full_like(z, math.nan, dtype=torch.bfloat16)
    for d in (apart, z):
        topk_kl_(
            z.clone() if d is apart else z,
            d,
            ids,
            log_probs.float(),
            tail,
            labels,
            coefficient,
            kl_coefficient,
            loss,
            kl_loss,
            options,
            logit_scale=-1.1,
            logit_softcap=4.0,
            needs_gradient=True,
        )
    close("gradient apart", apart, wanted, torch.bfloat16)
    close("cross_entropy", loss, cross_entropy.detach(), torch.float32)
    close("kl", kl_loss, kl, torch.float32)
    close("gradient", z, wanted, torch.float32)


@pytest.mark.parametrize(("K", "V"), [(2, 300), (3, 70), (8, 70), (7, 129)], ids=lambda n: str(n))
def test_pairs_kernel(K: int, V: int) -> None:
    """Two positions, one with an absent rationale; several tiles of V."""
    filled = {2: 2, 3: 4, 8: 8, 7: 8}[K]
    present = [list(range(K)), [k for k in range(K) if k != 1]]
    z = randn(2 * K - 1, V, scale=2.0).float()
    table = torch.full((2, filled), -1, device=DEVICE)
    table[0, :K] = torch.arange(K, device=DEVICE)
    table[1, present[1]] = torch.arange(K, 2 * K - 1, device=DEVICE)
    entries = torch.tensor([k for k in present[0]] + [filled + k for k in present[1]], device=DEVICE)
    weights = randn(1, filled, filled, seed=1).float().abs()
    weights = weights + weights.mT
    questions = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    jsd, pairs = pairwise_jsd(
        z, table, entries, questions, weights, logit_scale=1.2, logit_softcap=None, needs_gradient=True
    )
    assert pairs is not None
    given = 0.5 * torch.softmax(1.2 * z.double(), -1) * (pairs.sum - pairs.mean.unsqueeze(-1))
    for position, (rows, members) in enumerate(zip((z[:K], z[K:]), present, strict=True)):
        log_probs = torch.log_softmax(1.2 * rows.double(), -1)
        exact, wanted = pairwise_jsd_and_gradient(log_probs, weights[0][members][:, members].double())
        assert wanted is not None
        if len(members) > 1:
            close("jsd", jsd[position][members][:, members], exact.triu(1), torch.float32)
            close("gradient", given[:K] if position == 0 else given[K:], wanted, torch.float32)
        assert not jsd[position].tril().any(), "only i < j is written"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "S"), [((2, 3, 41), 4), ((1, 2, 20_001), 1)], ids=["ragged", "tiles"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("selected", [False, True], ids=["all", "selected"])
def test_log_softmax(shape: tuple[int, ...], S: int, dtype: torch.dtype, temperature: float, selected: bool) -> None:
    logits = randn(*shape, scale=3.0).to(dtype)
    ids = (torch.arange(shape[0] * shape[1] * S, device=DEVICE) * 13 % shape[2]).view(*shape[:2], S)
    token_ids = ids if selected else None
    upstream = randn(*shape[:2], S if selected else shape[2], seed=1)

    def run(function: Any, z: Tensor, **more: Any) -> dict[str, Tensor]:
        z = z.clone().requires_grad_()
        log_probs = function(z, temperature=temperature, token_ids=token_ids, **more)
        (gradient,) = torch.autograd.grad((log_probs * upstream.to(z.dtype)).sum(), z)
        return {"log_probs": log_probs.detach(), "grad_logits": gradient}

    exact, plain = run(reference_log_softmax, logits.double()), run(reference_log_softmax, logits)
    given = run(multi_rationale_log_softmax, logits, backend="triton")
    assert given["log_probs"].dtype == given["grad_logits"].dtype == dtype
    for name in exact:
        assert_as_good_as_plain(name, given[name], plain[name], exact[name], factor=1.5, floor=FLOOR[dtype])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(2, 0, 41), (0, 3, 41)], ids=["no-rationale", "no-position"])
def test_log_softmax_of_nothing_is_empty(shape: tuple[int, ...], backend: str) -> None:
    logits = torch.zeros(shape, device=DEVICE, requires_grad=True)
    for ids in (None, torch.zeros(*shape[:2], 4, dtype=torch.int64, device=DEVICE)):
        log_probs = multi_rationale_log_softmax(logits, token_ids=ids, backend=backend)
        assert log_probs.shape == (shape if ids is None else ids.shape)
        assert torch.autograd.grad(log_probs.sum(), logits)[0].shape == shape


def test_log_softmax_has_no_second_derivative() -> None:
    logits = randn(2, 3, 41).float().requires_grad_()
    log_probs = multi_rationale_log_softmax(logits, backend="triton")
    with pytest.raises(RuntimeError, match=r"given create_graph=True, wanted False: there is no second derivative"):
        torch.autograd.grad(log_probs.sum(), logits, create_graph=True)


# --- public functions --------------------------------------------------------------------------------------------


def cast_teacher(teacher: Teacher, dtype: torch.dtype) -> Teacher:
    if isinstance(teacher, TeacherHidden):
        assert teacher.lm_head_bias is not None
        tensors = (teacher.hidden_states, teacher.lm_head_weight, teacher.lm_head_bias)
        return TeacherHidden(*(tensor.to(dtype) for tensor in tensors), teacher.logit_scale, teacher.logit_softcap)
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.logits.to(dtype))
    return TeacherTopK(teacher.token_ids, teacher.logprobs.to(dtype), tail=teacher.tail)


def compare(call: Any, fused: Any, reference: Any, shape: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
    """call(function, case, **more) for the fp64 reference, for the reference in dtype and for the kernels."""
    rounded = random_case(*SHAPES[shape], dtype=dtype, device=DEVICE)

    def run(function: Any, of: torch.dtype, **more: Any) -> dict[str, Tensor]:
        case = rounded.to(of)
        if of == torch.float64:
            case.rationale_weights = case.rationale_weights.detach().double().requires_grad_()
        outputs = call(function, case, **more)
        leaves = case.leaves()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs[0], list(leaves.values()), allow_unused=True, materialize_grads=True)
        found = dict(zip(names, (output.detach() for output in outputs), strict=True))
        return found | {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    exact, plain, given = run(reference, torch.float64), run(reference, dtype), run(fused, dtype, backend="triton")
    for name in exact:
        assert_as_good_as_plain(name, given[name], plain[name], exact[name], factor=1.5, floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_cross_entropy(shape: str, dtype: torch.dtype) -> None:
    def call(function: Any, case: MindCase, **more: Any) -> Any:
        return function(
            case.hidden_states,
            case.lm_head_weight,
            case.shift_labels,
            rationale_weights=case.rationale_weights,
            lm_head_bias=case.lm_head_bias,
            logit_scale=1.3,
            logit_softcap=5.0,
            **more,
        )

    names = ("loss", "rationale_losses")
    compare(call, fused_linear_cross_entropy, reference_linear_cross_entropy, shape, names, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_linear_kl(kind: str, divergence: str, dtype: torch.dtype) -> None:
    shape = "ragged-B2-K3-T4-H13-V41"

    def call(function: Any, case: MindCase, **more: Any) -> Any:
        return function(
            case.hidden_states,
            case.lm_head_weight,
            cast_teacher(
                random_teacher(kind, random_case(*SHAPES[shape], dtype=dtype, device=DEVICE)), case.hidden_states.dtype
            ),
            case.shift_labels,
            rationale_weights=case.rationale_weights,
            divergence=divergence,
            beta=0.3,
            temperature=1.0 if kind == "topk" else 2.0,
            lm_head_bias=case.lm_head_bias,
            logit_softcap=6.0,
            **more,
        )

    compare(call, fused_linear_kl, reference_linear_kl, shape, ("loss", "rationale_losses"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", TEACHERS)
def test_ta_weighted_kl(kind: str, dtype: torch.dtype) -> None:
    shape = "ragged-B2-K3-T4-H13-V41"

    def call(function: Any, case: MindCase, **more: Any) -> Any:
        # The case's hidden states stand for logits; the head only keeps the leaves in the graph.
        teacher = cast_teacher(
            random_teacher(kind, random_case(*SHAPES[shape], dtype=dtype, device=DEVICE)), case.hidden_states.dtype
        )
        logits = torch.cat([case.hidden_states] * 4, -1)[..., :41]
        loss, losses = function(logits, teacher, case.rationale_weights, shift_labels=case.shift_labels, **more)
        return loss + 0 * case.lm_head_weight.sum() + 0 * case.lm_head_bias.sum(), losses

    compare(call, ta_weighted_kl, reference_kl, shape, ("loss", "rationale_losses"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_answer_consistency(dtype: torch.dtype) -> None:
    def call(function: Any, case: MindCase, **more: Any) -> Any:
        return function(
            case.hidden_states,
            case.lm_head_weight,
            case.answer_index,
            case.rationale_weights,
            lm_head_bias=case.lm_head_bias,
            logit_scale=2.0,
            num_questions=5,
            **more,
        )

    shape = "ragged-B2-K3-T4-H13-V41"
    compare(call, answer_consistency, reference_answer_consistency, shape, ("loss",), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", [None, *TEACHERS])
@pytest.mark.parametrize("chunks", ["one-chunk", "many-chunks"])
def test_mind_loss(kind: str | None, dtype: torch.dtype, chunks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunks == "one-chunk":  # and a teacher's hidden states reach its head in four parts
        monkeypatch.setattr("mind_kernels.chunking.PART_ROWS", 1)
    shape = "ragged-B2-K3-T4-H13-V41"
    _, K, _, _, V, _ = SHAPES[shape]

    def call(function: Any, case: MindCase, **more: Any) -> Any:
        teacher = None
        if kind is not None:
            made_in = random_case(*SHAPES[shape], dtype=dtype, device=DEVICE)
            teacher = cast_teacher(random_teacher(kind, made_in), case.hidden_states.dtype)
        if more and chunks == "many-chunks":
            more["max_logits_bytes"] = K * V * dtype.itemsize * (2 if kind == "hidden" else 1)
        return tuple(
            function(
                case.hidden_states,
                case.lm_head_weight,
                case.shift_labels,
                rationale_weights=case.rationale_weights,
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

    names = ("loss", "cross_entropy", "consistency", "kl", "rationale_losses")
    compare(call, mind_loss, reference_mind_loss, shape, names, dtype)


# --- behaviour ---------------------------------------------------------------------------------------------------


def test_confident_student_keeps_the_digits_of_its_loss_and_gradient() -> None:
    hidden = torch.tensor([[14.0, 0.0]], dtype=torch.float32, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], device=DEVICE, requires_grad=True)
    loss, _ = fused_linear_cross_entropy(hidden, weight, torch.tensor([0], device=DEVICE), backend="triton")
    loss.backward()
    others = 2 * math.exp(-14)
    assert abs(float(loss.detach()) / math.log1p(others) - 1) < 1e-6
    assert abs(float(hidden.grad[0, 0]) / (-others / (1 + others)) - 1) < 1e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_divergences_are_finite_at_logits_of_80(divergence: str) -> None:
    student = torch.tensor([[80.0, -80.0, 0.0, 80.0]], device=DEVICE, requires_grad=True)
    teacher = TeacherLogits(torch.tensor([[-80.0, 80.0, 0.0, -80.0]], device=DEVICE))
    loss, _ = ta_weighted_kl(student, teacher, divergence=divergence, backend="triton")
    loss.backward()
    wanted = {"forward": 160 + math.log(2), "reverse": 160 - math.log(2), "jsd": math.log(2)}[divergence]
    assert abs(float(loss.detach()) - wanted) < 1e-3 and student.grad.isfinite().all()


def test_topk_tail_keeps_its_digits_when_the_student_is_sure() -> None:
    z = torch.tensor([[20.0, 0.0, 0.0]], device=DEVICE, requires_grad=True)
    teacher = TeacherTopK(torch.tensor([[0]], device=DEVICE), torch.tensor([[math.log(0.9)]], device=DEVICE))
    loss, _ = ta_weighted_kl(z, teacher, backend="triton")
    loss.backward()
    tail = 2 * math.exp(-20) / (1 + 2 * math.exp(-20))
    wanted = 0.9 * (math.log(0.9) - math.log1p(-tail)) + 0.1 * (math.log(0.1) - math.log(tail))
    assert abs(float(loss.detach()) - wanted) < 1e-6
    torch.testing.assert_close(z.grad.cpu(), torch.tensor([[0.1 - tail, -0.05 + tail / 2, -0.05 + tail / 2]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("gap", [60.0, 88.0, 92.0, 100.0, 160.0])
def test_a_tail_whose_probability_underflows(gap: float, divergence: str, backend: str, dtype: torch.dtype) -> None:
    """e^−88 is the last normal fp32 number, e^−104 is 0; the label is listed in one row, in the tail of the other."""
    z = torch.tensor([[gap / 2, -gap / 2, -gap / 2 - 1, 3 - gap / 2], [-gap / 2, 2 - gap / 2, gap / 2, -gap / 2]])
    teacher_logprobs = torch.tensor([[0.9], [0.6]], device=DEVICE).log()
    teacher = TeacherTopK(torch.tensor([[0], [2]], device=DEVICE), teacher_logprobs)
    labels, weights = torch.tensor([0, 1], device=DEVICE), torch.tensor([[1.0, 1.0]], device=DEVICE)

    exact = z.double().to(DEVICE).requires_grad_()
    log_s = exact.log_softmax(-1)
    listed = log_s.gather(-1, teacher.token_ids)
    tail = torch.logsumexp(log_s.scatter(-1, teacher.token_ids, -math.inf), -1, keepdim=True)
    log_s = torch.cat([listed, tail], -1)
    log_t = torch.cat([teacher_logprobs.double(), torch.log(-torch.expm1(teacher_logprobs.double()))], -1)
    log_m = torch.logaddexp(log_t, log_s) - math.log(2)
    kl_of = {
        "forward": log_t.exp() * (log_t - log_s),
        "reverse": log_s.exp() * (log_s - log_t),
        "jsd": 0.5 * (log_t.exp() * (log_t - log_m) + log_s.exp() * (log_s - log_m)),
    }
    kl = kl_of[divergence].sum(-1)
    cross_entropy = F.cross_entropy(exact, labels, reduction="none")
    (wanted_kl,) = torch.autograd.grad(kl.mean(), exact, retain_graph=True)
    (wanted_both,) = torch.autograd.grad((cross_entropy + kl).sum(), exact)

    def close_or_0(name: str, given: Tensor, exact: Tensor, size: float) -> None:
        error = float((given.double() - exact).abs().max())
        allowed = (4 * FLOOR[dtype] + gap * 2**-23) * size  # a log-sum-exp of gap/2 is rounded
        assert error <= allowed, f"{name}: error {error:.2e}, wanted at most {allowed:.2e}"

    logits = z.to(DEVICE, dtype).requires_grad_()
    loss, losses = ta_weighted_kl(
        logits,
        teacher,
        weights[0] / 2,
        cu_seqlens=torch.arange(3, device=DEVICE),
        divergence=divergence,
        backend=backend,
    )
    torch.testing.assert_close(losses.double(), kl.detach(), rtol=1e-6, atol=1e-7)
    close_or_0("logits", torch.autograd.grad(loss, logits)[0], wanted_kl, 0.1)

    hidden = torch.eye(2, device=DEVICE, dtype=dtype).view(1, 2, 1, 2).requires_grad_()
    rows = TeacherTopK(teacher.token_ids.view(1, 2, 1, 1), teacher_logprobs.view(1, 2, 1, 1))
    settings: dict[str, Any] = {"kl_weight": 1.0, "divergence": divergence, "backend": backend}
    weight = z.T.to(DEVICE, dtype).contiguous().requires_grad_()
    output = mind_loss(hidden, weight, labels.view(1, 2, 1), rationale_weights=weights, teacher=rows, **settings)
    torch.testing.assert_close(output.kl.double(), kl.detach().sum(), rtol=1e-6, atol=1e-7)
    grad_hidden, grad_weight = torch.autograd.grad(output.loss, (hidden, weight))
    close_or_0("head", grad_weight.T, wanted_both, 1.0)
    close_or_0("hidden", grad_hidden.view(2, 2), wanted_both @ weight.detach().double(), gap)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_teachers_row_of_only_padding(tail: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error on the host; NaN where looking would wait for the device, which an id of −1 must not reach."""
    z = randn(2, 5).float().requires_grad_()
    log_probs = torch.tensor([[-1.0, -2.0], [-math.inf, -math.inf]], device=DEVICE)
    teacher = TeacherTopK(torch.tensor([[1, 2], [-1, -1]], device=DEVICE), log_probs, tail=tail)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"teacher.logprobs: given a row of only -inf"):
            ta_weighted_kl(z, teacher, backend=backend)
        monkeypatch.setattr("mind_kernels.teacher_rows.can_look", lambda tensor: False)
    rationales = {"cu_seqlens": torch.arange(3, device=DEVICE)}
    losses = ta_weighted_kl(z, teacher, torch.ones(2, device=DEVICE), **rationales, backend=backend)[1]
    assert losses.isnan().tolist() == [False, True]


def test_excluded_teacher_token_makes_reverse_infinite() -> None:
    z, t = randn(1, 5).float(), randn(1, 5, seed=1).float()
    t[0, 1] = -math.inf
    with torch.no_grad():
        assert ta_weighted_kl(z, TeacherLogits(t), divergence="reverse", backend="triton")[0] == math.inf


def test_the_same_from_run_to_run_without_grad_and_at_a_second_backward() -> None:
    case = random_case(2, 3, 4, 13, 41, 2, device=DEVICE).to(torch.float32)
    teacher = random_teacher("logits", random_case(2, 3, 4, 13, 41, 2, dtype=torch.float32, device=DEVICE))
    leaves = list(case.leaves().values())

    def loss(weights: Tensor = case.rationale_weights) -> Tensor:
        return mind_loss(
            case.hidden_states,
            case.lm_head_weight,
            case.shift_labels,
            rationale_weights=weights,
            answer_index=case.answer_index,
            teacher=teacher,
            lm_head_bias=case.lm_head_bias,
            kl_weight=0.3,
            backend="triton",
        ).loss

    first = loss()
    gradients = torch.autograd.grad(first, leaves, retain_graph=True)
    again = torch.autograd.grad(first, leaves)
    other = torch.autograd.grad(loss(), leaves)
    for a, b, c in zip(gradients, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    # Rows of weight 0 are a product of their own where others have a gradient, and a GPU's library may sum that in
    # another order: with none, both losses are of the same products.
    weights = case.rationale_weights.detach().clamp(min=0.1).requires_grad_()
    with_gradient = loss(weights)
    with torch.no_grad():
        assert torch.equal(loss(weights), with_gradient.detach())


# --- choice of backend -------------------------------------------------------------------------------------------


def test_fp64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend: given 'triton' with torch.float64, wanted bfloat16, float16"):
        multi_rationale_log_softmax(torch.zeros(2, 3, dtype=torch.float64), backend="triton")


def test_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend: given 'triton' with a tensor on cpu, wanted one on a GPU"):
        fused_linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="triton")


def test_missing_triton_is_an_error_only_when_asked_for() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from mind_kernels import multi_rationale_log_softmax as f\n"
        "f(torch.zeros(2, 3)); f(torch.zeros(2, 3), backend='triton')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ValueError: backend: given 'triton' where the package triton is not installed" in done.stderr


def test_more_rationales_than_the_pair_kernel_holds() -> None:
    hidden, head_weight = randn(9, 3).float(), randn(5, 3, seed=1).float()
    index, alpha = torch.arange(9, device=DEVICE).view(1, 9, 1), torch.full((1, 9), 1 / 9, device=DEVICE)
    with pytest.raises(ValueError, match=r"answer_index: given K = 9 rationales with backend 'triton', wanted at most"):
        answer_consistency(hidden, head_weight, index, alpha, backend="triton")


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu() -> None:
    from mind_kernels.arguments import choose_backend

    assert importlib.util.find_spec("triton") is not None
    assert choose_backend("auto", torch.zeros(1)) == "torch"
    assert choose_backend("auto", torch.zeros(1, device=DEVICE)) == ("triton" if DEVICE == "cuda" else "torch")
