"""The ledger: every answer a model gave, appended to a JSONL file and on the disk before anything else happens.

A line is found again by its key, the hash of all that the answer depends on (model, sampling settings, prompt). So what
is asked twice is answered once, a changed prompt is asked anew, and nobody can mix up the answers of two teachers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mind.generate import GenerateError
from mind.generate.topk import TopK


@dataclass(frozen=True)
class Request:
    """One prompt for one model. id and perspective say what it is about, key finds its answer."""

    key: str
    id: str
    perspective: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What a model returned.

    finish_reason: "stop", "length" (max_tokens reached) or another word of the server's.
    prompt_tokens, completion_tokens: None where the server does not say.
    refusal: why the prompt was not answered and never will be, e.g. because it is too long.
    """

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    refusal: str | None = None
    topk: TopK | None = None


def request_key(identity: Mapping[str, Any], prompt: str) -> str:
    """identity: the model and its settings, as JSON values."""
    return hashlib.sha256(json.dumps([identity, prompt], sort_keys=True).encode()).hexdigest()[:32]


class Ledger:
    """The answers so far, and the file they are in. A context manager: one process has it at a time.

    answers: key -> Answer, without their log-probabilities, which `read_topk` streams.

    A last line that a kill tore is cut off, so its prompt is asked again; any other fault is an error.

    Raises: GenerateError naming the file and line, or when another process has the ledger.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.answers: dict[str, Answer] = {}
        self._lock = FileLock(f"{self.path}.lock")

    def __enter__(self) -> Ledger:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise GenerateError(f"{self.path}: another mind generate is writing to it, wanted one at a time") from None
        try:
            if self.path.exists():
                self._mend()
                for key, answer in self._read():
                    self.answers[key] = replace(answer, topk=None)
        except OSError as error:
            self._lock.release()
            raise GenerateError(f"{self.path}: cannot be read: {error.strerror}") from error
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def append(self, request: Request, model: str, answer: Answer) -> None:
        """Returns when the answer is on the disk.

        Raises: GenerateError when it cannot be written.
        """
        line: dict[str, Any] = {"key": request.key, "id": request.id, "perspective": request.perspective}
        line |= {"model": model} | asdict(replace(answer, topk=None))
        line["topk"] = None if answer.topk is None else answer.topk.to_json()
        new = not self.path.exists()
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()  # the whole line or an error: an unbuffered write may end early where the disk is full
                os.fsync(file.fileno())
            if new:  # the file's name, too
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        except OSError as error:
            raise GenerateError(f"{self.path}: cannot be written: {error}") from error
        self.answers[request.key] = replace(answer, topk=None)

    def read_topk(self) -> Iterator[tuple[str, TopK]]:
        """(key, log-probabilities) of every answer that has them, one at a time."""
        if self.path.exists():
            for key, answer in self._read():
                if answer.topk is not None:
                    yield key, answer.topk

    def _mend(self) -> None:
        """Makes the file end with a whole line."""
        with open(self.path, "r+b") as file:
            tail = b"".join(deque(file, maxlen=1))
            if not tail or tail.endswith(b"\n"):
                return
            try:
                json.loads(tail)
            except ValueError:
                file.truncate(file.seek(0, os.SEEK_END) - len(tail))
            else:  # only the line break is missing
                file.write(b"\n")

    def _read(self) -> Iterator[tuple[str, Answer]]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    fields = json.loads(line)
                    topk = fields["topk"] and TopK.from_json(fields["topk"])
                    names = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "refusal")
                    yield fields["key"], Answer(**{name: fields[name] for name in names}, topk=topk)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise GenerateError(
                        f"{self.path}:{number}: is no answer of mind generate ({type(error).__name__}: {error}): "
                        "delete the line to ask its question again"
                    ) from error
