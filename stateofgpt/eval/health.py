"""Whether a reward model can be trusted: its scores beside people's votes, trivial rules and the votes' own noise.

Owns the measures and the verdict. Pure functions of scores and rankings: knows nothing of models, files or pages.
Equal scores count as half right everywhere, so that a model that says nothing stands at chance.

Calibration: under Bradley-Terry the probability that the higher-scored answer is preferred is sigmoid of the scores'
difference. The expected calibration error is over bins of equal size (Naeini et al. 2015; equal sizes as in
Nguyen and O'Connor, arXiv 1508.05154).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stateofgpt.data.comparisons import Ranking
from stateofgpt.data.preferences import text_key
from stateofgpt.errors import DataError
from stateofgpt.eval.intervals import Floats, clustered_mean, rank_correlation
from stateofgpt.eval.trust import verdict
from stateofgpt.text.chat import Conversation

BINS = 10
FEWEST_IN_BIN = 20
APART = 0.5  # standard deviations: closer true scores differ by some characters of length, not in what was said
Scores = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Pairs:
    """Every ordered pair of some rankings, the better answer first; all arrays have one entry a pair."""

    difference: Floats  # score of the better less score of the worse
    longer: Floats  # characters of the better less characters of the worse
    first: Floats  # 1 where the better stands first in its row
    margin: Floats  # NaN where unknown
    group: list[str]  # the prompt
    where: list[tuple[int, int, int]]  # (ranking, better, worse)

    def __len__(self) -> int:
        return len(self.where)


def pairs_of(scores: Scores, rankings: Sequence[Ranking]) -> Pairs:
    """The pairs of `rankings` with the scores of their completions."""
    rows: list[tuple[float, float, float, float]] = []
    group: list[str] = []
    where: list[tuple[int, int, int]] = []
    for number, (row, ranking) in enumerate(zip(scores, rankings, strict=True)):
        key = text_key(ranking.prompt)
        lengths = [length(completion) for completion in ranking.completions]
        margin = np.nan if ranking.margin is None else ranking.margin
        for i, j in ranking.pairs():
            rows.append((row[i] - row[j], lengths[i] - lengths[j], float(i < j), margin))
            group.append(key)
            where.append((number, i, j))
    table = np.array(rows, np.float64).reshape(-1, 4)
    return Pairs(table[:, 0], table[:, 1], table[:, 2], table[:, 3], group, where)


def length(completion: Conversation) -> int:
    """Characters of what was answered."""
    return sum(len(message.content) for message in completion)


def right(difference: Floats) -> Floats:
    """1 where the better scored higher, 0.5 where both scored alike, else 0."""
    out: Floats = (np.sign(difference) + 1.0) / 2.0
    return out


def health(
    scores: Scores,
    rankings: Sequence[Ranking],
    *,
    ceiling: float | None = None,
    ensemble: Sequence[Scores] = (),
    seen: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything this file measures, as JSON; `ceiling` is a known bound, as of simulated votes, else it comes from the
    annotators where there are several. `ensemble` are scores by models trained alike. `seen`: the votes were trained
    on. DataError when no ranking has a pair."""
    pairs = pairs_of(scores, rankings)
    if not len(pairs):
        raise DataError("there is no pair of answers of which one was preferred, so nothing can be measured")
    hits = right(pairs.difference)
    people = annotators(scores, rankings)
    if ceiling is None and people:
        ceiling = people["ceiling"]
    found: dict[str, Any] = {
        "n_pairs": len(pairs),
        "n_prompts": len(set(pairs.group)),
        "accuracy": clustered_mean(hits, pairs.group, seed).to_json(),
        "baselines": baselines(pairs, seed),
        "ceiling": ceiling,
        "by_margin": by_margin(pairs, seed),
        "calibration": calibration(pairs.difference),
        "length": length_bias(pairs, seed),
        "annotators": people,
        "ensemble": disagreement(pairs, ensemble),
        "seen": seen,
    }
    return {**found, "verdict": verdict(found)}


# ----------------------------------------------------------------------------------------------------- beside what


def baselines(pairs: Pairs, seed: int = 0) -> dict[str, Any]:
    """Rules that read nothing, by name: their accuracy, and by how much the model is better, resampled together.

    `first` is left out where a file always names the better answer first.
    """
    hits = right(pairs.difference)
    rules = {
        "chance": np.full(len(pairs), 0.5),
        "longer": right(pairs.longer),
        "shorter": right(-pairs.longer),
    }
    if 0.0 < pairs.first.mean() < 1.0:
        rules["first"] = pairs.first
    return {
        name: {
            "accuracy": float(rule.mean()),
            "gain": clustered_mean(hits - rule, pairs.group, seed).to_json(),
        }
        for name, rule in rules.items()
    }


def by_margin(pairs: Pairs, seed: int = 0) -> list[dict[str, Any]]:
    """Accuracy at each value of the margin (quarters where there are many values); empty where none is known."""
    known = ~np.isnan(pairs.margin)
    values = np.unique(pairs.margin[known])
    if len(values) < 2:
        return []
    if len(values) > 6:
        edges = np.quantile(pairs.margin[known], (0.25, 0.5, 0.75))
        bins = np.digitize(pairs.margin, edges)
    else:
        bins = np.searchsorted(values, np.nan_to_num(pairs.margin, nan=0.0))
    out = []
    for b in np.unique(bins[known]):
        inside = known & (bins == b)
        where = np.flatnonzero(inside)
        out.append({
            "margin": float(pairs.margin[inside].mean()),
            "n": len(where),
            "accuracy": clustered_mean(
                right(pairs.difference[inside]), [pairs.group[i] for i in where], seed
            ).to_json(),
        })  # fmt: skip
    return out


