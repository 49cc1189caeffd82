"""gradient_tolerance: the certificate on anything, what it means for the gradients, and where a chunk stays dense."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mind_kernels.linear_sweep as linear_sweep
import mind_kernels.pruning as pruning
from mind_kernels import (
    GradientPruning,
    TeacherLogits,
    fused_linear_cross_entropy,
    fused_linear_kl,
    mind_loss,
    record_pruning,
)
from mind_kernels.pruning import BREAK_EVEN, BREAK_EVEN_16_BITS, choose_columns
from mind_kernels.testing import MindCase, random_case, random_teacher, relative_error

KINDS = ("peaked", "uniform", "one-hot", "ties", "huge", "tiny", "mixed signs", "zero")


def logit_gradient(kind: str, m: int, V: int, seed: int) -> tuple[Tensor, Tensor]:
    """(m, V) softmax − onehot of logits of this kind, or something worse; (m,) targets."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(m, V, generator=generator)
    targets = torch.randint(0, V, (m,), generator=generator)
    scale = {"peaked": 6.0, "uniform": 0.0, "one-hot": 200.0, "ties": 1.0, "huge": 4.0, "tiny": 4.0}.get(kind, 3.0)
    z = (z * scale).round() if kind == "ties" else z * scale
    G = torch.softmax(z, -1)
    G[torch.arange(m), targets] -= 1
    if kind == "mixed signs":
        G = G - torch.softmax(torch.randn(m, V, generator=generator) * 3, -1)
    return G * {"huge": 1e15, "tiny": 1e-15, "zero": 0.0}.get(kind, 1.0), targets


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 70),
    V=st.integers(1, 400),
    tolerance=st.sampled_from([2.0**-12, 2.0**-9, 2.0**-5, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_the_certificate_holds(kind: str, m: int, V: int, tolerance: float, dtype: torch.dtype, seed: int) -> None:
    G, targets = logit_gradient(kind, m, V, seed)
    G = G.to(dtype)
    with record_pruning() as records:
        columns = choose_columns(G, targets, GradientPruning(tolerance))
    (record,) = records
    exact = G.double()
    assert record.rows == m
    if columns is None:
        assert (record.kept_share, record.certificate) == (1.0, 0.0)
        return
    assert columns.kept.unique().numel() == len(columns.kept) and set(targets.tolist()) <= set(columns.kept.tolist())
    assert torch.equal(columns.G, G[:, columns.kept])
    D = exact.clone()
    D[:, columns.kept] = 0
    size, dropped = float(exact.norm()), float(D.norm())
    assert dropped <= tolerance * size
    assert record.certificate == pytest.approx(dropped / size if size else 0.0, rel=1e-3, abs=1e-9)
    assert record.kept_share == pytest.approx(len(columns.kept) / V)
    assert record.kept_share <= (BREAK_EVEN_16_BITS if dtype == torch.bfloat16 else BREAK_EVEN)
    assert columns.row_factor is not None and columns.column_mass is not None
    rest = D - torch.outer(columns.row_factor.double(), columns.column_mass.double())
    assert float(rest.norm()) <= dropped * (1 + 1e-5), "the correction is no further away than nothing at all"


def test_as_few_columns_as_the_tolerance_allows() -> None:
    G = torch.zeros(1, 8)
    G[0] = torch.tensor([-1.0, 0.5, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])
    columns = choose_columns(G, torch.tensor([0]), GradientPruning(0.2))  # ‖(0.1, 0.1, 0.1, …)‖ = 0.174 of 1.13
    assert columns is not None and columns.kept.tolist() == [0, 1]
    columns = choose_columns(G, torch.tensor([7]), GradientPruning(0.2))
    assert columns is not None and columns.kept.tolist() == [0, 1, 7]
    assert choose_columns(G.fill_(math.nan), torch.tensor([0]), GradientPruning(0.2)) is None


def peaked_case(dtype: torch.dtype = torch.float32, V: int = 600) -> MindCase:
    """A student that is sure: logits of ±20, most of the mass on a few tokens, which rows share."""
    case = random_case(3, 4, 10, 24, V, 2, seed=5)
    case.lm_head_weight.mul_(5)
    case.lm_head_weight[: V // 30].mul_(2)
    return case.to(dtype)


def losses(case: MindCase) -> dict[str, Callable[..., Tensor]]:
    x, w = case.hidden_states, case.lm_head_weight
    common = {"rationale_weights": case.rationale_weights, "lm_head_bias": case.lm_head_bias}

    def cross_entropy(**more):
        return fused_linear_cross_entropy(x, w, case.shift_labels, logit_softcap=30.0, **common, **more)[0]

    teacher = TeacherLogits((x @ w.t()).detach().roll(1, dims=-2))  # as sure, of other tokens

    def linear_kl(**more):
        return fused_linear_kl(x, w, teacher, case.shift_labels, **common, **more)[0]

    def whole(**more):
        return mind_loss(
            x, w, case.shift_labels, answer_index=case.answer_index, teacher=random_teacher("topk", case),
            kl_weight=0.5, consistency_weight=0.5, **common, **more,
        ).loss  # fmt: skip

    return {f.__name__: f for f in (cross_entropy, linear_kl, whole)}


@pytest.mark.parametrize("name", ["cross_entropy", "linear_kl", "whole"])
@pytest.mark.parametrize("budget", [None, 600 * 8 * 20], ids=["one-chunk", "chunks"])
def test_gradients_are_near_and_all_else_is_the_same(name: str, budget: int | None) -> None:
    case = peaked_case(torch.float64)
    function, leaves = losses(case)[name], case.leaves()
    exact = function(max_logits_bytes=budget)
    wanted = torch.autograd.grad(exact, tuple(leaves.values()))
    errors = {}
    for tolerance in (2**-4, 2**-7):
        with record_pruning() as records:
            loss = function(gradient_tolerance=tolerance, max_logits_bytes=budget)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, tuple(leaves.values())), strict=True))
        assert torch.equal(loss, exact)
        assert (len(records) == 1) == (budget is None) and any(record.kept_share < 0.5 for record in records)
        for leaf, value in zip(leaves, wanted, strict=True):
            errors[tolerance, leaf] = relative_error(gradients[leaf], value)
        # Made from the whole of G.
        assert errors[tolerance, "lm_head_bias"] == errors[tolerance, "rationale_weights"] == 0
    for leaf in ("hidden_states", "lm_head_weight"):
        assert 0 < errors[2**-7, leaf] < 8 * 2**-7, leaf  # the certificate is of G; W and X spread it
        assert errors[2**-7, leaf] < errors[2**-4, leaf], leaf


