"""`mind generate` from the command line to the records, against a server with scripted answers. About half a minute."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mind.cli import main
from mind.data import load_records
from mind.generate.prompts import read_prompts
from mind.generate.teachers import ServerTeacher

from .generating import command, generate, refused, write
from .loopback import Reply, completion, loopback, refusal, solve, sums

ROOT = Path(__file__).parents[2]
KEY = "sk-5ecret-0f-th1s-test"


def assert_no_output(folder: Path) -> None:
    """Neither output nor report nor anything unfinished, and no answer in the ledger."""
    assert {path.name for path in folder.iterdir()} <= {"questions.jsonl", "out.ledger.jsonl.lock"}


# ---------------------------------------------------------------------------------------------------------------------
# The whole way


def test_records_that_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with loopback(solve) as server:
        report = generate(tmp_path, server.url, temperature=0.5, max_tokens=99)
    records = load_records(tmp_path / "out.jsonl")
    prompts = read_prompts()
    assert [(record.id, record.source, record.difficulty) for record in records] == [
        (f"sum-{i}", "sums", 0) for i in range(4)
    ]
    for record in records:
        assert [rationale.perspective for rationale in record.rationales] == list(prompts)
        assert all(rationale.answer == record.answer for rationale in record.rationales)
        assert all(rationale.text.endswith(f"and get {record.answer}.") for rationale in record.rationales)
    # every question in each perspective, once
    asked = Counter(server.prompts)
    wanted = [prompt.replace("{question}", record.question) for record in records for prompt in prompts.values()]
    assert asked == Counter(text.replace("{answer_line}", "The answer is ….") for text in wanted)
    assert server.bodies[0]["max_tokens"] == 99 and server.bodies[0]["temperature"] == 0.5
    assert server.bodies[0]["model"] == "m" and "logprobs" not in server.bodies[0]

    assert report["questions"] == {"in": 4, "kept": 4, "dropped": {}} and report["requests"] == {"m": 32}
    part = report["perspectives"]["analogy"]
    assert (part["asked"], part["right"], part["kept"], part["yield"]) == (4, 4, 4, 1)
    assert (part["prompt_tokens"], part["completion_tokens"]) == (80, 40) and part["mean_words"] > 5
    assert len(report["samples"]) == 3
    text = capsys.readouterr().out
    assert "questions: 4 in, 4 kept" in text and "counterfactual" in text and report["samples"][1]["text"] in text


def test_a_finished_run_costs_no_request(tmp_path: Path) -> None:
    with loopback(solve) as server:
        generate(tmp_path, server.url)
        before = (tmp_path / "out.jsonl").read_bytes()
        report = generate(tmp_path, server.url)
        assert len(server.bodies) == 32
    assert (tmp_path / "out.jsonl").read_bytes() == before and report["requests"] == {}
    # nor a server, nor the packages that ask one
    generate(tmp_path, "http://127.0.0.1:9/v1")


def test_only_what_changed_is_asked(tmp_path: Path) -> None:
    with loopback(solve) as server:
        generate(tmp_path, server.url)
        with pytest.raises(SystemExit) as stop:
            main(["generate", "--copy_prompts", str(tmp_path / "mine")])
        assert stop.value.code == 0
        planning = tmp_path / "mine" / "planning.txt"
        planning.write_text(planning.read_text().replace("two stages", "two clear stages"))
        (tmp_path / "mine" / "drawing.txt").write_text("Now please do draw it. {question} {answer_line}")
        write(tmp_path / "questions.jsonl", sums(5))
        report = generate(tmp_path, server.url, prompts=tmp_path / "mine")
        assert report["requests"] == {"m": 4 * 2 + 9}
        assert generate(tmp_path, server.url, prompts=tmp_path / "mine", teacher="n")["requests"] == {"n": 45}
    records = load_records(tmp_path / "out.jsonl")
    assert len(records) == 5 and records[0].rationales[-1].perspective == "drawing"


def test_requests_run_concurrently_within_the_limit(tmp_path: Path) -> None:
    def slow(body: dict[str, Any], number: int) -> Reply:
        reply = solve(body)
        reply.delay = 0.1
        return reply

    with loopback(slow) as server:
        generate(tmp_path, server.url, concurrency=5)
    assert server.most_at_once == 5


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def once(body: dict[str, Any], number: int) -> Reply:
        return refusal(500, "ouch") if number == 9 else solve(body)

    with loopback(once) as server:
        assert main(command(tmp_path, server.url, disable_tqdm=False, max_tries=1)) == 2
    error = capsys.readouterr().err
    bar = error.replace("\r", "\n").splitlines()[-2]
    assert "asking m" in bar and "31/32" in bar and "failed=1, tokens=310, tokens_per_s=" in bar
    assert "mind: error: 1 requests failed (1 × answers 500: ouch): run the same command again to ask them" in error


# ---------------------------------------------------------------------------------------------------------------------
# Judging and selecting


def varied(body: dict[str, Any], number: int) -> Reply:
    """What may be wrong with a rationale, a kind of fault for each perspective of question 0."""
    prompt = body["messages"][0]["content"]
    faults = {
        "formal, symbolic": completion("We guess.\nThe answer is 99."),
        "common sense": completion("We guess"),
        "breaking it into": completion("It goes on and on.\nThe answer is 3.", finish_reason="length"),
        "two stages": completion(""),
        "by analogy": completion(None, finish_reason="content_filter"),
        "questioning yourself": completion("The answer is 3."),
        "comparing candidates": refusal(400, "too long"),
    }
    fault = next((reply for words, reply in faults.items() if words in prompt), None)
    # The first request of a run must not be refused.
    return fault if fault is not None and "What is 0 + 3" in prompt else solve(body)


def test_wrong_rationales_are_dropped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with loopback(varied) as server:
        report = generate(tmp_path, server.url)
    records = load_records(tmp_path / "out.jsonl")
    assert [len(record.rationales) for record in records] == [1, 8, 8, 8]
    assert [record.difficulty for record in records] == [0.875, 0, 0, 0]
    dropped = {name: part["dropped"] for name, part in report["perspectives"].items()}
    assert dropped == {
        "formal_symbolic": {"wrong answer": 1},
        "intuitive": {"no answer found": 1},
        "decomposition": {"cut at max_tokens": 1},
        "planning": {"empty": 1},
        "analogy": {"empty": 1},
        "socratic": {"answer without rationale": 1},
        "contrastive": {"refused by the model": 1},
        "counterfactual": {},
    }
    assert "2 empty" in capsys.readouterr().out
    assert report["perspectives"]["planning"]["yield"] == 0.75


def test_an_answer_in_parts_and_a_refusal_in_its_own_field(tmp_path: Path) -> None:
    def in_parts(body: dict[str, Any], number: int) -> Reply:
        if number == 1:  # the first of a run must not be refused
            return completion(None, refusal="I would rather not")
        text = json.loads(solve(body, number).body)["choices"][0]["message"]["content"]
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "The answer is 99."}]}
        return completion([thought, {"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}])

    with loopback(in_parts) as server:
        report = generate(tmp_path, server.url, concurrency=1)
        assert len(server.bodies) == 32
    reasons = [part["dropped"] for part in report["perspectives"].values() if part["dropped"]]
    assert reasons == [{"refused by the model": 1}]
    assert sum(len(record.rationales) for record in load_records(tmp_path / "out.jsonl")) == 31


def test_easy_questions_are_down_sampled(tmp_path: Path) -> None:
    with loopback(varied) as server:
        report = generate(tmp_path, server.url, easy_share=0.34)
        assert report["questions"] == {"in": 4, "kept": 2, "dropped": {"easy, not chosen": 2}}
        assert load_records(tmp_path / "out.jsonl")[0].id == "sum-0"  # the hard one
        assert generate(tmp_path, server.url, target_size=3)["questions"]["kept"] == 3
        report = generate(tmp_path, server.url, target_size=1)
        assert report["questions"]["kept"] == 1 and "as many as fit 1" in report["rule"]
        assert len(server.bodies) == 32


def test_a_rule_that_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with loopback(solve) as server:
        told = refused(tmp_path, capsys, server.url, easy_share=0)
    assert "(32 are right, and the rule keeps none of their questions, which are easy: difficulty: " in told
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_judges_free_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    questions = [
        {"id": "a", "question": "Who found it?", "answer": "Marie Curie"},
        {"id": "b", "question": "Where is it?", "answer": "the Nile"},
        {"id": "c", "question": "How many?", "answer": "7"},
    ]
    write(tmp_path / "questions.jsonl", questions)

    def teacher(body: dict[str, Any], number: int) -> Reply:
        prompt = body["messages"][0]["content"]
        said = {"Who": "Madame Curie", "Where": "the Rhine", "How": "7"}
        given = next(said[word] for word in said if f"Problem: {word}" in prompt)
        return completion(f"{' '.join(prompt.split()[4:20])}\nThe answer is {given}.")

    def judge(body: dict[str, Any], number: int) -> Reply:
        prompt = body["messages"][0]["content"]
        if number == 0:  # whether it answers at all: one right answer to compare with itself
            assert "Correct answer: Marie Curie\n\nGiven answer: Marie Curie" in prompt and server.bodies == []
        else:
            assert "Correct answer: Marie Curie\n\nGiven answer: Madame Curie" in prompt or "Rhine" in prompt
        return completion("Yes." if "Curie" in prompt else "No, another river.")

    with loopback(teacher) as server, loopback(judge) as other:
        report = generate(tmp_path, server.url, judge="j", judge_base_url=other.url)
        # one verdict for each pair of answers, whoever gave it
        assert report["requests"] == {"m": 24, "j": 3} and len(other.bodies) == 3
        assert generate(tmp_path, server.url, judge="j", judge_base_url=other.url)["requests"] == {}
    records = load_records(tmp_path / "out.jsonl")
    assert [(record.id, len(record.rationales)) for record in records] == [("a", 8), ("c", 8)]
    assert report["questions"]["dropped"] == {"no right rationale": 1}
    # the teacher's key is not shown to another server
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert all(KEY not in str(headers) for headers in other.headers)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(404, "no model j"), "does not know the model or the address (404: no model j)"),
        (refusal(401, "who?"), "refuses the key (401), wanted a valid one in the environment"),
        (refusal(503, "busy"), "answers 503: busy; answers so far are kept, run again to go on"),
    ],
)
def test_a_judge_that_does_not_answer_is_found_before_the_teacher_is_asked(
    reply: Reply, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    river = {"id": "r", "question": "Where is it? What is 0 + 3?", "answer": "the Nile"}
    with loopback(solve) as server, loopback(lambda body, number: reply) as other:
        judge = {"judge": "j", "judge_base_url": other.url}
        # without an answer in words there is nothing for it to judge
        assert generate(tmp_path, server.url, **judge)["requests"] == {"m": 32} and other.bodies == []
        write(tmp_path / "questions.jsonl", [*sums(4), river])
        assert refused(tmp_path, capsys, server.url, **judge) == f"judge 'j' at {other.url}: {message}"
        assert len(server.bodies) == 32


def test_a_judge_that_refuses_one_answer_goes_on(tmp_path: Path) -> None:
    """It has shown before that its settings are right; such an answer, the first of all, ended every run."""
    write(tmp_path / "questions.jsonl", [{"id": "r", "question": "What is 0 + 3?", "answer": "three"}, *sums(1)])

    def judge(body: dict[str, Any], number: int) -> Reply:
        given = body["messages"][0]["content"].partition("Given answer: ")[2]
        return refusal(400, "filtered") if given.startswith("3") else completion("yes")

    with loopback(solve) as server, loopback(judge) as other:
        report = generate(tmp_path, server.url, judge="j", judge_base_url=other.url)
        assert report["requests"] == {"m": 8, "j": 2}
        assert report["perspectives"]["analogy"]["dropped"] == {"model judge undecided": 1}
        assert generate(tmp_path, server.url, judge="j", judge_base_url=other.url)["requests"] == {}


def test_a_judge_is_not_asked_about_a_finished_run(tmp_path: Path) -> None:
    """Nor whether it is there, where the ledger is one of before this was asked."""
    write(tmp_path / "questions.jsonl", [{"id": "r", "question": "What is 0 + 3?", "answer": "three"}])
    with loopback(solve) as server, loopback(lambda body, number: completion("yes")) as other:
        generate(tmp_path, server.url, judge="j", judge_base_url=other.url)
        ledger = tmp_path / "out.ledger.jsonl"
        first, *rest = ledger.read_bytes().splitlines(keepends=True)
        assert json.loads(first)["model"] == "j" and len(rest) == 9
        ledger.write_bytes(b"".join(rest))
        assert generate(tmp_path, server.url, judge="j", judge_base_url=other.url)["requests"] == {}


def test_near_duplicates_are_flagged(tmp_path: Path) -> None:
    with loopback(
        lambda body, number: completion(solve(body).body and "We add both numbers and see.\nThe answer is 3.")
    ) as server:
        write(tmp_path / "questions.jsonl", sums(1))
        report = generate(tmp_path, server.url)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    flags = [item.get("near_duplicate_of") for item in row["rationales"]]
    assert flags == [None] + ["formal_symbolic"] * 7 and report["near_duplicates"] == 7


# ---------------------------------------------------------------------------------------------------------------------
# Faults and retries


FAULTS = {
    "429": refusal(429, "slow down", retry_after="1"),
    "500": refusal(500, "ouch"),
    "503 without JSON": Reply(b"<html>busy</html>", 503, {"content-type": "text/html"}),
    "dropped in the body": Reply(b'{"choices": [{"message": {"content": "' + b"x" * 9999, cut=500),
    "malformed JSON": Reply(b'{"choices": [{"message": '),
    "no choice": Reply(b'{"choices": []}'),
    "no content": completion(None),
    "no object": Reply(b'"choices"'),
    "wrong encoding": Reply('{"choices": [{"message": {"content": "5 €"}}]}'.encode("cp1252")),
    "half a character": Reply(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "endless nesting": Reply(b"[" * 100_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again(fault: str, tmp_path: Path) -> None:
    write(tmp_path / "questions.jsonl", sums(1))
    with loopback(lambda body, number: FAULTS[fault] if number in (0, 4) else solve(body)) as server:
        report = generate(tmp_path, server.url, concurrency=1)
    assert report["failed"] == 0 and len(server.bodies) == 10 and len(set(server.prompts)) == 8
    assert server.prompts[0] == server.prompts[1] and server.prompts[4] == server.prompts[5]
    if fault == "429":  # Retry-After is obeyed
        assert all(1 <= server.times[i + 1] - server.times[i] < 30 for i in (0, 4))


def test_counts_that_are_none_are_not_counted(tmp_path: Path) -> None:
    def miscounted(body: dict[str, Any], number: int) -> Reply:
        reply = solve(body)
        payload = json.loads(reply.body)
        payload["usage"] = [[1], {"prompt_tokens": "20", "completion_tokens": [10]}, None][number % 3]
        return replace(reply, body=json.dumps(payload).encode())

    write(tmp_path / "questions.jsonl", sums(1))
    with loopback(miscounted) as server:
        report = generate(tmp_path, server.url)
    assert report["perspectives"]["decomposition"]["prompt_tokens"] is None


def test_a_slow_answer_is_tried_again(tmp_path: Path) -> None:
    write(tmp_path / "questions.jsonl", sums(1))

    def slow(body: dict[str, Any], number: int) -> Reply:
        reply = solve(body)
        reply.delay = 7.0 if number == 4 else 0.0
        return reply

    with loopback(slow) as server:
        assert generate(tmp_path, server.url, concurrency=1, timeout=5)["failed"] == 0
    assert len(server.bodies) == 9 and server.times[5] - server.times[4] >= 5


def test_back_off_doubles(tmp_path: Path) -> None:
    """Each wait is drawn from [0, retry_wait · 2^n]; the rest is the machine's."""
    write(tmp_path / "questions.jsonl", sums(1))
    with loopback(lambda body, number: refusal(500, "ouch") if 1 <= number <= 5 else solve(body)) as server:
        generate(tmp_path, server.url, concurrency=1, retry_wait=0.05)
    waits = [server.times[i + 1] - server.times[i] for i in range(1, 6)]
    assert all(wait < 0.05 * 2**i + 10 for i, wait in enumerate(waits)) and len(server.bodies) == 13


