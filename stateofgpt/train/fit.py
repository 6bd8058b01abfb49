"""Fitting a scaling law: E, A, B, alpha and beta of L(N, D) = E + A / N^alpha + B / D^beta, with intervals.

Owns the objective of the Chinchilla paper (arXiv 2203.15556, appendix D.3: Huber loss, delta 1e-3, on log L, minimised
from a grid of starts) and its minimiser. Knows nothing of how the losses were measured.

The minimiser is BFGS, for many starts and resamples at once. L-BFGS is BFGS that remembers only the last few steps,
because its matrix would be large; with five unknowns that matrix has 25 entries and is kept. A delta that small makes
the objective nearly one of absolute values, on which quasi-Newton steps stall, so that each start is first led there
through larger deltas. The sum over points is minimised, not the mean: with the mean a minimiser stops too early, which
is what was wrong with the paper's own constants (arXiv 2404.10102).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stateofgpt.errors import DataError
from stateofgpt.train.scaling import ChinchillaLaw

Floats = NDArray[np.float64]
NAMES = ("irreducible", "a_scale", "b_scale", "a", "b")
DELTAS = (0.1, 0.01, 1e-3)
KEPT_STARTS = 160
FEWEST_POINTS = 7  # five unknowns, and something left to tell noise by
FEWEST_VALUES = 3  # of either: an exponent and a scale need two, the common floor a third
SMALLEST_SPAN = 2.0
FLAT = 0.005  # of the loss
TRUSTED_EXPONENTS = (0.05, 1.0)  # both intervals lie in here, else the law is not for extrapolating
TRUSTED_RESIDUAL = 0.05  # root mean square, of log L


@dataclass(frozen=True)
class Point:
    """A measured loss, nats per token, of `n_params` parameters after `tokens` tokens."""

    n_params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Fit:
    """The law, 95 % bootstrap intervals by name, and the residuals log L measured - log L fitted of the points."""

    law: ChinchillaLaw
    intervals: dict[str, tuple[float, float]]
    residuals: tuple[float, ...]

    @property
    def rms(self) -> float:
        return math.sqrt(sum(r * r for r in self.residuals) / len(self.residuals))

    @property
    def doubt(self) -> str:
        """Why this law should not be extrapolated; empty where nothing speaks against it."""
        low, high = TRUSTED_EXPONENTS
        for name, letter in (("a", "alpha"), ("b", "beta")):
            if not (low <= self.intervals[name][0] and self.intervals[name][1] <= high):
                return f"the 95 % interval of {letter}, {_span(self.intervals[name])}, is not within {low} and {high}"
        if self.rms > TRUSTED_RESIDUAL:
            return f"the fit is off by {self.rms:.1%} of the loss, more than {TRUSTED_RESIDUAL:.0%}"
        return ""


def fit_law(points: Sequence[Point], *, resamples: int = 200, seed: int = 0) -> Fit:
    """Fit the law. DataError, saying what to add, when the points cannot tell five constants.

    Intervals are percentiles over fits to the fitted losses with new noise, its size drawn too (what the residuals say
    of it with n - 5 degrees of freedom). Resampling the points would leave whole sizes out; resampling the residuals
    takes too little noise, because a fit of absolute values goes exactly through as many points as it has unknowns.
    """
    check(points)
    n, d, loss = (np.array([getattr(p, name) for p in points], np.float64) for name in ("n_params", "tokens", "loss"))
    problem = _Problem(np.log(n), np.log(d))
    target = np.log(loss)
    best = _best(problem, _starts(problem), target, KEPT_STARTS)
    fitted = problem.log_loss(best[:1])[0]
    residuals = target - fitted
    rng = np.random.default_rng(seed)
    noise = np.sqrt((residuals**2).sum() / rng.chisquare(len(points) - 5, (resamples, 1)))
    targets = fitted + noise * rng.standard_normal((resamples, len(points)))
    draws = problem.constants(_refit(problem, best, targets))
    low, high = np.percentile(draws, (2.5, 97.5), axis=0)
    intervals = {name: (float(low[i]), float(high[i])) for i, name in enumerate(NAMES)}
    constants = problem.constants(best[:1])[0]
    return Fit(ChinchillaLaw(*map(float, constants)), intervals, tuple(map(float, residuals)))


def check(points: Sequence[Point]) -> None:
    """DataError when a fit makes no sense: too few points, too narrow a grid, or losses that do not move."""
    if any(not (v > 0 and math.isfinite(v)) for p in points for v in (p.n_params, p.tokens, p.loss)):
        raise DataError("a ladder's sizes, tokens and losses must be positive finite numbers; a run of it went wrong")
    if len(points) < FEWEST_POINTS:
        raise DataError(
            f"{len(points)} points are too few to fit five constants; {FEWEST_POINTS} are needed, so train more sizes "
            "or more token counts"
        )
    for name, values in (("sizes", {p.n_params for p in points}), ("token counts", {p.tokens for p in points})):
        if len(values) < FEWEST_VALUES or max(values) < SMALLEST_SPAN * min(values):
            raise DataError(
                f"{len(values)} {name} over a factor of {max(values) / min(values):.2g} cannot show how the loss falls "
                f"with them; {FEWEST_VALUES} over a factor of {SMALLEST_SPAN:g} are needed"
            )
    losses = [p.loss for p in points]
    if max(losses) - min(losses) < FLAT * min(losses):
        raise DataError(
            f"the grid is flat: its losses differ by {(max(losses) / min(losses) - 1):.2%}, so there is no law to fit; "
            "give it sizes and token counts further apart"
        )


class _Problem:
    """log L(x) at the points, x = (log A', log B', log E, log alpha, log beta) with A' and B' at the points' middle:
    in these coordinates a scale and its exponent hardly lean on each other."""

    def __init__(self, log_n: Floats, log_d: Floats) -> None:
        self.middle_n, self.middle_d = float(log_n.mean()), float(log_d.mean())
        self.log_n, self.log_d = log_n - self.middle_n, log_d - self.middle_d

    def log_loss(self, x: Floats) -> Floats:
        """[S, 5] -> [S, P]."""
        return self._terms(x)[0]

    def _terms(self, x: Floats) -> tuple[Floats, Floats]:
        alpha, beta = np.exp(x[:, 3:4]), np.exp(x[:, 4:5])
        floor = np.broadcast_to(x[:, 2:3], (len(x), len(self.log_n)))
        terms = np.stack((x[:, 0:1] - alpha * self.log_n, x[:, 1:2] - beta * self.log_d, floor))
        top = terms.max(axis=0)
        total = top + np.log(np.exp(terms - top).sum(axis=0))
        return total, np.exp(terms - total)

    def objective(self, x: Floats, target: Floats, delta: float) -> tuple[Floats, Floats]:
        """Huber loss of log L against `target` ([P] or [S, P]), summed over points, and its gradient [S, 5]."""
        total, shares = self._terms(x)
        residual = total - target
        slope = np.clip(residual, -delta, delta)
        value = np.where(np.abs(residual) <= delta, residual**2 / 2, delta * (np.abs(residual) - delta / 2)).sum(axis=1)
        alpha, beta = np.exp(x[:, 3]), np.exp(x[:, 4])
        of_a, of_b, of_e = slope * shares[0], slope * shares[1], slope * shares[2]
        gradient = np.stack(
            (
                of_a.sum(axis=1),
                of_b.sum(axis=1),
                of_e.sum(axis=1),
                -alpha * (of_a * self.log_n).sum(axis=1),
                -beta * (of_b * self.log_d).sum(axis=1),
            ),
            axis=1,
        )
        return value / delta, gradient / delta

    def constants(self, x: Floats) -> Floats:
        """[S, 5] as (E, A, B, alpha, beta)."""
        alpha, beta = np.exp(x[:, 3]), np.exp(x[:, 4])
        with np.errstate(over="ignore"):
            a_scale, b_scale = np.exp(x[:, 0] + alpha * self.middle_n), np.exp(x[:, 1] + beta * self.middle_d)
        return np.stack((np.exp(x[:, 2]), a_scale, b_scale, alpha, beta), axis=1)


def _starts(problem: _Problem) -> Floats:
    """The paper's grid in our coordinates; its exponent 0 is 0.1 here, since exponents are positive."""
    scales, floors, exponents = np.arange(0, 26, 5.0), np.arange(-1, 1.01, 0.5), np.array([0.1, 0.5, 1.0, 1.5, 2.0])
    a, b, e, alpha, beta = (g.ravel() for g in np.meshgrid(scales, scales, floors, exponents, exponents))
    middle_a, middle_b = a - alpha * problem.middle_n, b - beta * problem.middle_d
    return np.stack((middle_a, middle_b, e, np.log(alpha), np.log(beta)), axis=1)


