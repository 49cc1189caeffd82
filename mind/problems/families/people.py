"""Groups of people and their numbers: ages, a survey of two likings, and an average that a new value moves."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from mind.problems.language import Noun, capital, number
from mind.problems.problem import Problem, Space

YEARS = Noun("year", "years")


class Ages(Problem):
    """Two ages differ by `gap`; in `years` years their sum is 2·younger + gap + 2·years. How old is the younger now?"""

    family = "ages"
    space: ClassVar[Space] = {"younger": range(3, 36), "gap": range(2, 31), "years": range(2, 21)}
    simpler = (
        {"younger": 1, "gap": 1, "years": 1},
        {"younger": 2, "gap": 1, "years": 1},
        {"younger": 1, "gap": 2, "years": 1},
    )
    younger: int
    gap: int
    years: int

    def solve(self) -> None:
        self.elder = self.younger + self.gap
        self.grown = 2 * self.years
        self.later = self.younger + self.elder + self.grown
        self.now = self.younger + self.elder
        self.answer = str(self.younger)
        self.half_back = Fraction(self.later - self.years - self.gap, 2)
        self.wrong = (number(self.half_back), str(self.elder))

    def changes(self) -> list[dict[str, int]]:
        return [{"younger": self.younger + step} for step in (-2, -1, 1, 2, 3)]

    def accepts(self) -> bool:
        return self.younger > 0 and self.elder <= 60

    def dress(self) -> None:
        self.old, self.young = self.people(2)
        self.in_years = f"in {YEARS.count(self.years)}"

    def question(self) -> str:
        a, b = self.old, self.young
        return self.say(
            f"{a} is {self.gap} years older than {b}. {capital(self.in_years)}, the sum of their ages will be"
            f" {self.later}. How old is {b} [now|at present]?",
            f"{b} is {self.gap} years younger than {a}. [Together they will be|Their ages will add up to] {self.later}"
            f" {self.in_years}. What is {b}'s [present age|age today]?",
            f"{capital(self.in_years)} {a} and {b} will be {self.later} years old together. {a} is the elder by"
            f" {self.gap} years. How old is {b} [today|now]?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let x be {self.young}'s present age and y {self.old}'s. [The conditions are|We have] y = x + {self.gap}"
            f" and (x + {self.years}) + (y + {self.years}) = {self.later}. Substituting gives 2x + {self.gap} +"
            f" {self.grown} = {self.later}, so 2x = {2 * self.younger} and x = {2 * self.younger} / 2 = {self.younger}."
            f" [Check|Verification]: y = {self.elder}. [Hence|Therefore|It follows that|Consequently,] x ="
            f" {self.younger}."
        )

    def intuitive(self) -> str:
        return self.say(
            "[Birthdays come for both of them|Both of them grow older|Both blow out candles every year|Time passes for"
            f" both], so {self.years} years from now {self.grown} years have been added, not {self.years}. Today they"
            f" are therefore {self.now} together. [Forget|Leave out] {self.old}'s extra {self.gap} years, and the two"
            f" are like twins who share {2 * self.younger}. Half of that is {self.younger}, so {self.young} is"
            f" {self.younger}[ now| today|]."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[Years added for both by then|Growth of the sum by then]: 2 × {self.years} = {self.grown}.",
            f"[Sum of the ages now|Today's sum]: {self.later} - {self.grown} = {self.now}.",
            f"[Without|Taking off] {self.old}'s extra years: {self.now} - {self.gap} = {2 * self.younger}.",
            f"{self.young}'s age: {2 * self.younger} / 2 = {self.younger}.",
        )

    def planning(self) -> str:
        return self.plan(
            ("go back to the sum of today's ages", "remove the age difference", "halve what remains"),
            f"both age {YEARS.count(self.years)}, so today's sum is {self.later} - 2 × {self.years} = {self.now}."
            f" Without the difference it is {self.now} - {self.gap} = {2 * self.younger}. Half of it is"
            f" {2 * self.younger} / 2 = {self.younger}, the age of {self.young}.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Imagine two kittens|Take two puppies], one {YEARS.count(s.gap)} older, who will be {s.later} together in"
            f" {YEARS.count(s.years)}. Now they are {s.later} - {s.grown} = {s.now} together; without the difference"
            f" {s.now} - {s.gap} = {2 * s.younger}, so the younger is {2 * s.younger} / 2 = {s.younger}. [With people"
            f" it is the same|Map this back]: {self.later} - {self.grown} = {self.now}, {self.now} - {self.gap} ="
            f" {2 * self.younger}, {2 * self.younger} / 2 = {self.younger}. {self.young} is {self.younger}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                (
                    f"[How many years do the two gain together in {self.years} years?|By how much does the sum grow in"
                    f" {self.years} years?]"
                ),
                f"Both gain {self.years}, so 2 × {self.years} = {self.grown}.",
            ),
            (
                "[What is the sum today, then?|So what do the ages add up to now?]",
                f"{self.later} - {self.grown} = {self.now}.",
            ),
            (
                f"[What would it be if they were equally old?|What if {self.old} were as young as {self.young}?]",
                f"{self.now} - {self.gap} = {2 * self.younger}.",
            ),
            (f"[So how old is {self.young}?|And {self.young}'s age?]", f"{2 * self.younger} / 2 = {self.younger}."),
        )

    def contrastive(self) -> str:
        right_sum = f"({self.later} - {self.grown} - {self.gap}) / 2 = {self.younger}"
        return self.contrast(
            f"[How old could {self.young} be?|Compare some answers.]",
            (right_sum, f"both get {self.years} years older and the gap is removed"),
            (
                (
                    f"({self.later} - {self.years} - {self.gap}) / 2 = {number(self.half_back)}",
                    f"only one of the two gets {self.years} years older here",
                ),
                (f"({self.later} - {self.grown} + {self.gap}) / 2 = {self.elder}", f"that is {self.old}'s age"),
            ),
            f"{self.young} is {self.younger}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        shift = c.later - self.later
        direction = "more" if shift > 0 else "less"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the future sum were {c.later} instead of {self.later}. Then today's sum"
            f" would be {c.later} - {c.grown} = {c.now} and {self.young} would be ({c.now} - {c.gap}) / 2 ="
            f" {c.younger}. A sum that is {abs(shift)} {direction} moves {self.young}'s age by half of that, so the sum"
            f" is the [critical|decisive] condition. With the true {self.later}: ({self.now} - {self.gap}) / 2 ="
            f" {self.younger}, so {self.young} is {self.younger}."
        )


class Survey(Problem):
    """Inclusion–exclusion: neither = all - (first + second - both)."""

    family = "survey"
    space: ClassVar[Space] = {
        "only_a": range(3, 41),
        "only_b": range(3, 41),
        "both": range(2, 26),
        "neither": range(1, 31),
    }
    simpler = (
        {"only_a": 1, "only_b": 2, "both": 1, "neither": 1},
        {"only_a": 2, "only_b": 1, "both": 1, "neither": 2},
        {"only_a": 2, "only_b": 2, "both": 1, "neither": 3},
    )
    only_a: int
    only_b: int
    both: int
    neither: int

    def solve(self) -> None:
        self.a = self.only_a + self.both
        self.b = self.only_b + self.both
        self.either = self.only_a + self.both + self.only_b
        self.all = self.either + self.neither
        self.twice = self.a + self.b
        self.answer = str(self.neither)
        self.wrong = (str(self.all - self.twice), str(self.either))

    def accepts(self) -> bool:
        return self.both > 0 and self.neither > 0 and self.only_a > 0 and self.only_b > 0

    def changes(self) -> list[dict[str, int]]:
        options = []
        for step in (-2, -1, 1, 2):  # another overlap, with the same two likings and the same number of people
            if 0 < self.both + step < min(self.a, self.b):
                options.append(
                    {
                        "both": self.both + step,
                        "only_a": self.only_a - step,
                        "only_b": self.only_b - step,
                        "neither": self.neither + step,
                    }
                )
        return options

    def dress(self) -> None:
        self.who, self.a_thing, self.b_thing, self.does = self.rng.choice(
            (
                (Noun("student", "students"), "football", "chess", "play"),
                (Noun("guest", "guests"), "tea", "coffee", "drink"),
                (Noun("neighbour", "neighbours"), "a cat", "a dog", "have"),
                (Noun("musician", "musicians"), "the piano", "the violin", "play"),
                (Noun("traveller", "travellers"), "French", "Spanish", "speak"),
                (Noun("reader", "readers"), "novels", "comics", "like"),
                (Noun("cook", "cooks"), "curry", "pasta", "make"),
            )
        )
        self.A, self.B = f"{self.does} {self.a_thing}", f"{self.does} {self.b_thing}"

    def question(self) -> str:
        who = self.who.many
        return self.say(
            f"Of {self.all} {who}, {self.a} {self.A}, {self.b} {self.B} and {self.both} {self.does} both. How many"
            f" {self.does} neither?",
            f"In a group of {self.all} {who}, {self.a} {self.A} and {self.b} {self.B}. Exactly {self.both} of them"
            f" {self.does} both. How many of the {who} {self.does} neither?",
            f"A survey of {self.all} {who} finds that {self.a} {self.A}, {self.b} {self.B}, and {self.both} {self.does}"
            f" both. How many {who} {self.does} neither of the two?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let a = {self.a}, b = {self.b} and c = {self.both} be the sizes of the two sets and of their"
            f" intersection, and n = {self.all} the size of the universe. [By inclusion and exclusion,|Inclusion and"
            f" exclusion gives] the union u = a + b - c = {self.twice} - {self.both} = {self.either}. The complement is"
            f" x = n - u = {self.all} - {self.either} = {self.neither}. [Hence|Therefore|It follows that|Consequently,]"
            f" x = {self.neither}."
        )

    def intuitive(self) -> str:
        return self.say(
            f"[Picture everyone raising hands.|Ask for a show of hands.] {self.a} go up for {self.a_thing}, {self.b}"
            f" for {self.b_thing}, and {self.both} people raise two hands. Counting heads instead of hands,"
            f" {self.either} people have a hand in the air. In a room of {self.all}, [those who sit still|the ones with"
            f" folded arms] number {self.neither}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[Only the first|Those who {self.A} only]: {self.a} - {self.both} = {self.only_a}.",
            f"[Only the second|Those who {self.B} only]: {self.b} - {self.both} = {self.only_b}.",
            f"At least one of the two: {self.only_a} + {self.only_b} + {self.both} = {self.either}.",
            f"Neither: {self.all} - {self.either} = {self.neither}.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                "add the two groups",
                "take away the overlap that was counted twice",
                f"subtract the result from all {self.who.many}",
            ),
            f"{self.a} + {self.b} = {self.twice} counts the overlap twice. {self.twice} - {self.both} = {self.either}"
            f" {self.who.many} are in at least one. {self.all} - {self.either} = {self.neither}, the number in"
            " neither.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Take {s.all} toys|Think of {s.all} toys]: {s.a} {'is' if s.a == 1 else 'are'} red, {s.b}"
            f" {'is' if s.b == 1 else 'are'} round, {s.both} {'is' if s.both == 1 else 'are'} both. Red or round are"
            f" {s.a} + {s.b} - {s.both} = {s.either}, which leaves {s.all} - {s.either} = {s.neither}. The"
            f" {self.who.many} are such toys: {self.a} + {self.b} - {self.both} = {self.either} belong to a group, and"
            f" {self.all} - {self.either} = {self.neither} to neither."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                f"May I simply add {self.a} and {self.b}?",
                f"No, the {self.both} who {self.does} both would be counted twice.",
            ),
            ("How many are in at least one group, then?", f"{self.a} + {self.b} - {self.both} = {self.either}."),
            (
                "[Who is left?|How many remain?]",
                f"{self.all} - {self.either} = {self.neither}, the number who {self.does} neither.",
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Three counts compete.|Which count is right?]",
            (f"{self.all} - ({self.a} + {self.b} - {self.both}) = {self.neither}", "everyone is counted exactly once"),
            (
                (
                    f"{self.all} - {self.a} - {self.b} = {self.all - self.twice}",
                    f"it takes those who {self.does} both away twice",
                ),
                (f"{self.a} + {self.b} - {self.both} = {self.either}", "these are in at least one of the groups"),
            ),
            f"[The number who {self.does} neither is|So the number is] {self.neither}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the overlap were {c.both} instead of {self.both}. Then {c.a} + {c.b} -"
            f" {c.both} = {c.either} would be in a group, and {c.all} - {c.either} = {c.neither} in neither."
            f" {'More' if c.both > self.both else 'Less'} overlap means {'more' if c.both > self.both else 'fewer'}"
            f" left out, so the overlap is the [critical|decisive] number. With the real {self.both}: {self.a} +"
            f" {self.b} - {self.both} = {self.either} are in a group and {self.all} - {self.either} = {self.neither} in"
            " neither."
        )


class Averages(Problem):
    """New value = (count + 1)·new_mean - count·mean."""

    family = "averages"
    space: ClassVar[Space] = {"count": range(3, 13), "mean": range(8, 96), "new_mean": range(8, 96)}
    simpler = (
        {"count": 2, "mean": 3, "new_mean": 4},
        {"count": 2, "mean": 4, "new_mean": 5},
        {"count": 1, "mean": 2, "new_mean": 4},
    )
    count: int
    mean: int
    new_mean: int

    def solve(self) -> None:
        self.more = self.count + 1
        self.old_total = self.count * self.mean
        self.new_total = self.more * self.new_mean
        self.new = self.new_total - self.old_total
        self.answer = str(self.new)
        self.mirror = 2 * self.new_mean - self.mean
        self.miscounted = self.count * self.new_mean - self.old_total
        self.wrong = (str(self.mirror), str(self.miscounted))

    def accepts(self) -> bool:
        return self.new_mean > self.mean and self.new <= 100

    def changes(self) -> list[dict[str, int]]:
        return [{"new_mean": self.new_mean + step} for step in (-2, -1, 1)]

    def dress(self) -> None:
        (self.person,) = self.people(1)
        self.thing, self.unit, self.does, self.on = self.rng.choice(
            (
                (Noun("test", "tests"), "points", "scores", "in"),
                (Noun("game", "games"), "points", "scores", "in"),
                (Noun("day", "days"), "pages", "reads", "on"),
                (Noun("week", "weeks"), "kilometres", "runs", "in"),
                (Noun("day", "days"), "dollars", "earns", "on"),
                (Noun("month", "months"), "drawings", "finishes", "in"),
            )
        )

    def question(self) -> str:
        p, many, one = self.person, self.thing.many, self.thing.one
        prep = "in" if one in ("test", "game") else "over"
        return self.say(
            f"{p}'s average {prep} {self.count} {many} is {self.mean} {self.unit}. After one more {one} the average is"
            f" {self.new_mean} {self.unit}. How many {self.unit} did the last {one} bring?",
            f"{capital(prep)} {self.count} {many}, {p} {self.does} {self.mean} {self.unit} per {one} on average. How"
            f" many {self.unit} {self.on} the next {one} would lift the average to {self.new_mean}?",
            f"On average {p} {self.does} {self.mean} {self.unit} per {one} {prep} {self.count} {many}. {p.He} wants an"
            f" average of {self.new_mean} after {self.more} {many}. How many {self.unit} does {p.he} need {self.on} the"
            f" last {one}?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let s be the sum of the first {self.count} values, t the sum of all {self.more} and x the new value. By"
            f" definition of the mean, s = {self.count} × {self.mean} = {self.old_total} and t = {self.more} ×"
            f" {self.new_mean} = {self.new_total}. [Since|Because] t = s + x, x = t - s = {self.new_total} -"
            f" {self.old_total} = {self.new}. [Hence|Therefore|It follows that|Consequently,] x = {self.new}."
        )

    def intuitive(self) -> str:
        lift = self.new_mean - self.mean
        return self.say(
            f"[Think of levelling sand heaps.|Picture equal stacks of coins.] There are {self.count} of height"
            f" {self.mean}, and each must grow by {lift} to reach {self.new_mean}. The newcomer pays for that: it needs"
            f" its own {self.new_mean} and {lift * self.count} spare to hand out. [Altogether|So] it must bring"
            f" {self.new} {self.unit}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[Sum|Total] of the first {self.count} {self.thing.many}: {self.count} × {self.mean} = {self.old_total}.",
            f"[Sum|Total] needed for {self.more} {self.thing.many}: {self.more} × {self.new_mean} = {self.new_total}.",
            f"[Share|Value] of the last {self.thing.one}: {self.new_total} - {self.old_total} = {self.new}"
            f" {self.unit}.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                "turn the old average into a total",
                "turn the new average into a total",
                "[compare|subtract] the two totals",
            ),
            f"{self.count} {self.thing.many} give {self.count} × {self.mean} = {self.old_total}. {self.more}"
            f" {self.thing.many} must give {self.more} × {self.new_mean} = {self.new_total}. The last {self.thing.one}"
            f" brings {self.new_total} - {self.old_total} = {self.new} {self.unit}.",
        )

    def analogy(self) -> str:
        s = self.simple
        boxes = "1 box averages" if s.count == 1 else f"{s.count} boxes average"
        return self.say(
            f"[Take a tiny case|A smaller example]: {boxes} {s.mean} apples, and one more box raises the average to"
            f" {s.new_mean}. The totals are {s.count} × {s.mean} = {s.old_total} and {s.more} × {s.new_mean} ="
            f" {s.new_total}, so the new box holds {s.new_total} - {s.old_total} = {s.new}. [Treat the"
            f" {self.thing.many} as boxes|{capital(self.thing.many)} are like boxes]: {self.count} × {self.mean} ="
            f" {self.old_total}, {self.more} × {self.new_mean} = {self.new_total}, and {self.new_total} -"
            f" {self.old_total} = {self.new} {self.unit}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            ("What is the total so far?", f"{self.count} × {self.mean} = {self.old_total} {self.unit}."),
            (
                f"What total [gives|makes] an average of {self.new_mean}?",
                f"Over {self.more} {self.thing.many}, {self.more} × {self.new_mean} = {self.new_total}.",
            ),
            (
                "[Where does the difference come from?|Who supplies the difference?]",
                f"From the last {self.thing.one}: {self.new_total} - {self.old_total} = {self.new} {self.unit}.",
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Which value lifts the average?|Compare the candidates.]",
            (
                f"{self.more} × {self.new_mean} - {self.count} × {self.mean} = {self.new}",
                f"the total fits {self.more} {self.thing.many}",
            ),
            (
                (
                    f"mirror the old average, 2 × {self.new_mean} - {self.mean} = {self.mirror}",
                    f"this treats {self.count} {self.thing.many} as one",
                ),
                (
                    f"{self.count} × {self.new_mean} - {self.count} × {self.mean} = {self.miscounted}",
                    f"the new total must cover {self.more} {self.thing.many}",
                ),
            ),
            f"The last {self.thing.one} needs {self.new} {self.unit}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        gap = abs(c.new - self.new)
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the new average were {c.new_mean} instead of {self.new_mean}. The total"
            f" would be {c.more} × {c.new_mean} = {c.new_total} and the last {self.thing.one} {c.new_total} -"
            f" {c.old_total} = {c.new} {self.unit}. So each unit of average costs {self.more} {self.unit}, one per"
            f" {self.thing.one}: the [critical|decisive] constraint is the total. Returning to {self.new_mean}, {c.new}"
            f" {'-' if c.new > self.new else '+'} {gap} = {self.new} {self.unit}."
        )
