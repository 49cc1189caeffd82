"""What the losses promise beyond being right: cost, memory of gradients, repeated backward, finiteness, bounds."""

from __future__ import annotations

import gc
import inspect
import itertools
import math
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mind_kernels.chunking as chunking
import mind_kernels.linear_sweep as linear_sweep
from mind_kernels import (
    AnswerConsistency,
    FusedLinearCrossEntropy,
    FusedLinearKL,
    MindLoss,
    MultiRationaleLogSoftmax,
    TAWeightedKL,
    TeacherLogits,
    TeacherTopK,
    answer_consistency,
    fused_linear_cross_entropy,
    fused_linear_kl,
    mind_loss,
    multi_rationale_log_softmax,
    ta_weighted_kl,
)
from mind_kernels.chunking import Chunk, Rows, plan_chunks, row_buffer, teacher_parts
from mind_kernels.combined.reference import reference_mind_loss
from mind_kernels.divergences import divergence_and_gradient, pairwise_jsd_and_gradient
from mind_kernels.plan import SweepOptions, make_plan
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.testing import MindCase, assert_as_good_as_plain, random_case, random_teacher, relative_error


def call_mind_loss(case: MindCase, **more):
    options = {"answer_index": case.answer_index, "lm_head_bias": case.lm_head_bias, "consistency_weight": 0.5} | more
    return mind_loss(
        case.hidden_states, case.lm_head_weight, case.shift_labels, rationale_weights=case.rationale_weights, **options
    )


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Rows of every product of the sweep: forward (head), grad_hidden_states and grad_lm_head_weight."""
    rows: dict[str, list[int]] = {"head": [], "hidden": [], "weight": []}
    project, product, add = linear_sweep.project, linear_sweep.product, linear_sweep._WeightGradient.add

    def counting_project(hidden_states, weight, bias, out):
        rows["head"].append(len(hidden_states))
        return project(hidden_states, weight, bias, out)

    def counting_product(left, right, out, **options):
        rows["hidden"].append(len(left))
        return product(left, right, out, **options)

    def counting_add(self, G, X):
        rows["weight"].append(len(G))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_sweep, "product", product)
            add(self, G, X)

    monkeypatch.setattr(linear_sweep, "project", counting_project)
    monkeypatch.setattr(linear_sweep, "product", counting_product)
    monkeypatch.setattr(linear_sweep._WeightGradient, "add", counting_add)
    return rows


# --- gradcheck ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hidden", "logits", "topk", "topk-renormalize"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_gradcheck_mind_loss(kind: str, divergence: str) -> None:
    case = random_case(2, 3, 4, 3, 7, 2)
    teacher = random_teacher(kind, case)
    weights = case.rationale_weights.double().requires_grad_()

    def loss(h, w, b, a):
        return mind_loss(
            h,
            w,
            case.shift_labels,
            rationale_weights=a,
            answer_index=case.answer_index,
            teacher=teacher,
            lm_head_bias=b,
            logit_scale=1.1,
            logit_softcap=3.0,
            kl_weight=0.6,
            divergence=divergence,
            beta=0.7,
        ).loss

    leaves = [t.requires_grad_() for t in (case.hidden_states, case.lm_head_weight, case.lm_head_bias)]
    assert torch.autograd.gradcheck(loss, (*leaves, weights))


def test_gradcheck_of_each_function() -> None:
    case = random_case(2, 3, 4, 3, 7, 2)
    h, w, weights = case.hidden_states.requires_grad_(), case.lm_head_weight.requires_grad_(), case.rationale_weights
    weights = weights.double().requires_grad_()
    teacher = random_teacher("logits", case)
    labels, index = case.shift_labels, case.answer_index
    check = torch.autograd.gradcheck
    assert check(lambda h, w, a: fused_linear_cross_entropy(h, w, labels, rationale_weights=a)[0], (h, w, weights))
    assert check(lambda h, w, a: fused_linear_kl(h, w, teacher, labels, rationale_weights=a)[0], (h, w, weights))
    assert check(lambda h, w, a: answer_consistency(h, w, index, a), (h, w, weights))
    logits = (h.detach() @ w.detach().T).requires_grad_()
    assert check(
        lambda z, a: ta_weighted_kl(z, teacher, a, shift_labels=labels, divergence="jsd")[0], (logits, weights)
    )
    assert check(lambda z: multi_rationale_log_softmax(z, temperature=1.7), (logits,))


# --- any shape ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 3),
    K=st.integers(1, 5),
    T=st.integers(1, 6),
    H=st.integers(1, 9),
    V=st.integers(2, 33),
    A=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    rows_in_budget=st.integers(0, 40),
    ignored=st.floats(0, 1),
)
def test_mind_loss_of_any_shape_in_both_layouts(B, K, T, H, V, A, seed, rows_in_budget, ignored) -> None:
    case = random_case(B, K, T, H, V, min(A, T), seed=seed)
    drop = torch.rand(case.shift_labels.shape, generator=torch.Generator().manual_seed(seed)) < ignored
    case.shift_labels[drop] = -100
    case = case.to(torch.float64)
    weights = case.rationale_weights.detach().double().requires_grad_()
    leaves = [case.hidden_states, case.lm_head_weight, weights]
    arguments = {"rationale_weights": weights, "answer_index": case.answer_index, "consistency_weight": 0.9}
    exact = reference_mind_loss(case.hidden_states, case.lm_head_weight, case.shift_labels, **arguments)
    wanted = torch.autograd.grad(exact[0], leaves, allow_unused=True, materialize_grads=True)
    arguments["max_logits_bytes"] = max(K, rows_in_budget) * V * 8
    padded = mind_loss(case.hidden_states, case.lm_head_weight, case.shift_labels, **arguments)
    packed = mind_loss(
        case.hidden_states.flatten(0, 2),
        case.lm_head_weight,
        case.shift_labels.flatten(),
        cu_seqlens=case.cu_seqlens(),
        **arguments,
    )
    for output in (padded, packed):
        for given_value, exact_value in zip(output, exact, strict=True):
            torch.testing.assert_close(given_value, exact_value, atol=1e-12, rtol=1e-12)
        for gradient, exact_gradient in zip(torch.autograd.grad(output.loss, leaves), wanted, strict=True):
            torch.testing.assert_close(gradient, exact_gradient, atol=1e-12, rtol=1e-11)


@given(
    sizes=st.lists(st.integers(1, 8), max_size=6),
    plain=st.integers(0, 50),
    passive=st.integers(0, 20),
    most=st.integers(1, 30),
)
def test_chunks_cover_every_row_once_and_split_no_group(sizes, plain, passive, most) -> None:
    rows = rows_of(sizes, plain, passive)
    if len(rows.order) and most < max([1, *sizes]):
        with pytest.raises(ValueError, match=r"max_logits_bytes: given \d+, wanted at least"):
            plan_chunks(rows, 10, 10 * most)
        return
    chunks = plan_chunks(rows, 10, 10 * most)
    assert_whole(chunks, rows)
    assert all(chunk.stop - chunk.start <= most for chunk in chunks)


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 8), max_size=6),
    plain=st.integers(0, 200),
    passive=st.integers(0, 60),
    most=st.integers(8, 200),
    part_rows=st.integers(1, 40),
)
def test_a_teachers_parts_and_the_chunks_share_the_budget(sizes, plain, passive, most, part_rows) -> None:
    rows = rows_of(sizes, plain, passive)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("mind_kernels.chunking.PART_ROWS", part_rows)
        chunks = plan_chunks(rows, 10, 17 * most, 7)
        parts = [part for chunk in chunks for part in teacher_parts(chunk, rows)]
    assert_whole(chunks, rows)
    assert_whole(parts, rows)
    if chunks:
        held = [max(piece.stop - piece.start for piece in pieces) for pieces in (chunks, parts)]
        assert 10 * held[0] + 7 * held[1] <= 17 * most
        assert len(chunks) <= len(plan_chunks(rows, 17, 17 * most))


def rows_of(sizes: list[int], plain: int, passive: int) -> Rows:
    """Groups of these sizes, then `plain` rows with a gradient, then `passive` ones without."""
    offsets = [0, *itertools.accumulate(sizes)]
    order = torch.arange(offsets[-1] + plain + passive)
    return Rows(order, order >= 0, offsets, offsets[-1] + plain)


def assert_whole(chunks: list[Chunk], rows: Rows) -> None:
    """Every row once, no group split, rows with and without a gradient apart."""
    offsets, active = rows.group_offsets, rows.num_with_gradient
    covered = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert covered == list(range(len(rows.order)))
    for chunk in chunks:
        assert chunk.needs_gradient == (chunk.start < active) == (chunk.stop <= active)
        assert chunk.start >= offsets[-1] or chunk.start in offsets
        assert chunk.stop >= offsets[-1] or chunk.stop in offsets


# --- cost --------------------------------------------------------------------------------------------------------


def test_only_supervised_and_answer_rows_reach_the_head(products) -> None:
    case = random_case(2, 4, 9, 8, 31, 2).to(torch.float32)
    call_mind_loss(case).loss.backward()
    supervised = case.shift_labels.flatten() != -100
    answers = torch.zeros_like(supervised)
    weighted = (case.rationale_weights != 0).unsqueeze(-1) | torch.tensor(True)  # α needs a gradient: all pairs count
    answers[case.answer_index[(case.answer_index >= 0) & weighted]] = True
    assert sum(products["head"]) == int((supervised | answers).sum())


def test_rationale_of_weight_0_costs_no_backward(products) -> None:
    case = random_case(2, 4, 9, 8, 31, 2).to(torch.float32)
    case.rationale_weights.requires_grad_(False)
    call_mind_loss(case).loss.backward()
    supervised = case.shift_labels != -100
    weighted = supervised & (case.rationale_weights != 0).unsqueeze(-1)
    assert int(weighted.sum()) < int(supervised.sum())
    assert sum(products["head"]) == int(supervised.sum())
    assert sum(products["hidden"]) == sum(products["weight"]) == int(weighted.sum())


def test_frozen_head_computes_no_weight_gradient(products) -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    case.lm_head_weight.requires_grad_(False)
    case.lm_head_bias.requires_grad_(False)
    call_mind_loss(case).loss.backward()
    assert products["weight"] == [] and products["hidden"] != []
    assert case.hidden_states.grad is not None and case.lm_head_weight.grad is None


def test_without_grad_mode_only_losses_are_computed(products) -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    with torch.no_grad():
        loss = call_mind_loss(case).loss
    assert not loss.requires_grad and products["hidden"] == products["weight"] == []
    torch.testing.assert_close(loss, call_mind_loss(case).loss.detach())


def test_one_sweep_computes_each_rows_logits_once(products) -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    teacher = random_teacher("logits", case)
    case.rationale_weights.requires_grad_(False)
    call_mind_loss(case, teacher=teacher, kl_weight=1.0).loss.backward()
    assert sum(products["head"]) == int((case.shift_labels != -100).sum())


def test_logits_stay_within_the_budget(products) -> None:
    case = random_case(2, 3, 9, 8, 31, 2).to(torch.float32)
    call_mind_loss(case, max_logits_bytes=5 * 31 * 4).loss.backward()
    assert max(products["head"]) <= 5 < sum(products["head"])


@pytest.mark.parametrize(
    ("V", "dtype", "is_padded"),
    [
        (2**14, torch.float32, True),
        (3 * 2**13, torch.float64, True),
        (2**15, torch.bfloat16, False),
        (2**14 + 2**12, torch.float32, False),
    ],
)
def test_rows_on_a_cpu_do_not_fall_on_the_same_cache_sets(V: int, dtype: torch.dtype, is_padded: bool) -> None:
    rows = row_buffer(3, V, dtype, torch.device("cpu"), "torch")
    assert rows.shape == (3, V) and rows.is_contiguous() != is_padded
    if dtype.itemsize >= 4:
        assert rows.stride(0) * dtype.itemsize % 2**16 != 0


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float64, {"gradient_tolerance": 0.2}),
        (torch.float32, {}),
        (torch.float32, {"gradient_tolerance": 0.2}),
        (torch.bfloat16, {"logits_dtype": torch.float32}),
    ],
)
def test_results_do_not_depend_on_how_rows_of_logits_are_padded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict
) -> None:
    found = []
    for aliased in (chunking.ALIASED_BYTES, 1):  # of no V here, of every one
        monkeypatch.setattr(chunking, "ALIASED_BYTES", aliased)
        case = random_case(2, 3, 6, 8, 31, 2).to(dtype)
        losses = call_mind_loss(case, teacher=random_teacher("hidden", case), kl_weight=0.5, **options)
        found.append(
            [losses.loss, losses.rationale_losses, *torch.autograd.grad(losses.loss, [*case.leaves().values()])]
        )
    for dense, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, dense)


def test_import_needs_neither_triton_nor_transformers() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None; import mind_kernels;"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('mind', 'accelerate', 'datasets')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# --- gradients ---------------------------------------------------------------------------------------------------


def test_second_backward_gives_the_same_gradient() -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    leaves = list(case.leaves().values())
    loss = call_mind_loss(case).loss
    first = torch.autograd.grad(loss, leaves, grad_outputs=torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, grad_outputs=torch.tensor(0.5), retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a / 3, c)
        torch.testing.assert_close(b * 2, c)


def test_second_backward_after_an_update_of_the_head_is_an_error() -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    loss = call_mind_loss(case).loss
    loss.backward(retain_graph=True)
    with torch.no_grad():
        case.lm_head_weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("changed", ["labels", "teacher"])
def test_second_backward_after_a_change_of_what_has_no_gradient_is_an_error(changed: str) -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    teacher = TeacherLogits(torch.randn(2, 3, 6, 31))
    whole = call_mind_loss(case, teacher=teacher, kl_weight=1.0).loss
    logits = torch.randn(2, 3, 6, 31, requires_grad=True)
    on_logits, _ = ta_weighted_kl(logits, teacher, shift_labels=case.shift_labels)
    {"labels": case.shift_labels, "teacher": teacher.logits}[changed].zero_()
    whole.backward(retain_graph=True)  # was made in forward
    on_logits.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        whole.backward()
    if changed == "teacher":  # of labels the divergence keeps a mask of its own
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            on_logits.backward()


def test_a_loss_that_is_kept_keeps_no_teacher() -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    kept = []
    for function in (
        lambda teacher: call_mind_loss(case, teacher=TeacherLogits(teacher), kl_weight=1.0).loss,
        lambda teacher: ta_weighted_kl(case.hidden_states @ case.lm_head_weight.t(), TeacherLogits(teacher))[0],
    ):
        teacher = torch.randn(2, 3, 6, 31)
        is_alive = weakref.ref(teacher)
        kept.append(function(teacher))
        kept[-1].backward()
        del teacher
        gc.collect()
        assert is_alive() is None


def test_a_checkpoint_around_a_loss_sweeps_once(products) -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)

    def loss(hidden_states, weight):
        return fused_linear_cross_entropy(hidden_states, weight, case.shift_labels)[0]

    leaves = case.hidden_states, case.lm_head_weight
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    num_products = {name: len(rows) for name, rows in products.items()}
    given = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    assert {name: len(rows) for name, rows in products.items()} == {n: 2 * k for n, k in num_products.items()}
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one, other)


def test_the_losses_are_the_caller_s_own() -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    logits = (case.hidden_states @ case.lm_head_weight.t()).detach()
    teacher = TeacherLogits(torch.randn(2, 3, 6, 31))
    gradients = []
    for change in (lambda losses: losses, lambda losses: losses.clamp_(max=1e-3)):
        weights = torch.full((2, 3), 1 / 3, requires_grad=True)
        loss, losses = ta_weighted_kl(logits.requires_grad_(), teacher, weights)
        change(losses)
        gradients.append(torch.autograd.grad(loss, (logits, weights)))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_second_order_gradient_is_an_error() -> None:
    case = random_case(1, 2, 4, 8, 31, 1).to(torch.float64)
    with pytest.raises(RuntimeError, match=r"given create_graph=True, wanted False: there is no second derivative"):
        torch.autograd.grad(call_mind_loss(case).loss, case.hidden_states, create_graph=True)


def test_second_order_gradient_of_a_kl_on_logits_is_an_error() -> None:
    """An error at once: in loss + penalty on the gradient, the penalty would pass for a constant."""
    logits = torch.randn(4, 7, requires_grad=True)
    loss, _ = ta_weighted_kl(logits, TeacherLogits(torch.randn(4, 7)))
    with pytest.raises(RuntimeError, match=r"given create_graph=True, wanted False: there is no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_backward_hands_the_weight_gradient_over_without_a_copy() -> None:
    case = random_case(1, 2, 4, 8, 31, 1).to(torch.float32)
    loss = call_mind_loss(case).loss
    made = loss.grad_fn.result.grad_lm_head_weight.data_ptr()
    loss.backward()
    assert case.lm_head_weight.grad.data_ptr() == made


@pytest.mark.parametrize("function", [fused_linear_cross_entropy, None], ids=["cross_entropy", "mind_loss"])
def test_all_rows_ignored_is_a_differentiable_zero(function) -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.bfloat16)
    case.shift_labels.fill_(-100)
    if function is None:
        loss = call_mind_loss(case, answer_index=None).loss
    else:
        loss, losses = function(case.hidden_states, case.lm_head_weight, case.shift_labels)
        assert losses.shape == (2, 3) and not losses.any()
    loss.backward()
    assert float(loss.detach()) == 0
    assert not case.hidden_states.grad.any() and not case.lm_head_weight.grad.any()


def test_tied_embedding_gets_both_gradients() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(31, 8)
    ids, labels = torch.randint(0, 31, (2, 3, 5)), torch.randint(0, 31, (2, 3, 5))
    loss, _ = fused_linear_cross_entropy(embedding(ids).tanh(), embedding.weight, labels)
    (given_gradient,) = torch.autograd.grad(loss, embedding.weight)
    plain = F.cross_entropy(F.linear(embedding(ids).tanh(), embedding.weight).flatten(0, 2), labels.flatten())
    (wanted,) = torch.autograd.grad(plain, embedding.weight)
    torch.testing.assert_close(given_gradient, wanted)


def test_bf16_weight_gradient_over_many_chunks_is_summed_in_fp32() -> None:
    # Every chunk adds the same small number: summed in bf16 it stops counting at 2⁸ of them.
    V, H, N = 4, 2, 1024
    hidden = torch.ones(N, H, dtype=torch.bfloat16)
    weight = torch.zeros(V, H, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(N, dtype=torch.int64)
    loss, _ = fused_linear_cross_entropy(hidden, weight, labels, reduction="sum", max_logits_bytes=V * 2)
    loss.backward()
    assert weight.grad[1, 0] == 0.25 * N


def test_bf16_weight_gradient_summed_in_place_is_within_the_rule_of_tolerance() -> None:
    # Logits of a student: the rounding of values of this size is what a 16-bit gradient's error is made of.
    N, H, V, generator = 4 * linear_sweep.MOST_ROUNDINGS, 64, 500, torch.Generator().manual_seed(0)
    common = torch.randn(H, generator=generator)  # in every chunk, so that the sum grows and each rounding counts
    hidden = (4 * torch.randn(N, H, generator=generator) + 4 * common).bfloat16()
    weight = (H**-0.5 * 2 * torch.randn(V, H, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    loss, _ = fused_linear_cross_entropy(hidden, weight, labels, max_logits_bytes=4 * V * 2)
    (summed,) = torch.autograd.grad(loss, weight)
    (plain,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels), weight)
    exact_weight = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden.double(), exact_weight), labels), exact_weight)
    assert_as_good_as_plain("grad_lm_head_weight", summed, plain, exact, factor=1.5, floor=0.0)


def test_autocast_uses_its_dtype_and_returns_gradients_of_the_parameters_dtype() -> None:
    case = random_case(2, 3, 6, 16, 31, 2).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = call_mind_loss(case)
    gradients = torch.autograd.grad(under_autocast.loss, list(case.leaves().values()))
    exact = torch.autograd.grad(call_mind_loss(case).loss, list(case.leaves().values()))
    rounded = case.to(torch.bfloat16)
    assert under_autocast.loss.dtype == torch.float32
    torch.testing.assert_close(under_autocast.loss, call_mind_loss(rounded).loss)
    for gradient, exact_gradient in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.float32
        assert 0 < relative_error(gradient, exact_gradient) < 2e-2


def test_fp16_keeps_small_gradients_under_a_loss_scale() -> None:
    # Weights of 1e-6 make every softmax term underflow fp16 unless it is scaled while it is made.
    case = random_case(1, 2, 8, 16, 64, 1).to(torch.float16)
    weights = torch.full((1, 2), 1e-6)
    loss, _ = fused_linear_cross_entropy(
        case.hidden_states, case.lm_head_weight, case.shift_labels, rationale_weights=weights
    )
    (gradient,) = torch.autograd.grad(loss * 2.0**16, case.lm_head_weight)
    exact = case.to(torch.float64)
    loss, _ = fused_linear_cross_entropy(
        exact.hidden_states, exact.lm_head_weight, exact.shift_labels, rationale_weights=weights
    )
    (wanted,) = torch.autograd.grad(loss * 2.0**16, exact.lm_head_weight)
    assert relative_error(gradient, wanted) < 2e-3


@pytest.mark.parametrize("case", ["eager", "compiled", "chunks", "pruned", "autocast", "triton"])
def test_fp16_gradient_of_the_head_has_room_for_many_rows_of_one_label(case: str) -> None:
    """Each entry of dW adds up to 40,000 times 20 before the loss's 1/N and 2⁻¹⁰ are multiplied in."""
    N = 200 if case == "triton" else 40_000
    size = 20.0 * 40_000 / N
    hidden = (size + torch.randn(N, 2, generator=torch.Generator().manual_seed(0))).half()
    labels = torch.zeros(N, dtype=torch.int64)
    weight, bias = torch.zeros(3, 2), torch.zeros(3)
    if case == "pruned":
        weight = torch.tensor([[-3 / size, 0.0], [3 / size, 0.0], [-1.0, 0.0]])
    options: dict = {"chunks": {"max_logits_bytes": 3 * 2 * 5_000}, "pruned": {"gradient_tolerance": 0.2}}.get(case, {})

    def function(hidden, weight, bias):
        backend = "triton" if case == "triton" else "torch"
        loss, _ = fused_linear_cross_entropy(hidden, weight, labels, lm_head_bias=bias, backend=backend, **options)
        return 2.0**-10 * loss

    leaves = [weight, bias] if case == "autocast" else [weight.half(), bias.half()]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(hidden.double(), *exact), labels) * 2.0**-10, exact)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    if case == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.float16, enabled=case == "autocast"):
        loss = function(hidden.float() if case == "autocast" else hidden, *leaves)
    for gradient, of in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert relative_error(gradient, of) < (0.2 if case == "pruned" else 2e-3)


