"""The teaching assistant (MetaNet): scores a question's rationales by how well they suit the student now.

    features (B, K, D) -> TeachingAssistant -> scores s (B, K) -> select_rationales -> weights α (B, K)

It learns from the student's loss on each rationale (`calibration_loss`). Everything here runs on small tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

ASSISTANT_FILE = "assistant.safetensors"


class TeachingAssistant(nn.Module):
    """Compatibility scores of the K rationales of each question.

        h0 = LN(W2·GELU(W1·E))                      feature alignment, shared by the perspectives
        h1 = LN(h0 + MultiHeadAttention(h0))        synergy layer, over the K perspectives that exist
        s[b, k] = sigmoid(MLP_k(h1[b, k]))          inertia scoring heads, d -> d/2 -> 1

    Each MLP_i could score every perspective, S[b, i, j] = MLP_i(h1[b, j]); only the diagonal is used, so only the
    diagonal is computed.

    feature_dim: D. num_perspectives: K. hidden_size: d, divisible by num_heads and by 2.
    attention: False leaves the synergy layer out: every rationale is scored alone.
    shared_head: one MLP for all, where a question's rationales are exchangeable samples, not named perspectives.

    Raises: ValueError for a size that is out of range.
    """

    def __init__(
        self,
        feature_dim: int,
        num_perspectives: int,
        *,
        hidden_size: int = 256,
        num_heads: int = 4,
        dropout: float = 0.1,
        attention: bool = True,
        shared_head: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "feature_dim": feature_dim,
            "num_perspectives": num_perspectives,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: given {size}, wanted at least 1")
        if hidden_size % num_heads or hidden_size % 2:
            raise ValueError(f"hidden_size: given {hidden_size}, wanted a multiple of 2 and of num_heads = {num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: given {dropout}, wanted a number in [0, 1)")
        self.options = {**sizes, "dropout": dropout, "attention": attention, "shared_head": shared_head}
        self.num_perspectives, self.num_heads = num_perspectives, num_heads

        self.align = nn.Sequential(
            nn.Linear(feature_dim, hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
        )
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size) if attention else None
        self.attention_output = nn.Linear(hidden_size, hidden_size) if attention else None
        self.attention_norm = nn.LayerNorm(hidden_size) if attention else None
        self.dropout = nn.Dropout(dropout)
        # The first and second layers of the heads, side by side; num_heads_k is K, or 1 when shared.
        num_heads_k = 1 if shared_head else num_perspectives
        self.head_in_weight = nn.Parameter(torch.empty(num_heads_k, hidden_size, hidden_size // 2))
        self.head_in_bias = nn.Parameter(torch.zeros(num_heads_k, hidden_size // 2))
        self.head_out_weight = nn.Parameter(torch.empty(num_heads_k, hidden_size // 2))
        self.head_out_bias = nn.Parameter(torch.zeros(num_heads_k))
        # As nn.Linear: uniform in ±1/√fan_in.
        nn.init.uniform_(self.head_in_weight, -(hidden_size**-0.5), hidden_size**-0.5)
        nn.init.uniform_(self.head_out_weight, -((hidden_size // 2) ** -0.5), (hidden_size // 2) ** -0.5)

    def forward(
        self,
        features: Tensor,  # (B, K, D)
        mask: Tensor,  # (B, K) bool
    ) -> Tensor:
        """Scores (B, K) in (0, 1); 0 where the perspective is missing, whose features are never looked at.

        Raises: ValueError for shapes that do not fit, or a question without any rationale.
        """
        wanted = (features.shape[0], self.num_perspectives, self.options["feature_dim"])
        if tuple(features.shape) != wanted:
            raise ValueError(f"features: given shape {tuple(features.shape)}, wanted (B, {wanted[1]}, {wanted[2]})")
        _check_mask(mask, features.shape[:2])
        hidden = self.align(features.masked_fill(~mask[..., None], 0.0))  # (B, K, d)
        if self.qkv is not None and self.attention_output is not None and self.attention_norm is not None:
            # (B, K, 3d) -> 3 × (B, heads, K, d/heads)
            query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
            mixed = self.attention_output(mixed.transpose(1, 2).flatten(2))
            hidden = self.attention_norm(hidden + self.dropout(mixed))
        weight = self.head_in_weight.expand(self.num_perspectives, -1, -1)
        inner = F.gelu(torch.einsum("bkd,kde->bke", hidden, weight) + self.head_in_bias)
        logits = (inner * self.head_out_weight).sum(-1) + self.head_out_bias  # (B, K)
        return torch.sigmoid(logits).masked_fill(~mask, 0.0)

    def save(self, folder: str | os.PathLike[str], perspectives: Sequence[str]) -> None:
        """Writes `assistant.safetensors`: the weights, the options and the perspectives that the K axis stands for."""
        path = os.path.join(folder, ASSISTANT_FILE)
        metadata = {"options": json.dumps(self.options), "perspectives": json.dumps(list(perspectives))}
        save_file(self.state_dict(), path + ".partial", metadata=metadata)
        os.replace(path + ".partial", path)


def load_assistant(folder: str | os.PathLike[str]) -> tuple[TeachingAssistant, tuple[str, ...]]:
    """The teaching assistant that a training run left in its folder, in eval mode, and its K perspectives.

    Raises: ValueError when the folder holds none or the file is not one.
    """
    path = os.path.join(folder, ASSISTANT_FILE)
    if not os.path.isfile(path):
        raise ValueError(f"{os.fspath(folder)}: holds no {ASSISTANT_FILE}, wanted a folder written by MindTrainer")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        assistant = TeachingAssistant(**json.loads(metadata["options"]))
        assistant.load_state_dict(weights)
        return assistant.eval(), tuple(json.loads(metadata["perspectives"]))
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is not a teaching assistant: {reason}") from error


def calibration_loss(
    scores: Tensor,  # (B, K)
    rationale_losses: Tensor,  # (B, K)
    mask: Tensor,  # (B, K) bool
    *,
    tau: float = 0.2,
    direction: str = "prediction_first",
) -> Tensor:
    """L_meta: how far the ranking by score is from the ranking by the student's loss (ListNet-KL).

        π_τ(u) = softmax(u/τ) over the perspectives that exist
        prediction_first:  L_meta = mean_b KL( π_τ(s) ‖ π_τ(−L) )
        target_first:      L_meta = mean_b KL( π_τ(−L) ‖ π_τ(s) )        the classic order

    It is 0 exactly when score differences equal negative loss differences. Differentiable in `scores` alone.

    rationale_losses: the student's mean token cross-entropy on each rationale, nats; read only where mask is True.
    Returns: 0-d, nats.
    Raises: ValueError for shapes that disagree, τ ≤ 0, an unknown direction or a question without any rationale.
    """
    _check_mask(mask, scores.shape)
    if rationale_losses.shape != scores.shape:
        raise ValueError(
            f"rationale_losses: given shape {tuple(rationale_losses.shape)}, wanted {tuple(scores.shape)} as scores"
        )
    _check_positive("tau", tau)
    if direction not in ("prediction_first", "target_first"):
        raise ValueError(f"direction: given {direction!r}, wanted 'prediction_first' or 'target_first'")
    log_prediction = _masked_log_softmax(scores / tau, mask)
    log_target = _masked_log_softmax(-rationale_losses.detach() / tau, mask)
    if direction == "target_first":
        log_prediction, log_target = log_target, log_prediction
    # KL(p ‖ q) = Σ p·(log p − log q)
    divergence = log_prediction.exp() * (log_prediction - log_target)
    return divergence.masked_fill(~mask, 0.0).sum(-1).mean()


def select_rationales(
    scores: Tensor,  # (B, K)
    mask: Tensor,  # (B, K) bool
    *,
    beta: float = 0.8,
    tau_student: float = 0.1,
) -> Tensor:
    """Weights α of the rationales that the student is to learn from.

        I = { k valid : s_k ≥ β·max(s) } ∪ { argmax s },    α = softmax over I of s/τ_student

    beta: in [0, 1]; 0 selects all, 1 the best alone (and what ties with it).
    Returns: (B, K) fp32 without gradient, 0 where not selected, each row sums to 1.
    Raises: ValueError for β or τ out of range, shapes that disagree, scores that are not finite, or a question
        without any rationale.
    """
    _check_mask(mask, scores.shape)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: given {beta}, wanted a number in [0, 1]")
    _check_positive("tau_student", tau_student)
    scores = scores.detach().float()
    if not bool(torch.isfinite(scores[mask]).all()):
        raise ValueError("scores: given NaN or Inf, wanted finite numbers")
    valid_scores = scores.masked_fill(~mask, -torch.inf)
    best = valid_scores.max(-1, keepdim=True).values
    # For a negative maximum the threshold lies above every score: the best is selected all the same.
    selected = mask & ((valid_scores >= beta * best) | (valid_scores == best))
    return _masked_log_softmax(scores / tau_student, selected).exp().masked_fill(~selected, 0.0)


def rank_correlation(
    scores: Tensor,  # (B, K)
    rationale_losses: Tensor,  # (B, K)
    mask: Tensor,  # (B, K) bool
) -> Tensor:
    """Spearman's rank correlation of score and loss within each question: (B,) fp32 in [−1, 1].

    −1 is a perfectly calibrated assistant: the better the score, the lower the loss. Ties share their mean rank. NaN
    for a question with fewer than two rationales, or whose scores or losses are all equal.
    """
    _check_mask(mask, scores.shape)
    count = mask.sum(-1, keepdim=True)

    def centred_ranks(values: Tensor) -> Tensor:
        pairs = (mask[:, None, :] & mask[:, :, None]).float()
        below = (values[:, None, :] < values[:, :, None]).float()
        equal = (values[:, None, :] == values[:, :, None]).float()
        ranks = (pairs * (below + 0.5 * equal)).sum(-1) - 0.5  # 0 … count−1
        return (ranks - (count - 1) / 2).masked_fill(~mask, 0.0)

    a, b = centred_ranks(scores), centred_ranks(rationale_losses)
    return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()


def _masked_log_softmax(values: Tensor, mask: Tensor) -> Tensor:
    """log-softmax over the last axis within the mask; −inf outside, replaced by 0 so that no 0·∞ appears."""
    return values.masked_fill(~mask, -torch.inf).log_softmax(-1).masked_fill(~mask, 0.0)


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"mask: given {mask.dtype} {tuple(mask.shape)}, wanted torch.bool {tuple(shape)}")
    if not bool(mask.any(-1).all()):
        row = int((~mask.any(-1)).nonzero()[0])
        raise ValueError(f"mask: question {row} of the batch has no rationale, wanted at least one")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: given {value}, wanted a positive number")
