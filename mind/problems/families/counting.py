"""Counting: outfits with a forbidden combination, and savings that grow by a fixed step."""

from __future__ import annotations

from typing import ClassVar

from mind.problems.language import Noun
from mind.problems.problem import Problem, Space


class Outfits(Problem):
    """Ways to choose three things when some pairs of the first two are banned: (first·second - banned)·third."""

    family = "outfits"
    space: ClassVar[Space] = {
        "first": range(3, 14),
        "second": range(3, 14),
        "third": range(2, 13),
        "banned": range(1, 6),
    }
    simpler = (
        {"first": 2, "second": 2, "third": 1, "banned": 1},
        {"first": 2, "second": 2, "third": 2, "banned": 1},
        {"first": 2, "second": 3, "third": 1, "banned": 1},
    )
    first: int
    second: int
    third: int
    banned: int

    def solve(self) -> None:
        self.pairs = self.first * self.second
        self.good = self.pairs - self.banned
        self.outfits = self.good * self.third
        self.unbanned = self.pairs * self.third
        self.late = self.unbanned - self.banned
        self.answer = str(self.outfits)
        self.wrong = (str(self.unbanned), str(self.late))

    def accepts(self) -> bool:
        return self.banned < self.second and self.outfits <= 900

    def changes(self) -> list[dict[str, int]]:
        return [
            {"banned": banned}
            for banned in (self.banned - 1, self.banned + 1, self.banned + 2)
            if 0 < banned < self.second
        ]

    def dress(self) -> None:
        (self.person,) = self.people(1)
        self.x, self.y, self.z, self.what, self.odd = self.rng.choice(
            (
                (Noun("shirt", "shirts"), Noun("skirt", "skirts"), Noun("scarf", "scarves"), "outfit", "striped"),
                (Noun("soup", "soups"), Noun("main dish", "main dishes"), Noun("dessert", "desserts"), "menu", "spicy"),
                (Noun("jacket", "jackets"), Noun("hat", "hats"), Noun("bag", "bags"), "set", "purple"),
                (Noun("mask", "masks"), Noun("cape", "capes"), Noun("wig", "wigs"), "costume", "golden"),
                (Noun("frame", "frames"), Noun("saddle", "saddles"), Noun("bell", "bells"), "bicycle", "racing"),
                (Noun("cone", "cones"), Noun("flavour", "flavours"), Noun("topping", "toppings"), "dessert", "salted"),
            )
        )
        self.ban = f"the {self.odd} {self.x.one} never goes with {self.banned} of the {self.y.many}"

    def question(self) -> str:
        x, y, z = self.x.count(self.first), self.y.count(self.second), self.z.count(self.third)
        return self.say(
            f"{self.person} can choose from {x}, {y} and {z}, but {self.ban}. How many different {self.what}s with one"
            " of each are possible?",
            f"[A shop|A catalogue] offers {x}, {y} and {z}. Every {self.what} has one of each, and {self.ban}. How many"
            f" {self.what}s can {self.person} put together?",
            f"{self.person} [picks|chooses] one of {x}, one of {y} and one of {z}. Only one rule applies: {self.ban}."
            f" How many {self.what}s are there?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let m be the number of admissible pairs and n the number of {self.what}s. By the product rule there are p"
            f" = {self.first} × {self.second} = {self.pairs} pairs, of which {self.banned}"
            f" {'is' if self.banned == 1 else 'are'} excluded: m = p - {self.banned} = {self.good}. [The third choice"
            f" is free, so|Since the third choice is free,] n = m × {self.third} = {self.good} × {self.third} ="
            f" {self.outfits}. Hence n = {self.outfits}."
        )

    def intuitive(self) -> str:
        p = self.person
        return self.say(
            f"[Lay everything out|Picture a big table]: beside each {self.x.one} go {self.second} {self.y.many}, which"
            f" would be {self.pairs} pairs. The {self.odd} {self.x.one} spoils {self.banned} of them, so {self.good}"
            f" pairs are fine. [Each of those|Every one] can be finished with any of {self.z.count(self.third)}, and"
            f" {p} ends up with {self.outfits} {self.what}s."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"All pairs of {self.x.one} and {self.y.one}: {self.first} × {self.second} = {self.pairs}.",
            f"[Allowed pairs|Pairs that go together]: {self.pairs} - {self.banned} = {self.good}.",
            f"With one of {self.z.count(self.third)} each: {self.good} × {self.third} = {self.outfits} {self.what}s.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                f"count the pairs of {self.x.one} and {self.y.one}",
                "remove the forbidden ones",
                f"multiply by the {self.z.many}",
            ),
            f"there are {self.first} × {self.second} = {self.pairs} pairs. {self.pairs} - {self.banned} = {self.good}"
            f" of them are allowed. With {self.z.count(self.third)}, {self.good} × {self.third} = {self.outfits}"
            f" {self.what}s are possible.",
        )

    def analogy(self) -> str:
        s = self.simple
        sauces = Noun("sauce", "sauces").count(s.third)
        return self.say(
            f"[Take a tiny menu|A tiny version]: {s.first} breads, {s.second} cheeses and {sauces}, with {s.banned} bad"
            f" pair of bread and cheese. {s.first} × {s.second} - {s.banned} = {s.good} pairs work, and {s.good} ×"
            f" {s.third} = {s.outfits} sandwiches result. [Here the roles are the same|Map it back]: {self.first} ×"
            f" {self.second} - {self.banned} = {self.good} pairs, and {self.good} × {self.third} = {self.outfits}"
            f" {self.what}s."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                f"How many pairs of {self.x.one} and {self.y.one} exist?",
                f"{self.first} × {self.second} = {self.pairs}.",
            ),
            (
                "[Are all of them allowed?|May I use them all?]",
                (
                    f"No, {self.banned} {'is' if self.banned == 1 else 'are'} forbidden: {self.pairs} - {self.banned} ="
                    f" {self.good}."
                ),
            ),
            (
                f"[What do the {self.z.many} change?|And the {self.z.many}?]",
                (
                    f"Each allowed pair takes any of {self.third}: {self.good} × {self.third} = {self.outfits}"
                    f" {self.what}s."
                ),
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Where does the rule enter?|Compare three counts.]",
            (
                f"({self.first} × {self.second} - {self.banned}) × {self.third} = {self.outfits}",
                "every forbidden pair is gone before the last choice",
            ),
            (
                (f"{self.first} × {self.second} × {self.third} = {self.unbanned}", "it ignores the rule"),
                (
                    f"{self.first} × {self.second} × {self.third} - {self.banned} = {self.late}",
                    f"a bad pair spoils {self.third} {self.what}s, not one",
                ),
            ),
            f"There are {self.outfits} {self.what}s.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        step = abs(c.banned - self.banned)
        gap = abs(c.outfits - self.outfits)
        sign = "+" if c.outfits < self.outfits else "-"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the {self.odd} {self.x.one} clashed with {self.y.count(c.banned)} instead"
            f" of {self.banned}. Then ({c.first} × {c.second} - {c.banned}) × {c.third} = {c.outfits} {self.what}s"
            f" would be possible. Each clash costs {self.third}, one per {self.z.one}: the [critical|decisive]"
            f" constraint is the forbidden pairs. Back to {self.banned}: {step} × {self.third} = {gap}, and {c.outfits}"
            f" {sign} {gap} = {self.outfits} {self.what}s."
        )