def test_forward_alone_makes_no_gradient_on_a_device_either() -> None:
    """Its rows are known by supervised_index, and the weights are not looked at."""
    options = SweepOptions(
        kl=KLOptions(),
        compute_dtype=torch.float32,
        cross_entropy_weight=1.0,
        labels=torch.zeros(6, dtype=torch.int64, device="meta"),
        rationale_id=torch.zeros(6, dtype=torch.int64, device="meta"),
        supervised_index=torch.tensor([1, 2, 4, 5]),
    )
    for need_gradient in (True, False):
        plan = make_plan(6, torch.ones(2, device="meta"), options, need_gradient, False)
        assert plan.rows.num_with_gradient == (4 if need_gradient else 0) and len(plan.rows.order) == 4


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fp16_logits_keep_small_gradients_under_a_loss_scale(backend: str, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(1, 2, 4, 64, generator=generator).half() for _ in range(2))
    weights = torch.full((1, 2), 1e-6)

    def function(z):
        return ta_weighted_kl(z, TeacherLogits(teacher.to(z.dtype)), weights, backend=backend)[0] * 2.0**16

    exact = logits.double().requires_grad_()
    (wanted,) = torch.autograd.grad(ta_weighted_kl(exact, TeacherLogits(teacher.double()), weights)[0] * 2.0**16, exact)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits.requires_grad_()
    loss = function(logits)
    for _ in range(1 if compiled else 2):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert relative_error(gradient, wanted) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_teacher", [False, True], ids=["alone", "beside-a-teacher"])
