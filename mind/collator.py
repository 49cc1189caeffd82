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
    """The selected rationales in one row of N tokens in which every prompt stands once; see `MindAttachment.read`.

    A prompt is followed by its question's rationales, each without its last token, which predicts nothing. The S
    sequences that attention looks at, in the order of their queries, are a prompt alone, a rationale whose keys are its
    prompt's and its own, or a question's prompt and only rationale together.

    input_ids, position_ids: (1, N) int64; positions begin at 0 with each prompt and go on in each of its rationales.
    query_index, key_index: (S, T_q), (S, T_k) int64: the tokens of each sequence's queries and keys, repeated up to
        the longest sequence. One token as padding for all of them would get thousands of gradients, which a GPU adds
        one after the other.
    output_index: (N,) int64: where each token stands among the S·T_q queries.
    key_rows: (M,) int64: the keys of all sequences without padding.
    cu_seqlens_q, cu_seqlens_k: (S + 1,) int32: where each sequence starts among the N queries and the M keys.
    source, place: (n,) int64: the tokens that predict one (a prompt's last, once for each of its rationales, then the
        rationale's) and where they stand among the R·T rows of `student_inputs`.
    """

    input_ids: Tensor
    position_ids: Tensor
    query_index: Tensor
    key_index: Tensor
    output_index: Tensor
    key_rows: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
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
            f"wanted torch.bool {(len(questions), num_perspectives)}"
        )
    chosen = [(b, k) for b, k in selected.nonzero().tolist()]
    if not chosen:
        raise ValueError("selected: nothing is selected, wanted at least one rationale")
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
    shift_labels = shift_labels.flatten()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "shift_labels": shift_labels,
        "cu_seqlens": _cu_seqlens(selected.flatten() * width),
        "answer_index": answer_index,
        "supervised_index": (shift_labels != IGNORE_INDEX).nonzero().squeeze(1),
    }


def shared_prompts(questions: Sequence[EncodedQuestion], selected: Tensor) -> SharedPrompts:
    """The same rationales as student_inputs, to be read behind one copy of each question's prompt."""
    chosen = [(b, k) for b, k in selected.nonzero().tolist()]
    width = max(questions[b].lengths[k] for b, k in chosen)  # T of student_inputs
    input_ids: list[int] = []
    position_ids: list[int] = []
    sequences: list[tuple[Tensor, Tensor]] = []  # the tokens of its queries, those of its keys
    source: list[Tensor] = []

    def append(ids: Sequence[int], start: int) -> Tensor:
        rows = torch.arange(len(input_ids), len(input_ids) + len(ids))
        input_ids.extend(ids)
        position_ids.extend(range(start, start + len(ids)))
        return rows

    for question, wanted in zip(questions, selected, strict=True):
        targets = [question.target_ids[k] for k in wanted.nonzero().flatten().tolist()]
        if not targets:
            continue
        prompt = append(question.prompt_ids, 0)
        rationales = [append(target[:-1], len(prompt)) for target in targets]
        source += [torch.cat([prompt[-1:], rationale]) for rationale in rationales]
        if len(rationales) == 1:
            whole = torch.cat([prompt, *rationales])
            sequences.append((whole, whole))
        else:
            sequences.append((prompt, prompt))
            sequences += [(rationale, torch.cat([prompt, rationale])) for rationale in rationales if len(rationale)]
    place = [
        row * width + len(questions[b].prompt_ids) - 1 + torch.arange(len(questions[b].target_ids[k]))
        for row, (b, k) in enumerate(chosen)
    ]
    query_lengths = torch.tensor([len(queries) for queries, _ in sequences])
    query_index = _repeated([queries for queries, _ in sequences])
    return SharedPrompts(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        query_index=query_index,
        key_index=_repeated([keys for _, keys in sequences]),
        output_index=(torch.arange(query_index.shape[1]) < query_lengths[:, None]).flatten().nonzero().flatten(),
        key_rows=torch.cat([keys for _, keys in sequences]),
        cu_seqlens_q=_cu_seqlens(query_lengths),
        cu_seqlens_k=_cu_seqlens(torch.tensor([len(keys) for _, keys in sequences])),
        source=torch.cat(source),
        place=torch.cat(place),
    )


def _repeated(sequences: list[Tensor]) -> Tensor:
    """(S, T), each sequence over again up to the length of the longest."""
    steps = torch.arange(max(map(len, sequences)))
    return torch.stack([sequence[steps % len(sequence)] for sequence in sequences])


def _cu_seqlens(lengths: Tensor) -> Tensor:
    """(S + 1,) int32, where sequences of these (S,) lengths start, and the end of the last."""
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return cu_seqlens
