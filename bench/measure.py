"""How one case is measured: errors first, then memory, then times in interleaved rounds.

A provider whose loss or gradient is further from the reference than 4 × same-dtype PyTorch + 1e-5 gets no number. Times
of a round follow each other, the bare products among them, so that a slow moment of the machine falls on all alike. A
GPU is kept busy for HEAD_START cycles before each, as the layers below the head keep it busy in a training step: what
the host needs to launch a loss counts only where it needs longer, or waits for the device.

    products    Z = X Wᵀ        (N, H) @ (H, V) -> (N, V)        2·N·H·V FLOP     forward
                dX = Z W        (N, V) @ (V, H) -> (N, H)        2·N·H·V FLOP     backward
                dW = Zᵀ X       (V, N) @ (N, H) -> (V, H)        2·N·H·V FLOP     backward
    roofline    the larger of the products' time and the time to move what must be moved (hidden states and head read,
                their gradients written) at the rate of a device copy, both measured in the same rounds
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Inputs, InputsError, LossAndGradients, make_inputs, reference, reference_loss
from bench.providers import PROVIDERS, Call, Provider, Unavailable, version
from bench.shapes import HEADS, LossCase
from mind_kernels.testing import peak_extra_bytes

MODES = ("forward", "backward", "both")
ERROR_FACTOR, ERROR_FLOOR = 4.0, 1e-5  # 1e-5: sums in another order are not wrong
# On which PyTorch's own error is taken: no power of two rows, whose reciprocal 16 bits hold exactly.
TOLERANCE_ROWS, LOSS_BLOCKS = 250, 8
REFERENCE_FLOP = {"cpu": 1e12, "cuda": 4e14}  # some seconds in the reference's dtype: more rows than that are cut
PRODUCT_ROWS = 16_384  # of a bare product, so that (N, V) fits
COPY_BYTES = 2**28
SLOW_SECONDS, SLOW_FACTOR = 1.5, 3.0  # of a training step, times the bare products: beyond both measured once
HEAD_START = 4_000_000  # cycles, 2 ms of an H100
REPETITIONS = {"cpu": (3, 15), "cuda": (7, 50)}  # at least, at most

OK, WRONG, OOM, UNAVAILABLE, FAILED, NOT_RUN = "ok", "WRONG", "OOM", "unavailable", "failed", "not run"


@dataclass
class Row:
    """One provider in one case. errors: relative, by part, None for NaN. peak_bytes: of forward + backward."""

    provider: str
    version: str | None
    status: str = OK
    reason: str = ""
    note: str = ""
    errors: dict[str, float | None] = field(default_factory=dict)
    peak_bytes: int | None = None
    rounds: int = 0
    times: dict[str, dict[str, float]] = field(default_factory=dict)  # mode -> p20, p50, p80 in ms
    roofline_fraction: dict[str, float] = field(default_factory=dict)  # mode -> roofline / p50


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, and what the CPU allocator and Python say under a limit."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def attempt(row: Row, function: Callable[[], Any]) -> Any:
    """function(), or None with the row telling why not. Nothing of a failed provider stays in memory."""
    try:
        return function()
    except Unavailable as error:
        row.status, row.reason = UNAVAILABLE, str(error)
    except Exception as error:  # whatever a peer raises is its row; the other rows go on
        row.status = OOM if is_out_of_memory(error) else FAILED
        row.reason = one_line(error)
    gc.collect()
    if torch.cuda.is_available():
        # After an illegal access every call fails, this one too: then the rows that follow say so.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def run_once(call: Call, given: Inputs) -> LossAndGradients:
    loss = call.loss(given)
    return LossAndGradients(loss.detach(), *torch.autograd.grad(loss, given.leaves))


def relative_error(given: Tensor, exact: Tensor) -> float:
    """‖given − exact‖ / ‖exact‖, differences in the reference's dtype, sums in fp64, a block of rows at a time."""
    difference = size = 0.0
    for a, b in zip(torch.atleast_1d(given).split(8192), torch.atleast_1d(exact).split(8192), strict=True):
        difference += float(torch.linalg.vector_norm(a.to(b.dtype) - b, dtype=torch.float64)) ** 2
        size += float(torch.linalg.vector_norm(b, dtype=torch.float64)) ** 2
    return (difference / size) ** 0.5 if size else difference**0.5


def relative_errors(given: LossAndGradients, exact: LossAndGradients) -> dict[str, float]:
    return {name: relative_error(getattr(given, name), getattr(exact, name)) for name in vars(exact)}


