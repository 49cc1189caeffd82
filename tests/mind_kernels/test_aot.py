"""The kernels compile for NVIDIA and AMD without a GPU, and what is shipped does not spill registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_shipped_kernels_compile_without_spills(target: str, tmp_path: Path) -> None:
    # A process of its own: here kernels may be the interpreter's, which cannot be compiled.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "bench.aot", "--quick", "--targets", target]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "20 compiled, 0 with spills, 0 with too much shared memory"
    for kernel in ("cross_entropy_kernel", "dense_kl_kernel", "tail_gradient_kernel", "pairs_kernel", "log_softmax",
                   "column_sums_kernel", "compact_kernel", "head_mean_kernel", "grad_hidden_kernel",
                   "grad_weight_kernel"):  # fmt: skip
        assert kernel in done.stdout
