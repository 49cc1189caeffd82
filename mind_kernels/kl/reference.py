"""ta_weighted_kl by its formula: distributions and mixtures as they are written, no log-space care."""

from __future__ import annotations

import torch
from torch import Tensor

from mind_kernels.cross_entropy.reference import reduce_rationales, reference_logits
from mind_kernels.teachers import Teacher, TeacherHidden, TeacherTopK


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p/q), 0 where p is 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def reference_distributions(z: Tensor, teacher: Teacher, temperature: float) -> tuple[Tensor, Tensor]:
    """Teacher's and student's probabilities over V tokens, or over the top-k support and its tail bucket."""
    if isinstance(teacher, TeacherTopK):
        rows = z.flatten(0, -2)
        ids = teacher.token_ids.reshape(len(rows), -1).long()
        teacher_probs, student_probs = [], []
        for row, row_ids, row_logprobs in zip(
            rows, ids, teacher.logprobs.reshape(len(rows), -1).to(z.dtype), strict=True
        ):
            real = ~torch.isneginf(row_logprobs)
            t = torch.softmax(row_logprobs[real] / temperature, -1)
            s = torch.softmax(row / temperature, -1)[row_ids[real]]
            padding = t.new_zeros(len(real) - len(t))
            if teacher.tail == "bucket":
                t = row_logprobs[real].exp()
                t, s = torch.cat([t, 1 - t.sum(-1, keepdim=True)]), torch.cat([s, 1 - s.sum(-1, keepdim=True)])
            else:
                s = s / s.sum(-1, keepdim=True)
            t, s = torch.cat([t, padding]), torch.cat([s, padding])
            teacher_probs.append(t)
            student_probs.append(s)
        shape = (*z.shape[:-1], -1)
        return torch.stack(teacher_probs).reshape(shape), torch.stack(student_probs).reshape(shape)
    if isinstance(teacher, TeacherHidden):
        head = teacher.lm_head_bias, teacher.logit_scale, teacher.logit_softcap
        logits = reference_logits(teacher.hidden_states, teacher.lm_head_weight, *head)
    else:
        logits = teacher.logits
    V = teacher.vocab_size or z.shape[-1]
    return torch.softmax(logits[..., :V].to(z.dtype) / temperature, -1), torch.softmax(z[..., :V] / temperature, -1)


def reference_kl(
    student_logits: Tensor,
    teacher: Teacher,
    rationale_weights: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_power: int = 2,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    t, s = reference_distributions(student_logits, teacher, temperature)
    m = (1 - beta) * s + beta * t
    row_losses = {
        "forward": lambda: _kl(t, s),
        "reverse": lambda: _kl(s, t),
        "jsd": lambda: beta * _kl(t, m) + (1 - beta) * _kl(s, m),
    }[divergence]() * temperature**temperature_power
    if shift_labels is None:
        shift_labels = torch.zeros(row_losses.shape, dtype=torch.int64, device=row_losses.device)
    return reduce_rationales(row_losses, shift_labels, ignore_index, rationale_weights, cu_seqlens, reduction)