def test_confident_student_keeps_the_digits_of_its_loss_and_gradient(has_teacher: bool, dtype: torch.dtype) -> None:
    # 1 − p_y is e^(log 2 − gap), and from a gap of 17 on p_y rounds to 1.
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype)
    labels = torch.zeros(1, 1, 1, dtype=torch.int64)
    of_gradient = 0.0 if dtype == torch.float32 else 4e-3
    for gap in (-14.0, 0.0, 8.0, 14.0, 15.0, 16.0, 17.0, 18.0, 40.0, 80.0):
        hidden = torch.tensor([gap, 0.0], dtype=dtype).view(1, 1, 1, 2).requires_grad_()
        teacher = TeacherLogits(hidden.detach() @ weight.T) if has_teacher else None
        loss = mind_loss(
            hidden, weight, labels, rationale_weights=torch.ones(1, 1), teacher=teacher, kl_weight=1e-30 * has_teacher
        ).loss
        (gradient,) = torch.autograd.grad(loss, hidden)
        others, of_log_odds = 2 * math.exp(-gap), 1e-6 + abs(gap) * 2**-23  # which are rounded
        assert abs(float(loss.detach()) / math.log1p(others) - 1) < of_log_odds, gap
        assert abs(float(gradient.flatten()[0]) / (-others / (1 + others)) - 1) < of_log_odds + of_gradient, gap


