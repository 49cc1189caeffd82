"""What a device and a compiler ask of the losses: that nothing waits for results, and that a graph is whole.

A meta tensor has a shape and no values, on a device that is not the CPU: whatever would read a value raises. So a step
on meta tensors is a step in which the host does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import mind_kernels.kl.function as kl_function
import mind_kernels.linear_sweep as linear_sweep
import mind_kernels.log_softmax.triton_path as log_softmax
import mind_kernels.operators as operators
import mind_kernels.products as products
import mind_kernels.triton_columns
import mind_kernels.triton_multiply as triton_multiply
import mind_kernels.triton_rows  # noqa: F401 - what a test's TRITON_INTERPRET finds imported stays compiled on a GPU
from mind_kernels import (
    answer_consistency,
    fused_linear_cross_entropy,
    fused_linear_kl,
    mind_loss,
    multi_rationale_log_softmax,
    ta_weighted_kl,
)
from mind_kernels.arguments import choose_backend
from mind_kernels.combined.reference import reference_mind_loss
from mind_kernels.teachers import Teacher, TeacherHidden, TeacherLogits, TeacherTopK
from mind_kernels.testing import MindCase, random_case, random_teacher, relative_error
from mind_kernels.triton_multiply import multiply_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEACHERS = ("hidden", "logits", "topk", "topk-renormalize")


def supervised(case: MindCase) -> Tensor:
    return (case.shift_labels.flatten() != -100).nonzero().squeeze(1)


def to_meta(teacher: Teacher) -> Teacher:
    return replace(
        teacher, **{name: value.to("meta") for name, value in vars(teacher).items() if isinstance(value, Tensor)}
    )


def on_meta(case: MindCase) -> MindCase:
    return MindCase(**{name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
                       for name, tensor in vars(case).items()})  # fmt: skip


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
def test_a_step_waits_for_nothing_when_the_host_knows_the_rows(kind: str, dtype: torch.dtype) -> None:
    host = random_case(2, 3, 6, 8, 40, 2).to(dtype)
    case, teacher = on_meta(host), to_meta(random_teacher(kind, host))
    output = mind_loss(
        case.hidden_states, case.lm_head_weight, case.shift_labels,
        rationale_weights=case.rationale_weights,
        supervised_index=supervised(host), answer_index=host.answer_index, teacher=teacher, kl_weight=0.5,
        lm_head_bias=case.lm_head_bias, logit_softcap=5.0, num_questions=torch.ones((), device="meta"),
        max_logits_bytes=4000,
    )  # fmt: skip
    output.loss.backward()
    for name, leaf in case.leaves().items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, name


def on_launch(monkeypatch: pytest.MonkeyPatch, launched: Callable[[str], object]) -> None:
    """From now on kernels are not run: `launched` is told their names, and the backend takes tensors of any device."""
    launch = lambda kernel, grid: lambda *arguments, **options: launched(kernel.fn.__name__)  # noqa: E731
    monkeypatch.setattr(type(multiply_kernel), "__getitem__", launch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def triton_step(kind: str, *, gradient_tolerance: float = 0.0, logits_dtype: torch.dtype | None = None) -> None:
    """Forward and backward of mind_loss on meta tensors."""
    host = random_case(2, 3, 6, 8, 40, 2).to(torch.bfloat16)
    case, teacher = on_meta(host), to_meta(random_teacher(kind, host))
    output = mind_loss(
        case.hidden_states, case.lm_head_weight, case.shift_labels,
        rationale_weights=case.rationale_weights,
        supervised_index=supervised(host), answer_index=host.answer_index, teacher=teacher, kl_weight=0.5,
        lm_head_bias=None if gradient_tolerance else case.lm_head_bias, logit_softcap=5.0,
        num_questions=torch.ones((), device="meta"), max_logits_bytes=8000, backend="triton",
        logits_dtype=logits_dtype, gradient_tolerance=gradient_tolerance,
    )  # fmt: skip
    output.loss.backward()


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["stored", "wide"])
@pytest.mark.parametrize("gradient_tolerance", [0.0, 2**-8], ids=["dense", "pruned"])
def test_what_launches_the_kernels_waits_for_nothing(
    kind: str, logits_dtype: torch.dtype | None, gradient_tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with the Triton path, whose kernels are not run: their arguments are made, their results are taken."""
    launched: list[str] = []
    on_launch(monkeypatch, launched.append)
    triton_step(kind, logits_dtype=logits_dtype, gradient_tolerance=gradient_tolerance)
    wanted = {"lse_kernel", "pairs_kernel", "multiply_kernel"}
    wanted |= {"tail_kernel", "tail_gradient_kernel"} if "topk" in kind else {"dense_kl_kernel"}
    if gradient_tolerance:
        wanted |= {
            "column_sums_kernel",
            "compact_kernel",
            "head_mean_kernel",
            "grad_hidden_kernel",
            "grad_weight_kernel",
        }
    assert set(launched) == wanted


