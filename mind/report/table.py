"""The measurements of a run as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from mind.prompting import is_number


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
        numbers = [i for i, item in enumerate(before["answers"]) if is_number(item["wanted"])]
        if 0 < len(numbers) < count:  # the rest are names, options, yes or no: in the right form a guess is often right
            old, new = (
                100 * sum(measured["answers"][i]["correct"] for i in numbers) / len(numbers)
                for measured in (before, after)
            )
            label = f"  on the {len(numbers)} whose answer is a number"
            result.add_row(label, f"{old:.1f} %", f"{new:.1f} %", f"{new - old:+.1f} %")
        # An output without the taught suffix has no answer: of what accuracy gains, this is the share of form.
        found = [sum(item["given"] is not None for item in measured["answers"]) for measured in (before, after)]
        old, new = (100 * number / count for number in found)
        label = "outputs with an answer in the taught form"
        result.add_row(label, f"{old:.1f} %", f"{new:.1f} %", f"{new - old:+.1f} %")
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
