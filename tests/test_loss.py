"""The language-model loss: against log-probabilities added up by hand, and against finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stateofgpt.infer.score import score
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.loss import Batch, Dtype, LanguageModelLoss
from stateofgpt.train.optim import MuonAdamW, OptimConfig

CONFIG = GPTConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, intermediate_size=24, max_position_embeddings=12,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_model(seed: int = 0, config: GPTConfig = CONFIG) -> GPT:
    model, g = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.3, generator=g)
    return model


GPT2 = replace(CONFIG, arch="gpt2", num_key_value_heads=2)
FAMILIES = pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["qwen3", "gpt2"])


def random_batch(rows: int = 3, seed: int = 1) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 40, (rows, 13))
    return Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy(), (rng.random((rows, 12)) < 0.4).astype(np.float32))


@FAMILIES
def test_it_is_the_sum_of_minus_log_probabilities_where_weights_are_one(config: GPTConfig) -> None:
    model, batch = random_model(config=config), random_batch()
    by_hand = 0.0
    for ids, targets, weights in zip(batch.ids, batch.targets, batch.weights, strict=True):
        for t in range(12):  # every prediction on its own, from the tokens before it
            logits = model(ids[None, : t + 1])[0, -1].detach().double()
            by_hand -= float(weights[t]) * float(logits[targets[t]] - torch.logsumexp(logits, 0))
    assert LanguageModelLoss()(model, batch).item() == pytest.approx(by_hand, rel=1e-5)


def test_it_agrees_with_what_the_engine_side_scores() -> None:
    model, rows = random_model(), random_batch()
    ones = Batch(rows.ids, rows.targets, torch.ones_like(rows.weights))
    texts = [[*i.tolist(), int(t[-1])] for i, t in zip(rows.ids, rows.targets, strict=True)]
    total = -sum(sum(row) for row in score(model, texts))
    assert LanguageModelLoss()(model, ones).item() == pytest.approx(total, rel=1e-5)


@FAMILIES
def test_its_gradient_is_that_of_finite_differences(config: GPTConfig) -> None:
    model, batch = random_model(config=config).double(), random_batch()
    loss = LanguageModelLoss()  # its cross-entropy is in float32: a central difference of 1e-2 is above that noise
    loss(model, batch).backward()
    g = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=p.dtype)
        direction /= direction.norm()
        assert p.grad is not None
        slope = float((p.grad * direction).sum())
        values = []
        for side in (1e-2, -1e-2):
            with torch.no_grad():
                p.add_(direction, alpha=side)
                values.append(loss(model, batch).item())
                p.sub_(direction, alpha=side)
        assert slope == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2, abs=3e-2), name


def test_targets_without_weight_cannot_matter() -> None:
    model, batch = random_model(), random_batch()
    changed = torch.where(batch.weights > 0, batch.targets, (batch.targets + 7) % 40)
    same = Batch(batch.ids, changed, batch.weights)
    assert torch.equal(LanguageModelLoss()(model, batch), LanguageModelLoss()(model, same))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_without_targets_costs_nothing_and_gives_no_nan(dtype: str) -> None:
    model, batch = random_model(), random_batch()
    empty = Batch(batch.ids, batch.targets, torch.zeros_like(batch.weights))
    assert empty.weight == 0.0
    value = LanguageModelLoss(dtype)(model, empty)  # type: ignore[arg-type]
    value.backward()
    assert value.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_one_row_of_one_token_is_enough() -> None:
    batch = Batch.of(np.array([[5]]), np.array([[6]]))
    assert batch.weight == 1.0
    model = random_model()
    assert LanguageModelLoss()(model, batch).item() == pytest.approx(-score(model, [[5, 6]])[0][0], rel=1e-5)


@FAMILIES
def test_bfloat16_is_near_and_keeps_weights_and_gradients_in_float32(config: GPTConfig) -> None:
    model, batch = random_model(config=config), random_batch()
    whole = LanguageModelLoss("float32")(model, batch).item()
    value = LanguageModelLoss("bfloat16")(model, batch)
    value.backward()
    assert value.dtype == torch.float32 and value.item() != whole
    assert value.item() == pytest.approx(whole, rel=0.03)
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32
               for p in model.parameters())  # fmt: skip


def test_a_fresh_model_guesses_about_evenly() -> None:
    model = GPT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    batch = random_batch(rows=8)
    assert LanguageModelLoss()(model, batch).item() / batch.weight == pytest.approx(math.log(40), abs=0.1)


def test_a_sure_and_wrong_model_has_a_large_finite_loss() -> None:
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e6)
    value = LanguageModelLoss()(model, random_batch())
    value.backward()
    assert math.isfinite(value.item()) and value.item() > 1e5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpt2_learns_what_comes_next_in_a_text_that_repeats(dtype: Dtype) -> None:
    model, loss = GPT(GPT2), LanguageModelLoss(dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = MuonAdamW(model.named_parameters(), OptimConfig(lr=0.03))
    text = torch.arange(13).repeat(2, 1) * torch.tensor([[1], [3]]) % 40  # either counts by ones or by threes
    batch = Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.ones(2, 12))
    for _ in range(60):
        optimizer.zero_grad()
        (loss(model, batch) / batch.weight).backward()
        optimizer.step(1.0)
    assert loss(model, batch).item() / batch.weight < 0.2  # the first step can only guess: log(2) / 12


@pytest.mark.slow
@FAMILIES
def test_compiled_it_is_the_same_loss_with_the_same_gradients(config: GPTConfig) -> None:
    model, batch = random_model(config=config), random_batch()
    try:
        compiled = LanguageModelLoss(compiled=True)(model, batch)
    except Exception as failure:  # a machine without a compiler says so in many ways
        pytest.skip(f"torch.compile does not work here: {type(failure).__name__}")
    eager = LanguageModelLoss()(model, batch)
    assert compiled.item() == pytest.approx(eager.item(), rel=1e-5)
    params = list(model.parameters())
    for a, b in zip(torch.autograd.grad(compiled, params), torch.autograd.grad(eager, params), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_documents_of_one_row_do_not_see_each_other(fused: bool) -> None:
    """The loss of two documents in one row is the sum of their losses alone; id 0 begins a document."""
    model = random_model()
    ids = np.array([[0, 5, 6, 7, 0, 8, 9, 0]])
    targets = np.roll(ids, -1, axis=1)
    packed = Batch.of(ids, targets, begins=0)
    assert packed.firsts is not None and packed.firsts.tolist() == [[0, 0, 0, 0, 4, 4, 4, 7]]
    loss = LanguageModelLoss(fused=fused)
    alone = sum(loss(model, Batch.of(ids[:, a:b], targets[:, a:b])).item() for a, b in ((0, 4), (4, 7), (7, 8)))
    assert loss(model, packed).item() == pytest.approx(alone, rel=1e-5)
    assert loss(model, Batch.of(ids, targets)).item() != pytest.approx(alone, rel=1e-5)
