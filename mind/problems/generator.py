"""Draws problems from the families' parameter spaces and writes them as records (schema: SPEC §1).

The space of a family is the product of its parameters' ranges, numbered 0 … size - 1. A seeded permutation walks these
numbers, so a parameter set is visited once (no duplicate can occur), the walk ends by itself, and asking for more
questions keeps the first ones. Which split a parameter set belongs to is a hash of the set alone, the same for every
seed, so no training question of any seed shares its parameters with a held-out one. A family whose space is used up
drops out and the others go on; when all are, the number asked for is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mind.problems.arithmetic import check_rationale
from mind.problems.families import FAMILIES
from mind.problems.problem import Problem

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 0.2


class ArithmeticMistakeError(RuntimeError):
    """A rationale states an equation that does not hold: a bug in its family."""


def split_of(family: str, parameters: Mapping[str, int]) -> str:
    """The split that owns a parameter set: "heldout" for a fifth of them, by SHA-256, else "train"."""
    key = json.dumps([family, sorted(parameters.items())])
    fraction = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "heldout" if fraction < HELDOUT_SHARE else "train"


def space_size(family: type[Problem]) -> int:
    """An upper bound of the family's distinct questions, both splits together: the product of the ranges."""
    return math.prod(len(values) for values in family.space.values())


def permutation(size: int, key: str) -> Iterator[int]:
    """0 … size - 1, each once, in an order fixed by the key: a four-round Feistel network over the next power of 4."""
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    digest = hashlib.sha256(key.encode()).digest()
    round_keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") | 1 for i in range(4)]
    for number in range(1 << 2 * half):
        left, right = number >> half, number & mask
        for round_key in round_keys:
            mixed = (right + 1) * round_key
            left, right = right, left ^ ((mixed ^ (mixed >> 29)) >> 7 & mask)
        position = left << half | right
        if position < size:
            yield position


def parameters_at(family: type[Problem], position: int) -> dict[str, int]:
    """The parameter set number `position` of the family's space (mixed radix, the first parameter fastest)."""
    parameters = {}
    for name, values in family.space.items():
        position, i = divmod(position, len(values))
        parameters[name] = values[i]
    return parameters


def draw(family: type[Problem], *, seed: int, split: str) -> Iterator[Problem]:
    """Every usable problem of the family in this split, each parameter set once, in the seed's order."""
    for position in permutation(space_size(family), f"{seed}/{family.family}"):
        parameters = parameters_at(family, position)
        if split_of(family.family, parameters) != split:
            continue
        problem = family(random.Random(f"{seed}/{family.family}/{position}"), parameters)
        if problem.usable():
            yield problem


def draw_all(families: Sequence[type[Problem]], *, seed: int, split: str) -> Iterator[Problem]:
    """Problems of all families in turn: blocks of one each, shuffled; an exhausted family drops out."""
    sources = {family: draw(family, seed=seed, split=split) for family in families}
    order = random.Random(f"{seed}/{split}")
    while sources:
        for family in order.sample(list(sources), len(sources)):
            problem = next(sources[family], None)
            if problem is None:
                del sources[family]
            else:
                yield problem


def difficulty(decomposition: str) -> float:
    """x² / (x² + 81) ∈ (0, 1), where x = (sub-problems in the decomposition) · log10(10 + the largest number in it)."""
    steps = decomposition.count("\n") + 1
    largest = max(float(digits) for digits in re.findall(r"\d+(?:\.\d+)?", decomposition))
    load = steps * math.log10(10 + largest)
    return round(load**2 / (load**2 + 81), 3)


def record_of(problem: Problem, record_id: str) -> dict[str, Any]:
    """The problem as a record. Raises ArithmeticMistakeError when an equation in a rationale does not hold."""
    problem.dress()
    question = problem.question()
    answer = problem.worded(problem.answer)
    texts = problem.rationales()
    for perspective, text in texts.items():
        if violations := check_rationale(text):
            raise ArithmeticMistakeError(f"{problem.family} {problem.parameters}, {perspective}: {violations[0]}")
    return {
        "id": record_id,
        "question": question,
        "answer": answer,
        "rationales": [{"perspective": name, "text": text, "answer": answer} for name, text in texts.items()],
        "difficulty": difficulty(texts["decomposition"]),
        "source": f"mind-problems/{problem.family}",
    }


def generate_records(
    num_questions: int, *, seed: int = 0, split: str = "train", families: Sequence[type[Problem]] = FAMILIES
) -> list[dict[str, Any]]:
    """`num_questions` records with all eight rationales each, the families in equal shares.

    The result depends on (seed, split) only and the first n records are the same for every num_questions ≥ n. The two
    splits share no parameters, whatever their seeds.

    Raises:
        ValueError: unknown split, num_questions not a positive integer, or more questions asked for than the finite
            parameter spaces hold (about a fifth of every space is "heldout", the rest "train").
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} given, wanted one of {', '.join(SPLITS)}")
    if isinstance(num_questions, bool) or not isinstance(num_questions, int) or num_questions < 1:
        raise ValueError(f"num_questions: {num_questions!r} given, wanted an integer of at least 1")
    records: list[dict[str, Any]] = []
    bound = sum(space_size(family) for family in families)
    if num_questions <= bound:
        for problem in draw_all(families, seed=seed, split=split):
            records.append(record_of(problem, f"{problem.family}-{split}-{seed}-{len(records)}"))
            if len(records) == num_questions:
                return records
        bound = len(records)
    raise ValueError(
        f"num_questions: {num_questions} given, but the parameter spaces hold at most {bound} {split} questions"
    )
