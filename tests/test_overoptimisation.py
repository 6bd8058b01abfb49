"""rl/overoptimisation.py against enumeration of all subsets, simulation, and forms whose constants are known."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from stateofgpt.rl.overoptimisation import (
    answers_kl,
    best_of_n,
    best_of_n_kl,
    chance_to_win,
    fit,
    form_at,
    peak_of,
)


def by_enumeration(rewards: list[float], values: list[float], n: int) -> float:
    """All subsets of size n; among equal rewards each is taken as often."""
    total, subsets = 0.0, 0
    for subset in itertools.combinations(range(len(rewards)), n):
        top = max(rewards[i] for i in subset)
        winners = [i for i in subset if rewards[i] == top]
        total += sum(values[i] for i in winners) / len(winners)
        subsets += 1
    return total / subsets


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(0)
    for _ in range(40):
        size = rng.randint(1, 9)
        rewards = [float(rng.randint(0, 5)) for _ in range(size)]  # with ties
        values = [rng.gauss(0, 1) for _ in range(size)]
        for n in range(1, size + 1):
            assert best_of_n(rewards, values, n) == pytest.approx(by_enumeration(rewards, values, n), abs=1e-10)


def test_best_of_n_is_unbiased_where_one_maximum_of_all_samples_is_not_yet_reached() -> None:
    """The mean over many pools of 8 of the best of 4 is the true mean of the maximum of 4 uniform numbers, 4/5."""
    rng = np.random.default_rng(0)
    pools = rng.random((4000, 8))
    estimates = [best_of_n(list(pool), list(pool), 4) for pool in pools]
    assert np.mean(estimates) == pytest.approx(0.8, abs=0.005)
    plain = pools[:, :4].max(1)  # the same mean, with more noise
    assert np.std(estimates) < 0.8 * plain.std()


def test_the_chances_sum_to_one_and_stay_finite_for_large_pools() -> None:
    for n, total in ((1, 1), (3, 7), (64, 512), (1000, 4000)):
        chances = chance_to_win(n, total)
        assert chances.sum() == pytest.approx(1.0, abs=1e-8) and np.isfinite(chances).all()
    with pytest.raises(ValueError, match="at least 5 samples"):
        chance_to_win(5, 4)


def test_the_kl_of_best_of_n_is_that_of_the_density_of_a_maximum() -> None:
    """The maximum of n uniforms has density n u^(n-1): its KL from uniform by numerical integration."""
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    for n in (1, 2, 5, 64):
        density, log_density = n * u ** (n - 1), math.log(n) + (n - 1) * np.log(u)
        assert best_of_n_kl(n) == pytest.approx(float((density * log_density).mean()), abs=1e-4)


def test_the_kl_over_answers_is_that_of_the_drawn_distribution_and_below_the_formula() -> None:
    rewards = [0.0, 0.0, 0.0, 1.0, 2.0, 2.0]
    p = {0.0: 3 / 6, 1.0: 1 / 6, 2.0: 2 / 6}
    for n in (1, 2, 3):
        best: dict[float, float] = dict.fromkeys(p, 0.0)
        for draw in itertools.product(rewards, repeat=n):
            best[max(draw)] += 1 / len(rewards) ** n
        expected = sum(q * math.log(q / p[r]) for r, q in best.items())
        assert answers_kl(rewards, n) == pytest.approx(expected, abs=1e-12)
        assert answers_kl(rewards, n) <= best_of_n_kl(n) + 1e-12
    assert answers_kl([1.0] * 9, 64) == 0.0  # a model that says one thing cannot be moved by choosing
    distinct = [float(i) for i in range(4000)]
    assert answers_kl(distinct, 4) == pytest.approx(best_of_n_kl(4), rel=1e-2)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_a_fit_finds_the_constants_that_made_the_points_and_its_interval_covers_them(form: str) -> None:
    alpha, beta, covered, trials = 0.9, 0.35, 0, 60
    d = [0.3, 0.6, 0.9, 1.2, 1.6, 2.0, 2.4]
    truth = np.array([form_at(form, alpha, beta, x) for x in d])  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    for trial in range(trials):
        rewards = truth + rng.normal(0, 0.5, (80, 1)) + rng.normal(0, 0.5, (80, len(d)))
        found = fit(form, [0.0, *d], np.hstack([np.zeros((80, 1)), rewards]), resamples=400, seed=trial)  # type: ignore[arg-type]
        covered += found.alpha_interval[0] <= alpha <= found.alpha_interval[1]
    assert 0.85 * trials <= covered
    exact = fit(form, d, np.tile(truth, (3, 1)), resamples=10)  # type: ignore[arg-type]
    assert (exact.alpha, exact.beta) == pytest.approx((alpha, beta), abs=1e-9) and exact.rms < 1e-9
    assert exact.turns == 1.0 and exact.at(1.0) == pytest.approx(form_at(form, alpha, beta, 1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_the_peak_is_where_a_fine_grid_finds_it(form: str) -> None:
    grid = np.linspace(0.001, 12, 200_000)
    for alpha, beta in ((1.0, 0.3), (0.4, 0.2)):
        values = [form_at(form, alpha, beta, float(x)) for x in grid]  # type: ignore[arg-type]
        at = int(np.argmax(values))
        assert peak_of(form, alpha, beta) == pytest.approx((grid[at], values[at]), rel=1e-3)  # type: ignore[arg-type]
    assert peak_of(form, 1.0, -0.1) is None and peak_of(form, 1.0, 0.0) is None  # type: ignore[arg-type]


def test_a_curve_that_never_turns_has_no_peak_and_says_so() -> None:
    d = [0.5, 1.0, 1.5, 2.0]
    rewards = np.array([[0.4 * x + 0.05 * x * x for x in d]] * 5) + np.linspace(-0.1, 0.1, 5)[:, None]
    found = fit("best_of_n", d, rewards, resamples=50)
    assert found.peak is None and found.turns == 0.0 and found.peak_interval is None
    with pytest.raises(ValueError, match="two points"):
        fit("rl", [0.0, 1.0], rewards[:, :2])
