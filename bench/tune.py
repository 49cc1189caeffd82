"""Which launch suits the row kernels on this GPU: tokens taken at a time, warps and registers, timed one by one.

    python -m bench.tune [--results FILE] [--dry-run]

For each vocabulary a chunk of bf16 logits as the default budget makes it, with a teacher the part whose logits are held
together. Every launch is checked against fp32 before it is timed; one that is wrong, or does not fit the device, is a
row that says so. The yardstick is a copy of the same logits, in turns with the kernel: each read and written once, the
least a kernel can do. Of each several calls are timed in a row: a copy of a part takes little longer than a mark. What
is shipped stands first; what beats it belongs into the kernel's `launch`. Three minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from bench.gpu import Bench, environment  # first: without a GPU it turns Triton's interpreter on
from bench.measure import write_json
from mind_kernels.chunking import DEFAULT_MAX_LOGITS_BYTES, PART_ROWS, PARTS, row_buffer
from mind_kernels.cross_entropy import triton_path as cross_entropy
from mind_kernels.linear_kl import triton_path as linear_kl
from mind_kernels.teacher_rows import KLOptions
from mind_kernels.testing import relative_error, repair_interpreter

VOCABULARIES = (128_256, 151_936, 262_144, 50_257)
# BLOCK_V, warps, registers a thread: from many small programs a multiprocessor to one that fills it.
LAUNCHES = (
    (2048, 4, 128),
    (2048, 8, 128),
    (4096, 4, 128),
    (4096, 8, 128),
    (4096, 16, 64),
    (4096, 16, 128),
    (8192, 16, 64),
    (8192, 16, 128),
    (8192, 32, 64),
    (16_384, 32, 64),
)
CALLS = 10  # in a row
CHECKED_ROWS = 16
ALLOWED_ERROR = 1e-2  # of a bf16 gradient: twice its rounding


class Rows:
    """Logits, labels and a teacher's logits of one chunk, and the two kernels' calls on some of its rows."""

    def __init__(self, m: int, V: int, device: str):
        generator = torch.Generator(device).manual_seed(0)
        self.z, self.d, self.t = (row_buffer(m, V, torch.bfloat16, torch.device(device), "triton") for _ in range(3))
        self.z.normal_(0, 3, generator=generator)
        self.t.normal_(0, 3, generator=generator)
        self.labels = torch.randint(0, V, (m,), generator=generator, device=device)
        self.index, self.ones = torch.arange(m, device=device), torch.ones(m, device=device)
        self.loss, self.kl = torch.empty(m, device=device), torch.empty(m, device=device)

    def cross_entropy(self, rows: int) -> None:
        n = slice(rows)
        cross_entropy.cross_entropy_(
            self.z[n], self.d[n], self.labels[n], self.ones[n], self.loss[n],
            logit_scale=1.0, logit_softcap=None, pairs=None, needs_gradient=True,
        )  # fmt: skip

    def cross_entropy_and_kl(self, rows: int) -> None:
        n = slice(rows)
        linear_kl.dense_kl_(
            self.z, self.index[n], self.d, self.t, self.index[n], self.labels[n], self.ones[n], self.ones[n],
            self.loss[n], self.kl[n], KLOptions(), V_shared=self.z.shape[1], needs_gradient=True,
        )  # fmt: skip

    def error(self, run: Callable[[int], None], with_kl: bool) -> float:
        """Of the gradient, or that of the losses, which are fp32, a thousandfold: the larger."""
        n = slice(min(CHECKED_ROWS, len(self.z)))
        self.d[n], self.loss[n], self.kl[n] = torch.nan, torch.nan, torch.nan
        run(n.stop)
        z, t = self.z[n].float(), self.t[n].float()
        losses, wanted = self.loss[n], F.cross_entropy(z, self.labels[n], reduction="none")
        gradient = torch.softmax(z, -1) - F.one_hot(self.labels[n], z.shape[1])
        if with_kl:
            log_s, log_t = torch.log_softmax(z, -1), torch.log_softmax(t, -1)
            losses, wanted = losses + self.kl[n], wanted + (log_t.exp() * (log_t - log_s)).sum(-1)
            gradient += log_s.exp() - log_t.exp()
        errors = [relative_error(self.d[n], gradient), 1e3 * relative_error(losses, wanted)]
        return max(errors) if all(error == error for error in errors) else float("inf")


def measure(
    V: int, device: str, bench: Bench, launches: tuple[tuple[int, int, int], ...], calls: int
) -> list[dict[str, Any]]:
    m = min(DEFAULT_MAX_LOGITS_BYTES // (2 * V), 64 if device == "cpu" else 2**16)
    rows = Rows(m, V, device)
    found: list[dict[str, Any]] = []

    def add(
        what: str,
        module: ModuleType,
        launch: dict[str, int],  # as it is shipped
        run: Callable[[int], None],
        num_rows: int,
        with_kl: bool,
    ) -> None:
        z, d = rows.z[:num_rows], rows.d[:num_rows]
        has_registers = "maxnreg" in launch  # HIP knows no such option
        shipped = launch["BLOCK_V"], launch["num_warps"], launch.get("maxnreg")
        others = [(block, warps, registers if has_registers else None) for block, warps, registers in launches]
        for block, warps, registers in dict.fromkeys((shipped, *others)):
            launch = {"BLOCK_V": block, "num_warps": warps} | ({"maxnreg": registers} if has_registers else {})
            row = {"kernel": what, "V": V, "rows": num_rows, "tokens": block, "warps": warps, "registers": registers}
            row |= {"shipped": (block, warps, registers) == shipped, "ms": None, "copy_ms": None, "status": "ok"}
            with patch.object(module, "launch", lambda *_, launch=launch: launch):
                try:
                    error = rows.error(run, with_kl)
                    if error > ALLOWED_ERROR:
                        row["status"] = f"wrong: error {error:.1e}"
                    else:
                        times = bench.in_turns(
                            lambda: [run(num_rows) for _ in range(calls)], lambda: [d.copy_(z) for _ in range(calls)]
                        )
                        row["ms"], row["copy_ms"] = (timing.p50 / calls for timing in times)
                except Exception as refusal:  # of the compiler or the device; the others go on
                    row["status"] = f"{type(refusal).__name__}: {str(refusal)[:80]}"
            found.append(row)

    launch = cross_entropy.launch(rows.z, has_softcap=False)
    add("cross-entropy", cross_entropy, launch, rows.cross_entropy, m, False)
    part = min(m, max(PART_ROWS, -(-m // PARTS)))
    launch = linear_kl.launch(rows.z, "forward")
    add("cross-entropy + forward KL", linear_kl, launch, rows.cross_entropy_and_kl, part, True)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="row kernels, bf16, loss and gradient", title_justify="left")
    for column in ("kernel", "V", "rows", "tokens", "warps", "registers", "ms", "× a copy", ""):
        table.add_column(column, justify="left" if column in ("kernel", "") else "right")
    for row in rows:
        time = ("", "") if row["ms"] is None else (f"{row['ms']:.3f}", f"{row['ms'] / row['copy_ms']:.2f}")
        note = "shipped" if row["shipped"] else ""
        table.add_row(
            row["kernel"], *(str(row[name]) for name in ("V", "rows", "tokens", "warps", "registers")), *time,
            note if row["status"] == "ok" else row["status"],
        )  # fmt: skip
    Console(width=150).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="write what was measured as JSON, for bench/results/")
    parser.add_argument("--dry-run", action="store_true", help="a tiny vocabulary and one repetition, on any device")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.dry_run:
        raise SystemExit("bench.tune: no GPU is available, wanted one (or --dry-run)")
    if device == "cpu":
        repair_interpreter()
    bench = Bench(device, 1 if options.dry_run else 30)
    vocabularies, launches = ((600,), LAUNCHES[:2]) if options.dry_run else (VOCABULARIES, LAUNCHES)
    rows: list[dict[str, Any]] = []
    for V in vocabularies:
        rows += measure(V, device, bench, launches, 1 if options.dry_run else CALLS)
        if options.results:  # after each vocabulary: what is measured stays, whatever becomes of the next
            write_json(options.results, {"environment": environment(device), "rows": rows})
    show(rows)


if __name__ == "__main__":
    main()
