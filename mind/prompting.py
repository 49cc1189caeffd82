"""What the student reads and writes: prompt, rationale and answer suffix as token ids, and the answer read back.

One training sequence is

    prompt_ids(question) + rationale_ids(text) + suffix_ids(answer)

The three are tokenised separately and concatenated, so the last A ids (the suffix) are the same in all rationales of a
question. The prompt is never supervised; the suffix ends with the token at which generation stops.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "{answer}"  # the placeholder in PromptFormat.answer_suffix
PLAIN_TEMPLATE = "Question: {question}\nAnswer:\n"  # for a tokenizer without a chat template


@dataclass(frozen=True)
class PromptFormat:
    """How a question and a rationale become one training sequence.

    answer_suffix: what follows every rationale. It holds "{answer}" exactly once, with some text before it, by which
        `extract_answer` finds the answer again. Only "{answer}" is replaced, so LaTeX needs no doubled braces:
        "\\n\\\\boxed{{answer}}" gives "\\n\\\\boxed{42}".

    Raises: ValueError when the suffix does not hold "{answer}" once or has no text before it.
    """

    answer_suffix: str = "\nThe answer is {answer}."

    def __post_init__(self) -> None:
        if self.answer_suffix.count(ANSWER) != 1:
            raise ValueError(f'answer_suffix must contain "{ANSWER}" exactly once, got {self.answer_suffix!r}')
        if not self.answer_suffix.partition(ANSWER)[0].strip():
            raise ValueError(f'answer_suffix must have text before "{ANSWER}", got {self.answer_suffix!r}')

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        """Ids of the question up to where the student starts to write.

        The tokenizer's chat template with its generation prompt when there is one (the template writes the BOS token
        itself, if the model has one), otherwise PLAIN_TEMPLATE, where the tokenizer adds what it puts before a text.
        """
        if tokenizer.chat_template:
            text = chat_text(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
            return tokenizer(text, add_special_tokens=False).input_ids
        ids = tokenizer(PLAIN_TEMPLATE.replace("{question}", question)).input_ids
        # A tokenizer may also close every text with EOS, but this one goes on.
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids

    def rationale_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Ids of the rationale, stripped of outer whitespace; "<|im_end|>" written in it is text, not the token."""
        return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True).input_ids

    def suffix_ids(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
        """Ids of the answer suffix and the end-of-turn token: the A supervised ids that all rationales share."""
        return [*_continuation_ids(tokenizer, self.answer_suffix.replace(ANSWER, answer)), end_of_turn_id(tokenizer)]

    def extract_answer(self, generated: str) -> str | None:
        """The answer in a generated text, or None: what stands where `answer_suffix` has "{answer}", last occurrence.

        The text before the answer is matched whatever its case and spacing; it, the answer, or both together may be
        emphasised ("**…**"). The answer reaches to the text that closes the suffix (for a "}" the one that balances,
        for a "." one that is not a decimal point) or to the end of the line; outer whitespace, periods and colons are
        dropped. So with the default suffix an answer that itself holds a period and a space ("St. Ives") is cut there:
        `mind.data.check_answer` refuses such data, which want a suffix without a period.
        """
        opening = self.find_opening(generated)
        if opening is None:
            return None
        rest = re.sub(r"^:?\*+(?=[ \t:])", "", generated[opening.end() :]).lstrip(" \t:")
        line = rest.partition("\n")[0]
        answer = _up_to(line, self.answer_suffix.partition(ANSWER)[2].strip()).strip()
        if answer.count("**") % 2:  # emphasis whose other end is no part of the answer
            answer = answer.removesuffix("**") if answer.endswith("**") else answer.removeprefix("**")
        return answer.strip().rstrip(".").strip() or None

    def find_opening(self, generated: str) -> re.Match[str] | None:
        """Where the suffix's text before the answer stands in a generated text, last occurrence; no part of a word."""
        before = self.answer_suffix.partition(ANSWER)[0]
        opening = r"\s+".join(map(re.escape, before.split()))
        if re.search(r"\w\s+$", before):  # "The answer is", not "The answer isn't"
            opening += r"(?![^\W\d_])"
        return next(reversed(list(re.finditer(opening, generated, flags=re.IGNORECASE))), None)


def chat_text(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    """The turns as the tokenizer's chat template writes them.

    Raises: ValueError naming the tokenizer and what is wrong with its template.
    """
    from jinja2 import TemplateError  # here because `mind problems` needs no template

    try:
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r}: its chat template cannot be used: {type(error).__name__}: {error}"
        ) from error


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends the student's turn, at which its generation stops.

    With a chat template it is the first special token the template writes after an assistant's turn ("<|im_end|>",
    "<end_of_turn>", "<|eot_id|>", "</s>" …), otherwise the tokenizer's EOS.

    Raises: ValueError when the tokenizer has neither, or as `chat_text`.
    """
    if tokenizer.chat_template:
        probe = "4d494e44"  # any text that no template holds
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
        tail = chat_text(tokenizer, turns).rpartition(probe)[2]
        for token_id in tokenizer(tail, add_special_tokens=False).input_ids:
            # The special tokens are exactly those that this kind of decoding drops; all_special_ids lacks some of them.
            # A sentencepiece "▁" alone is dropped by any decoding.
            if tokenizer.decode([token_id], skip_special_tokens=True) == "" != tokenizer.decode([token_id]):
                return token_id
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no EOS token and its chat template ends no turn, wanted one of the two")
    return tokenizer.eos_token_id


def token_that_differs(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str, other_name: str
) -> str | None:
    """The first token of `tokenizer` that `other` has not at the same id, told in words; None: all are there."""
    other_ids = other.get_vocab()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if other_ids.get(token) != token_id:
            has = f"has as its token {other_ids[token]}" if token in other_ids else "does not have"
            return f"token {token_id} of {name} is {token!r}, which {other_name} {has}"
    return None


def _continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that stands in the middle of a sequence: without the space sentencepiece puts before a text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if not ids or not tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁") or text.startswith(" "):
        return ids
    # Behind another text no space is put; the ids of that text alone are then cut off again, if nothing merged with it.
    for before in ("\n", "?"):
        anchor = tokenizer(before, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = tokenizer(before + text, add_special_tokens=False, split_special_tokens=True).input_ids
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
    raise ValueError(f"tokenizer merges {text!r} with a line break and with a question mark, wanted one that does not")


def _up_to(line: str, closing: str) -> str:
    """The line up to the first `closing` outside braces that a letter or digit does not follow; all of it otherwise."""
    if not closing:
        return line
    depth = 0
    for i, char in enumerate(line):
        if depth == 0 and line.startswith(closing, i) and not line[i + len(closing) :][:1].isalnum():
            return line[:i]
        depth += (char == "{") - (char == "}")
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Comparing answers

MAX_EXPRESSION_LENGTH = 256  # characters; a longer "answer" is compared as text only
TIME_LIMIT = 2  # seconds for parsing or comparing one expression
TOLERANCE = Fraction(1, 10**6)  # relative below 1, absolute above: two different whole numbers never match

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_TIMES_TEN = r"\s*(?:\\times|\\cdot|[*×x])\s*10\^"
# A unit: words, with ^2 or ^{-1}, but not the rest of "3 and a half". What may be algebra is left to math-verify: one
# letter, except before "/s" and in "a day", xy, pi or sqrt; without a space before it ab, too.
_UNIT_BEHIND = r"""(?:(?:\s+|(?=[^\W\d_]{2}|°)(?!(?-i:(?!cc)[abcxyz]+)\b))
    (?!(?:[a-z](?!/s\b|(?<=a)\s[a-z]{2})|[xyz]+|pi|sqrt|and)\b)
    [^\W\d_°](?:[^\d\\=+*<>^]|\^\{?-?[1-4]\}?)*|\s*°[cf]?)?"""
_NUMBER = re.compile(
    rf"""[$€£¥₹]?\s*(?P<sign>[-+]?)\s*[$€£¥₹]?\s*
    (?:(?P<whole>\d+)\s+(?=\d+\s*/))?                  # 3 1/2
    (?P<numerator>{_DIGITS})(?:(?:e|{_TIMES_TEN})(?P<exponent>[-+]?\d{{1,2}}))?
    (?:\s*/\s*(?P<denominator>{_DIGITS}))?
    (?:\s*(?P<scale>{"|".join(_SCALES)})s?\b)?
    (?:\s*(?:(?P<percent>%|percent\b)|[$€£¥₹¢]))?
    {_UNIT_BEHIND}""",
    re.VERBOSE | re.IGNORECASE,
)
# The names of one unit a line, in the singular; m may be any of three.
_UNITS = tuple(
    frozenset(names.split())
    for names in (
        "nm nanometer nanometre",
        "μm micron micrometer micrometre",
        "mm millimeter millimetre",
        "cm centimeter centimetre",
        "m meter metre",
        "km kilometer kilometre",
        "in inch inches",
        "ft foot feet",
        "yd yard",
        "m mi mile",
        "mg milligram",
        "g gram",
        "kg kilogram",
        "oz ounce",
        "lb pound",
        "ml milliliter millilitre",
        "l liter litre",
        "s sec second",
        "m min minute",
        "h hr hour",
        "day",
        "week",
        "month",
        "yr year",
        "°c",
        "°f",
        "$ dollar",
        "€ euro",
        "£ pound",
        "¥ yen",
        "₹ rupee",
        "¢ cent",
    )
)
_UNIT = r"(?:(?:square|cubic)\s+)?(?:[^\W\d_]+|°\s*[cf]|[$€£¥₹¢])(?:\^\{?[1-4]\}?)?"
_WITH_UNIT = re.compile(
    rf"""(?:.*=)?\s*(?:[-+]?\s*([$€£¥₹])\s*[-+]?[\d.][^$]*
    | [-+\d.,/\s]*\d(?:{_TIMES_TEN}[-+]?\d+)?\s*({_UNIT}(?:\s*(?:/|\bper\b)\s*{_UNIT})*))""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_RELATION = re.compile("[=<>]")
