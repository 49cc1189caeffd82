"""Buying and selling: change from a purchase, two discounts in a row, tickets of two prices."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from mind.problems.language import Noun, capital, money, number
from mind.problems.problem import Problem, Space

GOODS = tuple(
    Noun(one, many)
    for one, many in (
        ("notebook", "notebooks"),
        ("mug", "mugs"),
        ("candle", "candles"),
        ("scarf", "scarves"),
        ("puzzle", "puzzles"),
        ("poster", "posters"),
        ("cushion", "cushions"),
        ("plant", "plants"),
        ("basket", "baskets"),
        ("brush", "brushes"),
        ("jar of honey", "jars of honey"),
        ("box of tea", "boxes of tea"),
        ("calendar", "calendars"),
        ("belt", "belts"),
    )
)


class Shopping(Problem):
    """Change = bill - (count_a·price_a + count_b·price_b), in dollars."""

    family = "shopping"
    space: ClassVar[Space] = {
        "count_a": range(2, 10),
        "price_a": range(2, 16),
        "count_b": range(2, 10),
        "price_b": range(3, 20),
        "bill": (20, 50, 100, 200),
    }
    simpler = (
        {"count_a": 1, "price_a": 1, "count_b": 1, "price_b": 2, "bill": 5},
        {"count_a": 2, "price_a": 1, "count_b": 1, "price_b": 3, "bill": 10},
        {"count_a": 1, "price_a": 2, "count_b": 2, "price_b": 1, "bill": 10},
    )
    count_a: int
    price_a: int
    count_b: int
    price_b: int
    bill: int

    def solve(self) -> None:
        self.cost_a = self.count_a * self.price_a
        self.cost_b = self.count_b * self.price_b
        self.total = self.cost_a + self.cost_b
        self.change = self.bill - self.total
        self.once = self.bill - self.price_a - self.price_b
        self.answer = str(self.change)
        self.wrong = (str(self.total), str(self.once))

    def accepts(self) -> bool:
        return self.price_a < self.price_b and 0 < self.change < 0.7 * self.bill

    def changes(self) -> list[dict[str, int]]:
        return [{"count_a": self.count_a + step} for step in (-1, 1, 2)]

    def dress(self) -> None:
        (self.buyer,) = self.people(1)
        self.item_a, self.item_b = self.pick(GOODS, 2)
        self.things_a, self.things_b = self.item_a.count(self.count_a), self.item_b.count(self.count_b)

    def question(self) -> str:
        b = self.buyer
        return self.say(
            f"{b} buys {self.things_a} at ${self.price_a} each and {self.things_b} at ${self.price_b} each. {b.He}"
            f" [pays with|hands over] ${self.bill}. How much change[ in dollars|] does {b.he} get[ back|]?",
            f"[At a market|In a small shop], each {self.item_a.one} costs ${self.price_a} and each {self.item_b.one}"
            f" costs ${self.price_b}. {b} has ${self.bill} and buys {self.things_a} and {self.things_b}. How many"
            f" dollars [does {b.he} have left|are left]?",
            f"{b} goes shopping with ${self.bill}. {b.He} chooses {self.things_a} for ${self.price_a} apiece and"
            f" {self.things_b} for ${self.price_b} apiece. How many dollars remain [after paying|when everything is"
            " paid]?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            f"Let a and b be the costs of the {self.item_a.many} and the {self.item_b.many}, and r the remainder, in"
            f" dollars. [Then|We have|The data give|By the statement,] a = {self.count_a} × {self.price_a} ="
            f" {self.cost_a} and b = {self.count_b} × {self.price_b} = {self.cost_b}. [By definition,|By the"
            f" conditions,] r = {self.bill} - (a + b) = {self.bill} - {self.total} = {self.change}. [Hence|Therefore|It"
            f" follows that|Consequently,] r = {self.change}."
        )

    def intuitive(self) -> str:
        b = self.buyer
        return self.say(
            f"[Picture the till.|Imagine standing at the counter.] The {self.item_a.many} come to ${self.cost_a} and"
            f" the {self.item_b.many} to ${self.cost_b}, so the [bill|receipt] says ${self.total}. {b} puts down"
            f" ${self.bill}, [which is more than enough|clearly more than that]. Counting up from {self.total} to"
            f" {self.bill} [takes|needs] {self.change} more, so ${self.change} [comes back|goes back into {b.his}"
            " pocket]."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[Cost|Price] of the {self.item_a.many}: {self.count_a} × {self.price_a} = {self.cost_a} dollars.",
            f"[Cost|Price] of the {self.item_b.many}: {self.count_b} × {self.price_b} = {self.cost_b} dollars.",
            f"[Whole|Total] bill: {self.cost_a} + {self.cost_b} = {self.total} dollars.",
            f"[Money left|Change]: {self.bill} - {self.total} = {self.change}, so {self.buyer} [keeps|is left with]"
            f" ${self.change}.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                "[price|work out] each kind of item",
                "add both [costs|amounts] to get the bill",
                "take the bill from the cash",
            ),
            f"the {self.item_a.many} cost {self.count_a} × {self.price_a} = {self.cost_a} and the {self.item_b.many}"
            f" cost {self.count_b} × {self.price_b} = {self.cost_b}. The bill is {self.cost_a} + {self.cost_b} ="
            f" {self.total}. [What is left|The rest] is {self.bill} - {self.total} = {self.change} dollars.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Take a smaller purchase|A simpler case]: {Noun('pen', 'pens').count(s.count_a)} at ${s.price_a} and"
            f" {Noun('ruler', 'rulers').count(s.count_b)} at ${s.price_b}, paid with ${s.bill}. The bill is {s.count_a}"
            f" × {s.price_a} + {s.count_b} × {s.price_b} = {s.total}, so {s.bill} - {s.total} = {s.change} is left."
            f" [{self.buyer}'s shopping works the same way|The same pattern fits here]: the bill is {self.count_a} ×"
            f" {self.price_a} + {self.count_b} × {self.price_b} = {self.total}, and {self.bill} - {self.total} ="
            f" {self.change}. So ${self.change} is left."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                f"[What do the {self.item_a.many} cost?|How much goes on the {self.item_a.many}?]",
                f"{self.count_a} × {self.price_a} = {self.cost_a} dollars.",
            ),
            (f"[And|What about] the {self.item_b.many}?", f"{self.count_b} × {self.price_b} = {self.cost_b} dollars."),
            (
                "[How much is that together?|So what is the bill?]",
                f"{self.cost_a} + {self.cost_b} = {self.total} dollars.",
            ),
            (
                "[Is that the answer?|Does the question ask for the bill?]",
                f"No, it asks what is left of ${self.bill}: {self.bill} - {self.total} = {self.change} dollars.",
            ),
        )

    def contrastive(self) -> str:
        whole = f"{self.count_a} × {self.price_a} + {self.count_b} × {self.price_b} = {self.total}"
        return self.contrast(
            "[Compare the possible answers.|Which of these is the money left?]",
            (f"{whole} and {self.bill} - {self.total} = {self.change}", "every item is paid once"),
            (
                (whole, "this is [what was spent|the bill], not what is left"),
                (
                    f"{self.bill} - {self.price_a} - {self.price_b} = {self.once}",
                    "this pays for only one item of each kind",
                ),
            ),
            f"[The money left is|So the rest is] ${self.change}.",
        )

    def counterfactual(self) -> str:
        c, b = self.changed, self.buyer
        gap = abs(c.change - self.change)
        more = c.count_a > self.count_a
        back = f"{c.change} {'+' if more else '-'} {gap} = {self.change}"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] {b} had taken {self.item_a.count(c.count_a)} instead of {self.count_a}. The"
            f" bill would be {c.count_a} × {c.price_a} + {c.cost_b} = {c.total} and {c.bill} - {c.total} = {c.change}"
            f" would be left. So each {self.item_a.one} moves the result by ${self.price_a}: [the decisive constraint"
            f" is|what matters is] that all {self.count_a} are paid for, no more and no fewer. [Going back|Back to the"
            f" real purchase], {back}, so ${self.change} is left."
        )


class Discount(Problem):
    """Final price = price·(1 - first/100)·(1 - second/100): the second cut applies to the reduced price."""

    family = "discount"
    space: ClassVar[Space] = {
        "price": range(60, 801, 2),
        "first": (10, 15, 20, 25, 30, 40, 50, 60),
        "second": (5, 10, 15, 20, 25, 30, 40, 50),
    }
    simpler = (
        {"price": 10, "first": 50, "second": 10},
        {"price": 20, "first": 25, "second": 20},
        {"price": 10, "first": 20, "second": 25},
    )
    price: int
    first: int
    second: int

    def solve(self) -> None:
        self.cut = Fraction(self.price * self.first, 100)
        self.reduced = self.price - self.cut
        self.extra = self.reduced * self.second / 100
        self.final = self.reduced - self.extra
        self.added = self.first + self.second
        self.added_price = self.price - Fraction(self.price * self.added, 100)
        self.answer = number(self.final)
        self.wrong = (number(self.added_price), number(self.reduced))

    def accepts(self) -> bool:
        clean = (self.reduced * 2).denominator == 1 and (self.final * 10).denominator == 1
        return clean and self.first > self.second and self.added < 95

    def changes(self) -> list[dict[str, int]]:
        return [{"second": second} for second in (5, 10, 20, 25) if second != self.second]

    def dress(self) -> None:
        (self.buyer,) = self.people(1)
        cheap = ("jacket", "backpack", "lamp", "blanket", "keyboard", "clock", "raincoat")
        dear = ("bicycle", "camera", "sofa", "tent", "guitar", "table", "washing machine")
        (self.item,) = self.pick(cheap if self.price < 150 else dear, 1)
        (self.reason,) = self.pick(
            ("for members", "with a voucher", "at the till", "for students", "on the last day"), 1
        )

    def question(self) -> str:
        b, again = self.buyer, f"{self.second}% off the reduced price {self.reason}"
        return self.say(
            f"A {self.item} costs ${self.price}. [It is on sale|The shop offers it] at {self.first}% off, and {b} gets"
            f" another {again}. How [much|many dollars] does {b} pay?",
            f"{b} [wants|is buying] a {self.item} priced at ${self.price}. In the sale it is {self.first}% cheaper, and"
            f" there is a further {again}. What is the final price in dollars?",
            f"The price of a {self.item} is ${self.price}. First it is cut by {self.first}%; then {b} takes {again}."
            f" [What does {b.he} pay|How much does the {self.item} cost {b.him}], in dollars?",
        )

    def formal_symbolic(self) -> str:
        keep_1, keep_2 = number(1 - Fraction(self.first, 100)), number(1 - Fraction(self.second, 100))
        return self.say(
            "Let p be the list price, q the price after the first cut and r the price paid, in dollars, with p ="
            f" {self.price}. [The first cut keeps a factor|The first factor is] f = 1 - {self.first}% = {keep_1}, the"
            f" second g = 1 - {self.second}% = {keep_2}. [Then|Hence] q = f × p = {keep_1} × {self.price} ="
            f" {number(self.reduced)} and r = g × q = {keep_2} × {number(self.reduced)} = {self.answer}."
            f" [Therefore|Hence] r = {self.answer}."
        )

    def intuitive(self) -> str:
        b = self.buyer
        share = {10: "a tenth", 20: "a fifth", 25: "a quarter", 50: "half"}.get(
            self.first, f"{self.first} of every 100 dollars"
        )
        return self.say(
            f"[Think of two price tags, one stuck over the other.|Picture the two stickers on the {self.item}.] The"
            f" first sale takes {share} off ${self.price}, which is {money(self.cut)}, so the new tag says"
            f" {money(self.reduced)}. The second offer [looks at|only sees] that new tag, so it is worth a bit less"
            f" than it sounds: {money(self.extra)}. {b} [ends up paying|pays] {money(self.final)}."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[First discount|The first cut]: {self.first}% of {self.price} = {number(self.cut)}.",
            f"[Price after it|Reduced price]: {self.price} - {number(self.cut)} = {number(self.reduced)}.",
            f"[Second discount|The second cut], on the reduced price: {self.second}% of {number(self.reduced)} ="
            f" {number(self.extra)}.",
            f"[Final price|Price paid]: {number(self.reduced)} - {number(self.extra)} = {self.answer}, so {self.buyer}"
            f" pays {money(self.final)}.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                "take the first discount off the [list|full] price",
                "take the second one off what remains",
                "[read|give] the final price",
            ),
            f"{self.first}% of {self.price} = {number(self.cut)}, leaving {self.price} - {number(self.cut)} ="
            f" {number(self.reduced)}. Then {self.second}% of {number(self.reduced)} = {number(self.extra)}, leaving"
            f" {number(self.reduced)} - {number(self.extra)} = {self.answer}. The price is {money(self.final)}.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[Try|Take] a ${s.price} book first, with {s.first}% off and then {s.second}% off. {s.first}% of {s.price}"
            f" = {number(s.cut)}, so it drops to ${number(s.reduced)}; {s.second}% of {number(s.reduced)} ="
            f" {number(s.extra)}, so it costs {money(s.final)}. The second cut used the smaller price. [The {self.item}"
            f" is the same|Now the {self.item}]: {self.price} - {number(self.cut)} = {number(self.reduced)}, then"
            f" {self.second}% of {number(self.reduced)} = {number(self.extra)}, and {number(self.reduced)} -"
            f" {number(self.extra)} = {self.answer}. So {self.buyer} pays {money(self.final)}."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                "[How much does the first sale take off?|What is the first discount worth?]",
                f"{self.first}% of {self.price} = {number(self.cut)}.",
            ),
            (f"What does the {self.item} cost then?", f"{self.price} - {number(self.cut)} = {number(self.reduced)}."),
            (
                f"Is the second discount {self.second}% of {self.price}?",
                f"No, of the reduced price: {self.second}% of {number(self.reduced)} = {number(self.extra)}.",
            ),
            (
                f"[So what does {self.buyer} pay?|What is left to pay?]",
                f"{number(self.reduced)} - {number(self.extra)} = {self.answer}, that is {money(self.final)}.",
            ),
        )

    def contrastive(self) -> str:
        first_step = f"{self.price} - {number(self.cut)} = {number(self.reduced)}"
        return self.contrast(
            f"[Several prices look possible.|What could {self.buyer} pay?]",
            (
                (
                    f"{first_step}, then {self.second}% of that is {number(self.extra)} and {number(self.reduced)} -"
                    f" {number(self.extra)} = {self.answer}"
                ),
                "each cut applies to the price before it",
            ),
            (
                (
                    (
                        f"{self.first}% + {self.second}% = {self.added}% in one go gives {self.price} -"
                        f" {number(self.price - self.added_price)} = {number(self.added_price)}"
                    ),
                    "the second cut does not apply to the list price",
                ),
                (f"{first_step}", "this stops before the second cut"),
            ),
            f"[The price paid is|So the price is] {money(self.final)}.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        gap = abs(c.final - self.final)
        sign = "+" if c.final < self.final else "-"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] the second cut were {c.second}% instead of {self.second}%. The reduced"
            f" price would still be {number(self.reduced)}; {c.second}% of {number(c.reduced)} = {number(c.extra)}, so"
            f" {self.buyer} would pay {number(c.reduced)} - {number(c.extra)} = {c.answer}. So the second rate acts"
            f" only on {money(self.reduced)}: that is the [key|critical] constraint. With the real {self.second}%, the"
            f" cut is {number(self.extra)}, a change of {number(gap)}: {c.answer} {sign} {number(gap)} = {self.answer}."
            f" {self.buyer} pays {money(self.final)}."
        )


class Tickets(Problem):
    """adults + children = tickets and adult_price·adults + child_price·children = takings; how many adults?"""

    family = "tickets"
    space: ClassVar[Space] = {
        "adults": range(4, 61),
        "children": range(4, 61),
        "adult_price": range(6, 21),
        "child_price": range(2, 13),
    }
    simpler = (
        {"adults": 2, "children": 1, "adult_price": 3, "child_price": 1},
        {"adults": 1, "children": 3, "adult_price": 3, "child_price": 2},
        {"adults": 3, "children": 2, "adult_price": 4, "child_price": 2},
    )
    adults: int
    children: int
    adult_price: int
    child_price: int

    def solve(self) -> None:
        self.tickets = self.adults + self.children
        self.takings = self.adult_price * self.adults + self.child_price * self.children
        self.floor = self.child_price * self.tickets
        self.surplus = self.takings - self.floor
        self.gap = self.adult_price - self.child_price
        self.answer = str(self.adults)
        self.half = self.tickets // 2
        self.wrong = (str(self.half), str(self.children))

    def accepts(self) -> bool:
        return self.gap >= 2 and self.adult_price <= 3 * self.child_price and self.takings <= 900

    def changes(self) -> list[dict[str, int]]:
        return [{"adults": self.adults + step, "children": self.children} for step in (1, 2, 3)]

    def dress(self) -> None:
        (self.place,) = self.pick(("museum", "zoo", "theatre", "swimming pool", "funfair", "science park"), 1)
        (self.seller,) = self.people(1)

    def question(self) -> str:
        place = f"{self.place} tickets"
        return self.say(
            f"[{capital(place)}|Tickets for the {self.place}] cost ${self.adult_price} for adults and"
            f" ${self.child_price} for children. {self.seller} sells {self.tickets} tickets for ${self.takings}"
            " [altogether|in total]. How many [of them are adult tickets|adult tickets are there]?",
            f"A group of {self.tickets} people pays ${self.takings} to enter the {self.place}. An adult pays"
            f" ${self.adult_price} and a child pays ${self.child_price}. How many adults are in the group?",
            f"At the {self.place}, a child's ticket costs ${self.child_price} and an adult's ${self.adult_price}. One"
            f" morning {self.tickets} tickets bring in ${self.takings}. How many adult tickets are sold?",
        )

    def formal_symbolic(self) -> str:
        return self.say(
            "Let x be the number of adults and y the number of children. [The conditions are|We are given] x + y ="
            f" {self.tickets} and {self.adult_price}x + {self.child_price}y = {self.takings}. Substituting y ="
            f" {self.tickets} - x [yields|gives] {self.gap}x + {self.floor} = {self.takings}, so x = ({self.takings} -"
            f" {self.floor}) / {self.gap} = {self.adults} and y = {self.tickets} - {self.adults} = {self.children}."
            f" [Therefore|Hence] x = {self.adults}."
        )

    def intuitive(self) -> str:
        return self.say(
            "[Pretend everybody sneaks in as a child.|Imagine everyone were charged the child price.|First let"
            f" everyone pass for a child.|Start as if only children came.] {self.tickets} people would bring in"
            f" ${self.floor}. The cash box holds ${self.takings}, which is ${self.surplus} more. Every adult is worth"
            f" ${self.gap} extra, so [ask how often {self.gap} fits into {self.surplus}|share the {self.surplus} into"
            f" lots of {self.gap}]: {self.adults} times. There are {self.adults} adults."
        )

    def decomposition(self) -> str:
        return self.numbered(
            f"[Takings if all were children|All at the child price]: {self.tickets} × {self.child_price} ="
            f" {self.floor}.",
            f"[Money still unexplained|Surplus]: {self.takings} - {self.floor} = {self.surplus}.",
            f"[Extra paid by one adult|Price difference]: {self.adult_price} - {self.child_price} = {self.gap}.",
            f"[Number of adults|Adults]: {self.surplus} / {self.gap} = {self.adults}.",
        )

    def planning(self) -> str:
        return self.plan(
            (
                "pretend that all tickets are child tickets",
                "find the money that is [missing|not explained]",
                "divide it by the price difference",
            ),
            f"child tickets alone bring {self.tickets} × {self.child_price} = {self.floor} dollars, which leaves"
            f" {self.takings} - {self.floor} = {self.surplus}. One adult adds {self.adult_price} - {self.child_price} ="
            f" {self.gap}, so there are {self.surplus} / {self.gap} = {self.adults} adults.",
        )

    def analogy(self) -> str:
        s = self.simple
        return self.say(
            f"[A smaller version|Try an easier one|Compare a fruit stall|Look at a tiny case]: {s.tickets} fruits cost"
            f" ${s.takings}, pears ${s.adult_price} and plums ${s.child_price}. All plums would cost {s.tickets} ×"
            f" {s.child_price} = {s.floor}; the other {s.takings} - {s.floor} = {s.surplus} means {s.surplus} / {s.gap}"
            f" = {s.adults} {'pear' if s.adults == 1 else 'pears'}. [Adults are the pears here|Here the adults play the"
            f" pears]: {self.tickets} × {self.child_price} = {self.floor}, {self.takings} - {self.floor} ="
            f" {self.surplus}, and {self.surplus} / {self.gap} = {self.adults}. So there are {self.adults} adults."
        )

    def socratic(self) -> str:
        return self.dialogue(
            (
                "What if all tickets were child tickets?",
                f"They would bring {self.tickets} × {self.child_price} = {self.floor} dollars.",
            ),
            (
                "[How far off is that?|How much is then missing?]",
                f"{self.takings} - {self.floor} = {self.surplus} dollars.",
            ),
            (
                "What does [changing one child into an adult|one adult] add?",
                f"{self.adult_price} - {self.child_price} = {self.gap} dollars.",
            ),
            (
                "[So how many adults explain the gap?|How many adults is that?]",
                f"{self.surplus} / {self.gap} = {self.adults} adults.",
            ),
        )

    def _test(self, adults: int) -> str:
        children = self.tickets - adults
        takings = self.adult_price * adults + self.child_price * children
        return f"{adults} adults: {self.adult_price} × {adults} + {self.child_price} × {children} = {takings}"

    def contrastive(self) -> str:
        return self.contrast(
            f"[Test|Check] some splits of {self.tickets} tickets against ${self.takings}.",
            (self._test(self.adults), "this matches the takings"),
            (
                (f"[About half|Split evenly], {self._test(self.half)}", f"this is not {self.takings}"),
                (f"[Roles swapped|The other way round], {self._test(self.children)}", f"this is not {self.takings}"),
            ),
            f"[There are|So there are] {self.adults} adults.",
        )

    def counterfactual(self) -> str:
        c = self.changed
        more = c.adults - self.adults
        extra = "one more adult" if more == 1 else f"{more} more adults"
        return self.say(
            f"[Suppose|Imagine|Say|Pretend] {extra} came, so {c.tickets} tickets brought ${c.takings}. All at the child"
            f" price would give {c.tickets} × {c.child_price} = {c.floor}, the surplus {c.takings} - {c.floor} ="
            f" {c.surplus}, and {c.surplus} / {c.gap} = {c.adults} adults. So the surplus over the child price,"
            f" ${self.gap} per adult, [decides|fixes] the count. For the real {self.tickets} tickets it is"
            f" {self.takings} - {self.floor} = {self.surplus}, and {self.surplus} / {self.gap} = {self.adults} adults."
        )
