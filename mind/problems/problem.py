"""What every family of problems shares: its parameters, its exact solution, and the frame of each perspective.

A family is a subclass of `Problem`; an instance is one problem. The subclass says

- `space`: the finite range of every parameter (their product, less what `accepts` rejects, bounds the questions);
- `solve()`: the exact numbers, `answer`, and `wrong`, the results of typical wrong methods;
- `changes()`: parameters under which the counterfactual rationale solves the same problem again;
- `simpler`: small parameters for the example that the analogy rationale solves first;
- `dress()`: the people and things of the story, on which `solve` does not depend;
- `question()` and one method per perspective, each returning text with `[this|that]` alternatives already drawn.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Self, TypeVar

from mind.problems.language import PEOPLE, Person, capital, spin

PERSPECTIVES: tuple[str, ...] = (
    "formal_symbolic",
    "intuitive",
    "decomposition",
    "planning",
    "analogy",
    "socratic",
    "contrastive",
    "counterfactual",
)
PLAN_LABELS = ("Plan", "My plan", "Strategy")
EXECUTION_LABELS = ("Execution", "Carrying it out", "Now step by step")
CANDIDATE_LABELS = (
    ("(A)", "(B)", "(C)"),
    ("Candidate 1:", "Candidate 2:", "Candidate 3:"),
    ("Option A:", "Option B:", "Option C:"),
)

Space = Mapping[str, Sequence[int]]  # parameter -> its values
T = TypeVar("T")


class Problem(ABC):
    """One problem of a family: parameters (name -> integer) and a source of wording."""

    family: ClassVar[str]
    space: ClassVar[Space]
    simpler: ClassVar[Sequence[Mapping[str, int]]]

    answer: str
    wrong: tuple[str, ...]  # one or two values that the contrastive rationale eliminates

    def __init__(self, rng: random.Random, parameters: Mapping[str, int]) -> None:
        self.rng = rng
        self.parameters = dict(parameters)
        vars(self).update(parameters)
        self.solve()

    # -- what a family defines -------------------------------------------------------------------------------------

    @abstractmethod
    def solve(self) -> None:
        """Set `answer`, `wrong` and what the texts need, exactly, from the parameters."""

    def accepts(self) -> bool:
        """Whether these parameters make a sensible problem (clean answer, realistic size)."""
        return True

    @abstractmethod
    def changes(self) -> Sequence[Mapping[str, int]]:
        """Parameters to change for the counterfactual rationale; one whose answer differs is drawn."""

    @abstractmethod
    def dress(self) -> None:
        """Draw people and things."""

    @abstractmethod
    def question(self) -> str:
        """The problem in words."""

    def worded(self, answer: str) -> str:
        """An answer of `solve` as the story says it; families whose answer is a person or thing look it up here."""
        return answer

    # -- what the perspectives build on ----------------------------------------------------------------------------

    @cached_property
    def changed(self) -> Self:
        """The same problem with one condition changed and therefore another answer; LookupError if there is none."""
        others = [type(self)(self.rng, {**self.parameters, **change}) for change in self.changes()]
        others = [other for other in others if other.accepts() and other.answer != self.answer]
        if not others:
            raise LookupError(f"{self.family} {self.parameters}: no change of a condition gives another answer")
        return self.rng.choice(others)

    @cached_property
    def simple(self) -> Self:
        """A smaller problem of the same kind, with its own numbers and another answer."""
        examples = [type(self)(self.rng, parameters) for parameters in self.simpler]
        return self.rng.choice([example for example in examples if example.answer != self.answer])

    def usable(self) -> bool:
        """Whether the problem is sensible, its candidates are all different and a counterfactual exists."""
        if not self.accepts() or len({self.answer, *self.wrong}) != 1 + len(self.wrong):
            return False
        try:
            return self.changed.answer != self.answer
        except LookupError:
            return False

    def rationales(self) -> dict[str, str]:
        """perspective -> text, for all eight."""
        return {perspective: getattr(self, perspective)() for perspective in PERSPECTIVES}

    # -- wording ---------------------------------------------------------------------------------------------------

    def say(self, *texts: str) -> str:
        """One of the texts, its `[this|that]` alternatives drawn."""
        return spin(self.rng.choice(texts), self.rng)

    def people(self, count: int) -> list[Person]:
        return self.rng.sample(PEOPLE, count)

    def pick(self, items: Sequence[T], count: int) -> list[T]:
        return self.rng.sample(items, count)

    # -- frames: one per perspective that has a visible form ---------------------------------------------------------

    def numbered(self, *steps: str) -> str:
        """Sub-problems, one a line: "1. …"."""
        form = self.rng.choice(("{}. {}", "Step {}: {}", "{}) {}"))
        return "\n".join(form.format(i, self.say(step)) for i, step in enumerate(steps, 1))

    def plan(self, steps: Sequence[str], execution: str) -> str:
        """The whole plan first, with none of its results, then its execution."""
        first, *middle, last = [self.say(step) for step in steps]
        told = self.rng.choice(
            (
                f"first {first}, " + "".join(f"then {step}, " for step in middle) + f"[finally|and last] {last}.",
                " ".join(
                    f"({i}) {step}{';' if i < len(steps) else '.'}" for i, step in enumerate([first, *middle, last], 1)
                ),
                f"{first}; " + "".join(f"{step}; " for step in middle) + f"{last}.",
            )
        )
        plan, doing = self.rng.choice(PLAN_LABELS), self.rng.choice(EXECUTION_LABELS)
        return f"{plan}: {self.say(told)}\n{doing}: {self.say(execution)}"

    def dialogue(self, *turns: tuple[str, str]) -> str:
        """Questions to oneself, each answered before the next."""
        return "\n".join(f"{self.say(question)} {self.say(answer)}" for question, answer in turns)

    def contrast(self, opening: str, right: tuple[str, str], wrong: Sequence[tuple[str, str]], closing: str) -> str:
        """Candidates (computation, verdict) in random order, the wrong ones rejected, the right one kept."""
        rejections = (
            "so it is out",
            "so [reject it|I reject it]",
            "so it fails",
            "so it cannot stand",
            "so cross it out",
        )
        keeping = ("so it stays", "so it stands", "so keep it", "so it survives")
        candidates = [(computation, f"{verdict}, {self.rng.choice(rejections)}") for computation, verdict in wrong]
        candidates.append((right[0], f"{right[1]}, {self.rng.choice(keeping)}"))
        self.rng.shuffle(candidates)
        labels = self.rng.choice(CANDIDATE_LABELS)
        told = [
            f"{label} {computation}. {capital(verdict)}."
            for label, (computation, verdict) in zip(labels, candidates, strict=False)
        ]
        return "\n".join(self.say(part) for part in (opening, *told, closing))
