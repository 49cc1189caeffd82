"""bench.ptx computes what PTX says, and sees what a GPU would not forgive: in programs of a few instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from bench.ptx import Counts, OutOfBounds, Program, Race, UnknownInstruction, translate

HEAD = ".visible .entry kernel(\n.param .u64 kernel_param_0,\n.param .u64 kernel_param_1\n)\n{"
FLOATS = np.array([0.0, -0.0, 1.0, -1.5, 3.25, 1e-40, 65504.0, 1e30, -np.inf, np.inf, np.nan, 2.0**-14], np.float32)
with np.errstate(over="ignore"):
    HALVES = FLOATS.astype(np.float16)
INTS = np.array([0, 1, 2, 7, 31, 32, 33, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 12345678], np.uint32)


def program(body: str, threads: int = 32, shared_bytes: int = 0) -> Program:
    return translate(f"{HEAD}\n{body}\nret;\n}}", threads, shared_bytes)


def run(
    body: str, data: np.ndarray, *, threads: int = 32, shared_bytes: int = 0, out: int | None = None, grid: int = 1
) -> np.ndarray:
    """What a program with data at parameter 0 leaves at parameter 1, 32 bits a thread by default."""
    data = np.ascontiguousarray(data)
    result = np.zeros(threads if out is None else out, np.uint32)
    regions = [(array.ctypes.data, array.view(np.uint8)) for array in (data, result)]
    pointers = [np.array([start], np.uint64) for start, _ in regions]
    program(body, threads, shared_bytes).run((grid,), pointers, regions, None)
    return result


LOAD = """
ld.param.b64 %rd1, [kernel_param_0];
ld.param.b64 %rd2, [kernel_param_1];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
ld.global.b32 { %r2 }, [ %rd4 + 0 ];
"""
STORE = "\nst.global.b32 [ %rd5 + 0 ], { %r3 };"


def elementwise(instructions: str, data: np.ndarray) -> np.ndarray:
    padded = np.resize(data.view(np.uint32), 32)
    return run(LOAD + instructions + STORE, padded)[: len(data)]


def f32(function: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(function(FLOATS), np.float32).view(np.uint32)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ("add.f32 %r3, %r2, 0f3F800000;", f32(lambda x: x + np.float32(1))),
        ("sub.f32 %r3, %r2, 0f3F800000;", f32(lambda x: x - np.float32(1))),
        ("mul.f32 %r3, %r2, %r2;", f32(lambda x: x * x)),
        ("fma.rn.f32 %r3, %r2, 0f40000000, 0f3F800000;", f32(lambda x: 2.0 * x.astype(np.float64) + 1)),
        ("max.f32 %r3, %r2, 0f00000000;", f32(lambda x: np.fmax(x, np.float32(0)))),
        ("abs.f32 %r3, %r2;", f32(np.abs)),
        ("neg.f32 %r3, %r2;", f32(np.negative)),
        ("mul.ftz.f32 %r3, %r2, 0f3F800000;", f32(lambda x: np.where(x == np.float32(1e-40), 0, x))),
        ("setp.lt.f32 %p1, %r2, 0f3F800000; selp.b32 %r3, 1, 0, %p1;", (FLOATS < 1).astype(np.uint32)),
        ("setp.ne.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 0, %p1;", np.zeros(12, np.uint32)),
        ("setp.neu.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 0, %p1;", np.isnan(FLOATS).astype(np.uint32)),
        ("cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r3, %rs1;", f32(lambda x: x.astype(np.float16))),
        (
            "cvt.rn.f16x2.f32 %r3, %r2, 0f3F800000;",
            HALVES.view(np.uint16).astype(np.uint32) << 16 | 0x3C00,
        ),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};",
         FLOATS.view(np.uint32) << 16 | FLOATS.view(np.uint32) >> 16),
        ("mov.b64 %rd6, {%r2, %r2}; add.f32x2 %rd7, %rd6, %rd6; mov.b64 {%r4, %r3}, %rd7;", f32(lambda x: x + x)),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_floating_point(instructions: str, expected: np.ndarray) -> None:
    given = elementwise(instructions, FLOATS)
    is_nan = np.isnan(expected.view(np.float32)) & np.isnan(given.view(np.float32))
    np.testing.assert_array_equal(np.where(is_nan, 0, given), np.where(is_nan, 0, expected))


def test_bf16_is_rounded_to_the_nearest_even() -> None:
    data = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xFF800000, 0x7FC00001, 0x7F7FFFFF], np.uint32)
    given = elementwise("cvt.rn.bf16.f32 %rs1, %r2; cvt.u32.u16 %r3, %rs1;", data)
    assert [hex(x) for x in given] == ["0x3f80", "0x3f82", "0x3f81", "0xff80", "0x7fff", "0x7f80"]
    given = elementwise("mov.b32 {%rs1, %rs2}, %r2; cvt.f32.bf16 %r3, %rs2;", data)
    np.testing.assert_array_equal(given, data & 0xFFFF0000)


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("ex2.approx", np.exp2),
        ("lg2.approx", np.log2),
        ("rsqrt.approx", lambda x: x**-0.5),
        ("sqrt.approx", np.sqrt),
        ("rcp.approx", np.reciprocal),
    ],
)
def test_approximations_err_as_much_as_they_may(opcode: str, function: Any, error: float = 2**-22) -> None:
    data = np.random.default_rng(0).uniform(1.5, 20, 32).astype(np.float32)
    given = elementwise(f"{opcode}.f32 %r3, %r2;", data).view(np.float32).astype(np.float64)
    relative = np.abs(given / function(data.astype(np.float64)) - 1)
    assert error / 2 < relative.max() <= error + 2**-24 and (given / function(data.astype(np.float64)) < 1).any()


SIGNED = INTS.view(np.int32).astype(np.int64)
WIDE = INTS.astype(np.uint64)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ("add.s32 %r3, %r2, -1;", WIDE - 1),
        ("sub.s32 %r3, 5, %r2;", 5 - SIGNED),
        ("mul.lo.s32 %r3, %r2, 3;", WIDE * 3),
        ("mul.hi.u32 %r3, %r2, -2;", WIDE * (2**32 - 2) >> 32),
        ("mad.lo.s32 %r3, %r2, %r2, 7;", WIDE * WIDE + 7),
        ("neg.s32 %r3, %r2;", -SIGNED),
        ("div.s32 %r3, %r2, -3;", np.trunc(SIGNED / -3).astype(np.int64)),
        ("min.s32 %r3, %r2, 5;", np.minimum(SIGNED, 5)),
        ("max.u32 %r3, %r2, 5;", np.maximum(WIDE, 5)),
        ("shl.b32 %r3, 1, %r2;", np.where(WIDE < 32, 1 << np.minimum(WIDE, 31), 0)),
        ("shr.u32 %r3, -1, %r2;", np.where(WIDE < 32, 0xFFFFFFFF >> np.minimum(WIDE, 31), 0)),
        ("shr.s32 %r3, %r2, 40;", SIGNED >> 31),
        ("and.b32 %r3, %r2, 0xFF;", WIDE & 0xFF),
        ("not.b32 %r3, %r2;", ~WIDE),
        ("xor.b32 %r3, %r2, -1;", ~WIDE),
        ("bfe.u32 %r3, %r2, 4, 8;", WIDE >> 4 & 0xFF),
        ("bfe.s32 %r3, %r2, 0, 1;", -(SIGNED & 1)),
        ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 0, %p1;", SIGNED < 0),
        ("setp.lt.u32 %p1, %r2, 40; not.pred %p2, %p1; selp.b32 %r3, 1, 0, %p2;", WIDE >= 40),
        ("cvt.s64.s32 %rd6, %r2; shr.u64 %rd7, %rd6, 32; cvt.u32.u64 %r3, %rd7;", np.where(SIGNED < 0, 0xFFFFFFFF, 0)),
        ("mul.wide.s32 %rd6, %r2, -1; shr.u64 %rd7, %rd6, 32; cvt.u32.u64 %r3, %rd7;", -SIGNED >> 32),
        ("cvt.rn.f32.s32 %r3, %r2;", SIGNED.astype(np.float32).view(np.uint32)),
        ("mov.u32 %r3, 9; setp.eq.b32 %p1, %r2, 7; @%p1 mov.u32 %r3, %r2;", np.where(INTS == 7, 7, 9)),
        ("mov.u32 %r3, 9; setp.eq.b32 %p1, %r2, 7; @!%p1 add.s32 %r3, %r3, 1;", np.where(INTS == 7, 9, 10)),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_integers(instructions: str, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(elementwise(instructions, INTS), np.asarray(expected).astype(np.uint32))


def test_threads_that_part_meet_again() -> None:
    """Σ_{i < tid} i in a loop of as many rounds as the thread's number; odd threads then add 1,000."""
    body = """
    mov.u32 %r3, 0;
    mov.u32 %r4, 0;
    $LOOP:
    setp.ge.u32 %p1, %r4, %r1;
    @%p1 bra $DONE;
    add.s32 %r3, %r3, %r4;
    add.s32 %r4, %r4, 1;
    bra.uni $LOOP;
    $DONE:
    and.b32 %r5, %r1, 1;
    setp.eq.b32 %p2, %r5, 0;
    @%p2 bra $EVEN;
    add.s32 %r3, %r3, 1000;
    $EVEN:
    bar.sync 0;
    """
    tid = np.arange(64)
    given = run(LOAD + body + STORE, np.zeros(64, np.uint32), threads=64)
    np.testing.assert_array_equal(given, tid * (tid - 1) // 2 + 1000 * (tid % 2))


def test_a_barrier_that_only_some_threads_reach() -> None:
    body = "setp.eq.b32 %p1, %r1, 0; @%p1 bra $END; bar.sync 0; $END:"
    with pytest.raises(UnknownInstruction, match=r"bar\.sync: given in a branch that only some threads take"):
        run(LOAD + body.replace("; ", ";\n"), np.zeros(32, np.uint32))


def test_programs_of_a_grid() -> None:
    body = """
    ld.param.b64 %rd1, [kernel_param_1];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %nctaid.x;
    mad.lo.s32 %r3, %r1, 100, %r2;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    st.global.b32 [ %rd2 + 0 ], { %r3 };
    """
    assert run(body, np.zeros(1, np.uint32), out=3, grid=3).tolist() == [3, 103, 203]


@pytest.mark.parametrize(
    ("offset", "vector", "message"),
    [(8, "", "outside the tensor"), (-4, "", "in no tensor"), (0, ".v2", "outside the tensor"), (2, "", "not aligned")],
    ids=["behind", "before", "pairs", "unaligned"],
)
def test_addresses(offset: int, vector: str, message: str) -> None:
    data = np.arange(41, dtype=np.uint32)
    load = f"ld.global{vector}.b32 {{ {'%r2, %r4' if vector else '%r2'} }}, [ %rd4 + {offset} ];"
    body = LOAD.replace("ld.global.b32 { %r2 }, [ %rd4 + 0 ];", load.replace("%rd4", "%rd6"))
    body = body.replace("ld.global", f"mad.wide.u32 %rd6, %r1, {8 if vector else 4}, %rd1;\nld.global")
    regions = [(data[8:].ctypes.data, data[8:].view(np.uint8)), (data[:4].ctypes.data, data[:4].view(np.uint8))]
    with pytest.raises(OutOfBounds, match=message):
        program(body).run((1,), [np.array([start], np.uint64) for start, _ in regions], regions, None)


@pytest.mark.parametrize("barrier", [True, False], ids=["barrier", "no barrier"])
@pytest.mark.parametrize("order", ["write, read", "read, write"])
def test_races(order: str, barrier: bool) -> None:
    """Thread t writes word t and reads word 63 − t, which the other warp writes."""
    write, read = "st.shared.b32 [ %r5 + 0 ], %r2;", "ld.shared.b32 %r3, [ %r6 + 0 ];"
    first, second = (write, read) if order == "write, read" else (read, write)
    body = f"""
    shl.b32 %r5, %r1, 2;
    sub.s32 %r6, 252, %r5;
    {first}
    {"bar.sync 0;" if barrier else ""}
    {second}
    """
    data = np.arange(64, dtype=np.uint32)
    if not barrier:
        with pytest.raises(Race, match="unprotected"):
            run(LOAD + body + STORE, data, threads=64, shared_bytes=256)
    else:
        given = run(LOAD + body + STORE, data, threads=64, shared_bytes=256)
        unwritten = np.full(64, 2**32 - 1)  # NaN
        np.testing.assert_array_equal(given, data[::-1] if order == "write, read" else unwritten)


def test_shared_memory_ends() -> None:
    with pytest.raises(OutOfBounds, match="shared memory up to byte 131 of 128"):
        run(
            LOAD + "mad.lo.s32 %r5, %r1, 4, 4; st.shared.b32 [ %r5 + 0 ], %r2;",
            np.zeros(32, np.uint32),
            shared_bytes=128,
        )


def test_copies_arrive_when_they_are_waited_for() -> None:
    body = """
    shl.b32 %r5, %r1, 2;
    setp.lt.u32 %p1, %r1, 16;
    selp.b32 %r6, 4, 0, %p1;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x4, %r6;
    cp.async.commit_group;
    ld.shared.b32 %r3, [ %r5 + 0 ];
    cp.async.wait_group 0;
    ld.shared.b32 %r4, [ %r5 + 0 ];
    add.s32 %r3, %r3, %r4;
    """
    data = np.arange(32, dtype=np.uint32)
    given = run(LOAD + body + STORE, data, shared_bytes=128)
    np.testing.assert_array_equal(given, (np.where(data < 16, data, 0) - 1).astype(np.uint32))


MULTIPLY = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r17, %r18, %r19, %r20 }, "
    "{ %r10, %r11, %r12, %r13 }, { %r14, %r15 }, { %r16, %r16, %r16, %r16 }"
)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_tensor_cores(transposed: bool) -> None:
    """D = A B + C: A (16, 16) and B (16, 8) from shared memory by ldmatrix, whose layout is that of mma's operands."""
    rng = np.random.default_rng(0)
    A, B = (rng.integers(-8, 8, (16, size)).astype(np.float32) for size in (16, 8))
    stored_A, stored_B = (A.T if transposed else A), (B if transposed else B.T)  # B as columns, unless transposed
    data = np.concatenate([x.astype(np.float16).ravel() for x in (stored_A, stored_B)]).view(np.uint32)
    trans = ".trans" if transposed else ""
    # Matrices of ldmatrix: A's quarters in the order (0, 0), (1, 0), (0, 1), (1, 1); B's halves.
    body = f"""
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd4, %r1, 24, %rd1;
    mul.lo.s32 %r2, %r1, 24;
    ld.global.v2.b32 {{ %r3, %r4 }}, [ %rd4 + 0 ];
    st.shared.v2.b32 [ %r2 + 0 ], {{ %r3, %r4 }};
    ld.global.v2.b32 {{ %r3, %r4 }}, [ %rd4 + 8 ];
    st.shared.v2.b32 [ %r2 + 8 ], {{ %r3, %r4 }};
    ld.global.v2.b32 {{ %r3, %r4 }}, [ %rd4 + 16 ];
    st.shared.v2.b32 [ %r2 + 16 ], {{ %r3, %r4 }};
    bar.sync 0;
    and.b32 %r5, %r1, 7;
    bfe.u32 %r6, %r1, 3, 1;
    bfe.u32 %r7, %r1, 4, 1;
    {"mov.u32 %r8, %r6; mov.u32 %r6, %r7; mov.u32 %r7, %r8;" if transposed else ""}
    mad.lo.s32 %r8, %r6, 8, %r5;
    shl.b32 %r9, %r7, 4;
    mad.lo.s32 %r9, %r8, 32, %r9;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r9];
    bfe.u32 %r6, %r1, 3, 1;
    {
        "mad.lo.s32 %r9, %r6, 128, 512; mad.lo.s32 %r9, %r5, 16, %r9;"
        if transposed
        else "mad.lo.s32 %r9, %r6, 16, 512; mad.lo.s32 %r9, %r5, 32, %r9;"
    }
    ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r14, %r15}}, [%r9];
    mov.u32 %r16, 0f3F800000;
    {MULTIPLY};
    shr.u32 %r21, %r1, 2;
    and.b32 %r22, %r1, 3;
    shl.b32 %r23, %r21, 5;
    mad.lo.s32 %r23, %r22, 8, %r23;
    cvt.u64.u32 %rd5, %r23;
    add.s64 %rd6, %rd2, %rd5;
    st.global.v2.b32 [ %rd6 + 0 ], {{ %r17, %r18 }};
    st.global.v2.b32 [ %rd6 + 256 ], {{ %r19, %r20 }};
    """
    given = run(body.replace("; mov", ";\nmov").replace("; mad", ";\nmad"), data, shared_bytes=768, out=128)
    np.testing.assert_array_equal(given.view(np.float32).reshape(16, 8), A @ B + 1)