def test_tolerance_0_is_the_dense_path_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = peaked_case()
    for function in losses(case).values():
        wanted = torch.autograd.grad(function(), case.hidden_states)[0]
        with monkeypatch.context() as patch:
            patch.setattr(linear_sweep, "choose_columns", None)  # not even asked
            for dense in (0, 0.0, GradientPruning(0.0)):
                given = torch.autograd.grad(function(gradient_tolerance=dense), case.hidden_states)[0]
                assert torch.equal(given, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unsure_student_stays_dense_and_exact(dtype: torch.dtype) -> None:
    case = random_case(2, 3, 8, 16, 300, 2).to(dtype)
    arguments = (case.hidden_states, case.lm_head_weight, case.shift_labels)
    wanted = torch.autograd.grad(fused_linear_cross_entropy(*arguments)[0], arguments[:2])
    with record_pruning() as records:
        loss, _ = fused_linear_cross_entropy(*arguments, gradient_tolerance=2**-9)
        given = torch.autograd.grad(loss, arguments[:2])
    assert [record.kept_share for record in records] == [1.0]
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one, other)


def test_of_an_unsure_student_only_some_rows_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    m, V = 8 * pruning.SAMPLE_ROWS + 5, 300
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (m,), generator=generator)
    uniform = torch.randn(m, V, generator=generator)
    peaked = uniform * torch.logspace(0, -8, V)
    asked: list[int] = []
    column_sums = pruning._column_sums

    def count(G: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(G))
        return column_sums(G)

    monkeypatch.setattr(pruning, "_column_sums", count)
    with record_pruning() as records:
        assert choose_columns(uniform, targets, GradientPruning(2**-9)) is None
        assert asked == [pruning.SAMPLE_ROWS]
        columns = choose_columns(peaked, targets % 10, GradientPruning(2**-9))
    assert columns is not None and asked[1:] == [pruning.SAMPLE_ROWS, m]
    assert [record.rows for record in records] == [m, m]
    assert [record.kept_share for record in records] == pytest.approx([1.0, len(columns.kept) / V])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_tiles_of_any_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "TILE_ELEMENTS", 90)
    monkeypatch.setattr(pruning, "TILE_ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(11, 40, generator=generator).to(dtype)
    vectors = torch.randn(2, 37, generator=generator).to(torch.promote_types(dtype, torch.float32))
    for G in (padded[:, :37], padded[:, :37].contiguous(), padded.new_empty(37, 11).t().copy_(padded[:, :37])):
        wanted = G.double() @ vectors.double().t()
        torch.testing.assert_close(pruning._times(G, vectors).double(), wanted.t(), rtol=1e-5, atol=1e-5)
    for V in (3, 37):  # blocks of several rows, of which the last is not full, and of one
        square, mass = pruning._column_sums(padded[:, :V])
        torch.testing.assert_close(square.double(), padded[:, :V].double().square().sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mass.double(), padded[:, :V].double().sum(0), rtol=1e-5, atol=1e-5)


def test_what_the_correction_and_the_switch_do() -> None:
    """The correction reaches every row of dW and keeps the sums; without it dropped rows are exactly 0."""
    case = peaked_case(torch.float64)
    x, w = case.hidden_states, case.lm_head_weight
    exact = torch.autograd.grad(fused_linear_cross_entropy(x, w, case.shift_labels)[0], (x, w))

    def run(**options) -> tuple[Tensor, Tensor]:
        pruning = GradientPruning(2**-5, **options)
        loss, _ = fused_linear_cross_entropy(x, w, case.shift_labels, gradient_tolerance=pruning)
        return torch.autograd.grad(loss, (x, w))

    corrected, cut, dense_weight = run(), run(correction=False), run(prune_weight_gradient=False)
    assert bool((cut[1] == 0).all(-1).any()) and not bool((corrected[1] == 0).all(-1).any())
    for one, other, value in zip(corrected, cut, exact, strict=True):
        assert relative_error(one, value) < relative_error(other, value)
    assert torch.equal(dense_weight[1], exact[1]) and torch.equal(dense_weight[0], corrected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_16_bit(dtype: torch.dtype) -> None:
    """No worse than what 16-bit logits already cost, and dW summed in fp32 over the chunks."""
    case = peaked_case(dtype)
    exact_case = case.to(torch.float64)
    exact = torch.autograd.grad(
        fused_linear_cross_entropy(exact_case.hidden_states, exact_case.lm_head_weight, case.shift_labels)[0],
        (exact_case.hidden_states, exact_case.lm_head_weight),
    )
    arguments = (case.hidden_states, case.lm_head_weight, case.shift_labels)

    def errors(**more) -> list[float]:
        loss, _ = fused_linear_cross_entropy(*arguments, max_logits_bytes=600 * 2 * 20, **more)
        return [relative_error(g, e) for g, e in zip(torch.autograd.grad(loss, arguments[:2]), exact, strict=True)]

    for pruned, dense in zip(errors(gradient_tolerance=2**-9), errors(), strict=True):
        assert pruned < 1.5 * dense + 2**-8


def test_a_frozen_head_and_determinism() -> None:
    case = peaked_case()
    x, w = case.hidden_states, case.lm_head_weight.detach()
    runs = [
        torch.autograd.grad(fused_linear_cross_entropy(x, w, case.shift_labels, gradient_tolerance=2**-6)[0], x)[0]
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_inside_a_compiled_graph() -> None:
    torch._dynamo.reset()
    case = peaked_case()

    def function(x, w):
        return fused_linear_cross_entropy(x, w, case.shift_labels, gradient_tolerance=GradientPruning(2**-6))[0]

    leaves = (case.hidden_states, case.lm_head_weight)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("given", [-0.1, 1.0, math.nan])
def test_errors(given: float) -> None:
    case = random_case(1, 2, 3, 4, 5, 1)
    with pytest.raises(ValueError, match=r"gradient_tolerance: given .*, wanted a number in \[0, 1\)"):
        fused_linear_cross_entropy(case.hidden_states, case.lm_head_weight, case.shift_labels, gradient_tolerance=given)
    with pytest.raises(TypeError, match="gradient_tolerance: given str, wanted a number"):
        fused_linear_cross_entropy(case.hidden_states, case.lm_head_weight, case.shift_labels, gradient_tolerance="1")  # type: ignore[arg-type]
