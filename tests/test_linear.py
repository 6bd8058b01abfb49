"""The head on fixed features: against a plain minimiser, its folds, and what it is told by votes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stateofgpt.data.comparisons import Ranking
from stateofgpt.data.preferences import text_key
from stateofgpt.rl.linear import choose, fit_heads, folds_of, judged, redrawn
from stateofgpt.text.chat import Message


def ranking(prompt: str, ranks: tuple[int, ...], votes: tuple[tuple[int, ...], ...] = ()) -> Ranking:
    answers = tuple((Message("assistant", str(i)),) for i in range(len(ranks)))
    return Ranking((Message("user", prompt),), answers, ranks, votes=votes)


def synthetic(n: int, dim: int, noise: float, seed: int = 0) -> tuple[list[Ranking], np.ndarray, np.ndarray]:
    """Rankings whose truth is linear in features, with Bradley-Terry noise."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=dim)
    x = rng.normal(size=(2 * n, dim))
    p = 1 / (1 + np.exp(-(x[0::2] - x[1::2]) @ truth / noise))
    ranks = [(1, 2) if rng.random() < q else (2, 1) for q in p]
    return [ranking(f"{i}?", r) for i, r in enumerate(ranks)], x, truth


def test_the_head_is_the_minimum_that_plain_gradient_descent_finds() -> None:
    rankings, x, _ = synthetic(60, 5, 1.0)
    x = x * np.array([1.0, 10.0, 0.1, 3.0, 1.0])  # the scale of a feature does not matter
    pairs = judged(rankings)
    head = fit_heads(x, pairs, (0.3, 0.05))[1]
    d = torch.tensor(x[pairs.first] - x[pairs.second])
    scale = (d**2).mean(0).sqrt()
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits((d / scale) @ w, torch.tensor(pairs.target))
        loss = loss + 0.05 / 2 * (w @ w)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert head == pytest.approx((w.detach() / scale).numpy(), rel=1e-4, abs=1e-6)


def test_it_finds_the_truth_behind_noisy_votes_and_ignores_what_never_differs() -> None:
    rankings, x, truth = synthetic(1500, 8, 0.5)
    x = np.concatenate((x, np.ones((len(x), 1))), axis=1)
    head = fit_heads(x, judged(rankings), (0.001,))[0]
    assert head[-1] == 0.0
    assert np.corrcoef(head[:-1], truth)[0, 1] > 0.98


def test_targets_are_shares_of_votes_and_a_prompt_counts_once() -> None:
    voted = ranking("a", (1, 2), ((1, 2), (1, 2), (2, 1), (1, 1)))
    pairs = judged([voted, ranking("b", (1, 1)), ranking("c", (3, 1, 2))])
    assert pairs.target.tolist() == [0.625, 0.5, 0.0, 0.0, 1.0]
    assert pairs.weight.tolist() == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 3])
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))[-1] == (5, 6)
    assert pairs.of(np.array([1])).target.tolist() == [0.5]


def test_no_prompt_is_in_two_folds_and_every_ranking_in_one() -> None:
    rankings = [ranking(f"{i // 3}?", (1, 2)) for i in range(50)]
    for k in (2, 5, 7):
        folds = folds_of(rankings, k, 3)
        assert sorted(np.concatenate(folds).tolist()) == list(range(50)) and len(folds) == k
        prompts = [{text_key(rankings[i].prompt) for i in fold} for fold in folds]
        assert all(not a & b for n, a in enumerate(prompts) for b in prompts[:n])
        assert max(map(len, folds)) - min(map(len, folds)) <= 3
    assert len(folds_of(rankings[:6], 5, 0)) == 2  # no more folds than prompts


def test_the_choice_prefers_features_that_tell_and_more_strength_where_all_is_noise() -> None:
    rankings, x, _ = synthetic(300, 6, 0.3)
    noise = np.random.default_rng(9).normal(size=(len(x), 40))
    among = np.arange(len(rankings))
    chosen = choose([noise, x], rankings, among, judged(rankings), 0)
    assert chosen.column == 1 and chosen.loss < 0.4
    hopeless = choose([noise], rankings, among, judged(rankings), 0)
    assert hopeless.strength >= 1.0 and hopeless.loss == pytest.approx(np.log(2), abs=0.06)


def test_another_draw_of_the_data_counts_some_twice_and_some_not_at_all() -> None:
    rankings = [ranking(f"{i}?", (1, 2)) for i in range(40)]
    drawn = redrawn(judged(rankings), np.arange(5, 40), 1)
    assert drawn.weight.sum() == 35 and set(drawn.weight.tolist()) >= {0.0, 1.0, 2.0}
    assert drawn.ranking.min() == 5