def test_what_is_counted() -> None:
    """32 threads load 4 bytes each, 8 bytes apart: 8 sectors of 32 bytes, of which half was wanted."""
    data, result = np.zeros(64 + 8, np.uint32), np.zeros(32, np.uint32)
    data = data[-(data.ctypes.data % 32) // 4 % 8 :][:64]
    regions = [(array.ctypes.data, array.view(np.uint8)) for array in (data, result)]
    body = (
        LOAD.replace("add.s64 %rd4, %rd1, %rd3;", "mad.wide.u32 %rd4, %r1, 8, %rd1;") + "add.s32 %r3, %r2, 1;" + STORE
    )
    counts = Counts()
    for _ in range(2):
        program(body).run((1,), [np.array([start], np.uint64) for start, _ in regions], regions, counts)
    assert counts.sectors["ld"] == 2 * 8 and counts.bytes["ld"] == 2 * 128 and counts.bytes["st"] == 2 * 128
    assert counts.instructions["ld.global.b32"] == 2 and counts.instructions["add.s32"] == 2


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("vote.sync.any.pred %p1, %p2, -1;", r"vote\.sync\.any\.pred: given \.any, not translated"),
        ("sin.approx.f32 %r1, %r2;", "sin: of fp32"),
        ("atom.global.add.u32 %r1, [%rd1], 1;", r"given \.global"),
        ("add.s32 %r1, %r2, elsewhere;", "given the operand 'elsewhere', wanted a register"),
        ("bar.sync 1, 128;", "bar.sync 1, 128: wanted bar.sync 0"),
        ("bar.red.popc.u32 %r1, 0, %p1;", "wanted bar.sync 0"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 15, -1;", "given 15, -1, wanted 31 and -1"),
        (MULTIPLY.replace("m16n8k16", "m16n8k8") + ";", "wanted m16n8k16"),
        (MULTIPLY.replace("f32.f16.f16.f32", "f16.f16.f16.f16") + ";", "into f32"),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 0;", "wanted k16"),
        ("ld.acquire.gpu.global.b32 %r1, [%rd1];", r"ld\.acquire\.gpu\.global\.b32: not translated"),
        ("cp.async.bulk.commit_group;", r"cp\.async\.bulk\.commit_group: not translated"),
        ("shfl.sync.down.b32 %r1, %r2, 1, 31, -1;", r"given \.down"),
        ("add.rz.f32 %r1, %r2, %r3;", r"given \.rz"),
        ("cvt.rn.relu.bf16.f32 %rs1, %r2;", r"given \.relu"),
        ("setp.lt.and.f32 %p1, %r1, %r2, %p2;", r"given \.and"),
        ("redux.sync.min.abs.f32 %r1, %r2, -1;", r"given \.abs"),
    ],
    ids=lambda value: value.split(" ")[0] if value.endswith(";") else "",
)
def test_what_is_not_known_is_refused(instruction: str, message: str) -> None:
    with pytest.raises(UnknownInstruction, match=message):
        program(instruction)


