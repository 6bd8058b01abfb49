"""eval/diversity.py against closed forms, enumerations and slow twins."""

from __future__ import annotations

import itertools
import math
import random
import re

import numpy as np
import pytest

from stateofgpt.eval.diversity import (
    NameModel,
    distinct_ngrams,
    distinct_share,
    measure_names,
    new_share,
    self_similarity,
    sign_flip_test,
)

STARTS = re.findall("[A-Z][a-z]*", "AlBeCorDaElFreGilHarIsJoKaLorMarNedOrPauQuinRoSamTorUlVicWilYanZel")
ENDS = re.findall("[a-z]+", "a an ard bert da den dra el en ena er ette ian ie in ina is la len lin mund na or ra son")
NAMES = [start + end for start in STARTS for end in ENDS]


def test_distinct_and_new_ignore_case_and_space() -> None:
    assert distinct_share(["Anna", "anna ", "Bo", "Cy"]) == 0.75
    assert new_share(["Anna", "ANNA", "Bo", "Cy"], ["anna", "cy"]) == 0.25
    assert distinct_share([]) == new_share([], ["x"]) == 0.0


def test_distinct_ngrams_count_as_by_hand() -> None:
    assert distinct_ngrams(["aaaa"], 2) == pytest.approx(1 / 3)
    assert distinct_ngrams(["ab", "bc", "ab"], 2) == pytest.approx(2 / 3)
    assert distinct_ngrams([["the", "cat"], ["the", "dog"]], 1) == pytest.approx(3 / 4)
    assert distinct_ngrams(["a"], 2) == 0.0


def test_self_similarity_is_the_mean_over_pairs_and_one_for_equal_items() -> None:
    assert self_similarity(["Mia", "mia", "MIA"]) == pytest.approx(1.0)
    assert self_similarity(["abc", "xyz"]) == 0.0
    items = ["Anna", "Hannah", "Anton", "Bo"]

    def jaccard(x: str, y: str) -> float:
        a, b = ({t[i : i + 2] for i in range(len(t) - 1)} for t in (f"^{x.lower()}$", f"^{y.lower()}$"))
        return len(a & b) / len(a | b)

    slow = np.mean([jaccard(x, y) for x, y in itertools.combinations(items, 2)])
    assert self_similarity(items) == pytest.approx(slow)


def test_the_name_model_is_a_probability_over_all_strings() -> None:
    counts = NameModel(NAMES)._counts
    alphabet = {c for name in NAMES for c in name.lower()} | {"$"}
    for history in ("^^", "^m", "ar", "zz", "qx"):
        seen = sum(counts._probability(c, history) for c in alphabet)
        unseen = counts._probability("@", history)  # all characters never seen share one place
        assert seen + unseen == pytest.approx(1.0)


def test_unseen_real_names_are_plausible_and_noise_is_not() -> None:
    rng = random.Random(0)
    shuffled = rng.sample(NAMES, len(NAMES))
    model = NameModel(shuffled[100:])
    assert sum(map(model.plausible, shuffled[:100])) >= 88  # the threshold lets 95 % of real names through
    noise = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 8))) for _ in range(100)]
    assert sum(map(model.plausible, noise)) <= 10
    assert not model.plausible("")
    assert not model.plausible("Marinamarinamarinamarina")


def test_the_names_table_tells_a_parrot_from_an_inventor() -> None:
    parrot = measure_names(["Alan"] * 50, NAMES)
    assert (parrot["distinct"], parrot["new"], parrot["distinct_new"], parrot["n"]) == (0.02, 0.0, 0.0, 50)
    assert parrot["plausible"] == 1.0
    assert parrot["self_similarity"] == pytest.approx(1.0)
    inventor = measure_names([f"{start}mira" for start in STARTS], NAMES)
    assert inventor["distinct"] == inventor["new"] == inventor["distinct_new"] == 1.0
    assert inventor["self_similarity"] < 0.8
    assert measure_names([], NAMES)["n"] == 0


def test_answers_without_a_name_count_for_nothing() -> None:
    silent = measure_names(["", " ", "", "Elmira"], NAMES)
    assert (silent["n"], silent["distinct"], silent["new"], silent["distinct_new"]) == (4, 0.25, 0.25, 0.25)
    assert silent["self_similarity"] == 0.0


def test_too_few_names_cannot_choose_a_threshold() -> None:
    with pytest.raises(ValueError, match="at least 10 different names"):
        NameModel(["Anna", "Bo"])


def test_the_sign_flip_test_is_exact_on_few_items() -> None:
    a, b = [3.0, 2.5, 4.0, 1.0, 2.0], [1.0, 2.0, 1.0, 2.0, 0.5]
    d = [x - y for x, y in zip(a, b, strict=True)]
    flips = list(itertools.product((1, -1), repeat=5))
    slow = sum(abs(sum(s * x for s, x in zip(f, d, strict=True))) >= abs(sum(d)) for f in flips) / len(flips)
    assert sign_flip_test(a, b) == pytest.approx(slow)
    assert sign_flip_test(b, a) == sign_flip_test(a, b)


def test_the_sampled_sign_flip_test_agrees_with_mcnemar_on_right_and_wrong() -> None:
    a = [1.0] * 30 + [0.0] * 30
    b = [1.0] * 18 + [0.0] * 12 + [1.0] * 4 + [0.0] * 26
    apart = a[:30].count(1.0) - b[:30].count(1.0), b[30:].count(1.0)  # 12 only a has, 4 only b
    n, k = sum(apart), min(apart)
    exact = 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n  # McNemar's: each disagreement is a fair coin
    assert sign_flip_test(a, b, seed=0, permutations=100_000) == pytest.approx(exact, abs=0.004)
    assert sign_flip_test(a, a) == 1.0
    assert sign_flip_test([1.0] * 200, [0.0] * 200, permutations=1000) == pytest.approx(1 / 1001)  # never zero


def test_the_sign_flip_test_finds_nothing_where_there_is_nothing() -> None:
    rng = np.random.default_rng(0)
    p = [sign_flip_test(list(rng.normal(size=30)), list(rng.normal(size=30)), permutations=500) for _ in range(200)]
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.06)


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="same items"):
        sign_flip_test([1.0], [1.0, 2.0])