def test_what_fails_for_good_is_left_for_the_next_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [True]

    def sometimes(body: dict[str, Any], number: int) -> Reply:
        bad = broken[0] and "What is 2 + 5" in body["messages"][0]["content"]
        return refusal(503, "overloaded") if bad else solve(body)

    with loopback(sometimes) as server:
        message = refused(tmp_path, capsys, server.url, max_tries=3)
        assert message == "8 requests failed (8 × answers 503: overloaded): run the same command again to ask them"
        assert len(server.bodies) == 24 + 8 * 3
        # what was answered is written
        assert [record.id for record in load_records(tmp_path / "out.jsonl")] == ["sum-0", "sum-1", "sum-3"]
        report = json.loads((tmp_path / "out.report.json").read_text())
        assert report["questions"]["dropped"] == {"not answered": 1} and report["failed"] == 8
        broken[0] = False
        assert generate(tmp_path, server.url)["requests"] == {"m": 8}
    assert len(load_records(tmp_path / "out.jsonl")) == 4


def test_a_server_that_goes_away_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = Reply(b"", cut=0, headers={"content-length": "9"})
    with loopback(lambda body, number: gone if number >= 10 else solve(body)) as server:
        message = refused(tmp_path, capsys, server.url, concurrency=2, max_tries=3)
    assert "cannot be reached or broke off" in message and message.endswith("are kept, run again to go on")
    assert len(server.bodies) <= 10 + 2 * 3 and not (tmp_path / "out.jsonl").exists()
    with loopback(solve) as server:
        assert generate(tmp_path, server.url)["requests"] == {"m": 22}


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def spawn(folder: Path, url: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "mind", *command(folder, url, concurrency=4)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_killed_and_run_again(tmp_path: Path) -> None:
    write(tmp_path / "questions.jsonl", sums(6))

    def paced(body: dict[str, Any], number: int) -> Reply:
        reply = solve(body)
        reply.delay = 0.05
        return reply

    ledger = tmp_path / "out.ledger.jsonl"
    with loopback(paced) as server:
        for goal in (5, 23):
            process = spawn(tmp_path, server.url)
            deadline = time.monotonic() + 300
            while (ledger.read_bytes().count(b"\n") if ledger.exists() else 0) < goal:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
            kept = ledger.read_bytes().count(b"\n")
            assert goal <= kept < 48 and not (tmp_path / "out.jsonl").exists()
        kept_keys = [json.loads(line)["key"] for line in ledger.read_bytes().splitlines() if line.endswith(b"}")]
        before = len(server.bodies)
        report = generate(tmp_path, server.url)
    # nothing asked again but what was under way at the two kills, at most 4 requests each
    assert report["requests"] == {"m": 48 - kept} and len(server.bodies) - before == 48 - kept
    assert len(server.bodies) <= 48 + 2 * 4
    lines = [json.loads(line) for line in ledger.read_bytes().splitlines()]
    keys = [line["key"] for line in lines]
    assert keys[: len(kept_keys)] == kept_keys and len(set(keys)) == len(keys) == 48
    records = load_records(tmp_path / "out.jsonl")
    assert [len(record.rationales) for record in records] == [8] * 6


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, status 2, nothing half-written


def test_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    message = refused(tmp_path, capsys)
    assert message.startswith("teacher 'm' at http://127.0.0.1:9/v1: cannot be reached or broke off (")
    assert time.monotonic() - start < 60  # three tries, not eight
    assert_no_output(tmp_path)


def test_what_asks_a_server_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its extra is this checkout's: the registry's package of the name is another project's."""
    monkeypatch.setitem(sys.modules, "openai", None)
    assert refused(tmp_path, capsys).endswith("with the openai package: pip install -e '.[generate]'")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            refusal(401, f"Incorrect API key provided: {KEY}"),
            "refuses the key (401), wanted a valid one in the environment",
        ),
        (refusal(404, "no model m"), "does not know the model or the address (404: no model m)"),
        (
            refusal(400, f"no chat template\n({KEY})"),
            "refuses the request of question 'sum-0' (400: no chat template (***))",
        ),
        (  # as text-generation-inference says it
            Reply(b'{"error": "prompt too long", "error_type": "validation"}', 422),
            "refuses the request of question 'sum-0' (422: prompt too long)",
        ),
        (Reply(b"Not Found", 404, {"content-type": "text/plain"}), "does not know the model or the address (404: "),
        (
            Reply(b'{"error": {"code": "insufficient_quota", "message": "pay"}}', 429),
            "has no quota left (429: pay)",
        ),
        (refusal(500, KEY), "answers 500: ***; answers so far are kept, run again to go on"),
        (Reply(b"{}"), "answers what is no chat completion (KeyError: 'choices'); answers"),
        (Reply(b"{}", delay=1.5), "no answer within the timeout of 1 s; answers"),
    ],
)
def test_a_server_that_does_not_answer(
    reply: Reply, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with loopback(lambda body, number: reply) as server:
        given = refused(tmp_path, capsys, server.url, api_key_env="MY_KEY", timeout=1 if reply.delay else 60)
        assert given.startswith(f"teacher 'm' at {server.url}: {message}") and KEY not in given
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        assert len(server.bodies) <= 3
    assert_no_output(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": 0}, "concurrency: given 0, wanted at least 1"),
        ({"temperature": -1}, "temperature: given -1.0, wanted a number that is not negative"),
        ({"temperature": "inf"}, "temperature: given inf, wanted a number that is not negative"),
        ({"easy_share": 2}, "easy_share: given 2.0, wanted a number in [0, 1]"),
        ({"timeout": 0}, "timeout: given 0.0, wanted a positive number of seconds"),
        ({"engine": "magic"}, "argument --engine: invalid choice: 'magic'"),
        ({"engine": "vllm"}, "base_url: given 'http://127.0.0.1:9/v1' with engine vllm, wanted one with server only"),
        ({"engine": "vllm", "base_url": None}, "engine vllm: vLLM is not installed"),
        ({"base_url": "localhost:8000"}, "base_url: wanted an address like http://localhost:8000/v1"),
        (
            {"base_url": f"http://user:{KEY}@localhost/v1"},
            "base_url: holds a user name, password or query, wanted keys in",
        ),
        ({"base_url": "http://[::1/v1"}, "base_url: wanted an address like http://localhost:8000/v1"),
        ({"base_url": "http://localhost:99999/v1"}, "base_url: wanted an address like http://localhost:8000/v1"),
        (
            {"base_url": "http://ex\u200bample.com/v1"},  # as a page that is copied from may hold it
            "teacher 'm' at http://ex\u200bample.com/v1: the address cannot be used (InvalidURL: ",
        ),
        ({"base_url": f"http://user:{KEY}"}, "base_url: wanted an address like http://localhost:8000/v1"),
        (
            {"base_url": f"http://localhost/v1?key={KEY}"},
            "base_url: holds a user name, password or query, wanted keys in",
        ),
        (
            {"api_key_env": KEY},
            "api_key_env: wanted the name of an environment variable that holds the key, not the key",
        ),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "api_key_env: no environment variable of this name is set"),
        ({"extra_body": "{"}, "extra_body: given '{', wanted a JSON object: "),
        ({"extra_body": "[1]"}, "extra_body: given '[1]', wanted a JSON object"),
        ({"extra_body": '{"top_p": NaN}'}, "extra_body: given '{\"top_p\": NaN}', wanted a JSON object: "),
        ({"top_logprobs": 5}, "student: not given, wanted the one whose tokens top_logprobs are aligned to"),
        ({"student": "smollm2-135m"}, "student: given without top_logprobs, where it has no effect"),
        (
            {"base_url": None, "extra_body": '{"top_p": 1}'},
            "extra_body: given without base_url, where it has no effect",
        ),
        ({"base_url": None, "api_key_env": KEY}, "api_key_env: given without base_url, where it has no effect"),
        (
            {"judge_base_url": f"http://user:{KEY}@localhost/v1"},
            "judge_base_url: given without judge, where it has no effect",
        ),
        ({"judge_api_key_env": KEY}, "judge_api_key_env: given without judge, where it has no effect"),
        (
            {"base_url": None, "judge": "j", "judge_api_key_env": KEY},
            "judge_api_key_env: given without judge_base_url or base_url, where it has no effect",
        ),
        (
            {"judge": "j", "judge_api_key_env": "NO_SUCH_VARIABLE"},
            "judge_api_key_env: no environment variable of this name is set",
        ),
        (
            {"judge": "j", "judge_base_url": "localhost:8000"},
            "judge_base_url: wanted an address like http://localhost:8000/v1",
        ),
        (
            {"judge": "j", "judge_base_url": f"http://user:{KEY}@localhost/v1"},
            "judge_base_url: holds a user name, password or query, wanted keys in",
        ),
        ({"answer_suffix": "no placeholder"}, 'answer_suffix must contain "{answer}" exactly once'),
        ({"prompts": "no/such"}, "prompts: no/such is no folder"),
        ({"data": "no/such.jsonl"}, "no/such.jsonl: no such file or folder"),
        ({"output": "no/such/out.jsonl"}, "output: no/such is no folder, wanted one to write out.jsonl in"),
        ({"output": "."}, "output: given '.', wanted a file"),
        ({"output": "/proc/out.jsonl"}, "output: /proc cannot be written to: "),  # nobody can
        ({"seed": 2**64}, "seed: given 18446744073709551616, wanted 0 to 4294967295"),
        ({"betta": 1}, "unrecognized arguments: --betta=1"),
        ({"teacher": None}, "the following arguments are required: --teacher"),
    ],
)
def test_settings(changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = refused(tmp_path, capsys, **changes)
    assert given.startswith(message) and KEY not in given
    assert_no_output(tmp_path)


def test_an_empty_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "questions.jsonl", [])
    assert refused(tmp_path, capsys).endswith("questions.jsonl: no records, wanted at least one")
    assert_no_output(tmp_path)