def calibration(difference: Floats) -> dict[str, Any]:
    """Confidence in the answer scored higher against how often that was right, in bins of equal size; with their mean
    distance (`ece`), Brier's score and the log loss of the votes in nats."""
    confidence = 1.0 / (1.0 + np.exp(-np.clip(np.abs(difference), 0, 500)))
    hits = right(difference)
    order = np.argsort(confidence, kind="stable")
    n_bins = max(1, min(BINS, len(order) // FEWEST_IN_BIN))
    curve = [
        {"confidence": float(confidence[part].mean()), "accuracy": float(hits[part].mean()), "n": len(part)}
        for part in np.array_split(order, n_bins)
    ]
    return {
        "curve": curve,
        "ece": sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in curve) / len(order),
        "confidence": float(confidence.mean()),
        "brier": float(np.mean((1.0 / (1.0 + np.exp(-np.clip(difference, -500, 500))) - 1.0) ** 2)),
        "log_loss": float(np.mean(np.logaddexp(0.0, -difference))),
    }


def length_bias(pairs: Pairs, seed: int = 0) -> dict[str, Any]:
    """Accuracy where the better answer is the longer and where it is the shorter one, how often the model and people
    take the longer one, and Spearman's correlation of differences in score and in length."""
    differ = pairs.longer != 0
    toward = np.where(pairs.longer > 0, pairs.difference, -pairs.difference)[differ]  # score of the longer less other's

    def part(inside: NDArray[np.bool_]) -> dict[str, Any]:
        where = np.flatnonzero(inside)
        hits = right(pairs.difference[inside])
        return {"n": len(where), "accuracy": clustered_mean(hits, [pairs.group[i] for i in where], seed).to_json()}

    return {
        "longer_better": part(pairs.longer > 0),
        "shorter_better": part(pairs.longer < 0),
        "model_takes_longer": float(right(toward).mean()) if differ.any() else 0.5,
        "people_take_longer": float((pairs.longer[differ] > 0).mean()) if differ.any() else 0.5,
        "correlation": _symmetric_correlation(pairs.difference, pairs.longer),
    }


def _symmetric_correlation(a: Floats, b: Floats) -> float:
    """Correlation of two kinds of differences whatever the order within a pair: each pair counts both ways round."""
    return rank_correlation(np.concatenate((a, -a)), np.concatenate((b, -b)))


# ----------------------------------------------------------------------------------------------------------- people


def annotators(scores: Scores, rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Where several people ranked the same answers: how the model agrees with each, how they agree with one another,
    and the ceiling. Empty where no row has two votes.

    Pairs that a side calls a tie say nothing of it. The ceiling is how often one person agrees with the majority of
    the others: a model that were as good as a further person would stand there.
    """
    voted = [(row, r) for row, r in zip(scores, rankings, strict=True) if len(r.votes) > 1]
    if not voted:
        return {}
    most = max(len(r.votes) for _, r in voted)
    model: list[list[float]] = [[] for _ in range(most)]
    others: list[list[float]] = [[] for _ in range(most)]
    among: list[float] = []
    for row, ranking in voted:
        for i, j in combinations(range(len(ranking.ranks)), 2):
            said = [float(np.sign(vote[j] - vote[i])) for vote in ranking.votes]  # 1: i is better
            score = float(np.sign(row[i] - row[j]))
            among += [float(a == b) for n, a in enumerate(said) for b in said[:n]]
            for person, choice in enumerate(said):
                if not choice:
                    continue
                model[person].append((choice * score + 1.0) / 2.0)
                if rest := float(np.sign(sum(said) - choice)):
                    others[person].append(float(rest == choice))
    pooled = [hit for person in others for hit in person]
    return {
        "model": [float(np.mean(hits)) if hits else None for hits in model],
        "others": [float(np.mean(hits)) if hits else None for hits in others],
        "among": float(np.mean(among)),
        "ceiling": float(np.mean(pooled)) if pooled else None,
    }


def disagreement(pairs: Pairs, ensemble: Sequence[Scores]) -> dict[str, Any]:
    """How models trained alike on other draws of the data differ: the share of pairs on which they are not of one
    mind, and the majority's accuracy on those and on the others. Empty for fewer than two."""
    if len(ensemble) < 2:
        return {}
    votes = np.array([[np.sign(rows[n][i] - rows[n][j]) for n, i, j in pairs.where] for rows in ensemble])
    united = np.abs(votes.sum(0)) == len(ensemble)
    hits = right(votes.sum(0))
    return {
        "models": len(ensemble),
        "split": float(1.0 - united.mean()),
        "accuracy_united": float(hits[united].mean()) if united.any() else None,
        "accuracy_split": float(hits[~united].mean()) if (~united).any() else None,
    }


# ----------------------------------------------------------------------------------------------- where truth is known


def order_agreement(scores: Floats, true: Floats, apart: float = APART) -> tuple[float, int]:
    """Of answers to the same prompts, by row: the share of pairs with true scores more than `apart` standard deviations
    apart that `scores` order as they are, equal scores as half, and how many such pairs there are (with none, 0.5)."""
    least = apart * float(true.std())
    hits = pairs = 0.0
    for mine, gold in zip(scores, true, strict=True):
        better: NDArray[np.bool_] = gold[:, None] > gold[None, :] + max(least, 1e-9)
        pairs += float(better.sum())
        hits += float((better * right(mine[:, None] - mine[None, :])).sum())
    return (hits / pairs if pairs else 0.5), int(pairs)
