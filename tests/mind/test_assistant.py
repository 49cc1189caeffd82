"""Scores, calibration loss, selection and rank correlation against their formulas. A few seconds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mind.assistant import (
    TeachingAssistant,
    calibration_loss,
    load_assistant,
    rank_correlation,
    select_rationales,
)

ALL = torch.ones(3, 4).bool()
SOME = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()  # the last question has one rationale


def assistant(**options: object) -> TeachingAssistant:
    torch.manual_seed(0)
    return TeachingAssistant(6, 4, hidden_size=8, num_heads=2, **options).eval()  # type: ignore[arg-type]


def features(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_scores_are_in_the_open_unit_interval_and_0_where_missing() -> None:
    scores = assistant()(features(), SOME)
    assert scores.shape == (3, 4)
    assert ((scores > 0) & (scores < 1))[SOME].all() and (scores[~SOME] == 0).all()


def test_a_missing_perspective_is_never_looked_at() -> None:
    poisoned = features().masked_fill(~SOME[..., None], math.nan)
    assert torch.equal(assistant()(poisoned, SOME), assistant()(features(), SOME))


@pytest.mark.parametrize("attention", [True, False])
def test_only_attention_lets_one_rationale_change_anothers_score(attention: bool) -> None:
    changed = features().clone()
    changed[:, 1] += 1.0
    before, after = assistant(attention=attention)(features(), ALL), assistant(attention=attention)(changed, ALL)
    same = torch.isclose(before[:, 0], after[:, 0], atol=1e-7).all()
    assert bool(same) != attention and not torch.isclose(before[:, 1], after[:, 1]).any()


@pytest.mark.parametrize("shared_head", [True, False])
def test_only_a_shared_head_makes_rationales_exchangeable(shared_head: bool) -> None:
    order = torch.tensor([2, 0, 3, 1])
    scores = assistant(shared_head=shared_head)(features(), SOME)
    permuted = assistant(shared_head=shared_head)(features()[:, order], SOME[:, order])
    assert torch.allclose(permuted, scores[:, order], atol=1e-6) == shared_head


def test_the_diagonal_is_what_the_full_scoring_matrix_holds() -> None:
    """S[b, i, j] = MLP_i(h1[b, j]); s = sigmoid of its diagonal."""
    model = assistant(attention=False)
    hidden = model.align(features())  # (B, K, d)
    inner = torch.einsum("bjd,ide->bije", hidden, model.head_in_weight) + model.head_in_bias[:, None]
    full = (torch.nn.functional.gelu(inner) * model.head_out_weight[:, None]).sum(-1) + model.head_out_bias[:, None]
    assert torch.allclose(model(features(), ALL), full.diagonal(dim1=1, dim2=2).sigmoid(), atol=1e-6)


def test_attention_is_the_textbook_formula() -> None:
    model = assistant()
    hidden = model.align(features())
    query, key, value = model.qkv(hidden).chunk(3, dim=-1)  # type: ignore[misc]
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        logits = query[..., part] @ key[..., part].mT / math.sqrt(4)
        heads.append(logits.masked_fill(~SOME[:, None], -math.inf).softmax(-1) @ value[..., part])
    hidden = model.attention_norm(hidden + model.attention_output(torch.cat(heads, -1)))  # type: ignore[misc]
    inner = torch.einsum("bkd,kde->bke", hidden, model.head_in_weight) + model.head_in_bias
    logits = (torch.nn.functional.gelu(inner) * model.head_out_weight).sum(-1) + model.head_out_bias
    assert torch.allclose(model(features(), SOME)[SOME], logits.sigmoid()[SOME], atol=1e-6)


def test_every_parameter_gets_a_gradient() -> None:
    model = assistant().train()
    calibration_loss(model(features(), ALL), features(1)[..., 0], ALL).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_saved_and_loaded_it_scores_the_same(tmp_path: Path) -> None:
    model, names = assistant(attention=False, shared_head=True, dropout=0.3), ("a", "b", "c", "d")
    model.save(tmp_path, names)
    loaded, loaded_names = load_assistant(tmp_path)
    assert loaded_names == names and loaded.options == model.options
    assert torch.equal(loaded(features(), SOME), model(features(), SOME))


def test_a_folder_without_an_assistant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no assistant.safetensors"):
        load_assistant(tmp_path)
    (tmp_path / "assistant.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="is not a teaching assistant"):
        load_assistant(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 9}, "hidden_size: given 9, wanted a multiple of 2 and of num_heads = 4"),
        ({"hidden_size": 0}, "hidden_size: given 0, wanted at least 1"),
        ({"num_heads": 3}, "wanted a multiple of 2 and of num_heads = 3"),
        ({"dropout": 1.0}, "dropout: given 1.0"),
    ],
)
def test_sizes_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeachingAssistant(6, 4, **options)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"features: given shape \(3, 4, 5\), wanted \(B, 4, 6\)"):
        assistant()(features()[..., :5], ALL)
    with pytest.raises(ValueError, match=r"mask: given torch\.float32"):
        assistant()(features(), ALL.float())
    with pytest.raises(ValueError, match="question 1 of the batch has no rationale"):
        assistant()(features(), torch.tensor([[True], [False], [True]]).expand(3, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Calibration loss


@pytest.mark.parametrize("direction", ["prediction_first", "target_first"])
def test_calibration_loss_is_the_formula(direction: str) -> None:
    scores, losses, tau = torch.rand(3, 4).double(), 3 * torch.rand(3, 4).double(), 0.3
    expected = 0.0
    for b in range(3):
        prediction = (scores[b, SOME[b]] / tau).softmax(-1)
        target = (-losses[b, SOME[b]] / tau).softmax(-1)
        p, q = (prediction, target) if direction == "prediction_first" else (target, prediction)
        expected += sum(a * math.log(a / c) for a, c in zip(p.tolist(), q.tolist(), strict=True)) / 3
    poisoned = losses.masked_fill(~SOME, math.nan)
    loss = calibration_loss(scores, poisoned, SOME, tau=tau, direction=direction)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("direction", ["prediction_first", "target_first"])
def test_calibration_gradient_is_exact(direction: str) -> None:
    losses = torch.rand(3, 4).double()
    scores = torch.rand(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: calibration_loss(s, losses, SOME, direction=direction), scores)


def test_calibration_loss_is_0_exactly_when_score_differences_are_negative_loss_differences() -> None:
    losses = torch.rand(3, 4).double()
    shift = torch.rand(3, 1).double()
    assert calibration_loss(shift - losses, losses, ALL).item() == pytest.approx(0.0, abs=1e-14)
    assert calibration_loss(shift - 1.1 * losses, losses, ALL).item() > 1e-6
    assert calibration_loss(losses, losses, ALL).item() > 1e-3


def test_calibration_refuses() -> None:
    scores = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"rationale_losses: given shape \(3, 3\)"):
        calibration_loss(scores, scores[:, :3], ALL)
    with pytest.raises(ValueError, match="tau: given 0, wanted a positive number"):
        calibration_loss(scores, scores, ALL, tau=0)
    with pytest.raises(ValueError, match="direction: given 'both'"):
        calibration_loss(scores, scores, ALL, direction="both")


# ---------------------------------------------------------------------------------------------------------------------
# Selection


def test_selection_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.75, 0.7, 0.1]])
    weights = select_rationales(scores, ALL[:1], beta=0.8, tau_student=0.1)  # 0.8·0.9 = 0.72
    a, b = math.exp(9.0), math.exp(7.5)
    assert weights.tolist()[0] == pytest.approx([a / (a + b), b / (a + b), 0, 0])
    assert weights.dtype == torch.float32 and not weights.requires_grad


@settings(max_examples=100, deadline=None)
@given(data=st.data(), beta=st.floats(0, 1), tau=st.floats(0.01, 10))
def test_selection_properties(data: st.DataObject, beta: float, tau: float) -> None:
    count = data.draw(st.integers(1, 8))
    scores = torch.tensor([data.draw(st.lists(st.integers(1, 999), min_size=count, max_size=count))]) / 1000
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))])
    weights = select_rationales(scores, mask, beta=beta, tau_student=tau)
    best = scores[mask].max()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (weights[~mask] == 0).all()
    assert (weights[mask & (scores == best)] > 0).all()  # argmax, and what ties with it
    assert (weights[scores < beta * best] == 0).all()
    kept = weights[weights > 0]
    order = scores[weights > 0].argsort()
    assert (kept[order].diff() >= 0).all()  # the better the score, the larger the weight


def test_selection_at_the_ends_of_beta_and_with_ties() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.4, 0.3]])
    assert (select_rationales(scores, ALL[:1], beta=0.0) > 0).all()
    assert select_rationales(scores, ALL[:1], beta=1.0).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    alone = torch.tensor([[False, False, False, True]])
    assert select_rationales(scores, alone, beta=1.0).tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_a_negative_maximum_is_selected_all_the_same() -> None:
    weights = select_rationales(torch.tensor([[-0.5, -1.0, -2.0, -3.0]]), ALL[:1], beta=0.8)
    assert weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_weights_survive_a_small_temperature() -> None:
    weights = select_rationales(torch.tensor([[0.9, 0.8999, 0.85, 0.1]]), ALL[:1], tau_student=1e-4)
    assert weights.isfinite().all() and weights.sum().item() == pytest.approx(1.0)


def test_selection_refuses() -> None:
    scores = torch.rand(3, 4)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"beta: given .*, wanted a number in \[0, 1\]"):
            select_rationales(scores, ALL, beta=beta)
    with pytest.raises(ValueError, match=r"tau_student: given 0\.0"):
        select_rationales(scores, ALL, tau_student=0.0)
    with pytest.raises(ValueError, match="question 2 of the batch has no rationale"):
        select_rationales(scores, SOME & torch.tensor([[True], [True], [False]]))
    with pytest.raises(ValueError, match="scores: given NaN or Inf"):
        select_rationales(scores.masked_fill(SOME, math.nan), SOME)
    poisoned = scores.masked_fill(~SOME, math.nan)
    assert select_rationales(poisoned, SOME).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Rank correlation


def test_rank_correlation_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.1, 0.9]])
    losses = torch.tensor([[4.0, 3.0, 2.0, 1.0], [9.0, 8.0, 2.0, 1.0], [1.0, 3.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    # The last: ranks (1.5, 1.5, 0, 3) and (0, 1, 2, 3), centred (0, 0, −1.5, 1.5) and (−1.5, −0.5, 0.5, 1.5).
    last = (-1.5 * 0.5 + 1.5 * 1.5) / math.sqrt(4.5 * 5.0)
    result = rank_correlation(scores, losses, torch.ones(4, 4).bool())
    assert result.tolist() == pytest.approx([-1.0, 1.0, 0.8, last])


def test_rank_correlation_within_the_mask_and_where_undefined() -> None:
    scores = torch.tensor([[0.1, math.nan, 0.3, 9.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.7]])
    losses = torch.tensor([[2.0, 0.0, 1.0, math.nan], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    first, second, third = rank_correlation(scores, losses, mask).tolist()
    assert first == pytest.approx(-1.0) and math.isnan(second) and math.isnan(third)