def _best(problem: _Problem, starts: Floats, target: Floats, keep: int) -> Floats:
    """Minima from the `keep` best starts, the best first."""
    values, _ = problem.objective(starts, target, DELTAS[0])
    x = starts[np.argsort(values, kind="stable")[:keep]]
    return _led(problem, x, np.broadcast_to(target, (len(x), len(target))))


def _led(problem: _Problem, x: Floats, targets: Floats) -> Floats:
    """Minimise through all deltas; the rows sorted by the last objective."""
    for delta in DELTAS:
        x, values = minimise(lambda at, rows, d=delta: problem.objective(at, targets[rows], d), x)  # type: ignore[misc]
    return x[np.argsort(values, kind="stable")]


def _refit(problem: _Problem, minima: Floats, targets: Floats, starts: int = 4) -> Floats:
    """One minimum for each row of `targets`, from the best few different minima of the data themselves."""
    chosen = minima[np.linspace(0, len(minima) // 4, starts).astype(int)]
    x = np.repeat(chosen[None], len(targets), axis=0).reshape(-1, 5)
    spread = np.repeat(targets, starts, axis=0)
    values = np.zeros(len(x))
    for delta in DELTAS:
        x, values = minimise(lambda at, rows, d=delta: problem.objective(at, spread[rows], d), x)  # type: ignore[misc]
    best = values.reshape(len(targets), starts).argmin(axis=1)
    return x.reshape(len(targets), starts, 5)[np.arange(len(targets)), best]


def minimise(
    objective: Callable[[Floats, NDArray[np.intp]], tuple[Floats, Floats]], x: Floats, iterations: int = 120
) -> tuple[Floats, Floats]:
    """BFGS on many problems at once: `objective(x [s, k], rows [s])` -> values [s], gradients [s, k].

    Each row has its own matrix and its own step, halved until the value falls enough (Armijo); a row that cannot fall
    any more is left alone.
    """
    x = x.copy()
    rows = np.arange(len(x))
    values, gradients = objective(x, rows)
    k = x.shape[1]
    inverse = np.broadcast_to(np.eye(k), (len(x), k, k)).copy()
    for _ in range(iterations):
        if not len(rows):
            break
        g = gradients[rows]
        step = -np.einsum("sij,sj->si", inverse[rows], g)
        downhill = np.einsum("si,si->s", step, g)
        lost = downhill >= 0
        step[lost], inverse[rows[lost]] = -g[lost], np.eye(k)
        step *= np.minimum(1.0, 2.0 / np.maximum(1e-12, np.abs(step).max(axis=1)))[:, None]  # e^2 at most
        downhill = np.einsum("si,si->s", step, g)
        length = np.ones(len(rows))
        found = np.zeros(len(rows), bool)
        new, new_values, new_gradients = x[rows].copy(), values[rows].copy(), g.copy()
        for _ in range(20):
            left = np.flatnonzero(~found)
            if not len(left):
                break
            trial = x[rows[left]] + length[left, None] * step[left]
            with np.errstate(over="ignore", invalid="ignore"):
                v, gr = objective(trial, rows[left])
            good = v <= values[rows[left]] + 1e-4 * length[left] * downhill[left]
            hit = left[good]
            new[hit], new_values[hit], new_gradients[hit] = trial[good], v[good], gr[good]
            found[hit] = True
            length[left[~good]] *= 0.5
        s, y = new - x[rows], new_gradients - g
        inverse[rows] = _updated(inverse[rows], s, y)
        gained = values[rows] - new_values
        x[rows], values[rows], gradients[rows] = new, new_values, new_gradients
        rows = rows[found & (gained > 1e-12 * np.maximum(1e-9, np.abs(new_values)))]
    return x, values


def _updated(inverse: Floats, s: Floats, y: Floats) -> Floats:
    """The BFGS update of each inverse Hessian, left as it was where the curvature along the step is not positive."""
    curvature = np.einsum("si,si->s", s, y)
    use = curvature > 1e-14
    rho = 1.0 / np.where(use, curvature, 1.0)
    left = np.eye(s.shape[1]) - rho[:, None, None] * s[:, :, None] * y[:, None, :]
    new = left @ inverse @ left.transpose(0, 2, 1) + rho[:, None, None] * s[:, :, None] * s[:, None, :]
    return np.where(use[:, None, None], new, inverse)


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3g} to {interval[1]:.3g}"
