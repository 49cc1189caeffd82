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


# CPU-sized: one training step's supervised rows of the built-in students.
CPU_CASES = [
    Case("gemma3-270m", num_rows=1024, hidden_size=640, vocab_size=262_144),
    Case("smollm2-135m", num_rows=2048, hidden_size=576, vocab_size=49_152),
]
