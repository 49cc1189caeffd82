"""answer_consistency: Jensen–Shannon divergence between the answers that a student gives after its rationales."""

from __future__ import annotations

import torch
from torch import Tensor

from mind_kernels.arguments import (
    check_answer_index,
    check_head,
    check_logits_dtype,
    check_question_weights,
    choose_backend,
    product_dtype,
    resolve_num_questions,
)
from mind_kernels.linear_sweep import linear_loss
from mind_kernels.module import LossModule
from mind_kernels.plan import SweepOptions
from mind_kernels.teacher_rows import KLOptions

__all__ = ["AnswerConsistency", "answer_consistency"]


def answer_consistency(
    hidden_states: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    answer_index: Tensor,  # (B, K, A)
    rationale_weights: Tensor,  # (B, K)
    *,
    lm_head_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    num_questions: int | Tensor | None = None,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """1/num_questions Σ_b Σ_{i<j} α_bi α_bj · 1/A_b Σ_a JSD(P_bia ‖ P_bja), in nats.

        JSD(P ‖ Q) = ½ KL(P ‖ ½(P+Q)) + ½ KL(Q ‖ ½(P+Q)),   P_bia = softmax(logits of row answer_index[b, i, a])

    At most ½·ln 2·(1 − Σ_k α_bk²) for a question.

    hidden_states: any leading axes, taken as flat rows; bf16, fp16, fp32 or fp64. Only the rows that answer_index
        names reach the head.
    answer_index: int64/int32 flat row indices of the rows that predict the answer tokens, each at most once; −1 is
        absent; on the device of hidden_states, or on the CPU, and then nothing waits for the device. A_b is the number
        of positions at which any rationale of the question is present; a pair counts where both are.
    rationale_weights: α, each question's weights sum to 1. A rationale of weight 0 costs nothing unless the gradient of
        rationale_weights is asked for.
    num_questions: int or 0-d tensor, B by default.
    lm_head_bias: finite; with −inf for a token the loss is NaN.
    Other arguments as in fused_linear_cross_entropy; max_logits_bytes must hold the K rows of one position; backend
        "triton" takes K up to 8, beyond which "auto" is "torch". No gradient_tolerance: answers are few rows.

    Returns the loss, an fp32 (fp64 for fp64) scalar, differentiable in hidden_states (both sides of each pair),
    lm_head_weight, lm_head_bias and rationale_weights; 0 when no question has two rationales to compare.

    Raises: ValueError or TypeError naming the argument, what was given and what is wanted. Its backward pass
    RuntimeError under create_graph=True: there is no second derivative.
    Source: MIND (arXiv 2601.03717); Lin 1991 for the JSD; gradients in this folder's README.md.
    """
    check_question_weights(rationale_weights)
    check_head(hidden_states, lm_head_weight, lm_head_bias, logit_scale, logit_softcap, max_logits_bytes)
    check_logits_dtype(logits_dtype, hidden_states)
    check_answer_index(answer_index, rationale_weights, hidden_states.shape[:-1].numel())
    options = SweepOptions(
        compute_dtype=product_dtype(hidden_states),
        kl=KLOptions(),
        consistency_weight=1.0,
        num_questions=resolve_num_questions(num_questions, rationale_weights.shape[0]),
        answer_index=answer_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        logits_dtype=logits_dtype,
        max_logits_bytes=max_logits_bytes,
        backend=choose_backend(backend, hidden_states, rationale_weights.shape[1]),
    )
    return linear_loss(hidden_states, lm_head_weight, lm_head_bias, rationale_weights, options).loss


class AnswerConsistency(LossModule):
    """answer_consistency as a module: made with the settings, called with the tensors and num_questions, as there."""

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        logits_dtype: torch.dtype | None = None,
        max_logits_bytes: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.logits_dtype = logits_dtype
        self.max_logits_bytes = max_logits_bytes
        self.backend = backend

    def forward(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        answer_index: Tensor,
        rationale_weights: Tensor,
        *,
        lm_head_bias: Tensor | None = None,
        num_questions: int | Tensor | None = None,
    ) -> Tensor:
        return answer_consistency(
            hidden_states,
            lm_head_weight,
            answer_index,
            rationale_weights,
            lm_head_bias=lm_head_bias,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            logits_dtype=self.logits_dtype,
            num_questions=num_questions,
            max_logits_bytes=self.max_logits_bytes,
            backend=self.backend,
        )
