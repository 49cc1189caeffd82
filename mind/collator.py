"""Batches: of questions, as the data loader gives them, and of rationales, as the student reads them.

Which rationales the student reads is known only after selection, so the data loader delivers questions with all their
tokens on the host, and `student_inputs` then lays out those that were selected. Neither needs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mind.data import EncodedQuestion

IGNORE_INDEX = -100


class SharedPrompts(NamedTuple):
    """R rationales of Q questions, laid out so that every prompt is read once; see `MindAttachment.read`.

    prompt_ids, prompt_mask: (Q, T_p) int64, padded on the left.
    target_ids, target_mask: (R, T_t) int64, padded on the right, without each rationale's last token, which predicts
        nothing.
    question_index: (R,) int64, which prompt each rationale follows.
    source, place: (n,) int64: of the R·(T_t + 1) rows that predict a token (a prompt's last one, then the targets),
        those that are not padding, and where they stand among the R·T rows of `student_inputs`.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    target_ids: Tensor
    target_mask: Tensor
    question_index: Tensor
    source: Tensor
    place: Tensor


@dataclass(frozen=True)
class QuestionBatch:
    """B questions with all their rationales; stays on the host, where the teaching assistant runs.

    mask: (B, K) bool, the perspectives that exist.
    features: (B, K, D) fp32, or None when the dataset has none.
    """

    questions: list[EncodedQuestion]
    mask: Tensor
    features: Tensor | None

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def ids(self) -> list[str]:
        return [question.id for question in self.questions]

    @property
    def indices(self) -> Tensor:
        """(B,) int64, rows of the questions in the dataset."""
        return torch.tensor([question.index for question in self.questions])

    def tokens(self, selected: Tensor, share_prompt: bool = False) -> int:
        """Tokens that are read of the selected (B, K) rationales and their prompts, padding not counted.

        share_prompt: each question's prompt once, and no rationale's last token.
        """
        if not share_prompt:
            return int((torch.tensor([question.lengths for question in self.questions]) * selected).sum())
        prompts = torch.tensor([len(question.prompt_ids) for question in self.questions])
        return self.target_tokens(selected) - int(selected.sum()) + int((prompts * selected.any(-1)).sum())

    def target_tokens(self, selected: Tensor) -> int:
        """Supervised tokens of the selected (B, K) rationales."""
        lengths = torch.tensor([[len(ids) for ids in question.target_ids] for question in self.questions])
        return int((lengths * selected).sum())


def collate(questions: Sequence[EncodedQuestion]) -> QuestionBatch:
    """The data loader's collate function."""
    mask = torch.tensor([question.mask for question in questions])
    rows = [question.features for question in questions if question.features is not None]
    return QuestionBatch(list(questions), mask, torch.stack(rows) if rows else None)


def student_inputs(questions: Sequence[EncodedQuestion], selected: Tensor, pad_token_id: int) -> dict[str, Tensor]:
    """The student's batch of the selected rationales alone.

    questions: B. selected: (B, K) bool on the host; at least one, and only perspectives that exist.

    Returns, for R_sel selected rationales in (question, perspective) order, padded on the right to T tokens:
        input_ids, attention_mask (R_sel, T) int64
        shift_labels (R_sel·T,) int64: the label of a row is the token that follows it. −100 on the prompt except its
            last token, which predicts the first of the rationale, on the last token and on padding
        cu_seqlens (B·K+1,) int32: where each rationale starts among the R_sel·T rows; an empty segment for every
            rationale that is absent or not selected
        answer_index (B, K, A) int64: the rows that predict the answer suffix, −1 where there is none
        supervised_index (n,) int64: the rows whose label is not −100

    Raises: ValueError when `selected` has another shape, is empty or selects a perspective that does not exist.
    """
    num_perspectives = len(questions[0].target_ids)
    if selected.dtype != torch.bool or tuple(selected.shape) != (len(questions), num_perspectives):
        raise ValueError(
            f"selected: given {selected.dtype} {tuple(selected.shape)}, "
            f"want torch.bool {(len(questions), num_perspectives)}"
        )
    chosen = [(b, k) for b, k in selected.nonzero().tolist()]
    if not chosen:
        raise ValueError("selected: nothing is selected, want at least one rationale")
    for b, k in chosen:
        if not questions[b].target_ids[k]:
            raise ValueError(f"selected: question {questions[b].id!r} has no rationale at perspective {k}")

    width = max(questions[b].lengths[k] for b, k in chosen)  # T
    answer_width = max(question.answer_length for question in questions)  # A
    input_ids = torch.full((len(chosen), width), pad_token_id)
    attention_mask = torch.zeros((len(chosen), width), dtype=torch.int64)
    shift_labels = torch.full((len(chosen), width), IGNORE_INDEX)
    answer_index = torch.full((len(questions), num_perspectives, answer_width), -1)
    for row, (b, k) in enumerate(chosen):
        prompt_ids, target_ids = questions[b].prompt_ids, questions[b].target_ids[k]
        length = len(prompt_ids) + len(target_ids)
        input_ids[row, :length] = torch.tensor(prompt_ids + target_ids)
        attention_mask[row, :length] = 1
        # Token t is predicted at t − 1: the targets start at len(prompt), their last is at length − 1.
        shift_labels[row, len(prompt_ids) - 1 : length - 1] = torch.tensor(target_ids)
        end = row * width + length - 1
        answer_length = questions[b].answer_length
        answer_index[b, k, :answer_length] = torch.arange(end - answer_length, end)
    cu_seqlens = torch.zeros(selected.numel() + 1, dtype=torch.int32)
    cu_seqlens[1:] = (selected.flatten() * width).cumsum(0)
    shift_labels = shift_labels.flatten()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "shift_labels": shift_labels,
        "cu_seqlens": cu_seqlens,
        "answer_index": answer_index,
        "supervised_index": (shift_labels != IGNORE_INDEX).nonzero().squeeze(1),
    }


def shared_prompts(questions: Sequence[EncodedQuestion], selected: Tensor, pad_token_id: int) -> SharedPrompts:
    """The same rationales as student_inputs, to be read behind one copy of each question's prompt."""
    chosen = [(b, k) for b, k in selected.nonzero().tolist()]
    asked = sorted({b for b, _ in chosen})
    targets = [questions[b].target_ids[k] for b, k in chosen]
    prompt_width = max(len(questions[b].prompt_ids) for b in asked)
    target_width = max(map(len, targets)) - 1
    prompt_ids = torch.full((len(asked), prompt_width), pad_token_id)
    target_ids = torch.full((len(chosen), target_width), pad_token_id)
    prompt_mask, target_mask = torch.zeros_like(prompt_ids), torch.zeros_like(target_ids)
    for row, b in enumerate(asked):
        prompt = questions[b].prompt_ids
        prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[row, prompt_width - len(prompt) :] = 1
    width = max(questions[b].lengths[k] for b, k in chosen)  # T of student_inputs
    source, place = [], []
    for row, ((b, _), target) in enumerate(zip(chosen, targets, strict=True)):
        target_ids[row, : len(target) - 1] = torch.tensor(target[:-1])
        target_mask[row, : len(target) - 1] = 1
        first = row * width + len(questions[b].prompt_ids) - 1
        source.append(torch.arange(len(target)) + row * (target_width + 1))
        place.append(torch.arange(len(target)) + first)
    question_index = torch.tensor([asked.index(b) for b, _ in chosen])
    return SharedPrompts(
        prompt_ids, prompt_mask, target_ids, target_mask, question_index, torch.cat(source), torch.cat(place)
    )
