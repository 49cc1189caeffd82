"""Percentile bootstrap intervals of means: of an accuracy, of a paired difference."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000  # bootstrap samples
LEVEL = 0.95


def bootstrap_means(values: Sequence[float], key: str, seed: int = 0) -> np.ndarray:
    """(DRAWS,) fp64 means of bootstrap samples of the values, at least one.

    key: names what is measured: other keys have other draws, the same key and seed the same ones.

    n values drawn with replacement hold each distinct value a multinomial number of times. The counts are drawn, not
    the values: the same distribution, and for the few distinct values of an accuracy far less work.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    generator = np.random.default_rng([seed, zlib.crc32(key.encode())])
    return generator.multinomial(len(values), counts / len(values), size=DRAWS) @ distinct / len(values)


def interval(means: np.ndarray) -> list[float]:
    """[low, high] of the bootstrap means: the percentile interval of level LEVEL."""
    return [float(bound) for bound in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
