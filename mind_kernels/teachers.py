"""The three forms in which a teacher's next-token distributions reach the KL losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mind_kernels.arguments import (
    can_look,
    check_device,
    check_floating,
    check_integer,
    check_scale_and_softcap,
    require,
)


@dataclass(frozen=True)
class TeacherHidden:
    """Teacher distributions as last hidden states and a head, projected chunk by chunk beside the student's.

    logits = softcap(logit_scale · (hidden_states @ lm_head_weightᵀ + lm_head_bias))

    hidden_states: (..., H_t), leading axes those of the student's hidden states; bf16, fp16, fp32 or fp64.
    lm_head_weight: (V_t, H_t), same dtype. H_t may differ from the student's H.
    lm_head_bias: (V_t,), same dtype, or None.
    logit_scale, logit_softcap: as for the student, but the teacher's own.
    vocab_size: both distributions are restricted to the first `vocab_size` tokens (for padded vocabularies);
        None requires V_t to equal the student's V.
    """

    hidden_states: Tensor
    lm_head_weight: Tensor
    lm_head_bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_floating("teacher.hidden_states", self.hidden_states)
        check_floating("teacher.lm_head_weight", self.lm_head_weight)
        require(self.hidden_states.ndim >= 1, "teacher.hidden_states: given shape (), wanted (..., H_t)")
        check_device("teacher.lm_head_weight", self.lm_head_weight, self.hidden_states.device, "teacher.hidden_states")
        require(
            self.lm_head_weight.ndim == 2 and self.hidden_states.shape[-1] == self.lm_head_weight.shape[1],
            f"teacher.lm_head_weight: given shape {tuple(self.lm_head_weight.shape)}, "
            f"wanted (V_t, {self.hidden_states.shape[-1]}) to match teacher.hidden_states",
        )
        if self.hidden_states.dtype != self.lm_head_weight.dtype:
            raise TypeError(
                f"teacher.lm_head_weight: given {self.lm_head_weight.dtype}, "
                f"wanted {self.hidden_states.dtype} as teacher.hidden_states"
            )
        if self.lm_head_bias is not None:
            check_floating("teacher.lm_head_bias", self.lm_head_bias)
            require(
                self.lm_head_bias.shape == self.lm_head_weight.shape[:1],
                f"teacher.lm_head_bias: given shape {tuple(self.lm_head_bias.shape)}, "
                f"wanted ({self.lm_head_weight.shape[0]},)",
            )
            if self.lm_head_bias.dtype != self.hidden_states.dtype:
                raise TypeError(
                    f"teacher.lm_head_bias: given {self.lm_head_bias.dtype}, "
                    f"wanted {self.hidden_states.dtype} as teacher.hidden_states"
                )
            check_device("teacher.lm_head_bias", self.lm_head_bias, self.hidden_states.device, "teacher.hidden_states")
        check_scale_and_softcap("teacher.", self.logit_scale, self.logit_softcap)

    @property
    def rows_shape(self) -> torch.Size:
        return self.hidden_states.shape[:-1]

    @property
    def tensor(self) -> Tensor:
        return self.hidden_states


@dataclass(frozen=True)
class TeacherLogits:
    """Teacher distributions as dense logits at temperature 1.

    logits: (..., V_t), leading axes those of the student's hidden states; unnormalised or log-probabilities.
        −inf marks a token the teacher excludes: forward KL and JSD take it as probability 0, reverse KL is infinite.
    vocab_size: as in TeacherHidden.
    """

    logits: Tensor
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_floating("teacher.logits", self.logits)

    @property
    def rows_shape(self) -> torch.Size:
        return self.logits.shape[:-1]

    @property
    def tensor(self) -> Tensor:
        return self.logits


@dataclass(frozen=True)
class TeacherTopK:
    """Teacher distributions as the k most probable tokens of each position, as inference servers return them.

    token_ids: (..., k) int64 or int32, distinct within a row: a server may list the token it wrote a second time.
        On the CPU a token that a supervised row lists twice is an error; on a GPU nothing looks.
    logprobs: (..., k) log-probabilities (nats) at temperature 1; for "renormalize" logits will do. −inf pads a short
        row; the id beside it is ignored. Any other number counts: the −9999 that some servers write for −inf says that
        the teacher gives this token nothing. A supervised row of −inf alone is an error on the CPU and makes the loss
        NaN on a GPU; a position of which nothing is known takes the label ignore_index.
    tail: "bucket" adds one bucket of probability 1 − Σp to both distributions (needs temperature 1); a row that lists
        every token has none and is renormalised;
        "renormalize" restricts both distributions to the support and renormalises them.
        Against the student's softmax over all V, a teacher that gives other tokens nothing is TeacherLogits with −inf.
    """

    token_ids: Tensor
    logprobs: Tensor
    tail: str = "bucket"

    def __post_init__(self) -> None:
        check_floating("teacher.logprobs", self.logprobs)
        check_integer("teacher.token_ids", self.token_ids)
        require(
            self.token_ids.shape == self.logprobs.shape and self.token_ids.ndim >= 1,
            f"teacher.logprobs: given shape {tuple(self.logprobs.shape)}, "
            f"wanted {tuple(self.token_ids.shape)} as teacher.token_ids",
        )
        check_device("teacher.token_ids", self.token_ids, self.logprobs.device, "teacher.logprobs")
        require(self.token_ids.shape[-1] >= 1, "teacher.token_ids: given k = 0 tokens a row, wanted at least 1")
        require(
            self.tail in ("bucket", "renormalize"),
            f"teacher.tail: given {self.tail!r}, wanted 'bucket' or 'renormalize'",
        )

    @property
    def rows_shape(self) -> torch.Size:
        return self.token_ids.shape[:-1]

    @property
    def tensor(self) -> Tensor:
        return self.logprobs


Teacher = TeacherHidden | TeacherLogits | TeacherTopK


def check_teacher(teacher: object, rows_shape: torch.Size, V: int, device: torch.device, temperature: float) -> None:
    """Whether a teacher fits the student's rows, vocabulary and device, and the temperature of the divergence."""
    if not isinstance(teacher, (TeacherHidden, TeacherLogits, TeacherTopK)):
        raise TypeError(f"teacher: given {type(teacher).__name__}, wanted TeacherHidden, TeacherLogits or TeacherTopK")
    require(
        teacher.rows_shape == rows_shape,
        f"teacher: given rows of shape {tuple(teacher.rows_shape)}, wanted {tuple(rows_shape)} as the student's",
    )
    check_device("teacher", teacher.tensor, device)
    if isinstance(teacher, TeacherTopK):
        require(
            teacher.tail == "renormalize" or temperature == 1,
            f"temperature: given {temperature} with tail='bucket', wanted 1 (log-probabilities at temperature 1 "
            "say nothing of the tail at another) or tail='renormalize'",
        )
        check_token_ids(teacher, V)
        return
    V_t = teacher.lm_head_weight.shape[0] if isinstance(teacher, TeacherHidden) else teacher.logits.shape[-1]
    if teacher.vocab_size is None:
        require(
            V_t == V,
            f"teacher: given a vocabulary of {V_t}, wanted the student's {V} "
            "(for a padded vocabulary say vocab_size, the number of tokens both share)",
        )
    else:
        if not isinstance(teacher.vocab_size, int):
            raise TypeError(f"teacher.vocab_size: given {type(teacher.vocab_size).__name__}, wanted None or an int")
        require(
            1 <= teacher.vocab_size <= min(V, V_t),
            f"teacher.vocab_size: given {teacher.vocab_size}, wanted 1 to {min(V, V_t)}, "
            f"the smaller of the student's V = {V} and the teacher's {V_t}",
        )


def check_token_ids(teacher: TeacherTopK, V: int) -> None:
    """Whether each id, but for those beside −inf, is within the vocabulary, where the host can look."""
    if not can_look(teacher.logprobs):
        return
    padded = torch.isneginf(teacher.logprobs)
    wrong = ~padded & ((teacher.token_ids < 0) | (teacher.token_ids >= V))
    if bool(wrong.any()):
        raise ValueError(f"teacher.token_ids: given {int(teacher.token_ids[wrong][0])}, wanted 0 <= id < V = {V}")