class Operations(TorchDispatchMode):
    """Which of PyTorch's operations were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__.rstrip("_"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("gradient_tolerance", [0.0, 2**-8], ids=["dense", "pruned"])
def test_nothing_is_added_atomically(kind: str, gradient_tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch's documentation says of its operations: on a GPU these add in an order that is not fixed."""
    on_launch(monkeypatch, lambda name: None)
    with Operations() as operations:
        triton_step(kind, gradient_tolerance=gradient_tolerance)
    atomic = {"index_add", "scatter_add", "scatter_reduce", "index_reduce", "bincount", "histc", "put"}
    assert "index_put" in operations.names and not operations.names & atomic


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on PyTorch's current device, which need not be that of the tensors."""
    current: list[torch.device] = []
    launched: dict[str, list[torch.device]] = {}

    @contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    for module in (linear_sweep, kl_function, triton_multiply, log_softmax):
        monkeypatch.setattr(module, "current_device", recorded)
    on_launch(monkeypatch, lambda name: launched.setdefault(name, []).extend(current[-1:] or [torch.device("cpu")]))
    for kind in TEACHERS:
        triton_step(kind, gradient_tolerance=2**-8)
    host = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    logits = torch.empty(2, 3, 6, 40, device="meta").requires_grad_()
    for kind in TEACHERS:
        ta_weighted_kl(logits, to_meta(random_teacher(kind, host)), backend="triton")[0].backward()
    multi_rationale_log_softmax(logits, backend="triton").sum().backward()
    assert len(launched) == 13 and {device for devices in launched.values() for device in devices} == {logits.device}


@pytest.mark.parametrize("missing", ["supervised_index", "answer_index"])
def test_a_step_waits_when_only_the_device_knows_the_rows(missing: str) -> None:
    """The other half of the test above: a meta step does notice what reads a value."""
    host = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    case = on_meta(host)
    known = {"supervised_index": supervised(host), "answer_index": host.answer_index}
    known[missing] = None if missing == "supervised_index" else case.answer_index
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        mind_loss(
            case.hidden_states,
            case.lm_head_weight,
            case.shift_labels,
            rationale_weights=case.rationale_weights,
            **known,
        )


@pytest.mark.parametrize("kind", TEACHERS)
def test_divergences_on_logits_wait_for_nothing(kind: str) -> None:
    host = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    case, teacher = on_meta(host), to_meta(random_teacher(kind, host))
    logits = case.hidden_states @ case.lm_head_weight.t()
    for rows in ({}, {"shift_labels": case.shift_labels, "supervised_index": supervised(host)}):
        loss, _ = ta_weighted_kl(logits, teacher, case.rationale_weights, **rows)
        torch.autograd.grad(loss, logits, retain_graph=True)
    multi_rationale_log_softmax(logits, token_ids=torch.zeros(2, 3, 6, 1, dtype=torch.int64, device="meta"))


