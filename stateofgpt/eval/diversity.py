"""How varied a model's output is, and whether two paired sets of scores really differ.

Owns the "hundred invented names" measurements, and a paired test by flips of signs. Pure functions over lists of
strings and floats: knows nothing about models, prompts or files. A name is compared without case and without
surrounding space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FOLDS = 5  # held-out folds that choose the plausibility threshold
PLAUSIBLE_QUANTILE = 0.05  # a name is plausible if it is no odder than all but the oddest 5 % of real, unseen names


# --- names -------------------------------------------------------------------------------------------------------


def _normal(name: str) -> str:
    return " ".join(name.split()).casefold()


def distinct_share(items: Sequence[str]) -> float:
    """Share of items that are different from each other: 1 when none repeats. An empty item counts as none."""
    return len({_normal(item) for item in items} - {""}) / len(items) if items else 0.0


def new_share(items: Sequence[str], known: Iterable[str]) -> float:
    """Share of items that are not among the known ones. An empty item is not new."""
    known_set = {_normal(name) for name in known} | {""}
    return sum(_normal(item) not in known_set for item in items) / len(items) if items else 0.0


def distinct_ngrams(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Distinct-n (Li et al., arXiv 1510.03055): different n-grams over all n-grams; strings count characters."""
    grams = Counter(tuple(seq[i : i + n]) for seq in sequences for i in range(len(seq) - n + 1))
    return len(grams) / grams.total() if grams else 0.0


def self_similarity(items: Sequence[str]) -> float:
    """Mean Jaccard similarity of the character pairs (edges included) of two different items: 1 if all are equal."""
    if len(items) < 2:
        return 0.0
    pairs = [{text[i : i + 2] for i in range(len(text) - 1)} for text in (f"^{_normal(x)}$" for x in items)]
    column = {pair: i for i, pair in enumerate(sorted(set().union(*pairs)))}
    has = np.zeros((len(items), len(column)))
    for row, found in enumerate(pairs):
        has[row, [column[pair] for pair in found]] = 1
    shared = has @ has.T
    sizes = has.sum(1)
    jaccard = shared / (sizes[:, None] + sizes[None, :] - shared)
    return float(jaccard[np.triu_indices(len(items), 1)].mean())


class NameModel:
    """A character trigram model of names that says whether an invented one could pass for a real one.

    The probability of a character given the two before it, smoothed towards the pair and the single character
    (Witten-Bell: a much-varied history trusts its counts less). A name's score is its mean log-probability per
    character, its end included. It is *plausible* if that is at least the 5 % quantile of the scores of real names
    under models that did not see them (five folds), so the threshold comes from the training names alone.
    """

    def __init__(self, names: Iterable[str]) -> None:
        known = sorted({_normal(name) for name in names} - {""})
        if len(known) < 2 * FOLDS:
            raise ValueError(f"a model of names needs at least {2 * FOLDS} different names, got {len(known)}")
        unseen = [
            score
            for fold in range(FOLDS)
            for counts in [_TrigramCounts([x for i, x in enumerate(known) if i % FOLDS != fold])]
            for score in map(counts.score, known[fold::FOLDS])
        ]
        self.threshold = float(np.quantile(unseen, PLAUSIBLE_QUANTILE))
        self._longest = max(map(len, known))
        self._counts = _TrigramCounts(known)

    def score(self, name: str) -> float:
        """Mean log-probability per character, nats."""
        return self._counts.score(_normal(name))

    def plausible(self, name: str) -> bool:
        """Whether the name could pass for a real one; an empty name and one longer than any real one cannot."""
        return 0 < len(_normal(name)) <= self._longest and self.score(name) >= self.threshold


class _TrigramCounts:
    def __init__(self, names: Sequence[str]) -> None:
        self._follow: dict[str, Counter[str]] = {}
        for name in names:
            text = f"^^{name}$"
            for i in range(2, len(text)):
                for history in (text[i - 2 : i], text[i - 1 : i], ""):
                    self._follow.setdefault(history, Counter())[text[i]] += 1
        self._totals = {history: counts.total() for history, counts in self._follow.items()}
        self._alphabet = len(self._follow.get("", ())) + 1

    def _probability(self, character: str, history: str) -> float:
        lower = self._probability(character, history[1:]) if history else 1 / self._alphabet
        counts = self._follow.get(history)
        if counts is None:
            return lower
        return (counts[character] + len(counts) * lower) / (self._totals[history] + len(counts))

    def score(self, name: str) -> float:
        text = f"^^{name}$"
        logs = [math.log(self._probability(text[i], text[i - 2 : i])) for i in range(2, len(text))]
        return sum(logs) / len(logs)


def measure_names(names: Sequence[str], training_names: Iterable[str]) -> dict[str, Any]:
    """The row of the names table: shares of all names given that are distinct, new, and plausible, and more.

    `distinct_new` is the share that is left when repeats and known names are taken out: what a user who asked for
    a hundred new names really got. An empty string stands for an answer in which no name was found: it is in `n` and
    in nothing else.
    """
    known = list(training_names)
    model = NameModel(known)
    fresh = {_normal(name) for name in names} - {_normal(name) for name in known} - {""}
    n = len(names)
    return {
        "n": n,
        "distinct": distinct_share(names),
        "new": new_share(names, known),
        "plausible": sum(map(model.plausible, names)) / n if n else 0.0,
        "distinct_new": len(fresh) / n if n else 0.0,
        "distinct_3grams": distinct_ngrams([_normal(name) for name in names], 3),
        "self_similarity": self_similarity([name for name in names if name.strip()]),
    }


# --- paired tests ------------------------------------------------------------------------------------------------


def _paired(a: Sequence[float], b: Sequence[float]) -> Floats:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired scores need the same items on both sides, got {len(a)} and {len(b)}")
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)


def sign_flip_test(a: Sequence[float], b: Sequence[float], *, permutations: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value that paired a and b differ in mean, by flipping the signs of the differences at random.

    Up to 14 unequal pairs every flip is tried and the value is exact; beyond, the observed flip is one of the draws,
    so it is never 0 (Phipson and Smyth 2010).
    """
    d = _paired(a, b)
    d = d[d != 0]
    if not len(d):
        return 1.0
    observed = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if len(d) <= 14:
        flips = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((np.abs(flips @ d) >= observed).mean())
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(d))
    extreme = 0
    for done in range(0, permutations, chunk):
        size = min(chunk, permutations - done)
        flips = rng.integers(0, 2, size=(size, len(d)), dtype=np.int8) * np.int8(2) - np.int8(1)
        extreme += int((np.abs(flips @ d) >= observed).sum())
    return (extreme + 1) / (permutations + 1)