def test_a_label_that_alone_has_a_probability() -> None:
    hidden = torch.ones(1, 2, requires_grad=True)
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bias = torch.tensor([-math.inf, 0.0, -math.inf])
    loss, _ = fused_linear_cross_entropy(hidden, weight, torch.tensor([1]), lm_head_bias=bias)
    assert float(loss.detach()) == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert not gradient.any()
    loss, _ = fused_linear_cross_entropy(hidden, weight[:1], torch.tensor([0]))
    assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, hidden)[0].any()


def test_deterministic_from_run_to_run() -> None:
    case = random_case(2, 4, 16, 32, 129, 2).to(torch.bfloat16)
    runs = [
        torch.autograd.grad(call_mind_loss(case, max_logits_bytes=129 * 20).loss, list(case.leaves().values()))
        for _ in range(2)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


# --- normalisation -----------------------------------------------------------------------------------------------


def test_num_questions_makes_accumulation_exact() -> None:
    case = random_case(4, 3, 6, 8, 31, 2).to(torch.float64)
    whole = torch.autograd.grad(call_mind_loss(case).loss, case.lm_head_weight)[0]
    parts = torch.zeros_like(whole)
    for b in range(4):
        loss = mind_loss(
            case.hidden_states[b : b + 1],
            case.lm_head_weight,
            case.shift_labels[b : b + 1],
            rationale_weights=case.rationale_weights[b : b + 1],
            answer_index=torch.where(
                case.answer_index[b : b + 1] < 0, -1, case.answer_index[b : b + 1] - b * case.shift_labels[0].numel()
            ),
            lm_head_bias=case.lm_head_bias,
            consistency_weight=0.5,
            num_questions=torch.tensor(4),
        ).loss
        parts += torch.autograd.grad(loss, case.lm_head_weight)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_packed_unselected_rationale_is_an_empty_segment() -> None:
    case = random_case(1, 3, 6, 8, 31, 2).to(torch.float64)
    weights = torch.tensor([[0.4, 0.0, 0.6]])
    padded = fused_linear_cross_entropy(
        case.hidden_states, case.lm_head_weight, case.shift_labels, rationale_weights=weights
    )
    kept = [0, 2]
    packed = fused_linear_cross_entropy(
        case.hidden_states[0, kept].flatten(0, 1),
        case.lm_head_weight,
        case.shift_labels[0, kept].flatten(),
        rationale_weights=weights,
        cu_seqlens=torch.tensor([0, 6, 6, 12], dtype=torch.int32),
    )
    torch.testing.assert_close(packed[0], padded[0])
    assert packed[1].shape == (1, 3) and packed[1][0, 1] == 0
    torch.testing.assert_close(packed[1][0, kept], padded[1][0, kept])


def test_plain_rows_are_one_rationale_of_weight_1() -> None:
    case = random_case(1, 1, 6, 8, 31, 1).to(torch.float64)
    loss, losses = fused_linear_cross_entropy(case.hidden_states[0, 0], case.lm_head_weight, case.shift_labels[0, 0])
    z = case.hidden_states[0, 0] @ case.lm_head_weight.T
    torch.testing.assert_close(loss, F.cross_entropy(z, case.shift_labels[0, 0]))
    assert losses.shape == () and losses == loss.detach()


# --- divergences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_divergences_are_finite_at_logits_of_80(divergence: str, dtype: torch.dtype) -> None:
    student = torch.tensor([[80.0, -80.0, 0.0, 80.0]], dtype=dtype, requires_grad=True)
    teacher = TeacherLogits(torch.tensor([[-80.0, 80.0, 0.0, -80.0]], dtype=dtype))
    loss, _ = ta_weighted_kl(student, teacher, divergence=divergence)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    wanted = {"forward": 160 + math.log(2), "reverse": 160 - math.log(2), "jsd": math.log(2)}[divergence]
    assert abs(float(loss.detach()) - wanted) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_consistency_is_finite_at_logits_of_80_and_at_its_bound(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[1.0], [-1.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[80.0], [-80.0], [0.0]], dtype=dtype, requires_grad=True)
    alpha = torch.tensor([[0.5, 0.5]])
    loss = answer_consistency(hidden, weight, torch.tensor([[[0], [1]]]), alpha)
    loss.backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    bound = 0.5 * math.log(2) * (1 - float(alpha.square().sum()))
    assert abs(float(loss.detach()) - bound) < 1e-5


@settings(max_examples=40, deadline=None)
@given(K=st.integers(1, 8), V=st.integers(2, 20), scale=st.floats(0, 200), seed=st.integers(0, 1000))
def test_consistency_stays_within_its_bound(K: int, V: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, alpha = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(K, 3), (V, 3), (1, K)]
    )
    weight, alpha = scale * weight, torch.softmax(alpha, -1)
    loss = float(answer_consistency(hidden, weight, torch.arange(K).view(1, K, 1), alpha))
    assert -1e-12 <= loss <= 0.5 * math.log(2) * (1 - float(alpha.square().sum())) + 1e-12


