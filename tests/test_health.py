"""The health of a reward model: each measure against a case whose answer is known, and verdicts that can fail."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from stateofgpt.data.comparisons import Ranking
from stateofgpt.errors import DataError
from stateofgpt.eval.health import annotators, calibration, health, length_bias, order_agreement, pairs_of, right
from stateofgpt.eval.intervals import clustered_mean, rank_correlation, wilson
from stateofgpt.eval.statistics import spearman
from stateofgpt.report.health import told
from stateofgpt.text.chat import Message


def ranking(prompt: str, *answers: str, ranks: tuple[int, ...] = (1, 2), **more: Any) -> Ranking:
    return Ranking((Message("user", prompt),), tuple((Message("assistant", a),) for a in answers), ranks, **more)


def votes(n: int, *, seed: int = 0, longer_wins: float = 0.5) -> list[Ranking]:
    """Pairs of answers of different lengths, the longer preferred with a probability; either may stand first."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        long, short = "x" * int(rng.integers(20, 40)), "y" * int(rng.integers(1, 19))
        wins, first = rng.random() < longer_wins, rng.random() < 0.5
        answers = (long, short) if first else (short, long)
        out.append(ranking(f"{i}?", *answers, ranks=(1, 2) if wins == first else (2, 1)))
    return out


def judged(rankings: list[Ranking], accuracy: float, *, scale: float = 1.0, seed: int = 1) -> list[list[float]]:
    """Scores that order a share of the pairs as ranked."""
    rng = np.random.default_rng(seed)
    out = []
    for r in rankings:
        gap = scale * (1.0 if rng.random() < accuracy else -1.0)
        out.append([gap / 2 if r.ranks[0] == 1 else -gap / 2, -gap / 2 if r.ranks[0] == 1 else gap / 2])
    return out


# ----------------------------------------------------------------------------------------------------------- intervals


def test_wilson_s_interval_is_that_of_the_textbooks() -> None:
    # Newcombe 1998, table I: 81 of 263 and 1 of 29, method 3
    assert (wilson(81, 263).low, wilson(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert (wilson(1, 29).low, wilson(1, 29).high) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_the_bootstrap_is_wider_where_items_of_one_prompt_say_the_same() -> None:
    rng = np.random.default_rng(0)
    ofprompt = (rng.random(100) < 0.7).astype(float)
    values = np.repeat(ofprompt, 10)
    alone = clustered_mean(values, range(1000))
    together = clustered_mean(values, np.repeat(np.arange(100), 10).tolist())
    exact = wilson(ofprompt.sum(), 100)
    assert together.high - together.low == pytest.approx(exact.high - exact.low, rel=0.15)
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(10), rel=0.15)
    certain = clustered_mean([1.0] * 20, range(20))
    assert certain.high == 1.0 and 0.8 < certain.low < 0.9


def test_the_interval_covers_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        values = (rng.random(150) < 0.62).astype(float)
        found = clustered_mean(values, range(150), seed=trial, resamples=400)
        covered += found.low <= 0.62 <= found.high
    assert 180 <= covered <= 199


def test_the_fast_rank_correlation_is_the_slow_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 40).astype(float).tolist(), rng.normal(size=40).tolist()
        assert rank_correlation(a, b) == pytest.approx(spearman(a, b))
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0


# ------------------------------------------------------------------------------------------------------------ measures


def test_equal_scores_are_half_right_so_a_silent_model_stands_at_chance() -> None:
    rankings = votes(60)
    found = health([[0.0, 0.0]] * 60, rankings)
    assert found["accuracy"]["value"] == 0.5 and found["verdict"]["word"] == "not trusted"


def test_baselines_read_nothing_and_are_what_they_say() -> None:
    rankings = votes(400, longer_wins=0.7)
    found = health(judged(rankings, 0.8), rankings)
    share = np.mean([len(r.completions[r.ranks.index(1)][0].content) >= 20 for r in rankings])
    rules = found["baselines"]
    assert rules["longer"]["accuracy"] == pytest.approx(share)
    assert rules["shorter"]["accuracy"] == pytest.approx(1 - share)
    assert rules["chance"]["accuracy"] == 0.5
    assert rules["first"]["accuracy"] == pytest.approx(np.mean([r.ranks[0] == 1 for r in rankings]))
    gain = rules["longer"]["gain"]
    assert gain["value"] == pytest.approx(found["accuracy"]["value"] - share)
    assert gain["low"] < gain["value"] < gain["high"]


def test_a_file_that_names_the_better_answer_first_has_no_rule_for_the_first() -> None:
    rankings = [ranking(f"{i}?", "good", "bad") for i in range(30)]
    assert "first" not in health([[1.0, 0.0]] * 30, rankings)["baselines"]


def test_probabilities_that_come_true_are_calibrated_and_doubled_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    gap = rng.normal(scale=1.5, size=40_000)
    difference = np.where(rng.random(40_000) < 1 / (1 + np.exp(-gap)), gap, -gap)
    honest, loud = calibration(difference), calibration(4 * difference)
    assert honest["ece"] < 0.01 < 0.1 < loud["ece"]
    assert all(abs(b["confidence"] - b["accuracy"]) < 0.03 for b in honest["curve"])
    assert sum(b["n"] for b in honest["curve"]) == 40_000
    assert honest["log_loss"] < loud["log_loss"] and honest["brier"] < loud["brier"]
    assert calibration(np.array([900.0, -900.0]))["log_loss"] == pytest.approx(450.0)


