"""RESULTS.md and its plots from the files under results/.

    python -m experiments.report [--output experiments/RESULTS.md]

Intervals are 95 % bootstrap intervals over questions and seeds: both are drawn, since with another seed a student
answers other questions. Three seeds are few to draw from; one says nothing of others, its interval is over questions
alone. A difference is paired: the same questions and seeds, this method minus the baseline. ± is the standard deviation
over seeds. The rank correlation of the assistant's scores and the student's losses, within a question, is −1 when
perfectly calibrated.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.report import commits_of, table
from experiments.common import RESULTS
from experiments.methods import METHODS, UNTRAINED
from mind.bootstrap import DRAWS, interval
from mind.config import MindConfig

BASELINE = "no_fusion"
SYMBOLS = {"beta": "β", "tau_student": "τ_student", "feedback_share": "feedback"}  # of settings told where they differ
Document = dict[str, Any]
Kind = tuple[float, bool, bool]  # gradient_tolerance, its correction, in small chunks
EXACT: Kind = (0.0, True, False)


def read(folder: Path) -> list[Document]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _spread(values: Sequence[float], digits: int) -> str:
    """mean ± standard deviation over seeds."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def _correct(runs: Sequence[Document], split: str) -> np.ndarray:
    """(seeds, questions) 1 where the answer is right."""
    return np.array([run[split]["correct"] for run in runs], dtype=np.float64)


def _percent(values: np.ndarray, key: str, baseline: np.ndarray | None = None, sign: str = "") -> str:
    """The mean of values (seeds, questions), or how far it lies above a baseline's on the same questions."""
    low, high = interval(bootstrap(values, key, baseline))
    mean = values.mean() - (0.0 if baseline is None else baseline.mean())
    return f"{100 * mean:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def bootstrap(values: np.ndarray, key: str, baseline: np.ndarray | None = None) -> np.ndarray:
    """(DRAWS,) means of bootstrap samples of values (seeds, questions), minus those of a baseline.

    A sample draws seeds and questions, the questions for both the same; key: other keys have other draws.
    """
    generator = np.random.default_rng([0, zlib.crc32(key.encode())])

    def draw(n: int) -> np.ndarray:  # (DRAWS, n): the share of each of n things in n draws with replacement
        return generator.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n

    questions = draw(values.shape[1])

    def means(of: np.ndarray) -> np.ndarray:
        return (draw(len(of)) @ of * questions).sum(1)  # (DRAWS, seeds) @ (seeds, questions) -> (DRAWS, questions)

    return means(values) - (0.0 if baseline is None else means(baseline))


# ---------------------------------------------------------------------------------------------------------------------
# The methods


def methods_section(documents: Sequence[Document], output: Path) -> list[str]:
    lines: list[str] = []
    groups: dict[tuple[Any, ...], list[Document]] = defaultdict(list)
    pictures: Counter[str] = Counter()
    for document in documents:
        if "test" in document:
            settings = document["settings"]
            shared = ("student", "data", "token_budget", "questions_per_step", "questions")
            groups[tuple(settings[name] for name in shared)].append(document)
    for (student, data, budget, questions_per_step, _), group in sorted(groups.items()):
        by_method = defaultdict(list)
        rates = sorted({document["settings"]["learning_rate"] for document in group})
        for document in group:
            of_rate = f", rate {document['settings']['learning_rate']:g}" if len(rates) > 1 else ""
            by_method[_variant(document["settings"]) + of_rate].append(document)
        variants = sorted(by_method, key=lambda name: ((UNTRAINED, *METHODS).index(name.split(",")[0]), name))
        lines += [
            f"### {student} on {data}, {budget:,} trained tokens",
            "",
            f"Learning rate {' or '.join(f'{rate:g}' for rate in rates)}, {_steps_of(questions_per_step)}; "
            f"β = {MindConfig.beta:g} and τ_student = {MindConfig.tau_student:g} where nothing else is said. "
            f"{_where(group)}",
            "",
        ]
        rows = []
        baselines = [by_method[name] for name in variants if name == BASELINE or name.startswith(f"{BASELINE}, rate ")]
        baseline = baselines[0] if len(baselines) == 1 else None
        for method in variants:
            runs = by_method[method]
            difference = "–"
            if baseline and runs is not baseline and not method.startswith(UNTRAINED):
                seeds = set.intersection(*({run["settings"]["seed"] for run in of} for of in (runs, baseline)))
                both = [[run for run in of if run["settings"]["seed"] in seeds] for of in (runs, baseline)]
                if seeds:
                    mine, others = (_correct(of, "test") for of in both)
                    difference = _percent(mine, f"{data} {method}", others, "+")
            trained = not method.startswith(UNTRAINED)
            logs = [run.get("log", {}) for run in runs]
            scored = trained and all(log["rank_correlation"] for log in logs)
            rows.append(
                [
                    _code(method),
                    str(len(runs)),
                    _spread([run["validation_loss"] for run in runs], 3),
                    _percent(_correct(runs, "test"), f"{data} test {method}"),
                    difference,
                    _percent(_correct(runs, "ood"), f"{data} ood {method}"),
                    f"{100 * np.mean([run['test']['answered'] for run in runs]):.0f}",
                    f"{np.mean([run['steps'] for run in runs]):.0f}" if trained else "–",
                    f"{np.mean([np.mean(log['selected_rationales']) for log in logs]):.2f}" if trained else "–",
                    f"{np.nanmean([c for log in logs for c in log['rank_correlation']]):.2f}" if scored else "–",
                    f"{np.mean([run['forward_only_tokens'] for run in runs]):,.0f}" if trained else "–",
                ]
            )
        header = [
            "method",
            "seeds",
            "held-out loss, nats/token",
            "accuracy, %",
            f"minus `{BASELINE}`, points",
            "accuracy out of distribution, %",
            "answered, %",
            "steps",
            "selected",
            "score–loss rank correlation",
            "forward-only tokens",
        ]
        lines += [*table(header, rows), ""]
        perspectives = list(group[0]["validation_losses"])
        rows = [
            [_code(method)]
            + [f"{np.mean([run['validation_losses'][name] for run in by_method[method]]):.2f}" for name in perspectives]
            for method in variants
        ]
        lines += ["Held-out loss of each perspective:", "", *table(["method", *perspectives], rows), ""]
        name = f"methods-{Path(student).name}-{data}"
        pictures[name] += 1
        picture = f"{name}.png" if pictures[name] == 1 else f"{name}-{pictures[name]}.png"
        _plot_methods({name: by_method[name] for name in variants}, output / picture)
        lines += [f"![Held-out loss and accuracy of every method]({picture})", ""]
    return lines