def test_supervised_index_changes_no_result() -> None:
    case = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    arguments = (case.hidden_states, case.lm_head_weight, case.shift_labels)
    for function in (
        lambda **known: fused_linear_cross_entropy(*arguments, rationale_weights=case.rationale_weights, **known),
        lambda **known: fused_linear_kl(
            case.hidden_states, case.lm_head_weight, random_teacher("logits", case), case.shift_labels, **known
        ),
    ):
        for plain, known in zip(function(), function(supervised_index=supervised(case).flip(0)), strict=True):
            assert torch.equal(plain, known)
    for wrong in (supervised(case)[1:], supervised(case).index_fill(0, torch.tensor([0]), 0), torch.arange(3)):
        with pytest.raises(ValueError, match=r"supervised_index: given \d+ rows, wanted the \d+ rows of shift_labels"):
            fused_linear_cross_entropy(*arguments, supervised_index=wrong)
    with pytest.raises(ValueError, match=r"supervised_index: given shape .* wanted \(n,\) on the cpu"):
        fused_linear_cross_entropy(*arguments, supervised_index=supervised(case)[None])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_default_device_changes_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.set_default_device is for tensors that name none: what the host keeps for itself must name its own."""
    case = random_case(2, 3, 6, 8, 40, 2, device=DEVICE).to(torch.float32)
    x, w, labels = case.hidden_states, case.lm_head_weight, case.shift_labels
    teacher = random_teacher("logits", case)

    def step() -> list[Tensor]:
        whole = mind_loss(x, w, labels, rationale_weights=case.rationale_weights, answer_index=case.answer_index,
                          consistency_weight=3.0, gradient_tolerance=0.01, backend=backend)  # fmt: skip
        plain, _ = fused_linear_cross_entropy(x, w, labels, backend=backend)
        on_logits, _ = ta_weighted_kl(x @ w.t(), teacher, backend=backend)
        return [whole.loss, plain, on_logits, *torch.autograd.grad(whole.loss + plain + on_logits, (x, w))]

    wanted = step()
    for computes in (True, False):
        monkeypatch.setattr(products, "cpu_computes", lambda dtype, computes=computes: computes)
        with torch.device("meta"):
            given = step()
        for one, other in zip(given, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nor_does_the_default_dtype(backend: str) -> None:
    case = random_case(2, 3, 6, 8, 40, 3, device=DEVICE).to(torch.float32)  # 1/6 and 1/3 are no numbers of 16 bits

    def step() -> list[Tensor]:
        plain, _ = fused_linear_cross_entropy(case.hidden_states, case.lm_head_weight, case.shift_labels)
        arguments = case.hidden_states, case.lm_head_weight, case.answer_index, case.rationale_weights
        return [plain, answer_consistency(*arguments, backend=backend)]

    wanted = step()
    torch.set_default_dtype(torch.bfloat16)
    try:
        given = step()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_default_weights_are_fp64_beside_fp64() -> None:
    case = random_case(1, 3, 6, 8, 40, 2)
    arguments = case.hidden_states, case.lm_head_weight, case.shift_labels
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    wanted, _ = fused_linear_cross_entropy(*arguments, rationale_weights=third)
    torch.testing.assert_close(fused_linear_cross_entropy(*arguments)[0], wanted, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def losses(case: MindCase) -> dict[str, Callable[..., Tensor]]:
    """Every public function, of the four differentiable tensors."""
    teachers = {kind: random_teacher(kind, case) for kind in TEACHERS}
    labels, answers = case.shift_labels, case.answer_index

    def cross_entropy(x, w, b, a):
        return fused_linear_cross_entropy(x, w, labels, rationale_weights=a, lm_head_bias=b, logit_softcap=3.0)[0]

    def linear_kl(x, w, b, a):
        teacher = teachers["hidden"]
        return fused_linear_kl(x, w, teacher, labels, rationale_weights=a, lm_head_bias=b, divergence="jsd")[0]

    def whole(x, w, b, a):
        output = mind_loss(
            x, w, labels, rationale_weights=a, lm_head_bias=b, answer_index=answers, teacher=teachers["topk"],
            kl_weight=0.3, num_questions=torch.tensor(4.0), consistency_weight=0.5,
        )  # fmt: skip
        return output.loss + 0 * output.rationale_losses.sum()

    def consistency(x, w, b, a):
        return answer_consistency(x, w, answers, a, lm_head_bias=b)

    def on_logits(x, w, b, a):
        return ta_weighted_kl(x @ w.t() + b, teachers["logits"], a, shift_labels=labels)[0]

    def log_probs(x, w, b, a):
        chosen = multi_rationale_log_softmax(x @ w.t() + b, temperature=2.0, token_ids=labels.clamp(min=0)[..., None])
        return (chosen * a[..., None, None]).sum()

    return {f.__name__: f for f in (cross_entropy, linear_kl, whole, consistency, on_logits, log_probs)}


@pytest.mark.parametrize("name", list(losses(random_case(1, 1, 2, 2, 4, 1))))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_compiles_as_one_graph_with_the_same_results(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    case = random_case(2, 3, 6, 8, 40, 2).to(dtype)
    function, leaves = losses(case)[name], tuple(case.leaves().values())
    eager = function(*leaves)
    wanted = torch.autograd.grad(2.5 * eager, leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    given = torch.autograd.grad(2.5 * compiled, leaves)
    for part, one, other in zip(("loss", *case.leaves()), (compiled, *given), (eager, *wanted), strict=True):
        assert one.dtype == other.dtype, part
        # A 16-bit gradient is scaled by 2.5 in fp32 here and in 16 bits there.
        assert relative_error(one, other) <= (1e-12 if dtype == torch.float64 else 2**-8), part


@pytest.mark.parametrize("name", ["cross_entropy", "whole", "consistency", "on_logits"])
def test_other_shapes_compile_too(name: str) -> None:
    torch._dynamo.reset()

    def function(x, w, a, labels, answers, count):
        if name == "cross_entropy":
            return fused_linear_cross_entropy(x, w, labels)
        if name == "whole":
            output = mind_loss(x, w, labels, rationale_weights=a, answer_index=answers, num_questions=count)
            return output.loss, output.rationale_losses
        if name == "consistency":
            return (answer_consistency(x, w, answers, a),) * 2
        z = x @ w.t()
        return ta_weighted_kl(z, TeacherLogits(z.detach().roll(1, -1)), a, shift_labels=labels)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for B, K, T in ((2, 3, 6), (3, 3, 6), (3, 3, 7), (4, 2, 5), (1, 4, 6)):
        case = random_case(B, K, T, 8, 40, 2).to(torch.float32)
        leaves = case.hidden_states, case.lm_head_weight
        arguments = *leaves, case.rationale_weights, case.shift_labels, case.answer_index, 7 * B
        results = [call(*arguments) for call in (compiled, function)]
        gradients = [torch.autograd.grad(loss, leaves) for loss, _ in results]
        for one, other in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
            torch.testing.assert_close(one, other)


def test_a_frozen_head_costs_no_weight_gradient_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    case = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    made: list[int] = []
    monkeypatch.setattr(linear_sweep._WeightGradient, "add", lambda self, G, X: made.append(len(X)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x, w):
        return fused_linear_cross_entropy(x, w, case.shift_labels)[0]

    torch.autograd.grad(function(case.hidden_states, case.lm_head_weight.detach()), case.hidden_states)
    assert made == []
    torch.autograd.grad(function(case.hidden_states, case.lm_head_weight), case.hidden_states)
    assert made


def test_a_teacher_within_the_graph_is_not_differentiated() -> None:
    """Its attention has a backward that does not take the missing gradient of a teacher whose weights may have one."""
    torch._dynamo.reset()
    x = torch.randn(2, 5, 8, requires_grad=True)
    lm_head_weight = torch.randn(17, 8, requires_grad=True)
    teacher_weight = torch.randn(8, 8, requires_grad=True)
    teacher_head = torch.randn(17, 8, requires_grad=True)
    shift_labels = torch.zeros(2, 5, dtype=torch.int64)

    def function() -> Tensor:
        query = x.detach() @ teacher_weight
        states = torch.nn.functional.scaled_dot_product_attention(query[None], query[None], query[None])[0]
        return fused_linear_kl(x, lm_head_weight, TeacherHidden(states, teacher_head), shift_labels)[0]

    wanted = torch.autograd.grad(function(), (x, lm_head_weight))
    torch.compile(function, fullgraph=True, backend="aot_eager")().backward()
    for leaf, gradient in zip((x, lm_head_weight), wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    assert teacher_weight.grad is None and teacher_head.grad is None


def test_a_setting_that_changes_compiles_anew() -> None:
    """Without dynamic=False PyTorch makes a variable of it at its second value, which no setting can be."""
    torch._dynamo.reset()
    case = random_case(2, 3, 6, 8, 40, 2).to(torch.float64)
    teacher, leaves = random_teacher("logits", case), (case.hidden_states, case.lm_head_weight)

    def function(kl_weight, temperature):
        return mind_loss(
            *leaves, case.shift_labels, rationale_weights=case.rationale_weights, answer_index=case.answer_index,
            teacher=teacher, kl_weight=kl_weight, consistency_weight=kl_weight / 2, temperature=temperature,
        ).loss  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    for settings in ((0.5, 1.0), (0.6, 1.0), (0.7, 1.0), (0.7, 2.0), (0.7, 3.0)):
        given, wanted = (call(*settings) for call in (compiled, function))
        torch.testing.assert_close(given, wanted)
        for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in (given, wanted)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["cross_entropy", "on_logits"])
def test_a_second_derivative_through_the_operators_is_an_error(name: str) -> None:
    """With a backend that leaves the derivative to autograd; AOTAutograd, beneath the others, refuses by itself."""
    torch._dynamo.reset()
    case = random_case(2, 3, 6, 8, 40, 2).to(torch.float64)
    leaves = tuple(case.leaves().values())
    loss = torch.compile(losses(case)[name], fullgraph=True, backend="eager")(*leaves)
    torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=r"given create_graph=True, wanted False: there is no second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)


def test_bad_values_are_told_inside_a_compiled_graph() -> None:
    torch._dynamo.reset()
    case = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    labels = case.shift_labels.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(labels):
        return fused_linear_cross_entropy(case.hidden_states, case.lm_head_weight, labels)[0]

    function(labels)
    labels[0, 0, -1] = 40
    with pytest.raises(ValueError, match="shift_labels: given 40 at flat row 5"):
        function(labels)


@pytest.mark.parametrize("function", [fused_linear_kl, ta_weighted_kl])
def test_a_bad_token_id_is_told_inside_a_compiled_graph(function: Any) -> None:
    torch._dynamo.reset()
    case = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    teacher = random_teacher("topk", case)
    assert isinstance(teacher, TeacherTopK)
    head = {"lm_head_weight": case.lm_head_weight} if function is fused_linear_kl else {}
    rows = case.hidden_states if head else case.hidden_states @ case.lm_head_weight.t()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(token_ids):
        given = TeacherTopK(token_ids, teacher.logprobs)
        return function(rows, teacher=given, shift_labels=case.shift_labels, **head)[0]

    compiled(teacher.token_ids)
    with pytest.raises(ValueError, match=r"teacher.token_ids: given 40, wanted 0 <= id < V = 40"):
        compiled(torch.full_like(teacher.token_ids, 40))


def operator_calls(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple]]:
    """The operators that function() calls within a compiled graph, and their arguments."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    calls: list[tuple] = []

    def recording(operator):
        def call(*arguments):
            calls.append((operator, arguments))
            return operator(*arguments)

        return call

    monkeypatch.setattr(operators, "_linear_loss", recording(operators._linear_loss))
    monkeypatch.setattr(operators, "_kl_loss", recording(operators._kl_loss))
    function()
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_operators_keep_their_promises_to_the_compiler(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake implementation and autograd registration, by PyTorch's own check of custom operators."""
    case = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    functions, leaves = losses(case), case.leaves()

    def call() -> None:
        if layout == "contiguous":
            for name in ("cross_entropy", "linear_kl", "whole", "consistency", "on_logits"):
                functions[name](*leaves.values())
            return
        leaves["lm_head_weight"] = case.lm_head_weight.detach().t().contiguous().t().requires_grad_()
        functions["cross_entropy"](*leaves.values())
        logits = torch.randn(40, 5, device=DEVICE).t().requires_grad_()
        for backend in ("torch", "triton"):
            ta_weighted_kl(logits, TeacherLogits(torch.randn(5, 40, device=DEVICE)), backend=backend)

    calls = operator_calls(call, monkeypatch)
    assert len(calls) == (5 if layout == "contiguous" else 3)
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


def test_an_operator_copies_no_number_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.tensor and torch.as_tensor of a number on a GPU wait for the device."""
    case = random_case(2, 3, 6, 8, 40, 2).to(torch.float32)
    leaves = tuple(case.leaves().values())
    (call,) = operator_calls(lambda: losses(case)["cross_entropy"](*leaves), monkeypatch)

    def on_host(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def created(*args: Any, **options: Any) -> Tensor:
            assert "device" not in options
            return create(*args, **options)

        return created

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, on_host(getattr(torch, name)))
    operator, arguments = call
    operator(*arguments)


def test_operators_are_left_out_of_cuda_graphs() -> None:
    """Which rows there are decides what a sweep launches: recorded once, it would be replayed for other labels."""
    for operator in (torch.ops.mind_kernels.linear_loss, torch.ops.mind_kernels.kl_loss):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


# ---------------------------------------------------------------------------------------------------------------------
# The precision of the stored logits, and the choice of a path


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_wide_logits_leave_only_the_rounding_of_the_operands(kind: str, dtype: torch.dtype) -> None:
    case = random_case(2, 4, 9, 32, 300, 2, seed=3)
    case.hidden_states.mul_(4)  # logits of ±16, whose 16-bit rounding is 2⁻⁴ of a nat
    case = case.to(dtype)
    teacher = random_teacher(kind, case)
    options = {"answer_index": case.answer_index, "teacher": teacher, "kl_weight": 0.5, "lm_head_bias": None}

    def run(case: MindCase, teacher: Teacher, function=mind_loss, **more) -> dict[str, Tensor]:
        output = function(
            case.hidden_states, case.lm_head_weight, case.shift_labels,
            rationale_weights=case.rationale_weights, **options | {"teacher": teacher} | more,
        )  # fmt: skip
        loss = output[0]  # of MindLossOutput and of the reference
        leaves = {"hidden_states": case.hidden_states, "lm_head_weight": case.lm_head_weight}
        gradients = torch.autograd.grad(loss, tuple(leaves.values()))
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    exact_case = case.to(torch.float64)
    exact_teacher = replace(teacher, **{n: v.double() for n, v in vars(teacher).items()
                                        if isinstance(v, Tensor) and v.is_floating_point()})  # fmt: skip
    exact = run(exact_case, exact_teacher, reference_mind_loss)
    for budget in (None, 9 * 300 * 6 * 4):
        wide = run(case, teacher, logits_dtype=torch.float32, max_logits_bytes=budget)
        stored = run(case, teacher, max_logits_bytes=budget)
        unit = torch.finfo(dtype).eps
        assert relative_error(wide["loss"], exact["loss"]) < 2e-6 < relative_error(stored["loss"], exact["loss"])
        for name in ("hidden_states", "lm_head_weight"):
            error = relative_error(wide[name], exact[name])
            assert error < 0.5 * unit, f"{name}: {error:.2e}"
            assert error < 0.7 * relative_error(stored[name], exact[name]), name


@pytest.mark.parametrize(
    ("version", "can_add"), [("2.8.0+cu129", False), ("2.9.1", False), ("2.10.0", True), ("2.14.1+cu130", True)]
)
def test_wide_products_of_a_gpu_as_every_version_of_pytorch_has_them(
    version: str, can_add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 results of 16-bit products are CUDA's alone: here they are made of widened operands, by its rules."""
    mm, addmm = torch.mm, torch.addmm
    wide: list[str] = []

    def wide_mm(
        left: Tensor, right: Tensor, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        if out_dtype is None:
            return mm(left, right, out=out)
        assert out is not None and left.dtype == right.dtype == torch.bfloat16
        assert out_dtype == out.dtype == torch.float32
        wide.append("mm")
        return mm(left.float(), right.float(), out=out)

    def wide_addmm(
        total: Tensor, left: Tensor, right: Tensor, *,
        out: Tensor, out_dtype: torch.dtype | None = None, beta: float = 1.0,
    ) -> Tensor:  # fmt: skip
        if out_dtype is None:
            return addmm(total, left, right, beta=beta, out=out)
        assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == out.dtype == torch.float32
        assert total.dtype == left.dtype or torch.__version__ >= (2, 10), "self and mat2 must have the same dtype"
        wide.append("addmm")
        return addmm(total, left.float(), right.float(), beta=beta, out=out)

    case = random_case(2, 4, 9, 32, 300, 2, seed=3).to(torch.bfloat16)
    options = {"rationale_weights": case.rationale_weights.clamp(min=0.1), "logits_dtype": torch.float32}

    def weight_gradient(budget: int) -> Tensor:
        loss, _ = fused_linear_cross_entropy(
            case.hidden_states, case.lm_head_weight, case.shift_labels, max_logits_bytes=budget, **options
        )
        return torch.autograd.grad(loss, case.lm_head_weight)[0]

    whole = weight_gradient(2**20)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    for module in (products, linear_sweep):
        monkeypatch.setattr(module, "has_wide_products", lambda device: True)
    chunked = weight_gradient(300 * 6 * 9)
    chunks = wide.count("mm") if can_add else wide.count("mm") // 2  # one for the logits, one for dW
    assert chunks > 1 and wide.count("addmm") == (chunks if can_add else 0)
    assert relative_error(chunked, whole) < 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(5, 7, 1300), (5, 1300, 7), (1300, 5, 7), (1, 1, 1)], ids=str)
