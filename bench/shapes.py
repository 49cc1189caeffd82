"""What is measured: heads of real models, and cases named by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """A head of a real model and the number of supervised rows that reach it."""

    name: str
    num_rows: int  # N
    hidden_size: int  # H
    vocab_size: int  # V
    cross_entropy_target: float | None = None  # at most so many times the three bare products, on an H200
    kl_target: float | None = None  # cross-entropy + KL from hidden states: times the four bare products


# An optimiser step's supervised rows on one GPU.
GPU_CASES = [
    Case("qwen2.5-1.5b", 16_384, 1536, 151_936, 1.10, 1.15),
    Case("qwen2.5-7b", 16_384, 3584, 152_064, 1.08, 1.12),
    Case("llama-3.1-8b", 16_384, 4096, 128_256, 1.08, 1.12),
    Case("gemma3-270m", 16_384, 640, 262_144, 1.25, 1.30),
]


@dataclass(frozen=True)
class Head:
    """The output projection of a model."""

    hidden_size: int  # H
    vocab_size: int  # V
    logit_softcap: float | None = None


HEADS = {
    "smollm2-135m": Head(576, 49_152),
    "gemma3-270m": Head(640, 262_144),
    "qwen2.5-1.5b": Head(1536, 151_936),
    "gemma2-2b": Head(2304, 256_000, logit_softcap=30.0),
    "qwen2.5-7b": Head(3584, 152_064),
    "llama-3.1-8b": Head(4096, 128_256),
    "tiny": Head(16, 96),  # of no model: for dry runs and tests
}


@dataclass(frozen=True)
class LossCase:
    """A loss on the head of a model.

    batch: "rows", every row supervised; or "mind", K = 8 rationales a question of the lengths in `RATIONALE_LENGTHS`,
        prompt and padding unsupervised, 3 of 8 deselected.
    hidden: "random", independent normal hidden states and weights (logits of standard deviation 1); or "real", what a
        trained SmolLM2-135M computes from generated problems.
    rows_cpu, rows_cuda: N, rows of hidden states prompt and padding included; the first is what is measured unless
        asked otherwise.
    """

    head: str
    loss: Literal["cross-entropy", "kl", "jsd"] = "cross-entropy"
    batch: Literal["rows", "mind"] = "rows"
    hidden: Literal["random", "real"] = "random"
    rows_cpu: tuple[int, ...] = ()
    rows_cuda: tuple[int, ...] = ()
    too_slow_on_cpu: tuple[str, ...] = ()  # providers that take 10 s to minutes a step there

    @property
    def name(self) -> str:
        parts = [self.head]
        parts += [self.loss] if self.loss != "cross-entropy" else []
        parts += ["mind"] if self.batch == "mind" else []
        parts += ["real"] if self.hidden == "real" else []
        return "-".join(parts)

    def rows(self, device: str) -> tuple[int, ...]:
        return self.rows_cpu if device == "cpu" else self.rows_cuda


# In the order in which they are measured: when time runs out, the last are left out.
# On a CPU, about a second of products on two cores.
LOSS_CASES = {
    case.name: case
    for case in (
        LossCase("qwen2.5-1.5b", rows_cuda=(16_384, 65_536, 4096, 1024)),
        LossCase("smollm2-135m", hidden="real", rows_cpu=(1024,), rows_cuda=(16_384,)),
        LossCase(
            "smollm2-135m",
            batch="mind",
            hidden="real",
            rows_cpu=(1400,),
            rows_cuda=(16_384,),
            too_slow_on_cpu=("torch-linear-ce",),
        ),
        LossCase("qwen2.5-1.5b", batch="mind", rows_cuda=(16_384,)),
        LossCase("gemma2-2b", rows_cuda=(16_384,)),
        LossCase(
            "gemma3-270m",
            rows_cpu=(256,),
            rows_cuda=(16_384,),
            too_slow_on_cpu=("torch-linear-ce", "torch-linear-ce-accurate"),
        ),
        LossCase("smollm2-135m", rows_cuda=(16_384,)),
        LossCase("smollm2-135m", loss="kl", rows_cpu=(512,)),
        LossCase("smollm2-135m", loss="jsd", rows_cpu=(512,)),
        LossCase("qwen2.5-1.5b", loss="kl", rows_cuda=(16_384,)),
        LossCase("qwen2.5-1.5b", loss="jsd", rows_cuda=(16_384,)),
        LossCase("qwen2.5-7b", rows_cuda=(16_384,)),
        LossCase("llama-3.1-8b", rows_cuda=(16_384,)),
        LossCase("tiny"),
        LossCase("tiny", batch="mind"),
        LossCase("tiny", loss="kl"),
        LossCase("tiny", loss="jsd"),
    )
}

K = 8
DESELECTED = (0, 3, 6)  # of the 8: their loss is wanted, their gradient is not
# Tokens of the prompt and of the 8 targets of the first questions of `mind problems --seed 0`, read by SmolLM2.
RATIONALE_LENGTHS = (
    (60, (118, 75, 113, 123, 133, 116, 151, 111)),
    (67, (97, 78, 94, 106, 114, 99, 144, 108)),
    (80, (96, 78, 95, 96, 108, 99, 136, 103)),
    (67, (114, 79, 93, 109, 125, 94, 166, 133)),
    (65, (113, 75, 109, 97, 108, 112, 129, 118)),
    (67, (108, 82, 89, 105, 111, 102, 136, 116)),
    (68, (86, 64, 96, 90, 96, 76, 92, 106)),
    (67, (107, 71, 97, 89, 97, 86, 128, 114)),
)
