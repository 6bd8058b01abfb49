"""train/scaling.py against the worked numbers of the papers and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stateofgpt.train.scaling import (
    EPOCH,
    HOFFMANN,
    KAPLAN,
    PUBLISHED,
    flops_per_token,
)

GPT3, LLAMA = PUBLISHED["GPT-3 175B"], PUBLISHED["LLaMA-65B"]


def test_epochs_refit_ranks_llama_above_gpt3_and_kaplan_the_other_way_round() -> None:
    assert EPOCH.loss(GPT3.n_params, GPT3.tokens) == pytest.approx(2.009, abs=5e-4)
    assert EPOCH.loss(LLAMA.n_params, LLAMA.tokens) == pytest.approx(1.976, abs=5e-4)
    assert KAPLAN.loss(GPT3.n_params, GPT3.tokens) == pytest.approx(1.661, abs=5e-4)
    assert KAPLAN.loss(LLAMA.n_params, LLAMA.tokens) == pytest.approx(1.702, abs=5e-4)


def test_the_optimum_at_llamas_compute_is_the_published_one() -> None:
    best = EPOCH.optimum(LLAMA.flops)
    assert best.n_params == pytest.approx(70e9, rel=0.01)
    assert best.tokens == pytest.approx(1.29e12, rel=0.01)
    rounded = HOFFMANN.optimum(LLAMA.flops)
    assert rounded.n_params == pytest.approx(31e9, rel=0.02)
    assert rounded.tokens == pytest.approx(2.9e12, rel=0.02)


@pytest.mark.parametrize(("flops", "n_params", "tokens"), [(1e15, 2.3e6, 71e6), (1e16, 7.6e6, 219e6)])
def test_small_budgets_buy_small_models(flops: float, n_params: float, tokens: float) -> None:
    best = EPOCH.optimum(flops)
    assert best.n_params == pytest.approx(n_params, rel=0.02)
    assert best.tokens == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize("law", [EPOCH, HOFFMANN])
@pytest.mark.parametrize("flops", [1e13, 1e17, 1e24])
def test_no_other_split_of_the_budget_is_better_than_the_optimum(law: object, flops: float) -> None:
    assert law in (EPOCH, HOFFMANN)
    chosen = EPOCH if law is EPOCH else HOFFMANN
    best = chosen.optimum(flops)
    sizes = best.n_params * np.logspace(-3, 3, 2001)
    losses = [chosen.loss(float(n), flops / (6 * float(n))) for n in sizes]
    assert best.loss <= min(losses) + 1e-12
    assert 6 * best.n_params * best.tokens == pytest.approx(flops)


def test_flops_per_token_count_matrix_products() -> None:
    # GPT-3 (96 layers, 12288 wide, context 2048): attention's own products are under 3 % of 6 N.
    plain = flops_per_token(175e9)
    assert plain == 6 * 175e9
    extra = flops_per_token(175e9, n_layer=96, d_attention=12288, context=2048) - plain
    # Independent count, backward = 2 forward: scores and mix, 2 FLOPs per multiply-add, half the pairs are causal.
    forward = 96 * 2 * 2 * 2048 * 12288 / 2
    assert extra == pytest.approx(3 * forward)
    assert 0.01 < extra / plain < 0.03


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_numbers_are_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match="tokens must be a positive finite number"):
        EPOCH.loss(1e6, bad)
    with pytest.raises(ValueError, match="flops"):
        EPOCH.optimum(bad)
