"""The judge: which rationales are right, how difficult a question is, and which questions are kept."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mind.generate.ledger import Answer
from mind.prompting import PromptFormat, answers_match, is_option

BOXED = PromptFormat("\\boxed{{answer}}")  # how mathematical models finish, whatever they are told
SAME_TRIGRAMS = 0.7  # from here on two rationales are near-duplicates

# Why a rationale is dropped
REFUSED = "refused by the model"
CUT = "cut at max_tokens"
EMPTY = "empty"
NO_ANSWER = "no answer found"
WRONG = "wrong answer"
NO_RATIONALE = "answer without rationale"
UNDECIDED = "model judge undecided"


@dataclass(frozen=True)
class Verdict:
    """On one answer. reason: why it is dropped, None when it is right. given: the answer found in it."""

    text: str
    given: str | None
    reason: str | None


def judge(answer: Answer, wanted: str, prompt_format: PromptFormat) -> Verdict:
    """By value: mind.prompting.answers_match, for numbers, mathematics, option letters and yes/no."""
    text, given = split_answer(answer.text, prompt_format)
    if answer.refusal is not None:
        reason: str | None = REFUSED
    elif answer.finish_reason == "length":
        reason = CUT
    elif not answer.text.strip():
        reason = EMPTY
    elif given is None:
        reason = NO_ANSWER
    elif not answers_match(given, wanted):
        reason = WRONG
    else:
        reason = None if text else NO_RATIONALE
    return Verdict(text, given, reason)


def split_answer(output: str, prompt_format: PromptFormat) -> tuple[str, str | None]:
    """(rationale, answer) of what a teacher wrote.

    The rationale is what stands before the last answer line, without the rest of a sentence that only leads to it
    ("So", "Therefore,") and without a thinking model's <think> part. Where the answer is only boxed, within the
    reasoning, the rationale is everything.
    """
    text = output.rpartition("</think>")[2].strip()
    answer, opening = prompt_format.extract_answer(text), prompt_format.find_opening(text)
    if answer is None or opening is None:
        return text, BOXED.extract_answer(text)
    rationale = text[: opening.start()]
    *_, sentence = re.split(r"\n|(?<=[.!?:])\s+", rationale)
    if len(re.findall(r"\w+", sentence)) <= 3 and not re.search(r"\d", sentence):
        rationale = rationale[: len(rationale) - len(sentence)]
    return rationale.strip(), answer


def is_free_text(wanted: str) -> bool:
    """Whether an answer can only be compared by its words: no number, formula, option letter or yes/no."""
    word = wanted.strip(" ().:").casefold()
    return (
        len(word) > 1
        and word not in ("yes", "no", "true", "false")
        and not is_option(wanted)
        and not re.search(r"[\d\\^+*/=<>]", wanted)
    )


def says_yes(reply: str) -> bool | None:
    """A model judge's reply; None when it is neither yes nor no."""
    word = re.search(r"\w+", reply.rpartition("</think>")[2])
    return {"yes": True, "no": False}.get(word[0].casefold()) if word else None


def near_duplicates(texts: Mapping[str, str]) -> dict[str, str]:
    """Perspective -> the earlier one whose rationale is nearly the same.

    Nearly the same: of the word trigrams that the two hold together, at least SAME_TRIGRAMS are in both.
    """
    trigrams = {}
    for name, text in texts.items():
        words = ["", *re.findall(r"\w+", text.casefold()), ""]
        trigrams[name] = set(zip(words, words[1:], words[2:], strict=False))
    found: dict[str, str] = {}
    names = list(trigrams)
    for i, name in enumerate(names):
        for other in names[:i]:
            both, one = trigrams[name] & trigrams[other], trigrams[name] | trigrams[other]
            if other not in found and one and len(both) >= SAME_TRIGRAMS * len(one):
                found[name] = other
                break
    return found


def choose_questions(
    difficulties: Mapping[str, float], *, easy_difficulty: float, easy_share: float, target_size: int | None, seed: int
) -> set[str]:
    """Which questions are kept: all that are harder than `easy_difficulty`, and a random part of the easy ones.

    difficulties: question id -> share of the answers that failed, in [0, 1].
    easy_share: of the easy questions, at least one unless it is 0. With target_size instead as many of them as that
        leaves room for, none when the hard ones exceed it.
    """
    easy = [name for name, difficulty in difficulties.items() if difficulty <= easy_difficulty]
    hard = set(difficulties) - set(easy)
    share = max(round(easy_share * len(easy)), int(easy_share > 0))
    count = share if target_size is None else target_size - len(hard)
    return hard | set(random.Random(seed).sample(easy, min(len(easy), max(0, count))))


def difficulty(verdicts: Sequence[Verdict]) -> float:
    """The share of wrong answers; 0 of none."""
    return sum(verdict.reason is not None for verdict in verdicts) / max(1, len(verdicts))