_LIST = re.compile(r"[;\n]|,(?!\d{3}(?!\d))|\\\\|\b(?:and|or)\b", re.IGNORECASE)  # the comma of 1,000 makes none
_BRACKETS = re.compile(r"\([^()]*\)")
_FRAME = re.compile(
    r"\$+([^$]+)\$+ | \\\((.+)\\\) | \\\[(.+)\\\] | \*\*(.+)\*\*"
    r"| \\(?:boxed|text|mathrm|mbox|textbf|textit)\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}",
    re.VERBOSE | re.DOTALL,
)
_EMPHASIS = re.compile(r"(?<![^\s(])(\*{1,3}|`)(?=[^\s*`])(.{1,256}?)(?<=[^\s*`])\1(?![\w(*`])")
_OPTION = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\(([A-Za-z])\)[.:]?|\[([A-Z])\][.:]?|([A-Z])(?:\)[.:]?|[.:]))(?:\s.*)?", re.DOTALL
)
_OPTION_ALONE = re.compile(r"(?:(?:option|choice)\s+)?[(\[]?([A-Z])[)\]]?[.:]?", re.IGNORECASE)
_INITIAL = re.compile(r"[A-Z]\.\s*(.+)", re.DOTALL)  # of a name, or an option's letter
_BOUND = rf"[$€£¥₹]?(?:{_DIGITS})%?"
_PARTS = re.compile(  # 7:30 pm and 3:4, 7 pm, 5-10 minutes and 2020-03-05, 3/5/2020
    rf"""(\d+(?:\s*:\s*\d+)+ | \d+(?=\s*[ap]\.?\s?m\b) | {_BOUND}(?:\s*-\s*{_BOUND})+ | \d+(?:\s*/\s*\d+){{2,}})
    (?:\s*([ap])\.?\s?m\b\.?)?{_UNIT_BEHIND}""",
    re.VERBOSE | re.IGNORECASE,
)
_EDGES = re.compile(r"""^(?:["'“”‘’,;:!?\s]|\.(?!\d))+|["'“”‘’.,;:!?\s]+$""")  # but for the period of .5
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
# 1 000 with a space, one that does not break, or LaTeX's; not the whole of a mixed number
_THOUSANDS_SPACE = re.compile(r"(?<=\d)(?:[ \u00a0\u2009\u202f]|\\,)(?=\d{3}(?!\d|\s*/))")
_MIXED = re.compile(r"(?<![\d/.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])")  # 3 1/2, which LaTeX would multiply
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_FUNCTION = re.compile(r"(?<![\\a-z])(ln|log|sin|cos|tan|cot|sec|csc)(?![a-z])")  # without LaTeX's backslash
_ROOT = re.compile(r"(?:√|(?<![\\a-z])sqrt)\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-z]))")
# No word: what math-verify may read. Of letters alone only p - q, which hyphenated words do not resemble.
_EXPRESSION = re.compile(r".*[\d\\^+*/=<>].*|-?\s*[a-z]\s*-\s*[a-z]|-\s*[a-z]", re.IGNORECASE | re.DOTALL)
_BOTH = re.compile(r"(?:yes|no|true|false)\W*(?:/|\b(?:or|and)\b)\W*(?:yes|no|true|false)\b")
_TRUTH = {"yes": True, "true": True, "no": False, "false": False}