def test_consistency_of_one_selected_rationale_is_0() -> None:
    case = random_case(1, 3, 6, 8, 31, 2).to(torch.float32)
    loss = answer_consistency(
        case.hidden_states, case.lm_head_weight, case.answer_index, torch.tensor([[0.0, 1.0, 0.0]])
    )
    loss.backward()
    assert float(loss.detach()) == 0 and not case.hidden_states.grad.any()


def test_excluded_teacher_tokens_count_as_probability_0() -> None:
    z = torch.randn(1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = z.flip(-1).clone()
    teacher[0, 1] = -torch.inf
    for divergence in ("forward", "jsd"):
        student = z.clone().requires_grad_()
        loss, _ = ta_weighted_kl(student, TeacherLogits(teacher), divergence=divergence)
        loss.backward()
        close = teacher.clone()
        close[0, 1] = -600.0
        wanted, _ = ta_weighted_kl(z, TeacherLogits(close), divergence=divergence)
        torch.testing.assert_close(loss.detach(), wanted)
        assert torch.isfinite(student.grad).all()
    assert ta_weighted_kl(z, TeacherLogits(teacher), divergence="reverse")[0] == math.inf


def test_an_infinite_divergence_of_weight_0_adds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((2, 2, 3), (7, 3)))
    teacher = torch.randn(2, 2, 7, generator=generator)
    teacher[1, :, 1] = -torch.inf
    options = {"divergence": "reverse", "rationale_weights": torch.tensor([1.0, 0.0])}
    labels = torch.zeros(2, 2, dtype=torch.int64)
    joint, losses = fused_linear_kl(hidden, weight, TeacherLogits(teacher), labels, **options)
    assert joint == losses[0] and losses[1] == math.inf
    dense, losses = ta_weighted_kl(hidden @ weight.T, TeacherLogits(teacher), **options)
    torch.testing.assert_close(dense, joint)
    assert losses[1] == math.inf


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nor_does_it_to_a_gradient_or_to_what_mind_loss_tells(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((1, 2, 2, 3), (7, 3)))
    teacher = torch.randn(1, 2, 2, 7, generator=generator)
    teacher[0, 1, :, 1] = -torch.inf
    alpha = torch.tensor([[1.0, 0.0]])
    logits = (hidden @ weight.T).requires_grad_()
    options = {"divergence": "reverse", "backend": backend}
    ta_weighted_kl(logits, TeacherLogits(teacher), alpha, **options)[0].backward()
    wanted = logits.detach()[:, :1].clone().requires_grad_()
    ta_weighted_kl(wanted, TeacherLogits(teacher[:, :1]), alpha[:, :1], **options)[0].backward()
    torch.testing.assert_close(logits.grad[:, :1], wanted.grad)
    assert not logits.grad[:, 1].any()

    # The rows of an answer go through backward for the weights' gradient, also with weight 0.
    hidden.requires_grad_()
    output = mind_loss(
        hidden, weight, torch.zeros(1, 2, 2, dtype=torch.int64), rationale_weights=alpha.clone().requires_grad_(),
        answer_index=torch.tensor([[[1], [3]]]), teacher=TeacherLogits(teacher), kl_weight=0.5, **options,
    )  # fmt: skip
    output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), output.cross_entropy + 0.5 * output.kl)
    assert torch.isfinite(output.kl) and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["hidden", "logits", "topk"])
