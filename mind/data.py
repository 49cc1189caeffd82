"""Records (a question and its rationales): reading, validating, tokenising.

A record is one JSON object a line, or one row of a `datasets` dataset with the same columns:

    {"id": "gsm8k-17", "question": "…", "answer": "42",
     "rationales": [{"perspective": "decomposition", "text": "…", "answer": "42"}, …],
     "difficulty": 0.4, "source": "gsm8k"}

`difficulty` and `source` are optional, further fields are ignored. A record need not hold every perspective.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from mind.problems import PERSPECTIVES
from mind.prompting import ANSWER, PromptFormat, answers_match

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


class DataError(ValueError):
    """Data that cannot be used. The message is one line: where, which field, what is there and what is wanted."""


@dataclass(frozen=True)
class Rationale:
    """One way to the answer. `answer` is the one this rationale reaches."""

    perspective: str
    text: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One question, at most one rationale for each perspective."""

    id: str
    question: str
    answer: str
    rationales: tuple[Rationale, ...]
    difficulty: float | None = None
    source: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_records(
    source: str | os.PathLike[str] | datasets.Dataset | Iterable[Mapping[str, Any]],
    *,
    require_rationales: bool = True,
) -> list[Record]:
    """All records of a source, validated.

    source: a JSONL file (UTF-8, blank lines skipped), a folder written by `datasets`' `save_to_disk`, the id of a hub
        dataset ("owner/name"), a `datasets.Dataset`, or dicts. Of a dataset with several splits, "train" is read.
    require_rationales: False also takes records without rationales (held-out questions).

    Raises: DataError naming the file and line (or the row) and the field, at the first fault: malformed JSON, text
        that is not UTF-8, a missing or repeated field, a wrong type, an empty text, a repeated id, a perspective
        repeated within a question, no rationale, a rationale whose answer is not the question's; or that the source
        does not exist or is empty.
    """
    name, rows = _open(source)
    records: list[Record] = []
    places: dict[str, str] = {}  # id -> where it stands
    for place, row in rows:
        record = _record(row, place, require_rationales)
        if record.id in places:
            raise DataError(f"{place}: id: {record.id!r} is already used at {places[record.id]}, wanted unique ids")
        places[record.id] = place
        records.append(record)
    if not records:
        raise DataError(f"{name}: no records, wanted at least one")
    return records


def check_answer(record: Record, prompt_format: PromptFormat) -> None:
    """Raises: DataError when the answer, written as training writes it, is read back as another: whoever gives it would
    be judged wrong.
    """
    suffix = prompt_format.answer_suffix
    read = prompt_format.extract_answer(suffix.replace(ANSWER, record.answer))
    if not answers_match(read, record.answer):
        raise DataError(
            f"question {record.id!r}: answer {record.answer!r} is read back as {read!r} from {suffix!r}, wanted it on "
            "one line, and another answer_suffix where it holds what ends this one"
        )