def answers_match(given: str | None, wanted: str) -> bool:
    """Whether two answers have the same value. Any text is allowed; an answer that cannot be read matches nothing.

    In this order: the same words (case, spacing, final punctuation and a leading article aside); option letters
    ("(B)", "B.", "B) 12 cm", but not two names, "E. coli" and "E. faecalis"); yes/no and true/false by the first word,
    but neither of "yes or no"; clock times, ratios, ranges, scores and dates in figures part by part where both are;
    numbers (thousands commas, decimals, 3 \\times 10^8, fractions, mixed numbers, percentages, currency signs; what
    follows the last "=", but not of a wanted equation, "x + 2y = 5"), where 75 % matches both 75 and 0.75, 5 million
    both 5,000,000 and 5; the rest, LaTeX, algebra and several statements ("x = 3, y = 5"), by math-verify, which takes
    "12-5" for 7. Fractions, powers and roots may be Unicode's: ½, x², √2.

    A unit may be missing ("5 km" matches "5", "5 km/h" matches "5 km") and is never converted; two units differ where
    both are among _UNITS, by whatever name: "5 km" does not match "5 m", "5 m²" and "5 m/s" not "5 m^3" and "5 m/min".

    A list without brackets is a set, as the solutions of an equation are: "1, -2" matches "-2, 1", and "A and C" both
    "C, A" and "(C), (A)", but not "A or C". Where the order counts, write the wanted one in parentheses: "(1, 2, 3)"
    matches "1, 2, 3", but not "3, 2, 1".

    Numbers match to TOLERANCE. math-verify limits its own time by SIGALRM, which only the main thread can set: called
    in another thread the comparison runs in a child process (about 2 s, only for answers that are not plain numbers).
    """
    if given is None:
        return False
    given, wanted = _clean(given), _clean(wanted)
    if not given or not wanted:
        return False
    factorial = re.search(r"[\d)]!$", wanted) and not given.endswith("!")  # 5 is not 5!, but "5!" may exclaim
    if given == wanted or (_words(given) == _words(wanted) != "" and not factorial):
        return True
    if max(len(given), len(wanted)) > MAX_EXPRESSION_LENGTH:
        return False
    given_option, wanted_option = _option(given), _option(wanted)
    if given_option and wanted_option:
        return given_option == wanted_option and not _other_names(given, wanted)
    if _words(wanted) in _TRUTH:
        words = _words(given).lstrip("(")
        first_word = re.split(r"\W", words, maxsplit=1)[0]
        return _TRUTH.get(first_word) == _TRUTH[_words(wanted)] and not _BOTH.match(words)
    for (given_rows, given_power), (wanted_rows, wanted_power) in zip(_units(given), _units(wanted), strict=False):
        if given_power != wanted_power or not given_rows & wanted_rows:
            return False
    wanted_list = _list(wanted)
    if len(wanted_list) > 1 and wanted_list == _list(given):
        return True
    given_parts, wanted_parts = _PARTS.fullmatch(given), _PARTS.fullmatch(wanted)
    if given_parts and wanted_parts:
        return _same_parts(given_parts, wanted_parts)
    given_value, wanted_value = _number(given), None if _is_equation(wanted) else _number(wanted)
    if given_value and wanted_value:
        return _same_number(given_value, wanted_value)
    if _EXPRESSION.fullmatch(wanted):
        return _same_expression(given, wanted)
    return False


