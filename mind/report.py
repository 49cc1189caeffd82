"""What a run leaves for its user: metrics.json, log.jsonl, the picture and the table.

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
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

METRICS_FILE, LOG_FILE, PICTURE_FILE = "metrics.json", "log.jsonl", "perspectives.png"
WINDOW = 9  # optimiser steps that the picture's lines average over


def write_metrics(folder: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes metrics.json whole or not at all."""
    _write(Path(folder) / METRICS_FILE, json.dumps(metrics, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The metrics in a run's folder, None when it has none.

    Raises: ValueError when the file is not what write_metrics writes.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(metrics, dict) or "before" not in metrics:
        raise ValueError(f"{path}: has no 'before', want the metrics that mind train wrote")
    return metrics


def write_log(folder: str | os.PathLike[str], history: Iterable[Mapping[str, Any]]) -> None:
    """Writes log.jsonl: one JSON object for each logged step, NaN and Inf as strings."""
    lines = [
        json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in entry.items()})
        for entry in history
    ]
    _write(Path(folder) / LOG_FILE, "".join(line + "\n" for line in lines))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def draw(folder: str | os.PathLike[str], history: Sequence[Mapping[str, Any]], perspectives: Sequence[str]) -> None:
    """Draws perspectives.png: the assistant's score and the student's loss for each perspective over the steps.

    Faint: each step's mean over its questions. Bold: the mean of up to WINDOW steps around it. Dots at step 0: the mean
    over all training questions, the assistant warmed up. Without a teaching assistant, the loss alone.
    """
    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot

    kinds = [
        (kind, label)
        for kind, label in (("score", "the assistant's score"), ("loss", "the student's loss (nats per token)"))
        if any(key.startswith(f"perspective_{kind}/") for entry in history for key in entry)
    ]
    if not kinds:
        return
    figure, axes = pyplot.subplots(len(kinds), 1, sharex=True, figsize=(9, 3.6 * len(kinds)), squeeze=False)
    for axis, (kind, label) in zip(axes[:, 0], kinds, strict=True):
        for k, name in enumerate(perspectives):
            colour = f"C{k % 10}"
            start = _curve(history, f"assistant_warmup/perspective_{kind}/{name}")
            steps, values = _curve(history, f"perspective_{kind}/{name}")
            axis.plot(*start, "o", color=colour)
            axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
            axis.plot(steps, _smooth(values), color=colour, linewidth=2, label=name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].set_title("What suits the student: each perspective over training")
    axes[0, 0].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes[-1, 0].set_xlabel("optimiser step (dots: all training questions, the assistant warmed up)")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    path = Path(folder) / PICTURE_FILE
    partial = path.with_name("partial-" + path.name)
    figure.savefig(partial, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    os.replace(partial, path)


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over symmetric windows: narrower towards the ends, where a one-sided window would lag behind a trend."""
    result = []
    for i in range(len(values)):
        half = min(WINDOW // 2, i, len(values) - 1 - i)
        window = values[i - half : i + half + 1]
        result.append(sum(window) / len(window))
    return result


def table(metrics: Mapping[str, Any]) -> Table:
    """The measurements before and after, side by side."""
    before, after = metrics["before"], metrics["after"]
    result = Table(title=f"{metrics['student']}, method {metrics['method']}", title_justify="left")
    result.add_column("")
    for column in ("before", "after", "change"):
        result.add_column(column, justify="right")
    if before["accuracy"] is not None:
        count = len(before["answers"])
        change = 100 * (after["accuracy"] - before["accuracy"])
        shares = (f"{100 * measured['accuracy']:.1f} %" for measured in (before, after))
        result.add_row(f"accuracy on {count} held-out questions", *shares, f"{change:+.1f} %", style="bold")
    for kind, title in (
        ("loss", "student's loss, nats per token"),
        ("score", "assistant's score (before: untrained)"),
    ):
        if before[f"perspective_{kind}"] is None:
            continue
        result.add_section()
        result.add_row(f"{title}, {metrics['measured_on']}", style="italic")
        for name, old in before[f"perspective_{kind}"].items():
            new = after[f"perspective_{kind}"][name]
            result.add_row("  " + name, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
    return result
