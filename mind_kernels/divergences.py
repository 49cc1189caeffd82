"""KL, reverse KL and generalised JSD between rows of log-probabilities: value and gradient, finite in log space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# softplus leaves x itself beyond this; exp(-40) is below half an ulp of 1 in fp32 and fp64 needs no more than 1e-17.
_SOFTPLUS_THRESHOLD = 40.0


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), exact to rounding in fp32 and fp64."""
    return F.softplus(x, threshold=_SOFTPLUS_THRESHOLD)


def divergence_and_gradient(
    log_teacher: Tensor,  # (m, V)
    log_student: Tensor,  # (m, V)
    divergence: str,
    beta: float,
    need_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:  # (m,), (m, V)
    """D(teacher, student) per row in nats and dD/dz, z the student's logits of these rows.

    With t = exp(log_teacher), s = exp(log_student):

        forward   Σ t (log t − log s)                          dz = s − t          (Σt = Σs = 1)
        reverse   Σ s (log s − log t)                          dz = s ∘ (log s − log t − D)
        jsd       β Σ t (log t − log m) + (1−β) Σ s (log s − log m),   m = (1−β)s + βt
                                                               dz = (1−β) s ∘ (log s − log m − KL(s‖m))

    The mixture is never formed: with d = log t − log s, log(m/s) = log(1−β) + softplus(d + log(β/(1−β))), so nothing
    underflows where both probabilities do. log_teacher may be −inf: a token of probability 0 in forward and jsd; in
    reverse its divergence is infinite. Overwrites both arguments.
    """
    if divergence == "forward":
        student = log_student.exp()
        teacher = log_teacher.exp()
        difference = log_teacher.sub_(log_student).masked_fill_(teacher == 0, 0.0)
        loss = difference.mul_(teacher).sum(-1)
        return loss, student.sub_(teacher) if need_gradient else None

    student = log_student.exp()
    if divergence == "reverse":
        ratio = log_student.sub_(log_teacher)
        loss = (student * ratio).sum(-1)
        return loss, ratio.sub_(loss.unsqueeze(-1)).mul_(student) if need_gradient else None

    teacher = log_teacher.exp()
    d = log_teacher.sub_(log_student)
    log_s_over_m = softplus(d + math.log(beta / (1 - beta))).add_(math.log1p(-beta)).neg_()
    kl_student = (student * log_s_over_m).sum(-1)
    kl_teacher = (d.add_(log_s_over_m).masked_fill_(teacher == 0, 0.0)).mul_(teacher).sum(-1)
    loss = beta * kl_teacher + (1 - beta) * kl_student
    if not need_gradient:
        return loss, None
    return loss, log_s_over_m.sub_(kl_student.unsqueeze(-1)).mul_(student).mul_(1 - beta)


def pairwise_jsd_and_gradient(
    log_probs: Tensor,  # (k, V): one answer position after k rationales
    pair_weights: Tensor,  # (k, k): symmetric, diagonal unused
    need_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:  # (k, k), (k, V)
    """All JSD(P_i ‖ P_j) of one answer position in nats, and d/dz_i of Σ_{i<j} pair_weights[i,j]·JSD(P_i ‖ P_j).

    JSD(P_i‖P_j) = ½ KL(P_i‖M) + ½ KL(P_j‖M),  M = ½(P_i + P_j)
    log(P_i/M) = log 2 − softplus(log P_j − log P_i)
    dz_i = Σ_j w_ij ½ P_i ∘ (log(P_i/M_ij) − KL(P_i‖M_ij))
    """
    k = log_probs.shape[0]
    probs = log_probs.exp()
    jsd = log_probs.new_zeros(k, k)
    gradient = torch.zeros_like(log_probs) if need_gradient else None
    mean = log_probs.new_zeros(k)
    for i in range(k):
        for j in range(i + 1, k):
            d = log_probs[j] - log_probs[i]
            ratio_i = softplus(d).neg_().add_(math.log(2.0))  # log(P_i/M)
            ratio_j = d.add_(ratio_i)  # log(P_j/M)
            kl_i, kl_j = torch.dot(probs[i], ratio_i), torch.dot(probs[j], ratio_j)
            jsd[i, j] = jsd[j, i] = 0.5 * (kl_i + kl_j)
            if gradient is not None:
                weight = pair_weights[i, j]
                gradient[i].add_(ratio_i.mul_(weight))
                gradient[j].add_(ratio_j.mul_(weight))
                mean[i] += weight * kl_i
                mean[j] += weight * kl_j
    if gradient is not None:
        gradient.sub_(mean.unsqueeze(-1)).mul_(probs).mul_(0.5)
    return jsd, gradient
