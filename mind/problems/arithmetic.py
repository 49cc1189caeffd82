"""Checks the arithmetic written in a rationale by executing it with exact fractions.

What is read: numbers (`12`, `7.25`, `$4`, `30%`, `5/6`), one-letter symbols (`x`, `t`, `n1`, `p_a`), `+ - × * / ^ mod`,
`p% of q`, parentheses, a number or symbol directly before a symbol or parenthesis (`2x`, `3(a + b)`), and the relations
`= ≠ < > ≤ ≥`, which may be chained. Any word or other punctuation ends an expression, so units may follow a result but
may not stand inside an expression.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TOKEN = re.compile(
    r"""(?P<number>\$?\d+(?:\.\d+)?%?)
      | (?P<relation>[=≠<>≤≥])
      | (?P<mod>\bmod\b)
      | (?P<of>\bof\b)
      | (?P<operator>[-−+×*/÷^])
      | (?P<left>\()
      | (?P<right>\))
      | (?P<symbol>(?<![\w'’])[A-Za-zα-ω](?:_\w|\d)?(?![\w'’])|(?<=\d)[a-z](?![\w'’]))
      | (?P<prose>\w+|[^\w\s])""",
    re.VERBOSE,
)
_HOLDS = {
    "=": lambda a, b: a == b,
    "≠": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "≤": lambda a, b: a <= b,
    "≥": lambda a, b: a >= b,
}
_SAME_OPERATOR = {"−": "-", "*": "×", "÷": "/", "of": "×"}


Exact = Fraction | int  # never a float


class _UnboundError(Exception):
    """A symbol has no value yet."""


class _UnreadableError(Exception):
    """Not an expression."""


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    spaced: bool  # whether white space stands before it


@dataclass(frozen=True)
class _Relation:
    """A chain such as `c = 3 × 4 = 12`: members[0] signs[0] members[1] …; a member is empty where prose stands."""

    members: tuple[tuple[_Token, ...], ...]
    signs: tuple[str, ...]

    def __str__(self) -> str:
        parts = [_written(self.members[0])]
        for sign, member in zip(self.signs, self.members[1:], strict=True):
            parts += [sign, _written(member)]
        return " ".join(parts).strip()


def _written(tokens: tuple[_Token, ...]) -> str:
    return "".join((" " if token.spaced else "") + token.text for token in tokens).strip()


def _relations(text: str) -> list[_Relation]:
    """All chains of relations in the text, in order."""
    segments: list[list[_Token]] = [[]]
    end = 0
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        token = _Token(kind, match[0], spaced=match.start() > end)
        line_break = "\n" in text[end : match.start()]
        end = match.end()
        before = segments[-1][-1] if segments[-1] else None
        if kind == "of" and not (before is not None and before.text.endswith("%")):
            kind = "prose"
        if kind == "prose":
            segments.append([])
            continue
        two_operands = (
            before is not None
            and before.kind in ("number", "symbol", "right")
            and kind in ("number", "symbol", "left")
            and token.spaced
        )
        if two_operands or line_break:
            segments.append([])
        segments[-1].append(token)
    found = []
    for segment in segments:
        members: list[list[_Token]] = [[]]
        signs = []
        for token in segment:
            if token.kind == "relation":
                signs.append(token.text)
                members.append([])
            else:
                members[-1].append(token)
        if signs:
            found.append(_Relation(tuple(tuple(member) for member in members), tuple(signs)))
    return found


class _Evaluator:
    """Recursive descent over one member: sum → product → power → operand."""

    def __init__(self, tokens: tuple[_Token, ...], values: dict[str, Exact]) -> None:
        self.tokens = tokens
        self.values = values
        self.position = 0

    def run(self) -> Exact:
        value = self._sum()
        if self.position != len(self.tokens):
            raise _UnreadableError
        return value

    def _peek(self) -> _Token | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def _operator(self, wanted: str) -> str | None:
        """The next token as an operator, consumed, if it is one of the wanted ones."""
        token = self._peek()
        if token is None or token.kind not in ("operator", "mod", "of"):
            return None
        operator = _SAME_OPERATOR.get(token.text, token.text)
        if operator not in wanted.split():
            return None
        self.position += 1
        return operator

    def _sum(self) -> Exact:
        value = -self._product() if self._operator("-") else self._product()
        while operator := self._operator("+ -"):
            right = self._product()
            value = value + right if operator == "+" else value - right
        return value

    def _product(self) -> Exact:
        value = self._power()
        while True:
            following = self._peek()
            if following is not None and following.kind in ("symbol", "left") and not following.spaced:
                value *= self._power()
            elif operator := self._operator("× / mod"):
                right = self._power()
                if operator != "×" and right == 0:
                    raise _UnreadableError
                if operator == "×":
                    value *= right
                else:
                    value = Fraction(value) / right if operator == "/" else value % right
            else:
                return value

    def _power(self) -> Exact:
        value = self._operand()
        if self._operator("^"):
            exponent = self._power()
            if exponent.denominator != 1 or not 0 <= exponent <= 64:
                raise _UnreadableError
            value **= exponent.numerator
        return value

    def _operand(self) -> Exact:
        token = self._peek()
        if token is None:
            raise _UnreadableError
        self.position += 1
        if token.kind == "number":
            digits = token.text.strip("$%")
            value = Fraction(digits) if "." in digits else int(digits)
            return Fraction(value, 100) if token.text.endswith("%") else value
        if token.kind == "symbol":
            if token.text not in self.values:
                raise _UnboundError
            return self.values[token.text]
        if token.kind == "left":
            value = self._sum()
            closing = self._peek()
            if closing is None or closing.kind != "right":
                raise _UnreadableError
            self.position += 1
            return value
        if token.text in "-−":
            return -self._operand()
        raise _UnreadableError


def _value(tokens: tuple[_Token, ...], values: dict[str, Exact]) -> Exact | None:
    """The member's value; None where a symbol in it has none. Raises _UnreadableError."""
    try:
        return _Evaluator(tokens, values).run()
    except _UnboundError:
        return None


def _bound_values(relations: list[_Relation]) -> dict[str, Exact]:
    """symbol -> value, for every symbol that stands alone in a chain of `=` beside something known."""
    values: dict[str, Exact] = {}
    equated = []  # what each chain equates before any other relation: a and b of `a = b ≠ c`
    for relation in relations:
        signs = "".join(relation.signs)
        equated.append(relation.members[: 1 + len(signs) - len(signs.lstrip("="))])
    found = True
    while found:
        found = False
        for members in equated:
            lone = [member[0].text for member in members if len(member) == 1 and member[0].kind == "symbol"]
            unknown = [symbol for symbol in lone if symbol not in values]
            if not unknown:
                continue
            for member in members:
                try:
                    value = _value(member, values)
                except _UnreadableError:
                    continue  # `examine` reports it
                if value is not None:
                    values.update(dict.fromkeys(unknown, value))
                    found = True
                    break
    return values


def examine(text: str) -> tuple[list[str], int]:
    """The violations of `check_rationale`, and how many relations between two known values were executed."""
    relations = _relations(text)
    values = _bound_values(relations)
    violations = []
    executed = 0
    for relation in relations:
        try:
            known = [_value(member, values) if member else None for member in relation.members]
        except _UnreadableError:
            violations.append(f"cannot read '{relation}'")
            continue
        last = known[0]
        for sign, value in zip(relation.signs, known[1:], strict=True):
            if last is not None and value is not None:
                executed += 1
                if not _HOLDS[sign](last, value):
                    violations.append(f"'{relation}' is false: {last} {sign} {value}")
            if value is not None or sign != "=":
                last = value
    return violations, executed


def check_rationale(text: str) -> list[str]:
    """Every relation written in the text that does not hold or cannot be read, one line each; empty when all is right.

    A symbol takes the value that the text gives it (`c = 3 × 4 = 12`), and equations that hold the symbol are then
    checked too, whether they stand before or after (`2x + 5 = 31`, later `x = 13`). An equation in a symbol that never
    gets a value is not checked.
    """
    return examine(text)[0]