def test_products_of_a_cpu_without_16_bit_instructions(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "cpu_computes", lambda dtype: False)
    for name in ("mm", "addmm"):
        monkeypatch.delattr(torch, name)
    a, b, c = shape
    generator = torch.Generator().manual_seed(0)
    left, right, before, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in ((a, b), (c, b), (a, c), (c,))
    )
    exact = left.double() @ right.double().t()
    half = torch.finfo(dtype).eps / 2
    for given, wanted in (
        (products.product(left, right.t(), torch.full_like(before, torch.nan)), exact),
        (products.product(left, right.t(), before.clone(), add=True), exact + before.double()),
        (products.project(left, right, None, torch.empty_like(before)), exact),
        (products.project(left, right, bias, torch.empty_like(before)), exact + bias.double()),
    ):
        assert given.dtype == dtype
        assert ((given.double() - wanted).abs() <= 1.01 * half * wanted.abs() + 1e-4).all()


def test_logits_dtype_errors() -> None:
    case = random_case(1, 2, 3, 4, 5, 1).to(torch.bfloat16)
    arguments = (case.hidden_states, case.lm_head_weight, case.shift_labels)
    with pytest.raises(ValueError, match=r"logits_dtype: given torch.float16, wanted None or torch.bfloat16 or torch"):
        fused_linear_cross_entropy(*arguments, logits_dtype=torch.float16)
    case = case.to(torch.float64)
    with pytest.raises(ValueError, match=r"logits_dtype: given torch.float32, wanted None or torch.float64"):
        answer_consistency(
            case.hidden_states, case.lm_head_weight, case.answer_index, case.rationale_weights,
            logits_dtype=torch.float32,
        )  # fmt: skip


def test_more_rationales_than_the_pair_kernel_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

    assert choose_backend("auto", OnGpu, 8) == "triton"
    assert choose_backend("auto", OnGpu, 9) == "torch"
    with pytest.raises(ValueError, match="given K = 9 rationales with backend 'triton', wanted at most 8"):
        choose_backend("triton", OnGpu, 9)
