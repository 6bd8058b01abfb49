"""The fused training pass against the model's own forward and torch's gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stateofgpt.errors import ModelError
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.rotary import RopeScaling
from stateofgpt.train import fused
from stateofgpt.train import loss as loss_module
from stateofgpt.train.kernels import load
from stateofgpt.train.loss import Batch, LanguageModelLoss

BASE = GPTConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=80,
    max_position_embeddings=300,
)
SHAPES = {
    "qwen3": BASE,
    "llama": replace(BASE, arch="llama"),
    "shared keys": replace(BASE, num_key_value_heads=2),
    "one head, one layer": replace(BASE, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1),
    "untied": replace(BASE, tie_word_embeddings=False),
    "narrow": replace(BASE, hidden_size=6, head_dim=2, intermediate_size=5),
    "stretched": replace(BASE, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 40)),
}
PLAIN = {  # what the fused pass does not know
    "gpt2": replace(BASE, arch="gpt2", hidden_size=64),
    "biased attention": replace(BASE, attention_bias=True),
    "biased feed-forward": replace(BASE, arch="llama", mlp_bias=True),
}


def model_of(config: GPTConfig, seed: int = 0) -> GPT:
    """A model in which every gradient is alive: no projection is zero, no gain is one."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2, generator=generator)
    return model


def batch_of(config: GPTConfig, rows: int, length: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, length + 1), generator=generator)
    weights = torch.rand(rows, length, generator=generator)
    weights[0, : length // 2] = 0.0
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights)


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PLAIN)
def test_what_the_fused_pass_does_not_know_goes_the_plain_way(name: str) -> None:
    model, batch = model_of(PLAIN[name]), batch_of(PLAIN[name], 2, 30)
    assert not fused.fits(model, batch.ids)
    assert torch.equal(LanguageModelLoss(fused=True)(model, batch), LanguageModelLoss()(model, batch))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("rows", "length"), [(2, 1), (3, 40), (1, 128), (2, 300)])
def test_loss_and_every_gradient_are_the_models(name: str, rows: int, length: int) -> None:
    config = SHAPES[name]
    model, batch = model_of(config), batch_of(config, rows, length)
    mine, theirs = LanguageModelLoss(fused=True)(model, batch), LanguageModelLoss()(model, batch)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    got, wanted = gradients(model, mine), gradients(model, theirs)
    assert got.keys() == wanted.keys()
    size = max(float(g.norm()) for g in wanted.values())
    for parameter, gradient in wanted.items():
        error = float((got[parameter] - gradient).norm())
        assert error <= 3e-5 * float(gradient.norm()) + 1e-7 * size, parameter


def test_without_gradients_it_is_the_same_loss() -> None:
    model, batch = model_of(BASE), batch_of(BASE, 2, 50)
    with torch.no_grad():
        mine = LanguageModelLoss(fused=True)(model, batch)
    torch.testing.assert_close(mine, LanguageModelLoss()(model, batch).detach(), rtol=1e-5, atol=1e-5)


def no_farther_than_autocast(config: GPTConfig, rows: int, length: int) -> None:
    """Relative error of all gradients together, against float32; a tenth more than autocast's would be a fault."""
    errors = {True: 0.0, False: 0.0}
    for seed, fused_pass in ((seed, way) for seed in range(4) for way in (False, True)):
        model, batch = model_of(config, seed), batch_of(config, rows, length, seed)
        truth = gradients(model, LanguageModelLoss()(model, batch))
        rounded = gradients(model, LanguageModelLoss("bfloat16", fused=fused_pass)(model, batch))
        wrong = math.sqrt(sum(float((rounded[n] - g).norm()) ** 2 for n, g in truth.items()))
        errors[fused_pass] += wrong / math.sqrt(sum(float(g.norm()) ** 2 for g in truth.values()))
    assert errors[True] <= 1.1 * errors[False], errors


def apart_in_a_row(config: GPTConfig, length: int, cut: int) -> None:
    """Two documents in one row give the losses and gradients of each alone, moved to where it lies."""
    kernels = load()
    assert kernels is not None
    model, batch = model_of(config), batch_of(config, 1, length)
    firsts = torch.tensor([[0] * cut + [cut] * (length - cut)], dtype=torch.int32)
    packed = fused.fused_loss(kernels, model, batch.ids, batch.targets, batch.weights, torch.float32, firsts)
    got = gradients(model, packed)
    parts = [
        Batch(batch.ids[:, part], batch.targets[:, part], batch.weights[:, part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    alone = LanguageModelLoss()(model, parts[0]) + LanguageModelLoss()(model, parts[1])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)
    wanted = gradients(model, alone)
    for name, gradient in wanted.items():  # rotary positions count from the row's start, and only differences matter
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_in_bfloat16_it_is_no_farther_from_the_truth_than_autocast() -> None:
    no_farther_than_autocast(BASE, 4, 64)


def test_a_document_does_not_see_the_one_before_it_in_the_row() -> None:
    apart_in_a_row(replace(BASE, max_position_embeddings=400), 310, 140)


def test_what_it_cannot_do_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LONGEST", 30)
    model, batch = model_of(BASE), batch_of(BASE, 1, 31)
    assert not fused.fits(model, batch.ids) and fused.fits(model, batch.ids[:, :30])
    assert torch.equal(LanguageModelLoss(fused=True)(model, batch), LanguageModelLoss()(model, batch))


def test_asked_for_where_there_are_no_kernels_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module.kernels, "load", lambda: None)
    with pytest.raises(ModelError, match="install a C compiler"):
        LanguageModelLoss(fused=True)
