"""eval/variety.py against slow twins, closed forms and a simulation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from stateofgpt.eval.variety import adjusted_distinct, expected_distinct, self_bleu, variety


def texts(rng: random.Random, n: int, vocabulary: int, longest: int = 12) -> list[list[int]]:
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(0, longest))] for _ in range(n)]


# ------------------------------------------------------------------------------------------------- distinct n-grams


def slow_adjusted(sequences: Sequence[Sequence[int]], n: int, vocabulary: int) -> float:
    """The formula with the expectation summed value by value: each of V^n values is missed with (1 - 1/V^n)^C."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s)) if i + n <= len(s)]
    if not grams:
        return 0.0
    missed = 1.0
    for _ in grams:
        missed *= 1 - 1 / vocabulary**n
    return len(set(grams)) / sum(1 - missed for _ in range(vocabulary**n))


def test_adjusted_distinct_agrees_with_the_sum_over_all_values() -> None:
    rng = random.Random(0)
    for trial in range(40):
        vocabulary, n = rng.randint(2, 9), rng.randint(1, 3)
        sequences = texts(rng, rng.randint(1, 6), vocabulary)
        expected = slow_adjusted(sequences, n, vocabulary)
        assert adjusted_distinct(sequences, n, vocabulary) == pytest.approx(expected, rel=1e-9), trial


def test_the_expected_number_is_that_of_a_simulation() -> None:
    rng = random.Random(1)
    for total, possible in ((5, 7), (40, 20), (3, 1000)):
        drawn = [len({rng.randrange(possible) for _ in range(total)}) for _ in range(4000)]
        assert expected_distinct(total, possible) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)
    assert expected_distinct(9, 1) == 1.0 and expected_distinct(0, 1) == 0.0
    assert expected_distinct(1000, 1e18) == pytest.approx(1000)  # no cancellation where V is huge


def test_length_alone_does_not_change_it_as_it_changes_plain_distinct_n() -> None:
    rng = random.Random(2)
    found, plain = [], []
    for length in (50, 400):
        sequences = [[rng.randrange(100) for _ in range(length)]]
        found.append(adjusted_distinct(sequences, 1, 100))
        plain.append(len(set(sequences[0])) / length)
    assert found == pytest.approx([1.0, 1.0], abs=0.12)
    assert plain[0] > 2 * plain[1]


# -------------------------------------------------------------------------------------------------------- self-BLEU


def slow_bleu(candidate: Sequence[int], references: Sequence[Sequence[int]]) -> float:
    """BLEU-4 of one sequence, by lists and counting."""
    if not candidate:
        return 0.0
    product = 1.0
    for n in (1, 2, 3, 4):
        grams = [list(candidate[i : i + n]) for i in range(max(0, len(candidate) - n + 1))]
        matches, seen = 0, []
        for gram in grams:
            if gram in seen:
                continue
            seen.append(gram)
            most = 0
            for reference in references:
                there = sum(list(reference[i : i + n]) == gram for i in range(max(0, len(reference) - n + 1)))
                most = max(most, there)
            matches += min(grams.count(gram), most)
        total = len(grams)
        if n > 1:
            matches, total = matches + 1, total + 1
        product *= matches / total if total else 0.0
    sizes = sorted((abs(len(r) - len(candidate)), len(r)) for r in references)
    closest = sizes[0][1]
    penalty = 1.0 if len(candidate) > closest else math.exp(1 - closest / len(candidate))
    return penalty * product**0.25


def test_self_bleu_is_the_mean_bleu_against_the_others() -> None:
    rng = random.Random(3)
    for trial in range(60):
        sequences = texts(rng, rng.randint(2, 6), rng.randint(2, 5))
        each = [slow_bleu(s, [o for j, o in enumerate(sequences) if j != i]) for i, s in enumerate(sequences)]
        assert self_bleu(sequences) == pytest.approx(sum(each) / len(each), abs=1e-12), trial


def test_equal_answers_have_self_bleu_one_and_answers_with_nothing_in_common_zero() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1.0)
    assert self_bleu([[1, 2, 3], [4, 5, 6], [7, 8, 9]]) == 0.0
    assert self_bleu([[1, 2]]) == 0.0 and self_bleu([[], []]) == 0.0


# ------------------------------------------------------------------------------------------------------ both groupings


def test_variety_within_and_across_prompts_are_told_apart() -> None:
    rng = random.Random(4)
    draw = lambda: [rng.randrange(500) for _ in range(12)]  # noqa: E731
    collapsed = [[own] * 4 for own in (draw() for _ in range(5))]  # one answer a prompt, another for each prompt
    found = variety(collapsed, 500)
    assert found["prompt_distinct"] == 0.25 and found["across_distinct"] == 1.0
    assert found["prompt_self_bleu"] == pytest.approx(1.0) and found["across_self_bleu"] < 0.3
    assert found["prompt_ngrams"] < 0.5 * found["across_ngrams"]
    same = variety([list(column) for column in zip(*collapsed, strict=True)], 500)  # the other way round
    assert same["across_distinct"] == pytest.approx(0.25) and same["prompt_distinct"] == 1.0


@pytest.mark.parametrize("wrong", [[], [[]], [[[1]], [[1], [2]]]])
def test_prompts_without_equally_many_answers_are_refused(wrong: list[list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="same number"):
        variety(wrong, 10)
