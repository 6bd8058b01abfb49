"""The mathematics of over-optimisation: best-of-n without sampling n again and again, distances, fits and peaks.

Owns the estimators and the two forms of Gao et al. (arXiv 2210.10760): with d = sqrt(KL) the true reward is
d (alpha - beta d) for best-of-n and d (alpha - beta log d) for reinforcement learning. Pure functions of numbers: knows
nothing of models or prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Form = Literal["best_of_n", "rl"]


def best_of_n_kl(n: int) -> float:
    """KL in nats of best-of-n from one sample: log n - (n-1)/n, exact where no two samples are equally good
    (Stiennon et al., arXiv 2009.01325, appendix G.3); an upper bound where some are (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def chance_to_win(n: int, total: int) -> Floats:
    """[total]: the chance that the i-th worst of `total` samples is the best of n of them drawn without replacement.

    C(i-1, n-1) / C(total, n), by logarithms. ValueError where n is more than `total`.
    """
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} needs at least {n} samples and n of at least 1, got {total}")

    def log_choose(a: int, b: int) -> float:
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

    whole = log_choose(total, n)
    chances = [math.exp(log_choose(i - 1, n - 1) - whole) if i >= n else 0.0 for i in range(1, total + 1)]
    return np.asarray(chances, dtype=np.float64)


def best_of_n(rewards: Sequence[float], values: Sequence[float], n: int) -> float:
    """Expected value of the sample with the highest reward among n, over all subsets of size n of the samples.

    Unbiased, and of the least variance that the samples allow (Nakano et al., arXiv 2112.09332, appendix I, use the
    same). Of samples with equal rewards each is as likely to be taken.
    """
    reward, value = np.asarray(rewards, dtype=np.float64), np.asarray(values, dtype=np.float64)
    chances = chance_to_win(n, len(reward))
    _, group = np.unique(reward, return_inverse=True)  # groups of equal rewards, the lowest first
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    ends = np.cumsum(sizes)
    totals = np.add.reduceat(chances, ends - sizes)
    means = np.add.reduceat(value[order], ends - sizes) / sizes
    return float(totals @ means)


def answers_kl(rewards: Sequence[float], n: int) -> float:
    """KL in nats of best-of-n from one draw, where the samples with these rewards are all that can be drawn.

    Equal rewards are one outcome: p its share, F its cumulative share, and best-of-n takes it with F^n - (F - p)^n.
    What `best_of_n_kl` counts too much where a model says the same thing again and again. It is an estimate from
    samples, too low for an n near their number.
    """
    _, sizes = np.unique(np.asarray(rewards, dtype=np.float64), return_counts=True)
    p = sizes / sizes.sum()
    end = np.cumsum(p)
    taken = end**n - np.clip(end - p, 0.0, 1.0) ** n
    some = taken > 0
    return float((taken[some] * np.log(taken[some] / p[some])).sum())


# --- the fits ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One form with its constants and their 95 % bootstrap intervals; `peak` is (d, reward) where it turns, or None
    where it does not (beta of at most 0). `turns` is the share of resamples that have a peak, `peak_interval` the
    interval of its d over those."""

    form: Form
    alpha: float
    beta: float
    alpha_interval: tuple[float, float]
    beta_interval: tuple[float, float]
    peak: tuple[float, float] | None
    turns: float
    peak_interval: tuple[float, float] | None
    rms: float

    def at(self, d: float) -> float:
        """The fitted true reward at a distance."""
        return form_at(self.form, self.alpha, self.beta, d)


def form_at(form: Form, alpha: float, beta: float, d: float) -> float:
    """d (alpha - beta d) or d (alpha - beta log d); 0 at d = 0."""
    return d * (alpha - beta * (d if form == "best_of_n" else math.log(d))) if d > 0 else 0.0


def peak_of(form: Form, alpha: float, beta: float) -> tuple[float, float] | None:
    """(d, reward) of the maximum: alpha / 2 beta for best-of-n, exp(alpha / beta - 1) for RL; None without one."""
    if beta <= 0 or (form == "best_of_n" and alpha <= 0):
        return None
    if form == "best_of_n":
        return alpha / (2 * beta), alpha * alpha / (4 * beta)
    if alpha / beta > 700:
        return None  # further than a float reaches
    d = math.exp(alpha / beta - 1)
    return d, beta * d


def fit(form: Form, distances: Sequence[float], rewards: Floats, *, resamples: int = 2000, seed: int = 0) -> Fit:
    """Least squares of a form on the mean over prompts of `rewards` [prompts, points] at `distances` [points].

    Points at distance 0 say nothing and are left out. The intervals resample prompts, which all points share; they
    are of this reward model and this run and know nothing of another. ValueError below two points or two prompts.
    """
    d = np.asarray(distances, dtype=np.float64)
    kept = d > 0
    d, y = d[kept], np.asarray(rewards, dtype=np.float64)[:, kept]
    if len(d) < 2 or len(y) < 2:
        raise ValueError(f"a fit needs at least two points and two prompts, got {len(d)} and {len(y)}")
    design = np.stack([d, -d * (d if form == "best_of_n" else np.log(d))], axis=1)
    solve = np.linalg.pinv(design)  # [2, points]
    alpha, beta = (float(x) for x in solve @ y.mean(0))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=resamples) / len(y)
    drawn = weights @ y @ solve.T  # [resamples, 2]
    (a_low, a_high), (b_low, b_high) = np.quantile(drawn, [0.025, 0.975], axis=0).T
    peaks = [peak[0] for a, b in drawn if (peak := peak_of(form, float(a), float(b))) is not None]
    span = np.quantile(peaks, [0.025, 0.975]) if peaks else None
    residual = y.mean(0) - design @ np.array([alpha, beta])
    return Fit(
        form,
        alpha,
        beta,
        (float(a_low), float(a_high)),
        (float(b_low), float(b_high)),
        peak_of(form, alpha, beta),
        len(peaks) / resamples,
        None if span is None else (float(span[0]), float(span[1])),
        float(np.sqrt((residual**2).mean())),
    )
