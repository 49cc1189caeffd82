"""Cases named by the model whose head they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A head of a real model and the number of supervised rows that reach it."""

    name: str
    num_rows: int  # N
    hidden_size: int  # H
    vocab_size: int  # V
    cross_entropy_target: float | None = None  # at most so many times the three bare products, on an H200
    kl_target: float | None = None  # cross-entropy + KL from hidden states: times the four bare products


# CPU-sized: one training step's supervised rows of the built-in students.
CPU_CASES = [
    Case("gemma3-270m", num_rows=1024, hidden_size=640, vocab_size=262_144),
    Case("smollm2-135m", num_rows=2048, hidden_size=576, vocab_size=49_152),
]

# An optimiser step's supervised rows on one GPU.
GPU_CASES = [
    Case("qwen2.5-1.5b", 16_384, 1536, 151_936, 1.10, 1.15),
    Case("qwen2.5-7b", 16_384, 3584, 152_064, 1.08, 1.12),
    Case("llama-3.1-8b", 16_384, 4096, 128_256, 1.08, 1.12),
    Case("gemma3-270m", 16_384, 640, 262_144, 1.25, 1.30),
]
