"""KL, reverse KL and generalised JSD between rows of log-probabilities: value and gradient, finite in log space."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mind_kernels.chunking import Scratch

# softplus leaves x itself beyond this; exp(-40) is below half an ulp of 1 in fp32 and fp64 needs no more than 1e-17.
_SOFTPLUS_THRESHOLD = 40.0


def softplus(x: Tensor, out: Tensor | None = None) -> Tensor:
    """log(1 + eˣ), exact to rounding in fp32 and fp64."""
    return F.softplus(x, threshold=_SOFTPLUS_THRESHOLD, out=out)  # type: ignore[call-arg]  # the stub lacks out


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what it lost: their sum is exact (Knuth)."""
    rounded = a + b
    of_b = rounded - a
    return rounded, (a - (rounded - of_b)) + (b - of_b)


class RowSoftmax(NamedTuple):
    """log softmax(z) = (z − row_max) − log_total."""

    probs: Tensor  # (m, V)
    row_max: Tensor  # (m, 1)
    log_total: Tensor  # (m, 1), of Σ exp(z − row_max)

    def log_probs(self, z: Tensor) -> Tensor:  # (m, k) logits of these rows
        return z - self.row_max - self.log_total


def row_softmax(z: Tensor, out: Tensor) -> RowSoftmax:  # (m, V), (m, V)
    """out: for the probabilities, which may overwrite z."""
    row_max = z.amax(-1, keepdim=True)
    probs = torch.softmax(z, -1, out=out)
    return RowSoftmax(probs, row_max, probs.amax(-1, keepdim=True).log_().neg_())  # max p = 1/Σ exp(z − max z)


def divergence_and_gradient(
    log_teacher: Tensor,  # (m, V)
    log_student: Tensor,  # (m, V)
    divergence: str,
    beta: float,
    need_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:  # (m,), (m, V)
    """D(teacher, student) per row in nats and dD/dz, z the student's logits of these rows; see `_divergence`.

    Overwrites log_teacher.
    """
    teacher, student = log_teacher.exp(), log_student.exp()
    scratch = Scratch(1, log_teacher.numel(), log_teacher.dtype, log_teacher.device)
    return _divergence(teacher, student, log_teacher.sub_(log_student), divergence, beta, need_gradient, scratch)


def logits_divergence_and_gradient(
    z_teacher: Tensor,  # (m, V)
    z_student: Tensor,  # (m, V)
    student: RowSoftmax,  # of z_student
    divergence: str,
    beta: float,
    need_gradient: bool,
    scratch: Scratch,
) -> tuple[Tensor, Tensor | None]:  # (m,), (m, V)
    """The same from logits. Overwrites z_teacher; the gradient lies in it or in scratch."""
    teacher = row_softmax(z_teacher, scratch("teacher", z_teacher.shape))
    of_max, of_max_lost = two_sum(teacher.row_max, -student.row_max)
    shift, lost = two_sum(of_max, teacher.log_total - student.log_total)
    d = z_teacher.sub_(z_student).sub_(shift)  # log t − log s
    loss, gradient = _divergence(teacher.probs, student.probs, d, divergence, beta, need_gradient, scratch)
    # What rounding took from the shift is missing from all of d alike: Σ t·d and Σ s·d are off by it. The JSD is not,
    # whose derivative by it is 0, and gradients subtract a mean.
    if divergence != "jsd":
        lost = lost.add_(of_max_lost).squeeze(-1)
        loss = loss - lost if divergence == "forward" else loss + lost
    return loss, gradient


def _divergence(
    teacher: Tensor,  # (m, V)
    student: Tensor,  # (m, V)
    d: Tensor,  # (m, V), log t − log s
    divergence: str,
    beta: float,
    need_gradient: bool,
    scratch: Scratch,
) -> tuple[Tensor, Tensor | None]:  # (m,), (m, V)
    """With probabilities t of the teacher and s of the student:

        forward   Σ t (log t − log s)                          dz = s − t          (Σt = Σs = 1)
        reverse   Σ s (log s − log t)                          dz = s ∘ (log s − log t − D)
        jsd       β Σ t (log t − log m) + (1−β) Σ s (log s − log m),   m = (1−β)s + βt
                                                               dz = (1−β) s ∘ (log s − log m − KL(s‖m))

    The mixture is never formed: with x = d + log(β/(1−β)), log(m/s) = log(1−β) + softplus(x) and
    log(t/m) = x − softplus(x) − log β, so nothing underflows where both probabilities do. d may be −inf: a token of
    probability 0 in forward and jsd; in reverse its divergence is infinite.
    Overwrites teacher and d.
    """
    if divergence == "reverse":
        loss = -torch.mul(student, d, out=teacher).sum(-1)
        return loss, d.add_(loss.unsqueeze(-1)).mul_(student).neg_() if need_gradient else None

    d.clamp_(min=-1e30)  # t = 0 where it is −inf, and 0·(−inf) would be NaN
    if divergence == "forward":
        loss = d.mul_(teacher).sum(-1)
        return loss, torch.sub(student, teacher, out=teacher) if need_gradient else None

    x = d.add_(math.log(beta / (1 - beta)))
    softplus_x = softplus(x, out=scratch("softplus", x.shape))
    kl_teacher = x.sub_(softplus_x).sub_(math.log(beta)).mul_(teacher).sum(-1)
    log_m_over_s = softplus_x.add_(math.log1p(-beta))
    kl_student = -torch.mul(student, log_m_over_s, out=x).sum(-1)
    loss = beta * kl_teacher + (1 - beta) * kl_student
    if not need_gradient:
        return loss, None
    return loss, log_m_over_s.add_(kl_student.unsqueeze(-1)).mul_(student).mul_(beta - 1)


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
    k, V = log_probs.shape
    probs = log_probs.exp()
    jsd = log_probs.new_zeros(k, k)
    gradient = torch.zeros_like(log_probs) if need_gradient else None
    mean = log_probs.new_zeros(k)
    d_buffer, ratio_buffer = log_probs.new_empty(2, max(k - 1, 1), V)
    for i in range(k - 1):
        after = slice(i + 1, k)  # every j of the pairs (i, j)
        d = torch.sub(log_probs[after], log_probs[i], out=d_buffer[: k - 1 - i])
        ratio_i = softplus(d, out=ratio_buffer[: k - 1 - i]).neg_().add_(math.log(2.0))  # log(P_i/M)
        ratio_j = d.add_(ratio_i)  # log(P_j/M)
        weights = pair_weights[i, after].to(log_probs.dtype)
        if gradient is not None:
            gradient[i].addmv_(ratio_i.t(), weights)
            gradient[after].addcmul_(ratio_j, weights.unsqueeze(-1))
        kl_i, kl_j = ratio_i.mv(probs[i]), ratio_j.mul_(probs[after]).sum(-1)
        jsd[i, after] = jsd[after, i] = 0.5 * (kl_i + kl_j)
        mean[i] += weights.dot(kl_i)
        mean[after] += weights * kl_j
    if gradient is not None:
        gradient.sub_(mean.unsqueeze(-1)).mul_(probs).mul_(0.5)
    return jsd, gradient
