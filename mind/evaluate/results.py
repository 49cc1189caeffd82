"""Accuracies with their intervals, the file of an evaluation, and the paired comparison of two.

The file, as `mind evaluate --output` writes it:

    {"format": "mind evaluation", "version": 1, "student": …, "backend": …, "answer_suffix": …, "instruction": …,
     "max_new_tokens": …, "dtype": …, "seed": …, "versions": {…}, "seconds": …,
     "tasks": {"gsm8k": {"distribution": "in", "source": …, "questions": 1319, "answered": 0.98, "accuracy": 0.31,
                         "interval": [0.29, 0.34],
                         "answers": [{"id", "question", "wanted", "given", "correct", "output"}, …]}, …},
     "in": {"accuracy": …, "interval": […]}, "out": {…}}

`answered` is the share of outputs in which an answer was found where training puts it. "in" and "out" are the means
over the tasks in and out of the training distribution, null where there is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from mind.bootstrap import LEVEL, bootstrap_means, interval
from mind.report import write_whole

FORMAT, VERSION = "mind evaluation", 1
DISTRIBUTIONS = {"in": "in distribution", "out": "out of distribution"}


class EvaluationError(ValueError):
    """An evaluation that cannot be read, made or compared. One line."""


def task_result(answers: Sequence[Mapping[str, Any]], *, name: str, distribution: str, source: str, seed: int) -> dict:
    """One task's part of the file."""
    correct = [float(answer["correct"]) for answer in answers]
    return {
        "distribution": distribution,
        "source": source,
        "questions": len(answers),
        "answered": sum(answer["given"] is not None for answer in answers) / len(answers),
        "accuracy": sum(correct) / len(correct),
        "interval": interval(bootstrap_means(correct, name, seed)),
        "answers": list(answers),
    }


