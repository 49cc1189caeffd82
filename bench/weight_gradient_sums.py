"""What does it cost to sum a 16-bit head's gradient over chunks in 16 bits? On hidden states of real students.

    python -m bench.weight_gradient_sums [--students NAME ...] [--results FILE]

dW of the mean cross-entropy of N supervised rows in bf16: ‖given − exact‖/‖exact‖, exact from plain PyTorch in fp32 on
the same bf16 numbers, by the number of equal chunks that the rows are cut into.

    fp32 sum       each chunk's share, rounded once, added to fp32
    16-bit sum     the same added to bf16, which is rounded once a chunk: what the losses do up to 40 chunks
    as shipped     one call whose max_logits_bytes makes that many chunks
    plain PyTorch  one backward pass a chunk, added to `.grad` in bf16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import environment, write_json
from bench.pruning import ROWS, States, gradients, real_states
from mind_kernels.testing import relative_error

CHUNKS = (1, 8, 32, 64)
SUMS = ("fp32 sum", "16-bit sum", "as shipped", "plain PyTorch")


def plain_grad_weight(states: States) -> Tensor:
    W = states.W.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(F.linear(states.X, W), states.labels), W)[0]


def measure(name: str, states: States) -> list[dict[str, Any]]:
    """One row a number of chunks: the error of each kind of sum."""
    rounded = States(states.X.bfloat16(), states.W.bfloat16(), states.labels)
    exact = plain_grad_weight(States(rounded.X.float(), rounded.W.float(), rounded.labels))
    N, V = len(states.X), len(states.W)
    rows = []
    for chunks in CHUNKS:
        size = N // chunks
        totals = {kind: torch.zeros_like(exact) for kind in SUMS}
        totals["16-bit sum"], totals["plain PyTorch"] = torch.zeros_like(rounded.W), torch.zeros_like(rounded.W)
        for start in range(0, N, size):
            part = States(rounded.X[start : start + size], rounded.W, rounded.labels[start : start + size])
            share = gradients(part)[1].div_(chunks)  # of the mean over N rows; chunks is a power of two
            totals["fp32 sum"] += share
            totals["16-bit sum"] += share
            totals["plain PyTorch"] += plain_grad_weight(part).div_(chunks)
        totals["as shipped"] = gradients(rounded, max_logits_bytes=size * V * rounded.W.itemsize)[1]
        errors = {kind: relative_error(total, exact) for kind, total in totals.items()}
        rows.append({"student": name, "rows": N, "chunks": chunks, "errors": errors})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Errors of a bf16 dW by how its chunks are summed.")
    parser.add_argument("--students", nargs="+", default=list(ROWS), help="built-in names, folders or hub ids")
    parser.add_argument("--rows", type=int, default=1024, help=f"supervised rows, a multiple of {max(CHUNKS)}")
    parser.add_argument("--results", type=Path, help="write what was measured as JSON, for bench/results/")
    args = parser.parse_args(arguments)
    if args.rows < 1 or args.rows % max(CHUNKS):
        parser.error(f"--rows: given {args.rows}, wanted a positive multiple of {max(CHUNKS)}")
    results = []
    table = Table(title="Error of dW in bf16")
    for heading in ("student", "chunks", *SUMS):
        table.add_column(heading)
    for student in args.students:
        print(f"{student}: hidden states and sums", file=sys.stderr, flush=True)
        for row in measure(student, real_states(student, args.rows, None)):
            results.append(row)
            cells = (f"{100 * row['errors'][kind]:.2f} %" for kind in SUMS)
            table.add_row(student, str(row["chunks"]), *cells)
    Console().print(table)
    if args.results:
        write_json(args.results, {"environment": environment(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