def test_a_teacher_that_is_a_slice_is_not_copied_whole(kind: str, backend: str) -> None:
    case = random_case(2, 3, 7, 8, 40, 2).to(torch.float32)
    whole = random_teacher(kind, case)
    tensors = {name: value for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
    tensors = {name: value[:, :, :-1] for name, value in tensors.items() if value.ndim == 4}
    sliced = replace(whole, **tensors)
    contiguous = replace(whole, **{name: value.contiguous() for name, value in tensors.items()})
    rows = case.hidden_states[:, :, :-1].detach().contiguous().requires_grad_()
    labels = case.shift_labels[:, :, :-1].contiguous()
    copied: list[int] = []

    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.clone.default:
                copied.append(result.numel())
            return result

    def step(teacher):
        loss, _ = fused_linear_kl(rows, case.lm_head_weight, teacher, labels, max_logits_bytes=4096, backend=backend)
        return loss, *torch.autograd.grad(loss, (rows, case.lm_head_weight))

    with Clones():
        given = step(sliced)
    assert max(copied, default=0) < min(value.numel() for value in tensors.values())
    for one, other in zip(given, step(contiguous), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("needs_gradient", [True, False], ids=["gradient", "loss-only"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_student_logits_that_are_a_slice_are_not_copied_whole(kind: str, backend: str, needs_gradient: bool) -> None:
    case = random_case(2, 3, 7, 8, 40, 2).to(torch.float32)
    teacher, weights = random_teacher(kind, case), case.rationale_weights.detach()
    logits = torch.randn(2, 3, 8, 40, generator=torch.Generator().manual_seed(0))[:, :, :-1]
    copied: list[int] = []

    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.clone.default, torch.ops.aten._reshape_copy.default):
                copied.append(result.numel())
            return result

    def step(logits):
        student = logits.detach().requires_grad_(needs_gradient)
        loss, losses = ta_weighted_kl(student, teacher, weights, shift_labels=case.shift_labels, backend=backend)
        return (losses, *torch.autograd.grad(loss, student)) if needs_gradient else (losses,)

    with Clones():
        given = step(logits)
    if backend == "torch" or needs_gradient:
        assert max(copied, default=0) < logits.numel()
    for one, other in zip(given, step(logits.contiguous()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_does_not_mind_what_becomes_of_the_rationale_losses(backend: str) -> None:
    case = random_case(2, 3, 4, 8, 40, 1).to(torch.float32)
    logits = torch.randn(2, 3, 4, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    leaves = (logits, case.rationale_weights)
    loss, losses = ta_weighted_kl(logits, random_teacher("logits", case), case.rationale_weights, backend=backend)
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    losses.zero_()
    for one, other in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert torch.equal(one, other)


def test_topk_of_the_whole_vocabulary_is_the_dense_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    dense = torch.log_softmax(torch.randn(4, 9, generator=generator, dtype=torch.float64), -1)
    logprobs, token_ids = dense.topk(9)
    for tail in ("bucket", "renormalize"):
        for divergence in ("forward", "reverse", "jsd"):
            loss, _ = ta_weighted_kl(z, TeacherTopK(token_ids, logprobs, tail=tail), divergence=divergence)
            wanted, _ = ta_weighted_kl(z, TeacherLogits(dense), divergence=divergence)
            torch.testing.assert_close(loss, wanted)
            (gradient,) = torch.autograd.grad(loss, z)
            torch.testing.assert_close(gradient, torch.autograd.grad(wanted, z)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_topk_of_the_whole_vocabulary_has_no_tail(backend: str, dtype: torch.dtype) -> None:
    # What rounding leaves of the teacher's mass is not told to lie on a token that the student gives nothing.
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 40, generator=generator, requires_grad=True)
    dense = torch.log_softmax(2 * torch.randn(50, 40, generator=generator), -1)
    logprobs, token_ids = dense.topk(40)
    logprobs = logprobs.to(dtype)
    logprobs[0, 30:], token_ids[0, 30:] = -torch.inf, -1  # one row has a tail
    given = ta_weighted_kl(z[1:], TeacherTopK(token_ids[1:], logprobs[1:]), backend=backend)[0]
    rounded = torch.empty_like(dense).scatter_(-1, token_ids.clamp(min=0), logprobs.float())
    wanted = ta_weighted_kl(z[1:], TeacherLogits(rounded[1:]))[0]
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (given, wanted)), rtol=1e-5, atol=1e-8)
    first, _ = ta_weighted_kl(z[:1], TeacherTopK(token_ids[:1], logprobs[:1]), backend=backend)
    short, _ = ta_weighted_kl(z[:1], TeacherTopK(token_ids[:1, :30], logprobs[:1, :30]), backend=backend)
    torch.testing.assert_close(first, short)


def test_topk_tail_keeps_its_digits_when_the_student_is_sure() -> None:
    # The student's tail is 3e-9: 1 − Σp in fp32 would be 0 or 6e-8.
    z = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)
    teacher = TeacherTopK(torch.tensor([[0]]), torch.tensor([[math.log(0.9)]]))
    loss, _ = ta_weighted_kl(z, teacher)
    loss.backward()
    tail = 2 * math.exp(-20) / (1 + 2 * math.exp(-20))
    wanted = 0.9 * (math.log(0.9) - math.log1p(-tail)) + 0.1 * (math.log(0.1) - math.log(tail))
    assert abs(float(loss.detach()) - wanted) < 1e-6
    torch.testing.assert_close(z.grad, torch.tensor([[0.1 - tail, -0.05 + tail / 2, -0.05 + tail / 2]]))


def test_vocab_size_cuts_both_vocabularies() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    loss, _ = ta_weighted_kl(z, TeacherLogits(teacher, vocab_size=9), divergence="jsd")
    wanted, _ = ta_weighted_kl(z[:, :9], TeacherLogits(teacher[:, :9]), divergence="jsd")
    torch.testing.assert_close(loss, wanted)
    (gradient,) = torch.autograd.grad(loss, z)
    assert not gradient[:, 9:].any()


def test_divergence_gradients_agree_with_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    log_teacher = torch.log_softmax(torch.randn(5, 7, generator=generator, dtype=torch.float64), -1)
    for divergence in ("forward", "reverse", "jsd"):
        log_student = torch.log_softmax(z, -1)
        t, s = log_teacher.exp(), log_student.exp()
        m = 0.8 * s + 0.2 * t
        wanted = {
            "forward": t * (log_teacher - log_student),
            "reverse": s * (log_student - log_teacher),
            "jsd": 0.2 * t * (log_teacher - m.log()) + 0.8 * s * (log_student - m.log()),
        }[divergence].sum(-1)
        loss, gradient = divergence_and_gradient(log_teacher.clone(), log_student.detach().clone(), divergence, 0.2)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), z)[0])


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("offset", [0.0, 32.0, 256.0])
def test_a_small_divergence_at_an_offset_of_the_logits(offset: float, divergence: str) -> None:
    # 6e-4 nats: an offset that is rounded once for a row would be 7e-3 of it at 256. Logits are exact in fp32.
    generator = torch.Generator().manual_seed(0)
    teacher = (64 * torch.randn(4, 500, generator=generator)).round() / 64 * 3
    student = teacher + (2 * torch.randn(4, 500, generator=generator)).round() / 64 + offset
    given, wanted = (
        ta_weighted_kl(student.to(dtype), TeacherLogits(teacher.to(dtype)), divergence=divergence)[0]
        for dtype in (torch.float32, torch.float64)
    )
    assert relative_error(given, wanted) < 2e-4


