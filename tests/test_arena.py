"""eval/arena.py against a slow twin, known strengths and what must not matter."""

from __future__ import annotations

import math
import random
from typing import Literal

import numpy as np
import pytest

from stateofgpt.eval.arena import (
    Battle,
    bradley_terry,
    expected_score,
    groups,
    leaderboard,
    win_rates,
)

Winner = Literal["a", "b", "tie"]


def _fight(
    rng: random.Random, strengths: dict[str, float], prompts: int, tie_share: float = 0.0, copies: int = 1
) -> list[Battle]:
    """Every pair fights on every prompt; a beats b with the Bradley-Terry probability of their strengths (log-odds)."""
    names = sorted(strengths)
    battles = []
    for prompt in range(prompts):
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                for _ in range(copies):
                    winner: Winner = "a" if rng.random() < 1 / (1 + math.exp(strengths[b] - strengths[a])) else "b"
                    if rng.random() < tie_share:
                        winner = "tie"
                    flipped: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
                    swap = rng.random() < 0.5
                    battles.append(
                        Battle(b, a, flipped[winner], str(prompt)) if swap else Battle(a, b, winner, str(prompt))
                    )
    return battles


def _slow_ratings(battles: list[Battle]) -> dict[str, float]:
    """Plain gradient ascent on the same likelihood, one battle at a time."""
    names = sorted({n for b in battles for n in (b.model_a, b.model_b)})
    points = [(b.model_a, b.model_b, {"a": 1.0, "b": 0.0, "tie": 0.5}[b.winner], 1.0) for b in battles]
    met = sorted({(min(b.model_a, b.model_b), max(b.model_a, b.model_b)) for b in battles})
    points += [(a, b, 0.5, 1.0) for a, b in met]  # the extra drawn battle
    s = dict.fromkeys(names, 0.0)
    for _ in range(20_000):
        gradient = {name: -1e-3 * s[name] for name in names}
        for a, b, won, weight in points:
            error = weight * (won - 1 / (1 + math.exp(s[b] - s[a])))
            gradient[a] += error
            gradient[b] -= error
        if max(map(abs, gradient.values())) < 1e-9:
            break
        for name in names:
            s[name] += gradient[name] * 4 / len(points)
    return {name: 1000 + 400 / math.log(10) * value for name, value in s.items()}


def test_ratings_agree_with_slow_gradient_ascent() -> None:
    battles = _fight(random.Random(3), {"base": -1.0, "rl": 0.8, "sft": 0.2}, prompts=12, tie_share=0.2)
    fast, slow = bradley_terry(battles), _slow_ratings(battles)
    assert fast.keys() == slow.keys()
    for name in fast:
        assert fast[name] == pytest.approx(slow[name], abs=0.01)


def test_known_strengths_are_recovered_and_their_mean_is_1000() -> None:
    strengths = {"base": -1.2, "rl": 1.0, "sft": 0.2}
    ratings = bradley_terry(_fight(random.Random(1), strengths, prompts=4000))
    assert sum(ratings.values()) / 3 == pytest.approx(1000, abs=1e-6)
    for name, strength in strengths.items():
        assert ratings[name] == pytest.approx(1000 + strength * 400 / math.log(10), abs=12)
    assert expected_score(ratings["rl"], ratings["sft"]) == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.02)


def test_two_models_get_the_closed_form_rating() -> None:
    battles = [Battle("x", "y", "a", str(i)) for i in range(30)] + [Battle("y", "x", "a", str(i)) for i in range(10)]
    ratings = bradley_terry(battles)
    # 30.5 wins against 10.5; the ridge moves this by far less than a point
    assert ratings["x"] - ratings["y"] == pytest.approx(400 * math.log10(30.5 / 10.5), abs=0.1)


