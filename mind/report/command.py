"""The command line of `mind report`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from mind.cli import CommandParser, UsageError, seed
from mind.evaluate.command import add_answer_flags
from mind.prompting import PromptFormat
from mind.report.files import read_runs

if TYPE_CHECKING:
    from mind.latent import LatentAnalysis


def main(arguments: Sequence[str]) -> None:
    """Raises: ValueError about bad input; then nothing is written."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.runs and not options.latent:
        raise UsageError("no run is given, wanted mind report RUN [RUN ...], or --latent with --data")
    if (options.data is None) != (not options.latent):
        raise UsageError("--latent and --data: wanted both, the students and the questions that they answer")
    if not options.latent:
        others = [name for name in vars(options) if name not in ("runs", "output")]
        given = [name for name in others if getattr(options, name) != parser.get_default(name)]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{flags}: settings of --latent, which is not given, wanted none of them without it")
    if options.output == "":
        raise UsageError("--output: given '', wanted a folder")
    output = options.output or (os.path.join(options.runs[0], "report") if options.runs else "report")
    runs = read_runs(options.runs) if options.runs else []
    from mind.report.page import check_output, write_report

    check_output(output)  # now, not when the students have answered
    page = write_report(runs, output, _latent(options) if options.latent else None)
    Console(markup=False, emoji=False).print(f"report: {page}", soft_wrap=True, highlight=False)


def _latent(options: argparse.Namespace) -> LatentAnalysis:
    students: dict[str, str] = {}
    for spec in options.latent:
        name, _, student = spec.partition("=")
        if not name or not student:
            raise UsageError(f"--latent: given {spec!r}, wanted NAME=STUDENT")
        if name in students:
            raise UsageError(f"--latent: the name {name} is given twice, wanted it once")
        students[name] = student
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: given {value}, wanted at least 1")
    prompt_format = PromptFormat(options.answer_suffix)
    import torch

    from mind.data import load_records
    from mind.latent import analyse

    records = load_records(options.data, require_rationales=False)[: options.limit]
    return analyse(
        students,
        records,
        prompt_format=prompt_format,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        seed=options.seed,
        progress=True,
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="mind report",
        usage="mind report RUN [RUN ...] [--output FOLDER] [--latent NAME=STUDENT ... --data FILE]",
        description="One self-contained HTML page, and its pictures as PNGs, of runs of mind train side by side.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="The output_dir of a run of mind train.")
    add("--output", metavar="FOLDER", help="Where report.html goes; default: the folder report in the first run's.")
    add(
        "--latent",
        nargs="+",
        default=[],
        metavar="NAME=STUDENT",
        help="Students, each trained on one perspective, by the perspective's name: do their answers' last-layer "
        "states form clusters of their own?",
    )
    add("--data", metavar="FILE", help="JSONL of the questions that the students of --latent answer.")
    add("--limit", type=int, help="Only the first so many of these questions.")
    add_answer_flags(parser, max_new_tokens=192)
    add("--seed", type=seed, default=0, help="Of the mixture and of t-SNE (default 0).")
    return parser
