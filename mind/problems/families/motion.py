"""Journeys: the average speed over two stretches, and one traveller catching up with another."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from mind.problems.language import Noun, number
from mind.problems.problem import Problem, Space

HOURS = Noun("hour", "hours")


class Travel(Problem):
    """Average speed = (speed_a·hours_a + speed_b·hours_b) / (hours_a + hours_b), in km/h."""

    family = "travel"
    space: ClassVar[Space] = {
        "speed_a": range(30, 111, 2),
        "hours_a": range(1, 7),
        "speed_b": range(30, 111, 2),
        "hours_b": range(1, 7),
    }
    simpler = (
        {"speed_a": 4, "hours_a": 2, "speed_b": 1, "hours_b": 1},
        {"speed_a": 5, "hours_a": 1, "speed_b": 2, "hours_b": 2},
        {"speed_a": 6, "hours_a": 1, "speed_b": 2, "hours_b": 3},
    )
    speed_a: int
    hours_a: int
    speed_b: int
    hours_b: int

    def solve(self) -> None:
        self.way_a = self.speed_a * self.hours_a
        self.way_b = self.speed_b * self.hours_b
        self.way = self.way_a + self.way_b
        self.hours = self.hours_a + self.hours_b
        self.average = Fraction(self.way, self.hours)
        self.plain_mean = Fraction(self.speed_a + self.speed_b, 2)
        self.answer = number(self.average)
        self.wrong = (number(self.plain_mean), str(self.speed_a + self.speed_b))

    def accepts(self) -> bool:
        return self.average.denominator == 1 and abs(self.speed_a - self.speed_b) >= 6

    def changes(self) -> list[dict[str, int]]:
        return [{"hours_b": self.hours_a}]  # equal times

    def dress(self) -> None:
        (self.driver,) = self.people(1)
        (self.vehicle,) = self.pick(("car", "van", "motorbike", "minibus", "truck"), 1)
        self.roads = self.pick(
            ("on country roads", "on the motorway", "through hills", "along the coast", "in light traffic"), 2
        )

    def question(self) -> str:
        d, (road_a, road_b) = self.driver, self.roads
        time_a, time_b = HOURS.count(self.hours_a), HOURS.count(self.hours_b)
        return self.say(
            f"{d} drives {road_a} for {time_a} at {self.speed_a} km/h and then {road_b} for {time_b} at {self.speed_b}"
            f" km/h. What is {d.his} average speed[ for the whole trip| overall], in km/h?",
            f"A {self.vehicle} travels at {self.speed_a} km/h for {time_a}, then at {self.speed_b} km/h for {time_b}."
            " What average speed does it reach over the whole journey, in km/h?",
            f"On a trip, {d}'s {self.vehicle} goes {road_a} for {time_a} at {self.speed_a} km/h. The remaining"
            f" {time_b}, {road_b}, {'is' if self.hours_b == 1 else 'are'} driven at {self.speed_b} km/h. What is the"
            " average speed of the trip in km/h?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            "Let d and e be the distances in km, t the total time in hours and v the average speed, v = (d + e) / t."
            f" [Then|We have|The data give|By the statement,] d = {self.speed_a} × {self.hours_a} = {self.way_a}, e ="
            f" {self.speed_b} × {self.hours_b} = {self.way_b} and t = {self.hours_a} + {self.hours_b} = {self.hours}."
            f" [Hence|Therefore|It follows that|Consequently,] v = {self.way} / {self.hours} = {self.answer} km/h."
        )

    def intuitive(self) -> str:
        longer = self.speed_a if self.hours_a > self.hours_b else self.speed_b
        return self.say(
            "[The clock decides, not the number of stretches.|What you do for longer counts for more.|Think of every"
            f" hour having one vote.|Feel which speed lasts longer.] Most of the time the speed is {longer} km/h, so"
            f" the average must lean towards that. On the road, {self.way_a} km and then {self.way_b} km go by,"
            f" {self.way} km in all, spread over {self.hours} hours. [Sharing them out evenly|Handing each hour the"
            f" same share] gives {self.answer} km per hour."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[First distance|Distance of the first part]: {self.speed_a} × {self.hours_a} = {self.way_a} km.",
            f"[Second distance|Distance of the second part]: {self.speed_b} × {self.hours_b} = {self.way_b} km.",
            f"Total distance: {self.way_a} + {self.way_b} = {self.way} km.",
            f"Total time: {self.hours_a} + {self.hours_b} = {self.hours} hours.",
            f"Average speed: {self.way} / {self.hours} = {self.answer} km/h.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                "find the distance of each part",
                "add the distances and add the times",
                "divide total distance by total time",
            ),
            f"the parts are {self.speed_a} × {self.hours_a} = {self.way_a} km and {self.speed_b} × {self.hours_b} ="
            f" {self.way_b} km. Together that is {self.way_a} + {self.way_b} = {self.way} km in {self.hours_a} +"
            f" {self.hours_b} = {self.hours} hours. The average speed is {self.way} / {self.hours} = {self.answer}"
            " km/h.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Think of a walk|Compare it with a walk]: {HOURS.count(s.hours_a)} at {s.speed_a} km/h and"
            f" {HOURS.count(s.hours_b)} at {s.speed_b} km/h. That is {s.way_a} + {s.way_b} = {s.way} km in {s.hours}"
            f" hours, on average {s.way} / {s.hours} = {s.answer} km/h. [The drive has the same shape|Do the same with"
            f" the drive]: {self.speed_a} × {self.hours_a} + {self.speed_b} × {self.hours_b} = {self.way} km in"
            f" {self.hours} hours, so {self.way} / {self.hours} = {self.answer} km/h."
        )

    def socratic(self) -> str:
        return self.dialogue(
            ("What does average speed mean?", "Total distance divided by total time."),
            (
                "How far [is the trip|does it go]?",
                (
                    f"{self.speed_a} × {self.hours_a} + {self.speed_b} × {self.hours_b} = {self.way_a} + {self.way_b} ="
                    f" {self.way} km."
                ),
            ),
            ("[How long does it take?|In what time?]", f"{self.hours_a} + {self.hours_b} = {self.hours} hours."),
            ("[So what is the average?|And the average speed?]", f"{self.way} / {self.hours} = {self.answer} km/h."),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Which average is meant?|Compare the candidates for the average speed.]",
            (
                f"total distance over total time, ({self.way_a} + {self.way_b}) / {self.hours} = {self.answer}",
                "it counts every hour once",
            ),
            (
                (
                    f"the mean of the speeds, ({self.speed_a} + {self.speed_b}) / 2 = {number(self.plain_mean)}",
                    "it ignores that the parts take unequal times",
                ),
                (f"{self.speed_a} + {self.speed_b} = {self.speed_a + self.speed_b}", "it is faster than both parts"),
            ),
            f"The average speed is {self.answer} km/h.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] both parts lasted equally long, {HOURS.count(c.hours_a)} each. Then the"
            f" distance would be {c.way_a} + {c.way_b} = {c.way} km and the average {c.way} / {c.hours} = {c.answer}"
            f" km/h, halfway between the two speeds. The real second part lasts {HOURS.count(self.hours_b)}, so the"
            " [critical|deciding] point is how long each speed is held. [With the true times|Back to the real trip]:"
            f" ({self.way_a} + {self.way_b}) / {self.hours} = {self.answer} km/h."
        )


class CatchUp(Problem):
    """Time to catch up = slow·lead / (fast - slow), in hours after the second start."""

    family = "catch_up"
    space: ClassVar[Space] = {"slow": range(8, 81), "fast": range(10, 111), "lead": range(1, 7)}
    simpler = (
        {"slow": 2, "fast": 3, "lead": 1},
        {"slow": 2, "fast": 4, "lead": 1},
        {"slow": 3, "fast": 4, "lead": 1},
    )
    slow: int
    fast: int
    lead: int

    def solve(self) -> None:
        self.head_start = self.slow * self.lead
        self.closing = self.fast - self.slow
        self.hours = Fraction(self.head_start, self.closing) if self.closing else Fraction(-1)
        self.answer = number(self.hours)
        self.duration = HOURS.count(self.hours)
        self.from_first = self.hours + self.lead
        self.no_motion = Fraction(self.head_start, self.fast)
        self.wrong = (number(self.no_motion), number(self.from_first))

    def accepts(self) -> bool:
        realistic = self.slow * 5 >= self.fast * 2 and (self.fast <= 35 or self.slow >= 36)
        return realistic and 0 < self.hours <= 12 and (self.hours * 2).denominator == 1

    def changes(self) -> list[dict[str, int]]:
        return [
            {"fast": self.slow + closing}
            for closing in range(1, self.head_start + 1)
            if self.head_start * 2 % closing == 0
        ]

    def dress(self) -> None:
        self.first, self.second = self.people(2)
        self.way = self.rng.choice(("cycles", "skates") if self.fast <= 35 else ("drives", "rides a motorbike"))
        self.road = self.rng.choice(
            ("to the lake", "to the next city", "along the river road", "to the seaside", "north")
        )

    def question(self) -> str:
        a, b = self.first, self.second
        lead = HOURS.count(self.lead)
        return self.say(
            f"{a} {self.way} {self.road} at {self.slow} km/h. {b} sets off {lead} later on the same road at {self.fast}"
            f" km/h. How many hours after {b}'s start does {b.he} [catch up with|reach] {a}?",
            f"{b} follows {a} along the same road. {a} {self.way} at {self.slow} km/h and started {lead} earlier; {b}"
            f" does {self.fast} km/h. After how many hours on the road has {b} caught up?",
            f"{a} {self.way} {self.road} at a steady {self.slow} km/h. With a delay of {lead}, {b} leaves from the same"
            f" place at {self.fast} km/h. How many hours does {b} need to catch {a}?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let t be the hours since the second start. [The positions in km are|Positions:] x = {self.slow}(t +"
            f" {self.lead}) and y = {self.fast}t. [Meeting requires|They meet when] {self.fast}t = {self.slow}(t +"
            f" {self.lead}), that is {self.closing}t = {self.head_start}. [Hence|Therefore|It follows"
            f" that|Consequently,] t = {self.head_start} / {self.closing} = {self.answer}, and indeed y = {self.fast} ×"
            f" {self.answer} = {number(self.fast * self.hours)} with x = y. So t = {self.answer}."
        )

    def intuitive(self) -> str:
        return self.say(
            f"[Watch it from {self.first}'s seat|Sit beside {self.first} and look back|Look over {self.first}'s"
            f" shoulder|See it through {self.first}'s mirror]: {self.second} starts {self.head_start} km behind and"
            f" every hour comes {self.closing} km closer, because {self.fast} is {self.closing} more than {self.slow}."
            f" [Eating up|Nibbling away] {self.head_start} km at {self.closing} km an hour takes {self.duration}, so"
            f" {self.second} draws level after {self.duration}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[Head start of {self.first}|Lead in km]: {self.slow} × {self.lead} = {self.head_start} km.",
            f"[Speed at which the gap closes|Closing speed]: {self.fast} - {self.slow} = {self.closing} km/h.",
            f"[Time to close the gap|Time needed]: {self.head_start} / {self.closing} = {self.answer}, so {self.second}"
            f" needs {self.duration}.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                "find how far ahead the first traveller is",
                "find how fast the gap [closes|shrinks]",
                "divide the gap by that speed",
            ),
            f"at the second start, {self.first} is {self.slow} × {self.lead} = {self.head_start} km ahead. The gap"
            f" shrinks by {self.fast} - {self.slow} = {self.closing} km each hour. It takes {self.head_start} /"
            f" {self.closing} = {self.answer}, that is {self.duration}.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            "[Picture two snails|Take two toy cars|Think of two beetles|Start with two tortoises]: the first does"
            f" {s.slow} metres an hour and leads by {HOURS.count(s.lead)}, the second does {s.fast}. The lead is"
            f" {s.slow} × {s.lead} = {s.head_start}, the gap closes by {s.fast} - {s.slow} = {s.closing}, so"
            f" {s.head_start} / {s.closing} = {s.answer}. [{self.first} and {self.second} are no different|Scale that"
            f" up]: {self.slow} × {self.lead} = {self.head_start} km, {self.fast} - {self.slow} = {self.closing} km/h,"
            f" and {self.head_start} / {self.closing} = {self.answer}. It takes {self.duration}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                (
                    f"[How far ahead is {self.first} when {self.second} starts?|What lead does {self.first} have at"
                    " that moment?]"
                ),
                f"{self.slow} × {self.lead} = {self.head_start} km.",
            ),
            (
                f"[Does {self.second} gain {self.fast} km every hour?|Is the whole {self.fast} km gained each hour?]",
                f"No, {self.first} keeps moving, so the gain is {self.fast} - {self.slow} = {self.closing} km.",
            ),
            (
                "[How many such gains close the gap?|How long until the gap is gone?]",
                f"{self.head_start} / {self.closing} = {self.answer}, so {self.duration}.",
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Three times come to mind.|Weigh the candidates.]",
            (
                f"{self.head_start} / ({self.fast} - {self.slow}) = {self.answer}",
                "it divides the lead by the closing speed",
            ),
            (
                (f"{self.head_start} / {self.fast} = {number(self.no_motion)}", f"it lets {self.first} stand still"),
                (f"{self.answer} + {self.lead} = {number(self.from_first)}", f"it counts from {self.first}'s start"),
            ),
            f"{self.second} needs {self.duration}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        faster = "faster" if c.fast > self.fast else "slower"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] {self.second} were {faster}, at {c.fast} km/h instead of {self.fast}. The"
            f" lead stays {self.slow} × {self.lead} = {self.head_start} km, but the gap closes by {c.fast} - {c.slow} ="
            f" {c.closing} km/h, which takes {c.head_start} / {c.closing} = {c.answer}. So the [critical quantity|key]"
            f" is the difference of the speeds, not the speed itself. With the real {self.fast} km/h it is"
            f" {self.closing}, and {self.head_start} / {self.closing} = {self.answer}, so {self.duration}."
        )
