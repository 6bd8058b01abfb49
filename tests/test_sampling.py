"""Sampling against a slow scalar twin, transformers' own filters, and the distribution it claims to draw from."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from stateofgpt.errors import ConfigError
from stateofgpt.infer.sampling import Sampler, SamplingParams, derive_seed, uniforms

MASK = (1 << 64) - 1


def twin_uniform(seed: int, position: int) -> float:
    x = seed
    for add in (0, position):
        x = (x + add + 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        x ^= x >> 31
    return (x >> 41) / 2**23


def twin_weights(logits: list[float], p: SamplingParams) -> list[float]:
    """Probabilities after temperature and filters, one token at a time, in double precision."""
    scaled = [x / p.temperature for x in logits]
    top = max(scaled)
    weights = [math.exp(x - top) for x in scaled]
    if p.top_k:
        kth = sorted(weights, reverse=True)[: p.top_k][-1]
        weights = [w if w >= kth else 0.0 for w in weights]
    if p.top_p < 1.0:
        total, gathered, last = sum(weights), 0.0, 0.0
        for w in sorted(weights, reverse=True):
            if gathered >= p.top_p * total:
                break
            gathered, last = gathered + w, w
        weights = [w if w >= last else 0.0 for w in weights]
    weights = [w if w >= p.min_p else 0.0 for w in weights]  # relative to the largest, which is 1
    return [w / sum(weights) for w in weights]


def twin_draw(logits: list[float], p: SamplingParams, position: int) -> tuple[int, float]:
    """The drawn token, and how far the uniform number was from a border between tokens."""
    if p.temperature == 0.0:
        return max(range(len(logits)), key=lambda i: logits[i]), 1.0
    u, low = twin_uniform(p.seed & MASK, position), 0.0
    for i, w in enumerate(twin_weights(logits, p)):
        if u < low + w:
            return i, min(u - low, low + w - u)
        low += w
    raise AssertionError("no token")


def some_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 2.5]),
        top_k=rng.choice([0, 0, 1, 5, 50, 10_000]),
        top_p=rng.choice([1.0, 1.0, 0.05, 0.5, 0.95]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.3, 1.0]),
        seed=rng.choice([0, -1, 7, 2**63 + 5, rng.randrange(2**64)]),
    )


@pytest.mark.parametrize("vocab,spread", [(7, 1.0), (300, 3.0), (1000, 0.2)])
def test_draws_agree_with_a_scalar_twin_row_by_row(vocab: int, spread: float) -> None:
    rng = random.Random(vocab)
    checked = 0
    for _ in range(8):
        params = [some_params(rng) for _ in range(12)]
        logits = torch.randn(12, vocab, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * spread
        positions = [rng.randrange(500) for _ in params]
        tokens, logprobs = Sampler(params)(logits, positions)
        for row, p, position, token, logprob in zip(logits, params, positions, tokens, logprobs, strict=True):
            wanted, margin = twin_draw(row.double().tolist(), p, position)
            if margin > 1e-5:  # else float32 and float64 may round to different sides
                checked += 1
                assert int(token) == wanted, (p, position)
            assert float(logprob) == pytest.approx(float(row.double().log_softmax(-1)[token]), abs=1e-5)
    assert checked > 85


@pytest.mark.parametrize(
    "top_k,top_p,min_p,temperature", [(5, 1.0, 0.0, 1.0), (0, 0.7, 0.0, 0.5), (40, 0.9, 0.02, 1.3)]
)
def test_filters_keep_the_tokens_that_transformers_keeps(
    top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(0)) * 2
    chain = [TemperatureLogitsWarper(temperature)]
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    wanted = LogitsProcessorList(chain)(torch.zeros(20, 1, dtype=torch.long), logits.clone()).softmax(-1)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    found = Sampler([params] * 20)._weights(logits.log_softmax(-1))
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), wanted)


def test_the_vectorised_hash_equals_the_scalar_one_and_looks_uniform() -> None:
    rng = random.Random(0)
    seeds = [0, MASK, *(rng.randrange(2**64) for _ in range(20))]
    positions = [0, 1, *(rng.randrange(10**6) for _ in range(20))]
    found = uniforms(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.uint64))
    assert found.tolist() == [twin_uniform(s, p) for s, p in zip(seeds, positions, strict=True)]
    many = uniforms(np.full(40_000, 3, dtype=np.uint64), np.arange(40_000, dtype=np.uint64)).astype(np.float64)
    assert many.min() >= 0.0 and many.max() < 1.0
    assert abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.02
    other = uniforms(np.full(40_000, 4, dtype=np.uint64), np.arange(40_000, dtype=np.uint64))
    assert abs(np.corrcoef(many, other)[0, 1]) < 0.02


def test_frequencies_are_the_probabilities() -> None:
    n = 20_000
    p = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    tokens, _ = Sampler([SamplingParams(seed=derive_seed(1, i)) for i in range(n)])(p.log().expand(n, 5), [0] * n)
    counts = torch.bincount(tokens, minlength=5).double() / n
    assert counts[2] == 0
    assert (counts - p).abs().max() < 0.015  # 4 standard deviations


def test_no_uniform_number_is_large_enough_to_leave_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = np.float32(1.0 - 2.0**-23)
    monkeypatch.setattr("stateofgpt.infer.sampling.uniforms", lambda seeds, positions: np.full(len(seeds), largest))
    for scale in (1e-3, 1.0, 30.0):
        logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * scale
        logits[:, 3000:] = -torch.inf
        tokens, _ = Sampler([SamplingParams()] * 64)(logits, [0] * 64)
        assert int(tokens.max()) < 3000


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    rng = random.Random(5)
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    params = [some_params(rng) for _ in range(6)]
    together, _ = Sampler(params)(logits, range(6))
    alone = [int(Sampler([p])(logits[i : i + 1], [i])[0]) for i, p in enumerate(params)]
    assert together.tolist() == alone


def test_derived_seeds_differ_by_place_and_fit_64_bits() -> None:
    seeds = {derive_seed(s, i, j) for s in range(10) for i in range(10) for j in range(10)}
    assert len(seeds) == 1000 and all(0 <= s < 2**64 for s in seeds)
    assert derive_seed(3, 1, 2) == derive_seed(derive_seed(3, 1), 2)


@pytest.mark.parametrize(
    "field,value",
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 2.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
