"""Correctness, then speed, memory and error of the losses on one GPU, as ratios to the bare products of the same run.

    python -m bench.gpu [--results FILE] [--dry-run]

First the kernels' tests on this device. What fails is named in the file beside the numbers, which then are no claim,
and the exit status is 1. Then, for heads of real models and N = 16,384 supervised rows in bf16, forward + backward:

    three products   Z = X Wᵀ, dX = Z W, dW = Zᵀ X        6·N·H·V FLOP
    four products    and Z_t = X_t W_tᵀ of the teacher    8·N·H·V FLOP
    two products     Z and dX, for a frozen head          4·N·H·V FLOP

gradient_tolerance is measured on logits like a trained student's (`peaked_inputs`), and on random ones, of which every
chunk stays dense: there it costs the choice, and the kernels' products instead of cuBLAS's.

Below 9 minutes on an H200. --dry-run takes tiny shapes through the same code, on a CPU in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import OK, Clock, Row, attempt, git, write_json
from bench.shapes import GPU_CASES, Case
from mind_kernels import (
    GradientPruning,
    TeacherHidden,
    fused_linear_cross_entropy,
    fused_linear_kl,
    mind_loss,
    record_pruning,
)
from mind_kernels.cross_entropy.reference import reference_linear_cross_entropy
from mind_kernels.testing import relative_error, repair_interpreter

MiB = 2**20
BUDGETS = {"default": None, "128 MiB": 128 * MiB, "1 GiB": 1024 * MiB, "4 GiB": 4096 * MiB}
K, QUESTIONS, ANSWER_TOKENS = 8, 8, 8
JSD_HEADS = ("llama-3.1-8b", "dry-run")  # N = 8,192: where others have published times of distillation with JSD
PRUNED_HEADS = ("qwen2.5-1.5b", "llama-3.1-8b", "dry-run")
TOLERANCE = 2**-9
PRUNED_TARGET, FROZEN_TARGET = 0.55, 0.6  # of three products, and of two
SECONDS_PER_MEASUREMENT = 3.0
MOST_TEST_PROCESSES = 8


class Timing(NamedTuple):
    """Milliseconds of one call, and bytes allocated at its peak above what was held before."""

    p20: float
    p50: float
    p80: float
    peak_bytes: int


class Bench:
    """Times on the device, with enough repetitions for quantiles but no more than a few seconds each."""

    def __init__(self, device: str, repetitions: int):
        self.device, self.repetitions, self.clock = device, repetitions, Clock(device)

    def __call__(self, function: Callable[[], object]) -> Timing:
        return self.in_turns(function)[0]

    def in_turns(self, function: Callable[[], object], *others: Callable[[], object]) -> list[Timing]:
        """function's and the others' timings, called in turns: a GPU's clock drifts, for all of them alike.

        The peak is that of `function` alone.
        """
        peak = 0
        if self.device == "cuda":
            function()  # compiles, and lets the allocator find its blocks
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            for other in others:
                other()
        rounds: list[list[float]] = []
        while len(rounds) < self.repetitions and (
            len(rounds) < 5 or sum(map(sum, rounds)) < 1e3 * SECONDS_PER_MEASUREMENT
        ):
            rounds.append([self.clock(each) for each in (function, *others)])
        quantiles = torch.tensor(rounds).quantile(torch.tensor([0.2, 0.5, 0.8]), dim=0)  # (3, functions)
        return [Timing(*values, peak if i == 0 else 0) for i, values in enumerate(quantiles.t().tolist())]


def try_out(where: dict[str, Any], function: Callable[[], Any]) -> Any:
    """function(), or None where it fails: `where` and the screen tell why, and the rest goes on."""
    found = attempt(row := Row("", None), function)
    if row.status != OK:
        where["failed"] = f"{row.status}: {row.reason}"
        print(where["failed"], file=sys.stderr, flush=True)
    return found


class Inputs(NamedTuple):
    X: Tensor  # (N, H)
    W: Tensor  # (V, H)
    labels: Tensor  # (N,)
    teacher: TeacherHidden


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    N, H, V = case.num_rows, case.hidden_size, case.vocab_size
    X, W = randn(N, H).requires_grad_(), randn(V, H).mul_(H**-0.5).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator, device=device)
    return Inputs(X, W, labels, TeacherHidden(randn(N, H), randn(V, H).mul_(H**-0.5)))


def peaked_inputs(case: Case, device: str) -> Inputs:
    """Logits like a trained student's: a loss of about 2 nats, and most of the mass on tokens that the rows share.

    A logit is the log of the token's frequency 1/rank, in the direction u that all rows have in common, plus noise of
    standard deviation 2; the label, drawn by frequency, stands 16 above that. Ranks are dealt out at random, so that
    kept columns lie apart. At V = 151,936, 512 rows keep 1.3 %, 4.4 % and 13 % of the columns at 2⁻⁸, 2⁻⁹ and 2⁻¹⁰.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    N, H, V = case.num_rows, case.hidden_size, case.vocab_size
    rank = torch.randperm(V, generator=generator, device=device) + 1.0
    prior = -rank.log()
    u = torch.nn.functional.normalize(randn(H), dim=0)
    W = (2 * H**-0.5 * randn(V, H)).add_((prior - prior.mean()).unsqueeze(1) * (u / 4))
    labels = torch.multinomial(1 / rank, N, replacement=True, generator=generator)
    own = W[labels]
    X = randn(N, H).add_(4 * u).add_(16 * own / own.square().sum(-1, keepdim=True))
    X, W = X.bfloat16().requires_grad_(), W.bfloat16().requires_grad_()
    return Inputs(X, W, labels, TeacherHidden(X.detach(), W.detach()))


