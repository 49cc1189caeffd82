"""The PTX that Triton makes of the kernels, run on a CPU, instruction by instruction; no GPU is needed.

Triton's interpreter runs a kernel's Python. What runs here is what a GPU is given: masks as predicates, reductions as
shuffles and shared memory, products as tensor-core instructions, exponentials as approximations. The threads of a
program step together and a register is an array of one number a thread. Beside the results this finds, by raising:

- OutOfBounds: an address outside the tensors that were given, or not a multiple of what is loaded or stored there;
- Race: memory that one warp wrote, or read, and another then writes, or reads, without a barrier between; of a tensor
  also by two programs, which nothing orders;
- shared memory that is read before it is written holds NaN.

Instructions that are approximate err here by as much as they are documented to, up or down as their operand's bits
have it. Products of tensor cores are rounded once.

    with emulated("sm_90"):
        loss, _ = fused_linear_cross_entropy(X, W, labels, backend="triton")  # CPU tensors

    MIND_PTX_TARGET=sm_90 python -m pytest tests/mind_kernels/test_triton.py    # the kernels' tests, so
    python -m bench.ptx [--target sm_90] [--vocab_size 151936] [--dtype bfloat16]   # what each kernel does, counted
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.aot import TARGETS, Launch, compile_for, describe
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

Array = np.ndarray[Any, Any]  # (1,) where all threads hold the same, (threads,) otherwise
WARP = 32
REGISTERS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64, "f": np.uint32, "fd": np.uint64}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
SECTOR = 32  # bytes, the least that is fetched
SPECIAL = re.compile(r"(ex2|lg2|div|rcp|sqrt|rsqrt)\.\S*f32")  # instructions of the special function units


class OutOfBounds(Exception):
    """A program's address is in none of the tensors that its kernel was given, or not aligned."""


class Race(Exception):
    """Two warps use the same bytes of shared memory, one of them writing, without a barrier between."""


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: registers hold bits


def f32(x: Array) -> Array:
    return x.view(np.float32)


def bits(x: Array) -> Array:
    return x.astype(np.float32, copy=False).view(np.uint32)


def pairs(x: Array) -> Array:  # (n,) 64 bits -> (n, 2) fp32
    return x.view(np.float32).reshape(-1, 2)


def bits_of_pairs(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32).view(np.uint64).reshape(-1)


def flush(x: Array) -> Array:
    """Subnormal numbers become 0, as with .ftz."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def off_by(exact: Array, operand: Array, error: float) -> Array:
    """exact (float64), rounded after a relative error of up to `error` that the operand's bits choose."""
    chosen = (operand.view(np.uint32) * np.uint32(2654435761) >> np.uint32(16)).astype(np.float64) / 2**15 - 1
    return (exact * (1 + error * chosen)).astype(np.float32)


def half(x: Array) -> Array:
    return x.view(np.float16).astype(np.float32)


def bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_half(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def to_bf16(x: Array) -> Array:
    b = x.view(np.uint32)
    rounded = (b + np.uint32(0x7FFF) + (b >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def pack(low: Array, high: Array) -> Array:
    if low.dtype == np.uint16:
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def unpack(x: Array) -> tuple[Array, Array]:
    size = x.itemsize * 4
    narrow = UNSIGNED[size]
    return x.astype(narrow), (x >> x.dtype.type(size)).astype(narrow)


def shift(x: Array, by: Array, left: bool, signed: bool = False) -> Array:
    """Shifts by the width or more give what is shifted in."""
    width = x.itemsize * 8
    by = np.minimum(by, np.uint32(width - 1 if signed else width)).astype(x.dtype)
    if signed:
        return (x.view(SIGNED[width]) >> by.view(SIGNED[width])).view(x.dtype)
    shifted = x << by if left else x >> by
    return np.where(by >= width, x.dtype.type(0), shifted)


def bit_field(x: Array, start: Array, length: Array, signed: bool) -> Array:
    found = x.astype(np.uint64) >> start.astype(np.uint64) & (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    if signed:
        sign = np.uint64(1) << (length - np.uint32(1)).astype(np.uint64)
        found = (found ^ sign) - sign
    return found.astype(np.uint32)


def high(a: Array, b: Array) -> Array:
    return (a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def divide(a: Array, b: Array) -> Array:
    """Signed, towards 0."""
    x, y = a.view(np.int32).astype(np.int64), b.view(np.int32).astype(np.int64)
    return (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype(np.int32).view(np.uint32)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def compare(name: str, a: Array, b: Array) -> Array:
    if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):  # true also of NaN
        return COMPARISONS[name[:2]](a, b) | (np.isnan(a) | np.isnan(b))
    found = COMPARISONS[name](a, b)
    return found & ~(np.isnan(a) | np.isnan(b)) if name == "ne" and a.dtype.kind == "f" else found


# ---------------------------------------------------------------------------------------------------------------------
# One program


@dataclass
class Counts:
    """What the programs of a kernel did, all together."""

    instructions: Counter[str] = field(default_factory=Counter)  # by opcode; one a warp
    sectors: Counter[str] = field(default_factory=Counter)  # of 32 bytes, that "ld" and "st" touched in global memory
    bytes: Counter[str] = field(default_factory=Counter)  # that they wanted there


class Region:
    """A tensor's memory, and who of a launch has used which two bytes of it."""

    WARP_BITS, INTERVAL_BITS = 8, 32
    MANY_WARPS, MANY_PROGRAMS = 2**8 - 1, 2**23 - 1
    # Where a program has more threads than elements, several warps load the same ones in one instruction and one of
    # them stores the results: the others' are of no use, whatever they read.
    SAME_LOAD = 2**8 - 2

    def __init__(self, start: int, data: Array):
        self.start, self.data = start, data
        # program + 1, barrier interval and warp of the last that wrote, and that read; 0: nobody.
        self.writers, self.readers = np.zeros((2, -(-len(data) // 2)), np.int64)

    def use(self, at: Array, warp: Array, size: int, program: int, interval: int, writes: bool) -> str | None:
        """Raises: Race where another program, or another warp since the last barrier, did what forbids this.

        Returns what is a race if a second warp of the program stores anything: a number that all warps had read.
        """
        suspicion = None
        where = ((at - self.start)[:, None] // 2 + np.arange(max(size // 2, 1))).reshape(-1)
        period = (program + 1) << self.INTERVAL_BITS | interval
        mine = np.repeat(period << self.WARP_BITS | warp, max(size // 2, 1))
        for kind, users in (("written", self.writers), ("read", self.readers)):
            if kind == "read" and not writes:
                continue
            before = users[where]
            other_program = before >> self.WARP_BITS + self.INTERVAL_BITS != program + 1
            other_warp = (before >> self.WARP_BITS == period) & (before != mine)
            other_warp &= before & self.MANY_WARPS != self.SAME_LOAD
            wrong = (before != 0) & (other_program | other_warp)
            if wrong.any():
                byte = 2 * int(where[wrong][0])
                who = "program" if other_program[wrong][0] else "warp without a barrier between"
                message = (
                    f"byte {byte} of a tensor of {len(self.data)} is {'written' if writes else 'read'} by program "
                    f"{program} and {kind} by another {who}"
                )
                if other_program[wrong].any() or (before[wrong] & self.MANY_WARPS != self.MANY_WARPS).any():
                    raise Race(message)
                suspicion = message
        users = self.writers if writes else self.readers
        if not writes:
            before = users[where]
            other_program = (before != 0) & (before >> self.WARP_BITS + self.INTERVAL_BITS != program + 1)
            other_warp = (before >> self.WARP_BITS == period) & (before != mine)
            mine = np.where(other_warp, period << self.WARP_BITS | self.MANY_WARPS, mine)
            mine = np.where(other_program, self.MANY_PROGRAMS << self.WARP_BITS + self.INTERVAL_BITS, mine)
        users[where] = mine
        together = users[where] != mine  # by several warps in this instruction
        if together.any():
            if writes:
                raise Race(f"byte {2 * int(where[together][0])} of a tensor is written by two warps at once")
            users[where[together]] = np.maximum(mine[together], period << self.WARP_BITS | self.SAME_LOAD)
        return suspicion


class Machine:
    """The memory and the threads of one program."""

    def __init__(self, threads: int, shared_bytes: int, regions: list[Region], counts: Counts | None, program: int = 0):
        self.threads, self.regions, self.counts, self.program = threads, regions, counts, program
        self.tid = np.arange(threads, dtype=np.uint32)
        self.warp = (self.tid // WARP).astype(np.int64)
        self.shared = np.full(-(-max(shared_bytes, 16) // 16) * 16, 0xFF, dtype=np.uint8)
        # Of every byte of shared memory: the last barrier interval in which it was written and read, and by which
        # warps (one bit each).
        self.written, self.read = np.zeros((2, len(self.shared)), dtype=np.int64) - 1
        self.writers, self.readers = np.zeros((2, len(self.shared)), dtype=np.uint32)
        self.interval = 0
        self.storing: set[int] = set()  # warps
        self.suspicions: list[str] = []
        self.place = np.zeros(threads, dtype=np.int64)
        self.copies: list[tuple[Array, Array, Array, int]] = []  # cp.async: destination, bytes, active, size
        self.groups: list[list[tuple[Array, Array, Array, int]]] = []

    def every(self, x: Array) -> Array:
        return np.broadcast_to(x, (self.threads,)) if len(x) == 1 else x

    # Branches: where threads part, each has a place of its own, and those furthest behind go first

    END = 2**31

    def branch(self, mask: Array | None, taken: Array | None, to: int, following: int) -> tuple[int, Array | None]:
        """Threads of the mask for which `taken` is true (None: all) go to block `to`, the others to `following`."""
        taken = np.ones(self.threads, bool) if taken is None else self.every(taken)
        if mask is None:
            self.place = np.where(taken, to, following)
        else:
            self.place = np.where(mask, np.where(taken, to, following), self.place)
        return self._next()

    def go(self, mask: Array, following: int) -> tuple[int, Array | None]:
        self.place = np.where(mask, following, self.place)
        return self._next()

    def _next(self) -> tuple[int, Array | None]:
        block = int(self.place.min())
        mask = self.place == block
        return block, None if mask.all() else mask

    # Global memory

    def _region(self, first: int) -> Region:
        for region in self.regions:
            if region.start <= first < region.start + len(region.data):
                return region
        raise OutOfBounds(f"address {first:#x} is in no tensor")

    def _count(self, kind: str, address: Array, active: Array | None, size: int) -> None:
        if self.counts is None:
            return
        address, warp = (self.every(address), self.warp) if len(address) > 1 or active is not None else (address, 0)
        at = address if active is None else address[active]
        by = warp if active is None else np.asarray(warp)[active]
        sectors = {(w, s) for w, s in zip(np.broadcast_to(by, at.shape).tolist(), (at // SECTOR).tolist(), strict=True)}
        self.counts.sectors[kind] += len(sectors)
        self.counts.bytes[kind] += (
            len(set(zip(np.broadcast_to(by, at.shape).tolist(), at.tolist(), strict=True))) * size
        )

    def load_global(self, address: Array, active: Array | None, size: int, number: int) -> list[Array]:
        """`number` values of `size` bytes at each active thread's address."""
        if active is not None:
            address = self.every(address)
            active = self.every(active)
            if not active.any():
                return [np.zeros(self.threads, UNSIGNED[size * 8])] * number
        self._count("ld", address, active, size * number)
        index, view = self._index(address, active, size, number, writes=False)
        found = [np.zeros(len(address), view.dtype) for _ in range(number)]
        for i in range(number):
            if active is None:
                found[i] = view[index + i]
            else:
                found[i][active] = view[index + i]
        return found

    def store_global(self, address: Array, active: Array | None, size: int, values: list[Array]) -> None:
        address = self.every(address)
        active = None if active is None else self.every(active)
        if active is not None and not active.any():
            return
        self._count("st", address, active, size * len(values))
        index, view = self._index(address, active, size, len(values), writes=True)
        for i, value in enumerate(values):
            narrow = self.every(value).astype(view.dtype)
            view[index + i] = narrow if active is None else narrow[active]

    def _index(self, address: Array, active: Array | None, size: int, number: int, writes: bool) -> tuple[Array, Array]:
        at = (address if active is None else address[active]).astype(np.int64)
        region = self._region(int(at[0]))
        start, data = region.start, region.data
        if ((at < start) | (at + size * number > start + len(data))).any():
            raise OutOfBounds(f"{size * number} bytes outside the tensor at {start:#x} of {len(data)} bytes")
        if (at % (size * number)).any():
            raise OutOfBounds(f"address {int(at[0]):#x} of {size * number} bytes is not aligned")
        if len(at) == 1 and active is None:  # by all warps
            warp = np.array([Region.MANY_WARPS if self.threads > WARP else 0])
        else:
            warp = self.warp if active is None else self.warp[active]
        suspicion = region.use(at, warp, size * number, self.program, self.interval, writes)
        if writes:
            self.storing.update(warp.tolist())
        if suspicion is not None:
            self.suspicions.append(suspicion)
        if self.suspicions and len(self.storing) > 1:
            raise Race(self.suspicions[0])
        return (at - start) // size, data[: len(data) // size * size].view(UNSIGNED[size * 8])

    # Shared memory

    def _touch(self, at: Array, warp: Array, size: int, writes: bool) -> None:
        """Notes who uses these bytes, and raises where another warp did so since the last barrier."""
        where = (at[:, None] + np.arange(size)).reshape(-1)
        if len(where) and not (where.min() >= 0 and where.max() < len(self.shared)):
            raise OutOfBounds(f"shared memory up to byte {where.max()} of {len(self.shared)}")
        mine = np.repeat(np.uint32(1) << warp.astype(np.uint32), size)
        others = np.where(self.written[where] == self.interval, self.writers[where], np.uint32(0)) & ~mine
        if writes:
            others |= np.where(self.read[where] == self.interval, self.readers[where], np.uint32(0)) & ~mine
        if others.any():
            raise Race(
                f"byte {where[others != 0][0]} of shared memory is {'written' if writes else 'read'} unprotected"
            )
        last, users = (self.written, self.writers) if writes else (self.read, self.readers)
        users[where[last[where] != self.interval]] = 0
        last[where] = self.interval
        np.bitwise_or.at(users, where, mine)

    def load_shared(self, address: Array, active: Array | None, size: int, number: int) -> list[Array]:
        address = self.every(address)
        active = np.ones(self.threads, bool) if active is None else self.every(active)
        at = address[active].astype(np.int64)
        self._touch(at, self.warp[active], size * number, writes=False)
        if (at % (size * number)).any():
            raise OutOfBounds(f"shared address {int(at[0])} of {size * number} bytes is not aligned")
        view = self.shared.view(UNSIGNED[size * 8])
        found = [np.zeros(self.threads, view.dtype) for _ in range(number)]
        for i in range(number):
            found[i][active] = view[at // size + i]
        return found

    def store_shared(self, address: Array, active: Array | None, size: int, values: list[Array]) -> None:
        address = self.every(address)
        active = np.ones(self.threads, bool) if active is None else self.every(active)
        at = address[active].astype(np.int64)
        self._touch(at, self.warp[active], size * len(values), writes=True)
        if (at % (size * len(values))).any():
            raise OutOfBounds(f"shared address {int(at[0])} of {size * len(values)} bytes is not aligned")
        view = self.shared.view(UNSIGNED[size * 8])
        for i, value in enumerate(values):
            view[at // size + i] = self.every(value).astype(view.dtype)[active]

    def barrier(self) -> None:
        self.interval += 1

    # Asynchronous copies arrive when they are waited for, as late as they may

    def copy_async(self, to: Array, source: Array, active: Array | None, size: int, source_size: Array | None) -> None:
        active = np.ones(self.threads, bool) if active is None else self.every(active)
        wanted = self.every(np.array([size], np.uint32) if source_size is None else source_size)
        data = np.zeros((self.threads, size), np.uint8)  # what is beyond source_size is 0
        reads = active & (wanted > 0)
        if reads.any():
            if (wanted[reads] != size).any():
                raise NotImplementedError("cp.async of a part of its size")
            words = self.load_global(source, reads, 4, size // 4) if size > 4 else self.load_global(source, reads, 4, 1)
            data[reads] = np.stack(words, 1)[reads].view(np.uint8).reshape(-1, size)
        self.copies.append((self.every(to).astype(np.int64), data, active, size))

    def commit(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait(self, pending: int) -> None:
        while len(self.groups) > pending:
            for to, data, active, size in self.groups.pop(0):
                self._touch(to[active], self.warp[active], size, writes=True)
                where = to[active][:, None] + np.arange(size)
                self.shared[where] = data[active]

    # Warps

    def butterfly(self, x: Array, by: int) -> Array:
        lanes = np.arange(WARP) ^ by
        return self.every(x).reshape(-1, WARP)[:, lanes].reshape(-1)

    def reduce(self, function: Any, x: Array) -> Array:
        rows = f32(np.ascontiguousarray(self.every(x))).reshape(-1, WARP)
        return np.repeat(bits(function.reduce(rows, axis=1)), WARP)

    def from_lane(self, x: Array, lane: Array) -> Array:
        source = self.every(lane).astype(np.int64) % WARP + self.warp * WARP
        return self.every(x)[source]

    def load_matrices(self, address: Array, number: int, transposed: bool) -> list[Array]:
        """ldmatrix: `number` matrices of 8 × 8 16-bit numbers a warp; lanes 8j to 8j + 7 give the rows of the j-th."""
        rows = self.every(address).astype(np.int64).reshape(-1, WARP)[:, : 8 * number]
        self._touch(rows.reshape(-1), np.repeat(np.arange(len(rows)), 8 * number), 16, writes=False)
        if (rows % 16).any():
            raise OutOfBounds("a row of ldmatrix is not aligned to 16 bytes")
        view = self.shared.view(np.uint16)
        matrices = view[rows[..., None] // 2 + np.arange(8)].reshape(-1, number, 8, 8)  # (warps, number, row, column)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # (warps, number, 8, 4): lane = 4·row + pair
        return [np.ascontiguousarray(pairs[:, j].reshape(-1)) for j in range(number)]

    def store_matrices(self, address: Array, values: list[Array], transposed: bool) -> None:
        """stmatrix, the reverse of ldmatrix."""
        number = len(values)
        rows = self.every(address).astype(np.int64).reshape(-1, WARP)[:, : 8 * number]
        self._touch(rows.reshape(-1), np.repeat(np.arange(len(rows)), 8 * number), 16, writes=True)
        pairs = np.stack([self.every(value).reshape(-1, 8, 4) for value in values], 1)  # (warps, number, 8, 4)
        matrices = np.ascontiguousarray(pairs).view(np.uint16)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        self.shared.view(np.uint16)[rows[..., None] // 2 + np.arange(8)] = matrices.reshape(len(rows), -1, 8)

    def multiply(self, dtype: str, A: list[Array], B: list[Array], C: list[Array]) -> list[Array]:
        """mma.m16n8k16: D = A B + C, A (16, 16), B (16, 8), C and D (16, 8), spread over the lanes of a warp."""
        lane = np.arange(WARP)
        group, thread = lane // 4, lane % 4
        warps = self.threads // WARP

        def numbers(x: Array) -> Array:  # (warps, lane, 2)
            narrow = np.ascontiguousarray(self.every(x)).view(np.uint16).reshape(warps, WARP, 2)
            return (half if dtype == "f16" else bf16)(narrow)

        a, b = np.zeros((warps, 16, 16), np.float64), np.zeros((warps, 16, 8), np.float64)
        for i in range(4):
            row, column = group + 8 * (i % 2), 2 * thread + 8 * (i // 2)
            a[:, row[:, None], column[:, None] + np.arange(2)] = numbers(A[i])
        for i in range(2):
            row = 2 * thread + 8 * i
            b[:, row[:, None] + np.arange(2), group[:, None]] = numbers(B[i])
        d = a @ b
        found = []
        for i in range(4):
            c = f32(np.ascontiguousarray(self.every(C[i]))).reshape(warps, WARP)
            found.append(bits(d[:, group + 8 * (i // 2), 2 * thread + i % 2] + c).reshape(-1))
        return found

    def multiply_shared(
        self, dtype: str, C: list[Array], A: Array, B: Array, keeps: Array, signs: tuple[str, ...]
    ) -> list[Array]:
        """wgmma.m64nNk16: D = A B + C for each four warps, A (64, 16) and B (16, N) described in shared memory."""
        if signs[:2] != ("1", "1") or len(signs) != 4:
            raise NotImplementedError(f"wgmma {signs}")
        a_descriptor, b_descriptor = (self.every(x)[:: 4 * WARP] for x in (A, B))
        columns = 2 * len(C)
        lane, warp = np.arange(4 * WARP) % WARP, np.arange(4 * WARP) // WARP
        found: list[list[Array]] = []
        for group, (a_at, b_at) in enumerate(zip(a_descriptor.tolist(), b_descriptor.tolist(), strict=True)):
            a = self._operand(a_at, 64, signs[2] == "1", dtype, group)
            b = self._operand(b_at, columns, signs[3] == "1", dtype, group)
            d = a @ b.T  # (64, 16) @ (16, N) -> (64, N)
            threads = slice(4 * WARP * group, 4 * WARP * (group + 1))
            keep = self.every(keeps)[threads]
            found.append([])
            for i, c in enumerate(C):
                row, column = 16 * warp + lane // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
                before = f32(np.ascontiguousarray(self.every(c)[threads]))
                found[-1].append(bits(d[row, column] + np.where(keep, before, np.float32(0))))
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _operand(self, descriptor: int, rows: int, transposed: bool, dtype: str, group: int) -> Array:
        """(rows, 16) as float64: what a descriptor of shared memory says.

        Bits 0 to 13, 16 to 29 and 32 to 45 are the beginning and the leading and stride distances, in units of 16
        bytes; the last two how far the 16-byte words of 8 lines are permuted. A line is 128, 64 or 32 bytes along k, or
        along the rows where the operand is transposed.
        """
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        line = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
        if line is None or descriptor >> 49 & 7:
            raise NotImplementedError(f"wgmma descriptor {descriptor:#x}")
        i, k = np.arange(rows)[:, None], np.arange(16)[None, :]
        if transposed:
            size = line // 2
            at = i % size * 2 + i // size * leading + k % 8 * line + k // 8 * stride
        else:
            at = i % 8 * line + i // 8 * stride + k * 2
        at = start + at
        at = at ^ (at >> 7 & (line // 16 - 1)) << 4
        for warp in range(4 * group, 4 * group + 4):
            self._touch(at.reshape(-1), np.full(at.size, warp), 2, writes=False)
        return (half if dtype == "f16" else bf16)(self.shared.view(np.uint16)[at // 2]).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# PTX into Python

# What an approximation approximates; in fp64.
EXACT = {"ex2": "exp2({})", "lg2": "log2({})", "div": "{} / {}", "rcp": "1 / {}", "sqrt": "sqrt({})",
         "rsqrt": "1 / sqrt({})"}  # fmt: skip


class _Translator:
    """One kernel's PTX as the source of a Python function: a block of instructions is a branch of one loop."""

    def __init__(self, ptx: str):
        self.constants: dict[str, Array] = {}
        self.lines: list[str] = []
        self.blocks: list[Counter[str]] = []  # the instructions of each block
        name = re.search(r"\.entry\s+(\w+)", ptx)[1]  # type: ignore[index]
        body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
        body = body[: body.index("$L__func_end") if "$L__func_end" in body else body.rindex("}")]
        body = re.sub(r"//[^\n]*", "", body)
        statements = []
        for line in re.split(r"[;\n]", body):
            line = re.sub(r"\s+", " ", line).strip().strip("\t")
            if line and not line.startswith((".", "}")) and line != "{":
                statements.append(line.removeprefix("{ ").strip())
        targets = {m[1] for s in statements if (m := re.search(r"\bbra(?:\.uni)? (\$\w+)", s))}
        self.labels: dict[str, int] = {}
        number = 0
        starts: list[tuple[int, list[str]]] = [(0, [])]
        for statement in statements:
            if statement.endswith(":"):
                if statement[:-1] in targets:
                    number += 1
                    self.labels[statement[:-1]] = number
                    starts.append((number, []))
                continue
            starts[-1][1].append(statement)
            if re.search(r"\bbra\b", statement):
                number += 1
                starts.append((number, []))
        self.mask: str | None = None  # in the second form of a block, which only some threads run
        for number, block in starts:
            self.blocks.append(Counter())
            self.lines += [f"  if block == {number} and mask is None:", f"   count[{number}] += 1"]
            for statement in block:
                self.blocks[-1][re.sub(r"^@\S+ ", "", statement).partition(" ")[0]] += 1
                self.statement(statement, name)
            self.emit(f"block = {number + 1}")
            self.mask = "mask"
            self.lines += [f"  elif block == {number}:", f"   count[{number}] += 1"]
            for statement in block:
                self.statement(statement, name)
            self.emit(f"block, mask = M.go(mask, {number + 1})")
            self.mask = None
        # What is read before it is written is NaN. It may be: a predicate was false, or half of a pair is of no use.
        registers = sorted(set(re.findall(r"%((?:p|rs|r|rd|f|fd)\d+)\b", body)))
        poison = [f" {register} = {self.constant(self.poison(register))}" for register in registers]
        head = [
            "def program(M, ctaid, nctaid, param, count):",
            *poison,
            " block, mask = 0, None",
            f" while block < {number + 1}:",
        ]
        self.source = "\n".join([*head, *self.lines])

    def emit(self, line: str) -> None:
        self.lines.append("   " + line)

    def value(self, text: str, width: int) -> str:
        """A Python expression for an operand."""
        text = text.strip()
        if text.startswith("%"):
            special = {"%tid.x": "M.tid", "%ctaid.x": "ctaid[0]", "%ctaid.y": "ctaid[1]", "%ctaid.z": "ctaid[2]",
                       "%nctaid.x": "nctaid[0]", "%nctaid.y": "nctaid[1]", "%nctaid.z": "nctaid[2]"}  # fmt: skip
            return special.get(text) or text[1:]
        if text == "global_smem":
            number = 0
        elif text.lower().startswith("0f"):
            number = int(text[2:], 16)
        elif re.fullmatch(r"-?\d+\.\d*", text):
            number = int(np.float32(text).view(np.uint32))
        else:
            number = int(text, 0)
        if width == 1:
            return self.constant(np.array([bool(number)]))
        return self.constant(np.array([number % 2**width], UNSIGNED[width]))

    def constant(self, value: Array) -> str:
        name = f"c_{value.dtype.name}_{int(value[0])}"
        self.constants[name] = value
        return name

    def address(self, text: str) -> str:
        """[ %rd1 + 16 ] as an expression."""
        inner = text.strip().strip("[]").strip()
        m = re.fullmatch(r"(%?\w+)\s*(?:\+\s*(-?\d+))?", inner)
        assert m, text
        base = self.value(m[1], 32)
        return (
            base
            if m[2] is None or int(m[2]) == 0
            else f"({base} + {base}.dtype.type({int(m[2])} % 2**({base}.itemsize * 8)))"
        )

    def statement(self, text: str, kernel: str) -> None:
        predicate = None
        if text.startswith("@"):
            predicate, text = text[1:].split(" ", 1)
            predicate = f"~{predicate[2:]}" if predicate.startswith("!") else predicate[1:]
        opcode, _, rest = text.partition(" ")
        operands = [o.strip() for o in re.split(r",(?![^{]*\})", rest)] if rest.strip() else []
        parts = opcode.split(".")
        base = parts[0]
        if base in ("ret", "exit", "bra"):
            to = self.labels[operands[0]] if base == "bra" else "M.END"
            if predicate is None and self.mask is None:
                self.emit(f"block = {to}; continue")
            else:
                self.emit(f"block, mask = M.branch(mask, {predicate}, {to}, block + 1); continue")
            return
        warps = ("bar", "shfl", "redux", "ldmatrix", "stmatrix", "mma", "wgmma", "cp")
        if base in warps and self.mask is not None:
            self.emit(f"raise NotImplementedError('{opcode} in a branch that only some threads take')")
            return
        if self.mask is not None:
            predicate = self.mask if predicate is None else f"({self.mask} & ({predicate}))"
        if base == "bar":
            self.emit("M.barrier()" if parts[1] == "sync" or parts[1] == "cta" else "pass")
        elif base in ("createpolicy", "fence", "membar", "griddepcontrol"):
            if base == "createpolicy":
                self.emit(f"{operands[0][1:]} = None")
        elif base in ("ld", "st") and parts[1] != "param":
            self.memory(parts, operands, predicate)
        elif base == "cp":
            self.copy(parts, operands, predicate)
        elif base in ("ldmatrix", "stmatrix"):
            number, transposed = int(next(p for p in parts if re.fullmatch(r"x\d", p))[1:]), "trans" in parts
            if base == "ldmatrix":
                self.assign_all(operands[0], f"M.load_matrices({self.address(operands[1])}, {number}, {transposed})")
            else:
                values = ", ".join(self.registers(operands[1], 32))
                self.emit(f"M.store_matrices({self.address(operands[0])}, [{values}], {transposed})")
        elif base == "mma":
            if "m16n8k16" not in parts:
                raise NotImplementedError(opcode)
            groups = [f"[{', '.join(self.registers(o, 32))}]" for o in operands[1:]]
            self.assign_all(operands[0], f"M.multiply({parts[-2]!r}, {', '.join(groups)})")
        elif opcode.startswith("wgmma.mma_async"):
            C = ", ".join(self.registers(operands[0], 32))
            A, B = (self.value(o, 64) for o in operands[1:3])
            if operands[1].startswith("{"):
                raise NotImplementedError("wgmma of registers")
            more = f"{A}, {B}, {self.value(operands[3], 1)}, {tuple(operands[4:])}"
            self.assign_all(operands[0], f"M.multiply_shared({parts[-1]!r}, [{C}], {more})")
        elif base == "wgmma":
            pass  # fences: products are made at once
        elif base == "mov" and operands[0].startswith("{"):
            names = [name.strip() for name in operands[0].strip("{} ").split(",")]
            self.emit(f"unpacked = unpack({self.value(operands[1], 32)})")
            for i, target in enumerate(names):
                if target != "_":
                    self.assign(target[1:], f"unpacked[{i}]", predicate)
        else:
            self.assign(operands[0][1:], self.expression(parts, operands, kernel), predicate)

    def assign(self, target: str, expression: str, predicate: str | None) -> None:
        if predicate is not None:
            expression = f"where({predicate}, {expression}, {target})"
        self.emit(f"{target} = {expression}")

    def poison(self, register: str) -> Array:
        width = self.width(register)
        return np.array([True]) if width == 8 else np.array([2**width - 1], UNSIGNED[width])

    def registers(self, text: str, width: int) -> list[str]:
        return [self.value(name, width) for name in text.strip("{} ").split(",")]

    def assign_all(self, text: str, expression: str) -> None:
        self.emit(f"{', '.join(self.registers(text, 32))}, = {expression}")

    def memory(self, parts: list[str], operands: list[str], predicate: str | None) -> None:
        kind, space = parts[0], parts[1]
        if space not in ("global", "shared"):
            raise NotImplementedError(".".join(parts))
        number = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
        size = int(re.sub(r"\D", "", parts[-1])) // 8
        active = "None" if predicate is None else predicate
        if kind == "st":
            values = ", ".join(self.registers(operands[1], size * 8))
            self.emit(f"M.store_{space}({self.address(operands[0])}, {active}, {size}, [{values}])")
            return
        targets = [name.strip()[1:] for name in operands[0].strip("{} ").split(",")]
        self.emit(f"loaded = M.load_{space}({self.address(operands[1])}, {active}, {size}, {number})")
        for i, target in enumerate(targets):
            value = f"widen(loaded[{i}], {self.width(target)}, {parts[-1][0] == 's'})"
            self.assign(target, value, predicate)

    def width(self, register: str) -> int:
        return np.dtype(REGISTERS[re.sub(r"\d+$", "", register)]).itemsize * 8

    def copy(self, parts: list[str], operands: list[str], predicate: str | None) -> None:
        if "commit_group" in parts:
            self.emit("M.commit()")
        elif "wait_group" in parts:
            self.emit(f"M.wait({int(operands[0])})")
        elif "wait_all" in parts:
            self.emit("M.commit(); M.wait(0)")
        elif parts[1] == "async" and parts[2] in ("ca", "cg"):
            source_size = self.value(operands[3], 32) if len(operands) > 3 else "None"
            to, source, active = self.address(operands[0]), self.address(operands[1]), predicate or "None"
            self.emit(f"M.copy_async({to}, {source}, {active}, {int(operands[2], 0)}, {source_size})")
        else:
            raise NotImplementedError(".".join(parts))

    def expression(self, parts: list[str], operands: list[str], kernel: str) -> str:
        base, kind = parts[0], parts[-1]
        ftz = "ftz" in parts
        width = 1 if kind == "pred" else int(re.sub(r"\D", "", kind) or 0)
        if base == "ld":  # a parameter
            index = int(re.search(rf"{kernel}_param_(\d+)", operands[1])[1])  # type: ignore[index]
            read = f"param[{index}].view({UNSIGNED[width].__name__})"
            return f"widen({read}, {self.width(operands[0][1:])}, {kind[0] == 's'})"
        if base == "cvt":
            return self.convert(parts, operands[1:])
        if base == "shfl":
            if operands[-2:] != ["31", "-1"]:
                raise NotImplementedError(f"shfl {operands}")
            x = self.value(operands[1], 32)
            if "bfly" in parts:
                return f"M.butterfly({x}, {int(operands[2], 0)})"
            return f"M.from_lane({x}, {self.value(operands[2], 32)})"
        if base == "redux" and kind == "f32":
            name = "max" if "max" in parts else "min"
            return f"M.reduce({f'{name}imum' if 'NaN' in parts else f'f{name}'}, {self.value(operands[1], 32)})"
        if base == "mov" and operands[1].startswith("{"):
            low, high_ = self.registers(operands[1], width // 2)
            return f"pack({low}, {high_})"
        if base == "selp":
            a, b = (self.value(o, width) for o in operands[1:3])
            return f"where({operands[3][1:]}, {a}, {b})"
        if kind == "f32x2":
            x = [f"pairs({self.value(o, 64)})" for o in operands[1:]]
            return f"bits_of_pairs({self.arithmetic(base, x)})"
        is_float, is_signed = kind[0] == "f" or kind == "bf16", kind[0] == "s"
        if base in ("shl", "shr"):
            a, b = self.value(operands[1], width), self.value(operands[2], 32)
            return f"shift({a}, {b}, {base == 'shl'}, {is_signed and base == 'shr'})"
        v = [self.value(o, width) for o in operands[1:]]
        if base == "bfe":
            return f"bit_field({v[0]}, {v[1]}, {v[2]}, {is_signed})"
        if base == "setp":
            if len(parts) != 3:
                raise NotImplementedError(".".join(parts))
            if is_float:
                read = {"f32": "f32", "f16": "half", "bf16": "bf16"}[kind]
                v = [f"{read}({x})" for x in v]
            elif is_signed:
                v = [f"{x}.view({SIGNED[width].__name__})" for x in v]
            return f"compare({parts[1]!r}, {v[0]}, {v[1]})"
        if is_float:
            if kind != "f32":
                raise NotImplementedError(".".join(parts))
            x = [f"flush(f32({one}))" if ftz else f"f32({one})" for one in v]
            if base in EXACT:
                exact = EXACT[base].format(f"{x[0]}.astype(float64)", *x[1:])
                expression = (
                    f"off_by({exact}, {x[0]}, {'0' if 'rn' in parts else '2**-22'})"  # two units in the last place
                )
            elif base in ("max", "min"):
                expression = f"{f'{base}imum' if 'NaN' in parts else f'f{base}'}({x[0]}, {x[1]})"
            else:
                expression = self.arithmetic(base, x)
            return f"bits(flush({expression}))" if ftz else f"bits({expression})"
        if base in ("add", "sub", "and", "or", "xor"):
            sign = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}[base]
            return f"{v[0]} {sign} {v[1]}"
        if base == "not":
            return f"~{v[0]}"
        if base == "mov":
            return v[0]
        if base == "neg":
            return f"{v[0]}.dtype.type(0) - {v[0]}"
        if base in ("min", "max"):
            a, b = (f"{x}.view({SIGNED[width].__name__})" if is_signed else x for x in v)
            return f"{base}imum({a}, {b}).view({UNSIGNED[width].__name__})"
        if base in ("mul", "mad"):
            if "wide" in parts:
                wide = UNSIGNED[2 * width].__name__
                a, b = (f"widen({x}, {2 * width}, {is_signed})" for x in v[:2])
                more = f" + {self.value(operands[3], 2 * width)}" if base == "mad" else ""
                return f"({a} * {b}{more}).astype({wide}, copy=False)"
            if "hi" in parts and kind == "u32" and base == "mul":
                return f"high({v[0]}, {v[1]})"
            if "lo" in parts:
                return f"{v[0]} * {v[1]}" + (f" + {v[2]}" if base == "mad" else "")
        if base == "div" and kind == "s32":
            return f"divide({v[0]}, {v[1]})"
        raise NotImplementedError(".".join(parts))

    @staticmethod
    def arithmetic(base: str, x: list[str]) -> str:
        if base in ("add", "sub", "mul"):
            return f"{x[0]} {dict(add='+', sub='-', mul='*')[base]} {x[1]}"
        if base == "fma":
            return f"({x[0]}.astype(float64) * {x[1]} + {x[2]}).astype(float32)"
        unary = {"abs": f"abs({x[0]})", "neg": f"-{x[0]}", "mov": x[0]}
        if base not in unary:
            raise NotImplementedError(base)
        return unary[base]

    def convert(self, parts: list[str], operands: list[str]) -> str:
        to, source = parts[-2], parts[-1]
        if to in ("bf16x2", "f16x2"):  # of two numbers, the first in the upper half
            upper, lower = (self.convert([*parts[:-2], to[:-2], source], [operand]) for operand in operands)
            return f"pack({lower}, {upper})"
        width = int(re.sub(r"\D", "", source))
        x = self.value(operands[0], width)
        if source in ("f16", "bf16") and to == "f32":
            return f"bits({'half' if source == 'f16' else 'bf16'}({x}))"
        if to in ("f16", "bf16") and source == "f32" and "rn" in parts:
            return f"to_{'half' if to == 'f16' else 'bf16'}(f32({x}))"
        if to == "f32" and source in ("s32", "u32") and "rn" in parts:
            return f"bits({x}{'.view(int32)' if source == 's32' else ''}.astype(float32))"
        if to[0] in "us" and source[0] in "us":
            return f"widen({x}, {re.sub(r'[^0-9]', '', to)}, {source[0] == 's'})"
        raise NotImplementedError(".".join(parts))


def widen(x: Array, width: int, signed: bool) -> Array:
    """Extended by the sign or by 0, or cut, to `width` bits."""
    source = x.view(SIGNED[x.itemsize * 8]) if signed else x
    return source.astype(SIGNED[width] if signed else UNSIGNED[width]).view(UNSIGNED[width])


@dataclass
class Program:
    """A compiled kernel that a CPU can run."""

    function: Callable[..., None]
    blocks: list[Counter[str]]
    threads: int
    shared_bytes: int

    def run(
        self, grid: tuple[int, ...], params: list[Array], regions: list[tuple[int, Array]], counts: Counts | None
    ) -> None:
        full = [np.array([size], np.uint32) for size in (*grid, 1, 1)[:3]]
        times = [0] * len(self.blocks)
        memory = [Region(start, data) for start, data in regions]
        with np.errstate(all="ignore"):
            places = product(*(range(size) for size in reversed((*grid, 1, 1)[:3])))
            for number, place in enumerate(places):
                machine = Machine(self.threads, self.shared_bytes, memory, counts, number)
                self.function(machine, [np.array([at], np.uint32) for at in reversed(place)], full, params, times)
        if counts is not None:
            for number, block in zip(times, self.blocks, strict=True):
                for opcode, instructions in block.items():
                    counts.instructions[opcode] += number * instructions * (self.threads // WARP)


FUNCTIONS = (
    f32, bits, pairs, bits_of_pairs, flush, off_by, half, bf16, to_half, to_bf16, pack, unpack, shift, bit_field, high,
    divide, compare, widen,
)  # fmt: skip
NUMPY = ("where", "fmax", "fmin", "maximum", "minimum", "abs", "exp2", "log2", "sqrt", "float32", "float64")


def translate(ptx: str, threads: int, shared_bytes: int) -> Program:
    """Raises: NotImplementedError naming an instruction that is not known here."""
    translator = _Translator(ptx)
    names: dict[str, Any] = {name: getattr(np, name) for name in NUMPY}
    names |= {kind.__name__: kind for kind in (*UNSIGNED.values(), *SIGNED.values())}
    names |= {function.__name__: function for function in FUNCTIONS}
    names |= translator.constants
    exec(compile(translator.source, "<ptx>", "exec"), names)
    return Program(names["program"], translator.blocks, threads, shared_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


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
            threads = WARP * launch.options.get("num_warps", 4)
            programs[key] = translate(made.asm["ptx"], threads, made.metadata.shared)
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
    args = parser.parse_args(arguments)
    title = f"{args.target}, V = {args.vocab_size:,}, {args.dtype}: for each logit of the student"
    table = Table(title=title, title_justify="left")
    for column in ("operation", "kernel"):
        table.add_column(column)
    for column in ("instructions", "2ˣ, ÷, 1/√", "bytes read", "written", "fetched / read", "sent / written"):
        table.add_column(column, justify="right")
    for name, (rows, call) in operations(args.vocab_size, getattr(torch, args.dtype)).items():
        with emulated(args.target) as counted:
            call()
        for kernel, counts in counted.items():
            logits = rows * args.vocab_size
            instructions = WARP * counts.instructions.total() / logits
            special = WARP * sum(n for op, n in counts.instructions.items() if SPECIAL.match(op)) / logits
            shares = [
                f"{SECTOR * counts.sectors[kind] / counts.bytes[kind]:.2f}" if counts.bytes[kind] > logits / 2 else ""
                for kind in ("ld", "st")
            ]
            moved = [f"{counts.bytes[kind] / logits:.2f}" for kind in ("ld", "st")]
            table.add_row(name, kernel, f"{instructions:.1f}", f"{special:.1f}", *moved, *shares)
            name = ""
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