def test_a_model_that_likes_length_is_found_out() -> None:
    rankings = votes(500, longer_wins=0.6)
    scores = [[float(len(c[0].content)) for c in r.completions] for r in rankings]
    found = length_bias(pairs_of(scores, rankings))
    assert found["longer_better"]["accuracy"]["value"] == 1.0
    assert found["shorter_better"]["accuracy"]["value"] == 0.0
    assert found["model_takes_longer"] == 1.0 and found["people_take_longer"] == pytest.approx(0.6, abs=0.05)
    assert found["correlation"] == pytest.approx(1.0)
    fair = length_bias(pairs_of(judged(rankings, 0.8), rankings))
    assert abs(fair["correlation"]) < 0.25
    verdict = health(scores, rankings)["verdict"]
    assert verdict["word"] == "not trusted" and any("it takes longer for better" in r for r in verdict["reasons"])


def test_margins_are_told_apart() -> None:
    rankings = [ranking(f"{i}?", "a", "bb", margin=1.0 if i % 2 else 1 / 3) for i in range(80)]
    scores = [[1.0, 0.0] if i % 2 or i % 4 == 0 else [0.0, 1.0] for i in range(80)]
    low, high = health(scores, rankings)["by_margin"]
    assert (low["margin"], low["n"], low["accuracy"]["value"]) == (pytest.approx(1 / 3), 40, 0.5)
    assert (high["margin"], high["n"], high["accuracy"]["value"]) == (1.0, 40, 1.0)
    many = [ranking(f"{i}?", "a", "bb", margin=float(i)) for i in range(80)]
    assert [part["n"] for part in health(scores, many)["by_margin"]] == [20, 20, 20, 20]
    assert health(scores, votes(80))["by_margin"] == []


def test_the_annotators_ceiling_is_that_of_one_against_the_others() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(4000) < 0.5
    people = [np.where(rng.random(4000) < 0.8, truth, ~truth) for _ in range(3)]  # each right 80 times in 100
    rankings = [
        ranking(f"{i}?", "a", "b", votes=tuple((1, 2) if person[i] else (2, 1) for person in people))
        for i in range(4000)
    ]
    scores = [[1.0, 0.0] if t else [0.0, 1.0] for t in truth]
    found = annotators(scores, rankings)
    assert found["model"] == pytest.approx([0.8] * 3, abs=0.02)
    assert found["among"] == pytest.approx(0.8**2 + 0.2**2, abs=0.02)
    # two others who agree are right with 0.64 / 0.68; where they differ they say nothing
    agree = 0.64 / 0.68
    assert found["ceiling"] == pytest.approx(0.8 * agree + 0.2 * (1 - agree), abs=0.02)
    assert annotators(scores, [ranking("q", "a", "b")] * 4000) == {}


def test_an_ensemble_of_one_mind_is_never_split() -> None:
    rankings = votes(300)
    same = judged(rankings, 0.8)
    found = health(same, rankings, ensemble=[same, same, same])["ensemble"]
    assert found["split"] == 0.0 and found["accuracy_split"] is None
    others = [judged(rankings, 0.7, seed=s) for s in range(3)]
    split = health(same, rankings, ensemble=others)["ensemble"]
    assert split["split"] == pytest.approx(1 - 0.7**3 - 0.3**3, abs=0.08)
    assert split["accuracy_united"] > split["accuracy_split"]


# ------------------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.slow
def test_a_good_model_is_trusted_and_the_same_on_its_own_votes_is_not() -> None:
    rankings = votes(1000)
    scores = judged(rankings, 0.8, scale=math.log(4))
    found = health(scores, rankings, ceiling=0.81)
    assert found["verdict"]["word"] == "trusted", found["verdict"]
    seen = health(scores, rankings, ceiling=0.81, seen=True)["verdict"]
    assert seen["word"] == "not trusted" and "trained on these votes" in seen["reasons"][0]
    assert health(scores, rankings, ceiling=0.95)["verdict"]["word"] == "with care"
    few = health(scores[:100], rankings[:100])["verdict"]
    assert few["word"] == "with care" and "too few" in few["reasons"][0]
    sure = health(judged(rankings, 0.8, scale=6.0), rankings)["verdict"]
    assert sure["word"] == "with care" and any("too sure" in r for r in sure["reasons"])


def test_no_better_than_length_is_not_trusted_though_far_above_chance() -> None:
    rankings = votes(1000, longer_wins=0.75)
    found = health(judged(rankings, 0.75), rankings)
    assert found["accuracy"]["low"] > 0.7 and found["verdict"]["word"] == "not trusted"


def test_no_pair_is_one_sentence_and_everything_is_json() -> None:
    with pytest.raises(DataError, match="no pair"):
        health([[1.0, 2.0]], [ranking("q", "a", "b", ranks=(1, 1))])
    one = health([[1.0, 0.0]], [ranking("q", "a", "bb", votes=((1, 2), (1, 2)), margin=1.0)])
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    lines = told(one)
    assert lines[0] == "1 pairs of 1 prompts" and any(line.startswith("verdict: ") for line in lines)
    assert right(np.array([1.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_agreement_counts_pairs_of_one_prompt_and_ties_as_half() -> None:
    true = np.array([[0.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    share, pairs = order_agreement(np.array([[0.0, 3.0, 0.0], [1.0, 2.0, 3.0]]), true, 0.0)
    assert share == pytest.approx(0.75) and pairs == 2
    assert order_agreement(np.zeros((1, 3)), true[1:]) == (0.5, 0)
    near = np.array([[0.0, 0.1, 2.0]])  # the near pair counts only where it is asked for
    assert order_agreement(np.array([[0.1, 0.0, 1.0]]), near, 0.0) == (pytest.approx(2 / 3), 3)
    assert order_agreement(np.array([[0.1, 0.0, 1.0]]), near) == (1.0, 2)