class Savings(Problem):
    """Sum of an arithmetic sequence: times·(start + last) / 2 with last = start + (times - 1)·step."""

    family = "savings"
    space: ClassVar[Space] = {"start": range(2, 41), "step": range(2, 16), "times": range(4, 16)}
    simpler = (
        {"start": 1, "step": 1, "times": 3},
        {"start": 1, "step": 2, "times": 3},
        {"start": 2, "step": 1, "times": 3},
    )
    start: int
    step: int
    times: int

    def solve(self) -> None:
        self.steps = self.times - 1
        self.growth = self.steps * self.step
        self.last = self.start + self.growth
        self.ends = self.start + self.last
        self.total = self.times * self.ends // 2
        self.constant = self.times * self.start
        self.answer = str(self.total)
        self.wrong = (str(self.last), str(self.constant))

    def accepts(self) -> bool:
        return self.total <= 1200

    def changes(self) -> list[dict[str, int]]:
        return [{"step": self.step + 1}, {"step": self.step + 2}]

    def dress(self) -> None:
        (self.person,) = self.people(1)
        self.when, self.act, self.thing = self.rng.choice(
            (
                (Noun("week", "weeks"), "saves", "dollars"),
                (Noun("day", "days"), "reads", "pages"),
                (Noun("day", "days"), "sells", "tickets"),
                (Noun("month", "months"), "plants", "trees"),
                (Noun("hour", "hours"), "picks", "plums"),
                (Noun("hour", "hours"), "folds", "paper cranes"),
            )
        )
        self.on = "on" if self.when.one == "day" else "in"

    def question(self) -> str:
        p, w, t = self.person, self.when, self.thing
        return self.say(
            f"{p} {self.act} {self.start} {t} {self.on} the first {w.one} and {self.step} more every {w.one} than"
            f" {self.on} the one before. How many {t} is that in {w.count(self.times)} altogether?",
            f"{self.on.capitalize()} the first {w.one} {p} {self.act} {self.start} {t}. From then on {p.he} adds"
            f" {self.step} each {w.one}. What is the total number of {t} after {w.count(self.times)}?",
            f"Over {w.count(self.times)}, {p} {self.act} {t}: {self.start} {self.on} the first {w.one}, then always"
            f" {self.step} more than {self.on} the previous {w.one}. How many {t} does {p.he} reach in total?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let a = {self.start} be the first term, d = {self.step} the difference, n = {self.times} the number of"
            " terms, z the last term and s the sum. [Then|We have|The data give|By the statement,] z = a + (n - 1) × d"
            f" = {self.start} + {self.growth} = {self.last} and s = n × (a + z) / 2 = {self.times} × {self.ends} / 2 ="
            f" {self.total}. [Hence|Therefore|It follows that|Consequently,] s = {self.total}."
        )

    def intuitive(self) -> str:
        return self.say(
            f"[Pair the poorest with the richest|Match the smallest with the largest] {self.when.one}: {self.start} and"
            f" {self.last} make {self.ends}. The second and the second last make the same, because one gains what the"
            f" other loses. So a typical {self.when.one} is worth half of {self.ends}, and"
            f" {self.when.count(self.times)} bring {self.total} {self.thing}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"Growth up to the last {self.when.one}: {self.steps} × {self.step} = {self.growth}.",
            f"Amount {self.on} the last {self.when.one}: {self.start} + {self.growth} = {self.last}.",
            f"First and last together: {self.start} + {self.last} = {self.ends}.",
            f"[Total|Sum] of {self.when.count(self.times)}: {self.times} × {self.ends} / 2 = {self.total}"
            f" {self.thing}.",
        )

    def planning(self) -> str:
        return self.plan(
            ("find the last amount", "add it to the first", f"multiply by the number of {self.when.many} and halve"),
            f"the last amount is {self.start} + {self.steps} × {self.step} = {self.last}. With the first, {self.start}"
            f" + {self.last} = {self.ends}. The total is {self.times} × {self.ends} / 2 = {self.total} {self.thing}.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Stack a small tower|Think of stairs] with {s.times} steps of {s.start}, {s.start + s.step} and {s.last}"
            f" bricks. First and last give {s.start} + {s.last} = {s.ends}, so there are {s.times} × {s.ends} / 2 ="
            f" {s.total} bricks. The {self.when.many} are such a stair from {self.start} up to {self.start} +"
            f" {self.steps} × {self.step} = {self.last}: {self.times} × ({self.start} + {self.last}) / 2 = {self.total}"
            f" {self.thing}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                f"How much is it {self.on} the last {self.when.one}?",
                f"After {self.steps} increases, {self.start} + {self.steps} × {self.step} = {self.last}.",
            ),
            (
                "[What do the first and the last make?|How much are first and last together?]",
                f"{self.start} + {self.last} = {self.ends}.",
            ),
            (
                "[Do other pairs make the same?|What about the other pairs?]",
                f"They all make {self.ends}, so an average amount is half of it.",
            ),
            ("So what is the total?", f"{self.times} × {self.ends} / 2 = {self.total} {self.thing}."),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Three totals are on offer.|Which total is right?]",
            (
                f"{self.times} × ({self.start} + {self.last}) / 2 = {self.total}",
                f"it adds all {self.times} growing amounts",
            ),
            (
                (f"{self.start} + {self.steps} × {self.step} = {self.last}", f"it is only the last {self.when.one}"),
                (f"{self.times} × {self.start} = {self.constant}", "it forgets the increase"),
            ),
            f"The total is {self.total} {self.thing}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the increase were {c.step} instead of {self.step}. The last amount would be"
            f" {c.start} + {c.steps} × {c.step} = {c.last} and the total {c.times} × ({c.start} + {c.last}) / 2 ="
            f" {c.total}. The increase acts through the last amount, which is the [critical|decisive] quantity. With"
            f" the real {self.step} it is {self.start} + {self.growth} = {self.last}, so {self.times} × {self.ends} / 2"
            f" = {self.total} {self.thing}."
        )
