"""The memory and the threads of one program of a GPU, for PTX that was translated (ptx_translator.py).

A register is an array of bits: (1,) where all threads hold the same, (threads,) otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]  # (1,) where all threads hold the same, (threads,) otherwise
WARP = 32
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
SECTOR = 32  # bytes, the least that is fetched


class OutOfBounds(Exception):
    """A program's address is in none of the tensors that its kernel was given, or not aligned."""


class UnknownInstruction(Exception):
    """An instruction, or a form of one, whose meaning is not written here: it is refused, never guessed."""


class Race(Exception):
    """Two warps use the same bytes, one of them writing, without a barrier between; or two programs."""


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

    # By opcode, one a warp; where threads part, each of the parts counts for all warps.
    instructions: Counter[str] = field(default_factory=Counter)
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
        uniform = len(address) == 1 and active is None  # counted once, not for each warp
        at, warp = (address, np.zeros(1, np.int64)) if uniform else (self.every(address), self.warp)
        if active is not None:
            at, warp = at[active], warp[active]
        at = at.astype(np.int64)
        self.counts.sectors[kind] += np.unique([warp, at // SECTOR], axis=1).shape[1]
        self.counts.bytes[kind] += np.unique([warp, at], axis=1).shape[1] * size

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
                raise UnknownInstruction(
                    f"cp.async: given a source of other than {size} or 0 bytes, wanted one of these"
                )
            words = self.load_global(source, reads, 4, size // 4)
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
            raise UnknownInstruction(f"wgmma: given the scales and transpositions {signs}, wanted scales of 1")
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
            raise UnknownInstruction(
                f"wgmma: given the descriptor {descriptor:#x}, wanted permuted lines of 32, 64 or 128 bytes"
            )
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
