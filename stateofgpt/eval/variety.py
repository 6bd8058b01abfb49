"""How different a model's answers are: to one prompt asked again and again, and to different prompts.

Owns distinct n-grams adjusted for length, self-BLEU, and the two ways of grouping answers. Pure functions over
sequences of tokens: knows nothing of models, tokenizers or files. Reinforcement learning costs the first kind of
variety most and may cost the second (Kirk et al., arXiv 2310.06452, whose two groupings these are).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import fmean

Tokens = Sequence[Hashable]
LENGTHS = (1, 2, 3)  # of the n-grams that distinctness is averaged over
BLEU_LENGTHS = 4


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[Hashable, ...]]:
    """How often each n-gram occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def expected_distinct(total: int, possible: float) -> float:
    """Expected number of different values among `total` uniform draws from `possible` ones: V (1 - (1 - 1/V)^C)."""
    if possible <= 1:
        return min(float(total), 1.0)
    return -possible * math.expm1(total * math.log1p(-1.0 / possible))


def adjusted_distinct(sequences: Sequence[Tokens], n: int, vocabulary: int) -> float:
    """Different n-grams over how many a uniform text of as many n-grams would have (EAD, arXiv 2202.13587).

    Plain distinct-n falls with length whatever is said: a longer text has more chances to repeat. The paper counts
    single tokens of a vocabulary of V; for n-grams there are V^n possible values. 1 is as varied as chance, 0 where no
    sequence has an n-gram; it may pass 1 a little, as a count passes its expectation.
    """
    grams: Counter[tuple[Hashable, ...]] = Counter()
    for sequence in sequences:
        grams.update(ngrams(sequence, n))
    total = grams.total()
    return len(grams) / expected_distinct(total, float(vocabulary) ** n) if total else 0.0


def mean_adjusted_distinct(sequences: Sequence[Tokens], vocabulary: int) -> float:
    """`adjusted_distinct`, mean over single tokens, pairs and triples."""
    return fmean(adjusted_distinct(sequences, n, vocabulary) for n in LENGTHS)


def self_bleu(sequences: Sequence[Tokens], lengths: int = BLEU_LENGTHS) -> float:
    """Mean over the sequences of BLEU against all the others: 1 where all say the same (Zhu et al., arXiv 1802.01886).

    BLEU (Papineni et al. 2002): the geometric mean of clipped n-gram precisions for n up to `lengths`, with one added
    to matches and total of each n above 1 (Lin and Och 2004), times the brevity penalty for the reference closest in
    length, the shorter of two. 0 for fewer than two sequences; an empty sequence scores 0.
    """
    if len(sequences) < 2:
        return 0.0
    logs = [0.0] * len(sequences)
    matched_any = [bool(s) for s in sequences]
    for n in range(1, lengths + 1):
        counts = [ngrams(sequence, n) for sequence in sequences]
        highest = _two_highest(counts)
        for i, own in enumerate(counts):
            matches = sum(min(c, _of_others(highest[gram], i)) for gram, c in own.items())
            total, smooth = own.total(), n > 1
            if not matches + smooth:
                matched_any[i] = False
            else:
                logs[i] += math.log((matches + smooth) / (total + smooth)) / lengths
    sizes = [len(sequence) for sequence in sequences]
    scores = [
        math.exp(logs[i] + min(0.0, 1.0 - _closest(sizes, i) / sizes[i])) if matched_any[i] else 0.0
        for i in range(len(sequences))
    ]
    return fmean(scores)


Highest = tuple[int, int, int]  # the most a gram occurs in one sequence, which, and the most in another one


def _two_highest(counts: Sequence[Counter[tuple[Hashable, ...]]]) -> dict[tuple[Hashable, ...], Highest]:
    found: dict[tuple[Hashable, ...], Highest] = {}
    for i, own in enumerate(counts):
        for gram, c in own.items():
            most, where, second = found.get(gram, (0, -1, 0))
            found[gram] = (c, i, most) if c > most else (most, where, max(second, c))
    return found


def _of_others(highest: Highest, i: int) -> int:
    most, where, second = highest
    return second if where == i else most


def _closest(sizes: Sequence[int], i: int) -> int:
    """The length of the other sequence that is closest to that of sequence i; of two, the shorter."""
    return min((size for j, size in enumerate(sizes) if j != i), key=lambda size: (abs(size - sizes[i]), size))


def variety(answers: Sequence[Sequence[Tokens]], vocabulary: int) -> dict[str, float]:
    """Both kinds of variety of `answers`, K to each of P prompts, as tokens of a vocabulary.

    `prompt_*`: among the K answers to one prompt, mean over prompts. `across_*`: among the k-th answers to all prompts,
    mean over k. `*_distinct` is the share of different answers, `*_ngrams` the expectation-adjusted distinct n-grams,
    `*_self_bleu` what it says. ValueError where the prompts have no or differently many answers.
    """
    counts = {len(own) for own in answers}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"every prompt needs the same number of answers, at least one; got {sorted(counts)}")
    columns = [list(column) for column in zip(*answers, strict=True)]
    out = {}
    for name, groups in (("prompt", answers), ("across", columns)):
        out[f"{name}_distinct"] = fmean(len({tuple(a) for a in group}) / len(group) for group in groups)
        out[f"{name}_ngrams"] = fmean(mean_adjusted_distinct(group, vocabulary) for group in groups)
        out[f"{name}_self_bleu"] = fmean(self_bleu(group) for group in groups)
    return out