def _variant(settings: dict[str, Any], names: Sequence[str] = tuple(SYMBOLS)) -> str:
    """The method, and those of its settings that are not the defaults; a file may be older than a setting."""
    chosen = [
        f"{SYMBOLS[name]} = {settings[name]:g}"
        for name in names
        if settings.get(name, getattr(MindConfig, name)) != getattr(MindConfig, name)
    ]
    only = [f"only {settings['perspectives'].replace('+', ' + ')}"] if settings.get("perspectives") else []
    return ", ".join([settings["method"], *chosen, *only])


def _steps_of(questions: int) -> str:
    return "one question a step" if questions == 1 else f"{questions} questions a step"


def _code(variant: str) -> str:
    method, comma, rest = variant.partition(",")
    return method + comma + rest if method == UNTRAINED else f"`{method}`{comma}{rest}"


def choice_section(documents: Sequence[Document]) -> list[str]:
    rows = []
    for document in documents:
        if "test" not in document:
            settings = document["settings"]
            rows.append(
                [
                    f"{settings['student']} on {settings['data']}",
                    _code(_variant(settings, ("feedback_share",))),
                    f"{settings['token_budget']:,}",
                    str(settings["questions_per_step"]),
                    *(f"{settings[name]:g}" for name in ("learning_rate", "beta", "tau_student")),
                    str(settings["seed"]),
                    *(
                        (str(document["steps"]), f"{np.mean(document['log']['selected_rationales']):.2f}")
                        if settings["method"] != UNTRAINED
                        else ("–", "–")
                    ),
                    f"{document['validation_loss']:.4f}",
                    _percent(_correct([document], "validation"), " ".join(map(str, settings.values()))),
                ]
            )
    if not rows:
        return []
    header = ["student and data", "method", "trained tokens", "questions a step", "learning rate", "β", "τ_student"]
    header += ["seed", "steps", "selected", "held-out loss, nats/token", "accuracy, %"]
    text = (
        "Runs of seeds from 100 on, by which settings were chosen and other students and budgets tried, on validation "
        "questions that no other table knows of:"
    )
    return [text, "", *table(header, rows), ""]


def _plot_methods(by_method: dict[str, list[Document]], path: Path) -> None:
    names = list(by_method)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.4 * len(names) + 1.4), sharey=True, layout="constrained")
    for place, name in enumerate(names):
        runs = by_method[name]
        values = _correct(runs, "test")
        low, high = interval(bootstrap(values, name))
        axes[1].plot([100 * low, 100 * high], [place, place], color="tab:blue", linewidth=2)
        axes[1].plot(100 * values.mean(), place, "o", color="tab:blue")
        axes[1].plot([100 * run["test"]["accuracy"] for run in runs], [place] * len(runs), "|", color="black")
        if not name.startswith(UNTRAINED):
            axes[0].plot([run["validation_loss"] for run in runs], [place] * len(runs), "o", color="tab:orange")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("held-out loss, nats per token; a dot is a seed")
    axes[1].set_xlabel("accuracy, %, with 95 % interval; a tick is a seed")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _where(group: Sequence[Document]) -> str:
    devices = sorted({document["environment"]["device"] for document in group})
    return f"Measured on {'; '.join(devices)}; commit {commits_of(group)}."


# ---------------------------------------------------------------------------------------------------------------------
# gradient_tolerance


