"""Every Triton kernel compiled ahead of time, as it is launched, for every target; no GPU is needed.

    python -m bench.aot [--targets sm_90 gfx942] [--quick]

The launchers run on small CPU tensors with real vocabularies while their kernels only record how they are called, so
that what is compiled is what is shipped. One line a kernel and target: registers, spilled bytes, shared memory, machine
instructions. Exit status 1 when a kernel spills, or wants more shared memory than there is.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mind_kernels import triton_columns, triton_multiply
from mind_kernels.chunking import row_buffer
from mind_kernels.consistency import triton_path as consistency
from mind_kernels.consistency.triton_path import pairwise_jsd
from mind_kernels.cross_entropy import triton_path as cross_entropy
from mind_kernels.cross_entropy.triton_path import PairGradient, cross_entropy_
from mind_kernels.linear_kl import triton_path as linear_kl
from mind_kernels.linear_kl.triton_path import dense_kl_, topk_kl_
from mind_kernels.log_softmax import triton_path as log_softmax
from mind_kernels.log_softmax.triton_path import triton_log_softmax
from mind_kernels.pruning import GradientPruning
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.triton_columns import choose_triton_columns

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # that a program may have
MODULES = (cross_entropy, linear_kl, consistency, log_softmax, triton_columns, triton_multiply)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
NVIDIA_ONLY = ("num_stages", "maxnreg")  # as the launchers have it
HIDDEN_SIZE = 1536


class Launch(NamedTuple):
    """How a kernel was called: what decides the code that is made of it."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]  # arguments known to be multiples of 16
    options: dict[str, int]
    label: str


@dataclass
class Resources:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int


def describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], label: str) -> Launch:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = {}, {}, []
    for position, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        is_int = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (is_int and value == 1):  # Triton makes a constant of 1
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            multiple = value.data_ptr()
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            multiple = value if is_int else 1
        else:
            signature[parameter.name] = "fp32"
            continue
        if multiple % 16 == 0:
            divisible.append(position)
    return Launch(kernel, signature, constants, tuple(divisible), options, label)


@contextmanager
def recording(label: str, launches: list[Launch]) -> Iterator[None]:
    """Kernels called within are described instead of run."""
    kernels = {k for module in MODULES for k in vars(module).values() if isinstance(k, JITFunction)}

    def recorder(kernel: JITFunction) -> Callable[..., None]:
        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            launches.append(describe(kernel, args, kwargs, label))

        return run

    for kernel in kernels:
        kernel.run = recorder(kernel)
    try:
        yield
    finally:
        for kernel in kernels:
            del kernel.run


def shipped(V: int, dtype: torch.dtype, quick: bool) -> list[Launch]:
    """The launches of every operation on two rows of V logits."""
    launches: list[Launch] = []
    rows, fp32 = torch.arange(2), torch.float32
    z, ones, losses = row_buffer(2, V, dtype, torch.device("cpu"), "triton").zero_(), torch.ones(2), torch.zeros(2)
    pairs = PairGradient(torch.zeros(2, V, dtype=fp32), torch.zeros(2))
    for name, softcap, pair, gradient in [
        ("gradient", None, None, True),
        ("gradient, softcap, pairs", 30.0, pairs, True),
        ("loss only", None, None, False),
    ]:
        with recording(name, launches):
            cross_entropy_(
                z, z, rows, ones, losses, logit_scale=1.0, logit_softcap=softcap, pairs=pair, needs_gradient=gradient
            )
    for divergence in ("forward",) if quick else ("forward", "reverse", "jsd"):
        for temperature, softcap, pair in [(1.0, None, None), (2.0, 30.0, pairs)]:
            for coefficient in (ones, None):
                name = f"{divergence}, τ={temperature:g}"
                name += ", softcap, pairs" if softcap and coefficient is not None else ", softcap" if softcap else ""
                name += "" if coefficient is None else ", + cross-entropy"
                with recording(name, launches):
                    dense_kl_(
                        z, rows, z, z, rows, rows, coefficient, ones, losses, losses,
                        KLOptions(divergence, 0.5, temperature), V_shared=V,
                        logit_softcap=softcap, teacher_softcap=softcap,
                        pairs=pair if coefficient is not None else None, needs_gradient=True,
                    )  # fmt: skip
    with recording("top-k", launches):
        topk_kl_(
            z, z, torch.arange(8).expand(2, -1), torch.full((2, 8), -3.0), "bucket", rows, ones, ones,
            losses, losses, KLOptions(), pairs=pairs, needs_gradient=True,
        )  # fmt: skip
    for K in (8,) if quick else (2, 4, 8):
        with recording(f"K={K}", launches):
            pairwise_jsd(
                z, torch.full((1, K), -1), rows, torch.zeros(1, dtype=torch.int64), torch.zeros(1, K, K),
                logit_scale=1.0, logit_softcap=None, needs_gradient=True,
            )  # fmt: skip
    logits = torch.zeros(1, 8, V, dtype=dtype, requires_grad=True)
    with recording("K=8", launches):
        triton_log_softmax(logits, 1.0, None).sum().backward()
        triton_log_softmax(logits, 1.0, torch.zeros(1, 8, 1, dtype=torch.int64)).sum().backward()
    W, X = torch.zeros(1, HIDDEN_SIZE, dtype=dtype).expand(V, -1), torch.zeros(2, HIDDEN_SIZE, dtype=dtype)
    total = torch.zeros(1, HIDDEN_SIZE).expand(V, -1)
    for name, correction in [("corrected", True)] if quick else [("corrected", True), ("not corrected", False)]:
        with recording(name, launches):
            columns = choose_triton_columns(z, rows, GradientPruning(2**-9, correction))
            columns.grad_hidden_states(W)
            columns.add_grad_weight_(total, X)
    with recording("", launches):
        triton_multiply.multiply_(torch.zeros(HIDDEN_SIZE, dtype=dtype), ones[:1])
    return launches


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    attributes = {(position,): [["tt.divisibility", 16]] for position in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    options = {
        name: value for name, value in launch.options.items() if target.backend == "cuda" or name not in NVIDIA_ONLY
    }
    return triton.compile(source, target=target, options=options)


def nvidia_resources(cubin: bytes) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout)}
    instructions = text_bytes(cubin) // 16  # an instruction is 16 bytes; the padding at the end counts
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"], instructions)