def test_a_right_answer_that_would_be_judged_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [*sums(2), {"id": "s", "question": "Where is it? What is 0 + 3?", "answer": "St. Ives"}]
    write(tmp_path / "questions.jsonl", questions)
    message = refused(tmp_path, capsys)
    assert message.startswith("question 's': answer 'St. Ives' is read back as 'St' from ")
    assert_no_output(tmp_path)


def test_answers_that_cannot_be_parsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with loopback(lambda body, number: completion("42, I think")) as server:
        message = refused(tmp_path, capsys, server.url)
    assert "out.jsonl: not written: of 32 rationales none is right and kept (32 no answer found)" in message
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.ledger.jsonl", "out.ledger.jsonl.lock"]


def test_an_output_of_another_program_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    assert "out.jsonl exists already without out.ledger.jsonl" in refused(tmp_path, capsys)
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    message = refused(tmp_path, capsys, output=tmp_path / "questions.jsonl")
    assert (
        "questions.jsonl exists already" in message
        and len(load_records(tmp_path / "questions.jsonl", require_rationales=False)) == 4
    )


@pytest.mark.parametrize("name", ["out.jsonl", "out.report.json", "out.topk.parquet", "out.ledger.jsonl.lock"])
def test_a_folder_stands_where_a_file_is_to_be_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.ledger.jsonl").touch()
    (tmp_path / name).mkdir()
    assert refused(tmp_path, capsys) == f"output: {tmp_path / name} is a folder, wanted a file or nothing there"


def test_fields_of_a_request(tmp_path: Path) -> None:
    extra = '{"max_tokens": null, "max_completion_tokens": 7, "temperature": 1}'
    with loopback(solve) as server:
        generate(tmp_path, server.url, extra_body=extra)
    body = server.bodies[0]
    assert body["max_completion_tokens"] == 7 and body["temperature"] == 1 and "max_tokens" not in body


def test_the_key_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with loopback(lambda body, number: refusal(500, f"with {KEY}") if number == 5 else solve(body)) as server:
        assert main(command(tmp_path, server.url, max_tries=1, disable_tqdm=False)) == 2
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        teacher = ServerTeacher("m", server.url, KEY, None)  # type: ignore[arg-type]
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err + repr(teacher)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
