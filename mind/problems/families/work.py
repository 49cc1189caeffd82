"""Work and time: two people sharing a job, a dripping tap in other units, and a timetable with breaks."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from mind.problems.language import Noun, number
from mind.problems.problem import Problem, Space

HOURS = Noun("hour", "hours")
LITRES = Noun("litre", "litres")


class JointWork(Problem):
    """Time for `jobs` equal jobs at the joint rate 1/hours_a + 1/hours_b, in hours."""

    family = "joint_work"
    space: ClassVar[Space] = {"hours_a": range(2, 61), "hours_b": range(3, 91), "jobs": range(1, 21)}
    simpler = (
        {"hours_a": 2, "hours_b": 2, "jobs": 1},
        {"hours_a": 1, "hours_b": 1, "jobs": 4},
        {"hours_a": 2, "hours_b": 2, "jobs": 3},
    )
    hours_a: int
    hours_b: int
    jobs: int

    def solve(self) -> None:
        self.rate = Fraction(1, self.hours_a) + Fraction(1, self.hours_b)
        self.hours = self.jobs / self.rate
        self.mean = Fraction(self.hours_a + self.hours_b, 2) * self.jobs
        self.alone = self.hours_a * self.jobs
        self.answer = number(self.hours)
        self.wrong = (number(self.mean), str(self.alone))

    def accepts(self) -> bool:
        return (
            self.hours_a < self.hours_b <= 3 * self.hours_a and (self.hours * 2).denominator == 1 and self.hours <= 90
        )

    def changes(self) -> list[dict[str, int]]:
        more = [{"jobs": self.jobs * 2}, {"jobs": self.jobs * 3}]
        return [*more, {"jobs": self.jobs // 2}] if self.jobs % 2 == 0 else more

    def dress(self) -> None:
        self.first, self.second = self.people(2)
        done = (
            ("paint", Noun("fence", "fences")),
            ("weed", Noun("garden", "gardens")),
            ("wallpaper", Noun("room", "rooms")),
            ("tile", Noun("kitchen", "kitchens")),
            ("clean", Noun("workshop", "workshops")),
            ("build", Noun("shed", "sheds")),
            ("translate", Noun("booklet", "booklets")),
            ("repair", Noun("boat", "boats")),
        )
        ((self.verb, self.thing),) = self.pick(done, 1)
        self.things = self.thing.count(self.jobs)

    def question(self) -> str:
        a, b, one = self.first, self.second, self.thing.one
        same = "" if self.jobs == 1 else " of the same size"
        return self.say(
            f"{a} can {self.verb} a {one} in {self.hours_a} hours; {b} needs {self.hours_b} hours. Working together["
            f" without disturbing each other|], how many hours do they need to {self.verb} {self.things}{same}?",
            f"To {self.verb} a {one} takes {a} {self.hours_a} hours and {b} {self.hours_b} hours. They [work side by"
            f" side|team up] to {self.verb} {self.things}{same}. How many hours [does that take|will it take them]?",
            f"{b} takes {self.hours_b} hours to {self.verb} a {one}, while {a} takes only {self.hours_a}. How long, in"
            f" hours, do the two take together for {self.things}{same}?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let a and b be the two rates in {self.thing.many} per hour, s their sum and t the time. [Then|We have|The"
            f" data give|By the statement,] a = 1/{self.hours_a}, b = 1/{self.hours_b} and s = a + b = 1/{self.hours_a}"
            f" + 1/{self.hours_b} = {self.rate}. [Since|Because] s × t = {self.jobs}, we get t = {self.jobs} / s ="
            f" {self.jobs} / ({self.rate}) = {self.answer}. [Hence|Therefore|It follows that|Consequently,] t ="
            f" {self.answer} hours."
        )

    def intuitive(self) -> str:
        a, b = self.first, self.second
        total = self.hours_a * self.hours_b
        speed = self.hours_a + self.hours_b
        return self.say(
            f"Two pairs of hands must beat {a} alone. [Imagine|Picture] {total} hours of work on separate"
            f" {self.thing.many}: {a} would finish {self.hours_b} and {b} {self.hours_a}, so {speed} between them. That"
            f" pace gives {self.things} in {self.answer} hours."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"{self.first}'s rate: 1/{self.hours_a} of a {self.thing.one} per hour.",
            f"{self.second}'s rate: 1/{self.hours_b} of a {self.thing.one} per hour.",
            f"[Joint rate|Rate together]: 1/{self.hours_a} + 1/{self.hours_b} = {self.rate} per hour.",
            f"Time for {self.things}: {self.jobs} / ({self.rate}) = {self.answer} hours.",
        )

    def planning(self) -> str:
        return self.plan(
            ("turn each time into a rate per hour", "add the rates", "divide the amount of work by the joint rate"),
            f"the rates are 1/{self.hours_a} and 1/{self.hours_b} of a {self.thing.one} per hour. Together"
            f" 1/{self.hours_a} + 1/{self.hours_b} = {self.rate}. For {self.things} they need {self.jobs} /"
            f" ({self.rate}) = {self.answer} hours.",
        )

    def analogy(self) -> str:
        s = self.simple
        done = "1 cake" if s.jobs == 1 else f"{s.jobs} cakes"
        each = HOURS.count(s.hours_a)
        return self.say(
            f"[Take two bakers|Think of two bakers] who each bake a cake in {each}. Together they bake {s.rate} per"
            f" hour, so {done} {'takes' if s.jobs == 1 else 'take'} {s.jobs} / {s.rate} = {s.answer}"
            f" {'hour' if s.answer == '1' else 'hours'}: rates add, times do not. [The same holds here|Now {self.first}"
            f" and {self.second}]: 1/{self.hours_a} + 1/{self.hours_b} = {self.rate} of a {self.thing.one} per hour,"
            f" and {self.jobs} / ({self.rate}) = {self.answer}. They need {self.answer} hours."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                "[How much gets done in one hour?|What happens in a single hour?]",
                f"{self.first} does 1/{self.hours_a} and {self.second} 1/{self.hours_b} of a {self.thing.one}.",
            ),
            ("[And together?|What is that in total?]", f"1/{self.hours_a} + 1/{self.hours_b} = {self.rate}."),
            (
                f"[How often does that fit into {self.things}?|How many such hours make {self.things}?]",
                f"{self.jobs} / ({self.rate}) = {self.answer}, so they need {self.answer} hours.",
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Which time is believable?|Compare the candidate times.]",
            (
                f"{self.jobs} / (1/{self.hours_a} + 1/{self.hours_b}) = {self.answer} hours",
                "it adds what both do in an hour",
            ),
            (
                (
                    f"the mean time, {self.jobs} × ({self.hours_a} + {self.hours_b}) / 2 = {number(self.mean)} hours",
                    f"this is slower than {self.first} alone",
                ),
                (f"{self.jobs} × {self.hours_a} = {self.alone} hours", f"this leaves {self.second}'s help out"),
            ),
            f"They need {self.answer} hours.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        many = c.jobs > self.jobs
        factor = c.jobs // self.jobs if many else 2
        back = f"{c.answer} / {factor}" if many else f"{c.answer} × {factor}"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] there were {self.thing.count(c.jobs)} instead of {self.jobs}. At"
            f" 1/{self.hours_a} + 1/{self.hours_b} = {self.rate} per hour, that would take {c.jobs} / ({self.rate}) ="
            f" {c.answer} hours. The time moves in step with the work, so the [critical|decisive] constraint is the"
            f" joint rate {self.rate}, which does not change. For the real {self.things}, {back} = {self.answer}, so"
            f" {self.answer} hours."
        )


class Dripping(Problem):
    """Litres = millilitres · (3600·hours / every) / 1000: a drip of `millilitres` every `every` seconds."""

    family = "dripping"
    space: ClassVar[Space] = {
        "millilitres": range(4, 41),
        "every": (2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 18, 20, 24, 30),
        "hours": range(2, 25),
    }
    simpler = (
        {"millilitres": 1, "every": 4, "hours": 1},
        {"millilitres": 1, "every": 2, "hours": 1},
        {"millilitres": 1, "every": 5, "hours": 1},
    )
    millilitres: int
    every: int
    hours: int

    def solve(self) -> None:
        self.seconds = 3600 * self.hours
        self.times = Fraction(self.seconds, self.every)
        self.volume = self.times * self.millilitres
        self.litres = self.volume / 1000
        self.answer = number(self.litres)
        self.no_seconds = Fraction(60 * self.hours, self.every) * self.millilitres / 1000
        self.wrong = (number(self.no_seconds), number(self.volume))

    def accepts(self) -> bool:
        whole = self.times.denominator == 1 and (self.litres * 10).denominator == 1
        return whole and self.litres <= 100 and (self.no_seconds * 10000).denominator == 1

    def changes(self) -> list[dict[str, int]]:
        return [{"every": self.every * 2}, {"every": self.every * 3}, {"every": self.every * 5}]

    def dress(self) -> None:
        ((self.event, self.what),) = self.pick(
            (
                ("tap leaks", "water"),
                ("garden pump squirts", "water"),
                ("machine pours", "syrup"),
                ("pipe leaks", "oil"),
                ("dispenser releases", "liquid soap"),
                ("gutter drips", "rainwater"),
            ),
            1,
        )
        self.gap = f"{self.every} seconds"

    def question(self) -> str:
        return self.say(
            f"A {self.event} {self.millilitres} ml of {self.what} every {self.gap}. How many litres is that in"
            f" {self.hours} hours?",
            f"Every {self.gap} a {self.event} {self.millilitres} ml of {self.what}. [Over|During] {self.hours} hours,"
            " how many litres come out?",
            f"A {self.event} {self.millilitres} ml of {self.what} once every {self.gap}. What volume, in litres,"
            f" [collects|comes out] in {self.hours} hours?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            "Let s be the time in seconds, n the number of pulses and v the volume in litres. [Since 1 h is 3600"
            f" s|With 3600 seconds per hour], s = 3600 × {self.hours} = {self.seconds}. [Then|Hence] n = s /"
            f" {self.every} = {number(self.times)} and v = {self.millilitres} × n / 1000 = {number(self.volume)} / 1000"
            f" = {self.answer}. [Therefore|So] v = {LITRES.count(self.litres)}."
        )

    def intuitive(self) -> str:
        per_hour = Fraction(3600, self.every)
        return self.say(
            "[Put a bucket under it and watch for an hour.|Think of one hour first.|Picture a bucket filling for an"
            f" hour.|Begin with what one hour brings.] An hour has 3600 seconds, so it happens {number(per_hour)}"
            f" times[ over|], and the bucket gathers {LITRES.count(per_hour * self.millilitres / 1000)}. [Keep"
            f" watching|Stay] for {self.hours} hours and the bucket has taken {self.hours} times as much,"
            f" {LITRES.count(self.litres)}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"Seconds in {self.hours} hours: {self.hours} × 3600 = {self.seconds}.",
            f"[Number of times it happens|How often it happens]: {self.seconds} / {self.every} = {number(self.times)}.",
            f"[Volume in millilitres|Millilitres]: {number(self.times)} × {self.millilitres} = {number(self.volume)}.",
            f"[Volume in litres|Litres]: {number(self.volume)} / 1000 = {self.answer}.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                "turn the hours into seconds",
                "count how often it happens",
                "multiply by the millilitres",
                "convert to litres",
            ),
            f"{self.hours} × 3600 = {self.seconds} seconds. It happens {self.seconds} / {self.every} ="
            f" {number(self.times)} times. That is {number(self.times)} × {self.millilitres} = {number(self.volume)}"
            f" ml, or {number(self.volume)} / 1000 = {LITRES.count(self.litres)}.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Start smaller|An easier case|Practise on a slow drip|Shrink the numbers first]: {s.millilitres} ml every"
            f" {s.every} seconds for 1 hour. That is 3600 / {s.every} = {number(s.times)} times and {number(s.times)} ×"
            f" {s.millilitres} = {number(s.volume)} ml, so {number(s.volume)} / 1000 = {LITRES.count(s.litres)}."
            f" [Replace the numbers|The same road leads on|Now the real numbers]: {self.seconds} / {self.every} ="
            f" {number(self.times)} times in {self.hours} hours, {number(self.times)} × {self.millilitres} ="
            f" {number(self.volume)} ml, which is {LITRES.count(self.litres)}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                f"[How many seconds are {self.hours} hours?|What are {self.hours} hours in seconds?]",
                f"{self.hours} × 60 × 60 = {self.seconds}.",
            ),
            (
                "[How often does it happen in that time?|How many times is that?]",
                f"{self.seconds} / {self.every} = {number(self.times)}.",
            ),
            (
                "[How many millilitres come out?|How much is that in millilitres?]",
                f"{number(self.times)} × {self.millilitres} = {number(self.volume)}.",
            ),
            (
                "[And in litres?|What is that in litres?]",
                f"{number(self.volume)} / 1000 = {LITRES.count(self.litres)}.",
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[The units decide between these.|Check the units of each candidate.]",
            (
                f"{self.seconds} / {self.every} × {self.millilitres} / 1000 = {self.answer}",
                "seconds and litres are both converted",
            ),
            (
                (
                    f"{self.hours} × 60 / {self.every} × {self.millilitres} / 1000 = {number(self.no_seconds)}",
                    "it takes minutes for seconds",
                ),
                (
                    f"{self.seconds} / {self.every} × {self.millilitres} = {number(self.volume)}",
                    "this is in millilitres",
                ),
            ),
            f"[The volume is|So it is] {LITRES.count(self.litres)}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        factor = c.every // self.every
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] it happened only every {c.every} seconds instead of every {self.every}."
            f" Then {c.seconds} / {c.every} = {number(c.times)} times {c.millilitres} ml would give {number(c.volume)}"
            f" ml, which is {LITRES.count(c.litres)}. [The gap between two pulses is the critical condition|What"
            f" decides is the gap]: {factor} times as long, {factor} times less. With the real gap, {c.answer} ×"
            f" {factor} = {self.answer}, so {LITRES.count(self.litres)} come out."
        )


class Timetable(Problem):
    """Minutes from the first start to the last end = parts·minutes + (parts - 1)·pause."""

    family = "timetable"
    space: ClassVar[Space] = {"parts": range(3, 13), "minutes": range(8, 61), "pause": range(3, 26)}
    simpler = (
        {"parts": 2, "minutes": 5, "pause": 2},
        {"parts": 2, "minutes": 6, "pause": 1},
        {"parts": 2, "minutes": 4, "pause": 2},
    )
    parts: int
    minutes: int
    pause: int

    def solve(self) -> None:
        self.pauses = self.parts - 1
        self.active = self.parts * self.minutes
        self.idle = self.pauses * self.pause
        self.total = self.active + self.idle
        self.too_long = self.parts * (self.minutes + self.pause)
        self.answer = str(self.total)
        self.wrong = (str(self.active), str(self.too_long))

    def accepts(self) -> bool:
        return self.pause < self.minutes and self.total <= 480

    def changes(self) -> list[dict[str, int]]:
        return [{"parts": self.parts + 1}, {"parts": self.parts - 1}]

    def dress(self) -> None:
        where, self.part, self.break_ = self.rng.choice(
            (
                ("At a school", Noun("lesson", "lessons"), Noun("break", "breaks")),
                ("At a festival", Noun("concert", "concerts"), Noun("pause", "pauses")),
                ("On a sports day", Noun("race", "races"), Noun("gap", "gaps")),
                ("At a conference", Noun("talk", "talks"), Noun("break", "breaks")),
                ("In a puppet theatre", Noun("show", "shows"), Noun("gap", "gaps")),
                ("In a training camp", Noun("session", "sessions"), Noun("rest", "rests")),
            )
        )
        self.where = where

    def question(self) -> str:
        part, rest = self.part, self.break_
        return self.say(
            f"{self.where}, {part.count(self.parts)} of {self.minutes} minutes each follow one another, with a"
            f" {self.pause}-minute {rest.one} between [neighbouring|consecutive] {part.many}. How many minutes pass"
            f" from the start of the first {part.one} to the end of the last?",
            f"{self.where}, each {part.one} lasts {self.minutes} minutes, and between two {part.many} there is a"
            f" {rest.one} of {self.pause} minutes. [If there are|With] {part.count(self.parts)}, how many minutes does"
            " the whole programme take?",
            f"{self.where}, there are {part.count(self.parts)}, each {self.minutes} minutes long, separated by"
            f" {rest.many} of {self.pause} minutes. How long is it, in minutes, from the first start to the last end?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let n = {self.parts} be the number of {self.part.many}, m = {self.minutes} their length, p = {self.pause}"
            f" the length of a {self.break_.one}, and t the total time in minutes. [Between n items there are n - 1"
            f" gaps, so|With n - 1 gaps,] t = n × m + (n - 1) × p = {self.active} + {self.pauses} × {self.pause} ="
            f" {self.active} + {self.idle} = {self.total}. [Hence|Therefore|It follows that|Consequently,] t ="
            f" {self.total}."
        )

    def intuitive(self) -> str:
        return self.say(
            "[Think of the fingers of a hand: there is one gap fewer than fingers.|Picture fence posts: there is one"
            f" gap fewer than posts.] So {self.part.count(self.parts)} leave room for only {self.pauses}"
            f" {self.break_.many}, as nobody waits after the last one. The {self.part.many} fill {self.active} minutes"
            f" and the {self.break_.many} {self.idle}, [which makes|together] {self.total} minutes."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"Time for the {self.part.many}: {self.parts} × {self.minutes} = {self.active} minutes.",
            f"Number of {self.break_.many}: {self.parts} - 1 = {self.pauses}.",
            f"Time for the {self.break_.many}: {self.pauses} × {self.pause} = {self.idle} minutes.",
            f"[Whole|Total] time: {self.active} + {self.idle} = {self.total} minutes.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                f"add up the {self.part.many}",
                f"count the {self.break_.many} in between",
                f"add the time of the {self.break_.many}",
            ),
            f"the {self.part.many} take {self.parts} × {self.minutes} = {self.active} minutes. Between them lie"
            f" {self.parts} - 1 = {self.pauses} {self.break_.many}, that is {self.pauses} × {self.pause} = {self.idle}"
            f" minutes. In all {self.active} + {self.idle} = {self.total} minutes.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Take just two songs|Consider two songs] of {s.minutes} minutes with one pause of {s.pause}: {s.parts} ×"
            f" {s.minutes} + 1 × {s.pause} = {s.total} minutes, one pause for two songs. [Likewise|In the same way],"
            f" {self.part.count(self.parts)} have {self.pauses} {self.break_.many}: {self.parts} × {self.minutes} +"
            f" {self.pauses} × {self.pause} = {self.active} + {self.idle} = {self.total}. It takes {self.total}"
            " minutes."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                f"How long do the {self.part.many} take alone?",
                f"{self.parts} × {self.minutes} = {self.active} minutes.",
            ),
            (
                f"Are there {self.parts} {self.break_.many} too?",
                f"No, none follows the last {self.part.one}, so {self.parts} - 1 = {self.pauses}.",
            ),
            (f"How long are the {self.break_.many}?", f"{self.pauses} × {self.pause} = {self.idle} minutes."),
            ("[And in total?|So how long is everything?]", f"{self.active} + {self.idle} = {self.total} minutes."),
        )

    def contrastive(self) -> str:
        return self.contrast(
            f"[The candidates differ in the {self.break_.many}.|How many {self.break_.many} should be counted?]",
            (
                f"{self.active} + {self.pauses} × {self.pause} = {self.total}",
                f"each {self.break_.one} lies between two {self.part.many}",
            ),
            (
                (f"{self.parts} × {self.minutes} = {self.active}", f"it has no {self.break_.many} at all"),
                (
                    f"{self.parts} × ({self.minutes} + {self.pause}) = {self.too_long}",
                    f"it adds a {self.break_.one} after the last {self.part.one}",
                ),
            ),
            f"[The whole takes|It takes] {self.total} minutes.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        block = self.minutes + self.pause
        more = c.parts > self.parts
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] there were {c.parts} {self.part.many} instead of {self.parts}. They would"
            f" need {c.parts} × {c.minutes} + {c.pauses} × {c.pause} = {c.total} minutes. One {self.part.one}"
            f" {'more adds' if more else 'fewer removes'} one {self.break_.one} as well, {self.minutes} + {self.pause}"
            f" = {block}: [the critical point is|what matters is] that there is always one {self.break_.one} fewer than"
            f" {self.part.many}. Going back, {c.total} {'-' if more else '+'} {block} = {self.total} minutes."
        )
