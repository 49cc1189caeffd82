"""The figures of a run and of several side by side.

Lines: faint is what each logged step tells, bold the mean of up to WINDOW steps around it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from mind.bootstrap import LEVEL, bootstrap_means, interval
from mind.report.files import Run, write_whole

PICTURE_FILE = "perspectives.png"
WINDOW = 9  # logged steps that a bold line averages over
WIDTH = 11.0  # inches of a figure
MAX_MAPS = 3  # heat maps beside each other: more could not be read
MAX_COLUMNS = 60  # of a heat map: of a longer run several steps share one
# Okabe and Ito's colours, told apart by the colour-blind too; the lightest left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
LINES, MARKERS = ("-", "--", ":"), "osD"  # once, twice, three times through the colours
Curve = tuple[list[int], list[float]]


def draw(folder: str | os.PathLike[str], history: Sequence[Mapping[str, Any]], perspectives: Sequence[str]) -> None:
    """Draws perspectives.png: the assistant's score and the student's loss for each perspective over the steps.

    Dots at step 0: the mean over the training questions of the assistant's warm-up, after it. Without a teaching
    assistant, the loss alone.
    """
    kinds = [
        (kind, label)
        for kind, label in (("score", "the assistant's score"), ("loss", "the student's loss (nats per token)"))
        if any(key.startswith(f"perspective_{kind}/") for entry in history for key in entry)
    ]
    if not kinds:
        return
    figure = Figure(figsize=(9, 3.6 * len(kinds)))
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)
    for axis, (kind, label) in zip(axes[:, 0], kinds, strict=True):
        for k, name in enumerate(perspectives):
            colour = f"C{k % 10}"
            axis.plot(*curve(history, f"assistant_warmup/perspective_{kind}/{name}"), "o", color=colour)
            _line(axis, curve(history, f"perspective_{kind}/{name}"), colour, name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].set_title("What suits the student: each perspective over training")
    axes[0, 0].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes[-1, 0].set_xlabel("optimiser step (dots: the training questions of the assistant's warm-up, after it)")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    write_whole(Path(folder) / PICTURE_FILE, png(figure, dpi=150))


def png(figure: Figure, dpi: int = 130) -> bytes:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may hold dollar signs
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    return buffer.getvalue()


def curve(history: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """(steps, values) of what was logged under the key, without NaN and Inf."""
    points = [(entry["step"], entry[key]) for entry in history if key in entry and math.isfinite(entry[key])]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Means over symmetric windows: narrower towards the ends, where a one-sided window would lag behind a trend."""
    result = []
    for i in range(len(values)):
        half = min(WINDOW // 2, i, len(values) - 1 - i)
        window = values[i - half : i + half + 1]
        result.append(sum(window) / len(window))
    return result


def accuracy(runs: Sequence[Run]) -> Figure | None:
    """Held-out accuracy before (hollow) and after (filled), with bootstrap intervals."""
    measured = [run for run in runs if run.metrics["before"]["answers"]]
    if not measured:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 0.75 * len(measured)))
    axis = figure.subplots()
    furthest = 0.0
    for row, run in enumerate(measured):
        colour = colour_of(runs, run)
        for when, y, fill in (("before", row - 0.14, "white"), ("after", row + 0.14, colour)):
            if when not in run.metrics:
                continue
            value, (low, high) = accuracy_interval(run.metrics[when], when)
            axis.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2)
            axis.plot(100 * value, y, "o", color=colour, markerfacecolor=fill, markersize=8, clip_on=False)
            label = f"{when} {100 * value:.1f} %"
            axis.annotate(label, (100 * high, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
            furthest = max(furthest, 100 * high)
    axis.set_yticks(range(len(measured)), [run.name for run in measured])
    axis.set_ylim(len(measured) - 0.5, -0.5)
    axis.set_xlim(0, 1.25 * furthest + 2)  # room for the last label
    axis.set_xlabel(f"accuracy on held-out questions, %, and its {LEVEL:.0%} interval")
    _tidy(axis)
    axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= min(100, axis.get_xlim()[1])])
    return figure


