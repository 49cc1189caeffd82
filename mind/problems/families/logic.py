"""Logic: a ranking from comparisons, and labels of which some lie."""

from __future__ import annotations

from typing import ClassVar

from mind.problems.language import Noun, capital, listing
from mind.problems.problem import Problem, Space

PLACES = ("most", "second most", "third most", "fewest")


class Ranking(Problem):
    """Four people; each of the last three has a stated surplus or deficit to the one before. Who is at place `rank`?"""

    family = "ranking"
    space: ClassVar[Space] = {
        "base": range(30, 81),
        "step_1": range(2, 16),
        "step_2": range(2, 16),
        "step_3": range(2, 16),
        "signs": range(8),
        "rank": range(4),
    }
    simpler = (
        {"base": 5, "step_1": 1, "step_2": 2, "step_3": 4, "signs": 5, "rank": 1},
        {"base": 6, "step_1": 2, "step_2": 3, "step_3": 2, "signs": 1, "rank": 0},
        {"base": 4, "step_1": 1, "step_2": 3, "step_3": 1, "signs": 3, "rank": 3},
        {"base": 5, "step_1": 2, "step_2": 1, "step_3": 3, "signs": 4, "rank": 2},
    )
    base: int
    step_1: int
    step_2: int
    step_3: int
    signs: int  # bit i set: the i-th comparison says "more"
    rank: int

    def solve(self) -> None:
        self.values = [self.base]
        self.steps = (self.step_1, self.step_2, self.step_3)
        self.more = [bool(self.signs >> i & 1) for i in range(3)]
        for step, more in zip(self.steps, self.more, strict=True):
            self.values.append(self.values[-1] + (step if more else -step))
        self.order = sorted(range(4), key=lambda who: -self.values[who])
        neighbour = self.rank - 1 if self.rank in (1, 3) else self.rank + 1
        self.answer = str(self.order[self.rank])
        self.wrong = (str(self.order[3 - self.rank]), str(self.order[neighbour]))

    def accepts(self) -> bool:
        return len(set(self.values)) == 4 and min(self.values) > 0

    def changes(self) -> list[dict[str, int]]:
        return [{"signs": self.signs ^ 4}]  # the last comparison turned round

    def dress(self) -> None:
        self.names = [person.name for person in self.people(4)]
        self.verb, self.unit = self.rng.choice(
            (
                ("scored", Noun("point", "points")),
                ("collected", Noun("shell", "shells")),
                ("read", Noun("page", "pages")),
                ("picked", Noun("pear", "pears")),
                ("sold", Noun("badge", "badges")),
                ("counted", Noun("bird", "birds")),
            )
        )
        self.place = PLACES[self.rank]

    def worded(self, answer: str) -> str:
        return self.names[int(answer)]

    @property
    def winner(self) -> str:
        return self.worded(self.answer)

    def _than(self, i: int) -> str:
        """The i-th comparison as a difference: "7 points more" or "7 points fewer"."""
        return f"{self.unit.count(self.steps[i])} {'more' if self.more[i] else 'fewer'}"

    def _sum(self, i: int) -> str:
        """The i-th comparison as an executed sum: "40 + 7 = 47"."""
        return f"{self.values[i]} {'+' if self.more[i] else '-'} {self.steps[i]} = {self.values[i + 1]}"

    def _ordered(self) -> str:
        return listing([f"{self.names[who]} {self.values[who]}" for who in self.order])

    def question(self) -> str:
        n, verb = self.names, self.verb
        start = f"{n[0]} {verb} {self.values[0]} {self.unit.many}."
        ask = f"Who {verb} the {self.place}{' ' + self.unit.many if self.rng.random() < 0.5 else ''}?"
        return self.say(
            f"{start} {n[1]} {verb} {self._than(0)} than {n[0]}, {n[2]} {verb} {self._than(1)} than {n[1]}, and {n[3]}"
            f" {verb} {self._than(2)} than {n[2]}. {ask}",
            f"{n[1]} {verb} {self._than(0)} than {n[0]}. {n[2]} {verb} {self._than(1)} than {n[1]}. {n[3]} {verb}"
            f" {self._than(2)} than {n[2]}. {start} {ask}",
            f"Four friends compare notes. {start} Compared with {n[0]}, {n[1]} {verb} {self._than(0)}; compared with"
            f" {n[1]}, {n[2]} {verb} {self._than(1)}; compared with {n[2]}, {n[3]} {verb} {self._than(2)}. {ask}",
        )

    def formal_symbolic(self) -> str:
        a, b, c, d = self.values
        signs = ["+" if more else "-" for more in self.more]
        chain = " > ".join("abcd"[who] for who in self.order)
        return self.say(
            f"Let a, b, c, d be the numbers of {self.unit.many} of {listing(self.names)}. [Then|We have|The data"
            f" give|By the statement,] a = {a}, b = a {signs[0]} {self.step_1} = {b}, c = b {signs[1]} {self.step_2} ="
            f" {c} and d = c {signs[2]} {self.step_3} = {d}. [Sorting gives|Hence] {chain}. The {self.place} belongs to"
            f" {'abcd'[int(self.answer)]}, that is, {self.winner}."
        )

    def intuitive(self) -> str:
        n = self.names

        def spot(who: int) -> str:
            gap = self.values[who] - self.values[0]
            return f"{abs(gap)} {'above' if gap > 0 else 'below'} {n[0]}"

        def move(i: int) -> str:
            return f"{self.steps[i]} rungs {'up' if self.more[i] else 'down'}"

        return self.say(
            f"[Picture a ladder|Imagine a ladder] with {n[0]} in the middle. {n[1]} stands {move(0)}. {n[2]} is"
            f" {move(1)} from {n[1]}, so {spot(2)}. {n[3]} is {move(2)} from {n[2]}, so {spot(3)}. [Looking from top to"
            f" bottom|Read from the top]: {listing([n[who] for who in self.order])}. The {self.place} goes to"
            f" {self.winner}."
        )

    def decomposition(self) -> str:
        n = self.names
        return self.numbered(
            f"{n[1]} has {self._sum(0)}.",
            f"{n[2]} has {self._sum(1)}.",
            f"{n[3]} has {self._sum(2)}.",
            f"[From most to fewest|Order]: {self._ordered()}. The {self.place}: {self.winner}.",
        )

    def planning(self) -> str:
        n = self.names
        return self.plan(
            (
                f"start from {n[0]} and work out each number in turn",
                "sort the four numbers",
                f"read off who has the {self.place}",
            ),
            f"{n[1]} has {self._sum(0)}, {n[2]} has {self._sum(1)}, {n[3]} has {self._sum(2)}. Sorted:"
            f" {self._ordered()}. The {self.place} belongs to {self.winner}.",
        )

    def analogy(self) -> str:
        s, n = self.simple, self.names
        towers = ["the red tower", "the blue tower", "the green tower", "the grey tower"]
        steps = ", ".join(f"{towers[i + 1]} {s._sum(i)}" for i in range(3))
        return self.say(
            f"[Picture|Take] four towers of blocks: {towers[0]} has {s.values[0]}, {steps}. Sorted, the"
            f" {PLACES[s.rank]} blocks are in {towers[int(s.answer)]}. The towers become people: {n[1]} {self._sum(0)},"
            f" {n[2]} {self._sum(1)}, {n[3]} {self._sum(2)}. Against {n[0]}'s {self.base}, the {self.place} belongs to"
            f" {self.winner}."
        )

    def socratic(self) -> str:
        n = self.names
        return self.dialogue(
            (f"[What does {n[1]} have?|How many has {n[1]}?]", f"{self._sum(0)}."),
            (f"And {n[2]}?", f"Seen from {n[1]}, {self._sum(1)}."),
            (f"And {n[3]}?", f"Seen from {n[2]}, {self._sum(2)}."),
            (
                "[What is the order?|How do they line up?]",
                f"{capital(self._ordered())}. The {self.place}: {self.winner}.",
            ),
        )

    def _check(self, answer: str) -> str:
        """What speaks for or against a person: how many others have more."""
        who = int(answer)
        above = self.order.index(who)
        others = {0: "nobody has more", 1: "one other has more", 2: "two others have more", 3: "all others have more"}[
            above
        ]
        return f"{self.names[who]} with {self.values[who]}: {others}"

    def contrastive(self) -> str:
        sums = ", ".join(f"{self.names[i + 1]} {self._sum(i)}" for i in range(3))
        return self.contrast(
            f"[Numbers first|First the numbers]: {sums}.",
            (self._check(self.answer), f"that is the {self.place}"),
            (
                (
                    f"[reading the list backwards|sorting the wrong way], {self._check(self.wrong[0])}",
                    f"that is not the {self.place}",
                ),
                (f"[one place off|slipping one place], {self._check(self.wrong[1])}", f"that is not the {self.place}"),
            ),
            f"[It is|So it is] {self.winner}.",
        )

    def counterfactual(self) -> str:
        c, n = self.changed, self.names
        now, then = ("more", "fewer") if self.more[2] else ("fewer", "more")
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] {n[3]} had {self.step_3} {then} than {n[2]} instead of {now}. After"
            f" {self._sum(0)} and {self._sum(1)}, {n[3]} would have {c._sum(2)}, and the {self.place} would belong to"
            f" {self.worded(c.answer)}. So {n[3]}'s clue is the [critical|decisive] constraint. As it stands, {n[3]}"
            f" has {self._sum(2)}, the order is {listing([n[who] for who in self.order])}, and the {self.place} belongs"
            f" to {self.winner}."
        )


