"""Runs of `mind generate` in the tests: questions.jsonl in a folder becomes out.jsonl beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mind.cli import main

from .loopback import sums

for name in (
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
):  # of whoever runs the tests
    os.environ.pop(name, None)
    os.environ.pop(name.lower(), None)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(folder: Path, url: str, **changes: Any) -> list[str]:
    """The command line; questions.jsonl is made, unless it is there."""
    data = folder / "questions.jsonl"
    if not data.exists():
        write(data, sums(4))
    given = {"data": data, "output": folder / "out.jsonl", "teacher": "m", "base_url": url}
    settings = given | {"retry_wait": 0.01, "easy_share": 1, "disable_tqdm": True} | changes
    return ["generate", *(f"--{name}={value}" for name, value in settings.items() if value is not None)]


def generate(folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    """The report of a run that succeeds."""
    assert main(command(folder, url, **changes)) == 0
    return json.loads((folder / "out.report.json").read_text())


def refused(
    folder: Path, capsys: pytest.CaptureFixture[str], url: str = "http://127.0.0.1:9/v1", **changes: Any
) -> str:
    """The one line about the error."""
    capsys.readouterr()
    assert main(command(folder, url, **changes)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mind: error: "), lines
    return lines[0].removeprefix("mind: error: ")