def tolerance_section(documents: Sequence[Document], output: Path) -> list[str]:
    lines: list[str] = []
    groups: dict[tuple[str, str, str], list[Document]] = defaultdict(list)
    for document in documents:
        settings = document["settings"]
        groups[settings["student"], settings["data"], settings["training"]].append(document)
    for (student, data, training), group in sorted(groups.items()):
        runs: dict[Kind, dict[int, Document]] = defaultdict(dict)
        for document in group:
            settings = document["settings"]
            chunked = settings["max_logits_bytes"] is not None
            runs[settings["tolerance"], settings["correction"], chunked][settings["seed"]] = document
        exact = runs[EXACT]
        settings = group[0]["settings"]
        lines += [
            f"### {student} on {data}, {'LoRA' if training == 'lora' else 'all parameters'}",
            "",
            f"{settings['steps']} steps of {settings['questions_per_step']} × {settings['rationales_per_question']} "
            f"questions × rationales, learning rate {settings['learning_rate']:g}, bf16 autocast. {_where(group)}",
            "",
        ]
        rows = []
        for kind, by_seed in sorted(runs.items(), key=lambda item: _exact_first(*item[0])):
            seeds = sorted(set(by_seed) & set(exact))
            found = [by_seed[seed] for seed in seeds]
            if not found:
                continue
            reference = [exact[seed] for seed in seeds]
            curves = [
                np.abs(np.subtract(a["losses"], b["losses"])).mean() for a, b in zip(found, reference, strict=True)
            ]
            change = [a["validation_loss"] - b["validation_loss"] for a, b in zip(found, reference, strict=True)]
            paired = _correct(found, "test") - _correct(reference, "test")  # of a seed: the same batches
            is_exact = kind == EXACT
            cells = [
                _name(kind),
                str(len(found)),
                _spread([run["validation_loss"] for run in found], 4),
                "–" if is_exact else _spread([1e3 * value for value in change], 2),
                "–" if is_exact else f"{1e3 * np.mean(curves):.2f}",
                f"{100 * np.mean([run['test']['accuracy'] for run in found]):.1f}",
                "–" if is_exact else _percent(paired, f"{training} {kind}", sign="+"),
                f"{100 * np.mean([run['kept_share'] for run in found]):.1f}",
            ]
            if training == "full":
                cells += [
                    f"{100 * np.mean([run['rare_drift'] for run in found]):.2f}",
                    f"{np.mean([run['rare_drift_cosine'] for run in found]):.2f}",
                ]
            rows.append(cells)
        header = [
            "tolerance",
            "seeds",
            "held-out loss",
            "its change, 10⁻³ nats",
            "mean distance of the loss curves, 10⁻³ nats",
            "accuracy, %",
            "its change, points",
            "kept columns, %",
        ]
        if training == "full":
            header += ["drift of rare embeddings, %", "cosine to the exact drift"]
        lines += [*table(header, rows), ""]
        picture = f"gradient-tolerance-{Path(student).name}-{training}.png"
        _plot_curves(runs, output / picture)
        lines += [f"![Distance of the loss curves from the exact ones]({picture})", ""]
    return lines


def _exact_first(tolerance: float, correction: bool, chunked: bool) -> tuple[bool, bool, float, bool]:
    return tolerance > 0, not correction, tolerance, chunked


def _name(kind: Kind) -> str:
    tolerance, correction, chunked = kind
    if tolerance == 0:
        return "exact, other rounding" if chunked else "exact"
    return f"2^{round(np.log2(tolerance))}" + ("" if correction else ", uncorrected")


def _plot_curves(runs: dict[Kind, dict[int, Document]], path: Path) -> None:
    exact = runs[EXACT]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    window = np.ones(10) / 10
    for seed, run in sorted(exact.items()):
        axes[0].plot(np.convolve(run["losses"], window, "valid"), color="black", alpha=0.6, label=f"exact, seed {seed}")
    for kind, by_seed in sorted(runs.items(), reverse=True):
        if kind == EXACT:
            continue
        style = "-" if kind[1] else ":"
        color = "gray" if kind[0] == 0 else f"C{round(-np.log2(kind[0])) - 8}"
        distance = [np.abs(np.subtract(by_seed[s]["losses"], exact[s]["losses"])) for s in set(by_seed) & set(exact)]
        if not distance:
            continue
        axes[0].plot(np.convolve(by_seed[min(by_seed)]["losses"], window, "valid"), style, color=color, alpha=0.6)
        axes[1].plot(np.convolve(np.mean(distance, 0), window, "valid"), style, color=color, label=_name(kind))
    axes[0].set(xlabel="step", ylabel="training loss, nats", title="mean of 10 steps")
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="step", ylabel="distance from the exact curve, nats", yscale="log")
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS.parent / "RESULTS.md")
    options = parser.parse_args(arguments)
    folder = options.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    methods, tolerances = read(options.results / "methods"), read(options.results / "gradient_tolerance")
    lines = ["# What the experiments found", "", "Written by `python -m experiments.report`; see README.md.", ""]
    if methods:
        lines += ["## Methods at equal budgets", "", *methods_section(methods, folder), *choice_section(methods)]
    if tolerances:
        lines += ["## Training with `gradient_tolerance`", "", *tolerance_section(tolerances, folder)]
    options.output.write_text("\n".join(lines).rstrip() + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