def is_number(answer: str) -> bool:
    """Whether answers_match compares this wanted answer as a number: one that guessing among options does not hit."""
    answer = _clean(answer)
    return len(answer) <= MAX_EXPRESSION_LENGTH and not _is_equation(answer) and _number(answer) is not None


def is_option(answer: str) -> bool:
    """Whether a wanted answer is an option's letter, with or without its text; not what may be a name, "E. coli"."""
    answer = _clean(answer)
    return _option(answer) is not None and _INITIAL.fullmatch(answer) is None


def _clean(text: str) -> str:
    """Without typographic variants, emphasis and what only frames an answer: $…$, \\boxed{…}, a final period."""
    text = re.sub(r"(?<=\d),\s*\\!\s*(?=\d)", ",", text)  # 11,\! 111
    text = _THOUSANDS_SPACE.sub("", text)
    text = _SUPERSCRIPT.sub(lambda match: "^" + _braced(match[0].translate(_RAISED)), text)
    text = re.sub(r"(?<=10\^)\{([-+−]?\d+)\}", r"\1", text)  # 10^{-9}, of which _verify makes LaTeX again
    # 12\text{ cm}, 12\,\mathrm{~cm}
    text = re.sub(r"(?<=\d)(?:[\s~]|\\[,;: ])*\\(?:text|mathrm|mbox)\{~?([^{}]*)\}", r" \1", text)
    text = _EMPHASIS.sub(r"\2", text)
    for old, new in (("−", "-"), ("–", "-"), ("\u00a0", " "), ("\u202f", " "), ("\\$", "$"), ("\\%", "%"), ("\\!", "")):
        text = text.replace(old, new)
    text = text.replace("{,}", ",").replace("∞", "\\infty ").replace("\\degree", "°")
    text = re.sub(r"π|(?<![\\a-z])pi\b", r"\\pi ", text, flags=re.IGNORECASE)
    text = _VULGAR_FRACTION.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/"), text)
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text)
    text = re.sub(r"(?<=\d)\s*·\s*(?=\d)", r" \\cdot ", text)
    while True:
        text = text.strip().rstrip(".").strip()
        framed = _FRAME.fullmatch(text)
        if framed is None:
            return text
        text = next(group for group in framed.groups() if group is not None)


