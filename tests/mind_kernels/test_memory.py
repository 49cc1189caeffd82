"""The memory contract, measured: gradients + max_logits_bytes + 10 %, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import torch
from mind_kernels import fused_linear_cross_entropy, fused_linear_kl, TeacherHidden
from mind_kernels.linear_sweep import MOST_ROUNDINGS
from mind_kernels.testing import peak_extra_bytes

torch.set_num_threads(1)
N, H, V, dtype = {N}, {H}, {V}, torch.{dtype}
X, labels = torch.randn(N, H, dtype=dtype).requires_grad_(), torch.randint(0, V, (N,))
W = torch.randn(V, H, dtype=dtype).requires_grad_({trains_head})
teacher = TeacherHidden(X.detach(), W.detach())

def step():
    if {divergence!r} is None:
        loss, _ = fused_linear_cross_entropy(X, W, labels, max_logits_bytes={budget})
    else:
        loss, _ = fused_linear_kl(X, W, teacher, labels, divergence={divergence!r}, max_logits_bytes={budget})
    loss.backward()

# The first call pays for what the libraries allocate once, and for the pages of their code that it is the first to run:
# other shapes run other code, whose pages are several MiB or none by how the file came to be in the page cache.
step()
X.grad = W.grad = None
gradients = X.nbytes + (W.nbytes if W.requires_grad else 0)
chunks = -(-N // ({budget} // (V * dtype.itemsize)))
accumulator = V * H * 4 if dtype != torch.float32 and W.requires_grad and chunks > MOST_ROUNDINGS else 0
print(peak_extra_bytes(step), gradients, accumulator)
"""

MiB = 2**20


@pytest.mark.parametrize(
    ("name", "dtype", "N", "budget", "trains_head", "divergence"),
    [
        ("one-chunk", "float32", 256, 128 * MiB, True, None),
        ("many-chunks", "float32", 512, 24 * MiB, True, None),
        ("one-chunk", "bfloat16", 256, 64 * MiB, True, None),
        ("many-chunks", "bfloat16", 512, 24 * MiB, True, None),
        ("so-many-chunks-that-the-sum-is-fp32", "bfloat16", 512, 3 * MiB, True, None),
        ("frozen-head", "bfloat16", 512, 24 * MiB, False, None),
        # 128 MiB of logits and half as much of the teacher's, in one chunk
        ("teacher-in-parts", "bfloat16", 512, 200 * MiB, True, "jsd"),
        ("teacher-in-chunks", "float32", 1024, 200 * MiB, True, "forward"),
    ],
)
def test_peak_is_gradients_and_budget(
    name: str, dtype: str, N: int, budget: int, trains_head: bool, divergence: str | None
) -> None:
    given = {"N": N, "dtype": dtype, "budget": budget, "trains_head": trains_head, "divergence": divergence}
    code = MEASURE.format(H=256, V=131_072, **given)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, gradients, accumulator = map(int, done.stdout.split())
    allowed = 1.1 * (gradients + budget + accumulator)
    assert peak <= allowed, f"peak {peak / MiB:.0f} MiB, wanted at most {allowed / MiB:.0f} MiB"
    full_logits = N * 131_072 * (4 if dtype == "float32" else 2)
    if budget < full_logits:
        assert peak < gradients + accumulator + full_logits, "the whole logits were alive"
