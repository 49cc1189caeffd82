"""The procedural problems: answers recomputed another way, contracts of the eight perspectives, splits, the checker."""

from __future__ import annotations

import datetime
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mind.problems import PERSPECTIVES, check_rationale, generate_records
from mind.problems.__main__ import main
from mind.problems.arithmetic import examine
from mind.problems.families import FAMILIES
from mind.problems.families.work import Timetable
from mind.problems.generator import (
    SPLITS,
    ArithmeticMistakeError,
    draw_all,
    permutation,
    record_of,
    space_size,
    split_of,
)
from mind.problems.language import PEOPLE
from mind.problems.problem import CANDIDATE_LABELS, EXECUTION_LABELS, PLAN_LABELS, Problem, Space

NUM_QUESTIONS = 1100  # 50 of each family
NOT_NUMERIC = {"ranking", "prize_box", "fair_share", "calendar"}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Case:
    """A problem beside the record made of it."""

    problem: Any
    record: dict[str, Any]

    @property
    def texts(self) -> dict[str, str]:
        return {rationale["perspective"]: rationale["text"] for rationale in self.record["rationales"]}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    problems = itertools.islice(draw_all(FAMILIES, seed=7, split="train"), NUM_QUESTIONS)
    return [Case(problem, record_of(problem, str(i))) for i, problem in enumerate(problems)]


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