def step(given: Inputs, *, backend: str = "triton", **options: Any) -> Callable[[], None]:
    """Forward + backward of mind_loss on QUESTIONS × K packed rationales."""
    N = len(given.X)
    device = given.X.device
    weights = options.pop("rationale_weights", torch.full((QUESTIONS, K), 1 / K, device=device))
    cu_seqlens = torch.linspace(0, N, QUESTIONS * K + 1, device=device).round().int()

    def run() -> None:
        output = mind_loss(
            given.X,
            given.W,
            given.labels,
            rationale_weights=weights,
            cu_seqlens=cu_seqlens,
            backend=backend,
            **options,
        )
        output.loss.backward()
        given.X.grad = given.W.grad = None

    return run


def products(given: Inputs, *, with_weight: bool = True, with_teacher: bool = False) -> Callable[[], None]:
    X, W = given.X.detach(), given.W.detach()

    def run() -> None:
        Z = X @ W.t()  # (N, H) @ (H, V) -> (N, V)
        Z @ W  # (N, V) @ (V, H) -> (N, H)
        if with_weight:
            Z.t() @ X  # (V, N) @ (N, H) -> (V, H)
        if with_teacher:
            torch.mm(given.teacher.hidden_states, given.teacher.lm_head_weight.t(), out=Z)

    return run


def first_half(given: Inputs) -> Inputs:
    X, teacher = given.X.detach(), given.teacher
    n = len(X) // 2
    return Inputs(
        X[:n].clone().requires_grad_(),
        given.W,
        given.labels[:n],
        TeacherHidden(teacher.hidden_states[:n], teacher.lm_head_weight),
    )


def jsd_alone(given: Inputs) -> Callable[[], None]:
    """Forward + backward of distillation without a cross-entropy."""

    def run() -> None:
        loss, _ = fused_linear_kl(given.X, given.W, given.teacher, given.labels, divergence="jsd", backend="triton")
        loss.backward()
        given.X.grad = given.W.grad = None

    return run


