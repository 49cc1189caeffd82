"""mind_loss: cross-entropy, answer consistency and TA-weighted KL in one sweep over the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mind_kernels.arguments import (
    check_answer_index,
    check_divergence,
    check_head,
    check_labels,
    check_logits_dtype,
    check_number,
    check_question_weights,
    check_supervised_index,
    choose_backend,
    product_dtype,
    require,
    resolve_num_questions,
    resolve_rationales,
)
from mind_kernels.linear_sweep import linear_loss
from mind_kernels.module import LossModule
from mind_kernels.plan import SweepOptions
from mind_kernels.pruning import GradientPruning, resolve_pruning
from mind_kernels.reduction import weighted_sum
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.teachers import Teacher, check_teacher

__all__ = ["MindLoss", "MindLossOutput", "mind_loss"]


class MindLossOutput(NamedTuple):
    """What mind_loss returns; see there."""

    loss: Tensor  # () differentiable
    cross_entropy: Tensor  # () detached
    consistency: Tensor  # () detached
    kl: Tensor  # () detached
    rationale_losses: Tensor  # (B, K) detached, nats per token


def mind_loss(
    hidden_states: Tensor,  # (B, K, T, H), or (N, H) with cu_seqlens
    lm_head_weight: Tensor,  # (V, H)
    shift_labels: Tensor,  # (B, K, T), or (N,)
    *,
    rationale_weights: Tensor,  # (B, K)
    cu_seqlens: Tensor | None = None,  # (B·K + 1,)
    supervised_index: Tensor | None = None,  # (n,), on the host
    answer_index: Tensor | None = None,  # (B, K, A)
    teacher: Teacher | None = None,
    lm_head_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    consistency_weight: float = 0.1,
    kl_weight: float = 0.0,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_power: int = 2,
    num_questions: int | Tensor | None = None,
    gradient_tolerance: float | GradientPruning = 0.0,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> MindLossOutput:
    """The student's objective; each supervised row's logits are computed once for all its terms.

        loss = 1/num_questions · Σ_b [ Σ_k α_bk·CE_bk + kl_weight·Σ_k α_bk·KL_bk
                                       + consistency_weight·Σ_{i<j} α_bi α_bj·JSD(P_bi ‖ P_bj) ]

    CE_bk and KL_bk are means over the rationale's supervised tokens, JSD the mean over the question's A answer
    positions, P_bi the softmax of the logits that predict an answer token after rationale i. All in nats.

    hidden_states: bf16, fp16, fp32 or fp64; padded (B, K, T, H), K = 1 for plain sequences, or packed (N, H) with
        cu_seqlens, where an absent or unselected rationale is an empty segment.
    lm_head_weight: (V, H), the dtype of hidden_states; under autocast any, and the products are in autocast's dtype.
    shift_labels: int64/int32 in [0, V) or ignore_index, already aligned with hidden_states. On a GPU a label outside
        makes the loss NaN, since an error would wait for the device.
    rationale_weights: α, each question's weights sum to 1 (used as given, not checked); 0 for a rationale that was not
        selected, which then costs a forward only (nothing in an empty segment).
    supervised_index: int64/int32 (n,) on the CPU, the flat rows whose label is not ignore_index, in any order. With it
        (and answer_index on the CPU) no step on a GPU waits for the device; rows of weight 0 then cost a backward.
    answer_index: flat row indices into hidden_states of the rows that predict the answer tokens, −1 = absent; None: no
        consistency. On the device of hidden_states or on the CPU. A = the positions at which any rationale of the
        question is present.
    teacher: TeacherHidden, TeacherLogits or TeacherTopK with rows as the student's; needed when kl_weight > 0.
    lm_head_bias: finite; only cross-entropy takes −inf for a token as probability 0, others may be inf or NaN.
    logit_scale, logit_softcap: logits = softcap(logit_scale · (h Wᵀ + b)), softcap(z) = c·tanh(z/c).
    logits_dtype: in which the logits are stored, by default the dtype of the products. torch.float32 with 16-bit
        products keeps the rounding of the logits out of the loss and the gradients. A logit then takes 6 bytes of
        max_logits_bytes instead of 2, and where a 16-bit product has no fp32 result (on a CPU) products are in fp32.
    divergence, beta, temperature, temperature_power: see fused_linear_kl.
    num_questions: int or 0-d tensor; B by default, the questions of the whole optimiser step under accumulation.
    gradient_tolerance: as in fused_linear_cross_entropy; of the gradient of all terms together.
    max_logits_bytes: budget for the logits alive at once, 512 MiB by default; smaller is slower.
    backend: "auto" | "torch" | "triton", as in fused_linear_cross_entropy.

    Returns MindLossOutput: loss, a differentiable fp32 scalar (fp64 for fp64; in hidden_states, lm_head_weight,
    lm_head_bias and rationale_weights); detached: cross_entropy, consistency and kl (the three sums above over
    num_questions, before their weights; a term of weight 0 is not computed and is 0 here) and rationale_losses (B, K),
    CE in nats per token, 0 without supervised tokens.

    Peak extra memory: the gradients + max_logits_bytes (+ 4·V·H bytes when a 16-bit weight gradient is summed in fp32:
    over more than 40 chunks of logits, over several with logits_dtype=float32, or when it is pruned). Under autocast
    also a copy of the head in its dtype, 2·V·H bytes.

    Raises: ValueError or TypeError naming the argument, what was given and what is wanted. Its backward pass
    RuntimeError under create_graph=True: there is no second derivative.
    Source: MIND (arXiv 2601.03717), equations as in this docstring.
    """
    check_question_weights(rationale_weights)
    check_head(hidden_states, lm_head_weight, lm_head_bias, logit_scale, logit_softcap, max_logits_bytes)
    check_logits_dtype(logits_dtype, hidden_states)
    require(
        hidden_states.ndim == 4 or cu_seqlens is not None,
        f"hidden_states: given shape {tuple(hidden_states.shape)}, wanted (B, K, T, H) with K = 1 for plain sequences, "
        "or (N, H) with cu_seqlens",
    )
    check_divergence(divergence, beta, temperature, temperature_power)
    check_number("consistency_weight", consistency_weight)
    check_number("kl_weight", kl_weight)
    require(consistency_weight >= 0, f"consistency_weight: given {consistency_weight}, wanted a number of at least 0")
    require(kl_weight >= 0, f"kl_weight: given {kl_weight}, wanted a number of at least 0")
    rows_shape = hidden_states.shape[:-1]
    V = lm_head_weight.shape[0]
    check_labels(shift_labels, rows_shape, V, ignore_index, hidden_states.device)
    check_supervised_index(supervised_index, shift_labels, ignore_index)
    rationale_id, _ = resolve_rationales(rows_shape, cu_seqlens, rationale_weights, hidden_states)
    if answer_index is not None:
        check_answer_index(answer_index, rationale_weights, rows_shape.numel())
    require(teacher is not None or kl_weight == 0, f"teacher: given None with kl_weight {kl_weight}, wanted a teacher")
    if teacher is not None:
        check_teacher(teacher, rows_shape, V, hidden_states.device, temperature)
    questions = resolve_num_questions(num_questions, rationale_weights.shape[0])
    num_compared = rationale_weights.shape[1] if answer_index is not None and consistency_weight > 0 else 1
    options = SweepOptions(
        compute_dtype=product_dtype(hidden_states),
        cross_entropy_weight=1.0,
        kl_weight=kl_weight,
        consistency_weight=consistency_weight,
        num_questions=questions,
        labels=shift_labels.reshape(-1),
        ignore_index=ignore_index,
        rationale_id=rationale_id,
        supervised_index=supervised_index,
        answer_index=answer_index if consistency_weight > 0 else None,
        teacher=teacher if kl_weight > 0 else None,
        kl=KLOptions(divergence, beta, temperature, temperature_power),
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        logits_dtype=logits_dtype,
        pruning=resolve_pruning(gradient_tolerance),
        max_logits_bytes=max_logits_bytes,
        backend=choose_backend(backend, hidden_states, num_compared),
    )
    losses = linear_loss(hidden_states, lm_head_weight, lm_head_bias, rationale_weights, options)
    weights = rationale_weights.detach().reshape(-1).to(losses.kl.dtype)
    return MindLossOutput(
        losses.loss,
        weighted_sum(weights, losses.cross_entropy.reshape(-1)) / questions,
        losses.consistency,
        weighted_sum(weights, losses.kl.reshape(-1)) / questions,
        losses.cross_entropy,
    )


class MindLoss(LossModule):
    """mind_loss as a module: made with the settings, called with the tensors and num_questions, all named as there."""

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        logits_dtype: torch.dtype | None = None,
        ignore_index: int = -100,
        consistency_weight: float = 0.1,
        kl_weight: float = 0.0,
        divergence: str = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_power: int = 2,
        gradient_tolerance: float | GradientPruning = 0.0,
        max_logits_bytes: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.logits_dtype = logits_dtype
        self.ignore_index = ignore_index
        self.consistency_weight = consistency_weight
        self.kl_weight = kl_weight
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.temperature_power = temperature_power
        self.gradient_tolerance = gradient_tolerance
        self.max_logits_bytes = max_logits_bytes
        self.backend = backend

    def forward(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        shift_labels: Tensor,
        *,
        rationale_weights: Tensor,
        cu_seqlens: Tensor | None = None,
        supervised_index: Tensor | None = None,
        answer_index: Tensor | None = None,
        teacher: Teacher | None = None,
        lm_head_bias: Tensor | None = None,
        num_questions: int | Tensor | None = None,
    ) -> MindLossOutput:
        return mind_loss(
            hidden_states,
            lm_head_weight,
            shift_labels,
            rationale_weights=rationale_weights,
            cu_seqlens=cu_seqlens,
            supervised_index=supervised_index,
            answer_index=answer_index,
            teacher=teacher,
            lm_head_bias=lm_head_bias,
            num_questions=num_questions,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            logits_dtype=self.logits_dtype,
            ignore_index=self.ignore_index,
            consistency_weight=self.consistency_weight,
            kl_weight=self.kl_weight,
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            temperature_power=self.temperature_power,
            gradient_tolerance=self.gradient_tolerance,
            max_logits_bytes=self.max_logits_bytes,
            backend=self.backend,
        )
