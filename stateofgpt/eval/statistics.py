"""Statistics that several measurements share. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0.0 where one side is constant.

    >>> spearman([1, 2, 3], [10, 20, 30])
    1.0
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    less = (array[:, None] > array[None, :]).sum(1)
    same = (array[:, None] == array[None, :]).sum(1)
    ranks: np.ndarray = less + (same + 1) / 2.0
    return ranks