def test_kernels_of_the_interpreter_are_refused() -> None:
    code = "from bench.ptx import emulated\nwith emulated(): pass"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "TRITON_INTERPRET: given 1" in done.stderr


GLOBAL = """
ld.param.b64 %rd1, [kernel_param_1];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mad.lo.s32 %r3, %r2, STEP, %r1;
mad.wide.u32 %rd2, %r3, 4, %rd1;
"""
NEIGHBOUR = "xor.b32 %r4, %r3, MASK;\nmad.wide.u32 %rd3, %r4, 4, %rd1;\n"
READ, WRITE = "ld.global.b32 { %r5 }, [ %rd3 + 0 ];\n", "st.global.b32 [ %rd2 + 0 ], { %r1 };\n"


@pytest.mark.parametrize(
    ("step", "mask", "body", "message"),
    [
        (64, 0, READ + WRITE, None),  # each thread its own
        (64, 1, READ + WRITE, None),  # a neighbour's of the same warp, whose instructions go together
        (64, 32, READ + "bar.sync 0;\n" + WRITE, None),
        (64, 32, READ + WRITE, "written by program 0 and read by another warp without a barrier"),
        (64, 32, WRITE + READ, "read by program 0 and written by another warp without a barrier"),
        (64, 64, WRITE + "bar.sync 0;\n" + READ, "written by program 1 and read by another program"),
        (64, 64, READ + "bar.sync 0;\n" + WRITE, "read by program 1 and written by another program"),
        (32, 0, WRITE, "written by program 1 and written by another program"),
        (64, 0, WRITE.replace("%rd2", "%rd1").replace(" + 0", ""), "written by two warps at once"),
    ],
)
def test_races_of_global_memory(step: int, mask: int, body: str, message: str | None) -> None:
    whole = (GLOBAL + NEIGHBOUR + body).replace("STEP", str(step)).replace("MASK", str(mask))
    if message is None:
        run(whole, np.zeros(1, np.uint32), threads=64, out=128, grid=2)
    else:
        with pytest.raises(Race, match=message):
            run(whole, np.zeros(1, np.uint32), threads=64, out=128, grid=2)


