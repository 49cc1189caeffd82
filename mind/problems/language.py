"""Small pieces of English: people and their pronouns, countable nouns, numbers, and `[this|that]` alternatives."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Person:
    """A name with its pronouns."""

    name: str
    he: str  # "he" | "she"

    @property
    def him(self) -> str:
        return "him" if self.he == "he" else "her"

    @property
    def his(self) -> str:
        return "his" if self.he == "he" else "her"

    @property
    def He(self) -> str:
        return self.he.capitalize()

    def __str__(self) -> str:
        return self.name


_HE = "Adam Arjun Ben Carlos Dario Emil Felix Hassan Ivan Jonas Kofi Liam Mateo Nikhil Omar Pavel Ravi Tomas Victor"
_SHE = "Amina Bea Chloe Dina Esther Fatima Grace Hana Ines Julia Keiko Lena Maya Nora Olga Priya Rosa Sofia Tara Zoe"
PEOPLE = tuple(Person(name, "he") for name in _HE.split()) + tuple(Person(name, "she") for name in _SHE.split())

_ALTERNATIVES = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


def spin(text: str, rng: random.Random) -> str:
    """Replace every `[a|b|c]` in text by one of its alternatives, drawn uniformly; brackets may be nested."""
    while match := _ALTERNATIVES.search(text):
        text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]
    return text


def number(value: Fraction | int) -> str:
    """A number as it is written: "12", "-3", "7.25" where the decimal ends within four places, else "5/6"."""
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    if 10**4 % value.denominator == 0:
        return f"{float(value):.4f}".rstrip("0")
    return f"{value.numerator}/{value.denominator}"


@dataclass(frozen=True)
class Noun:
    """A countable noun; `Noun("scarf", "scarves").count(3)` is "3 scarves"."""

    one: str
    many: str

    def count(self, value: Fraction | int) -> str:
        return f"{number(value)} {self.one if value == 1 else self.many}"


def money(value: Fraction | int) -> str:
    """Dollars: "$12", or "$12.50" where there are cents."""
    value = Fraction(value)
    return f"${value.numerator}" if value.denominator == 1 else f"${float(value):.2f}"


def listing(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def capital(text: str) -> str:
    """The text with its first letter in upper case and the rest as it was."""
    return text[:1].upper() + text[1:]