def accuracy_interval(measurement: Mapping[str, Any], key: str) -> tuple[float, list[float]]:
    """(accuracy, its bootstrap interval) of a measurement's answers."""
    correct = [float(answer["correct"]) for answer in measurement["answers"]]
    return sum(correct) / len(correct), interval(bootstrap_means(correct, key))


def loss_parts(runs: Sequence[Run]) -> Figure | None:
    return _lines(
        runs,
        {
            "cross_entropy": "weighted cross-entropy, nats per token",
            "consistency": "answer consistency (mcc_kd: symmetric KL), nats",
            "kl": "KL to the teacher, nats",
            "meta_loss": "the assistant's calibration loss, nats",
        },
    )


def selection(runs: Sequence[Run]) -> Figure | None:
    return _lines(
        runs,
        {
            "selected_rationales": "selected rationales |I| per question",
            "weight_entropy": "entropy of the weights α, nats",
        },
    )


def machine(runs: Sequence[Run]) -> Figure | None:
    return _lines(
        runs,
        {"supervised_tokens_per_second": "supervised tokens per second", "peak_memory_bytes": "peak memory, GiB"},
        scale={"peak_memory_bytes": 2.0**-30},
    )


def correlation(runs: Sequence[Run]) -> Figure | None:
    """Rank correlation over the steps, and each perspective's score against its loss after training."""
    scored = [run for run in runs if curve(run.history, "rank_correlation")[0]]
    if not scored:
        return None
    figure = Figure(figsize=(WIDTH, 3.6))
    left, right = figure.subplots(1, 2)
    for run in scored:
        colour, turn = colour_of(runs, run), _turn(runs, run)
        _line(left, curve(run.history, "rank_correlation"), colour, run.name, LINES[turn])
        after = run.metrics.get("after") or {"perspective_loss": {}, "perspective_score": None}
        scores = after["perspective_score"] or {}
        points = {name: (after["perspective_loss"][name], score) for name, score in scores.items()}
        for point in points.values():
            right.plot(*point, MARKERS[turn], color=colour)
        if len(scored) == 1:
            _label(right, points)
    right.set_visible(right.has_data())  # not of runs that were stopped
    left.axhline(-1, color="#999999", linestyle=":", linewidth=1)
    left.set_ylim(-1.08, 1.08)
    left.set_xlabel("optimiser step")
    left.set_title("rank correlation of score and loss (−1: calibrated)", fontsize=10, loc="left")
    right.set_xlabel("the student's loss, nats per token")
    right.set_title("score against loss, after training" + _held_out(scored), fontsize=10, loc="left")
    right.set_ylim(-0.08, 1.08)
    for axis in (left, right):
        _tidy(axis)
    _legend(figure, left, runs)
    return figure