def perspectives_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The perspectives that occur: the known ones in their usual order, then others in order of first appearance."""
    found = dict.fromkeys(rationale.perspective for record in records for rationale in record.rationales)
    return (*(name for name in PERSPECTIVES if name in found), *(name for name in found if name not in PERSPECTIVES))


def _open(source: Any) -> tuple[str, Iterator[tuple[str, Any]]]:
    """(name of the source, (place, row) pairs)."""
    if not isinstance(source, str | os.PathLike):
        name = "dataset" if hasattr(source, "column_names") else "records"
        return name, ((f"{name}[{i}]", row) for i, row in enumerate(_single_split(source, name)))
    name = os.fspath(source)
    if os.path.isfile(name):
        return name, _read_jsonl(name)
    dataset = _load_dataset(name)
    return name, ((f"{name}[{i}]", row) for i, row in enumerate(_single_split(dataset, name)))


def _read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: byte {error.start} is not UTF-8, wanted a UTF-8 file") from error
            if not text.strip():
                continue
            try:
                row = json.loads(text, object_pairs_hook=_unique_fields)
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: malformed JSON at column {error.colno}: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python reads
                raise DataError(f"{place}: malformed JSON: {_one_line(error)}") from error
            except _RepeatedField as error:
                raise DataError(f"{place}: {error.args[0]}: the field occurs twice in one object") from error
            yield place, row


class _RepeatedField(Exception):
    pass


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedField(next(name for name in names if names.count(name) > 1))
    return fields


def _load_dataset(name: str) -> Any:
    if os.path.isdir(name):
        import datasets

        try:
            return datasets.load_from_disk(name)
        except Exception as error:  # pyarrow and datasets raise many kinds for a folder that is no dataset
            reason = _one_line(error)
            raise DataError(f"{name}: cannot be read as a folder written by save_to_disk: {reason}") from error
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith(".") or name.endswith((".json", ".jsonl")):
        raise DataError(f"{name}: no such file or folder")
    import datasets

    try:
        return datasets.load_dataset(name)
    except Exception as error:  # so does load_dataset: connection, hub, parsing
        raise DataError(f"{name}: no such file or folder, and no hub dataset either: {_one_line(error)}") from error


def _single_split(dataset: Any, name: str) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    if "train" not in dataset:
        raise DataError(f'{name}: has the splits {", ".join(map(str, dataset))}, wanted one called "train"')
    return dataset["train"]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---------------------------------------------------------------------------------------------------------------------
# Validating


def _record(row: Any, place: str, require_rationales: bool) -> Record:
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: wanted an object with the fields of a record, got {_type(row)}")
    question_id, question, answer = (_text(row, field, f"{place}: ") for field in ("id", "question", "answer"))
    rationales: list[Rationale] = []
    items = row.get("rationales")
    if items is None and not require_rationales:
        items = []
    elif items is None:
        raise DataError(f"{place}: rationales: the field is missing, wanted a list")
    elif not isinstance(items, list):
        raise DataError(f"{place}: rationales: wanted a list, got {_type(items)}")
    for i, item in enumerate(items):
        within = f"{place}: rationales[{i}]"
        if not isinstance(item, Mapping):
            raise DataError(f"{within}: wanted an object with perspective, text and answer, got {_type(item)}")
        rationale = Rationale(*(_text(item, field, f"{within}.") for field in ("perspective", "text", "answer")))
        if any(rationale.perspective == other.perspective for other in rationales):
            raise DataError(
                f"{within}.perspective: {rationale.perspective!r} occurs twice in question {question_id!r}, wanted once"
            )
        if rationale.answer != answer and not answers_match(rationale.answer, answer):
            raise DataError(f"{within}.answer: {rationale.answer!r} is not the question's answer {answer!r}")
        rationales.append(rationale)
    if require_rationales and not rationales:
        raise DataError(f"{place}: rationales: question {question_id!r} has no rationale, wanted at least one")
    difficulty = row.get("difficulty")
    if difficulty is not None and (isinstance(difficulty, bool) or not isinstance(difficulty, int | float)):
        raise DataError(f"{place}: difficulty: wanted a number, got {_type(difficulty)}")
    if isinstance(difficulty, float) and not math.isfinite(difficulty):  # a whole number may be beyond any float
        raise DataError(f"{place}: difficulty: wanted a finite number, got {difficulty}")
    source = _text(row, "source", f"{place}: ") if row.get("source") is not None else None
    return Record(question_id, question, answer, tuple(rationales), difficulty, source)


def _text(row: Mapping[str, Any], field: str, prefix: str) -> str:
    """A field that must hold text. prefix: what stands before the field's name in a message."""
    value = row.get(field)
    if value is None:
        raise DataError(f"{prefix}{field}: the field is missing, wanted a string")
    if not isinstance(value, str):
        raise DataError(f"{prefix}{field}: wanted a string, got {_type(value)}")
    if not value.strip():
        raise DataError(f"{prefix}{field}: is empty, wanted text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" in JSON: half a character
        raise DataError(
            f"{prefix}{field}: character {error.start} is a lone surrogate, wanted valid Unicode"
        ) from error
    return value


def _type(value: Any) -> str:
    """The kind of a JSON value, in JSON's words where Python's are others."""
    return {"NoneType": "null", "dict": "object", "str": "string"}.get(type(value).__name__, type(value).__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising


@dataclass(frozen=True)
class EncodedQuestion:
    """One question in token ids; what the trainer's dataset holds.

    id: the record's.
    prompt_ids: the question up to where the student starts to write.
    target_ids: K sequences, rationale then answer suffix; empty where the perspective is missing.
    answer_length: A, how many of the last ids of every target are the answer suffix.
    index: row of this question in the dataset.
    features: (K, D) fp32, what the teaching assistant sees, or None.
    """

    id: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[tuple[int, ...], ...]
    answer_length: int
    index: int = 0
    features: Tensor | None = None

    @property
    def mask(self) -> list[bool]:
        """K flags: which perspectives this question has."""
        return [bool(ids) for ids in self.target_ids]

    @property
    def lengths(self) -> list[int]:
        """K sequence lengths, prompt included, in tokens; 0 where the perspective is missing."""
        return [len(self.prompt_ids) + len(ids) if ids else 0 for ids in self.target_ids]


def encode_record(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    perspectives: Sequence[str],
    prompt_format: PromptFormat,
    max_length: int,
) -> EncodedQuestion:
    """Token ids of a record: prompt, and for each perspective rationale + answer suffix.

    The suffix is tokenised once, so the last `answer_length` ids are the same in every target. Nothing is cut: a
    rationale without its end, followed by an answer it did not reach, is not worth imitating.

    Raises: DataError for a rationale longer than `max_length` tokens (prompt and suffix included), for a perspective
        that is not among `perspectives`, and as `check_answer`.
    """
    check_answer(record, prompt_format)
    by_perspective = {rationale.perspective: rationale for rationale in record.rationales}
    for name in by_perspective:
        if name not in perspectives:
            known = ", ".join(perspectives)
            raise DataError(f"question {record.id!r}: perspective {name!r} is unknown, wanted one of {known}")
    prompt_ids = tuple(prompt_format.prompt_ids(tokenizer, record.question))
    suffix_ids = tuple(prompt_format.suffix_ids(tokenizer, record.answer))
    target_ids: list[tuple[int, ...]] = []
    for name in perspectives:
        rationale = by_perspective.get(name)
        if rationale is None:
            target_ids.append(())
            continue
        target_ids.append((*prompt_format.rationale_ids(tokenizer, rationale.text), *suffix_ids))
        length = len(prompt_ids) + len(target_ids[-1])
        if length > max_length:
            raise DataError(
                f"question {record.id!r}: perspective {name!r} takes {length} tokens, "
                f"wanted at most max_length = {max_length}: shorten it or raise max_length"
            )
    return EncodedQuestion(record.id, prompt_ids, tuple(target_ids), len(suffix_ids))


class MindDataset(Dataset[EncodedQuestion]):
    """Encoded questions and their features: what MindTrainer trains on.

    records: as `load_records` returns them.
    features: (num_records, K, D) fp32 of `RationaleEncoder.encode`, or None for a method without teaching assistant.
    perspectives: K names, the order of every K axis; default `perspectives_of(records)`.

    Raises: DataError as `encode_record`; ValueError when `features` does not fit the records.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase,
        *,
        features: Tensor | None = None,
        perspectives: Sequence[str] | None = None,
        prompt_format: PromptFormat | None = None,
        max_length: int = 1024,
        progress: bool = False,
    ) -> None:
        self.perspectives = tuple(perspectives_of(records) if perspectives is None else perspectives)
        self.prompt_format = prompt_format or PromptFormat()
        self.feature_dim = None if features is None else features.shape[-1]
        wanted = (len(records), len(self.perspectives))
        if features is not None and (features.ndim != 3 or tuple(features.shape[:2]) != wanted):
            raise ValueError(f"features: given shape {tuple(features.shape)}, wanted ({wanted[0]}, {wanted[1]}, D)")
        self.questions: list[EncodedQuestion] = []
        for i, record in enumerate(tqdm(records, desc="tokenising", unit="question", disable=not progress)):
            question = encode_record(record, tokenizer, self.perspectives, self.prompt_format, max_length)
            if not any(question.mask):
                raise DataError(f"question {record.id!r} has no rationale, wanted at least one")
            row = None if features is None else features[i].detach().to(device="cpu", dtype=torch.float32)
            self.questions.append(replace(question, index=i, features=row))

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> EncodedQuestion:
        return self.questions[index]