def count_true(labels: tuple[int, ...], box: int) -> list[int]:
    """1 or 0 per label: is it true if the coin is in `box`? Label j < n says "in box j", label n + j "not in box j"."""
    n = len(labels)
    return [int((label % n == box) == (label < n)) for label in labels]


class PrizeBox(Problem):
    """Four labelled boxes, exactly `true` true labels, one coin: where is it?"""

    family = "prize_box"
    space: ClassVar[Space] = {
        "label_1": range(8),
        "label_2": range(8),
        "label_3": range(8),
        "label_4": range(8),
        "true": (1, 2, 3),
    }
    simpler = ()  # the analogy has two cups instead, see `analogy`
    label_1: int
    label_2: int
    label_3: int
    label_4: int
    true: int

    def solve(self) -> None:
        self.labels = (self.label_1, self.label_2, self.label_3, self.label_4)
        self.truths = [count_true(self.labels, box) for box in range(4)]
        self.counts = [sum(truths) for truths in self.truths]
        found = [box for box in range(4) if self.counts[box] == self.true]
        self.unique = len(found) == 1
        self.answer = str(found[0]) if self.unique else "?"
        believed = [label % 4 for label in self.labels if label < 4 and label % 4 not in found]
        others = [box for box in range(4) if box not in found and box not in believed[:1]]
        self.wrong = tuple(str(box) for box in [*believed[:1], *others][:2])  # first the box that a lying label names

    def accepts(self) -> bool:
        return self.unique

    def changes(self) -> list[dict[str, int]]:
        return [{"true": true} for true in range(5) if true != self.true]

    def dress(self) -> None:
        self.boxes = self.pick(("red", "blue", "green", "white", "black", "yellow", "silver", "brown"), 4)
        (self.prize,) = self.pick(("coin", "ring", "key", "pearl", "medal", "marble"), 1)

    def worded(self, answer: str) -> str:
        return self.boxes[int(answer)]

    @property
    def place(self) -> str:
        return f"the {self.worded(self.answer)} box"

    def _claim(self, box: int) -> str:
        target, positive = self.labels[box] % 4, self.labels[box] < 4
        where = "here" if target == box else f"in the {self.boxes[target]} box"
        return f'{self.boxes[box]} "{capital("it is" if positive else "it is not")} {where}"'

    def _sum(self, box: int) -> str:
        return f"{' + '.join(map(str, self.truths[box]))} = {self.counts[box]}"

    def _honest(self, box: int) -> str:
        """Whose labels are true if the prize is in this box."""
        colours = [self.boxes[i] for i, truth in enumerate(self.truths[box]) if truth]
        return listing(colours) if colours else "none"

    def _labels(self, count: int) -> str:
        return "1 label is" if count == 1 else f"{count} labels are"

    def question(self) -> str:
        claims = ", ".join(self._claim(box) for box in range(4))
        exactly = f"Exactly {self._labels(self.true)} true."
        return self.say(
            f"A {self.prize} is in one of four boxes. Their labels say: {claims}. {exactly} Which box holds the"
            f" {self.prize}?",
            f"Four boxes, {listing(self.boxes)}, hide one {self.prize}. The labels read: {claims}. {exactly} What"
            f" colour is the box with the {self.prize}?",
            f"One of four boxes contains a {self.prize}. {exactly} The labels are: {claims}. In which box is the"
            f" {self.prize}?",
        )

    def formal_symbolic(self) -> str:
        sums = ", ".join(f"{name} = {self._sum(box)}" for name, box in zip("wxyz", range(4), strict=True))
        symbol = "wxyz"[int(self.answer)]
        return self.say(
            f"Let w, x, y, z be the number of true labels when the {self.prize} is in the {', '.join(self.boxes[:3])}"
            f" or {self.boxes[3]} box, adding 1 for each true label and 0 for each false one. [Then|We obtain] {sums}."
            f" The condition demands the value {self.true}, which only {symbol} takes: {symbol} = {self.true}."
            f" [Hence|Therefore|It follows that|Consequently,] the {self.prize} is in {self.place}."
        )

    def intuitive(self) -> str:
        words = ("no", "one", "two", "three", "four")
        tries = "; ".join(
            f"in {self.boxes[b]}, {words[self.counts[b]]} {'label tells' if self.counts[b] == 1 else 'labels tell'} the"
            " truth"
            for b in range(4)
        )
        return self.say(
            f"[Hide the {self.prize} yourself and listen to the labels.|Play it through as a little scene.] Put it"
            f" {tries}. [The story wants|We were promised] {words[self.true]} honest"
            f" {'label' if self.true == 1 else 'labels'}, no more and no less, and only {self.place} fits that."
        )

    def decomposition(self) -> str:
        checks = [
            f"If it is in {self.boxes[box]}, true labels: {self._honest(box)}, so {self.counts[box]}."
            for box in range(4)
        ]
        return self.numbered(*checks, f"Needed: {self.true}. Only {self.place} gives that.")

    def planning(self) -> str:
        counts = "; ".join(f"{self.boxes[box]} {self._sum(box)}" for box in range(4))
        return self.plan(
            (
                f"assume the {self.prize} is in each box in turn",
                "count the true labels",
                f"keep the box with exactly {self.true}",
            ),
            f"marking true labels 1 and false ones 0 gives {counts}. Only {self.place} has {self.true}, so the"
            f" {self.prize} is there.",
        )

    def analogy(self) -> str:
        cups = self.rng.choice(((0, 3), (1, 2), (0, 0), (1, 1)))  # both labels say the same, so both or neither is true
        lies = self.rng.random() < 0.5
        totals = [sum(count_true(cups, cup)) for cup in range(2)]
        hidden = totals.index(0 if lies else 2)
        claims = [f'"{"it is" if label < 2 else "it is not"} under {"AB"[label % 2]}"' for label in cups]
        counts = "; ".join(f"{self.boxes[box]} {self._sum(box)}" for box in range(4))
        return self.say(
            f"[Take two cups|Start with two cups], A saying {claims[0]} and B saying {claims[1]},"
            f" {'both false' if lies else 'both true'}. Under A, {totals[0]} would be true, under B {totals[1]}, so it"
            f" is under {'AB'[hidden]}: assume a place and count. [The same with four boxes|Now four boxes]: {counts}."
            f" Needed are {self.true}, so it is in {self.place}."
        )

    def socratic(self) -> str:
        turns = []
        for box in range(4):
            verdict = (
                "just right"
                if self.counts[box] == self.true
                else "too many"
                if self.counts[box] > self.true
                else "too few"
            )
            turns.append(
                (
                    f"[What if it is|Could it be] in {self.boxes[box]}?",
                    f"Then {self._labels(self.counts[box])} true, {verdict}.",
                )
            )
        return self.dialogue(
            *turns, ("[So where is it?|Which box is left?]", f"In {self.place}, the only one with {self.true} true.")
        )

    def contrastive(self) -> str:
        (rest,) = {"0", "1", "2", "3"} - {self.answer, *self.wrong}

        def test(answer: str) -> str:
            return f"{self.worded(answer)}: {self._sum(int(answer))}"

        wanted = f"exactly {self.true} must be true"
        return self.contrast(
            "[Test boxes by counting true labels.|Count the true labels for some boxes.]",
            (test(self.answer), "that is just what is needed"),
            [(test(answer), f"but {wanted}") for answer in self.wrong],
            f"{self.worded(rest).capitalize()} also fails with {self._sum(int(rest))}. The {self.prize} is in"
            f" {self.place}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        counts = listing([f"{self.boxes[box]} {self._sum(box)}" for box in range(4)])
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] exactly {self._labels(c.true).replace('is', 'was').replace('are', 'were')}"
            f" true instead of {self.true}. Counting per box: {counts}. Then it would be in the {self.worded(c.answer)}"
            " box. The counts do not depend on that number, so the number itself is the [critical|decisive]"
            f" constraint. With {self.true}, only {self.place} fits, so the {self.prize} is in {self.place}."
        )