def _label(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names the points at the right edge, highest first, far enough apart to be read."""
    place = math.inf
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        place = min(place - 0.085, y)
        lowest = 0.085 * sum(other < y for _, other in points.values())  # what the labels below need
        place = max(place, lowest - 0.05)
        axis.annotate(
            name,
            (x, y),
            xytext=(1.03, place),
            textcoords=axis.get_yaxis_transform(),
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.7, "relpos": (0, 0.5)},
            va="center",
            fontsize=8.5,
        )


def score_map(runs: Sequence[Run]) -> Figure | None:
    return _heat_maps(runs, "perspective_score", "the assistant's score", "viridis", limits=(0, 1))


def loss_map(runs: Sequence[Run]) -> Figure | None:
    return _heat_maps(runs, "perspective_loss", "the student's loss, nats per token", "magma_r")


def selected_map(runs: Sequence[Run]) -> Figure | None:
    return _heat_maps(runs, "perspective_selected", "share of the questions that have it", "Blues", limits=(0, 1))


def _heat_maps(
    runs: Sequence[Run], kind: str, label: str, colours: str, limits: tuple[float, float] | None = None
) -> Figure | None:
    """Perspective by step, the runs side by side; the warm-up's means, where there are some, as step 0."""
    names = list(dict.fromkeys(name for run in runs for name in run.perspectives))
    shown = [run for run in runs if any(curve(run.history, f"{kind}/{name}")[0] for name in run.perspectives)]
    if not shown:
        return None
    tables = [heat_table(run, kind, names) for run in shown]
    if limits is None:
        limits = min(np.nanmin(table) for table, _ in tables), max(np.nanmax(table) for table, _ in tables)
    columns = min(MAX_MAPS, len(shown))
    lines = math.ceil(len(shown) / columns)
    size = max(WIDTH, 2.2 + 4.0 * columns), lines * max(2.8, 1.2 + 0.33 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, run, (table, edges) in zip(axes, shown, tables, strict=False):
        axis.set_facecolor("#dddddd")  # nothing measured
        rows = np.arange(len(names) + 1) - 0.5
        image = axis.pcolormesh(edges, rows, np.ma.masked_invalid(table), cmap=colours, vmin=limits[0], vmax=limits[1])
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel("optimiser step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.xaxis.set_major_formatter(lambda step, _: f"{step:.0f}" if step >= 0 else "")  # the warm-up is wide, too
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
        if len(runs) > 1:
            axis.set_title(run.name, fontsize=10, color=colour_of(runs, run), fontweight="bold")
    figure.colorbar(image, ax=list(axes), label=label, pad=0.02)
    return figure


def heat_table(run: Run, kind: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """((perspectives, columns) means, (columns + 1,) edges in steps), NaN where nothing was measured.

    What is logged at a step tells of all steps since it was logged before: its column begins behind that one.
    """
    steps = sorted({entry["step"] for entry in run.history if any(f"{kind}/{name}" in entry for name in names)})
    groups = [group for group in np.array_split(np.asarray(steps), min(MAX_COLUMNS, len(steps))) if len(group)]
    edges = [0.5, *(group[-1] + 0.5 for group in groups)]
    columns = []
    for group in groups:
        inside = [entry for entry in run.history if group[0] <= entry["step"] <= group[-1]]
        columns.append([_mean(curve(inside, f"{kind}/{name}")[1]) for name in names])
    start = [_mean(curve(run.history, f"assistant_warmup/{kind}/{name}")[1]) for name in names]
    if not all(math.isnan(value) for value in start):
        columns.insert(0, start)
        edges.insert(0, edges[0] - (edges[1] - edges[0]))
    return np.asarray(columns).T, np.asarray(edges)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _lines(runs: Sequence[Run], titles: Mapping[str, str], scale: Mapping[str, float] | None = None) -> Figure | None:
    """One panel for each key that any run logged and that is not zero throughout."""
    scale = scale or {}
    keys = [key for key in titles if any(any(curve(run.history, key)[1]) for run in runs)]
    if not keys:
        return None
    columns = min(2, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(WIDTH, 3.2 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, key in zip(panels, keys, strict=False):
        for run in runs:
            steps, values = curve(run.history, key)
            points = steps, [scale.get(key, 1.0) * value for value in values]
            _line(axis, points, colour_of(runs, run), run.name, LINES[_turn(runs, run)])
        axis.set_title(titles[key], fontsize=10, loc="left")
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.set_xlabel("optimiser step")
        _tidy(axis)
    for axis in panels[len(keys) :]:
        axis.set_visible(False)
    _legend(figure, panels[0], runs)
    figure.tight_layout()
    return figure


def _line(axis: Axes, points: Curve, colour: str, label: str, line: str = "-") -> None:
    steps, values = points
    axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
    axis.plot(steps, smooth(values), line, color=colour, linewidth=2, label=label)


def _legend(figure: Figure, axis: Axes, runs: Sequence[Run]) -> None:
    """Names the runs once for all panels, where there is more than one."""
    if len(runs) > 1:
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def colour_of(runs: Sequence[Run], run: Run) -> str:
    return COLOURS[_place(runs, run) % len(COLOURS)]


def _turn(runs: Sequence[Run], run: Run) -> int:
    """Which of LINES and MARKERS tells the run from another one of the same colour."""
    return _place(runs, run) // len(COLOURS) % len(LINES)


def _place(runs: Sequence[Run], run: Run) -> int:
    return next(i for i, other in enumerate(runs) if other is run)


def _held_out(runs: Sequence[Run]) -> str:
    return f" ({runs[0].metrics.get('measured_on', '?')})" if len(runs) == 1 else ""


def _tidy(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
