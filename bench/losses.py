"""Every provider on every case: errors, memory, times. One command on a CPU, the same on a GPU.

    python -m bench.losses [--device cuda] [--cases NAME …] [--providers NAME …] [--rows N …] [--dtypes NAME …]
                           [--minutes 8] [--results FILE] [--dry-run]

On a CPU a provider that takes minutes at a case (bench/shapes.py) is left out of it, unless --providers names it. The
file is written after every case. When the minutes are used up, the rows that remain say "not run", so a run can be
split by --cases, --providers and --rows into several files, which `python -m bench.report` reads together. Beside those
of `make bench`, bench/results holds

    cpu-large-heads    --cases gemma3-270m qwen2.5-1.5b llama-3.1-8b --rows 256 --dtypes float32 bfloat16 --minutes 30
                       --providers mind pytorch pytorch-compiled cce-torch-compile trl
    cpu-losses-fp32    --cases smollm2-135m-real smollm2-135m-mind-real smollm2-135m-kl smollm2-135m-jsd --minutes 30
                       --dtypes float32 --providers mind pytorch pytorch-compiled cce-torch-compile trl liger-chunked
                       torch-linear-ce torch-linear-ce-accurate
    cpu-linear-ce      --cases smollm2-135m-real --rows 1024 --minutes 30
                       --providers mind pytorch torch-linear-ce torch-linear-ce-accurate
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from bench.measure import OK, environment, measure_case, write_json
from bench.providers import PROVIDERS, find_provider
from bench.shapes import LOSS_CASES, LossCase

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
SECONDS_PER_CASE = {"cpu": 8.0, "cuda": 6.0}
MINUTES = 8.0
DRY_RUN_ROWS = 24
MiB = 2**20


class Parser(argparse.ArgumentParser):
    """One line on standard error and exit status 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def chosen(parser: argparse.ArgumentParser, flag: str, given: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    for name in given or ():
        if name not in known:
            parser.error(f"{flag}: given {name!r}, wanted one of {', '.join(known)}")
    return list(given or known)


def check_device(parser: argparse.ArgumentParser, device: str) -> str:
    if device not in ("cpu", "cuda"):
        parser.error(f"--device: given {device!r}, wanted cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: given 'cuda' where PyTorch sees no GPU, wanted cpu")
    return device


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def limit_memory() -> None:
    """What is allocated beyond the machine's free memory fails in this process, instead of Linux killing something."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with open("/proc/self/status") as lines:
        held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + free, resource.RLIM_INFINITY))


def plan(
    names: Sequence[str], rows: Sequence[int] | None, dtypes: Sequence[str], device: str
) -> list[tuple[LossCase, int, str]]:
    """(case, rows, dtype): every case at its first number of rows, then the further ones."""
    cases = [LOSS_CASES[name] for name in names]
    most = max((len(case.rows(device)) for case in cases), default=0)
    planned = [
        (case, n, dtype)
        for i in range(1 if rows else most)
        for case in cases
        for n in (rows or case.rows(device)[i : i + 1])
        for dtype in dtypes
    ]
    return planned


def show(document: dict[str, Any]) -> None:
    ms = document.get("roofline_ms", {}).get("both")
    title = document["id"] + ("" if ms is None else f", roofline {ms:.1f} ms")
    table = Table(title=title, title_justify="left")
    for column in ("provider", "version", "forward", "backward", "both: p20", "p50", "p80 ms", "roofline", "peak MiB"):
        table.add_column(column, justify="left" if column in ("provider", "version") else "right")
    table.add_column("worst error", justify="right")
    table.add_column("")
    for row in document["rows"]:
        times = [f"{row['times'][mode]['p50']:.2f}" if mode in row["times"] else "" for mode in ("forward", "backward")]
        times += [f"{row['times']['both'][p]:.2f}" if row["times"] else "" for p in ("p20", "p50", "p80")]
        errors = [error for error in row["errors"].values() if error is not None]
        status = row["note"] if row["status"] == OK else f"{row['status']}: {row['reason']}"
        table.add_row(
            row["provider"],
            row["version"] or "",
            *times,
            f"{row['roofline_fraction']['both']:.0%}" if row["times"] else "",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MiB:,.0f}",
            f"{max(errors):.1e}" if errors else "",
            status,
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="bench.losses", description="Every provider on every case: errors, memory, times.")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help=f"of {', '.join(LOSS_CASES)}")
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(PROVIDERS)}; mind@64MiB: with that budget; MODULE:FUNCTION: yours, which takes hidden "
        "states (N, H), weight (V, H) and labels (N,), of a divergence the teacher's states and weight in place of the "
        "labels, and returns the mean over the rows",
    )
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="rows instead of each case's own")
    parser.add_argument("--dtypes", nargs="+", metavar="NAME", default=["bfloat16"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="then nothing more is begun")
    parser.add_argument("--results", type=Path, help="write what was measured as JSON, for bench/results/")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes through the same code")
    args = parser.parse_args(arguments)
    device = check_device(parser, args.device)
    try:
        providers = [find_provider(name) for name in args.providers or PROVIDERS]
    except ValueError as error:
        parser.error(f"--providers: {error}")
    dtypes = chosen(parser, "--dtypes", args.dtypes, list(DTYPES))
    names = chosen(parser, "--cases", args.cases, list(LOSS_CASES))
    if any(n <= 0 for n in args.rows or ()):
        parser.error(f"--rows: given {min(args.rows)}, wanted a number above 0")
    if args.dry_run:
        planned = plan([n for n in LOSS_CASES if n.startswith("tiny")], [DRY_RUN_ROWS], dtypes, device)
    else:
        planned = plan(names, args.rows, dtypes, device)
    if not planned:
        parser.error(f"--cases: {', '.join(names)} have no rows of their own on {device}, wanted --rows as well")
    if device == "cpu":
        limit_memory()

    start = time.perf_counter()
    document: dict[str, Any] = {"kind": "losses", "environment": environment(device), "cases": []}
    for i, (case, num_rows, dtype) in enumerate(planned, start=1):

        def say(text: str, i: int = i) -> None:
            print(f"{time.perf_counter() - start:4.0f} s  {i}/{len(planned)}  {text}", file=sys.stderr, flush=True)

        found = measure_case(
            case,
            num_rows,
            DTYPES[dtype],
            device,
            providers,
            seconds=0.0 if args.dry_run else SECONDS_PER_CASE[device],
            deadline=start + 60 * args.minutes,
            too_slow=case.too_slow_on_cpu if device == "cpu" and not args.providers else (),
            say=say,
        )
        show(found)
        document["cases"].append(found)
        document["seconds"] = time.perf_counter() - start
        if args.results:
            write_json(args.results, document)
    print(f"{document['seconds']:.0f} s" + (f", written to {args.results}" if args.results else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