def answer_index(N: int, device: str) -> Tensor:
    """(QUESTIONS, K, A): the last rows of each rationale of N / (QUESTIONS·K) rows."""
    stops = torch.linspace(0, N, QUESTIONS * K + 1).round().long()[1:].view(QUESTIONS, K, 1)
    A = min(ANSWER_TOKENS, N // (QUESTIONS * K))
    return (stops - A + torch.arange(A)).to(device)


def errors(given: Inputs) -> dict[str, dict[str, float]]:
    """Relative errors of loss, dX and dW against fp32 on the first 512 rows, beside those of plain bf16 PyTorch."""
    rows = slice(0, 512)

    def run(function: Any, dtype: torch.dtype, **more: Any) -> list[Tensor]:
        x = given.X[rows].detach().to(dtype).requires_grad_()
        w = given.W.detach().to(dtype).requires_grad_()
        loss, _ = function(x, w, given.labels[rows], **more)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    exact = run(reference_linear_cross_entropy, torch.float32)
    found = {}
    wide = {"backend": "triton", "logits_dtype": torch.float32}
    for name, values in {
        "triton": run(fused_linear_cross_entropy, torch.bfloat16, backend="triton"),
        "triton, fp32 logits": run(fused_linear_cross_entropy, torch.bfloat16, **wide),
        "triton, tolerance": run(
            fused_linear_cross_entropy, torch.bfloat16, backend="triton", gradient_tolerance=TOLERANCE
        ),
        "plain bf16": run(reference_linear_cross_entropy, torch.bfloat16),
    }.items():
        pairs = zip(("loss", "grad_hidden_states", "grad_lm_head_weight"), values, exact, strict=True)
        found[name] = {part: relative_error(value, wanted) for part, value, wanted in pairs}
    return found


def measure_head(
    case: Case, bench: Bench, budgets: dict[str, int | None], save: Callable[[list[dict[str, Any]]], None]
) -> dict[str, Any]:
    """save gets the rows that there are, after each of them: a run that is cut off leaves those."""
    given = make_inputs(case, bench.device)
    three, four = products(given), products(given, with_teacher=True)
    rows: list[dict[str, Any]] = []

    def add(what: str, budget: str, function: Callable[[], None], bare: Callable[[], None]) -> float:
        """Its ratio to the bare products, NaN where it fails."""
        row: dict[str, Any] = {"what": what, "budget": budget}
        rows.append(row)
        timings = try_out(row, lambda: bench.in_turns(function, bare))
        if timings is None:
            save(rows)
            return math.nan
        timing, of_products = timings
        ratio = timing.p50 / of_products.p50
        gradients = (given.X.numel() + given.W.numel()) * 2
        row |= timing._asdict() | {
            "extra_bytes": max(timing.peak_bytes - gradients, 0),
            "products_ms": of_products.p50,
            "ratio_to_products": ratio,
        }
        print(f"{case.name}, {what}, {budget}: {timing.p50:.2f} ms, {ratio:.3f} × the products", flush=True)
        save(rows)
        return ratio

    of_budgets = [
        add("cross-entropy", name, step(given, max_logits_bytes=limit), three) for name, limit in budgets.items()
    ]
    whole = of_budgets[0]
    with_kl = {"teacher": given.teacher, "kl_weight": 1.0}
    add("cross-entropy + forward KL", "default", step(given, **with_kl), four)
    add("cross-entropy + JSD", "default", step(given, divergence="jsd", **with_kl), four)
    index = answer_index(case.num_rows, bench.device)
    consistency = add("cross-entropy + consistency", "default", step(given, answer_index=index), three)
    add("cross-entropy, backend torch", "default", step(given, backend="torch"), three)
    add("cross-entropy, fp32 logits", "default", step(given, logits_dtype=torch.float32), three)
    half = Inputs(given.X, given.W, given.labels.clone(), given.teacher)
    half.labels[::2] = -100
    halved = add("cross-entropy, half the rows", "default", step(half), three)
    selected = torch.full((QUESTIONS, K), 0.2, device=bench.device)
    selected[:, :3] = 0
    some = add("cross-entropy, 3 of 8 at weight 0", "default", step(given, rationale_weights=selected), three)
    if case.name in JSD_HEADS:
        fewer = first_half(given)
        add("JSD alone, half of N", "default", jsd_alone(fewer), products(fewer, with_teacher=True))
    result = {
        "case": vars(case),
        "three_products": bench(three)._asdict(),
        "four_products": bench(four)._asdict(),
        "rows": rows,
        "consistency_share": finite(consistency / whole - 1),
        "half_rows_ratio": finite(halved / whole),
        "weight_0_saving": finite(1 - some / whole),
        **check(given, index),
        "pruning": None,
    }
    if case.name in PRUNED_HEADS:
        failed: dict[str, Any] = {}
        found = try_out(failed, lambda: measure_pruning(case, given, index, bench, add))
        result["pruning"] = found or failed
    return result


def finite(value: float) -> float | None:  # JSON has no NaN
    return value if math.isfinite(value) else None


def check(given: Inputs, index: Tensor, **options: Any) -> dict[str, Any]:
    """The errors, and whether a step waits for nothing."""
    found: dict[str, Any] = {"errors": {}, "waiting": {}}
    found["errors"] = try_out(found["errors"], lambda: errors(given)) or found["errors"]
    waits_for_nothing = try_out(found["waiting"], lambda: check_no_wait(given, index, **options))
    return found | {"step_waits_for_nothing": waits_for_nothing is True}


def measure_pruning(
    case: Case, given: Inputs, index: Tensor, bench: Bench, add: Callable[..., float]
) -> dict[str, Any]:
    """Rows with gradient_tolerance, and {row: what became of its chunks}, errors, and that nothing waited."""
    peaked = peaked_inputs(case, bench.device)
    frozen = peaked._replace(W=peaked.W.detach())
    three, two = products(peaked), products(peaked, with_weight=False)
    chunks: dict[str, list[dict[str, float]]] = {}

    def add_pruned(what: str, budget: str, inputs: Inputs, bare: Callable[[], None], **options: Any) -> None:
        run = step(inputs, **options)
        if math.isnan(add(what, budget, run, bare)):
            return
        with record_pruning() as records:
            run()
        chunks[f"{what}, {budget}"] = [
            {"rows": record.rows, "kept_share": record.kept_share, "certificate": record.certificate}
            for record in records
        ]

    add("peaked", "default", step(peaked), three)
    add_pruned("peaked, tolerance", "default", peaked, three, gradient_tolerance=TOLERANCE)
    add_pruned("peaked, tolerance", "2 GiB", peaked, three, gradient_tolerance=TOLERANCE, max_logits_bytes=2048 * MiB)
    for what, variant in {
        "peaked, tolerance, not corrected": GradientPruning(TOLERANCE, correction=False),
        "peaked, tolerance for dX alone": GradientPruning(TOLERANCE, prune_weight_gradient=False),
    }.items():
        add_pruned(what, "default", peaked, three, gradient_tolerance=variant)
    add("peaked, frozen head", "default", step(frozen), two)
    add_pruned("peaked, frozen head, tolerance", "default", frozen, two, gradient_tolerance=TOLERANCE)
    add_pruned("cross-entropy, tolerance, all dense", "default", given, products(given), gradient_tolerance=TOLERANCE)
    return {
        "tolerance": TOLERANCE,
        "two_products": bench(two)._asdict(),
        "chunks": chunks,
        **check(peaked, index, gradient_tolerance=TOLERANCE),
    }


def check_no_wait(given: Inputs, index: Tensor, **options: Any) -> bool:
    """A step whose rows the host knows, with PyTorch told to raise where the host would wait for the device."""
    known = {"supervised_index": torch.arange(len(given.X)), "answer_index": index.cpu()}
    run = step(given, teacher=given.teacher, kl_weight=1.0, **known, **options)
    run()  # compiles
    if given.X.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with record_pruning():
            run()
    finally:
        if given.X.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return True


def check_kernels(dry_run: bool) -> list[str]:
    """The kernels' tests that fail."""
    tests = ["test_triton.py"] if dry_run else ["test_triton.py", "test_triton_columns.py", "test_devices.py"]
    arguments = [f"tests/mind_kernels/{name}" for name in tests]
    arguments += ["-k", "cross_entropy_kernel and 41"] if dry_run else []
    return run_tests(arguments, max(1, min(MOST_TEST_PROCESSES, (os.cpu_count() or 1) // 2)))


def run_tests(arguments: list[str], processes: int) -> list[str]:
    """The names of those that fail, of a pytest that ends early its exit status.

    Most of their time is that of a compiler: about 500 variants of kernels, half a second each. So they are dealt out.

    Raises: SystemExit where they cannot be collected.
    """
    pytest = [sys.executable, "-m", "pytest", "-q", "--color=no"]
    listed = subprocess.run([*pytest, "--collect-only", *arguments], capture_output=True, text=True)
    if listed.returncode:
        print(listed.stdout, listed.stderr, file=sys.stderr)
        raise SystemExit(f"bench.gpu: the kernels' tests cannot be collected, exit status {listed.returncode}")
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    failed: list[str] = []
    with ExitStack() as files:
        running = []
        for i in range(min(processes, len(names))):
            output = files.enter_context(tempfile.TemporaryFile("w+"))
            command = [*pytest, "--tb=short", *names[i::processes]]
            running.append((subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT), output))
        for process, output in running:
            status = process.wait()
            output.seek(0)
            lines = output.read().splitlines()
            found = [name for name in names if any(f"{line} ".startswith(f"FAILED {name} ") for line in lines)]
            found += [line for line in lines if line.startswith("ERROR ")]
            failed += found or ([f"exit status {status} of a pytest"] if status else [])
            if status:
                print("\n".join(lines), file=sys.stderr)
    return failed


def environment(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor()} (interpreter)",
        "commit": git("describe", "--always", "--dirty", "--abbrev=40") or os.environ.get("GIT_COMMIT"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="forward + backward, bf16", title_justify="left")
    for column in ("head", "what", "budget", "p20 ms", "p50 ms", "p80 ms", "ratio", "target", "extra MiB"):
        table.add_column(column, justify="left" if column in ("head", "what", "budget") else "right")
    for result in results:
        case = result["case"]
        for name in ("three_products", "four_products"):
            times = result[name]
            table.add_row(
                case["name"], name.replace("_", " "), "-", f"{times['p20']:.2f}", f"{times['p50']:.2f}",
                f"{times['p80']:.2f}", "1", "", "",
            )  # fmt: skip
        targets = {
            "cross-entropy": case["cross_entropy_target"],
            "cross-entropy + forward KL": case["kl_target"],
            "peaked, tolerance": PRUNED_TARGET,
            "peaked, frozen head, tolerance": FROZEN_TARGET,
        }
        for row in result["rows"]:
            if "failed" in row:
                table.add_row(case["name"], row["what"], row["budget"], "failed")
                continue
            target = targets.get(row["what"]) if row["budget"] == "default" else None
            table.add_row(
                case["name"], row["what"], row["budget"], f"{row['p20']:.2f}", f"{row['p50']:.2f}", f"{row['p80']:.2f}",
                f"{row['ratio_to_products']:.3f}", "" if target is None else f"{target:.2f}",
                f"{row['extra_bytes'] / MiB:.0f}",
            )  # fmt: skip
    Console(width=150).print(table)
    for result in results:
        shares = [
            text.format(result[name])
            for name, text in (
                ("consistency_share", "consistency +{:.1%}"),
                ("half_rows_ratio", "half the rows ×{:.2f}"),
                ("weight_0_saving", "3 of 8 at weight 0 −{:.0%}"),
            )
            if result[name] is not None
        ]
        print(f"{result['case']['name']}: {', '.join(shares)}, errors {json.dumps(result['errors'])}")
        if result["pruning"] and "chunks" in result["pruning"]:
            kept = {
                what: f"{100 * sum(c['rows'] * c['kept_share'] for c in chunks) / sum(c['rows'] for c in chunks):.2f} %"
                for what, chunks in result["pruning"]["chunks"].items()
            }
            print(f"  kept {json.dumps(kept)}\n  errors, peaked {json.dumps(result['pruning']['errors'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The kernels' tests, then speed, memory and error on one GPU.")
    parser.add_argument("--results", type=Path, help="write what was measured as JSON, for bench/results/")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes and one repetition, on any device")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.dry_run:
        raise SystemExit("bench.gpu: no GPU is available, wanted one (or --dry-run)")
    start = time.perf_counter()
    failed_tests = check_kernels(args.dry_run)
    test_seconds = time.perf_counter() - start
    cases, bench, budgets = GPU_CASES, Bench(device, 50), BUDGETS
    if args.dry_run:
        if device == "cpu":
            repair_interpreter()
        cases, bench = [Case("dry-run", 64, 8, 600, 1.0, 1.0)], Bench(device, 1)
        budgets = {"default": None, "16 rows": 16 * 600 * 2}
    results: list[dict[str, Any]] = []
    document: dict[str, Any] = {"environment": environment(device), "test_seconds": test_seconds}
    document |= {"failed_tests": failed_tests, "results": results}

    def save(rows: list[dict[str, Any]]) -> None:
        """What is measured stays, whatever becomes of the rest."""
        results[-1]["rows"] = rows
        if args.results:
            write_json(args.results, document | {"seconds": time.perf_counter() - start})

    for case in cases:
        limits = {name: limit for name, limit in budgets.items() if name != "4 GiB" or case.hidden_size < 1024}
        unfinished: dict[str, Any] = {"case": vars(case), "failed": "cut off before its end"}
        results.append(unfinished)
        results[-1] = try_out(unfinished, lambda: measure_head(case, bench, limits, save)) or unfinished  # noqa: B023
        save(results[-1].get("rows", []))
        print(f"{case.name}: {time.perf_counter() - start:.0f} s", flush=True)
    show([result for result in results if "failed" not in result])
    print(f"{time.perf_counter() - start:.0f} s, of which tests {test_seconds:.0f} s")
    if failed_tests:
        raise SystemExit(f"bench.gpu: {len(failed_tests)} tests failed, the numbers are no claim: {failed_tests}")
    if '"failed"' in json.dumps(results):
        raise SystemExit("bench.gpu: not everything could be measured: see above")


if __name__ == "__main__":
    main()