@pytest.mark.parametrize("threads", [32, 64])
def test_what_all_warps_read_is_not_to_be_written(threads: int) -> None:
    """But where one warp alone stores, the others' reading is of no use, whatever they find."""
    body = """
    ld.param.b64 %rd1, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    ld.global.b32 { %r2 }, [ %rd1 + 0 ];
    setp.lt.u32 %p1, %r1, LIMIT;
    add.s32 %r3, %r2, 5;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    @%p1 st.global.b32 [ %rd2 + 0 ], { %r3 };
    """
    one_warp = run(body.replace("LIMIT", "32"), np.zeros(1, np.uint32), threads=threads)
    assert one_warp.tolist() == [5] * 32 + [0] * (threads - 32)
    if threads == 64:
        with pytest.raises(Race, match="written by program 0 and read by another warp"):
            run(body.replace("LIMIT", "64"), np.zeros(1, np.uint32), threads=threads)


def test_a_parameter_by_its_address() -> None:
    body = """
    mov.b64 %rd1, kernel_param_1;
    mov.b64 %rd2, kernel_param_0;
    mov.u32 %r1, %tid.x;
    setp.ge.u32 %p1, %r1, LIMIT;
    selp.b64 %rd3, %rd1, %rd2, %p1;
    ld.param.b64 %rd4, [%rd3];
    st.shared::cta.b32 [ %r1 + 0 ], 9;
    ld.shared::cta.b32 %r2, [ %r1 + 0 ];
    st.global.b32 [ %rd4 + 4 ], { %r2 };
    """.replace("[ %r1 + 0 ]", "[global_smem]").replace("st.global", "setp.eq.u32 %p2, %r1, 0;\n@%p2 st.global")
    assert run(body.replace("LIMIT", "0"), np.zeros(2, np.uint32), shared_bytes=16).tolist() == [0, 9] + [0] * 30
    with pytest.raises(UnknownInstruction, match="addresses that differ between threads"):
        run(body.replace("LIMIT", "5"), np.zeros(2, np.uint32), shared_bytes=16)
