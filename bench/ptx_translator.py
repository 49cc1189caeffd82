"""PTX into Python: one function for a kernel, whose variables are its registers (ptx_machine.py)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from bench.ptx_machine import (
    SIGNED,
    UNSIGNED,
    WARP,
    Array,
    Counts,
    Machine,
    Region,
    UnknownInstruction,
    bf16,
    bit_field,
    bits,
    bits_of_pairs,
    compare,
    divide,
    f32,
    flush,
    half,
    high,
    off_by,
    pack,
    pairs,
    shift,
    to_bf16,
    to_half,
    unpack,
)  # fmt: skip

REGISTERS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64, "f": np.uint32, "fd": np.uint64}
# Types, comparisons, and what else may stand in the name of an instruction that computes.
MODIFIER = (
    r"[busf](8|16|32|64)|b?f16(x2)?|f32x2|pred|eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|"
    r"rn|ftz|approx|full|lo|hi|wide|NaN|param|sync|bfly|idx|max|min|uni"
)
PARAMETER = r"\w+_param_(\d+)"

# What an approximation approximates; in fp64.
EXACT = {"ex2": "exp2({})", "lg2": "log2({})", "div": "{} / {}", "rcp": "1 / {}", "sqrt": "sqrt({})",
         "rsqrt": "1 / sqrt({})"}  # fmt: skip


class _Translator:
    """One kernel's PTX as the source of a Python function: a block of instructions is a branch of one loop."""

    def __init__(self, ptx: str):
        self.constants: dict[str, Array] = {}
        self.lines: list[str] = []
        self.blocks: list[Counter[str]] = []  # the instructions of each block
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
                self.statement(statement)
            self.emit(f"block = {number + 1}")
            self.mask = "mask"
            self.lines += [f"  elif block == {number}:", f"   count[{number}] += 1"]
            for statement in block:
                self.statement(statement)
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
        elif parameter := re.fullmatch(PARAMETER, text):
            number = int(parameter[1])  # its address, here
        elif text.lower().startswith("0f"):
            number = int(text[2:], 16)
        elif re.fullmatch(r"-?\d+\.\d*", text):
            number = int(np.float32(text).view(np.uint32))
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
            number = int(text, 0)
        else:
            raise UnknownInstruction(f"given the operand {text!r}, wanted a register, a number or global_smem")
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
        offset = int(m[2] or 0)
        return f"({base} + {base}.dtype.type({offset} % 2**({base}.itemsize * 8)))" if offset else base

    def statement(self, text: str) -> None:
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
            self.emit(
                f"raise UnknownInstruction('{opcode}: given in a branch that only some threads take, wanted all')"
            )
            return
        if self.mask is not None:
            predicate = self.mask if predicate is None else f"({self.mask} & ({predicate}))"
        if base == "bar":
            if opcode != "bar.warp.sync":  # the threads of a warp step together
                if opcode != "bar.sync" or operands != ["0"]:
                    raise UnknownInstruction(f"{text}: wanted bar.sync 0, of all threads")
                self.emit("M.barrier()")
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
            if "m16n8k16" not in parts or parts[-4:] not in (["f32", kind, kind, "f32"] for kind in ("f16", "bf16")):
                raise UnknownInstruction(f"{opcode}: wanted m16n8k16 of f16 or bf16 into f32")
            groups = [f"[{', '.join(self.registers(o, 32))}]" for o in operands[1:]]
            self.assign_all(operands[0], f"M.multiply({parts[-2]!r}, {', '.join(groups)})")
        elif opcode.startswith("wgmma.mma_async"):
            is_known = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(b?f16)\.\1", opcode)
            if not is_known or operands[1].startswith("{"):
                raise UnknownInstruction(f"{opcode}: wanted k16 of f16 or bf16 in shared memory into f32")
            C = ", ".join(self.registers(operands[0], 32))
            A, B = (self.value(o, 64) for o in operands[1:3])
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
            self.assign(operands[0][1:], self.expression(parts, operands), predicate)

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
        kind, space = parts[0], parts[1].removesuffix("::cta")
        if space not in ("global", "shared"):
            raise UnknownInstruction(f"{'.'.join(parts)}: not translated")
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
        opcode = ".".join(parts)
        if opcode == "cp.async.commit_group":
            self.emit("M.commit()")
        elif opcode == "cp.async.wait_group":
            self.emit(f"M.wait({int(operands[0])})")
        elif opcode == "cp.async.wait_all":
            self.emit("M.commit(); M.wait(0)")
        elif re.match(r"cp\.async\.c[ag]\.shared(::cta)?\.global", opcode):
            source_size = self.value(operands[3], 32) if len(operands) > 3 else "None"
            to, source, active = self.address(operands[0]), self.address(operands[1]), predicate or "None"
            self.emit(f"M.copy_async({to}, {source}, {active}, {int(operands[2], 0)}, {source_size})")
        else:
            raise UnknownInstruction(f"{opcode}: not translated")

    def expression(self, parts: list[str], operands: list[str]) -> str:
        base, kind = parts[0], parts[-1]
        unknown = [part for part in parts[1:] if not re.fullmatch(MODIFIER, part)]
        if unknown:
            raise UnknownInstruction(f"{'.'.join(parts)}: given .{unknown[0]}, not translated")
        ftz = "ftz" in parts
        width = 1 if kind == "pred" else int(re.sub(r"\D", "", kind) or 0)
        if base == "ld":  # a parameter; by an address where two were to choose from
            named = re.fullmatch(PARAMETER, operands[1].strip("[]"))
            which = f"param[{named[1]}]" if named else f"chosen(param, {self.address(operands[1])})"
            read = f"{which}.view({UNSIGNED[width].__name__})"
            return f"widen({read}, {self.width(operands[0][1:])}, {kind[0] == 's'})"
        if base == "cvt":
            return self.convert(parts, operands[1:])
        if base == "shfl":
            if operands[-2:] != ["31", "-1"]:
                raise UnknownInstruction(f"shfl: given {', '.join(operands[-2:])}, wanted 31 and -1, of the whole warp")
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
                raise UnknownInstruction(f"{'.'.join(parts)}: not translated")
            if is_float:
                read = {"f32": "f32", "f16": "half", "bf16": "bf16"}[kind]
                v = [f"{read}({x})" for x in v]
            elif is_signed:
                v = [f"{x}.view({SIGNED[width].__name__})" for x in v]
            return f"compare({parts[1]!r}, {v[0]}, {v[1]})"
        if is_float:
            if kind != "f32":
                raise UnknownInstruction(f"{'.'.join(parts)}: not translated")
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
        raise UnknownInstruction(f"{'.'.join(parts)}: not translated")

    @staticmethod
    def arithmetic(base: str, x: list[str]) -> str:
        if base in ("add", "sub", "mul"):
            return f"{x[0]} {dict(add='+', sub='-', mul='*')[base]} {x[1]}"
        if base == "fma":
            return f"({x[0]}.astype(float64) * {x[1]} + {x[2]}).astype(float32)"
        unary = {"abs": f"abs({x[0]})", "neg": f"-{x[0]}", "mov": x[0]}
        if base not in unary:
            raise UnknownInstruction(f"{base}: of fp32, not translated")
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
        raise UnknownInstruction(f"{'.'.join(parts)}: not translated")


def chosen(parameters: list[Array], address: Array) -> Array:
    if (address != address[0]).any():
        raise UnknownInstruction("ld.param: given addresses that differ between threads, wanted one for all")
    return parameters[int(address[0])]


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
    divide, compare, chosen, widen,
)  # fmt: skip
NUMPY = ("where", "fmax", "fmin", "maximum", "minimum", "abs", "exp2", "log2", "sqrt", "float32", "float64")


def translate(ptx: str, threads: int, shared_bytes: int) -> Program:
    """Raises: UnknownInstruction naming it; so does running what turns out to be one."""
    translator = _Translator(ptx)
    names: dict[str, Any] = {name: getattr(np, name) for name in NUMPY}
    names |= {kind.__name__: kind for kind in (*UNSIGNED.values(), *SIGNED.values())}
    names |= {function.__name__: function for function in FUNCTIONS}
    names |= translator.constants | {"UnknownInstruction": UnknownInstruction}
    exec(compile(translator.source, "<ptx>", "exec"), names)
    return Program(names["program"], translator.blocks, threads, shared_bytes)
