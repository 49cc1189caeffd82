"""`mind generate` with models: behind a real server (`transformers serve`), behind a faulty proxy of it, and local.

The tiny teacher answers 5 to everything, so what is right is known. About a minute, most of it the server's start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from mind.cli import main
from mind.data import load_records
from mind.generate import GenerateError
from mind.generate.ledger import Answer, Request
from mind.generate.teachers import LocalTeacher, Sampling, VLLMTeacher
from mind.generate.topk import StudentTokens
from mind.students import dense_student

from .generating import command, generate, refused, write
from .loopback import Reply, completion, forward, loopback, real_server, refusal
from .test_trainer import one_thread  # noqa: F401
from .tiny import tiny_student
from .tiny_teacher import SENTENCE, tiny_teacher, write_prompts

TEXT = SENTENCE.partition("\n")[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def no_template(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher without its chat template."""
    folder = tmp_path_factory.mktemp("plain")
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `transformers serve`, which loads the folder that a request names."""
    folder = tmp_path_factory.mktemp("serve")
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu"]
    with real_server(command, folder, 180, HF_HUB_OFFLINE="1", HF_HOME=str(folder), OMP_NUM_THREADS="1") as url:
        yield url


def fives(count: int) -> list[dict[str, Any]]:
    """Every third question is one that the tiny teacher gets wrong."""
    return [
        {"id": f"q{i}", "question": f"What is {i} + {5 - i if i % 3 else 9}?", "answer": "5" if i % 3 else str(i + 9)}
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With three questions, and prompts of two perspectives in mine/."""
    write(tmp_path / "questions.jsonl", fives(3))
    write_prompts(tmp_path / "mine")
    return tmp_path


def settings(folder: Path, teacher: Path | str, **changes: Any) -> dict[str, Any]:
    return {"teacher": teacher, "prompts": folder / "mine", "max_tokens": 80, "timeout": 60} | changes


