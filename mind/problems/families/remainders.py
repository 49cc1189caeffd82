"""Remainders: whether things can be shared out exactly, and on which weekday something falls."""

from __future__ import annotations

from typing import ClassVar

from mind.problems.language import Noun, capital
from mind.problems.problem import Problem, Space


class FairShare(Problem):
    """Can bags·per_bag + loose things be shared equally among `friends`? `even` = 1 where they can."""

    family = "fair_share"
    space: ClassVar[Space] = {"bags": range(2, 13), "per_bag": range(5, 31), "friends": range(3, 10), "even": (0, 1)}
    simpler = (
        {"bags": 2, "per_bag": 2, "friends": 3, "even": 1},
        {"bags": 2, "per_bag": 2, "friends": 3, "even": 0},
        {"bags": 1, "per_bag": 4, "friends": 3, "even": 1},
        {"bags": 1, "per_bag": 4, "friends": 3, "even": 0},
    )
    bags: int
    per_bag: int
    friends: int
    even: int

    def solve(self) -> None:
        self.packed = self.bags * self.per_bag
        self.packed_rest = self.packed % self.friends
        spoiler = 0 if self.even else 1 + (self.bags + self.per_bag) % (self.friends - 1)
        self.loose = self.friends - self.packed_rest + spoiler
        self.total = self.packed + self.loose
        self.each, self.rest = divmod(self.total, self.friends)
        self.dealt = self.each * self.friends
        self.answer = "yes" if self.rest == 0 else "no"
        self.wrong = ("no" if self.rest == 0 else "yes",)

    def accepts(self) -> bool:
        return self.packed_rest != 0

    def changes(self) -> list[dict[str, int]]:
        return [{"even": 1 - self.even}]

    def dress(self) -> None:
        (self.host,) = self.people(1)
        self.bag, self.thing, self.who = self.rng.choice(
            (
                (Noun("bag", "bags"), Noun("sweet", "sweets"), Noun("child", "children")),
                (Noun("tray", "trays"), Noun("egg", "eggs"), Noun("cook", "cooks")),
                (Noun("pack", "packs"), Noun("sticker", "stickers"), Noun("pupil", "pupils")),
                (Noun("crate", "crates"), Noun("apple", "apples"), Noun("family", "families")),
                (Noun("box", "boxes"), Noun("pencil", "pencils"), Noun("class", "classes")),
                (Noun("sack", "sacks"), Noun("walnut", "walnuts"), Noun("squirrel", "squirrels")),
            )
        )

    def question(self) -> str:
        h, t = self.host, self.thing.many
        bags = self.bag.count(self.bags)
        return self.say(
            f"{h} has {bags} of {self.per_bag} {t} each and {self.thing.count(self.loose)} besides. Can {h.he} share"
            f" all of them equally among {self.who.count(self.friends)} with none left over? Answer yes or no.",
            f"There are {bags} with {self.per_bag} {t} in each, plus {self.loose} loose"
            f" {t if self.loose != 1 else self.thing.one}. Can {self.who.count(self.friends)} get the same whole number"
            f" of {t} so that nothing remains? Answer yes or no.",
            f"{self.who.count(self.friends).capitalize()} want to divide {bags} of {self.per_bag} {t} and {self.loose}"
            f" single {t if self.loose != 1 else self.thing.one} fairly, without cutting any. Does it work out with no"
            f" {t} left? Answer yes or no.",
        )

    def _ending(self) -> str:
        """The verdict in a clause: "nothing is left, so yes"."""
        if self.rest == 0:
            return "nothing is left over, so yes"
        return f"{self.rest} {'is' if self.rest == 1 else 'are'} left over, so no"

    def formal_symbolic(self) -> str:
        relation = "= 0" if self.rest == 0 else f"= {self.rest} ≠ 0"
        verdict = "k divides n: yes" if self.rest == 0 else "k does not divide n: no"
        return self.say(
            f"Let n be the number of {self.thing.many} and k = {self.friends} the number of {self.who.many}. [Then|We"
            f" have|The data give|By the statement,] n = {self.bags} × {self.per_bag} + {self.loose} = {self.packed} +"
            f" {self.loose} = {self.total}. Equal sharing requires that k divide n. [Now|Here] n = {self.friends} ×"
            f" {self.each} + r with remainder r = {self.total} mod {self.friends} {relation}. [Hence|Therefore|It"
            f" follows that|Consequently,] {verdict}."
        )

    def intuitive(self) -> str:
        fair = self.rest == 0
        end = "the pile is empty, so nobody is cheated" if fair else f"{self.rest} remain, too few for another round"
        return self.say(
            f"[Deal them out like cards|Go round and hand them out], one to each of the {self.friends} {self.who.many}"
            f" per round. There are {self.total} {self.thing.many} in the pile. After {self.each} full rounds"
            f" {self.dealt} are gone and {end}. [Does it work out?|Is the sharing fair?] {'Yes' if fair else 'No'}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"In the {self.bag.many}: {self.bags} × {self.per_bag} = {self.packed}.",
            f"With the loose ones: {self.packed} + {self.loose} = {self.total}.",
            f"[Largest fair amount|What can be shared fairly]: {self.friends} × {self.each} = {self.dealt}.",
            f"[Remainder|What is left]: {self.total} - {self.dealt} = {self.rest}; {self._ending()}.",
        )

    def planning(self) -> str:
        return self.plan(
            (f"count all {self.thing.many}", f"divide by {self.friends}", "look at the remainder"),
            f"there are {self.bags} × {self.per_bag} + {self.loose} = {self.total} {self.thing.many}. {self.friends} ×"
            f" {self.each} = {self.dealt} can be dealt out. The remainder is {self.total} - {self.dealt} = {self.rest}:"
            f" {self._ending()}.",
        )

    def analogy(self) -> str:
        s = self.simple
        nests = Noun("nest", "nests").count(s.bags)
        return self.say(
            f"[Try it small|A small case]: {nests} of {s.per_bag} acorns and {s.loose} more, for {s.friends} mice. That"
            f" is {s.bags} × {s.per_bag} + {s.loose} = {s.total}, and {s.total} mod {s.friends} = {s.rest}, so"
            f" {s.answer}: only the remainder matters. [Now the {self.thing.many}|The {self.thing.many} likewise]:"
            f" {self.bags} × {self.per_bag} + {self.loose} = {self.total}, and {self.total} mod {self.friends} ="
            f" {self.rest}; {self._ending()}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (f"How many {self.thing.many} are there?", f"{self.bags} × {self.per_bag} + {self.loose} = {self.total}."),
            (
                f"How many could each of the {self.friends} {self.who.many} get?",
                f"{self.each}, using {self.friends} × {self.each} = {self.dealt}.",
            ),
            (
                "[Does that use them all?|Is anything left?]",
                f"{self.total} - {self.dealt} = {self.rest}; {self._ending()}.",
            ),
        )

    def contrastive(self) -> str:
        if self.rest == 0:
            wrong = (
                f"no, because {self.packed} mod {self.friends} = {self.packed_rest}",
                f"this looks at the {self.bag.many} only",
            )
            right = (
                f"yes, because {self.packed} + {self.loose} = {self.total} and {self.total} mod {self.friends} = 0",
                "this counts everything",
            )
        else:
            wrong = (
                f"yes, with {self.each} each, {self.friends} × {self.each} = {self.dealt}",
                f"that leaves {self.total} - {self.dealt} = {self.rest} over",
            )
            right = (
                (
                    f"no, because {self.packed} + {self.loose} = {self.total} and {self.total} mod {self.friends} ="
                    f" {self.rest}"
                ),
                "this counts everything",
            )
        return self.contrast(
            "[Yes and no both have an argument.|Weigh yes against no.]",
            right,
            (wrong,),
            f"[The verdict is|So the result is] {self.answer}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        loose = f"{c.loose} loose {self.thing.one if c.loose == 1 else self.thing.many}"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] there were {loose} instead of {self.loose}. Then {c.packed} + {c.loose} ="
            f" {c.total} and {c.total} mod {c.friends} = {c.rest}, so the answer would be {c.answer}. The"
            f" {self.bag.many} alone leave {self.packed} mod {self.friends} = {self.packed_rest}, so the loose ones are"
            f" the [critical|decisive] constraint: they must fill that up to {self.friends} or a multiple. With"
            f" {self.loose}, {self.total} mod {self.friends} = {self.rest}; {self._ending()}."
        )


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Calendar(Problem):
    """The weekday `wait` + `more` days after `start` (0 is Monday): (start + wait + more) mod 7."""

    family = "calendar"
    space: ClassVar[Space] = {"start": range(7), "wait": range(9, 80), "more": range(8, 80)}
    simpler = (
        {"start": 0, "wait": 4, "more": 5},
        {"start": 0, "wait": 3, "more": 7},
        {"start": 1, "wait": 5, "more": 4},
        {"start": 1, "wait": 6, "more": 5},
    )
    start: int
    wait: int
    more: int

    def solve(self) -> None:
        self.days = self.wait + self.more
        self.weeks, self.rest = divmod(self.days, 7)
        self.end = (self.start + self.rest) % 7
        self.answer = DAYS[self.end]
        self.wrong = (DAYS[(self.end - 1) % 7], DAYS[(self.start + self.wait) % 7])

    def accepts(self) -> bool:
        return self.rest > 0

    def changes(self) -> list[dict[str, int]]:
        return [{"more": self.more + step} for step in (1, 2, 3)]

    def dress(self) -> None:
        (self.person,) = self.people(1)
        self.first, self.second, self.third = self.rng.choice(
            (
                ("plants a seed", "it sprouts", "it flowers"),
                ("posts a parcel", "it crosses the border", "it arrives"),
                ("starts a course", "the first exam takes place", "the final exam follows"),
                ("lays a cheese to ripen", "it is turned", "it is ready"),
                ("orders a desk", "it is built", "it is delivered"),
                ("begins a training plan", "the first race takes place", "the main race follows"),
            )
        )
        self.from_day = DAYS[self.start]

    def question(self) -> str:
        p, w, m = self.person, self.wait, self.more
        return self.say(
            f"{p} {self.first} on a {self.from_day}. After {w} days {self.second}, and {m} days after that"
            f" {self.third}. On which day of the week is that?",
            f"On a {self.from_day}, {p} {self.first}. {w} days later {self.second}; another {m} days later"
            f" {self.third}. Which weekday is it then?",
            f"{p} {self.first} on a {self.from_day}; {self.second} {w} days later and {self.third} {m} days after that."
            " What weekday does the last event fall on?",
        )

    def _days(self) -> str:
        return f"{self.rest} {'day' if self.rest == 1 else 'days'}"

    def formal_symbolic(self) -> str:
        return self.say(
            f"Number the days from 0 for Monday to 6 for Sunday. Let s = {self.start} be the first day, n the days that"
            f" pass and e the last day. [Then|We have|The data give|By the statement,] n = {self.wait} + {self.more} ="
            f" {self.days} and e = (s + n) mod 7 = {self.start + self.days} mod 7 = {self.end}. [Hence|Therefore|It"
            f" follows that|Consequently,] e = {self.end}, that is, {self.answer}."
        )

    def intuitive(self) -> str:
        return self.say(
            "[Whole weeks change nothing on the calendar wall.|A full week always brings the same day back.]"
            f" {self.days} days pass, which is {self.weeks} full weeks and {self._days()}. [Let the weeks roll by|Skip"
            f" the weeks], still on a {self.from_day}, and count on {self._days()}: {self._walk()}. So it is a"
            f" {self.answer}."
        )

    def _walk(self) -> str:
        return ", ".join(DAYS[(self.start + i) % 7] for i in range(1, self.rest + 1))

    def decomposition(self) -> str:
        return self.numbered(
            f"[All days together|Days in total]: {self.wait} + {self.more} = {self.days}.",
            f"[Days in full weeks|Full weeks]: {self.weeks} × 7 = {self.weeks * 7}.",
            f"[Days beyond them|Left over]: {self.days} - {self.weeks * 7} = {self.rest}.",
            f"{capital(self._days())} after {self.from_day}: {self.answer}.",
        )

    def planning(self) -> str:
        return self.plan(
            ("add up the days", "throw out full weeks", f"count the rest on from {self.from_day}"),
            f"{self.wait} + {self.more} = {self.days} days pass. {self.days} mod 7 = {self.rest}, so only"
            f" {self._days()} {'counts' if self.rest == 1 else 'count'}. From {self.from_day}: {self._walk()}. It is a"
            f" {self.answer}.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Take a short wait|Try it with less]: from a {DAYS[s.start]}, {s.wait} days and then {s.more}. {s.wait} +"
            f" {s.more} = {s.days} is {s.weeks} week and {s.rest} more, so it ends on a {s.answer}; the week drops out."
            f" [Here more weeks drop out|The long wait is alike]: {self.wait} + {self.more} = {self.days}, and"
            f" {self.days} mod 7 = {self.rest}. {capital(self._days())} after {self.from_day} comes {self.answer}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            ("How many days pass[ in all|]?", f"{self.wait} + {self.more} = {self.days}."),
            (
                "[Do full weeks matter?|Must I count them one by one?]",
                f"No, a week changes nothing: {self.days} mod 7 = {self.rest}.",
            ),
            (f"What comes {self._days()} after {self.from_day}?", f"{self._walk()}. So it is a {self.answer}."),
        )

    def contrastive(self) -> str:
        early = (self.days - 1) % 7
        return self.contrast(
            "[Three weekdays suggest themselves.|Which weekday is it?]",
            (f"{self.days} mod 7 = {self.rest} gives {self.answer}", "all days after the start are counted"),
            (
                (
                    f"{self.days - 1} mod 7 = {early} gives {self.wrong[0]}",
                    f"it counts {self.from_day} itself as the first day",
                ),
                (
                    f"{self.wait} mod 7 = {self.wait % 7} gives {self.wrong[1]}",
                    f"it leaves out the {self.more} days at the end",
                ),
            ),
            f"[It is|So it is] a {self.answer}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        step = c.more - self.more
        days = "one day" if step == 1 else f"{step} days"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the second wait were {c.more} days instead of {self.more}. Then {c.wait} +"
            f" {c.more} = {c.days} and {c.days} mod 7 = {c.rest}, which leads to a {c.answer}. Only the remainder"
            f" modulo 7 moves the weekday: that is the [critical|decisive] constraint. Really it is {days} less,"
            f" {self.days} mod 7 = {self.rest}, and {self._days()} after {self.from_day} comes {self.answer}."
        )