def test_jsd_of_equal_rows_is_0() -> None:
    log_probs = torch.log_softmax(torch.randn(1, 50, generator=torch.Generator().manual_seed(0)), -1).expand(4, 50)
    jsd, gradient = pairwise_jsd_and_gradient(log_probs.contiguous(), torch.ones(4, 4))
    assert jsd.abs().max() < 1e-6 and gradient is not None and gradient.abs().max() < 1e-7


# --- modules -----------------------------------------------------------------------------------------------------


def test_module_twins_give_what_the_functions_give() -> None:
    case = random_case(2, 3, 6, 8, 31, 2).to(torch.float32)
    h, w, labels, alpha = case.hidden_states, case.lm_head_weight, case.shift_labels, case.rationale_weights
    teacher = random_teacher("hidden", random_case(2, 3, 6, 8, 31, 2, dtype=torch.float32))
    logits = h @ w.T
    pairs = [
        (
            FusedLinearCrossEntropy(logit_scale=2.0, reduction="sum")(h, w, labels, rationale_weights=alpha),
            fused_linear_cross_entropy(h, w, labels, logit_scale=2.0, reduction="sum", rationale_weights=alpha),
        ),
        (
            FusedLinearKL(divergence="jsd", temperature=2.0)(h, w, teacher, labels, rationale_weights=alpha),
            fused_linear_kl(h, w, teacher, labels, divergence="jsd", temperature=2.0, rationale_weights=alpha),
        ),
        (
            TAWeightedKL(divergence="reverse")(logits, teacher, alpha, shift_labels=labels),
            ta_weighted_kl(logits, teacher, alpha, shift_labels=labels, divergence="reverse"),
        ),
        (
            (AnswerConsistency(logit_softcap=3.0)(h, w, case.answer_index, alpha),),
            (answer_consistency(h, w, case.answer_index, alpha, logit_softcap=3.0),),
        ),
        (
            MindLoss(consistency_weight=0.3, kl_weight=0.2)(
                h, w, labels, rationale_weights=alpha, answer_index=case.answer_index, teacher=teacher
            ),
            mind_loss(
                h,
                w,
                labels,
                rationale_weights=alpha,
                answer_index=case.answer_index,
                teacher=teacher,
                consistency_weight=0.3,
                kl_weight=0.2,
            ),
        ),
        (
            (MultiRationaleLogSoftmax(temperature=2.0)(logits),),
            (multi_rationale_log_softmax(logits, temperature=2.0),),
        ),
    ]
    for from_module, from_function in pairs:
        for a, b in zip(from_module, from_function, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "module",
    [MindLoss, FusedLinearCrossEntropy, FusedLinearKL, AnswerConsistency, TAWeightedKL, MultiRationaleLogSoftmax],
)
def test_a_modules_settings_are_attributes_that_forward_reads(module, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = module()
    wanted = {name: f"another {name}" for name in inspect.signature(module).parameters}
    for name, value in wanted.items():
        setattr(twin, name, value)
    assert repr(twin) == f"{module.__name__}({', '.join(f'{name}={value!r}' for name, value in wanted.items())})"
    read: dict[str, object] = {}
    home = sys.modules[module.__module__]
    (function,) = (name for name in home.__all__ if name.replace("_", "") == module.__name__.lower())
    monkeypatch.setattr(home, function, lambda *tensors, **more: read.update(more))
    tensors = inspect.signature(twin.forward).parameters.values()
    twin(**{each.name: None for each in tensors if each.default is inspect.Parameter.empty})
    assert {name: read[name] for name in wanted} == wanted
