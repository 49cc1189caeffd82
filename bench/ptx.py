"""The PTX that Triton makes of the kernels, run on a CPU, instruction by instruction; no GPU is needed.

Triton's interpreter runs a kernel's Python. What runs here is what a GPU is given: masks as predicates, reductions as
shuffles and shared memory, products as tensor-core instructions, exponentials as approximations. The threads of a
program step together and a register is an array of one number a thread. Beside the results this finds, by raising:

- OutOfBounds: an address outside the tensors that were given, or not a multiple of what is loaded or stored there;
- Race: memory that one warp wrote, or read, and another then writes, or reads, without a barrier between; of a tensor
  also by two programs, which nothing orders;
- UnknownInstruction: one whose meaning is not written here, as tcgen05 (products of 16 bits for sm_100).

Shared memory that is read before it is written holds NaN. Instructions that are approximate err here by as much as they
are documented to, up or down as their operand's bits have it. Products of tensor cores are rounded once.

    with emulated("sm_90"):
        loss, _ = fused_linear_cross_entropy(X, W, labels, backend="triton")  # CPU tensors

    MIND_PTX_TARGET=sm_90 python -m pytest tests/mind_kernels/test_triton.py    # the kernels' tests, so
    python -m bench.ptx [--target sm_90] [--vocab_size 151936] [--dtype bfloat16] [--results FILE]   # what each does
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.aot import TARGETS, Launch, compile_for, describe
from bench.measure import environment, write_json
from bench.ptx_machine import SECTOR, WARP, Array, Counts, OutOfBounds, Race, UnknownInstruction
from bench.ptx_translator import Program, translate
from mind_kernels import (
    MindLossOutput,
    TeacherHidden,
    TeacherTopK,
    fused_linear_cross_entropy,
    fused_linear_kl,
    mind_loss,
    multi_rationale_log_softmax,
)
from mind_kernels.cross_entropy.triton_path import cross_entropy_kernel

__all__ = ["Counts", "OutOfBounds", "Program", "Race", "UnknownInstruction", "emulated", "operations", "translate"]

SPECIAL = re.compile(r"(ex2|lg2|div|rcp|sqrt|rsqrt)\.\S*f32")  # instructions of the special function units


def parameter(value: Any, kind: str) -> Array:
    if kind.startswith("*"):
        return np.array([value.data_ptr()], np.uint64)
    if kind == "fp32":
        return np.array([value], np.float32).view(np.uint32)
    return np.array([value], np.int64).view(np.uint64) if kind == "i64" else np.array([value], np.int32).view(np.uint32)


def memory_of(tensor: Tensor) -> tuple[int, Array]:
    storage = tensor.untyped_storage()
    start, size = storage.data_ptr(), storage.nbytes()
    return start, np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)


@contextmanager
def emulated(target: str = "sm_90") -> Iterator[dict[str, Counts]]:
    """Within, the kernels run as compiled for this target, on CPU tensors; yields what they did by kernel.

    Raises: RuntimeError where TRITON_INTERPRET=1 made them the interpreter's.
    """
    if not isinstance(cross_entropy_kernel, JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET: given 1 when the kernels were imported, wanted it unset: none is compiled"
        )
    programs: dict[Any, Program] = {}
    counted: dict[str, Counts] = {}

    def compiled(launch: Launch) -> Program:
        constants = tuple(sorted((name, repr(value)) for name, value in launch.constants.items()))
        options = tuple(sorted(launch.options.items()))
        key = launch.kernel, tuple(launch.signature.items()), constants, launch.divisible, options
        if key not in programs:
            made = compile_for(launch, TARGETS[target])
            programs[key] = translate(made.asm["ptx"], WARP * made.metadata.num_warps, made.metadata.shared)
        return programs[key]

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launch = describe(kernel, args, dict(kwargs), "")
        program = compiled(launch)
        passed = [(bound[name], kind) for name, kind in launch.signature.items() if kind != "constexpr"]
        params = [parameter(value, kind) for value, kind in passed] + [np.zeros(1, np.uint64)] * 2
        regions = dict(memory_of(value) for value, _ in passed if isinstance(value, Tensor))
        program.run(tuple(grid), params, list(regions.items()), counted.setdefault(kernel.fn.__name__, Counts()))

    # TRITON_INTERPRET=1 lets backend="triton" take CPU tensors; the kernels are compiled, which was decided at import.
    with mock.patch.object(JITFunction, "run", run), mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        yield counted


# ---------------------------------------------------------------------------------------------------------------------
# What the kernels do, counted


def operations(V: int, dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], object]]]:
    """(rows of V logits, a call) by name; of two rows, or of one position of K = 8."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    H = 16
    X, W, labels = randn(2, H).requires_grad_(), randn(V, H).requires_grad_(), torch.tensor([V // 2, V - 1])
    teacher = TeacherHidden(randn(2, H), randn(V, H))
    logprobs, token_ids = randn(2, V).double().log_softmax(-1).topk(20)
    X8, labels8, z8 = randn(1, 8, 1, H).requires_grad_(), torch.arange(8).view(1, 8, 1), randn(1, 8, V).requires_grad_()

    def both() -> MindLossOutput:
        return mind_loss(
            X.view(2, 1, 1, H), W, labels.view(2, 1, 1), rationale_weights=torch.ones(2, 1), kl_weight=0.5,
            teacher=TeacherHidden(teacher.hidden_states.view(2, 1, 1, H), teacher.lm_head_weight), backend="triton",
        )  # fmt: skip

    def consistency() -> MindLossOutput:
        return mind_loss(
            X8, W, labels8, rationale_weights=torch.full((1, 8), 0.125), answer_index=labels8, backend="triton"
        )

    named: dict[str, tuple[int, Callable[[], object]]] = {
        "cross-entropy": (2, lambda: fused_linear_cross_entropy(X, W, labels, backend="triton")),
        "the same, soft cap": (
            2,
            lambda: fused_linear_cross_entropy(X, W, labels, logit_softcap=30.0, backend="triton"),
        ),
    }
    for divergence in ("forward", "reverse", "jsd"):
        named[f"KL, {divergence}" if divergence != "jsd" else "JSD"] = (
            2,
            lambda divergence=divergence: fused_linear_kl(
                X, W, teacher, labels, divergence=divergence, backend="triton"
            ),
        )
    topk = TeacherTopK(token_ids, logprobs.float())
    named["cross-entropy + KL"] = (2, both)
    named["KL, top-k"] = (2, lambda: fused_linear_kl(X, W, topk, labels, backend="triton"))
    named["consistency, K = 8"] = (8, consistency)
    named["log-softmax, K = 8"] = (8, lambda: multi_rationale_log_softmax(z8, backend="triton").sum().backward())
    return named


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the kernels as compiled on this CPU and count what they do.")
    parser.add_argument("--target", default="sm_90", choices=[name for name in TARGETS if name.startswith("sm_")])
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--results", type=Path, help="write what was counted as JSON")
    args = parser.parse_args(arguments)
    if args.vocab_size < 32:
        parser.error(f"--vocab_size: given {args.vocab_size}, wanted at least 32")
    V, rows = args.vocab_size, []
    for operation, (num_rows, call) in operations(V, getattr(torch, args.dtype)).items():
        with emulated(args.target) as counted:
            call()
        for kernel, counts in counted.items():
            special = sum(number for opcode, number in counts.instructions.items() if SPECIAL.match(opcode))
            of_all = {
                "instructions": WARP * counts.instructions.total(),
                "special_instructions": WARP * special,
                "bytes_read": counts.bytes["ld"],
                "bytes_written": counts.bytes["st"],
                "sector_bytes_read": SECTOR * counts.sectors["ld"],
                "sector_bytes_written": SECTOR * counts.sectors["st"],
            }
            a_logit = {name: number / (num_rows * V) for name, number in of_all.items()}
            rows.append({"operation": operation, "kernel": kernel, **a_logit})
    show(f"{args.target}, V = {V:,}, {args.dtype}: for each logit of the student", rows)
    if args.results:
        settings = {"target": args.target, "vocab_size": V, "dtype": args.dtype}
        write_json(args.results, {"environment": environment(), **settings, "rows": rows})
    return 0


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("operation")
    table.add_column("kernel")
    for column in ("instructions", "2ˣ, ÷, 1/√", "bytes read", "written", "fetched / read", "sent / written"):
        table.add_column(column, justify="right")
    before = ""
    for row in rows:
        read, written = row["bytes_read"], row["bytes_written"]
        table.add_row(
            row["operation"] if row["operation"] != before else "",
            row["kernel"],
            f"{row['instructions']:.1f}",
            f"{row['special_instructions']:.1f}",
            f"{read:.2f}",
            f"{written:.2f}",
            f"{row['sector_bytes_read'] / read:.2f}",
            f"{row['sector_bytes_written'] / written:.2f}" if written > 0.5 else "",  # else a few numbers a row
        )
        before = row["operation"]
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
