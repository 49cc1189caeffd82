"""The command line of `mind evaluate`. What is heavy is imported when the arguments are known to be right."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mind.cli import CommandParser, UsageError, add_config_flag, parse_settings, seed
from mind.prompting import PromptFormat

_MEASURING = ("instruction", "max_new_tokens", "batch_size", "limit", "dtype", "device", "backend", "seed")


def main(arguments: Sequence[str]) -> None:
    """Raises: ValueError about bad input; then nothing is written."""
    parser = _parser()
    options = parse_settings(parser, arguments)
    if options.compare is not None:
        others = [name for name in vars(options) if name not in ("compare", "output", "seed")]
        given = [name for name in others if getattr(options, name) != parser.get_default(name)]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(
                f"--compare: takes two result files alone, wanted only --output or --seed beside it, not {flags}"
            )
    if options.compare is None and not (options.student and options.output):
        missing = "--output" if options.student else "--student"
        raise UsageError(
            f"{missing} is missing, wanted mind evaluate --student STUDENT --output FILE, or --compare A B"
        )
    if options.output is not None:
        if os.path.exists(options.output):
            raise UsageError(f"--output: {options.output} exists already, wanted a new file")
        folder = os.path.dirname(options.output) or "."
        if not os.path.isdir(folder):
            raise UsageError(f"--output: {options.output}: there is no such folder")
        try:  # now, not when everything is measured
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UsageError(f"--output: {options.output}: cannot be written: {error.strerror}") from error
    if options.compare is None:
        _evaluate(options)
    else:
        _compare(options)


def _evaluate(options: argparse.Namespace) -> None:
    prompt_format = PromptFormat(options.answer_suffix)
    from mind.evaluate.harness import TASKS, evaluate
    from mind.evaluate.results import evaluation_table, write_evaluation

    evaluation = evaluate(
        options.student,
        tasks=options.tasks or (() if options.data or options.ood_data else TASKS),
        data=options.data,
        ood_data=options.ood_data,
        prompt_format=prompt_format,
        **{name: getattr(options, name) for name in _MEASURING},
    )
    write_evaluation(options.output, evaluation)
    console = Console(markup=False, emoji=False)  # names may hold brackets
    console.print(evaluation_table(evaluation))
    console.print(f"every answer: {options.output}", soft_wrap=True, highlight=False)


def _compare(options: argparse.Namespace) -> None:
    from mind.evaluate.results import compare, comparison_table
    from mind.report import write_whole

    comparison = compare(*options.compare, seed=options.seed)
    if options.output is not None:
        write_whole(Path(options.output), json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    console = Console(markup=False, emoji=False)  # names may hold brackets
    console.print(comparison_table(comparison))
    for name, (a, b) in comparison["settings"].items():
        console.print(f"made differently: {name}: A {a!r}, B {b!r}", soft_wrap=True, highlight=False)
    for name in ("a", "b"):
        only = ", ".join(comparison[f"only_in_{name}"])
        if only:
            console.print(f"only in {comparison[name]}: {only}", soft_wrap=True, highlight=False)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="mind evaluate",
        usage="mind evaluate --student STUDENT --output FILE [--tasks ...] [--data ...] [...] | --compare A B",
        description="Zero-shot chain of thought, greedy, the answer found and compared as training taught it.",
        allow_abbrev=False,
    )
    add_config_flag(parser)
    add = parser.add_argument
    add("--student", help="smollm2-135m, gemma3-270m (built in), a Hugging Face folder or a hub id.")
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK[=FILE]",
        help="In distribution gsm8k, svamp, math500; out of it csqa, strategyqa, gpqa_diamond. Read from the hub, or "
        "from a local JSON or JSONL FILE with the hub's columns. Default: all six, unless there are data.",
    )
    add("--data", nargs="+", default=[], metavar="FILE", help="JSONL of questions and answers, in distribution.")
    add("--ood-data", nargs="+", default=[], metavar="FILE", help="The same, out of distribution: for forgetting.")
    add("--output", metavar="FILE", help="The result as JSON, every answer in it; a new file.")
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="B minus A of two results, question by question, with intervals. With A before and B after training, the "
        "mean out of distribution is the forgetting.",
    )
    add(
        "--instruction",
        default="",
        help='A last line of every question, as "End with: The answer is ...", for a student that is not trained yet.',
    )
    add_answer_flags(parser, max_new_tokens=512)
    add("--limit", type=int, help="Only the first so many questions of each task.")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Default float32.")
    add("--device", help="cpu, cuda, cuda:1 …; default the GPU where there is one. vLLM chooses its own.")
    add("--backend", choices=("hf", "vllm"), default="hf", help="transformers, or vLLM where it is installed.")
    add("--seed", type=seed, default=0, help="Of the bootstrap (default 0).")
    return parser


def add_answer_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How answers are generated and found, for every command that has a student answer."""
    add = parser.add_argument
    add(
        "--answer-suffix",
        default=PromptFormat.answer_suffix,
        metavar="TEXT",
        help="What training put behind every rationale, as mind train was given it.",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        help=f"Tokens an answer may take (default {max_new_tokens}).",
    )
    add("--batch-size", type=int, default=16, help="Questions answered at a time (default 16).")
