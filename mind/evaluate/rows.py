"""What a row of each data set becomes: {"id": …, "question": …, "answers": […]}.

`answers` are the accepted forms of one answer, the first is how results name it: of a multiple-choice question the
letter and the option's own text, whose initial a letter is not: C is wrong where (A) "C. elegans" is right. The
functions are named by the task files.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mind.prompting import PromptFormat, answers_match, is_option

if TYPE_CHECKING:
    import datasets


def gsm8k(dataset: datasets.Dataset) -> datasets.Dataset:
    """The answer stands after "####"."""

    def convert(row: Mapping[str, Any]) -> tuple[str, list[str]]:
        _, mark, answer = row["answer"].rpartition("####")
        if not mark:
            raise ValueError(f"answer: given {row['answer'][:60]!r}, wanted a solution and its answer behind ####")
        return row["question"], [answer.strip()]

    return _convert(dataset, "gsm8k", convert)


def svamp(dataset: datasets.Dataset) -> datasets.Dataset:
    return _convert(dataset, "svamp", lambda row: (f"{row['Body'].strip()} {row['Question']}", [str(row["Answer"])]))


def math500(dataset: datasets.Dataset) -> datasets.Dataset:
    return _convert(dataset, "math500", lambda row: (row["problem"], [row["answer"]]))


def csqa(dataset: datasets.Dataset) -> datasets.Dataset:
    def convert(row: Mapping[str, Any]) -> tuple[str, list[str]]:
        choices = row["choices"]["text"]
        return multiple_choice(row["question"], choices, row["choices"]["label"].index(row["answerKey"]))

    return _convert(dataset, "csqa", convert)


def strategyqa(dataset: datasets.Dataset) -> datasets.Dataset:
    def convert(row: Mapping[str, Any]) -> tuple[str, list[str]]:
        return f"{row['question'].strip()} Answer yes or no.", ["yes" if row["answer"] else "no"]

    return _convert(dataset, "strategyqa", convert)


def gpqa_diamond(dataset: datasets.Dataset) -> datasets.Dataset:
    """The options in an order that depends on the question alone: the right one comes first in the data."""

    def convert(row: Mapping[str, Any]) -> tuple[str, list[str]]:
        choices = [row[name].strip() for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
        order = [0, 1, 2, 3]
        random.Random(hashlib.sha256(row["Question"].encode()).digest()).shuffle(order)
        return multiple_choice(row["Question"], [choices[i] for i in order], order.index(0))

    return _convert(dataset, "gpqa_diamond", convert)


def multiple_choice(question: str, choices: Sequence[str], right: int) -> tuple[str, list[str]]:
    """(the question with its lettered options, the accepted answers: the letter and the option's text)."""
    letters = string.ascii_uppercase[: len(choices)]
    options = (f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    lines = [question.strip(), *options, "Answer with the letter of the right option."]
    return "\n".join(lines), [letters[right], choices[right]]


def exact_match(doc: Mapping[str, Any], results: Sequence[str], prompt_format: PromptFormat | None = None) -> dict:
    """{"exact_match": 1.0 or 0.0} of the one generated text in `results`, as training taught to answer."""
    answer = (prompt_format or PromptFormat()).extract_answer(results[0])
    named, *others = doc["answers"]
    right = answers_match(answer, named) or answer in others
    if not right and answer is not None and not is_option(answer):
        right = any(answers_match(answer, other) for other in others)
    return {"exact_match": float(right)}


def to_dataset(docs: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_list([dict(doc) for doc in docs])


def _convert(
    dataset: datasets.Dataset, task: str, convert: Callable[[Mapping[str, Any]], tuple[str, list[str]]]
) -> datasets.Dataset:
    """Raises: ValueError naming the row that lacks what the task reads, or that there is no row."""
    docs = []
    for i, row in enumerate(dataset):
        try:
            question, answers = convert(row)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            columns = ", ".join(map(str, row))
            raise ValueError(
                f"task {task}: row {i} is not a row of this data set ({type(error).__name__}: {error}), "
                f"it has the columns {columns}"
            ) from error
        docs.append({"id": f"{task}-{i}", "question": question.strip(), "answers": answers})
    if not docs:
        raise ValueError(f"task {task}: no rows, wanted at least one")
    return to_dataset(docs)
