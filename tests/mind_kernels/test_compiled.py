"""The kernels as compiled for a GPU, run on a CPU (bench/ptx.py): their own tests, in bf16, in a process of their own.

All of them, and other targets: MIND_PTX_TARGET=sm_80 python -m pytest tests/mind_kernels/test_triton.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run(*arguments: str, **variables: str) -> str:
    """What Python prints, in a process in which kernels are not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=TESTS.parent.parent
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("target", "file", "least"),
    [
        ("sm_90", "test_triton.py", 100),
        ("sm_90", "test_triton_columns.py", 15),
        ("sm_80", "test_triton_columns.py", 15),
    ],
)
def test_kernels_as_compiled(target: str, file: str, least: int) -> None:
    output = run("-m", "pytest", "-q", "-k", "bfloat16", str(TESTS / file), MIND_PTX_TARGET=target)
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None and int(passed[1]) >= least, output[-1000:]


WITHOUT_A_BARRIER = """
import re
from unittest import mock

import torch
import bench.ptx as ptx

_, call = ptx.operations(4096, torch.bfloat16)["KL, forward"]
translate, texts = ptx.translate, []


def run_edited(edit):
    with mock.patch.object(ptx, "translate", lambda text, *more: translate(edit(text), *more)), ptx.emulated("sm_90"):
        call()


run_edited(lambda text: texts.append(text) or text)
(text,) = texts
barriers = list(re.finditer(r"bar\\.sync[^;]*;", text))
for barrier in barriers:
    try:
        run_edited(lambda text: text[: barrier.start()] + text[barrier.end() :])
    except ptx.Race:
        continue
    raise SystemExit(f"nobody missed the barrier at {barrier.start()}")
print(len(barriers))
"""


def test_a_barrier_less_is_a_race() -> None:
    """Each of those that Triton put into a kernel."""
    assert int(run("-c", WITHOUT_A_BARRIER)) >= 5


def test_what_kernels_do_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    output = run("-m", "bench.ptx", "--vocab_size", "4096", "--dtype", "float16", "--results", str(file))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    kernels = {row[1]: row[2:] for row in rows}
    assert {"cross_entropy_kernel", "dense_kl_kernel", "tail_kernel", "pairs_kernel", "log_softmax_kernel"} <= set(
        kernels
    )
    # Two bytes a logit, read twice, written once, in whole sectors.
    assert float(kernels["log_softmax_kernel"][2]) == pytest.approx(4, rel=0.02)
    assert float(kernels["log_softmax_kernel"][3]) == pytest.approx(2, rel=0.02)
    assert kernels["log_softmax_kernel"][4:] == ["1.00", "1.00"]
    document = json.loads(file.read_text())
    assert document["target"] == "sm_90" and document["environment"]["versions"]["triton"]
    assert [row["kernel"] for row in document["rows"]] == [row[1] for row in rows]
