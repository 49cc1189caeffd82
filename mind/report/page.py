"""`mind report`: runs side by side on one self-contained HTML page, and its pictures as PNGs."""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from mind.bootstrap import bootstrap_means, interval
from mind.report import pictures
from mind.report.files import Run, write_whole
from mind.report.pictures import accuracy_interval, colour_of, curve, png

if TYPE_CHECKING:
    from mind.latent import LatentAnalysis

PAGE_FILE, TEMPLATE = "report.html", "page.html.jinja"
MAX_CHANGED_ANSWERS = 8  # shown of each run and kind
SECTIONS = (
    (
        "accuracy",
        "Accuracy",
        "Held-out questions, zero-shot chain of thought, greedy. Hollow: before training. Filled: after. The bars are "
        "bootstrap intervals over the questions.",
        pictures.accuracy,
    ),
    (
        "loss_parts",
        "The parts of the loss",
        "Before their weights. Faint: as logged, each the mean since the one before. Bold: averaged over those around "
        "it.",
        pictures.loss_parts,
    ),
    (
        "perspective_score",
        "What the teaching assistant thinks suits the student",
        "Its mean score of each perspective's rationales in each step's questions. Step 0: those of its warm-up, after "
        "it.",
        pictures.score_map,
    ),
    (
        "perspective_loss",
        "What the student finds hard",
        "Its mean loss on each perspective's rationales, over those that were measured. Grey: none was. Step 0: before "
        "training, for the assistant's warm-up.",
        pictures.loss_map,
    ),
    (
        "perspective_selected",
        "Which perspectives were selected",
        "Of the questions that have a rationale of this perspective, the share in which the student learned from it.",
        pictures.selected_map,
    ),
    (
        "selection",
        "How many, and how evenly weighted",
        "One perspective alone has an entropy of 0, all K with the same weight have log K.",
        pictures.selection,
    ),
    (
        "correlation",
        "Is the assistant calibrated?",
        "It is where a higher score means a lower loss: a rank correlation of −1, points that fall to the right.",
        pictures.correlation,
    ),
    ("machine", "Speed and memory", "As logged while it trained.", pictures.machine),
)


ROWS = (
    ("student", "student"),
    ("method", "method"),
    ("training questions", "questions"),
    ("optimiser steps", "steps"),
    ("accuracy before, %", "before"),
    ("accuracy after, %", "after"),
    ("change, points", "change"),
    ("rank correlation of score and loss", "correlation"),
    ("supervised tokens per second", "speed"),
    ("peak memory", "memory"),
    ("time", "minutes"),
)


@dataclass(frozen=True)
class Section:
    """One picture of the page. file: its PNG's name."""

    file: str
    title: str
    text: str
    image: bytes

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.image).decode()


def write_report(runs: Sequence[Run], output: str | os.PathLike[str], latent: LatentAnalysis | None = None) -> Path:
    """Writes report.html and the PNGs into the folder `output` and returns the page's path, written last.

    The PNGs of an earlier page there go, also those that this one has none of.

    runs: as `read_runs` returns them.

    Raises: ValueError when `output` is a file, cannot be made or cannot be written to.
    """
    check_output(output)
    sections = []
    for name, title, text, figure_of in SECTIONS:
        figure = figure_of(runs) if runs else None
        if figure is not None:
            sections.append(_section(name, title, text, figure))
    if latent is not None:
        text = (
            f"{latent.num_answers} answers by {len(latent.perspectives)} students, one trained on each perspective: "
            "the mean last-layer state of each answer, projected by t-SNE. A Dirichlet-process mixture found "
            f"{latent.num_clusters} clusters: adjusted mutual information with the perspectives "
            f"{latent.mutual_information:.2f}, adjusted Rand index {latent.rand_index:.2f} (0: unrelated, 1: the same)."
        )
        sections.append(_section("latent", "Do the perspectives think differently?", text, latent.draw()))
    loader = PackageLoader("mind.report", "")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(TEMPLATE)
    html = template.render(runs=[summary(run, colour_of(runs, run)) for run in runs], rows=ROWS, sections=sections)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for section in sections:
            write_whole(folder / section.file, section.image)
        for name in {*(name for name, *_ in SECTIONS), "latent"}:
            if not any(section.file == f"{name}.png" for section in sections):
                (folder / f"{name}.png").unlink(missing_ok=True)  # an earlier page's, of other runs
        write_whole(folder / PAGE_FILE, html)
    except OSError as error:
        raise ValueError(f"output: {output} cannot be made: {error.strerror}") from error
    return folder / PAGE_FILE


def check_output(output: str | os.PathLike[str]) -> None:
    """Raises: ValueError when `output` is a file, or a folder that cannot be made or written to."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"output: {output} is a file, wanted a folder")
    above = next(path for path in (Path(output).absolute(), *Path(output).absolute().parents) if os.path.exists(path))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        reason = os.strerror(errno.EACCES if above.is_dir() else errno.ENOTDIR)
        raise ValueError(f"output: {output} cannot be made: {reason}")


def summary(run: Run, colour: str) -> dict[str, Any]:
    """What the page's table and its examples say about a run."""
    before, after = run.metrics["before"], run.metrics.get("after")
    result: dict[str, Any] = {
        "name": run.name,
        "colour": colour,
        "student": run.metrics.get("student", "?"),
        "method": run.metrics.get("method", "?"),
        "questions": run.metrics.get("questions", "?"),
        "steps": run.history[-1]["step"] if run.history else 0,
        "before": _share(before, "before"),
        "after": "–" if after is None else _share(after, "after"),
        "change": "–",
        "speed": _mean_of(run, "supervised_tokens_per_second", "{:.0f}"),
        "memory": _mean_of(run, "peak_memory_bytes", "{:.1f} GiB", scale=2.0**-30, reduce=max),
        "correlation": _mean_of(run, "rank_correlation", "{:+.2f}"),
        "minutes": f"{sum(run.metrics['seconds'].values()) / 60:.0f} min" if "seconds" in run.metrics else "–",
        "gained": [],
        "lost": [],
        "gained_count": 0,
        "lost_count": 0,
    }
    if after is not None and before["answers"]:
        old = {answer["id"]: answer for answer in before["answers"]}
        pairs = [(old[answer["id"]], answer) for answer in after["answers"]]
        differences = [float(b["correct"]) - float(a["correct"]) for a, b in pairs]
        low, high = interval(bootstrap_means(differences, "change"))
        mean = sum(differences) / len(differences)
        result["change"] = f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        for kind, sign in (("gained", 1.0), ("lost", -1.0)):
            changed = [pair for pair, difference in zip(pairs, differences, strict=True) if difference == sign]
            result[kind], result[f"{kind}_count"] = changed[:MAX_CHANGED_ANSWERS], len(changed)
    return result


def _section(name: str, title: str, text: str, figure: Figure) -> Section:
    return Section(f"{name}.png", title, text, png(figure))


def _share(measurement: Mapping[str, Any], key: str) -> str:
    if not measurement["answers"]:
        return "–"
    value, (low, high) = accuracy_interval(measurement, key)
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _mean_of(run: Run, key: str, form: str, scale: float = 1.0, reduce: Any = None) -> str:
    values = curve(run.history, key)[1]
    if not values:
        return "–"
    value = sum(values) / len(values) if reduce is None else reduce(values)
    return form.format(scale * value)
