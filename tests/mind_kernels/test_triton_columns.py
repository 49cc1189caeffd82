"""gradient_tolerance on the Triton backend: what the PyTorch path does, without a wait for the device.

On a GPU the kernels run there; without one, in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

import mind_kernels.triton_columns as triton_columns
from mind_kernels import GradientPruning, TeacherLogits, fused_linear_cross_entropy, mind_loss, record_pruning
from mind_kernels.pruning import choose_columns, most_kept
from mind_kernels.testing import MindCase, random_case, random_teacher, relative_error
from mind_kernels.triton_columns import TritonColumns, choose_triton_columns, column_sums, product_precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (m, V, H), each with its reason
SHAPES = {
    "ragged-m37-V333-H20": (37, 333, 20),
    "one-row-m1-V400-H5": (1, 400, 5),
    "tiles-m150-V700-H140": (150, 700, 140),  # more than one tile of rows, of kept columns and of H
    "groups-m600-V130-H70": (600, 130, 70),  # more tiles of rows than go together, the last group a part
}
CASES = [
    *(("ragged-m37-V333-H20", dtype) for dtype in DTYPES),
    ("one-row-m1-V400-H5", torch.float32),
    ("tiles-m150-V700-H140", torch.float32),
    ("tiles-m150-V700-H140", torch.bfloat16),
    ("groups-m600-V130-H70", torch.float32),
]


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one program over every axis that is split, at the sizes here."""
    for name, size in {"SUM_ROWS": 64, "COMPACT_COLUMNS": 512, "MEAN_ROWS": 256}.items():
        monkeypatch.setattr(triton_columns, name, size)