def _braced(exponent: str) -> str:
    return exponent if len(exponent) == 1 else f"{{{exponent}}}"


def _words(text: str) -> str:
    """Case-folded, single-spaced, without a leading article or outer quotes and punctuation."""
    words = _EDGES.sub("", " ".join(text.casefold().split()))
    return re.sub(r"^(?:the|an|a) (?=.)", "", words)


def _option(text: str) -> str | None:
    """The letter of a multiple-choice answer, upper case; None of several, "(A) and (B)"."""
    letters = [part for part in _LIST.split(text) if part.strip()]
    if len(letters) > 1 and all(map(_option_match, letters)):
        return None
    match = _option_match(text)
    return next(group for group in match.groups() if group).upper() if match else None


def _option_match(text: str) -> re.Match[str] | None:
    return _OPTION_ALONE.fullmatch(text.strip()) or _OPTION.fullmatch(text.strip())


def _list(text: str) -> set[str]:
    """Option letters or words of a list, and "or" where it has one; empty with brackets around it or numbers within."""
    parts = [part.strip() for part in _LIST.split(text)]
    around = any(len(re.findall(r"[(\[]", part)) != len(re.findall(r"[)\]]", part)) for part in parts)
    if around or re.search(r"[\d\\^+*/=<>]", text):
        return set()
    found = {match[1].casefold() if (match := _OPTION_ALONE.fullmatch(part)) else _words(part) for part in parts}
    return (found | set(re.findall(r"\bor\b", text.casefold()))) - {""}


def _other_names(given: str, wanted: str) -> bool:
    """Whether both are a letter, a period and words of which they share none: no option is meant then."""
    names = [match[1] for match in map(_INITIAL.fullmatch, (given, wanted)) if match]
    if len(names) < 2 or answers_match(*names):
        return False
    words, others = (set(re.findall(r"\w+", name.casefold())) for name in names)
    return words.isdisjoint(others)


def _same_parts(given: re.Match[str], wanted: re.Match[str]) -> bool:
    """07:30 = 7:30, 7 pm = 7:00 pm, 3 : 4 = 3:4; "am" or "pm" counts when the wanted answer has it."""
    parts = [[Fraction(part.replace(",", "")) for part in re.findall(_DIGITS, match[1])] for match in (given, wanted)]
    one, other = (part if len(part) > 1 else [*part, Fraction(0)] for part in parts)  # an hour alone
    halves = [(match[2] or "").lower() for match in (given, wanted)]
    return one == other and halves[1] in ("", halves[0])