def allowed_errors(case: LossCase, given: Inputs, dtype: torch.dtype, device: str) -> dict[str, float]:
    """4 × the error of plain PyTorch in this dtype + 1e-5, for the loss and for each gradient, on the first rows.

    A loss is one number, whose rounding may be lucky: its error is the root mean square over blocks of rows, or that
    of the provider "pytorch" on all rows that are checked, where it has run and that is more.
    """
    index = (given.row_weights != 0).nonzero().squeeze(1)[:TOLERANCE_ROWS]
    few = given.rows(index)
    plain = PROVIDERS["pytorch"].prepare(replace(case, batch="rows"), device, dtype)
    errors = relative_errors(run_once(plain, few), reference(few, few.row_weights))
    blocks = [given.rows(block) for block in index.split(max(1, len(index) // LOSS_BLOCKS))]
    squares = [relative_error(plain.loss(block).detach(), reference_loss(block)) ** 2 for block in blocks]
    errors["loss"] = (sum(squares) / len(squares)) ** 0.5
    return {name: ERROR_FACTOR * error + ERROR_FLOOR for name, error in errors.items()}


def excess(errors: dict[str, float], allowed: dict[str, float]) -> str:
    """What is wrong by how much; empty when nothing is. A NaN is wrong."""
    wrong = [name for name, error in errors.items() if not error <= allowed[name]]
    return ", ".join(f"{name}: relative error {errors[name]:.1e}, allowed {allowed[name]:.1e}" for name in wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Times and memory


class Clock:
    """Milliseconds on the device between marks."""

    def __init__(self, device: str):
        self.device = device

    def start(self) -> Any:
        """The first mark, behind what gives the host its head start."""
        if self.device != "cpu":
            torch.cuda._sleep(HEAD_START)
        return self.mark()

    def mark(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        if self.device == "cpu":
            return 1e3 * (stop - start)
        stop.synchronize()
        return start.elapsed_time(stop)

    def __call__(self, function: Callable[[], object]) -> float:
        start = self.start()
        function()
        return self.between(start, self.mark())


def training_step(call: Call, given: Inputs, clock: Clock) -> tuple[dict[str, float], LossAndGradients]:
    """(backward: of a training step, both: the training step's forward and backward, in ms) and what it computes."""
    start = clock.start()
    loss = call.loss(given)
    middle = clock.mark()
    gradients = torch.autograd.grad(loss, given.leaves)
    stop = clock.mark()
    times = {"backward": clock.between(middle, stop), "both": clock.between(start, stop)}
    return times, LossAndGradients(loss.detach(), *gradients)


def step_times(call: Call, given: Inputs, clock: Clock) -> dict[str, float]:
    """A training step's times, and forward: without a gradient.

    Under no_grad a model's hidden states require none, and a peer that looks there (Liger) then makes none; its head's
    weight, a parameter, still does.
    """
    without = replace(given, hidden_states=given.hidden_states.detach())

    def forward() -> None:
        with torch.no_grad():
            call.loss(without)

    return {"forward": clock(forward)} | training_step(call, given, clock)[0]


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Of function() above what is held before it, what it keeps included."""
    gc.collect()  # what is freed during function() would hide as much of its peak
    if device == "cpu":
        return peak_extra_bytes(function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Roofline:
    """The bare products and a device copy of this case's size."""

    def __init__(self, given: Inputs):
        active, passive = given.num_rows()
        self.X, self.W = given.hidden_states.detach(), given.lm_head_weight.detach()
        self.teacher = None if given.teacher is None else given.teacher.lm_head_weight
        self.active, self.forward_rows = active, active + passive
        self.buffer = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self.X.device)
        self.target = torch.empty_like(self.buffer)
        read = (self.forward_rows * self.X.shape[1] + self.W.numel()) * self.X.element_size()
        read *= 1 if self.teacher is None else 2
        self.bytes = {"forward": read, "backward": 2 * given.gradient_bytes}
        self.bytes["both"] = sum(self.bytes.values())

    def forward(self) -> None:
        for rows in self.X[: self.forward_rows].split(PRODUCT_ROWS):
            Z = rows @ self.W.t()
            if self.teacher is not None:
                torch.mm(rows, self.teacher.t(), out=Z)

    def backward(self, Z: Tensor) -> None:
        grad_W = None
        for rows in self.X[: self.active].split(PRODUCT_ROWS):
            z = Z[: len(rows)]
            z @ self.W
            grad_W = z.t() @ rows if grad_W is None else grad_W.addmm_(z.t(), rows)

    def times(self, clock: Clock) -> dict[str, float]:
        Z = self.X[: min(self.active, PRODUCT_ROWS)] @ self.W.t()
        times = {"forward": clock(self.forward), "backward": clock(lambda: self.backward(Z))}
        return times | {
            "both": times["forward"] + times["backward"],
            "copy": clock(lambda: self.target.copy_(self.buffer)),
        }


def quantiles(values: list[float]) -> dict[str, float]:
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), found.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# One case


def measure_case(
    case: LossCase,
    num_rows: int,
    dtype: torch.dtype,
    device: str,
    providers: Iterable[Provider],
    *,
    seconds: float,
    deadline: float = math.inf,
    too_slow: Collection[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The case's document: see `describe` for its head; rows: one `Row` a provider.

    seconds: for the timed rounds. too_slow: names of providers that are not run. deadline: in time.perf_counter's
    seconds; what has not begun by then is not run.
    """
    torch.compiler.reset()  # compiled code of earlier cases counts against the limit of recompilations
    by_name = {provider.name: provider for provider in providers}
    rows = [Row(provider.name, version(provider.package)) for provider in by_name.values()]
    document = describe(case, num_rows, dtype) | {"rows": rows}
    preparation = Row("inputs", None)
    given = attempt(preparation, lambda: _prepare(case, num_rows, dtype, device))
    if given is None:
        status = UNAVAILABLE if preparation.reason.startswith(InputsError.__name__) else preparation.status
        for row in rows:
            row.status, row.reason = status, preparation.reason
        return _plain(document)
    inputs, allowed, checked, exact = given
    active, passive = inputs.num_rows()
    document |= {
        "rows_with_gradient": active,
        "rows_without_gradient": passive,
        "rows_checked": len(checked.labels),
        "allowed_errors": allowed,
        "gradient_bytes": inputs.gradient_bytes,
        "input_bytes": inputs.bytes,
    }
    products_ms = cache(lambda: Roofline(inputs).times(Clock(device))["both"])
    calls: dict[str, Call] = {}
    for row in rows:
        if row.provider in too_slow:
            row.status, row.reason = NOT_RUN, "takes 10 s to minutes a step on a CPU; named by --providers it runs"
            continue
        if time.perf_counter() > deadline:
            row.status, row.reason = NOT_RUN, "the time was used up"
            continue
        say(f"{document['id']}: {row.provider}")
        call = attempt(row, lambda row=row: _check(row, by_name[row.provider], case, checked, exact, device, dtype))
        if call is not None and row.provider == "pytorch":  # the error of its 16-bit mean grows with the rows
            allowed["loss"] = max(allowed["loss"], ERROR_FACTOR * row.errors["loss"] + ERROR_FLOOR)
        row.reason = row.reason or excess(row.errors, allowed)
        if call is None:
            continue
        if row.reason:
            row.status = WRONG
            continue
        if checked is not inputs:  # what was compiled is for other rows
            attempt(row, lambda call=call: run_once(call, inputs))
        if row.status == OK:
            attempt(row, lambda row=row, call=call: _first_step(row, call, inputs, device, products_ms))
        if row.status == OK and not row.times:
            calls[row.provider] = call
    exact.clear()
    if any(row.status == OK for row in rows):
        say(f"{document['id']}: rounds of {len(calls)}")
        _time(document, rows, calls, inputs, device, min(seconds, deadline - time.perf_counter()))
    return _plain(document)


def _check(
    row: Row,
    provider: Provider,
    case: LossCase,
    given: Inputs,
    exact: dict[Any, LossAndGradients],
    device: str,
    dtype: torch.dtype,
) -> Call:
    """The provider made ready, and its errors."""
    call = provider.prepare(case, device, dtype)
    row.note = call.note
    result = run_once(call, given)
    if call.row_weights is not None and call.row_weights not in exact:
        exact[call.row_weights] = reference(given, call.row_weights(given))
    row.errors = relative_errors(result, exact[call.row_weights])
    return call


def _first_step(row: Row, call: Call, given: Inputs, device: str, products_ms: Callable[[], float]) -> None:
    """Peak memory; and the time, where a training step takes so long, also beside the products, that once will do."""
    found: list[dict[str, float]] = []
    clock = Clock(device)
    row.peak_bytes = peak_bytes(lambda: found.append(training_step(call, given, clock)[0]), device)
    if found[0]["both"] > 1e3 * SLOW_SECONDS and found[0]["both"] > SLOW_FACTOR * products_ms():
        row.rounds = 1
        row.times = {mode: quantiles([value]) for mode, value in found[0].items()}


def _prepare(
    case: LossCase, num_rows: int, dtype: torch.dtype, device: str
) -> tuple[Inputs, dict[str, float], Inputs, dict[Any, LossAndGradients]]:
    """The inputs, the allowed errors, the inputs on which errors are taken, the same unless that takes long, and what
    is exact of these."""
    given = make_inputs(case, num_rows, dtype, device)
    most = int(REFERENCE_FLOP[device] / (6 * given.lm_head_weight.numel()))
    checked = given if most >= len(given.labels) else make_inputs(case, most, dtype, device)
    return given, allowed_errors(case, given, dtype, device), checked, {None: reference(checked, checked.row_weights)}


def _time(
    document: dict[str, Any],
    rows: list[Row],
    calls: dict[str, Call],
    given: Inputs,
    device: str,
    seconds: float,
) -> None:
    clock, by_name = Clock(device), {row.provider: row for row in rows}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    roofline = attempt(floor := Row("roofline", None), lambda: Roofline(given))
    bare: list[dict[str, float]] = []
    least, most = REPETITIONS[device]
    warm = False  # the first round finds compiled code and memory, and is thrown away
    start = time.perf_counter()
    while roofline and len(bare) < most and (len(bare) < least or time.perf_counter() - start < seconds):
        round_of_bare = attempt(floor, lambda: roofline.times(clock))
        if round_of_bare is None:
            break
        for name in [*times]:
            found = attempt(by_name[name], lambda name=name: step_times(calls[name], given, clock))
            if found is None:
                del times[name]
            elif warm:
                times[name].append(found)
        if warm:
            bare.append(round_of_bare)
        warm = True
    if floor.status != OK:
        for row in rows:
            if row.status == OK:
                row.status, row.reason, row.times = floor.status, f"the bare products: {floor.reason}", {}
        return
    products = {key: quantiles([entry[key] for entry in bare]) for key in (*MODES, "copy")}
    rate = 2 * COPY_BYTES / products["copy"]["p50"]  # bytes/ms, read and written
    floors = {mode: max(products[mode]["p50"], roofline.bytes[mode] / rate) for mode in MODES}
    document |= {
        "rounds": len(bare),
        "products": {mode: products[mode] for mode in MODES},
        "copy_bytes_per_second": 1e3 * rate,
        "roofline_ms": floors,
    }
    for name, entries in times.items():
        row = by_name[name]
        row.rounds = len(entries)
        row.times = {mode: quantiles([entry[mode] for entry in entries]) for mode in MODES}
    for row in rows:
        # Where gradients are made in the forward pass there is next to no backward: its fraction says nothing.
        measured = [mode for mode in ("forward", "both") if mode in row.times]
        row.roofline_fraction = {mode: floors[mode] / row.times[mode]["p50"] for mode in measured}


def describe(case: LossCase, num_rows: int, dtype: torch.dtype) -> dict[str, Any]:
    short = str(dtype).removeprefix("torch.")
    head = HEADS[case.head]
    return {
        "id": f"{case.name} N={num_rows} {short}",
        "case": case.name,
        "head": case.head,
        "loss": case.loss,
        "batch": case.batch,
        "hidden": case.hidden,
        "num_rows": num_rows,
        "dtype": short,
        "hidden_size": head.hidden_size,
        "vocab_size": head.vocab_size,
        "logit_softcap": head.logit_softcap,
    }


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    for row in document["rows"]:  # JSON has no NaN
        row.errors = {name: error if math.isfinite(error) else None for name, error in row.errors.items()}
    return document | {"rows": [asdict(row) for row in document["rows"]]}


# ---------------------------------------------------------------------------------------------------------------------
# The machine, and files


def git(*arguments: str) -> str:
    """What git says of these sources; nothing where they are a copy without history, or git is not installed."""
    command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device, commit, versions and time: what a number is worth nothing without.

    Where git cannot tell, the commit is what the variable GIT_COMMIT says, else None.
    """
    sources = [".", ":!bench/results", ":!experiments/results", ":!*.md"]  # a run writes results
    changes = "+uncommitted" if git("status", "--porcelain", "--", *sources) else ""
    if device == "cpu":
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        name = f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    else:
        name = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    packages = sorted({provider.package for provider in PROVIDERS.values()} | {"transformers", "triton"})
    return {
        "device": name,
        "commit": git("rev-parse", "HEAD") + changes or os.environ.get("GIT_COMMIT"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """The file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
