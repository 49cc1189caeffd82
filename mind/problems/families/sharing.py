"""Parts of a whole: shares in a ratio, a fraction of what is left, and the strength of a mixture."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import ClassVar

from mind.problems.language import Noun, number
from mind.problems.problem import Problem, Space

LITRES = Noun("litre", "litres")


class Ratio(Problem):
    """A total is shared in the ratio high : middle : low; how much more does the first get than the last?"""

    family = "ratio"
    space: ClassVar[Space] = {"high": range(3, 12), "middle": range(2, 11), "low": range(1, 10), "unit": range(3, 61)}
    simpler = (
        {"high": 3, "middle": 2, "low": 1, "unit": 2},
        {"high": 4, "middle": 1, "low": 1, "unit": 2},
        {"high": 3, "middle": 1, "low": 1, "unit": 1},
    )
    high: int
    middle: int
    low: int
    unit: int

    def solve(self) -> None:
        self.parts = self.high + self.middle + self.low
        self.total = self.parts * self.unit
        self.gap = self.high - self.low
        self.more = self.gap * self.unit
        self.first = self.high * self.unit
        self.answer = str(self.more)
        self.wrong = (str(self.first), str(self.gap))

    def accepts(self) -> bool:
        lowest_terms = math.gcd(self.high, self.middle, self.low) == 1
        return self.high > self.middle >= self.low and lowest_terms and self.total <= 900

    def changes(self) -> list[dict[str, int]]:
        return [{"unit": self.unit + step} for step in (-2, -1, 1, 2)]  # another total in the same ratio

    def dress(self) -> None:
        self.a, self.b, self.c = self.people(3)
        self.thing, self.reason = self.rng.choice(
            (
                ("dollars", "for [delivering leaflets|washing cars]"),
                ("stickers", "from a [big|new] pack"),
                ("marbles", "from an old tin"),
                ("chestnuts", "from [the park|a walk]"),
                ("points", "won in a quiz"),
                ("seeds", "from a seed bank"),
            )
        )
        self.ratio = f"{self.high}:{self.middle}:{self.low}"

    def question(self) -> str:
        a, b, c, t = self.a, self.b, self.c, self.thing
        return self.say(
            f"{a}, {b} and {c} share {self.total} {t} {self.reason} in the ratio {self.ratio}. How many more {t} does"
            f" {a} get than {c}?",
            f"There are {self.total} {t} {self.reason}. {a}, {b} and {c} divide them in the ratio {self.ratio}. By how"
            f" many {t} is {a}'s share larger than {c}'s?",
            f"A total of {self.total} {t} {self.reason} is split among {a}, {b} and {c} in the ratio {self.ratio}[, in"
            f" that order|]. How many {t} more than {c} does {a} receive?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let u be one part, and a, b, c the shares: a = {self.high}u, b = {self.middle}u, c = {self.low}u. [Their"
            f" sum gives|The total gives] {self.high}u + {self.middle}u + {self.low}u = {self.total}, hence"
            f" {self.parts}u = {self.total} and u = {self.total} / {self.parts} = {self.unit}. [Then|So] x = a - c ="
            f" {self.high}u - {self.low}u = {self.gap} × {self.unit} = {self.more}. [Hence|Therefore] x = {self.more}."
        )

    def intuitive(self) -> str:
        return self.say(
            f"[Imagine dealing out equal bags.|Think of equal little heaps.] {self.a} takes {self.high}, {self.b}"
            f" {self.middle} and {self.c} {self.low}, so there are {self.parts} of them and each holds {self.unit}"
            f" {self.thing}. Put {self.a}'s row beside {self.c}'s: it is longer by {self.gap}, and {self.gap} lots of"
            f" {self.unit} come to {self.more} {self.thing}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"Number of parts: {self.high} + {self.middle} + {self.low} = {self.parts}.",
            f"[One part|Size of a part]: {self.total} / {self.parts} = {self.unit} {self.thing}.",
            f"[Extra parts of {self.a}|Difference in parts]: {self.high} - {self.low} = {self.gap}.",
            f"[Difference in {self.thing}|So {self.a} gets more by]: {self.gap} × {self.unit} = {self.more}"
            f" {self.thing}.",
        )

    def planning(self) -> str:
        return self.plan(
            ("count all parts of the ratio", "find the size of one part", "multiply it by the difference in parts"),
            f"there are {self.high} + {self.middle} + {self.low} = {self.parts} parts. One part is {self.total} /"
            f" {self.parts} = {self.unit} {self.thing}. {self.a} has {self.high} - {self.low} = {self.gap} parts more"
            f" than {self.c}, that is {self.gap} × {self.unit} = {self.more} {self.thing}.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Cut|Take] a bar of {s.total} pieces in the ratio {s.high}:{s.middle}:{s.low}. It has {s.high} +"
            f" {s.middle} + {s.low} = {s.parts} parts of {s.total} / {s.parts} = {s.unit}, so the first beats the last"
            f" by ({s.high} - {s.low}) × {s.unit} = {s.more}. [The {self.thing} are cut alike|Now the {self.thing}]:"
            f" {self.total} / {self.parts} = {self.unit} per part, and ({self.high} - {self.low}) × {self.unit} ="
            f" {self.more} {self.thing} more for {self.a}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            ("How many equal parts are there?", f"{self.high} + {self.middle} + {self.low} = {self.parts}."),
            ("How big is [one of them|a single part]?", f"{self.total} / {self.parts} = {self.unit} {self.thing}."),
            (
                f"Do I need {self.a}'s whole share?",
                f"No, only the parts {self.a.he} has more than {self.c}: {self.high} - {self.low} = {self.gap}.",
            ),
            ("[So what is the difference?|How much is that?]", f"{self.gap} × {self.unit} = {self.more} {self.thing}."),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Which number answers the question?|Three numbers could be meant.]",
            (
                f"({self.high} - {self.low}) × {self.total} / {self.parts} = {self.more}",
                "it turns the difference of parts into a real amount",
            ),
            (
                (f"{self.high} × {self.total} / {self.parts} = {self.first}", f"it is the whole share of {self.a}"),
                (f"{self.high} - {self.low} = {self.gap}", f"it counts parts, not {self.thing}"),
            ),
            f"{self.a} gets {self.more} {self.thing} more.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] there were {c.total} {self.thing} instead of {self.total}. With the same"
            f" {self.parts} parts, one part would be {c.total} / {c.parts} = {c.unit} and the difference {c.gap} ×"
            f" {c.unit} = {c.more}. The {self.gap} extra parts stay, only their size moves, so the size of a part is"
            f" the [critical|decisive] link. For {self.total} {self.thing} it is {self.total} / {self.parts} ="
            f" {self.unit}, and {self.gap} × {self.unit} = {self.more} {self.thing}."
        )


class Fractions(Problem):
    """One `first`-th of the whole goes, then one `second`-th of the rest; how many are left?"""

    family = "fractions"
    space: ClassVar[Space] = {"first": range(2, 11), "second": range(2, 11), "unit": range(2, 121)}
    simpler = (
        {"first": 2, "second": 2, "unit": 1},
        {"first": 2, "second": 3, "unit": 1},
        {"first": 3, "second": 2, "unit": 1},
    )
    first: int
    second: int
    unit: int

    def solve(self) -> None:
        self.whole = self.first * self.second * self.unit
        self.gone = self.whole // self.first
        self.rest = self.whole - self.gone
        self.gone_2 = self.rest // self.second
        self.left = self.rest - self.gone_2
        self.answer = str(self.left)
        self.of_whole = self.whole // self.second
        self.both_of_whole = self.whole - self.gone - self.of_whole
        self.wrong = (str(self.both_of_whole), str(self.gone_2))

    def accepts(self) -> bool:
        return 12 < self.whole <= 900

    def changes(self) -> list[dict[str, int]]:
        return [
            {"second": second, "unit": self.whole // (self.first * second)}
            for second in (2, 3, 4, 5, 6)
            if self.whole % (self.first * second) == 0
        ]

    def dress(self) -> None:
        (self.person,) = self.people(1)
        self.thing, self.act_1, self.act_2 = self.rng.choice(
            (
                (Noun("muffin", "muffins"), "sells {} in the morning", "{} in the afternoon"),
                (Noun("card", "cards"), "gives {} to a cousin", "{} to a friend"),
                (Noun("photo", "photos"), "prints {} on Monday", "{} on Tuesday"),
                (Noun("page", "pages"), "reads {} on Saturday", "{} on Sunday"),
                (Noun("brick", "bricks"), "uses {} for a wall", "{} for an oven"),
                (Noun("apple", "apples"), "packs {} for the market", "{} for the neighbours"),
            )
        )
        self.share_1 = _share(self.first)
        self.share_2 = _share(self.second)

    def question(self) -> str:
        p, t = self.person, self.thing.many
        once = self.act_1.format(f"{self.share_1} of them")
        then = self.act_2.format(f"{self.share_2} of the rest")
        return self.say(
            f"{p} has {self.whole} {t}. {p.He} {once} and then {then}. How many {t} are left?",
            f"Of {p}'s {self.whole} {t}, {p.he} {self.act_1.format(self.share_1)} and {then}. How many {t} [remain|are"
            " left over]?",
            f"There are {self.whole} {t}. {p} {once}, and after that"
            f" {self.act_2.format(f'{self.share_2} of what remains')}. How many {t} are left in the end?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let n = {self.whole} be the number of {self.thing.many}, r the rest after the first step and x what is"
            f" left. [Then|We have|The data give|By the statement,] r = n × (1 - 1/{self.first}) = {self.whole} -"
            f" {self.gone} = {self.rest} and x = r × (1 - 1/{self.second}) = {self.rest} - {self.gone_2} = {self.left}."
            f" [Hence|Therefore|It follows that|Consequently,] x = {self.left}."
        )

    def intuitive(self) -> str:
        p = self.person
        return self.say(
            f"[Lay the {self.thing.many} out in {self.first} equal rows|Picture {self.first} equal rows]: one row of"
            f" {self.gone} goes, and {self.rest} stay. Now only those count. [Sort|Split] them into {self.second} new"
            f" rows, take one of {self.gone_2} away, and {p} is left with {self.left} {self.thing.many}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[First part that goes|Gone at first]: {self.whole} / {self.first} = {self.gone}.",
            f"[Rest|What remains]: {self.whole} - {self.gone} = {self.rest}.",
            f"[Second part, taken from the rest|Then gone from the rest]: {self.rest} / {self.second} = {self.gone_2}.",
            f"[Left|In the end]: {self.rest} - {self.gone_2} = {self.left} {self.thing.many}.",
        )

    def planning(self) -> str:
        return self.plan(
            ("take the first fraction off the whole", "take the second fraction off the rest", "report what is left"),
            f"{self.whole} / {self.first} = {self.gone} go, so {self.whole} - {self.gone} = {self.rest} remain. Of"
            f" these {self.rest} / {self.second} = {self.gone_2} go. {self.rest} - {self.gone_2} = {self.left}"
            f" {self.thing.many} are left.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Try {s.whole} nuts|Begin with {s.whole} nuts]: {_share(s.first)} goes, {s.whole} / {s.first} = {s.gone},"
            f" so {s.rest} stay; then {_share(s.second)} of those, {s.rest} / {s.second} = {s.gone_2}, so {s.rest} -"
            f" {s.gone_2} = {s.left} {'is' if s.left == 1 else 'are'} left. The second share came from the rest. [It is"
            f" the same with|Likewise for] the {self.thing.many}: {self.whole} - {self.gone} = {self.rest}, {self.rest}"
            f" / {self.second} = {self.gone_2}, {self.rest} - {self.gone_2} = {self.left} left."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (f"How much is {self.share_1} of {self.whole}?", f"{self.whole} / {self.first} = {self.gone}."),
            ("[What stays?|How many remain then?]", f"{self.whole} - {self.gone} = {self.rest}."),
            (
                f"Is the next share taken from {self.whole} again?",
                f"No, from the rest: {self.rest} / {self.second} = {self.gone_2}.",
            ),
            (
                "[So how many are left?|What is left in the end?]",
                f"{self.rest} - {self.gone_2} = {self.left} {self.thing.many}.",
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[The second share is the tricky point.|Which calculation fits the story?]",
            (f"{self.rest} - {self.rest} / {self.second} = {self.left}", "the second share comes from the rest"),
            (
                (
                    f"{self.whole} - {self.gone} - {self.whole} / {self.second} = {self.both_of_whole}",
                    "it takes the second share from the whole",
                ),
                (f"{self.rest} / {self.second} = {self.gone_2}", "it counts what goes, not what is left"),
            ),
            f"[There are {self.left} left|So {self.left} {self.thing.many} are left].",
        )

    def counterfactual(self) -> str:
        c = self.changed
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the second share were {_share(c.second)} of the rest instead of"
            f" {self.share_2}. The rest is still {self.whole} - {self.gone} = {self.rest}; {c.rest} / {c.second} ="
            f" {c.gone_2} would go and {c.rest} - {c.gone_2} = {c.left} would be left. Everything after the first step"
            f" hangs on the {self.rest} that remain: that is the [critical|key] constraint. With {self.share_2} of"
            f" them, {self.rest} - {self.gone_2} = {self.left} {self.thing.many} are left."
        )


def _share(parts: int) -> str:
    return {
        2: "half",
        3: "a third",
        4: "a quarter",
        5: "a fifth",
        6: "a sixth",
        7: "a seventh",
        8: "an eighth",
        9: "a ninth",
        10: "a tenth",
    }[parts]


class Mixture(Problem):
    """Strength of a mixture in per cent: (litres_a·weak + litres_b·strong) / (litres_a + litres_b)."""

    family = "mixture"
    space: ClassVar[Space] = {
        "litres_a": range(1, 16),
        "weak": range(5, 61),
        "litres_b": range(1, 16),
        "strong": range(10, 96),
    }
    simpler = (
        {"litres_a": 1, "weak": 4, "litres_b": 3, "strong": 8},
        {"litres_a": 2, "weak": 2, "litres_b": 1, "strong": 5},
        {"litres_a": 1, "weak": 2, "litres_b": 2, "strong": 5},
    )
    litres_a: int
    weak: int
    litres_b: int
    strong: int

    def solve(self) -> None:
        self.pure_a = Fraction(self.litres_a * self.weak, 100)
        self.pure_b = Fraction(self.litres_b * self.strong, 100)
        self.pure = self.pure_a + self.pure_b
        self.litres = self.litres_a + self.litres_b
        self.strength = self.pure / self.litres * 100
        self.mean = Fraction(self.weak + self.strong, 2)
        self.answer = number(self.strength)
        self.wrong = (number(self.mean), str(self.weak + self.strong))

    def accepts(self) -> bool:
        return self.strength.denominator == 1 and self.strong >= self.weak + 10 and (self.pure_a * 10).denominator == 1

    def changes(self) -> list[dict[str, int]]:
        return [{"litres_b": self.litres_a}]  # equal amounts: the plain mean

    def dress(self) -> None:
        (self.maker,) = self.people(1)
        self.drink, self.pure_thing = self.rng.choice(
            (
                ("juice drink", "juice"),
                ("sugar syrup", "sugar"),
                ("salt solution", "salt"),
                ("alcohol solution", "alcohol"),
                ("cleaning liquid", "vinegar"),
                ("antifreeze", "glycol"),
            )
        )

    def question(self) -> str:
        m, pure = self.maker, self.pure_thing
        a, b = LITRES.count(self.litres_a), LITRES.count(self.litres_b)
        return self.say(
            f"{m} mixes {a} of {self.drink} with {self.weak}% {pure} and {b} with {self.strong}% {pure}. What"
            f" percentage of the mixture is {pure}?",
            f"A tank holds {a} of {self.drink} containing {self.weak}% {pure}. {m} adds {b} containing {self.strong}%"
            f" {pure}. How many per cent {pure} does the mixture contain?",
            f"{m} pours together {a} of {self.drink} with {self.weak}% {pure} and {b} with {self.strong}% {pure}. What"
            f" is the strength of the result, in per cent of {pure}?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let p and q be the litres of {self.pure_thing} in the two liquids, v the total volume and c the"
            f" concentration. [Then|We have|The data give|By the statement,] p = {self.weak}% × {self.litres_a} ="
            f" {number(self.pure_a)}, q = {self.strong}% × {self.litres_b} = {number(self.pure_b)} and v ="
            f" {self.litres_a} + {self.litres_b} = {self.litres}. [Hence|Therefore|It follows that|Consequently,] c ="
            f" (p + q) / v = {number(self.pure)} / {self.litres} = {self.answer}%."
        )

    def intuitive(self) -> str:
        side = "stronger" if self.litres_b > self.litres_a else "weaker"
        return self.say(
            "[The bigger jug wins the tug of war.|More of one liquid pulls the mixture its way.] There is more of the"
            f" {side} liquid, so the mixture lies nearer to it than halfway. The first brings"
            f" {LITRES.count(self.pure_a)} of pure {self.pure_thing}, the second {number(self.pure_b)}, together"
            f" {number(self.pure)} among {self.litres} litres. That is {self.answer} in a hundred, so {self.answer}%."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"{self.pure_thing.capitalize()} in the first liquid: {self.weak}% of {self.litres_a} ="
            f" {LITRES.count(self.pure_a)}.",
            f"{self.pure_thing.capitalize()} in the second: {self.strong}% of {self.litres_b} ="
            f" {LITRES.count(self.pure_b)}.",
            f"Together: {number(self.pure_a)} + {number(self.pure_b)} = {LITRES.count(self.pure)} in {self.litres_a} +"
            f" {self.litres_b} = {self.litres} litres.",
            f"Strength: {number(self.pure)} / {self.litres} = {self.answer}%.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                f"find the pure {self.pure_thing} in each liquid",
                "add it up, and the volumes too",
                "divide the one by the other",
            ),
            f"{self.weak}% of {self.litres_a} = {number(self.pure_a)} and {self.strong}% of {self.litres_b} ="
            f" {number(self.pure_b)}, together {LITRES.count(self.pure)} of {self.pure_thing}. The volume is"
            f" {self.litres_a} + {self.litres_b} = {self.litres} litres. {number(self.pure)} / {self.litres} ="
            f" {self.answer}%, the strength of the mixture.",
        )

    def analogy(self) -> str:
        s = self.simple
        boxes = Noun("box", "boxes")
        return self.say(
            "[Think of boxes of pens|Compare boxes of pens|Imagine boxes of pens|Take boxes of pens]:"
            f" {boxes.count(s.litres_a)} with {s.weak} red pens and {boxes.count(s.litres_b)} with {s.strong}. On"
            f" average a box has ({s.litres_a} × {s.weak} + {s.litres_b} × {s.strong}) / {s.litres} = {s.answer} red"
            " pens. [Litres are the boxes, per cents the red pens|Now litres are boxes and per cents are red pens]:"
            f" ({self.litres_a} × {self.weak} + {self.litres_b} × {self.strong}) / {self.litres} = {self.answer}, so"
            f" the mixture has {self.answer}%."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                f"How much pure {self.pure_thing} is in the first liquid?",
                f"{self.weak}% of {self.litres_a} = {LITRES.count(self.pure_a)}.",
            ),
            (
                "[And in the second?|What does the second bring?]",
                f"{self.strong}% of {self.litres_b} = {LITRES.count(self.pure_b)}.",
            ),
            ("In how many litres does it end up?", f"{self.litres_a} + {self.litres_b} = {self.litres}."),
            (
                "[So what is the strength?|What share is that?]",
                f"({number(self.pure_a)} + {number(self.pure_b)}) / {self.litres} = {self.answer}%.",
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[How strong can the mixture be?|Compare three strengths.]",
            (
                f"({self.litres_a} × {self.weak} + {self.litres_b} × {self.strong}) / {self.litres} = {self.answer}",
                "every litre counts once",
            ),
            (
                (f"({self.weak} + {self.strong}) / 2 = {number(self.mean)}", "it ignores the unequal amounts"),
                (f"{self.weak} + {self.strong} = {self.weak + self.strong}", "it is stronger than both liquids"),
            ),
            f"The mixture has {self.answer}%.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] both amounts were {LITRES.count(c.litres_a)}. The mixture would be"
            f" ({c.weak} + {c.strong}) / 2 = {c.answer}, just the middle. In truth the second amount is"
            f" {LITRES.count(self.litres_b)}, so the [critical|decisive] constraint is the weight of each liquid."
            f" Putting it back: ({self.litres_a} × {self.weak} + {self.litres_b} × {self.strong}) / {self.litres} ="
            f" {self.answer}, so {self.answer}%."
        )
