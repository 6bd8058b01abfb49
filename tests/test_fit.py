"""The fit against constants that are known because the losses were made from them, and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stateofgpt.errors import DataError
from stateofgpt.train.fit import NAMES, Fit, Point, fit_law, minimise
from stateofgpt.train.scaling import EPOCH, ChinchillaLaw

SMALL = ChinchillaLaw(1.5, 60.0, 300.0, 0.3, 0.4)  # near what models of a million parameters show
SIZES, TOKENS = (1.5e5, 2.5e5, 8e5, 1.2e6, 2.9e6), (7e4, 1.4e5, 2.8e5, 5.6e5)


def points(law: ChinchillaLaw, sizes: object, tokens: object, noise: float, seed: int) -> list[Point]:
    rng = np.random.default_rng(seed)
    grid = [(float(n), float(d)) for n in np.asarray(sizes) for d in np.asarray(tokens)]
    return [Point(n, d, law.loss(n, d) * math.exp(rng.normal(0.0, noise))) for n, d in grid]


def constants(law: ChinchillaLaw) -> tuple[float, ...]:
    return tuple(getattr(law, name) for name in NAMES)


@pytest.mark.parametrize("law", [EPOCH, SMALL])
def test_without_noise_the_constants_come_back(law: ChinchillaLaw) -> None:
    made = points(law, np.logspace(6, 9, 5), np.logspace(7, 10, 4), 0.0, 0)
    assert constants(fit_law(made, resamples=5).law) == pytest.approx(constants(law), rel=1e-4)


def test_with_noise_the_exponents_come_back_and_outliers_hardly_move_them() -> None:
    made = points(EPOCH, np.logspace(7, 10, 8), np.logspace(9, 11.5, 8), 1e-3, 1)
    fit = fit_law(made, resamples=50)
    assert fit.law.a == pytest.approx(EPOCH.a, abs=0.02) and fit.law.b == pytest.approx(EPOCH.b, abs=0.02)
    assert fit.law.irreducible == pytest.approx(EPOCH.irreducible, rel=0.03)
    made[20] = Point(made[20].n_params, made[20].tokens, made[20].loss * 1.5)  # a run that went wrong
    again = fit_law(made, resamples=5)
    assert again.law.a == pytest.approx(fit.law.a, abs=0.01) and again.law.b == pytest.approx(fit.law.b, abs=0.01)
    assert again.residuals[20] == pytest.approx(math.log(1.5), abs=0.02)


@pytest.mark.slow
def test_the_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rounds, covered = 30, dict.fromkeys(NAMES, 0)
    for seed in range(rounds):
        fit = fit_law(points(SMALL, SIZES, TOKENS, 0.003, seed), resamples=60, seed=seed)
        for name in NAMES:
            low, high = fit.intervals[name]
            covered[name] += low <= getattr(SMALL, name) <= high
    assert all(count / rounds >= 0.8 for count in covered.values()), covered  # 0.87 to 1 of sixty


@pytest.mark.slow
def test_more_noise_makes_wider_intervals_and_a_law_not_to_be_trusted() -> None:
    widths = []
    for noise in (0.001, 0.01, 0.08):
        fit = fit_law(points(SMALL, SIZES, TOKENS, noise, 3), resamples=100)
        widths.append(fit.intervals["b"][1] - fit.intervals["b"][0])
        assert bool(fit.doubt) == (noise > 0.05)
    assert widths == sorted(widths)


def test_a_fit_says_why_it_is_doubted() -> None:
    wide = {name: (0.1, 1.0) for name in NAMES} | {"a": (-0.1, 0.5)}
    assert "alpha, -0.1 to 0.5" in Fit(EPOCH, wide, (0.0,)).doubt
    narrow = {name: (0.1, 1.0) for name in NAMES}
    assert Fit(EPOCH, narrow, (0.0,)).doubt == ""
    assert "off by 10.0%" in Fit(EPOCH, narrow, (0.1, -0.1)).doubt


def test_the_same_points_and_seed_give_the_same_fit() -> None:
    made = points(SMALL, SIZES, TOKENS, 0.003, 0)
    assert fit_law(made, resamples=20, seed=5) == fit_law(made, resamples=20, seed=5)
    assert fit_law(made, resamples=20, seed=5).intervals != fit_law(made, resamples=20, seed=6).intervals


@pytest.mark.slow
def test_torchs_own_lbfgs_from_the_same_place_finds_nothing_better() -> None:
    made = points(SMALL, SIZES, TOKENS, 0.004, 2)
    log_n, log_d, log_l = (
        torch.tensor([math.log(getattr(p, name)) for p in made], dtype=torch.float64)
        for name in ("n_params", "tokens", "loss")
    )

    def huber(x: torch.Tensor) -> torch.Tensor:
        terms = torch.stack((x[0] - x[3] * log_n, x[1] - x[4] * log_d, x[2].expand(len(log_n))))
        return torch.nn.functional.huber_loss(terms.logsumexp(0), log_l, delta=1e-3, reduction="sum")

    e, a, b, alpha, beta = constants(fit_law(made, resamples=2).law)
    mine = torch.tensor([math.log(a), math.log(b), math.log(e), alpha, beta], dtype=torch.float64)
    best = huber(mine).item()
    for start in (mine, mine * 1.02, mine * 0.97, torch.tensor([5.0, 5.0, 0.0, 0.5, 0.5], dtype=torch.float64)):
        x = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def closure(x: torch.Tensor = x, optimizer: torch.optim.LBFGS = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            value = huber(x)
            value.backward()
            return value

        optimizer.step(closure)
        assert huber(x.detach()).item() >= best * 0.999


def test_the_minimiser_finds_the_minimum_of_many_valleys_at_once() -> None:
    def rosenbrock(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b = x[:, 0], x[:, 1]
        slope = np.stack((-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)), axis=1)
        return (1 - a) ** 2 + 100 * (b - a * a) ** 2, slope

    starts = np.random.default_rng(0).uniform(-2, 2, (30, 2))
    x, values = minimise(rosenbrock, starts, iterations=400)
    assert np.allclose(x, 1.0, atol=1e-3) and values.max() < 1e-6


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (points(SMALL, (1e5, 1e6), (1e5, 1e6, 1e7), 0.0, 0), "6 points are too few to fit five constants; 7"),
        (points(SMALL, (1e5, 1e6), (1e5, 3e5, 1e6, 1e7), 0.0, 0), "2 sizes over a factor of 10 cannot show"),
        (points(SMALL, (1e5, 1.2e5, 1.3e5), (1e5, 1e6, 1e7), 0.0, 0), "3 sizes over a factor of 1.3 cannot show"),
        (points(SMALL, (1e5, 2e5, 1e6), (1e5, 1.1e5, 1.2e5), 0.0, 0), "3 token counts over a factor of 1.2 cannot"),
        ([Point(n, d, 3.0) for n in (1e5, 1e6, 1e7) for d in (1e5, 1e6, 1e7)], "the grid is flat"),
        ([Point(1e5, 1e5, math.nan)] * 9, "positive finite numbers"),
    ],
)
def test_points_that_cannot_tell_a_law_are_refused_with_a_sentence(made: list[Point], said: str) -> None:
    with pytest.raises(DataError, match=said):
        fit_law(made)
