"""Rank correlation against textbook numbers and a twin that counts pairs."""

from __future__ import annotations

import doctest
import random

import numpy as np
import pytest

from stateofgpt.eval import statistics
from stateofgpt.eval.statistics import spearman


def ranks_by_sorting(values: list[float]) -> list[float]:
    """Mean ranks the slow way: the places a value takes in the sorted list, averaged."""
    ordered = sorted(values)
    places: dict[float, list[int]] = {}
    for place, value in enumerate(ordered, start=1):
        places.setdefault(value, []).append(place)
    return [sum(places[v]) / len(places[v]) for v in values]


def test_a_published_example_comes_out() -> None:
    # IQ and hours of television, the worked example of Wikipedia's "Spearman's rank correlation coefficient"
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165, abs=1e-12)


def test_ties_share_their_mean_rank() -> None:
    rng = random.Random(5)
    for _ in range(50):
        n = rng.randint(2, 12)
        a = [float(rng.randint(0, 4)) for _ in range(n)]
        b = [rng.choice([0.0, 1.5, rng.random()]) for _ in range(n)]
        if len(set(a)) == 1 or len(set(b)) == 1:
            assert spearman(a, b) == 0.0
            continue
        expected = np.corrcoef(ranks_by_sorting(a), ranks_by_sorting(b))[0, 1]
        assert spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_only_the_order_counts() -> None:
    a, b = [0.3, -2.0, 5.0, 1.0], [1.0, 0.5, 2.0, 7.0]
    assert spearman(a, b) == pytest.approx(spearman([x**3 for x in a], [2.0**x for x in b]))
    assert spearman(a, b) == pytest.approx(-spearman(a, [-x for x in b]))


def test_the_docstring_is_true() -> None:
    assert doctest.testmod(statistics).failed == 0
