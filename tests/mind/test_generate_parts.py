"""The parts of `mind generate` that need neither model nor server: prompts, ledger, judge, selection. A few seconds."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mind.generate import GenerateError
from mind.generate.judge import (
    CUT,
    EMPTY,
    NO_ANSWER,
    NO_RATIONALE,
    REFUSED,
    WRONG,
    choose_questions,
    is_free_text,
    judge,
    near_duplicates,
    says_yes,
    split_answer,
)
from mind.generate.ledger import Answer, Ledger, Request, request_key
from mind.generate.prompts import answer_line, copy_prompts, fill, read_prompts
from mind.generate.teachers import retry_after
from mind.generate.topk import TopK
from mind.problems import PERSPECTIVES
from mind.prompting import PromptFormat

FORMAT = PromptFormat()

# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_built_in_prompts() -> None:
    prompts = read_prompts()
    assert tuple(prompts) == PERSPECTIVES and len(set(prompts.values())) == 8
    filled = fill(prompts["socratic"], {"question": "Is {answer_line} text?", "answer_line": answer_line(FORMAT)})
    assert "Is {answer_line} text?" in filled and filled.endswith("The answer is ….")


def test_prompts_that_cannot_be_copied(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GenerateError, match=r"copy_prompts: .*file/prompts cannot be made: Not a directory"):
        copy_prompts(tmp_path / "file" / "prompts")


def test_an_extra_perspective_is_an_extra_file(tmp_path: Path) -> None:
    copy_prompts(tmp_path / "mine")
    (tmp_path / "mine" / "by_drawing.txt").write_text("Draw: {question}\n{answer_line}\n")
    (tmp_path / "mine" / "planning.txt").unlink()
    prompts = read_prompts(tmp_path / "mine")
    assert [*prompts] == [*(name for name in PERSPECTIVES if name != "planning"), "by_drawing"]
    assert prompts["by_drawing"] == "Draw: {question}\n{answer_line}"
    marked = b"\xef\xbb\xbf" + (tmp_path / "mine" / "by_drawing.txt").read_bytes()
    (tmp_path / "mine" / "by_drawing.txt").write_bytes(marked)  # as some editors write UTF-8
    assert read_prompts(tmp_path / "mine") == prompts
    with pytest.raises(GenerateError, match="exists already, wanted a new folder"):
        copy_prompts(tmp_path / "mine")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Say {question}", "a.txt holds {answer_line} 0 times, wanted it once"),
        (b"{question} {question} {answer_line}", "a.txt holds {question} 2 times, wanted it once"),
        (b"\xff {question} {answer_line}", "a.txt cannot be read: "),
        (None, "holds no .txt file, wanted one for each perspective"),
    ],
)
def test_prompts_that_cannot_be_used(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(GenerateError) as error:
        read_prompts(tmp_path)
    assert message in str(error.value)
    with pytest.raises(GenerateError, match="is no folder"):
        read_prompts(tmp_path / "absent")


# ---------------------------------------------------------------------------------------------------------------------
# Ledger


def answer(number: int) -> tuple[Request, Answer]:
    topk = None
    if number % 2:
        ids = np.arange(2 * number, dtype=np.int32)
        topk = TopK(ids[:number], ids.reshape(number, 2), -ids.astype(np.float32).reshape(number, 2))
    text = f"“{number}”\n\tµ \U0001f600"
    return Request(request_key({"model": "m"}, text), f"q{number}", "planning", text), Answer(
        text, "stop", 5, None, topk=topk
    )


def test_ledger_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for number in (1, 2, 3):  # three processes after one another
        with Ledger(path) as ledger:
            assert len(ledger.answers) == number - 1
            ledger.append(answer(number)[0], "m", answer(number)[1])
    with Ledger(path) as ledger:
        for number in (1, 2, 3):
            request, wanted = answer(number)
            given = ledger.answers[request.key]
            assert (given.text, given.prompt_tokens, given.completion_tokens) == (wanted.text, 5, None)
        stored = dict(ledger.read_topk())
    assert set(stored) == {answer(number)[0].key for number in (1, 3)}
    for number in (1, 3):
        request, wanted = answer(number)
        assert wanted.topk is not None
        for name in ("token_ids", "top_ids", "logprobs"):
            np.testing.assert_array_equal(getattr(stored[request.key], name), getattr(wanted.topk, name))


def test_a_torn_ledger(tmp_path: Path) -> None:
    path = tmp_path / "whole.jsonl"
    with Ledger(path) as ledger:
        for number in (1, 2):
            ledger.append(answer(number)[0], "m", answer(number)[1])
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    torn = tmp_path / "torn.jsonl"
    for size in sorted({*range(0, len(whole) + 1, 13), *(end + i for end in ends for i in (-1, 0, 1))}):
        torn.write_bytes(whole[:size])
        with Ledger(torn) as ledger:
            assert len(ledger.answers) == sum(end <= size for end in ends)  # even without its line break
            ledger.append(answer(4)[0], "m", answer(4)[1])
        with Ledger(torn) as ledger:
            assert len(ledger.answers) == sum(end <= size for end in ends) + 1
    # after a power cut a file may end in zeros
    torn.write_bytes(whole + bytes(512))
    with Ledger(torn) as ledger:
        assert len(ledger.answers) == 2 and torn.read_bytes() == whole


def test_a_ledger_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Ledger(path), pytest.raises(GenerateError, match="another mind generate is writing to it"), Ledger(path):
        pass
    for line in ("nonsense", "[]", '{"key": 1}', "[" * 100_000):
        path.write_text(line + "\n")
        with pytest.raises(GenerateError, match=r"a\.jsonl:1: is no answer of mind generate"), Ledger(path):
            pass
        with pytest.raises(GenerateError, match=":1: "), Ledger(path):  # and the lock is free again
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(GenerateError, match="folder: cannot be read: Is a directory"), Ledger(tmp_path / "folder"):
        pass


def test_a_full_disk(tmp_path: Path) -> None:
    """An answer that fits in part is an error, no answer, and asked again."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(path) as ledger:
        ledger.append(answer(1)[0], "m", answer(1)[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
        try:
            with pytest.raises(GenerateError, match=r"a\.jsonl: cannot be written"):
                ledger.append(answer(2)[0], "m", answer(2)[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert set(ledger.answers) == {answer(1)[0].key}
    with Ledger(path) as ledger:
        assert set(ledger.answers) == {answer(1)[0].key}


def test_what_an_answer_depends_on() -> None:
    keys = {request_key({"model": m, "temperature": t}, p) for m in "ab" for t in (0.0, 0.5) for p in ("x", "y")}
    assert len(keys) == 8
    assert request_key({"a": 1, "b": 2}, "x") == request_key({"b": 2, "a": 1}, "x")


# ---------------------------------------------------------------------------------------------------------------------
# Judge


@pytest.mark.parametrize(
    ("output", "text", "found"),
    [
        ("2 and 3 is 5.\nThe answer is 5.", "2 and 3 is 5.", "5"),
        ("2 and 3 is 5. So the answer is 5", "2 and 3 is 5.", "5"),
        ("2 and 3 is 5.\n\n**The answer is 5.**\n\nAnything else?", "2 and 3 is 5.", "5"),
        ("2 and 3 is 5.\n\n**Therefore, the answer is 5**", "2 and 3 is 5.", "5"),
        ("Adding 2 and 3 shows that the answer is 5.", "Adding 2 and 3 shows that", "5"),
        ("<think>The answer is 6.</think>\n\nIt is five.\nThe answer is 5.", "It is five.", "5"),
        (
            "First, the answer is 4? No:\nrather 5.\nTHE ANSWER IS: $5$.",
            "First, the answer is 4? No:\nrather 5.",
            "$5$",
        ),
        ("2 and 3 is 5.\nThe answer is 5.\nThe answer isn't 6.", "2 and 3 is 5.", "5"),
        ("So 2 + 3 = \\boxed{5} it is.", "So 2 + 3 = \\boxed{5} it is.", "5"),
        ("Two and three.", "Two and three.", None),
        ("The answer is 5.", "", "5"),
        ("The answer is ….", "", "…"),
        ("", "", None),
    ],
)
def test_split_answer(output: str, text: str, found: str | None) -> None:
    assert split_answer(output, FORMAT) == (text, found)


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_split_answer_takes_any_text(output: str) -> None:
    text, found = split_answer(output, FORMAT)
    assert text in output and (found is None or found.strip())
    assert split_answer(f"Sum: 2 + 3 = 5.\n{output}\nThe answer is 5.", FORMAT)[1] == "5"


@pytest.mark.parametrize(
    ("given_answer", "wanted", "reason"),
    [
        (Answer("It is 0.5.\nThe answer is 1/2."), "50%", None),
        (Answer("Blue fits.\nThe answer is (B) blue."), "B", None),
        (Answer("It can.\nThe answer is Yes, it can."), "yes", None),
        (Answer("It is 4.\nThe answer is 4."), "5", WRONG),
        (Answer("It is blue.\nThe answer is (A)."), "B", WRONG),
        (Answer("It is 5.\nThe answer is 5.", finish_reason="length"), "5", CUT),
        (Answer("I cannot say."), "5", NO_ANSWER),
        (Answer(" \n"), "5", EMPTY),
        (Answer("The answer is 5."), "5", NO_RATIONALE),
        (Answer("", refusal="400: too long"), "5", REFUSED),
    ],
)
def test_verdicts(given_answer: Answer, wanted: str, reason: str | None) -> None:
    assert judge(given_answer, wanted, FORMAT).reason == reason


def test_free_text() -> None:
    assert all(map(is_free_text, ("Marie Curie", "the Nile", "osmosis", "E. coli", "J. K. Rowling")))
    assert not any(map(is_free_text, ("7", "B", "(b)", "yes", "False", "x^2", "\\frac{a}{b}", "3 apples")))
    assert not any(map(is_free_text, ("A) cats", "(B) the cat", "Option C: a dog", "**(B)** cats")))
    replies = {"Yes.": True, " no, it is not": False, "Maybe": None, "": None, "<think>no</think>yes": True}
    assert {reply: says_yes(reply) for reply in replies} == replies


def test_near_duplicates() -> None:
    long = "First add the apples that Ann has to the pears that Bob has, then halve the sum to find the share of each."
    texts = {
        "a": long,
        "b": "Something else entirely, with other words in it.",
        "c": long.replace("Ann", "Eve"),
        "d": long,
    }
    assert near_duplicates(texts) == {"c": "a", "d": "a"}
    assert near_duplicates({"a": "Five.", "b": "five", "c": "Six."}) == {"b": "a"}


@pytest.mark.parametrize(("target", "kept_easy"), [(None, 5), (9, 6), (3, 0), (2, 0), (100, 10)])
def test_all_hard_questions_are_kept(target: int | None, kept_easy: int) -> None:
    difficulties = {f"easy{i}": 0.1 for i in range(10)} | {f"hard{i}": 0.2 for i in range(3)}
    options = {"easy_difficulty": 0.1, "easy_share": 0.5, "target_size": target}
    chosen = choose_questions(difficulties, **options, seed=0)  # type: ignore[arg-type]
    assert {f"hard{i}" for i in range(3)} <= chosen and len(chosen) == 3 + kept_easy
    assert chosen == choose_questions(difficulties, **options, seed=0)  # type: ignore[arg-type]


def test_of_one_easy_question_half_is_the_question() -> None:
    for easy_share, kept in ((0.5, {"only"}), (0.01, {"only"}), (0, set())):
        options = {"easy_difficulty": 0, "easy_share": easy_share, "target_size": None, "seed": 0}
        assert choose_questions({"only": 0.0}, **options) == kept  # type: ignore[arg-type]


def test_retry_after() -> None:
    assert retry_after("7") == 7 and retry_after("0.5") == 0.5
    assert 25 < retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30
    for header in (None, "", "soon", "-3", "nan", "inf", formatdate(0, usegmt=True)):
        assert retry_after(header) == 0


def test_lines_are_json(tmp_path: Path) -> None:
    with Ledger(tmp_path / "a.jsonl") as ledger:
        ledger.append(answer(1)[0], "m", answer(1)[1])
    line = json.loads((tmp_path / "a.jsonl").read_text(encoding="ascii"))
    assert (line["id"], line["perspective"], line["model"], line["finish_reason"]) == ("q1", "planning", "m", "stop")