def _number(text: str) -> tuple[Fraction, bool, int] | None:
    """(value, whether it has a percent sign, 10⁶ of "million") of a plain number, exact; None for anything else."""
    if any(map(_LIST.search, _RELATION.split(_BRACKETS.sub("", text))[1:-1])):  # x = 3, y = 5 is not 5
        return None
    match = _NUMBER.fullmatch(re.split(r"(?<![<>!:])=", text)[-1].strip())
    if match is None:
        return None
    value = Fraction(match["numerator"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    if match["denominator"] is not None:
        denominator = Fraction(match["denominator"].replace(",", ""))
        if denominator == 0:
            return None
        value /= denominator
    value += int(match["whole"] or 0)
    scale = _SCALES[match["scale"].lower()] if match["scale"] else 1
    return (-value if match["sign"] == "-" else value), match["percent"] is not None, scale


def _is_equation(text: str) -> bool:
    """Whether a formula stands before the last "=": x + 2y = 5 is not 5, as x = 5 and 2 + 3 = 5 are."""
    left = _BRACKETS.sub("", text).rpartition("=")[0]
    return re.search(r"[-+*/^]", left) is not None and re.search(r"[^\W\d_]", left) is not None


def _units(text: str) -> list[tuple[set[int], int]]:
    """(rows of _UNITS that it may be, power) of a number's unit and of each that it is per, up to the first unknown."""
    match = _WITH_UNIT.fullmatch(text)
    if match is None:
        return []
    found = []
    for unit in re.split(r"/|\bper\b", (match[1] or match[2]).casefold()):
        name, _, exponent = "".join(unit.split()).partition("^")
        power = int(exponent.strip("{}") or 2 * name.startswith("square") + 3 * name.startswith("cubic") or 1)
        name = name.removeprefix("square").removeprefix("cubic")
        rows = {row for row, names in enumerate(_UNITS) if name in names or name.removesuffix("s") in names}
        if not rows:
            break
        found.append((rows, power))
    return found


def _same_number(given: tuple[Fraction, bool, int], wanted: tuple[Fraction, bool, int]) -> bool:
    candidates = [(given[0] * given[2], wanted[0] * wanted[2])]
    if (given[2] == 1) != (wanted[2] == 1):  # 5 million is written as 5,000,000 and, where the question counts so, as 5
        candidates.append((given[0], wanted[0]))
    if given[1] != wanted[1]:  # 75 % is written as 75 and as 0.75
        candidates.append((given[0] / 100 if given[1] else given[0] * 100, wanted[0]))
    return any(abs(one - other) <= TOLERANCE * min(Fraction(1), abs(other)) for one, other in candidates)


def _same_expression(given: str, wanted: str) -> bool:
    """math-verify's verdict, within a time limit on any thread."""
    if threading.current_thread() is threading.main_thread():
        return _verify(given, wanted)
    program = "import json, sys; from mind.prompting import _verify; sys.exit(3 - 3 * _verify(*json.load(sys.stdin)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([given, wanted]),  # ASCII, whatever the answers hold
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    if child.returncode not in (0, 3):
        raise RuntimeError(f"comparing answers in a child process failed: {child.stderr.strip()[-500:]}")
    return child.returncode == 0


def _verify(given: str, wanted: str) -> bool:
    """Whether sympy finds two expressions equal; False when one cannot be read or the time is up. Main thread only."""
    import math_verify  # here because it takes a second to import sympy and most answers are plain numbers

    parsed = []
    for text in (wanted, given):
        # The whole text is one expression, not the first number in a sentence.
        text = re.sub(r"(?<=10\^)([-+]?\d+)", r"{\1}", _FUNCTION.sub(r"\\\1", text))
        text = re.sub(r",\s*(?:and|or)\b", ",", text)
        text = _MIXED.sub(r"\1\\frac{\2}{\3}", text.replace("°", "^\\circ "))
        latex = text if re.search(r"\$|\\\(|\\\[", text) else f"${text}$"
        config = [math_verify.LatexExtractionConfig()]
        parsed.append(math_verify.parse(latex, config, fallback_mode="no_fallback", parsing_timeout=TIME_LIMIT))
    return bool(math_verify.verify(*parsed, timeout_seconds=TIME_LIMIT, allow_set_relation_comp=True))
