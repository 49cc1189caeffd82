"""The kernels compile for NVIDIA and AMD without a GPU, and what is shipped does not spill registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RAGGED = """
import re

import torch
from bench.aot import TARGETS, compile_for, shipped

for launch in shipped(50_257, torch.bfloat16, quick=True):
    if launch.kernel.fn.__name__ in ("cross_entropy_kernel", "dense_kl_kernel"):
        ptx = compile_for(launch, TARGETS["sm_90"]).asm["ptx"]
        assert "ld.global.v4.b32" in ptx, launch.label
        for access in ("ld", "st"):  # the second pass gives up what it has read and written
            given_up = re.search(access + r"\\.global\\.\\S*evict_first\\S*\\.v4\\.b32", ptx)
            assert bool(given_up) == (launch.label != "loss only"), (launch.label, access)
        print(launch.label)
"""


def run(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here kernels may be the interpreter's, which cannot be compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_shipped_kernels_compile_without_spills(target: str, tmp_path: Path) -> None:
    done = run(["-m", "bench.aot", "--quick", "--targets", target], tmp_path)
    assert done.stdout.splitlines()[-1] == "42 compiled, 0 with spills, 0 with too much shared memory"
    for kernel in ("cross_entropy_kernel", "dense_kl_kernel", "tail_gradient_kernel", "pairs_kernel", "log_softmax",
                   "column_sums_kernel", "compact_kernel", "head_mean_kernel", "grad_hidden_kernel",
                   "grad_weight_kernel", "multiply_kernel"):  # fmt: skip
        assert kernel in done.stdout


def test_logits_of_a_ragged_vocabulary_are_loaded_and_stored_16_bytes_at_a_time(tmp_path: Path) -> None:
    assert len(run(["-c", RAGGED], tmp_path).stdout.splitlines()) == 7
