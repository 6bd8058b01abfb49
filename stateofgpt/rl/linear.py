"""A Bradley-Terry head on fixed features: logistic regression on differences, its strength of L2 chosen by folds.

Owns which pairs are learned from and how sure they are, the fit, the folds by prompt and the choice. Knows nothing of
models or where features come from. A pair on which several people voted has their share as its target, and a tie is
half a win each; a prompt counts once, however many pairs it has (InstructGPT, arXiv 2203.02155, section 3.5).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stateofgpt.data.comparisons import Ranking
from stateofgpt.data.preferences import text_key

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
STRENGTHS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # of L2 on features of unit size, per pair; strongest first
ITERATIONS = 30


@dataclass(frozen=True)
class Judged:
    """Pairs to learn from: completions `first` and `second` (numbers over all completions), the probability `target`
    that the first is better, `weight`, and the ranking each belongs to."""

    first: Ints
    second: Ints
    target: Floats
    weight: Floats
    ranking: Ints

    def of(self, rankings: Ints) -> Judged:
        """The pairs of some rankings."""
        kept = np.isin(self.ranking, rankings)
        return Judged(self.first[kept], self.second[kept], self.target[kept], self.weight[kept], self.ranking[kept])


def judged(rankings: Sequence[Ranking]) -> Judged:
    """All pairs of `rankings`, whose completions are numbered in order."""
    rows: list[tuple[int, int, float, float, int]] = []
    begin = 0
    for number, ranking in enumerate(rankings):
        k = len(ranking.ranks)
        for i in range(k):
            for j in range(i + 1, k):
                rows.append((begin + i, begin + j, _target(ranking, i, j), 2.0 / (k * (k - 1)), number))
        begin += k
    columns = list(zip(*rows, strict=True)) or [()] * 5
    ints = [np.array(columns[c], np.int64) for c in (0, 1, 4)]
    floats = [np.array(columns[c], np.float64) for c in (2, 3)]
    return Judged(ints[0], ints[1], floats[0], floats[1], ints[2])


def _target(ranking: Ranking, i: int, j: int) -> float:
    """How likely completion i is preferred to j: the share of the votes, or what the ranks say."""
    votes = ranking.votes or (ranking.ranks,)
    return float(np.mean([0.5 + 0.5 * np.sign(vote[j] - vote[i]) for vote in votes]))


def folds_of(rankings: Sequence[Ranking], k: int, seed: int) -> list[Ints]:
    """Indices of rankings in k folds of about equal size; rankings of one prompt are never in two."""
    groups: dict[str, list[int]] = {}
    for number, ranking in enumerate(rankings):
        groups.setdefault(text_key(ranking.prompt), []).append(number)
    names = list(groups)
    random.Random(f"folds {seed}").shuffle(names)
    names.sort(key=lambda name: -len(groups[name]))  # the largest first, so that all folds end about as large
    folds: list[list[int]] = [[] for _ in range(min(k, len(names)))]
    for name in names:
        min(folds, key=len).extend(groups[name])
    return [np.array(sorted(fold), np.int64) for fold in folds]


def fit_heads(features: Floats, pairs: Judged, strengths: Sequence[float] = STRENGTHS) -> list[Floats]:
    """A head [C] for each strength, in their order: minimises the mean loss plus strength / 2 times the squared size.

    `features` [completions, C]. Newton's method, each fit beginning where the stronger one before ended. The scale of
    each feature is its own over the pairs, and is taken back out of the head.
    """
    x = features[pairs.first] - features[pairs.second]
    total = max(1e-12, float(pairs.weight.sum()))
    scale = np.sqrt((pairs.weight @ (x * x)) / total)
    scale[scale < 1e-8] = np.inf  # a feature that never differs
    x = x / scale
    w = np.zeros(x.shape[1])
    out = []
    for strength in strengths:
        w = _newton(x, pairs.target, pairs.weight / total, strength, w)
        out.append(w / scale)
    return out


def _newton(x: Floats, target: Floats, weight: Floats, strength: float, w: Floats) -> Floats:
    value = _loss(x @ w, target, weight) + strength / 2 * (w @ w)
    for _ in range(ITERATIONS):
        p = _sigmoid(x @ w)
        gradient = x.T @ (weight * (p - target)) + strength * w
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x
        hessian[np.diag_indices_from(hessian)] += strength
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        while True:
            trial = w - length * step
            new = _loss(x @ trial, target, weight) + strength / 2 * (trial @ trial)
            if new <= value or length < 1e-6:
                break
            length /= 2
        gained, w, value = value - new, trial, new
        if gained < 1e-9:
            break
    return w


def _loss(margin: Floats, target: Floats, weight: Floats) -> float:
    """Weighted cross-entropy in nats of preferences with probability sigmoid(margin)."""
    return float(weight @ (np.logaddexp(0.0, margin) - target * margin))


def _sigmoid(x: Floats) -> Floats:
    out: Floats = 0.5 * (1.0 + np.tanh(x / 2))
    return out


@dataclass(frozen=True)
class Choice:
    """Which features and which strength did best on prompts they were not fitted to, and the loss there."""

    column: int
    strength: float
    loss: float


def choose(
    features: Sequence[Floats],
    rankings: Sequence[Ranking],
    among: Ints,
    pairs: Judged,
    seed: int,
    *,
    folds: int = 4,
    strengths: Sequence[float] = STRENGTHS,
) -> Choice:
    """The best of several sets of features [completions, C] and strengths, by the log loss over inner folds of the
    rankings `among`: proper, and less noisy than accuracy."""
    inner = [among[fold] for fold in folds_of([rankings[i] for i in among], folds, seed)]
    losses = np.zeros((len(features), len(strengths)))
    for fold in inner:
        learn, test = pairs.of(np.setdiff1d(among, fold)), pairs.of(fold)
        for column, x in enumerate(features):
            for s, head in enumerate(fit_heads(x, learn, strengths)):
                margin = x[test.first] @ head - x[test.second] @ head
                losses[column, s] += _loss(margin, test.target, test.weight)
    best, of = divmod(int(losses.argmin()), len(strengths))
    total = float(pairs.of(among).weight.sum())
    return Choice(best, strengths[of], float(losses[best, of]) / max(1e-12, total))


def redrawn(pairs: Judged, among: Ints, seed: int) -> Judged:
    """The pairs of as many rankings, drawn from `among` with replacement: another draw of the data."""
    rng = random.Random(f"resample {seed}")
    counts = np.zeros(int(among.max()) + 1, np.float64)
    for _ in among:
        counts[among[rng.randrange(len(among))]] += 1.0
    kept = pairs.of(among)
    return replace(kept, weight=kept.weight * counts[kept.ranking])
