"""How sure a share is: Wilson's interval, and a bootstrap over groups of items that belong together.

Pure functions of numbers. Items of one prompt are not independent, so resampling takes whole prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
RESAMPLES = 2000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def wilson(right: float, n: float) -> Interval:
    """The share right / n with Wilson's score interval (1927); 0 to 1 where there is nothing.

    >>> [round(x, 3) for x in (wilson(8, 10).low, wilson(8, 10).high)]
    [0.49, 0.943]
    """
    if n <= 0:
        return Interval(0.0, 0.0, 1.0)
    p, z2 = right / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def clustered_mean(
    values: Sequence[float] | Floats, groups: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The mean of `values` with a percentile bootstrap over whole groups.

    Where all groups have the same mean a bootstrap is a point; the width of Wilson's interval then stands in.
    """
    x = np.asarray(values, np.float64)
    if not len(x):
        return Interval(0.0, 0.0, 1.0)
    number: dict[Hashable, int] = {}
    codes = np.array([number.setdefault(group, len(number)) for group in groups])
    sums, counts = np.bincount(codes, x), np.bincount(codes).astype(np.float64)
    mean = float(x.mean())
    if np.ptp(sums / counts) == 0.0:
        width = Z95**2 / (len(counts) + Z95**2)  # of Wilson's interval where all are right, or all wrong
        return Interval(mean, max(mean - width, min(0.0, mean)), min(mean + width, max(1.0, mean)))
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        taken = np.bincount(rng.integers(0, len(counts), len(counts)), minlength=len(counts))
        draws[i] = (taken @ sums) / (taken @ counts)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(mean, float(low), float(high))


def rank_correlation(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Spearman's correlation in n log n, equal values sharing their mean rank; 0.0 where one side is constant."""
    x, y = _shared_ranks(a), _shared_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0


def _shared_ranks(values: Sequence[float] | Floats) -> Floats:
    _, where, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2.0)[where.ravel()]
    return ranks
