"""The arena: blind pairwise battles between models, turned into ratings with intervals.

Owns the Bradley-Terry model, its bootstrap and the leaderboard. Pure functions over `Battle`s: knows nothing of models,
prompts or judges, so the same code ranks simulated judgements and people's.

A rating is on the chess scale: 400 points more is odds of 10 to 1, and the mean of all models is 1000. Each pair that
met is given one extra, drawn battle (half a win each way; Firth's correction for a pair), which keeps a model that
never lost at a finite rating and its interval wider than a point. Models that no chain of battles connects cannot be
compared: each such group has its own mean of 1000, and the leaderboard says which group a model belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MEAN_RATING = 1000.0
SCALE = 400 / math.log(10)  # rating points per nat of log-odds
RIDGE = 1e-3  # per model, on the log-odds: holds the mean of every connected group at zero
HALF_WIN = 0.5


@dataclass(frozen=True)
class Battle:
    """One judged pair of answers to one prompt."""

    model_a: str
    model_b: str
    winner: Literal["a", "b", "tie"]
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.model_a == self.model_b:
            raise ValueError(f"{self.model_a} cannot battle itself")
        if self.winner not in ("a", "b", "tie"):
            raise ValueError(f"the winner of a battle is 'a', 'b' or 'tie', got {self.winner!r}")


def model_names(battles: Sequence[Battle]) -> list[str]:
    """All models that fought, sorted by name."""
    return sorted({name for battle in battles for name in (battle.model_a, battle.model_b)})


def bradley_terry(battles: Sequence[Battle]) -> dict[str, float]:
    """Model -> rating: the strengths that make the battles' outcomes most likely. A tie is half a win each."""
    names = model_names(battles)
    if not names:
        return {}
    wins = _wins_per_unit(battles, names).sum(0)
    fit = _fit((wins + HALF_WIN * _met(wins))[None])[0]
    return {name: MEAN_RATING + SCALE * float(value) for name, value in zip(names, fit, strict=True)}


def expected_score(rating: float, other: float) -> float:
    """The share of battles (ties as half) that a model of `rating` is expected to win against one of `other`."""
    return 1 / (1 + 10 ** ((other - rating) / 400))


def win_rates(battles: Sequence[Battle]) -> dict[str, dict[str, float]]:
    """model -> opponent -> share of battles won, ties as half; opponents it never met are absent."""
    names = model_names(battles)
    if not names:
        return {}
    wins = _wins_per_unit(battles, names).sum(0)
    total = wins + wins.T
    return {
        a: {b: float(wins[i, j] / total[i, j]) for j, b in enumerate(names) if total[i, j] > 0}
        for i, a in enumerate(names)
    }


def groups(battles: Sequence[Battle]) -> list[list[str]]:
    """The models in groups that battles connect, largest first; more than one means they cannot all be compared."""
    names = model_names(battles)
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for battle in battles:
        a, b = sorted((root(battle.model_a), root(battle.model_b)))
        parent[b] = a
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(root(name), []).append(name)
    return sorted(found.values(), key=lambda group: (-len(group), group))


def leaderboard(
    battles: Sequence[Battle], seed: int = 0, *, resamples: int = 1000, level: float = 0.95
) -> list[dict[str, Any]]:
    """Rows {model, rating, low, high, battles}, best first, with percentile bootstrap intervals.

    Prompts are resampled, not battles, since answers to one prompt are judged together; the extra battle of each pair
    falls by Beta(1/2, 1/2) in each resample. The order in which battles are given changes nothing. If the battles
    do not connect all models, each row also has `group` (0, 1, ...): compare ratings within a group only.
    """
    names = model_names(battles)
    if not names:
        return []
    units = _wins_per_unit(battles, names)
    met = _met(units.sum(0))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=resamples)  # [R, units]
    extra = np.triu(rng.beta(HALF_WIN, HALF_WIN, size=(resamples, len(names), len(names))), 1)
    extra = extra + np.tril(1 - np.swapaxes(extra, 1, 2), -1)
    wins = np.tensordot(counts.astype(np.float64), units, axes=1) + extra * met
    resampled = MEAN_RATING + SCALE * _fit(wins)  # [R, models]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    rating = bradley_terry(battles)
    fought = {name: sum(name in (battle.model_a, battle.model_b) for battle in battles) for name in names}
    group_of = {name: i for i, group in enumerate(groups(battles)) for name in group}
    rows: list[dict[str, Any]] = [
        {
            "model": name,
            "rating": rating[name],
            "low": min(float(low[i]), rating[name]),
            "high": max(float(high[i]), rating[name]),
            "battles": fought[name],
        }
        for i, name in enumerate(names)
    ]
    if len(set(group_of.values())) > 1:
        rows = [{**row, "group": group_of[row["model"]]} for row in rows]
    return sorted(rows, key=lambda row: (row.get("group", 0), -row["rating"], row["model"]))


def _wins_per_unit(battles: Sequence[Battle], names: Sequence[str]) -> Floats:
    """[units, models, models]: what the row's model won against the column's, per prompt (per battle if one prompt)."""
    index = {name: i for i, name in enumerate(names)}
    ordered = sorted(battles, key=lambda b: (b.prompt, *sorted((b.model_a, b.model_b)), _points(b)))
    prompts = sorted({battle.prompt for battle in battles})
    one_prompt = len(prompts) < 2
    unit_of = {prompt: i for i, prompt in enumerate(prompts)}
    wins = np.zeros((len(ordered) if one_prompt else len(prompts), len(names), len(names)))
    for i, battle in enumerate(ordered):
        unit = i if one_prompt else unit_of[battle.prompt]
        first, second = sorted((battle.model_a, battle.model_b))
        points = _points(battle)
        wins[unit, index[first], index[second]] += points
        wins[unit, index[second], index[first]] += 1 - points
    return wins


def _points(battle: Battle) -> float:
    """What the model whose name sorts first got out of the battle: 1, 0.5 or 0."""
    if battle.winner == "tie":
        return 0.5
    return float((battle.winner == "a") == (battle.model_a < battle.model_b))


def _met(wins: Floats) -> Floats:
    return np.asarray((wins + np.swapaxes(wins, -1, -2)) > 0, dtype=np.float64)


def _fit(wins: Floats, max_steps: int = 100) -> Floats:
    """Log-odds strengths [R, models] of R win matrices [R, models, models] at once, by damped Newton steps.

    Maximises sum_ij wins_ij log sigmoid(s_i - s_j) - RIDGE / 2 |s|^2, which is concave. A step longer than one nat is
    cut to one nat, so that a lopsided matrix cannot overshoot where the curvature vanishes.
    """
    total = wins + np.swapaxes(wins, 1, 2)
    n = wins.shape[1]
    strength = np.zeros(wins.shape[:2])
    eye = np.eye(n)
    for _ in range(max_steps):
        p = 1 / (1 + np.exp(np.clip(strength[:, None, :] - strength[:, :, None], -60, 60)))  # p_ij: i beats j
        gradient = (wins - total * p).sum(2) - RIDGE * strength
        weight = total * p * (1 - p)
        curvature = eye * (weight.sum(2) + RIDGE)[:, :, None] - weight * (1 - eye)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        step /= np.maximum(1.0, np.abs(step).max(1, keepdims=True))
        strength = strength + step
        if np.abs(step).max() < 1e-10:
            break
    return np.asarray(strength, dtype=np.float64)
