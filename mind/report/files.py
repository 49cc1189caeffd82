"""What a run leaves: metrics.json and log.jsonl, written whole or not at all, read with their faults named.

A measurement is a dictionary as it stands in metrics.json:

    {"accuracy": 0.17, "answers": [{"id": …, "wanted": …, "given": …, "correct": …}, …],
     "perspective_loss": {"decomposition": 1.21, …},        nats per token
     "perspective_score": {"decomposition": 0.62, …}}

each part null where there is nothing to measure it on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE, LOG_FILE = "metrics.json", "log.jsonl"
METRICS_VERSION = 1  # of a file that names none, too
_MEASUREMENT = {"accuracy", "answers", "perspective_loss", "perspective_score"}
_PER_PERSPECTIVE = {"perspective_loss", "perspective_score", "perspective_selected"}
_ANSWER = {"id", "wanted", "given", "correct"}


@dataclass(frozen=True)
class Run:
    """A run as it was left behind. metrics, history: of metrics.json and log.jsonl."""

    name: str
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]

    @property
    def perspectives(self) -> tuple[str, ...]:
        """In the order in which the run holds them."""
        logged = (key.partition("/") for entry in self.history for key in entry)
        names = [name for kind, _, name in logged if kind in _PER_PERSPECTIVE]
        return tuple(dict.fromkeys([*self.metrics["before"]["perspective_loss"], *names]))


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders, at least one, each named by its path below the folder that holds them all.

    Raises: ValueError naming the folder, file or line that is not what a run of mind train leaves.
    """
    paths = [os.path.abspath(folder) for folder in folders]
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    # A name of bytes that are no text is shown with marks in their place.
    names = [os.fsencode(os.path.relpath(path, base)).decode(errors="replace") for path in paths]
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: str, name: str) -> Run:
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder, wanted the output_dir of a run of mind train")
    metrics = read_metrics(folder)
    path = os.path.join(folder, METRICS_FILE)
    if metrics is None:
        raise ValueError(f"{path}: no such file, wanted the output_dir of a run of mind train")
    for when in ("before", "after"):
        # A run that was stopped has no "after".
        if not _is_measurement(metrics.get(when, metrics["before"]), like=metrics["before"]):
            raise ValueError(f"{path}: {when!r} is no measurement that mind train wrote")
    seconds = metrics.get("seconds", {})
    if not isinstance(seconds, dict) or not all(isinstance(value, int | float) for value in seconds.values()):
        raise ValueError(f"{path}: 'seconds' is not what mind train wrote")
    return Run(name, metrics, read_log(folder))


def _is_measurement(measurement: Any, like: Mapping[str, Any]) -> bool:
    """Whether it has a measurement's parts, and answers to the same questions."""
    if not isinstance(measurement, dict) or not _MEASUREMENT.issubset(measurement):
        return False
    answers, losses = measurement["answers"] or [], measurement["perspective_loss"]
    scores = measurement["perspective_score"] or {}
    return (
        isinstance(answers, list)
        and all(isinstance(answer, dict) and _ANSWER.issubset(answer) for answer in answers)
        and all(isinstance(answer["id"], str) and isinstance(answer["correct"], bool) for answer in answers)
        and [answer["id"] for answer in answers] == [answer["id"] for answer in like["answers"] or []]
        and isinstance(losses, dict)
        and isinstance(scores, dict)
        and losses.keys() >= scores.keys()
        and all(isinstance(value, int | float) for value in (*losses.values(), *scores.values()))
    )


def write_metrics(folder: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes metrics.json."""
    content = {"version": METRICS_VERSION, **metrics}
    write_whole(Path(folder) / METRICS_FILE, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The metrics in a run's folder, None when it has none.

    Raises: ValueError when the file is not what write_metrics of this version writes.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(metrics, dict) or "before" not in metrics:
        raise ValueError(f"{path}: has no 'before', wanted the metrics that mind train wrote")
    if metrics.setdefault("version", METRICS_VERSION) != METRICS_VERSION:
        raise ValueError(f"{path}: is of version {metrics['version']!r}, wanted {METRICS_VERSION}")
    return metrics


def write_log(folder: str | os.PathLike[str], history: Iterable[Mapping[str, Any]]) -> None:
    """Writes log.jsonl: one JSON object for each logged step, NaN and Inf as strings."""
    lines = [
        json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in entry.items()})
        for entry in history
    ]
    write_whole(Path(folder) / LOG_FILE, "".join(line + "\n" for line in lines))


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The logged steps of a run, every value a number again.

    Raises: ValueError when there is no log, or naming the line that write_log did not write.
    """
    path = Path(folder) / LOG_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read: {error.strerror}; wanted a run of mind train that reached a checkpoint"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from error
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f"{path}:{number}: has no step, wanted a line that mind train logged")
        try:
            history.append({name: value if name == "step" else float(value) for name, value in entry.items()})
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}:{number}: holds what is no number: {error}") from error
    return history


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
