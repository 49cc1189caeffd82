"""gradient_tolerance on hidden states of real students: what is kept, what it costs in error, what it saves in time.

    python -m bench.pruning [--students NAME ...] [--dtypes float32 bfloat16] [--rounds N] [--results FILE]

A student reads generated problems (or --data, records as `mind train` takes them); the hidden states of N supervised
rows, its head and the labels are the input. Errors are ‖given − exact‖/‖exact‖ of both gradients, exact from the dense
products in fp32; beside them those of plain PyTorch in bf16. Times are forward + backward, the least of interleaved
rounds, as ratios to the three bare products of the same dtype in the same rounds. `random` replaces the head by small
random numbers, so that the student is sure of nothing and every chunk should stay dense.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import environment, write_json
from mind_kernels import GradientPruning, fused_linear_cross_entropy, record_pruning
from mind_kernels.testing import relative_error

ROWS = {"smollm2-135m": 2048, "gemma3-270m": 1024}
TOLERANCES = {"2^-8": 2**-8, "2^-9": 2**-9, "2^-10": 2**-10}
QUESTIONS_AT_A_TIME = 2


class States(NamedTuple):
    X: Tensor  # (N, H)
    W: Tensor  # (V, H)
    labels: Tensor  # (N,)


def real_states(student: str, num_rows: int, data: str | None) -> States:
    """Raises: ValueError when the data have fewer supervised tokens."""
    from mind.attach import attach_mind_loss
    from mind.collator import student_inputs
    from mind.data import MindDataset, load_records
    from mind.problems import generate_records
    from mind.students import load_student

    model, tokenizer = load_student(student)
    records = load_records(generate_records(64, seed=0) if data is None else data)
    base = attach_mind_loss(model.eval()).base
    found, labels = [], []
    for start in range(0, len(records), QUESTIONS_AT_A_TIME):
        questions = MindDataset(records[start : start + QUESTIONS_AT_A_TIME], tokenizer).questions
        batch = student_inputs(questions, torch.tensor([question.mask for question in questions]), 0)
        rows = batch["supervised_index"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = base(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        found.append(hidden.flatten(0, 1)[rows].float())
        labels.append(batch["shift_labels"][rows])
        if sum(map(len, labels)) >= num_rows:
            weight = model.get_output_embeddings().weight.detach().float().clone()
            return States(torch.cat(found)[:num_rows].clone(), weight, torch.cat(labels)[:num_rows].clone())
    raise ValueError(f"{data or 'generated problems'}: {sum(map(len, labels))} supervised tokens, wanted {num_rows}")


def gradients(states: States, **options: Any) -> tuple[Tensor, Tensor]:
    X, W = states.X.detach().requires_grad_(), states.W.detach().requires_grad_()
    loss, _ = fused_linear_cross_entropy(X, W, states.labels, **options)
    return torch.autograd.grad(loss, (X, W))


def frozen_gradient(states: States, **options: Any) -> None:
    X = states.X.detach().requires_grad_()
    torch.autograd.grad(fused_linear_cross_entropy(X, states.W, states.labels, **options)[0], X)


def products(states: States, with_weight: bool) -> None:
    X, W = states.X, states.W
    Z = X @ W.t()  # (N, H) @ (H, V) -> (N, V)
    Z @ W  # (N, V) @ (V, H) -> (N, H)
    if with_weight:
        Z.t() @ X  # (V, N) @ (N, H) -> (V, H)


def plain_bf16_errors(states: States, exact: tuple[Tensor, Tensor]) -> list[float]:
    X, W = states.X.bfloat16().requires_grad_(), states.W.bfloat16().requires_grad_()
    F.cross_entropy(F.linear(X, W), states.labels).backward()
    return [relative_error(leaf.grad, wanted) for leaf, wanted in zip((X, W), exact, strict=True)]  # type: ignore[arg-type]


def measure(name: str, states: States, dtype: torch.dtype, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    exact = gradients(states)
    plain = plain_bf16_errors(states, exact)
    cast = States(states.X.to(dtype), states.W.to(dtype), states.labels)
    variants: dict[str, float | GradientPruning] = {"dense": 0.0, **TOLERANCES}
    variants["2^-9, not corrected"] = GradientPruning(2**-9, correction=False)
    variants["2^-9, dX alone"] = GradientPruning(2**-9, prune_weight_gradient=False)
    rows: dict[str, dict[str, Any]] = {}
    for variant, tolerance in variants.items():
        with record_pruning() as chunks:
            given = gradients(cast, gradient_tolerance=tolerance)
        errors = [relative_error(one, wanted) for one, wanted in zip(given, exact, strict=True)]
        rows[variant] = {
            "errors": dict(zip(("grad_hidden_states", "grad_lm_head_weight"), errors, strict=True)),
            "chunks": [
                {"rows": chunk.rows, "kept_share": chunk.kept_share, "certificate": chunk.certificate}
                for chunk in chunks
            ],
        }
        del given
    timed: dict[str, Callable[[], object]] = {
        "three products": lambda: products(cast, True),
        "two products": lambda: products(cast, False),
    }
    for variant, tolerance in variants.items():
        timed[variant] = lambda tolerance=tolerance: gradients(cast, gradient_tolerance=tolerance)
    timed["frozen, dense"] = lambda: frozen_gradient(cast)
    timed["frozen, 2^-9"] = lambda: frozen_gradient(cast, gradient_tolerance=2**-9)
    times: dict[str, list[float]] = {variant: [] for variant in timed}
    for i in range(rounds):
        say(f"{name}: round {i + 1} of {rounds}")
        for variant, function in timed.items():
            start = time.perf_counter()
            function()
            times[variant].append(time.perf_counter() - start)
    least = {variant: min(values) for variant, values in times.items()}
    for variant in ("frozen, dense", "frozen, 2^-9"):
        rows[variant] = {"ratio": least[variant] / least["two products"]}
    for variant in variants:
        rows[variant]["ratio"] = least[variant] / least["three products"]
        paired = [one / dense for one, dense in zip(times[variant], times["dense"], strict=True)]
        rows[variant]["ratio_to_dense"] = statistics.median(paired)
    return {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "num_rows": len(states.X),
        "hidden_size": states.W.shape[1],
        "vocab_size": states.W.shape[0],
        "loss": float(F.cross_entropy(states.X[:256] @ states.W.t(), states.labels[:256])),
        "plain_bf16_errors": plain,
        "seconds": times,
        "rows": rows,
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="forward + backward by gradient_tolerance", title_justify="left")
    for column in ("student", "dtype", "tolerance", "kept", "error dX", "error dW", "× products", "× dense"):
        table.add_column(column, justify="left" if column in ("student", "tolerance") else "right")
    for result in results:
        bf16 = " ".join(f"{100 * error:.2f} %" for error in result["plain_bf16_errors"])
        for variant, row in result["rows"].items():
            chunks = row.get("chunks", [])
            kept = f"{100 * sum(c['kept_share'] for c in chunks) / len(chunks):.2f} %" if chunks else ""
            errors = [f"{100 * error:.4f} %" for error in row["errors"].values()] if "errors" in row else ["", ""]
            table.add_row(
                result["name"],
                result["dtype"],
                variant,
                kept,
                *errors,
                f"{row['ratio']:.2f}",
                f"{row['ratio_to_dense']:.2f}" if "ratio_to_dense" in row else "",
            )
        table.add_row("", "", f"plain bf16 errs by {bf16}", end_section=True)
    Console(width=130).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="gradient_tolerance on real hidden states: kept, error, time.")
    parser.add_argument("--students", nargs="+", default=list(ROWS), help="built-in names, folders or hub ids")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, help="supervised rows; by default 2,048 (1,024 for gemma3-270m)")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is timed, in turn (default 3)")
    parser.add_argument("--data", help="records whose rationales the student reads; default generated problems")
    parser.add_argument("--results", type=Path, help="write what was measured as JSON, for bench/results/")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds: given {args.rounds}, wanted at least 1")
    results = []

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    failed = False
    for student in args.students:
        say(f"{student}: hidden states")
        try:
            states = real_states(student, args.rows or ROWS.get(student, 2048), args.data)
        except (OSError, ValueError) as error:  # the other students go on
            print(f"bench.pruning: {student}: {error}", file=sys.stderr)
            failed = True
            continue
        for dtype in args.dtypes:
            results.append(measure(student, states, getattr(torch, dtype), args.rounds, say))
        if len(results) == len(args.dtypes):  # the first that could be read
            head = torch.randn(states.W.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
            results.append(measure("random", states._replace(W=head), torch.float32, args.rounds, say))
    if not results:
        return 2
    show(results)
    if args.results:
        write_json(args.results, {"environment": environment(), "data": args.data, "results": results})
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
