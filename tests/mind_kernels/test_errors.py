"""Every wrong argument is an error that names it, what was given and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

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

B, K, T, H, V = 2, 3, 4, 5, 7


def good() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(B, K, T, H),
        "lm_head_weight": torch.randn(V, H),
        "shift_labels": torch.zeros(B, K, T, dtype=torch.int64),
        "rationale_weights": torch.full((B, K), 1 / K),
    }


def set_label(value: int) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["shift_labels"][1, 2, 3] = value

    return change


def replace(**new: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(new)


def packed(cu_seqlens: list[int], **new: Any) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["hidden_states"] = arguments["hidden_states"].flatten(0, 2)
        arguments["shift_labels"] = arguments["shift_labels"].flatten()
        arguments["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        arguments.update(new)

    return change


CROSS_ENTROPY = {
    "label-V": (
        set_label(V),
        ValueError,
        r"shift_labels: given 7 at flat row 23, wanted 0 <= label < 7 or ignore_index",
    ),
    "label-negative": (set_label(-1), ValueError, r"shift_labels: given -1 at flat row 23, wanted 0 <= label"),
    "labels-shape": (
        replace(shift_labels=torch.zeros(B, K, T + 1, dtype=torch.int64)),
        ValueError,
        r"shift_labels: given shape \(2, 3, 5\), wanted \(2, 3, 4\)",
    ),
    "labels-float": (
        replace(shift_labels=torch.zeros(B, K, T)),
        TypeError,
        r"shift_labels: given torch.float32, wanted",
    ),
    "hidden-list": (replace(hidden_states=[1.0]), TypeError, r"hidden_states: given list, wanted a torch.Tensor"),
    "hidden-int": (
        replace(hidden_states=torch.zeros(B, K, T, H, dtype=torch.int64)),
        TypeError,
        r"hidden_states: given torch.int64, wanted one of bfloat16",
    ),
    "hidden-1d": (replace(hidden_states=torch.zeros(H)), ValueError, r"hidden_states: given shape \(5,\), wanted"),
    "head-shape": (
        replace(lm_head_weight=torch.zeros(V, H + 1)),
        ValueError,
        r"lm_head_weight: given shape \(7, 6\), wanted \(V, 5\) to match hidden_states",
    ),
    "head-dtype": (
        replace(lm_head_weight=torch.zeros(V, H, dtype=torch.bfloat16)),
        TypeError,
        r"lm_head_weight: given torch.bfloat16, wanted torch.float32 as hidden_states",
    ),
    "head-device": (
        replace(lm_head_weight=torch.zeros(V, H, device="meta")),
        ValueError,
        r"lm_head_weight: given on meta, wanted on cpu",
    ),
    "bias-shape": (
        replace(lm_head_bias=torch.zeros(V + 1)),
        ValueError,
        r"lm_head_bias: given shape \(8,\), wanted \(7,\)",
    ),
    "bias-dtype": (
        replace(lm_head_bias=torch.zeros(V, dtype=torch.float64)),
        TypeError,
        r"lm_head_bias: given torch.float64, wanted torch.float32",
    ),
    "weights-shape": (
        replace(rationale_weights=torch.ones(K, B)),
        ValueError,
        r"rationale_weights: given shape \(3, 2\), wanted \(2, 3\)",
    ),
    "scale": (replace(logit_scale=0.0), ValueError, r"logit_scale: given 0.0, wanted"),
    "softcap": (replace(logit_softcap=-1.0), ValueError, r"logit_softcap: given -1.0, wanted None or"),
    "budget": (replace(max_logits_bytes=0), ValueError, r"max_logits_bytes: given 0, wanted None or a positive"),
    "budget-row": (replace(max_logits_bytes=27), ValueError, r"max_logits_bytes: given 27, wanted at least 28"),
    "scale-text": (replace(logit_scale="1"), TypeError, r"logit_scale: given str, wanted a number"),
    "scale-tensor": (replace(logit_scale=torch.tensor(1.0)), TypeError, r"logit_scale: given Tensor, wanted a number"),
    "softcap-text": (replace(logit_softcap="30"), TypeError, r"logit_softcap: given str, wanted a number"),
    "ignore-index-none": (replace(ignore_index=None), TypeError, r"ignore_index: given NoneType, wanted an int"),
    "ignore-index-tensor": (replace(ignore_index=torch.tensor(-100)), TypeError, r"ignore_index: given Tensor, wanted"),
    "budget-float": (replace(max_logits_bytes=1e9), TypeError, r"max_logits_bytes: given float, wanted None or an int"),
    "backend": (replace(backend="cuda"), ValueError, r"backend: given 'cuda', wanted one of 'auto', 'torch', 'triton'"),
    "seqlens-end": (
        packed([0, 4, 8, 12, 16, 20, 23]),
        ValueError,
        r"cu_seqlens: given .*23, wanted to rise from 0 to N = 24",
    ),
    "seqlens-falling": (packed([0, 8, 4, 12, 16, 20, 24]), ValueError, r"cu_seqlens: given .*wanted to rise"),
    "seqlens-count": (
        packed([0, 12, 24]),
        ValueError,
        r"rationale_weights: given shape \(2, 3\), wanted 2, one for each segment",
    ),
    "seqlens-padded-layout": (
        replace(cu_seqlens=torch.tensor([0, 24], dtype=torch.int32)),
        ValueError,
        r"hidden_states: given rows of shape \(2, 3, 4\) with cu_seqlens, wanted packed rows",
    ),
}


@pytest.mark.parametrize("case", CROSS_ENTROPY)
@pytest.mark.parametrize("function", [fused_linear_cross_entropy, mind_loss])
def test_head_and_labels(case: str, function: Any) -> None:
    change, error, message = CROSS_ENTROPY[case]
    arguments = good()
    function(**arguments)
    change(arguments)
    with pytest.raises(error, match=message) as caught:
        function(**arguments)
    assert "\n" not in str(caught.value)


MIND = {
    "weights-1d": (
        replace(rationale_weights=torch.ones(B * K)),
        r"rationale_weights: given shape \(6,\), wanted \(B, K\)",
    ),
    "consistency": (replace(consistency_weight=-0.1), r"consistency_weight: given -0.1, wanted"),
    "kl-weight": (replace(kl_weight=-1.0), r"kl_weight: given -1.0, wanted"),
    "teacher-missing": (replace(kl_weight=1.0), r"teacher: given None with kl_weight 1.0, wanted a teacher"),
    "answer-index-row": (
        replace(answer_index=torch.full((B, K, 1), B * K * T)),
        r"answer_index: given row 24, wanted 0 <= row < 24 or -1",
    ),
    "answer-index-twice": (
        replace(answer_index=torch.full((B, K, 1), 3)),
        r"answer_index: given row 3 more than once",
    ),
    "answer-index-shape": (
        replace(answer_index=torch.zeros(K, B, 1, dtype=torch.int64)),
        r"answer_index: given shape \(3, 2, 1\), wanted \(B, K, A\) with \(B, K\) = \(2, 3\)",
    ),
    "num-questions": (replace(num_questions=0), r"num_questions: given 0.0, wanted a number above 0"),
    "num-questions-vector": (replace(num_questions=torch.ones(2)), r"num_questions: given shape \(2,\), wanted an int"),
    "divergence": (replace(divergence="kl"), r"divergence: given 'kl', wanted one of 'forward', 'reverse', 'jsd'"),
    "beta": (replace(divergence="jsd", beta=1.0), r"beta: given 1.0, wanted 0 < beta < 1 .* 0 is .* 'forward', 1 'rev"),
    "plain-sequences": (
        replace(hidden_states=torch.randn(B, T, H), rationale_weights=torch.ones(B, 1)),
        r"hidden_states: given shape \(2, 4, 5\), wanted \(B, K, T, H\) with K = 1 .*, or \(N, H\) with cu_seqlens",
    ),
    "temperature": (replace(temperature=0.0), r"temperature: given 0.0, wanted a finite number above 0"),
    "power": (replace(temperature_power=1), r"temperature_power: given 1, wanted 0 or 2"),
}


@pytest.mark.parametrize("case", MIND)
def test_mind_loss(case: str) -> None:
    change, message = MIND[case]
    arguments = good()
    change(arguments)
    with pytest.raises(ValueError, match=message) as caught:
        mind_loss(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["consistency_weight", "kl_weight", "num_questions", "temperature", "beta"])
def test_what_is_no_number(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: given str, wanted a number$"):
        mind_loss(**good() | {"divergence": "jsd", name: "1"})


def topk(logprobs: Any, ids: Any = None) -> Callable[[], TeacherTopK]:
    values = torch.tensor(logprobs).expand(B, K, T, -1)
    indices = torch.arange(values.shape[-1]) if ids is None else torch.tensor(ids)
    return lambda: TeacherTopK(indices.expand_as(values), values)


TEACHERS = {
    "vocabulary": (
        lambda: TeacherLogits(torch.randn(B, K, T, V + 1)),
        ValueError,
        r"given a vocabulary of 8, wanted the .* 7",
    ),
    "hidden-vocabulary": (
        lambda: TeacherHidden(torch.randn(B, K, T, 2), torch.randn(V + 2, 2)),
        ValueError,
        r"teacher: given a vocabulary of 9, wanted the student's 7 .*vocab_size",
    ),
    "vocab-size": (
        lambda: TeacherLogits(torch.randn(B, K, T, V + 1), vocab_size=V + 1),
        ValueError,
        r"teacher.vocab_size: given 8, wanted 1 to 7",
    ),
    "rows": (
        lambda: TeacherLogits(torch.randn(B, T, V)),
        ValueError,
        r"teacher: given rows of shape \(2, 4\), wanted \(2, 3, 4\)",
    ),
    "kind": (lambda: torch.randn(B, K, T, V), TypeError, r"teacher: given Tensor, wanted TeacherHidden"),
    "head": (
        lambda: TeacherHidden(torch.randn(B, K, T, 2), torch.randn(V, 3)),
        ValueError,
        r"teacher.lm_head_weight: given shape \(7, 3\), wanted \(V_t, 2\)",
    ),
    "head-dtype": (
        lambda: TeacherHidden(torch.randn(B, K, T, 2), torch.randn(V, 2).double()),
        TypeError,
        r"teacher.lm_head_weight: given torch.float64, wanted torch.float32",
    ),
    "bias-dtype": (
        lambda: TeacherHidden(torch.randn(B, K, T, 2), torch.randn(V, 2), torch.randn(V).bfloat16()),
        TypeError,
        r"teacher.lm_head_bias: given torch.bfloat16, wanted torch.float32 as teacher.hidden_states",
    ),
    "topk-id": (topk([-1.0, -2.0], [0, V]), ValueError, r"teacher.token_ids: given 7, wanted 0 <= id < V = 7"),
    "topk-id-twice": (
        topk([-1.0, -2.0, -1.0], [3, 0, 3]),
        ValueError,
        r"teacher.token_ids: given 3 twice in a row, wanted each token once",
    ),
    "topk-sum": (topk([-0.1, -0.2]), ValueError, r"teacher.logprobs: given a row whose probabilities sum to 1.72"),
    "topk-empty-row": (
        topk([float("-inf")] * 2),
        ValueError,
        r"teacher.logprobs: given a row of only -inf, wanted a token in each \(or its label ignore_index\)",
    ),
    "topk-shapes": (
        lambda: TeacherTopK(torch.zeros(B, K, T, 2, dtype=torch.int64), torch.zeros(B, K, T, 3)),
        ValueError,
        r"teacher.logprobs: given shape \(2, 3, 4, 3\), wanted \(2, 3, 4, 2\)",
    ),
    "topk-tail": (
        lambda: TeacherTopK(torch.zeros(B, K, T, 2, dtype=torch.int64), torch.zeros(B, K, T, 2), tail="drop"),
        ValueError,
        r"teacher.tail: given 'drop', wanted 'bucket' or 'renormalize'",
    ),
    "topk-float-ids": (
        lambda: TeacherTopK(torch.zeros(B, K, T, 2), torch.zeros(B, K, T, 2)),
        TypeError,
        r"teacher.token_ids: given torch.float32, wanted",
    ),
    "vocab-size-float": (
        lambda: TeacherLogits(torch.randn(B, K, T, V), vocab_size=5.0),  # type: ignore[arg-type]
        TypeError,
        r"teacher.vocab_size: given float, wanted None or an int",
    ),
    "hidden-scalar": (
        lambda: TeacherHidden(torch.tensor(1.0), torch.randn(V, 2)),
        ValueError,
        r"teacher.hidden_states: given shape \(\), wanted \(..., H_t\)",
    ),
    "head-device": (
        lambda: TeacherHidden(torch.randn(B, K, T, 2), torch.randn(V, 2, device="meta")),
        ValueError,
        r"teacher.lm_head_weight: given on meta, wanted on cpu as teacher.hidden_states",
    ),
    "bias-device": (
        lambda: TeacherHidden(torch.randn(B, K, T, 2), torch.randn(V, 2), torch.randn(V, device="meta")),
        ValueError,
        r"teacher.lm_head_bias: given on meta, wanted on cpu as teacher.hidden_states",
    ),
    "topk-device": (
        lambda: TeacherTopK(torch.zeros(B, K, T, 2, dtype=torch.int64, device="meta"), torch.zeros(B, K, T, 2)),
        ValueError,
        r"teacher.token_ids: given on meta, wanted on cpu as teacher.logprobs",
    ),
    "topk-list": (
        lambda: TeacherTopK([[0, 1]], torch.zeros(1, 2)),  # type: ignore[arg-type]
        TypeError,
        r"teacher.token_ids: given list, wanted a torch.Tensor",
    ),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_teachers(case: str) -> None:
    make, error, message = TEACHERS[case]
    arguments = good()
    with pytest.raises(error, match=message):
        fused_linear_kl(arguments["hidden_states"], arguments["lm_head_weight"], make(), arguments["shift_labels"])


def test_what_a_topk_holds_beside_unsupervised_rows_and_padding_may_repeat() -> None:
    arguments = good()
    arguments["shift_labels"][..., 0] = -100
    ids, logprobs = torch.zeros(B, K, T, 3, dtype=torch.int64), torch.zeros(B, K, T, 3)
    ids[..., 1:, 0] = 2
    logprobs[..., 1:, :] = torch.tensor([-1.0, -math.inf, -math.inf])
    loss, _ = fused_linear_kl(teacher=TeacherTopK(ids, logprobs), **arguments)
    assert loss.isfinite()


def test_topk_bucket_at_another_temperature() -> None:
    teacher = topk([-1.0, -2.0])()
    with pytest.raises(ValueError, match=r"temperature: given 2.0 with tail='bucket', wanted 1"):
        ta_weighted_kl(torch.randn(B, K, T, V), teacher, temperature=2.0)


def test_supervised_index_without_labels() -> None:
    logits = torch.randn(B, K, T, V)
    with pytest.raises(ValueError, match="supervised_index: given without shift_labels, wanted with them"):
        ta_weighted_kl(logits, TeacherLogits(logits), supervised_index=torch.tensor([0]))


def test_ignore_index_without_labels_is_any_number() -> None:
    logits, teacher = torch.randn(B, K, T, V), TeacherLogits(torch.randn(B, K, T, V))
    assert ta_weighted_kl(logits, teacher, ignore_index=0)[0] == ta_weighted_kl(logits, teacher)[0]


def test_consistency_budget_must_hold_a_position() -> None:
    arguments = good()
    index = torch.arange(B * K).view(B, K, 1) * T
    call = (arguments["hidden_states"], arguments["lm_head_weight"], index, arguments["rationale_weights"])
    with pytest.raises(ValueError, match=rf"max_logits_bytes: given 56, wanted at least {K * V * 4} \(3 rows"):
        answer_consistency(*call, max_logits_bytes=56)


def test_log_softmax() -> None:
    with pytest.raises(ValueError, match=r"temperature: given -1, wanted"):
        multi_rationale_log_softmax(torch.zeros(2, 3), temperature=-1)
    with pytest.raises(TypeError, match=r"logits: given torch.int64"):
        multi_rationale_log_softmax(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["hidden_states", "lm_head_weight", "shift_labels", "rationale_weights"])
def test_a_sharded_tensor(name: str) -> None:
    """A head that fully_shard has cut is one outside its module's forward."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        arguments = good()
        arguments[name] = DTensor.from_local(arguments[name], DeviceMesh("cpu", [0]), [Replicate()])
        with pytest.raises(TypeError, match=rf"^{name}: given a DTensor, wanted a plain tensor: its full_tensor\(\)"):
            mind_loss(**arguments)
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_changed_by_a_refused_call() -> None:
    arguments = good()
    arguments["hidden_states"].requires_grad_()
    before = {name: value.detach().clone() for name, value in arguments.items()}
    set_label(V)(arguments)
    with pytest.raises(ValueError, match="shift_labels"):
        mind_loss(**arguments)
    assert arguments["hidden_states"].grad is None
    for name in ("hidden_states", "lm_head_weight", "rationale_weights"):
        assert torch.equal(arguments[name].detach(), before[name])
