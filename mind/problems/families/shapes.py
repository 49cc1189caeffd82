"""Areas and perimeters: a path around a garden, and posts along a fence."""

from __future__ import annotations

from typing import ClassVar

from mind.problems.language import Noun
from mind.problems.problem import Problem, Space


class Border(Problem):
    """Area of a path around a rectangle: (length + 2·path)·(width + 2·path) - length·width, in square metres."""

    family = "border"
    space: ClassVar[Space] = {"length": range(5, 41), "width": range(3, 31), "path": range(1, 6)}
    simpler = (
        {"length": 3, "width": 2, "path": 1},
        {"length": 2, "width": 2, "path": 1},
        {"length": 4, "width": 2, "path": 1},
    )
    length: int
    width: int
    path: int

    def solve(self) -> None:
        self.outer_length = self.length + 2 * self.path
        self.outer_width = self.width + 2 * self.path
        self.outer = self.outer_length * self.outer_width
        self.inner = self.length * self.width
        self.area = self.outer - self.inner
        self.answer = str(self.area)
        self.one_side = (self.length + self.path) * (self.width + self.path) - self.inner
        self.no_corners = 2 * (self.length + self.width) * self.path
        self.wrong = (str(self.one_side), str(self.no_corners))

    def accepts(self) -> bool:
        return self.length > self.width > 2 * self.path

    def changes(self) -> list[dict[str, int]]:
        return [{"path": self.path + 1}] if self.path == 1 else [{"path": self.path + 1}, {"path": self.path - 1}]

    def dress(self) -> None:
        self.inside, self.around = self.rng.choice(
            (
                ("garden", "gravel path"),
                ("pool", "tiled border"),
                ("lawn", "stone path"),
                ("pond", "wooden walkway"),
                ("playground", "rubber strip"),
                ("rose bed", "brick path"),
            )
        )
        self.metres = Noun("metre", "metres").count(self.path)

    def question(self) -> str:
        return self.say(
            f"A rectangular {self.inside} is {self.length} m long and {self.width} m wide. A {self.around}"
            f" {self.metres} wide runs all the way around it. What is the area of the {self.around} in square metres?",
            f"[Around|All around] a {self.inside} of {self.length} m by {self.width} m lies a {self.around} that is"
            f" {self.metres} wide everywhere. How many square metres does the {self.around} cover?",
            f"A {self.around}, {self.metres} wide, surrounds a rectangular {self.inside} measuring {self.length} m by"
            f" {self.width} m. Find the area of the {self.around} in square metres.",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let a = {self.length}, b = {self.width} and w = {self.path} in metres. The outer rectangle has sides p ="
            f" a + 2w = {self.outer_length} and q = b + 2w = {self.outer_width}. The [required|wanted] area is s = p ×"
            f" q - a × b = {self.outer} - {self.inner} = {self.area}. [Hence|Therefore|It follows that|Consequently,] s"
            f" = {self.area} square metres."
        )

    def intuitive(self) -> str:
        return self.say(
            f"[Look down from a balloon|Picture it from above]: a big rectangle with the {self.inside} cut out of the"
            f" middle. The strip adds {self.path} m at the left and {self.path} m at the right, so the big one is"
            f" {self.outer_length} by {self.outer_width}, which covers {self.outer}. The hole takes {self.inner}. What"
            f" you can walk on is the rest, {self.area} square metres."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"Outer length: {self.length} + 2 × {self.path} = {self.outer_length} m.",
            f"Outer width: {self.width} + 2 × {self.path} = {self.outer_width} m.",
            f"Outer area: {self.outer_length} × {self.outer_width} = {self.outer}.",
            f"Area of the {self.inside}: {self.length} × {self.width} = {self.inner}.",
            f"Area of the {self.around}: {self.outer} - {self.inner} = {self.area} square metres.",
        )

    def planning(self) -> str:
        return self.plan(
            ("find the outer sides", "find the outer area", f"take away the area of the {self.inside}"),
            f"the outer sides are {self.length} + 2 × {self.path} = {self.outer_length} and {self.width} + 2 ×"
            f" {self.path} = {self.outer_width}. The outer area is {self.outer_length} × {self.outer_width} ="
            f" {self.outer}. Without the {self.inside}, {self.outer} - {self.length} × {self.width} = {self.area}"
            " square metres remain.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Take a photo|Think of a photo] of {s.length} by {s.width} in a frame {s.path} wide. With its frame it"
            f" measures {s.outer_length} by {s.outer_width}, so the frame covers {s.outer_length} × {s.outer_width} -"
            f" {s.length} × {s.width} = {s.area}. The {self.around} is the frame of the {self.inside}:"
            f" {self.outer_length} × {self.outer_width} - {self.length} × {self.width} = {self.outer} - {self.inner} ="
            f" {self.area} square metres."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                "How long is the whole, [outside to outside|edge to edge]?",
                f"The strip is on both sides, so {self.length} + 2 × {self.path} = {self.outer_length} m.",
            ),
            ("[And how wide?|What about the width?]", f"{self.width} + 2 × {self.path} = {self.outer_width} m."),
            ("What area is that?", f"{self.outer_length} × {self.outer_width} = {self.outer}."),
            (
                f"[Is all of it {self.around}?|Does that include the {self.inside}?]",
                f"The {self.inside} must go: {self.outer} - {self.inner} = {self.area} square metres.",
            ),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[Three areas are tempting.|Compare the candidates.]",
            (
                f"{self.outer_length} × {self.outer_width} - {self.inner} = {self.area}",
                "it has all four sides and the corners",
            ),
            (
                (
                    f"({self.length} + {self.path}) × ({self.width} + {self.path}) - {self.inner} = {self.one_side}",
                    "it widens the rectangle on one side only",
                ),
                (
                    f"2 × ({self.length} + {self.width}) × {self.path} = {self.no_corners}",
                    "the four corners are missing",
                ),
            ),
            f"The {self.around} covers {self.area} square metres.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the {self.around} were {c.path} m wide instead of {self.path}. The outer"
            f" rectangle would be {c.outer_length} by {c.outer_width} and the strip {c.outer_length} × {c.outer_width}"
            f" - {c.inner} = {c.area}. One metre of path changes each outer side by two, so the outer size is the"
            f" [critical|decisive] constraint. At {self.path} m it is {self.outer_length} by {self.outer_width}, giving"
            f" {self.outer} - {self.inner} = {self.area} square metres."
        )