def test_the_order_of_battles_and_of_the_sides_changes_nothing() -> None:
    battles = _fight(random.Random(5), {"a": 0.0, "b": 0.5, "c": 1.0, "d": -1.0}, prompts=20, tie_share=0.1)
    flipped: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
    turned = [Battle(b.model_b, b.model_a, flipped[b.winner], b.prompt) for b in battles]
    random.Random(0).shuffle(turned)
    assert leaderboard(battles, seed=4) == leaderboard(turned, seed=4)


def test_a_tie_counts_half() -> None:
    ties = [Battle("x", "y", "tie", str(i)) for i in range(10)]
    assert bradley_terry(ties)["x"] == pytest.approx(1000)
    assert win_rates(ties) == {"x": {"y": 0.5}, "y": {"x": 0.5}}
    two_ties = [*ties, Battle("x", "y", "tie", "p"), Battle("x", "y", "tie", "q")]
    win_and_loss = [*ties, Battle("x", "y", "a", "p"), Battle("x", "y", "b", "q")]
    assert bradley_terry(two_ties)["y"] == pytest.approx(bradley_terry(win_and_loss)["y"])


def test_a_model_that_never_lost_stays_finite_and_keeps_an_interval() -> None:
    battles = [Battle("champion", "other", "a", str(i)) for i in range(200)]
    top = leaderboard(battles, seed=0)[0]
    assert top["model"] == "champion"
    assert 1200 < top["rating"] < 2000
    assert top["high"] - top["low"] > 50  # never having lost is no proof of being unbeatable


def test_the_leaderboard_is_sorted_seeded_and_its_intervals_hold_the_rating() -> None:
    battles = _fight(random.Random(2), {"base": -2.0, "rl": 1.5, "sft": 0.0}, prompts=60)
    rows = leaderboard(battles, seed=1)
    assert [row["model"] for row in rows] == ["rl", "sft", "base"]
    assert rows == leaderboard(battles, seed=1)
    assert rows != leaderboard(battles, seed=2)
    assert all(row.keys() == {"model", "rating", "low", "high", "battles"} for row in rows)
    assert all(row["low"] <= row["rating"] <= row["high"] and row["battles"] == 120 for row in rows)
    assert rows[0]["low"] > rows[1]["high"]


def test_intervals_cover_the_true_strength_about_as_often_as_they_say() -> None:
    strengths = {"base": -0.9, "rl": 0.7, "sft": 0.2}
    covered = 0
    for seed in range(60):
        battles = _fight(random.Random(seed), strengths, prompts=80)
        for row in leaderboard(battles, seed=seed, resamples=300):
            covered += row["low"] <= 1000 + strengths[row["model"]] * 400 / math.log(10) <= row["high"]
    assert covered / 180 > 0.88


def test_copies_of_the_same_prompt_do_not_make_an_interval_narrower() -> None:
    battles = _fight(random.Random(8), {"rl": 0.5, "sft": 0.0}, prompts=50)
    once = leaderboard(battles, seed=0)[0]
    thrice = leaderboard(battles * 3, seed=0)[0]  # a judge that repeats itself adds no evidence
    assert thrice["high"] - thrice["low"] == pytest.approx(once["high"] - once["low"], rel=0.15)


def test_models_that_no_battle_connects_are_not_compared() -> None:
    battles = [Battle("a", "b", "a", "1"), Battle("c", "d", "a", "2"), Battle("d", "e", "a", "3")]
    assert groups(battles) == [["c", "d", "e"], ["a", "b"]]
    rows = leaderboard(battles, seed=0)
    assert [(row["model"], row["group"]) for row in rows] == [("c", 0), ("d", 0), ("e", 0), ("a", 1), ("b", 1)]
    for group in (0, 1):
        assert np.mean([row["rating"] for row in rows if row["group"] == group]) == pytest.approx(1000)


def test_no_battles_make_an_empty_leaderboard() -> None:
    assert leaderboard([], seed=0) == []
    assert bradley_terry([]) == {}
    assert win_rates([]) == {}


def test_impossible_battles_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot battle itself"):
        Battle("x", "x", "a")
    with pytest.raises(ValueError, match="winner"):
        Battle("x", "y", "x")  # type: ignore[arg-type]