def says(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as a whole number or word; 12.50 dollars say 12.5."""
    if not re.fullmatch(r"-?\d+(\.\d+)?", answer):
        return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None
    return float(answer) in {float(written) for written in re.findall(r"(?<!\d)-?\d+(?:\.\d+)?", text)}


def last_sentence(text: str) -> str:
    return re.split(r"(?<=[.?!:])\s+", text.strip())[-1]


# ---- generation ------------------------------------------------------------------------------------------------------


def test_schema_and_equal_shares(cases: list[Case]) -> None:
    assert len(FAMILIES) >= 12 and len({family.family for family in FAMILIES}) == len(FAMILIES)
    counts = Counter(case.record["source"] for case in cases)
    assert counts == {f"mind-problems/{family.family}": NUM_QUESTIONS // len(FAMILIES) for family in FAMILIES}
    for case in cases:
        record = case.record
        assert set(record) == {"id", "question", "answer", "rationales", "difficulty", "source"}
        assert tuple(r["perspective"] for r in record["rationales"]) == PERSPECTIVES
        assert {r["answer"] for r in record["rationales"]} == {record["answer"]}
        assert len(set(case.texts.values())) == len(PERSPECTIVES)
        assert 0 < record["difficulty"] < 1
    difficulties = [case.record["difficulty"] for case in cases]
    assert max(difficulties) - min(difficulties) > 0.4


def test_same_arguments_same_records_and_a_longer_run_keeps_the_first_ones() -> None:
    long = generate_records(60, seed=3, split="heldout")
    assert generate_records(60, seed=3, split="heldout") == long
    assert generate_records(23, seed=3, split="heldout") == long[:23]
    assert len({record["id"] for record in long}) == 60
    other_seed = generate_records(60, seed=4, split="heldout")
    assert [r["question"] for r in other_seed] != [r["question"] for r in long]


def test_splits_never_share_parameters_or_questions() -> None:
    """Thousands of draws, other seeds on the other side: no parameter set and no question text in both splits."""
    sets: dict[str, set[tuple[Any, ...]]] = {}
    questions: dict[str, list[str]] = {}
    for split, seeds in (("train", (0, 1)), ("heldout", (0, 5))):
        sets[split], questions[split] = set(), []
        for seed in seeds:
            for problem in itertools.islice(draw_all(FAMILIES, seed=seed, split=split), 800):
                problem.dress()
                sets[split].add((problem.family, *sorted(problem.parameters.items())))
                questions[split].append(problem.question())
    assert not sets["train"] & sets["heldout"]
    assert not set(questions["train"]) & set(questions["heldout"])
    for problem_set, split in ((sets[split], split) for split in SPLITS):
        assert {split_of(family, dict(parameters)) for family, *parameters in problem_set} == {split}


def test_no_question_occurs_twice_within_a_split(cases: list[Case]) -> None:
    assert len({case.record["question"] for case in cases}) == len(cases)
    assert len({(c.problem.family, *sorted(c.problem.parameters.items())) for c in cases}) == len(cases)


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000, 4097])
def test_permutation_visits_every_position_once(size: int) -> None:
    order = list(permutation(size, "key"))
    assert sorted(order) == list(range(size))
    assert size < 64 or order != list(permutation(size, "other key"))


class TinyFamily(Timetable):
    family = "tiny"
    space: ClassVar[Space] = {"parts": range(3, 6), "minutes": range(20, 24), "pause": (5, 6)}


def test_exhausted_parameter_space_is_a_clear_error() -> None:
    assert space_size(TinyFamily) == 24
    total = 0
    for split in SPLITS:
        held = len(list(draw_all([TinyFamily], seed=0, split=split)))
        assert len(generate_records(held, split=split, families=[TinyFamily])) == held
        message = rf"num_questions: {held + 1} given.*at most {held} {split}"
        with pytest.raises(ValueError, match=message):
            generate_records(held + 1, split=split, families=[TinyFamily])
        total += held
    assert total == 24
    with pytest.raises(ValueError, match="num_questions: 1000000000000 given"):
        generate_records(10**12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_questions": 0}, "num_questions: 0 given"),
        ({"num_questions": 2.0}, "num_questions: 2.0 given"),
        ({"num_questions": True}, "num_questions: True given"),
        ({"num_questions": 1, "split": "test"}, "split: 'test' given, wanted one of train, heldout"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        generate_records(**arguments)
    assert "\n" not in str(error.value)


# ---- answers, recomputed another way ---------------------------------------------------------------------------------


def shopping(p: dict[str, int]) -> int:
    purse = p["bill"]
    for price in [p["price_a"]] * p["count_a"] + [p["price_b"]] * p["count_b"]:
        purse -= price
    return purse


def discount(p: dict[str, int]) -> Fraction:
    return Fraction(p["price"] * (100 - p["first"]) * (100 - p["second"]), 10_000)


def tickets(p: dict[str, int]) -> int:
    people = p["adults"] + p["children"]
    takings = p["adults"] * p["adult_price"] + p["children"] * p["child_price"]
    (adults,) = (n for n in range(people + 1) if n * p["adult_price"] + (people - n) * p["child_price"] == takings)
    return adults


def travel(p: dict[str, int]) -> Fraction:
    return Fraction(statistics.mean([Fraction(p["speed_a"])] * p["hours_a"] + [Fraction(p["speed_b"])] * p["hours_b"]))


def catch_up(p: dict[str, int]) -> Fraction:
    half_hours = 1
    while p["fast"] * half_hours < p["slow"] * (half_hours + 2 * p["lead"]):
        half_hours += 1
    assert p["fast"] * half_hours == p["slow"] * (half_hours + 2 * p["lead"])
    return Fraction(half_hours, 2)


def joint_work(p: dict[str, int]) -> Fraction:
    done, half_hours = Fraction(0), 0
    while done < p["jobs"]:
        done += Fraction(1, 2 * p["hours_a"]) + Fraction(1, 2 * p["hours_b"])
        half_hours += 1
    assert done == p["jobs"]
    return Fraction(half_hours, 2)


def dripping(p: dict[str, int]) -> Fraction:
    drips = len(range(0, p["hours"] * 60 * 60, p["every"]))
    return Fraction(drips * p["millilitres"], 1000)


def timetable(p: dict[str, int]) -> int:
    clock = end = 0
    for _ in range(p["parts"]):
        end = clock + p["minutes"]
        clock = end + p["pause"]
    return end


def ages(p: dict[str, int]) -> int:
    later = 2 * p["younger"] + p["gap"] + 2 * p["years"]
    (young,) = (a for a in range(100) if (a + p["years"]) + (a + p["gap"] + p["years"]) == later)
    return young


def survey(p: dict[str, int]) -> int:
    first = set(range(p["only_a"] + p["both"]))
    second = set(range(p["only_a"], p["only_a"] + p["both"] + p["only_b"]))
    everybody = set(range(len(first | second) + p["neither"]))
    return len(everybody - first - second)


def averages(p: dict[str, int]) -> int:
    values = [p["mean"]] * p["count"]
    (new,) = (x for x in range(1001) if sum([*values, x]) == p["new_mean"] * (p["count"] + 1))
    return new


def border(p: dict[str, int]) -> int:
    inner = set(itertools.product(range(p["length"]), range(p["width"])))
    sides = (range(-p["path"], p["length"] + p["path"]), range(-p["path"], p["width"] + p["path"]))
    return sum(cell not in inner for cell in itertools.product(*sides))


def fence(p: dict[str, int]) -> int:
    length, width, step = p["spacing"] * p["spans_long"], p["spacing"] * p["spans_wide"], p["spacing"]
    posts = {(x, y) for x in range(0, length + 1, step) for y in (0, width)}
    posts |= {(x, y) for y in range(0, width + 1, step) for x in (0, length)}
    return len(posts) * p["price"]


def ratio(p: dict[str, int]) -> int:
    parts = (p["high"], p["middle"], p["low"])
    total, shares = sum(parts) * p["unit"], [0, 0, 0]
    while sum(shares) < total:  # deal out one round after another
        shares = [share + part for share, part in zip(shares, parts, strict=True)]
    return shares[0] - shares[2]


def fractions(p: dict[str, int]) -> Fraction:
    whole = p["first"] * p["second"] * p["unit"]
    return whole * (1 - Fraction(1, p["first"])) * (1 - Fraction(1, p["second"]))


def mixture(p: dict[str, int]) -> Fraction:
    litres = [Fraction(p["weak"])] * p["litres_a"] + [Fraction(p["strong"])] * p["litres_b"]
    return Fraction(statistics.mean(litres))


def outfits(p: dict[str, int]) -> int:
    choices = itertools.product(range(p["first"]), range(p["second"]), range(p["third"]))
    return sum(not (x == 0 and y < p["banned"]) for x, y, _ in choices)


def savings(p: dict[str, int]) -> int:
    amounts = list(itertools.accumulate([p["start"], *[p["step"]] * (p["times"] - 1)]))
    return sum(amounts)


SOLVERS: dict[str, Callable[[dict[str, int]], Fraction | int]] = {
    solver.__name__: solver
    for solver in (
        *(shopping, discount, tickets, travel, catch_up, joint_work, dripping, timetable, ages, survey, averages),
        *(border, fence, ratio, fractions, mixture, outfits, savings),
    )
}


def solve_ranking(question: str) -> str:
    """From the words alone: known numbers spread along the comparisons, then the place asked for."""
    stated = re.search(r"(?:^|[.] )([A-Z]\w+) \w+ (\d+) \w+\.", question)
    assert stated is not None
    known = {stated[1]: int(stated[2])}
    direct = re.findall(r"([A-Z]\w+) \w+ (\d+) \w+ (more|fewer) than ([A-Z]\w+)", question)
    turned = re.findall(r"ompared with ([A-Z]\w+), ([A-Z]\w+) \w+ (\d+) \w+ (more|fewer)", question)
    links = direct + [(who, step, sign, other) for other, who, step, sign in turned]
    assert len(links) == 3
    for who, step, sign, other in links:
        known[who] = known[other] + (int(step) if sign == "more" else -int(step))
    order = sorted(known, key=lambda name: -known[name])
    place = re.search(r"the (second most|third most|most|fewest)[^?]*\?$", question)
    assert place is not None
    return order[("most", "second most", "third most", "fewest").index(place[1])]


def solve_prize_box(question: str) -> str:
    """From the words alone: try every colour and count the labels that would be true."""
    claims = re.findall(r'(\w+) "It is (not )?(here|in the (\w+) box)"', question)
    (count,) = re.findall(r"Exactly (\d) label", question)
    assert len(claims) == 4
    found = []
    for box in (colour for colour, *_ in claims):
        true = 0
        for colour, denied, where, target in claims:
            named = colour if where == "here" else target
            true += (named == box) != bool(denied)
        if true == int(count):
            found.append(box)
    assert len(found) == 1
    return found[0]


def solve_fair_share(parameters: dict[str, int], question: str) -> str:
    packed = parameters["bags"] * parameters["per_bag"]
    (loose,) = {int(n) for n in re.findall(r"(?:and|plus) (\d+) ", question)}
    pile = packed + loose
    while pile >= parameters["friends"]:
        pile -= parameters["friends"]
    return "no" if pile else "yes"


def solve_calendar(question: str) -> str:
    (start,) = (day for day in DAYS if day in question)
    waits = [int(n) for n in numbers(question)]
    monday = datetime.date(2024, 1, 1)
    assert len(waits) == 2
    return DAYS[(monday + datetime.timedelta(days=DAYS.index(start) + sum(waits))).weekday()]


def test_every_answer_is_what_a_second_solver_finds(cases: list[Case]) -> None:
    assert set(SOLVERS) | NOT_NUMERIC == {family.family for family in FAMILIES}
    for case in cases:
        family, parameters, question = case.problem.family, case.problem.parameters, case.record["question"]
        answer = case.record["answer"]
        if family in SOLVERS:
            assert Fraction(answer) == SOLVERS[family](parameters), (family, parameters)
            assert Fraction(answer) > 0
        elif family == "ranking":
            assert answer == solve_ranking(question), question
        elif family == "prize_box":
            assert answer == solve_prize_box(question), question
        elif family == "fair_share":
            assert answer == solve_fair_share(parameters, question), question
        else:
            assert answer == solve_calendar(question), question
    verdicts = Counter(case.record["answer"] for case in cases if case.problem.family == "fair_share")
    assert min(verdicts["yes"], verdicts["no"]) > 0.25 * verdicts.total()


# What a question must tell for the problem to be solvable, in the order-free form of the numbers it states.
STATED: dict[str, Callable[[dict[str, int]], list[int]]] = {
    "shopping": lambda p: [p["count_a"], p["price_a"], p["count_b"], p["price_b"], p["bill"]],
    "discount": lambda p: [p["price"], p["first"], p["second"]],
    "tickets": lambda p: [
        p["adults"] + p["children"], p["adult_price"], p["child_price"],
        p["adults"] * p["adult_price"] + p["children"] * p["child_price"],
    ],
    "travel": lambda p: [p["speed_a"], p["hours_a"], p["speed_b"], p["hours_b"]],
    "catch_up": lambda p: [p["slow"], p["fast"], p["lead"]],
    "joint_work": lambda p: [p["hours_a"], p["hours_b"], p["jobs"]],
    "dripping": lambda p: [p["millilitres"], p["every"], p["hours"]],
    "timetable": lambda p: [p["parts"], p["minutes"], p["pause"]],
    "ages": lambda p: [p["gap"], p["years"], 2 * p["younger"] + p["gap"] + 2 * p["years"]],
    "survey": lambda p: [
        p["only_a"] + p["only_b"] + p["both"] + p["neither"],
        p["only_a"] + p["both"], p["only_b"] + p["both"], p["both"],
    ],
    "averages": lambda p: [p["count"], p["mean"], p["new_mean"]],
    "border": lambda p: [p["length"], p["width"], p["path"]],
    "fence": lambda p: [p["spacing"] * p["spans_long"], p["spacing"] * p["spans_wide"], p["spacing"], p["price"]],
    "ratio": lambda p: [(p["high"] + p["middle"] + p["low"]) * p["unit"], p["high"], p["middle"], p["low"]],
    "fractions": lambda p: [p["first"] * p["second"] * p["unit"]],
    "mixture": lambda p: [p["litres_a"], p["weak"], p["litres_b"], p["strong"]],
    "outfits": lambda p: [p["first"], p["second"], p["third"], p["banned"]],
    "savings": lambda p: [p["start"], p["step"], p["times"]],
    "ranking": lambda p: [p["base"], p["step_1"], p["step_2"], p["step_3"]],
    "prize_box": lambda p: [p["true"]],
    "fair_share": lambda p: [p["bags"], p["per_bag"], p["friends"]],
    "calendar": lambda p: [p["wait"], p["more"]],
}  # fmt: skip


def test_questions_state_all_they_need(cases: list[Case]) -> None:
    for case in cases:
        stated = Counter(int(n) for n in numbers(case.record["question"]))
        assert Counter(STATED[case.problem.family](case.problem.parameters)) <= stated, case.record["question"]


# ---- the arithmetic checker ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "So 3 × 4 + 2 = 14 tiles are left, and $14 - $4 = $10.",
        "25% of 80 = 20, then 80 - 20 = 60 and 3/4 × 80 = 60.",
        "1/6 + 1/3 = 1/2 per hour, (10 + 2) / 4 = 3, 17 mod 5 = 2, 2^5 = 32, 0.5 × 3 = 1.5.",
        "Later x = 13, since 2x + 5 = 31 gives 2x = 26; also 3(x + 1) = 42.",
        "c = a + b > 11, a = 5 and b = 7, so c = 12 ≠ 13.",
        "A line 3 × 4 = 12\n5 + 5 = 10 on the next.",
        "The price = 3 × 4 = 12, a 25% rise, and/or 3-5 pieces at 9:15.",
    ],
)
def test_checker_accepts_what_holds(text: str) -> None:
    assert check_rationale(text) == []
    assert examine(text)[1] >= 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("So 3 × 4 + 2 = 15 tiles.", "'3 × 4 + 2 = 15' is false: 14 = 15"),
        ("25% of 80 = 25.", "'25% of 80 = 25' is false: 20 = 25"),
        ("1/6 + 1/3 = 2/9.", "is false: 1/2 = 2/9"),
        ("5 + 7 = 12 = 13.", "is false: 12 = 13"),
        ("2x + 5 = 33, so x = 13.", "'2x + 5 = 33' is false: 31 = 33"),
        ("x = 13 at first, later x = 14.", "is false: 13 = 14"),
        ("n = 3 × 4 = 12, and m = n + 1 = 14, so m = 14.", "is false"),
        ("12 > 15.", "'12 > 15' is false"),
        ("It is 12 ≠ 12.", "is false"),
        ("The price × 4 = 12.", "cannot read '× 4 = 12'"),
        ("7 / 0 = 7.", "cannot read"),
        ("(3 + 4 = 7.", "cannot read"),
    ],
)
def test_checker_catches_what_does_not_hold(text: str, told: str) -> None:
    (violation, *_) = check_rationale(text)
    assert told in violation


def test_every_rationale_passes_the_checker_and_gives_it_work(cases: list[Case]) -> None:
    executed: Counter[str] = Counter()
    for case in cases:
        for perspective, text in case.texts.items():
            violations, count = examine(text)
            assert violations == [], (case.problem.family, perspective, text)
            executed[perspective] += count
            # the label puzzle reasons in words in these two
            if perspective != "intuitive" and not (case.problem.family == "prize_box" and "=" not in text):
                assert count >= 1, (case.problem.family, perspective, text)
    assert min(executed[p] for p in PERSPECTIVES if p != "intuitive") > 2 * len(cases)


def test_checker_catches_every_planted_error(cases: list[Case]) -> None:
    """One result after another is raised by 1 in thousands of equations, and the checker must notice each time."""
    planted = 0
    for case in cases[::2]:
        for text in case.texts.values():
            for match in re.finditer(r"(?<=\d = )(\d+)(?![\d.%/])", text):
                wrong = text[: match.start()] + str(int(match[1]) + 1) + text[match.end() :]
                assert check_rationale(wrong), wrong
                planted += 1
    assert planted > 5_000


def test_generation_refuses_a_family_that_states_a_false_equation() -> None:
    class Careless(TinyFamily):
        def planning(self) -> str:
            return super().planning().replace(f"= {self.total}", f"= {self.total + 1}")

    with pytest.raises(ArithmeticMistakeError, match=r"tiny .*planning: .* is false"):
        generate_records(1, families=[Careless])


# ---- the eight contracts ---------------------------------------------------------------------------------------------


def test_every_rationale_ends_in_its_result(cases: list[Case]) -> None:
    for case in cases:
        for perspective, text in case.texts.items():
            ending = text.strip().split("\n")[-1]
            assert says(ending, case.record["answer"]), (perspective, text)
            assert says(last_sentence(text), case.record["answer"]) or perspective == "socratic", (perspective, text)
            assert not re.search(r"[Tt]he answer is\b[^.]*\.$", text), text  # a suffix says that later
            assert text == text.strip() and not re.search(r"[\[\]{}|]|  | [.,;?!]|\.\.", text), text


def test_formal_symbolic_defines_symbols_and_reasons_in_equations(cases: list[Case]) -> None:
    for case in cases:
        text = case.texts["formal_symbolic"]
        assert re.match(r"Let [a-z]\b|Number the days", text), text
        defined = set(re.findall(r"(?<![\w'])[b-z](?![\w'])", text))
        assert len(defined) >= 2 and text.count("=") >= 3, text
        assert not re.search(r"\b(picture|imagine|think)\b", text, re.IGNORECASE)


def test_intuitive_has_little_notation(cases: list[Case]) -> None:
    for case in cases:
        text = case.texts["intuitive"]
        assert not re.search(r"[=×<>≠]|\d [-+/] \d", text), text
        assert len(re.findall(r"[a-z]{3,}", text)) >= 15, text


def test_decomposition_numbers_its_solved_sub_problems(cases: list[Case]) -> None:
    for case in cases:
        lines = case.texts["decomposition"].split("\n")
        assert len(lines) >= 3
        for i, line in enumerate(lines, 1):
            number, solved = re.fullmatch(r"(?:Step )?(\d+)[.:)] (.+)", line).groups()  # type: ignore[union-attr]
            assert int(number) == i
            assert numbers(solved) or says(solved, case.record["answer"]), line


def test_planning_plans_before_it_executes(cases: list[Case]) -> None:
    for case in cases:
        plan, execution = case.texts["planning"].split("\n")
        assert plan.split(":")[0] in PLAN_LABELS and execution.split(":")[0] in EXECUTION_LABELS
        steps = re.split(r"; |, then |, finally |, and last |\(\d\) ", plan.split(": ", 1)[1])
        assert len([step for step in steps if step]) >= 3, plan
        assert "=" not in plan and execution.count("=") >= 2
        results = set(re.findall(r"(?<== )\d+(?:\.\d+)?", execution))
        told = set(numbers(re.sub(r"\(\d\)", "", plan))) - set(numbers(case.record["question"]))
        assert not results & told, plan  # no result is given away by the plan


def test_analogy_solves_a_smaller_example_with_its_own_numbers(cases: list[Case]) -> None:
    for case in cases:
        problem, text = case.problem, case.texts["analogy"]
        if problem.family == "prize_box":  # two cups stand for four boxes
            assert re.match(r"(Take|Start with) two cups, A saying .* and B saying .*, both (true|false)\.", text)
            continue
        simple = problem.simple
        assert simple.parameters != problem.parameters and simple.answer != problem.answer
        assert sum(simple.parameters.values()) < sum(problem.parameters.values())
        stated = STATED[problem.family](simple.parameters)
        assert sum(stated) < sum(STATED[problem.family](problem.parameters))
        example = text[: text.rindex(".", 0, len(text) - 1)] if text.count(".") > 1 else text
        if problem.family not in ("ranking", "savings"):  # their examples list the values, not first and steps
            assert set(map(str, stated)) <= set(numbers(example)), text
        if problem.family in SOLVERS:
            assert Fraction(simple.answer) == SOLVERS[problem.family](simple.parameters)
            assert says(example, simple.answer), text
        assert examine(text)[1] >= 2


def test_socratic_asks_itself_and_answers_each_question(cases: list[Case]) -> None:
    for case in cases:
        turns = case.texts["socratic"].split("\n")
        assert len(turns) >= 3
        for turn in turns:
            question, answer = re.fullmatch(r"([^?]+\?) ([^?]+[.])", turn).groups()  # type: ignore[union-attr]
            assert question and len(answer.split()) >= 1
    assert sum("No, " in case.texts["socratic"] for case in cases) > len(cases) / 4  # real self-questioning


KEPT = re.compile(r", so (it stays|it stands|keep it|it survives)\.$")
DROPPED = re.compile(r", so (it is out|reject it|I reject it|it fails|it cannot stand|cross it out)\.$")


def test_contrastive_eliminates_computed_candidates_and_keeps_the_right_one(cases: list[Case]) -> None:
    positions: Counter[int] = Counter()
    for case in cases:
        problem = case.problem
        lines = case.texts["contrastive"].split("\n")[1:-1]
        labels = next(labels for labels in CANDIDATE_LABELS if lines[0].startswith(labels[0]))
        assert 2 <= len(lines) <= 3
        assert all(line.startswith(label) for line, label in zip(lines, labels, strict=False))
        kept = [line for line in lines if KEPT.search(line)]
        dropped = [line for line in lines if DROPPED.search(line)]
        assert len(kept) == 1 and len(dropped) == len(lines) - 1 == len(problem.wrong)
        wrong = [problem.worded(value) for value in problem.wrong]
        assert len({case.record["answer"], *wrong}) == 1 + len(wrong)
        assert says(kept[0], case.record["answer"]), kept
        for value in wrong:
            assert any(value in line for line in dropped), (value, dropped)
        positions[lines.index(kept[0])] += 1
    assert min(positions[i] for i in range(3)) > len(cases) / 5  # the right one has no fixed place


def test_counterfactual_changes_a_condition_and_reasons_back(cases: list[Case]) -> None:
    for case in cases:
        problem, text = case.problem, case.texts["counterfactual"]
        changed = problem.changed
        assert re.match(r"(Suppose|Imagine|Say|Pretend) ", text)
        assert changed.parameters != problem.parameters and changed.accepts()
        assert changed.answer != problem.answer
        if problem.family in SOLVERS:
            assert Fraction(changed.answer) == SOLVERS[problem.family](changed.parameters)
        what_if = problem.worded(changed.answer)
        sentences = re.split(r"(?<=[.;:]) ", text)
        first_part, last = " ".join(sentences[:-1]), sentences[-1]
        assert says(first_part, what_if), (what_if, text)
        assert says(last, case.record["answer"]), text
        assert re.search(r"\b(critical|decisive|deciding|binding|key|decides|fixes|matters)\b", text), text
        if problem.family != "ranking":  # there a comparison is turned round, its numbers stay
            asked = Counter(STATED[problem.family](problem.parameters))
            hypothetical = Counter(STATED[problem.family](changed.parameters))
            if problem.family not in ("fractions", "fair_share"):  # what they change is not among STATED
                assert hypothetical != asked
            assert all(says(first_part, str(n)) for n in hypothetical - asked), text


# ---- wording ---------------------------------------------------------------------------------------------------------


def skeleton(text: str, names: set[str]) -> str:
    return re.sub(r"\d+(\.\d+)?", "#", re.sub(r"\b(" + "|".join(names) + r")\b", "@", text))


def test_wording_varies_within_each_family_and_perspective(cases: list[Case]) -> None:
    """At least 8 question forms and 6 forms of every perspective per family in 50 problems, numbers and names apart."""
    names = {person.name for person in PEOPLE}
    forms: dict[tuple[str, str], set[str]] = {}
    for case in cases:
        for kind, text in [("question", case.record["question"]), *case.texts.items()]:
            forms.setdefault((case.problem.family, kind), set()).add(skeleton(text, names))
    few = {key: len(found) for key, found in forms.items() if len(found) < (8 if key[1] == "question" else 6)}
    assert not few


def test_length_fits_a_small_student(cases: list[Case]) -> None:
    lengths = [len(text.split()) for case in cases for text in case.texts.values()]
    assert min(lengths) >= 25 and max(lengths) <= 115
    assert 45 <= statistics.mean(lengths) <= 75
    assert max(len(case.record["question"].split()) for case in cases) <= 75


def test_grammar_of_number_and_article(cases: list[Case]) -> None:
    things = "hour metre litre day year week month point shell page pear badge bird box soup scarf post adult"
    plurals = "|".join(thing + "e?s" for thing in things.split())
    one_many = re.compile(rf"(?<![\d.,×+/=(-] )(?<![\d.$])\b1 ({plurals})\b")
    many_one = re.compile(rf"(?<![\d.])\b(?:[02-9]|\d\d+) ({'|'.join(things.split())})\b(?! dish)")
    article = re.compile(r"\b[Aa] [aeio](?!ne\b|f\b|nd\b)\w+|\b[Aa]n [^aeiouh\W]\w+")
    for case in cases:
        for text in (case.record["question"], *case.texts.values()):
            for rule in (one_many, many_one, article):
                assert not rule.search(text), (rule.search(text), text)


def test_pronouns_agree_with_the_person(cases: list[Case]) -> None:
    """Where a question names one person only, no pronoun of the other kind appears anywhere in its texts."""
    pronouns = {"he": r"\b(she|her|hers)\b", "she": r"\b(he|him|his)\b"}
    checked = 0
    for case in cases:
        named = [person for person in PEOPLE if re.search(rf"\b{person.name}\b", case.record["question"])]
        if len(named) == 1:
            checked += 1
            for text in (case.record["question"], *case.texts.values()):
                assert not re.search(pronouns[named[0].he], text, re.IGNORECASE), text
    assert checked > 200


# ---- command line ----------------------------------------------------------------------------------------------------


def test_command_line_writes_the_records(tmp_path: Path) -> None:
    output = tmp_path / "train.jsonl"
    assert main(["--num-questions", "25", "--seed", "9", "--split", "heldout", "--output", str(output)]) == 0
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert written == generate_records(25, seed=9, split="heldout")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]  # no temporary file stays


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--num-questions", "0", "--output", "new.jsonl"], "num_questions: 0 given"),
        (["--num-questions", "x", "--output", "new.jsonl"], "--num-questions: invalid int value: 'x'"),
        (["--num-questions", "3", "--split", "dev", "--output", "new.jsonl"], "--split: invalid choice: 'dev'"),
        (["--num-questions", "3"], "--output"),
        (["--num-questions", "3", "--output", "there.jsonl"], "there.jsonl exists already"),
        (["--num-questions", "3", "--output", "no/such/folder.jsonl"], "no/such"),
    ],
)
def test_command_line_errors_are_one_line_and_leave_nothing(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("kept")
    try:
        status: Any = main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2
    assert told in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "kept"


def test_families_are_problems_with_finite_spaces() -> None:
    for family in FAMILIES:
        assert issubclass(family, Problem) and family.__doc__ and space_size(family) > 1000
