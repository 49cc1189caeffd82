"""Whether a later run is worse than an earlier one, by ratios of ratios.

    python -m bench.compare OLD.json NEW.json [--margin 0.15]

A time counts as a multiple of the roofline of its own run (a training step: of transformers' Trainer in its own run),
so that two machines, or two moods of one, can be compared; an absolute time never is. Exit status 1 when a row of this
project has become worse by more than the margin in time or peak memory, or has lost its number; peers' rows are printed
and decide nothing. Rows that the later run did not try are counted. Exit status 2 when the files cannot be compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.losses import Parser
from bench.measure import OK

MARGIN = 0.15
BASELINE_TRAINER = "transformers"


class Entry(NamedTuple):
    """Of one provider in one case: cost, a multiple of its own run's yardstick, and peak bytes."""

    status: str
    cost: float | None
    peak_bytes: int | None


def read(path: Path) -> dict[str, Any]:
    """A file of bench.losses or bench.steps.

    Raises: ValueError naming the file.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}), wanted JSON of bench.losses or bench.steps") from error
    if not isinstance(document, dict) or document.get("kind") not in ("losses", "steps"):
        raise ValueError(f"{path}: has no kind, wanted JSON of bench.losses or bench.steps")
    return document


def is_ours(provider: str) -> bool:
    return provider.startswith("mind")


def entries(document: dict[str, Any]) -> dict[tuple[str, str], Entry]:
    """(case, provider) -> Entry."""
    if document["kind"] == "steps":
        rows = document["rows"]
        speed = {r["student"]: r["questions_per_second"] for r in rows if r["trainer"] == BASELINE_TRAINER and _ok(r)}
        return {
            (f"step of {r['student']}", r["trainer"]): Entry(
                r["status"],
                speed[r["student"]] / r["questions_per_second"] if _ok(r) and r["student"] in speed else None,
                r.get("peak_bytes"),
            )
            for r in rows
        }
    return {
        (case["id"], row["provider"]): Entry(
            row["status"],
            row["times"]["both"]["p50"] / case["roofline_ms"]["both"] if row["times"] else None,
            row["peak_bytes"],
        )
        for case in document["cases"]
        for row in case["rows"]
    }


def _ok(row: dict[str, Any]) -> bool:
    return row["status"] == OK


def compare(old: dict[str, Any], new: dict[str, Any], margin: float) -> tuple[list[str], int]:
    """(lines to print, how many rows of this project became worse by more than margin)."""
    before, after = entries(old), entries(new)
    lines, worse = [], 0
    for key in before:
        if key not in after or before[key].status != OK:
            continue
        a, b = before[key], after[key]
        problems = []
        ratios = []
        if b.status != OK:
            problems.append(f"was measured, is {b.status}")
        for name, x, y in (("time", a.cost, b.cost), ("peak", a.peak_bytes, b.peak_bytes)):
            if x and y:
                ratios.append(f"{name} ×{y / x:.3f}")
                if y / x > 1 + margin:
                    problems.append(f"{name} beyond ×{1 + margin:.2f}")
        decides = is_ours(key[1]) or ":" in key[1]  # MODULE:FUNCTION, the user's own
        worse += decides and bool(problems)
        mark = ("  WORSE: " if decides else "  (a peer) ") + ", ".join(problems) if problems else ""
        lines.append(f"{key[0]:<42} {key[1]:<26} {'  '.join(ratios)}{mark}")
    if not lines:
        raise ValueError("the files have no measured case and provider in common")
    missing = [key for key, entry in before.items() if key not in after and entry.status == OK]
    if missing:
        cases = ", ".join(dict.fromkeys(case for case, _ in missing))
        lines.append(f"{len(missing)} measured rows are not in NEW, of {cases}")
    return lines, worse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="bench.compare", description="Whether NEW is worse than OLD, by ratios of ratios.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--margin", type=float, default=MARGIN, help="share by which a row may get worse (%(default)s)")
    args = parser.parse_args(arguments)
    if not args.margin >= 0:
        parser.error(f"--margin: given {args.margin}, wanted a number that is not negative")
    try:
        lines, worse = compare(read(args.old), read(args.new), args.margin)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    print(f"{worse} rows, peers' aside, worse by more than {args.margin:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