def averages(tasks: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """{"in": …, "out": …}: the mean accuracy over the tasks of a distribution; questions are drawn within each task."""
    result: dict[str, Any] = {}
    for distribution in DISTRIBUTIONS:
        chosen = {name: task for name, task in tasks.items() if task["distribution"] == distribution}
        result[distribution] = None
        if chosen:
            draws = [bootstrap_means(_correct(task), name, seed) for name, task in chosen.items()]
            mean = sum(task["accuracy"] for task in chosen.values()) / len(chosen)
            result[distribution] = {"accuracy": mean, "interval": interval(np.mean(draws, axis=0))}
    return result


def write_evaluation(path: str | os.PathLike[str], evaluation: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all."""
    write_whole(Path(path), json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_evaluation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """An evaluation file.

    Raises: EvaluationError when it cannot be read, or was not written by `mind evaluate` of this version.
    """
    try:
        evaluation = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EvaluationError(f"{path}: is not JSON: {error}") from error
    if not isinstance(evaluation, dict) or evaluation.get("format") != FORMAT:
        raise EvaluationError(f"{path}: is no evaluation, wanted a file that mind evaluate wrote")
    if evaluation.get("version") != VERSION:
        raise EvaluationError(f"{path}: is an evaluation of version {evaluation.get('version')!r}, wanted {VERSION}")
    tasks = evaluation.get("tasks")
    if not isinstance(tasks, dict) or not tasks or not all(map(_is_task, tasks.values())):
        raise EvaluationError(f"{path}: its tasks are not what mind evaluate writes, the file was changed")
    return evaluation


def compare(path_a: str | os.PathLike[str], path_b: str | os.PathLike[str], *, seed: int = 0) -> dict[str, Any]:
    """B's accuracy minus A's on each task of both, question by question, with the interval of that difference.

    {"a": …, "b": …,
     "tasks": {name: {"distribution", "questions", "a", "b", "difference", "interval", "gained", "lost"}, …},
     "in": {"difference", "interval"}, "out": …, "forgetting": …, "only_in_a": […], "only_in_b": […],
     "settings": {name: [a's, b's]}}

    gained, lost: questions that only B, only A answers. The bootstrap draws questions, so what is hard for both does
    not widen the interval. "forgetting" is "out"'s difference: with A before training and B after, below 0 when
    training made the student forget. "settings" holds what differs in how the two were made.

    Raises: EvaluationError when a file cannot be read, when the two have no task or not the same questions in common,
        or one has a task in distribution and the other out of it.
    """
    a, b = read_evaluation(path_a), read_evaluation(path_b)
    shared = [name for name in a["tasks"] if name in b["tasks"]]
    if not shared:
        raise EvaluationError(
            f"{path_a} has the tasks {', '.join(a['tasks'])} and {path_b} has {', '.join(b['tasks'])}, "
            "wanted one of both"
        )
    tasks: dict[str, Any] = {}
    draws: dict[str, list[np.ndarray]] = {distribution: [] for distribution in DISTRIBUTIONS}
    for name in shared:
        task_a, task_b = a["tasks"][name], b["tasks"][name]
        if task_a["distribution"] != task_b["distribution"]:
            told = " and ".join(
                f"{path} has it {DISTRIBUTIONS[task['distribution']]}"
                for path, task in ((path_a, task_a), (path_b, task_b))
            )
            raise EvaluationError(f"task {name}: {told}, wanted both the same: --data or --ood-data")
        answers_b = {_identity(answer): answer for answer in task_b["answers"]}
        for first, second, path in ((task_a, task_b, path_b), (task_b, task_a, path_a)):
            known = {_identity(answer) for answer in second["answers"]}
            for answer in first["answers"]:
                if _identity(answer) not in known:
                    raise EvaluationError(
                        f"{path}: task {name} lacks the question {answer['id']!r} of the other, "
                        "wanted the same questions"
                    )
        pairs = [(answer["correct"], answers_b[_identity(answer)]["correct"]) for answer in task_a["answers"]]
        differences = [float(after) - float(before) for before, after in pairs]
        means = bootstrap_means(differences, name, seed)
        draws[task_a["distribution"]].append(means)
        tasks[name] = {
            "distribution": task_a["distribution"],
            "questions": len(pairs),
            "a": sum(_correct(task_a)) / len(pairs),
            "b": sum(_correct(task_b)) / len(pairs),
            "difference": sum(differences) / len(pairs),
            "interval": interval(means),
            "gained": differences.count(1.0),
            "lost": differences.count(-1.0),
        }
    result: dict[str, Any] = {"a": str(path_a), "b": str(path_b), "tasks": tasks}
    for distribution, means_of_tasks in draws.items():
        own = [task["difference"] for task in tasks.values() if task["distribution"] == distribution]
        result[distribution] = None
        if own:
            mean = sum(own) / len(own)
            result[distribution] = {"difference": mean, "interval": interval(np.mean(means_of_tasks, axis=0))}
    result["forgetting"] = None if result["out"] is None else result["out"]["difference"]
    result["only_in_a"] = [name for name in a["tasks"] if name not in shared]
    result["only_in_b"] = [name for name in b["tasks"] if name not in shared]
    names = ("backend", "dtype", "answer_suffix", "instruction", "max_new_tokens", "versions")
    result["settings"] = {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}
    return result


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """The tasks in distribution and their mean, then those out of it; n questions, percentages, intervals."""
    table = _table(f"{evaluation['student']}", ("answered", f"accuracy [{LEVEL:.0%}]"))
    for distribution, title in DISTRIBUTIONS.items():
        rows = {
            name: [str(task["questions"]), f"{100 * task['answered']:.1f}", _with_interval(task, "accuracy", ".1f")]
            for name, task in evaluation["tasks"].items()
            if task["distribution"] == distribution
        }
        if rows:
            _add(table, title, rows, "mean", ["", "", _with_interval(evaluation[distribution], "accuracy", ".1f")])
    return table


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """As `evaluation_table`: A and B in percent, their difference in percentage points."""
    title = f"A: {comparison['a']}\nB: {comparison['b']}"
    table = _table(title, ("A", "B", "gained", "lost", f"B − A [{LEVEL:.0%}]"))
    for distribution, heading in DISTRIBUTIONS.items():
        rows = {
            name: [
                str(task["questions"]),
                f"{100 * task['a']:.1f}",
                f"{100 * task['b']:.1f}",
                str(task["gained"]),
                str(task["lost"]),
                _with_interval(task, "difference", "+.1f"),
            ]
            for name, task in comparison["tasks"].items()
            if task["distribution"] == distribution
        }
        if rows:
            mean = "mean" if distribution == "in" else "mean (forgetting)"
            cells = ["", "", "", "", "", _with_interval(comparison[distribution], "difference", "+.1f")]
            _add(table, heading, rows, mean, cells)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    # Eighty columns hold the widest of these tables.
    table = Table(title=Text(title), title_justify="left", box=SIMPLE)
    table.add_column("", no_wrap=True)
    for column in ("n", *columns):
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table


def _add(table: Table, heading: str, rows: Mapping[str, Sequence[str]], mean: str, cells: Sequence[str]) -> None:
    table.add_section()
    table.add_row(heading, style="italic")
    for name, row in rows.items():
        table.add_row(Text(f"  {name}"), *map(Text, row))
    table.add_row(f"  {mean}", *map(Text, cells), style="bold")


def _with_interval(part: Mapping[str, Any], key: str, form: str) -> str:
    low, high = (format(100 * bound, form) for bound in part["interval"])
    return f"{100 * part[key]:{form}} [{low}, {high}]"


def _is_task(task: Any) -> bool:
    fields = {"id", "question", "wanted", "given", "correct", "output"}
    if not isinstance(task, dict) or task.get("distribution") not in DISTRIBUTIONS:
        return False
    answers = task.get("answers")
    return (
        isinstance(answers, list)
        and answers != []
        and all(isinstance(answer, dict) and set(answer) == fields for answer in answers)
        and all(isinstance(answer["correct"], bool) for answer in answers)
        and all(isinstance(part, str) for answer in answers for part in _identity(answer))
    )


def _correct(task: Mapping[str, Any]) -> list[float]:
    return [float(answer["correct"]) for answer in task["answers"]]


def _identity(answer: Mapping[str, Any]) -> tuple[str, str, str]:
    return answer["id"], answer["question"], answer["wanted"]
