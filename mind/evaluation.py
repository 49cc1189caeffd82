"""Held-out accuracy: zero-shot chain of thought, greedy, the answer compared by value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from mind.attach import evaluation_mode
from mind.data import Record, check_answer
from mind.prompting import PromptFormat, answers_match, end_of_turn_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class AccuracyResult:
    """accuracy in [0, 1]; the other three hold one item for each record, in the records' order."""

    accuracy: float
    correct: list[bool]
    answers: list[str | None]  # None: no answer in the output
    outputs: list[str]  # what the model wrote, without special tokens


def measure_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    prompt_format: PromptFormat,
    max_new_tokens: int = 192,
    batch_size: int = 16,
    progress: bool = False,
) -> AccuracyResult:
    """Generates an answer to every record's question and compares it with the record's answer.

    Greedy whatever the model's own generation settings are (no sampling, no repetition penalty), until the end of the
    turn or `max_new_tokens`. Questions of similar length share a batch, the longest first; prompts are padded on the
    left. In float32 an output does not depend on what else is in its batch; in bfloat16 a near tie may fall either way.

    The model's training mode (of every module) and generation settings are as before afterwards; its weights and the
    tokenizer are not touched.

    Raises: ValueError when there are no records, a size is below 1, a prompt leaves no room for `max_new_tokens` in the
        model's positions, or a record's answer cannot be read back (`mind.data.check_answer`).
    """
    if not records:
        raise ValueError("records is empty, wanted at least one question to measure accuracy on")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for record in records:
        check_answer(record, prompt_format)
    prompts = [prompt_format.prompt_ids(tokenizer, record.question) for record in records]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = len(prompts[order[0]])
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"record {records[order[0]].id!r}: its prompt of {longest} tokens and max_new_tokens={max_new_tokens} "
            f"exceed the model's {positions} positions"
        )

    stop_ids = generation_stop_ids(model, tokenizer)
    outputs = [""] * len(records)
    with (
        torch.no_grad(),
        _generating(model, max_new_tokens, stop_ids),
        tqdm(total=len(records), desc="measuring accuracy", unit="question", disable=not progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, attention_mask = _pad_left([prompts[i] for i in batch], stop_ids[0])
            generated: Tensor = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)
            )
            for i, row in zip(batch, generated[:, input_ids.shape[1] :].tolist(), strict=True):
                # What follows the first stop token is padding.
                end = next((t for t, token_id in enumerate(row) if token_id in stop_ids), len(row))
                outputs[i] = str(tokenizer.decode(row[:end], skip_special_tokens=True))
            bar.update(len(batch))

    answers = [prompt_format.extract_answer(output) for output in outputs]
    correct = [answers_match(answer, record.answer) for answer, record in zip(answers, records, strict=True)]
    return AccuracyResult(sum(correct) / len(correct), correct, answers, outputs)


def generation_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of the turn that training teaches, and what else ends this model's texts."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = own if isinstance(own, list) else [own]
    found = dict.fromkeys([end_of_turn_id(tokenizer), tokenizer.eos_token_id, *own])
    return [token_id for token_id in found if token_id is not None]


@contextmanager
def _generating(model: PreTrainedModel, max_new_tokens: int, stop_ids: list[int]) -> Iterator[None]:
    """Evaluation mode and greedy generation settings, put back afterwards."""
    # A PeftModel may generate with its own settings or with those of the model inside.
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = [(part, part.generation_config) for part in (model, inside)]
    for part, _ in settings:
        part.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            use_cache=True,
        )
    try:
        with evaluation_mode(model):
            yield
    finally:
        for part, own in settings:
            part.generation_config = own


def _pad_left(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (batch, longest) int64."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    return input_ids, attention_mask