def assert_tiny_records(folder: Path, report: dict[str, Any]) -> None:
    records = load_records(folder / "out.jsonl")
    assert [record.id for record in records] == ["q1", "q2"]
    for record in records:
        assert [(r.perspective, r.text, r.answer) for r in record.rationales] == [
            ("aloud", TEXT, "5"),
            ("steps", TEXT, "5"),
        ]
    assert report["perspectives"]["steps"]["dropped"] == {"wrong answer": 1}
    assert report["perspectives"]["steps"]["completion_tokens"] == 3 * (len(SENTENCE) + 1)
    assert report["near_duplicates"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# A real server


def test_a_real_server(folder: Path, tiny: Path, served: str) -> None:
    report = generate(folder, served, **settings(folder, tiny))
    assert_tiny_records(folder, report)
    assert report["requests"] == {str(tiny): 6}


def test_a_real_server_behind_a_faulty_proxy(folder: Path, tiny: Path, served: str) -> None:
    ask = forward(served)
    faults = {
        1: refusal(429, "slow down", retry_after="1"),
        2: refusal(500, "ouch"),
        4: Reply(b"", delay=11),
        5: Reply(b'{"choices": []}'),
    }

    def faulty(body: dict[str, Any], number: int) -> Reply:
        if number in faults:
            return faults[number]
        reply = ask(body, number)
        if number == 3:
            reply.cut = len(reply.body) // 2  # the connection breaks in the body
        if number == 6:
            reply.body = reply.body[:-10]  # malformed JSON
        if number == 7:
            reply.body = json.dumps(json.loads(reply.body), ensure_ascii=False).replace("Two", "Zwölf").encode("cp1252")
        return reply

    with loopback(faulty) as proxy:
        report = generate(folder, proxy.url, **settings(folder, tiny, concurrency=2, timeout=10))
    assert_tiny_records(folder, report)
    assert report["failed"] == 0 and len(proxy.bodies) >= 6 + 7
    keys = [json.loads(line)["key"] for line in (folder / "out.ledger.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 6


def test_smollm2_behind_a_real_server(folder: Path, served: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Too small to be right: that it answers, is judged and is paid for once is what counts."""
    write(folder / "questions.jsonl", [{"id": "q", "question": "What is 2 + 3?", "answer": "5"}])
    for _ in range(2):
        status = main(command(folder, served, **settings(folder, dense_student("smollm2-135m"), max_tokens=40)))
        error = capsys.readouterr().err
        assert status == 0 if (folder / "out.jsonl").exists() else "of 2 rationales none is right" in error
        lines = [json.loads(line) for line in (folder / "out.ledger.jsonl").read_text().splitlines()]
        assert sorted(line["perspective"] for line in lines) == ["aloud", "steps"]
        for line in lines:
            assert line["text"].strip() and 0 < line["completion_tokens"] <= 40 and line["prompt_tokens"] > 20
            assert "\ufffd" not in line["text"] and line["finish_reason"] in ("stop", "length")


def test_what_a_real_server_refuses(
    folder: Path, tiny: Path, no_template: Path, served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, message in (
        ({"teacher": folder / "absent"}, "answers 500: "),
        ({"teacher": no_template}, "answers 500: "),
        ({"extra_body": '{"bogus": 1}'}, "refuses the request of question 'q0' (422: "),
        (
            {"top_logprobs": 5, "student": tiny},
            "returns no log-probabilities, wanted a server that does, or top_logprobs 0",
        ),
        ({"base_url": served + "/v2"}, "does not know the model or the address (404: "),
    ):
        # After a 500 the server closes the connection, at times while the next try is on its way: so one try.
        line = refused(folder, capsys, **({"base_url": served} | settings(folder, tiny, max_tries=1) | given))
        assert line.startswith("teacher '") and message in line
        assert not list(folder.glob("out.jsonl")) and not list(folder.glob("out.ledger.jsonl"))


# ---------------------------------------------------------------------------------------------------------------------
# A local model


def test_a_local_model(folder: Path, tiny: Path) -> None:
    """In batches that do not divide the prompts, and with the second batch lost."""
    local = settings(folder, tiny, base_url=None, concurrency=4)
    report = generate(folder, "", **local)
    assert_tiny_records(folder, report)
    whole = (folder / "out.jsonl").read_bytes()
    ledger = folder / "out.ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:4]))
    assert generate(folder, "", **local)["requests"] == {str(tiny): 2}
    assert (folder / "out.jsonl").read_bytes() == whole


def test_a_local_model_needs_no_key(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert_tiny_records(folder, generate(folder, "", **settings(folder, tiny, base_url=None)))


def test_difficulty_by_a_student(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is always right; the student only where the answer is 5."""

    def teacher(body: dict[str, Any], number: int) -> Reply:
        prompt = body["messages"][0]["content"]
        answer = next(record["answer"] for record in fives(6) if record["question"] in prompt)
        return completion(f"{prompt.split()[1]} leads there.\nThe answer is {answer}.")

    write(folder / "questions.jsonl", fives(6))
    with loopback(teacher) as server:
        monkeypatch.setenv("HOME", str(tiny.parent))
        tiny_by_home = f"~/{tiny.name}"
        chosen = {"difficulty_student": tiny_by_home, "easy_share": 0.5, "seed": 1}
        report = generate(folder, server.url, **settings(folder, "m", **chosen))
    records = load_records(folder / "out.jsonl")
    assert {record.id: record.difficulty for record in records} | {"q0": 1, "q3": 1} == {
        record.id: record.difficulty for record in records
    }
    assert len(records) == 4 and report["questions"]["dropped"] == {"easy, not chosen": 2}
    assert report["requests"] == {"m": 12, tiny_by_home: 12} and tiny_by_home in report["rule"]


class Received:
    """A sink that keeps what comes."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}

    def answered(self, request: Request, answer: Answer) -> None:
        self.answers[request.id] = answer

    def failed(self, request: Request, reason: str) -> None:
        raise AssertionError(reason)


def ask_locally(tiny: Path, sampling: Sampling, texts: list[str], **options: Any) -> list[Answer]:
    sink = Received()
    requests = [Request(str(i), str(i), "p", text) for i, text in enumerate(texts)]
    LocalTeacher(str(tiny), sampling, **options).answer_all(requests, sink, proven=True)
    return [sink.answers[str(i)] for i in range(len(texts))]


def test_local_answers_do_not_depend_on_the_batch(tiny: Path) -> None:
    texts = ["Say aloud. What is 1 + 4? The answer is ….", "Hm", "x" * 990, "Go in steps: What is 4 + 1?"]
    together = ask_locally(tiny, Sampling(max_tokens=50), texts, batch_size=4)
    alone = ask_locally(tiny, Sampling(max_tokens=50), texts, batch_size=1)
    assert together == alone and together[0] == Answer(SENTENCE, "stop", together[0].prompt_tokens, len(SENTENCE) + 1)
    assert together[2].refusal is not None and "exceed the model's 1024 positions" in together[2].refusal
    cut = ask_locally(tiny, Sampling(max_tokens=3), texts[:1])[0]
    assert (cut.text, cut.finish_reason, cut.completion_tokens) == ("Two", "length", 3)


def test_vllm_is_given_what_fits_its_context(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it, which as vLLM itself ends with an error at a prompt that is longer than its context, and
    answers in an order of its own. with_vllm.py runs the real one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    given: list[dict[str, Any]] = []
    engines: list[Any] = []

    class LLM:
        def __init__(self, model: str, seed: int, max_logprobs: int) -> None:
            if "broken" in model:
                raise RuntimeError("Engine core initialization failed.\nSee root cause above.")
            assert model == str(tiny)
            self.llm_engine, self.engine_core = self, self
            self.model_config = SimpleNamespace(max_model_len=100)
            self.waiting: list[tuple[str, list[int]]] = []
            self.closed = False
            engines.append(self)

        def get_tokenizer(self) -> Any:
            return tokenizer

        def enqueue(self, prompts: list[dict[str, list[int]]], parameters: Any, use_tqdm: bool) -> None:
            for number, prompt in enumerate(prompts):
                if len(prompt["prompt_token_ids"]) > 100:
                    raise ValueError("The decoder prompt is longer than the maximum model length of 100.")
                self.waiting.append((str(number), prompt["prompt_token_ids"]))
            given.append(vars(parameters))

        def has_unfinished_requests(self) -> bool:
            return bool(self.waiting)

        def step(self) -> list[Any]:
            number, ids = self.waiting.pop()
            text = str(tokenizer.decode(ids)).partition("user: ")[2][0].upper()
            best = SimpleNamespace(text=text, token_ids=[1, 2, 3, 256], finish_reason="stop")
            return [SimpleNamespace(request_id=number, prompt_token_ids=ids, outputs=[best])]

        def shutdown(self) -> None:
            self.closed = True

    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    requests = [Request(str(i), str(i), "p", text) for i, text in enumerate(["a", "b" * 70, "c", "d" * 200, "e"])]
    teacher, sink = VLLMTeacher(str(tiny), Sampling(max_tokens=20)), Received()
    teacher.answer_all(requests, sink, proven=True)
    assert given == [
        {"max_tokens": 20, "temperature": 0.0, "stop_token_ids": [tokenizer.eos_token_id], "logprobs": None}
    ]
    prompt = len(tokenizer("user: aassistant: ").input_ids)
    assert {i: sink.answers[i] for i in "024"} == {
        i: Answer(text, "stop", prompt, 4) for i, text in zip("024", "ACE", strict=True)
    }
    monkeypatch.setenv("HOME", str(tiny.parent))
    VLLMTeacher(f"~/{tiny.name}", Sampling(max_tokens=20)).answer_all(requests[:1], sink, proven=True)
    with pytest.raises(
        ValueError, match=r"^teacher './nowhere': no such folder, wanted a folder saved by save_pretrained"
    ):
        VLLMTeacher("./nowhere", Sampling()).answer_all(requests, sink, proven=True)
    with pytest.raises(
        GenerateError, match=r"^teacher 'a/broken' cannot be loaded by vLLM: Engine core initialization failed. See"
    ):
        VLLMTeacher("a/broken", Sampling()).answer_all(requests, sink, proven=True)
    for name, length in (("1", prompt + 69), ("3", prompt + 199)):
        reason = f"{length} tokens of prompt and max_tokens=20 exceed the model's 100 positions"
        assert sink.answers[name] == Answer("", "refused", refusal=reason)
    with pytest.raises(
        GenerateError, match=rf"^teacher '{tiny}': question '1': {prompt + 69} tokens of prompt and max"
    ):
        teacher.answer_all(requests, sink, proven=False)
    tokenizer.chat_template = None
    with pytest.raises(
        GenerateError, match=rf"^teacher '{tiny}': its tokenizer has no chat template, wanted an instruct"
    ):
        teacher.answer_all(requests, sink, proven=True)
    assert len(engines) == 4 and all(engine.closed for engine in engines)  # whatever came: the device is free again


def test_vllm_that_cannot_be_imported_is_not_said_to_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text("import a_package_that_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    request = Request("1", "1", "p", "Hm")
    with pytest.raises(
        GenerateError,
        match=r"^engine vllm: vLLM cannot be imported \(No module named 'a_package_that_it_needs'\), wanted",
    ):
        VLLMTeacher(str(tmp_path), Sampling()).answer_all([request], Received(), proven=True)


def test_positions_of_a_model_that_sees_pictures(tiny: Path, tmp_path: Path) -> None:
    """Its limit stands in the configuration of its text model alone."""
    text = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    fits, long = ask_locally(tmp_path, Sampling(max_tokens=4), ["Hm", "x" * 99])
    assert fits.refusal is None and fits.completion_tokens
    assert long.refusal is not None and "exceed the model's 64 positions" in long.refusal


def test_sampling_is_seeded(tiny: Path) -> None:
    hot = Sampling(max_tokens=20, temperature=3.0)
    first, again, other = (ask_locally(tiny, hot, ["Say"], seed=seed)[0].text for seed in (1, 1, 2))
    assert first == again != other


def test_local_log_probabilities(tiny: Path) -> None:
    """Against a forward pass over prompt and answer; those of a sampled answer too are at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokens = StudentTokens("tiny", tokenizer)
    for temperature in (0.0, 2.0):
        sampling = Sampling(max_tokens=30, temperature=temperature, top_logprobs=4, student=tokens)
        texts = ["Say aloud. What is 1 + 4? The answer is ….", "Hm"]
        for text, answer in zip(texts, ask_locally(tiny, sampling, texts), strict=True):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            prompt_ids = tokenizer(prompt).input_ids
            assert answer.topk is not None
            ids = answer.topk.token_ids.tolist()
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
            wanted, wanted_ids = logits.log_softmax(-1).topk(4)
            torch.testing.assert_close(torch.from_numpy(answer.topk.logprobs.copy()), wanted, atol=1e-4, rtol=1e-4)
            assert answer.topk.top_ids[:, 0].tolist() == wanted_ids[:, 0].tolist()
            assert len(ids) == answer.completion_tokens - (answer.finish_reason == "stop")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ("no_template", {}, "its tokenizer has no chat template, wanted an instruct model"),
        ("tiny", {"max_tokens": 1000}, "question 'q0': "),
        ("absent", {}, "wanted smollm2-135m or gemma3-270m, a Hugging Face causal LM folder"),
        (
            "tiny",
            {"top_logprobs": 301, "student": "tiny"},
            "top_logprobs: given 301, wanted at most 300, the tokens of ",
        ),
        ("tiny", {"top_logprobs": 3, "student": "no/such"}, "student: the tokenizer of 'no/such' cannot be loaded"),
    ],
)
def test_local_models_that_cannot_be_used(
    teacher: str,
    changes: dict[str, Any],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    name = "nobody/nothing" if teacher == "absent" else request.getfixturevalue(teacher)
    if changes.get("student") == "tiny":
        changes = changes | {"student": name}
    capsys.readouterr()
    assert main(command(folder, "", **settings(folder, name, base_url=None, **changes))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and message in lines[0]
    assert {path.name for path in folder.glob("out*")} <= {"out.ledger.jsonl.lock"}


def test_models_that_answer_last_are_looked_for_first(
    tiny: Path, no_template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with loopback(lambda body, number: completion("So.\nThe answer is 5.")) as server:
        line = refused(tmp_path, capsys, server.url, difficulty_student="no/such")
        assert line.startswith("difficulty_student: the tokenizer of 'no/such' cannot be loaded (")
        line = refused(tmp_path, capsys, server.url, difficulty_student=no_template)
        assert line == f"difficulty_student: '{no_template}' has no chat template, wanted an instruct model"
        line = refused(tmp_path, capsys, server.url, difficulty_student="./nowhere")
        assert line == "difficulty_student './nowhere': no such folder, wanted a folder saved by save_pretrained"
        assert server.bodies == []
    line = refused(tmp_path, capsys, None, teacher=tiny, judge="no/such")
    assert line.startswith("judge: the tokenizer of 'no/such' cannot be loaded (")
    assert not (tmp_path / "out.ledger.jsonl").exists()


def test_models_that_answer_last_are_loaded_first(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What their tokenizers do not tell: weights, and room for the prompts."""
    write(folder / "questions.jsonl", [{"id": "q", "question": "Who sings?", "answer": "the Beatles"}])
    for name in ("no_weights", "small"):
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / name)
    AutoConfig.from_pretrained(tiny).save_pretrained(tmp_path / "no_weights")
    tiny_student(max_position_embeddings=64).save_pretrained(tmp_path / "small")
    given: dict[str, Any] = {"prompts": folder / "mine", "max_tokens": 20}
    with loopback(lambda body, number: completion("So.\nThe answer is Fab Four.")) as server:
        for role in ("judge", "difficulty_student"):
            url, teacher = ("", tiny) if role == "judge" else (server.url, "m")
            for name, message in (
                (
                    "no_weights",
                    " cannot be loaded: wanted smollm2-135m or gemma3-270m, a Hugging Face causal LM folder",
                ),
                ("small", ": question 'q': "),
            ):
                changes = given | {"base_url": url or None, "teacher": teacher, role: tmp_path / name}
                capsys.readouterr()
                assert main(command(folder, url, **changes)) == 2
                (line,) = (line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line)
                assert line.startswith(f"mind: error: {role} '{tmp_path}/{name}'{message}")
        assert server.bodies == []
    assert not (folder / "out.ledger.jsonl").exists()