def dtype_id(dtype: object) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def peaked_gradient(m: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(m, V) softmax − onehot whose mass lies on a tenth of the columns, here and there; (m,) targets."""
    generator = torch.Generator().manual_seed(m)
    z = torch.randn(m, V, generator=generator)
    z[:, torch.randperm(V, generator=generator)[: max(V // 10, 1)]] += 9
    targets = torch.randint(0, max(V // 3, 1), (m,), generator=generator)
    G = torch.softmax(z, -1)
    G[torch.arange(m), targets] -= 1
    return G.to(dtype).to(DEVICE), targets.to(DEVICE)


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=dtype_id)
def test_column_sums(shape: str, dtype: torch.dtype) -> None:
    m, V, _ = SHAPES[shape]
    G = randn(m, V).to(dtype)
    square, mass = column_sums(G)
    assert relative_error(square, G.double().square().sum(0)) < 1e-6
    assert relative_error(mass, G.double().sum(0)) < 1e-6


@pytest.mark.parametrize("correction", [True, False], ids=["corrected", "cut"])
@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=dtype_id)
def test_the_columns_of_the_torch_path(shape: str, dtype: torch.dtype, correction: bool) -> None:
    """The same columns, record and correction, and products as exact as fp32 sums are."""
    m, V, H = SHAPES[shape]
    G, targets = peaked_gradient(m, V, dtype)
    W, X, total = randn(V, H, seed=1).to(dtype), randn(m, H, seed=2).to(dtype), randn(V, H, seed=3)
    pruning = GradientPruning(2**-6, correction)
    with record_pruning() as records:
        wanted, given = choose_columns(G, targets, pruning), choose_triton_columns(G, targets, pruning)
    assert wanted is not None
    k = int(given.num_kept)
    assert k == len(wanted.kept) < V / 2 and set(targets.tolist()) <= set(wanted.kept.tolist())
    assert torch.equal(given.kept[:k].long(), wanted.kept)
    assert torch.equal(given.kept_G[:, :k], wanted.G)
    one, other = records
    assert one.kept_share == other.kept_share == pytest.approx(k / V)
    assert other.certificate == pytest.approx(one.certificate, rel=1e-5)
    exact = G.double()
    D = exact.index_fill(1, wanted.kept, 0.0)
    assert 0 < float(D.norm()) <= pruning.tolerance * float(exact.norm())

    approximate = exact - D
    if correction:
        assert given.row_factor is not None and given.column_mass is not None
        assert wanted.row_factor is not None and wanted.column_mass is not None
        assert relative_error(given.row_factor, wanted.row_factor) < 1e-5
        assert relative_error(given.column_mass, wanted.column_mass) < 1e-5
        approximate = approximate + torch.outer(given.row_factor.double(), given.column_mass.double())
    else:
        assert given.row_factor is None and given.column_mass is None
    dX, dW = given.grad_hidden_states(W), total.clone()
    assert dX.dtype == torch.float32
    assert relative_error(dX, approximate @ W.double()) < 1e-6
    given.add_grad_weight_(dW, X)
    assert relative_error(dW, total.double() + (exact - D).t() @ X.double()) < 1e-6
    dropped = torch.ones(V, dtype=torch.bool, device=DEVICE).index_fill_(0, wanted.kept, False)
    assert torch.equal(dW[dropped], total[dropped]), "rows of dropped columns were written to"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_nothing_beyond_the_count_is_read(dtype: torch.dtype) -> None:
    m, V, H = SHAPES["tiles-m150-V700-H140"]
    G, targets = peaked_gradient(m, V, dtype)
    W, X = randn(V, H, seed=1).to(dtype), randn(m, H, seed=2).to(dtype)
    G[:, 0] = 0  # dropped, but a masked load of `kept` says 0
    columns = choose_triton_columns(G, targets.clamp(min=1), GradientPruning(2**-6, correction=False))
    k, filled = int(columns.num_kept), -(-int(columns.num_kept) // 16) * 16
    assert k % 16, "or there is nothing to fill up"
    assert bool((columns.kept_G[:, k:filled] == 0).all())
    dX, dW = columns.grad_hidden_states(W), torch.zeros(V, H, device=DEVICE)
    columns.add_grad_weight_(dW, X)

    dropped = columns.kept[k:].long()
    assert 0 in dropped.tolist()
    poisoned = columns._replace(
        G=torch.full_like(G, math.nan), kept_G=columns.kept_G.clone(), kept=columns.kept.clone()
    )
    poisoned.kept_G[:, filled:] = math.nan
    poisoned.kept[k:] = 2**30
    assert torch.equal(poisoned.grad_hidden_states(W.index_fill(0, dropped, math.nan)), dX)
    other = torch.zeros(V, H, device=DEVICE).index_fill_(0, dropped, math.nan)
    poisoned.add_grad_weight_(other, X)
    kept = columns.kept[:k].long()
    assert torch.equal(other[kept], dW[kept]) and bool(other[dropped].isnan().all())


def dense_columns(G: Tensor, targets: Tensor, correction: bool = True) -> TritonColumns:
    with record_pruning() as records:
        columns = choose_triton_columns(G, targets, GradientPruning(2**-9, correction))
    assert int(columns.num_kept) == G.shape[1]
    assert [(record.rows, record.kept_share, record.certificate) for record in records] == [(len(G), 1.0, 0.0)]
    return columns._replace(kept_G=torch.full_like(columns.kept_G, math.nan))  # is not read


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=dtype_id)
def test_a_dense_chunk_takes_all_columns_from_the_gradient(shape: str, dtype: torch.dtype) -> None:
    m, V, H = SHAPES[shape]
    G = (torch.softmax(0.1 * randn(m, V), -1) + 1 / V).to(dtype)
    W, X = randn(V, H, seed=1).to(dtype), randn(m, H, seed=2).to(dtype)
    columns = dense_columns(G, torch.zeros(m, dtype=torch.int64, device=DEVICE))
    assert relative_error(columns.grad_hidden_states(W), G.double() @ W.double()) < 1e-6
    dW = torch.zeros(V, H, device=DEVICE)
    columns.add_grad_weight_(dW, X)
    assert relative_error(dW, G.double().t() @ X.double()) < 1e-6
    assert columns.row_factor is not None and columns.column_mass is not None
    assert not bool(columns.row_factor.any()) and not bool(columns.column_mass.any())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-30, 1e30], ids=str)
def test_a_gradient_to_be_unsure_of_is_dense(value: float) -> None:
    G, targets = peaked_gradient(5, 90, torch.float32)
    G = G * value
    W = randn(90, 4, seed=1)
    dX = dense_columns(G, targets).grad_hidden_states(W)
    assert torch.allclose(dX, (G.double() @ W.double()).float(), rtol=1e-4, equal_nan=True)


def test_targets_are_kept_though_they_are_all() -> None:
    """One row a column: nothing is left to drop. V of one column: neither."""
    G, _ = peaked_gradient(40, 40, torch.float32)
    dense_columns(G, torch.arange(40, device=DEVICE))
    G, _ = peaked_gradient(3, 1, torch.float32)
    dense_columns(G + 1, torch.zeros(3, dtype=torch.int64, device=DEVICE))


def test_targets_that_hold_next_to_nothing_are_kept() -> None:
    G = torch.full((2, 50), 1e-6, device=DEVICE)
    G[:, 7] = 1.0
    columns = choose_triton_columns(G, torch.tensor([3, 49], device=DEVICE), GradientPruning(2**-6))
    assert columns.kept[: int(columns.num_kept)].tolist() == [3, 7, 49]


def test_precision_of_fp32_products_is_that_of_pytorch() -> None:
    assert product_precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert product_precision() == ("ieee" if torch.version.hip else "tf32")
    finally:
        torch.set_float32_matmul_precision("highest")


# --- public functions --------------------------------------------------------------------------------------------


def peaked_case(dtype: torch.dtype, V: int = 450) -> MindCase:
    """A student that is sure: logits of ±20, most of the mass on a few tokens, which rows share."""
    case = random_case(2, 3, 6, 24, V, 2, seed=5, device=DEVICE)
    case.lm_head_weight.mul_(5)
    case.lm_head_weight[: V // 30].mul_(2)
    return case.to(dtype)


def whole(case: MindCase, name: str, **more: Any) -> Tensor:
    """A loss with a bias, a cap and a scale: the cross-entropy, or all terms of mind_loss."""
    common = {"rationale_weights": case.rationale_weights, "lm_head_bias": case.lm_head_bias, "logit_softcap": 30.0}
    arguments = case.hidden_states, case.lm_head_weight, case.shift_labels
    if name == "cross_entropy":
        return fused_linear_cross_entropy(*arguments, logit_scale=1.1, **common, **more)[0]
    if name == "topk":
        teacher = random_teacher("topk", case)
    else:
        logits = (case.hidden_states @ case.lm_head_weight.t()).detach()
        teacher = TeacherLogits(logits.roll(1, dims=-2))  # as sure, of other tokens
    return mind_loss(
        *arguments, answer_index=case.answer_index, teacher=teacher, kl_weight=0.5, consistency_weight=0.5,
        **common, **more,
    ).loss  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*(("cross_entropy", dtype) for dtype in DTYPES), ("topk", torch.float32), ("logits", torch.bfloat16)],
    ids=dtype_id,
)
def test_gradients_of_the_torch_path(name: str, dtype: torch.dtype) -> None:
    case = peaked_case(dtype)
    leaves = case.leaves()

    def run(**more: Any) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
        with record_pruning() as records:
            loss = whole(case, name, **more)
            gradients = torch.autograd.grad(loss, tuple(leaves.values()))
        return loss.detach(), dict(zip(leaves, gradients, strict=True)), records

    exact_case = case.to(torch.float64)
    exact_case.rationale_weights = case.rationale_weights.detach().double().requires_grad_()
    exact = torch.autograd.grad(whole(exact_case, name, backend="torch"), tuple(exact_case.leaves().values()))
    dense_loss, dense, _ = run(backend="triton")
    for variant in ({}, {"correction": False}, {"prune_weight_gradient": False}):
        pruning = GradientPruning(2**-5, **variant)
        loss, given, records = run(backend="triton", gradient_tolerance=pruning)
        _, wanted, wanted_records = run(backend="torch", gradient_tolerance=pruning)
        assert torch.equal(loss, dense_loss)
        (record,), (wanted_record,) = records, wanted_records
        assert 0 < record.kept_share < 0.5 and 0 < record.certificate <= 2**-5
        assert record.kept_share == pytest.approx(wanted_record.kept_share, abs=0 if dtype == torch.float32 else 0.05)
        for (leaf, value), truth in zip(given.items(), exact, strict=True):
            # Of 16 bits, the two paths round z and G at different places.
            near = 1e-4 if dtype == torch.float32 else 1.5 * relative_error(wanted[leaf], truth) + 2**-8
            against = wanted[leaf] if dtype == torch.float32 else truth
            assert relative_error(value, against) <= near, (leaf, variant)
        from_all_of_G = {"lm_head_bias", "rationale_weights"}
        if not pruning.prune_weight_gradient:
            from_all_of_G.add("lm_head_weight")
        for leaf in from_all_of_G:
            assert torch.equal(given[leaf], dense[leaf]), leaf


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_chunks_frozen_heads_and_runs(dtype: torch.dtype) -> None:
    """Chunks within the budget add up in fp32; a head without a gradient costs none; the same from run to run."""
    case = peaked_case(dtype)
    V = len(case.lm_head_weight)
    budget = 9 * V * dtype.itemsize
    exact_case = case.to(torch.float64)
    exact = torch.autograd.grad(
        whole(exact_case, "cross_entropy", backend="torch"), (exact_case.hidden_states, exact_case.lm_head_weight)
    )
    options = {"backend": "triton", "gradient_tolerance": 2**-6, "max_logits_bytes": budget}
    leaves = case.hidden_states, case.lm_head_weight
    with record_pruning() as records:
        given = torch.autograd.grad(whole(case, "cross_entropy", **options), leaves)
    assert len(records) > 2 and any(record.kept_share < 0.5 for record in records)
    assert all(record.rows * (V + most_kept(V)) * dtype.itemsize <= budget for record in records)
    for one, other in zip(given, torch.autograd.grad(whole(case, "cross_entropy", **options), leaves), strict=True):
        assert torch.equal(one, other)
    for value, truth in zip(given, exact, strict=True):
        assert relative_error(value, truth) < 8 * 2**-6
    frozen = replace(case, lm_head_weight=case.lm_head_weight.detach())
    assert torch.equal(torch.autograd.grad(whole(frozen, "cross_entropy", **options), leaves[0])[0], given[0])


def test_tolerance_0_is_the_dense_path_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = peaked_case(torch.float32)
    leaves = case.hidden_states, case.lm_head_weight
    wanted = torch.autograd.grad(whole(case, "topk", backend="triton"), leaves)
    monkeypatch.setattr(triton_columns, "choose_triton_columns", None)  # not even asked
    given = torch.autograd.grad(whole(case, "topk", backend="triton", gradient_tolerance=0.0), leaves)
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one, other)


def test_an_unsure_student_stays_dense() -> None:
    case = random_case(2, 3, 8, 16, 300, 2, device=DEVICE).to(torch.float32)
    leaves = case.hidden_states, case.lm_head_weight
    wanted = torch.autograd.grad(whole(case, "cross_entropy", backend="triton"), leaves)
    with record_pruning() as records:
        loss = whole(case, "cross_entropy", backend="triton", gradient_tolerance=2**-9)
        given = torch.autograd.grad(loss, leaves)
    assert [record.kept_share for record in records] == [1.0]
    for one, other in zip(given, wanted, strict=True):
        assert relative_error(one, other) < 1e-6


def test_inside_a_compiled_graph() -> None:
    torch._dynamo.reset()
    case = peaked_case(torch.float32)
    leaves = case.hidden_states, case.lm_head_weight

    def function(x: Tensor, w: Tensor) -> Tensor:
        pruning = GradientPruning(2**-6)
        return fused_linear_cross_entropy(x, w, case.shift_labels, gradient_tolerance=pruning, backend="triton")[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves), strict=True
    ):
        assert torch.equal(one, other)


# --- nothing waits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"correction": False}, {"prune_weight_gradient": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_step_with_a_tolerance_waits_for_nothing(
    dtype: torch.dtype, variant: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors, whose values cannot be read; with kernels that are not run but whose host code is."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the backend takes tensors that are not on a GPU
    launched: list[str] = []
    for kind, launch in ((GridExecutor, "__call__"), (JITFunction, "run")):
        monkeypatch.setattr(kind, launch, lambda self, *args, **kwargs: launched.append(self.fn.__name__))
    host = random_case(2, 3, 6, 8, 40, 2).to(dtype)
    tensors = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for name, tensor in vars(host).items()
    }
    case = MindCase(**tensors)

    def step(backend: str) -> None:
        mind_loss(
            case.hidden_states, case.lm_head_weight, case.shift_labels,
            rationale_weights=case.rationale_weights,
            supervised_index=(host.shift_labels.flatten() != -100).nonzero().squeeze(1),
            answer_index=host.answer_index,
            teacher=TeacherLogits(torch.empty(2, 3, 6, 40, dtype=dtype, device="meta")), kl_weight=0.5,
            lm_head_bias=case.lm_head_bias, logit_softcap=5.0, num_questions=torch.ones((), device="meta"),
            gradient_tolerance=GradientPruning(2**-6, **variant), backend=backend,
            max_logits_bytes=800 * dtype.itemsize,
        ).loss.backward()  # fmt: skip

    with record_pruning() as records:
        step("triton")
    assert len(records) > 1 and all(record.shares.device.type == "meta" for record in records)
    assert {"column_sums_kernel", "compact_kernel", "grad_hidden_kernel"} <= set(launched)
    assert ("head_mean_kernel" in launched) == variant.get("correction", True)
    assert ("grad_weight_kernel" in launched) == variant.get("prune_weight_gradient", True)
    for name, leaf in case.leaves().items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, name
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step("torch")  # which does wait: so would be seen