def text_bytes(elf: bytes) -> int:
    """Size of the .text sections of a 64-bit ELF file."""
    offset, entry, count, names = (
        int.from_bytes(elf[0x28:0x30], "little"),
        int.from_bytes(elf[0x3A:0x3C], "little"),
        int.from_bytes(elf[0x3C:0x3E], "little"),
        int.from_bytes(elf[0x3E:0x40], "little"),
    )

    def section(index: int) -> tuple[int, int, int]:  # name, offset, size
        at = offset + index * entry
        return (
            int.from_bytes(elf[at : at + 4], "little"),
            int.from_bytes(elf[at + 24 : at + 32], "little"),
            int.from_bytes(elf[at + 32 : at + 40], "little"),
        )

    table = section(names)[1]
    return sum(size for name, _, size in map(section, range(count)) if elf[table + name :].startswith(b".text"))


def amd_resources(assembly: str) -> Resources:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    code = assembly[: assembly.index(".section") if ".section" in assembly else None]
    instructions = len(re.findall(r"^\s+(?:v|s|ds|global|flat|buffer|scratch)_\w+", code, flags=re.MULTILINE))
    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")) + field("private_segment_fixed_size")
    return Resources(field("vgpr_count"), spilled, field("group_segment_fixed_size"), instructions)


def measure(launch: Launch, target: GPUTarget) -> Resources:
    compiled = compile_for(launch, target)
    is_amd = target.backend == "hip"
    found = amd_resources(compiled.asm["amdgcn"]) if is_amd else nvidia_resources(compiled.asm["cubin"])
    found.shared_bytes = max(found.shared_bytes, compiled.metadata.shared)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time and count its resources.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="two dtypes and vocabularies, fewer variants")
    args = parser.parse_args(arguments)
    cases = [(151_936, torch.bfloat16), (128_256, torch.float32)]
    if not args.quick:
        cases += [(262_144, torch.float16), (50_257, torch.bfloat16)]

    table = Table(title="kernels compiled ahead of time", title_justify="left")
    for column in ("kernel", "variant", "V", "dtype", "target", "warps"):
        table.add_column(column)
    for column in ("registers", "spilled bytes", "shared bytes", "instructions"):
        table.add_column(column, justify="right")
    spilling = too_large = 0
    for V, dtype in cases:
        for launch in shipped(V, dtype, args.quick):
            for name in args.targets:
                found = measure(launch, TARGETS[name])
                spilling += found.spilled_bytes > 0
                too_large += found.shared_bytes > 1024 * SHARED_KIB[name]
                table.add_row(
                    launch.kernel.fn.__name__, launch.label, str(V), str(dtype).removeprefix("torch."), name,
                    str(launch.options.get("num_warps", 4)), str(found.registers), str(found.spilled_bytes),
                    str(found.shared_bytes), str(found.instructions),
                )  # fmt: skip
    Console(width=160).print(table)
    print(f"{table.row_count} compiled, {spilling} with spills, {too_large} with too much shared memory")
    return 1 if spilling or too_large else 0


if __name__ == "__main__":
    sys.exit(main())
