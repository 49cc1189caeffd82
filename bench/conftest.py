"""One table of ratios at the end, and with --results FILE the same as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write what was measured as JSON, for bench/results/")


@pytest.fixture
def record() -> Any:
    """record(case=…, dtype=…, provider=…, …): one row of the table."""

    def add(**row: Any) -> None:
        ROWS.append(row)

    return add


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "device": f"{model}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "commit": commit + ("+uncommitted" if dirty else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def pytest_terminal_summary(config: pytest.Config) -> None:
    if not ROWS:
        return
    table = Table(title="forward + backward, times and bytes in one run", title_justify="left")
    for column in ROWS[0]:
        table.add_column(column, justify="left" if column in ("case", "dtype", "provider") else "right")
    for row in ROWS:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
    path = config.getoption("--results")
    if path:
        document = json.dumps({"environment": environment(), "rows": ROWS}, indent=1)
        temporary = Path(f"{path}.tmp")
        temporary.write_text(document + "\n")
        temporary.replace(path)