class Fence(Problem):
    """Posts every `spacing` metres around a closed rectangle: 2·(length + width) / spacing posts, at `price` each."""

    family = "fence"
    space: ClassVar[Space] = {
        "spacing": range(2, 7),
        "spans_long": range(3, 16),
        "spans_wide": range(2, 13),
        "price": range(3, 16),
    }
    simpler = (
        {"spacing": 1, "spans_long": 2, "spans_wide": 1, "price": 2},
        {"spacing": 1, "spans_long": 2, "spans_wide": 2, "price": 2},
        {"spacing": 2, "spans_long": 2, "spans_wide": 1, "price": 1},
    )
    spacing: int
    spans_long: int
    spans_wide: int
    price: int

    def solve(self) -> None:
        self.length = self.spacing * self.spans_long
        self.width = self.spacing * self.spans_wide
        self.half = self.length + self.width
        self.perimeter = 2 * self.half
        self.posts = self.perimeter // self.spacing
        self.cost = self.posts * self.price
        self.answer = str(self.cost)
        self.wrong = (str((self.posts + 1) * self.price), str(self.posts // 2 * self.price))

    def accepts(self) -> bool:
        return self.spans_long > self.spans_wide

    def changes(self) -> list[dict[str, int]]:
        return [{"price": self.price + step} for step in (1, 2, 3)]

    def dress(self) -> None:
        (self.owner,) = self.people(1)
        (self.field,) = self.pick(("meadow", "pasture", "paddock", "vegetable plot", "schoolyard", "vineyard"), 1)

    def question(self) -> str:
        o = self.owner
        return self.say(
            f"{o} fences a rectangular {self.field} of {self.length} m by {self.width} m, with a post every"
            f" {self.spacing} m all the way round, corners included. Each post costs ${self.price}. How many dollars do"
            " the posts cost?",
            f"A rectangular {self.field} is {self.length} m long and {self.width} m wide. {o} puts a post in each"
            f" corner and every {self.spacing} m along the edge. At ${self.price} per post, what do all posts cost in"
            " dollars?",
            f"Posts for a fence cost ${self.price} each. {o} sets them {self.spacing} m apart around the whole edge of"
            f" a {self.field} that measures {self.length} m by {self.width} m. How much does {o.he} pay for the posts,"
            " in dollars?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            "Let p be the perimeter in metres, n the number of posts and c the cost in dollars. [Then|We have|The data"
            f" give|By the statement,] p = 2 × ({self.length} + {self.width}) = {self.perimeter}. [On a closed"
            f" curve|Along a closed line] posts and gaps are equal in number, so n = p / {self.spacing} = {self.posts}"
            f" and c = n × {self.price} = {self.cost}. [Hence|Therefore|It follows that|Consequently,] c = {self.cost}."
        )

    def intuitive(self) -> str:
        o = self.owner
        return self.say(
            f"[Walk around the {self.field} with {o}.|Take a walk once around the {self.field}.] The round trip is"
            f" {self.perimeter} m, and every {self.spacing} m {o.he} hammers in a post, so {self.posts} times; back at"
            f" the start a post is already standing. [Each blow of the hammer|Every post] takes ${self.price} from"
            f" {o.his} purse, ${self.cost} in the end."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[Half-way round|Length plus width]: {self.length} + {self.width} = {self.half} m.",
            f"[Perimeter|All the way round]: 2 × {self.half} = {self.perimeter} m.",
            f"Number of posts: {self.perimeter} / {self.spacing} = {self.posts}.",
            f"[Cost|Price of all posts]: {self.posts} × {self.price} = {self.cost} dollars.",
        )

    def planning(self) -> str:
        return self.plan(
            ("work out the perimeter", "divide it by the spacing to count posts", "multiply by the price of a post"),
            f"the perimeter is 2 × ({self.length} + {self.width}) = {self.perimeter} m. That makes {self.perimeter} /"
            f" {self.spacing} = {self.posts} posts. They cost {self.posts} × {self.price} = {self.cost} dollars.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Take a cake|Think of a tray] of {s.length} by {s.width} with a candle every {s.spacing} along the edge,"
            f" ${s.price} each. The edge is 2 × ({s.length} + {s.width}) = {s.perimeter}, so {s.perimeter} /"
            f" {s.spacing} = {s.posts} candles cost {s.posts} × {s.price} = {s.cost}. Posts are the candles here:"
            f" {self.perimeter} / {self.spacing} = {self.posts} around the {self.field}, and {self.posts} ×"
            f" {self.price} = {self.cost} dollars."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                "[How long is the edge?|What is the perimeter?|How far is it all the way round?]",
                f"2 × ({self.length} + {self.width}) = {self.perimeter} m.",
            ),
            (
                "[How many gaps are there?|Into how many gaps is it divided?]",
                f"{self.perimeter} / {self.spacing} = {self.posts}.",
            ),
            (
                "[Do I need one more post than gaps?|Is there an extra post at the end?]",
                f"No, the fence closes on itself, so {self.posts} posts.",
            ),
            ("[What do they cost?|And the price?]", f"{self.posts} × {self.price} = {self.cost} dollars."),
        )

    def contrastive(self) -> str:
        return self.contrast(
            "[How many posts have to be paid for?|Three bills are possible.]",
            (
                f"{self.perimeter} / {self.spacing} × {self.price} = {self.cost}",
                "a closed fence has as many posts as gaps",
            ),
            (
                (
                    f"({self.perimeter} / {self.spacing} + 1) × {self.price} = {self.wrong[0]}",
                    "the extra post is for an open line",
                ),
                (
                    f"{self.half} / {self.spacing} × {self.price} = {self.wrong[1]}",
                    "it covers just two of the four sides",
                ),
            ),
            f"The posts cost ${self.cost}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        gap = c.cost - self.cost
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] a post cost ${c.price} instead of ${self.price}. The {self.perimeter} m"
            f" still need {self.perimeter} / {self.spacing} = {self.posts} posts, which would cost {c.posts} ×"
            f" {c.price} = {c.cost}. The number of posts did not move, so the [critical|binding] constraint is the"
            f" closed edge. At the real price it is {gap} less: {c.cost} - {gap} = {self.cost} dollars."
        )
