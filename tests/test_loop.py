"""The loop: accumulation changes nothing, a bad number changes nothing, and a stop in the middle changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stateofgpt.errors import ModelError
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.loop import LoopConfig, Trainer, fit
from stateofgpt.train.loss import Batch, LanguageModelLoss
from stateofgpt.train.state import TrainState

CONFIG = GPTConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    head_dim=8, intermediate_size=24, max_position_embeddings=8,
)  # fmt: skip
LOOP = LoopConfig(clip=1e9)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small_model() -> GPT:
    model, g = GPT(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.3, generator=g)
    return model


def rows(seed: int, n: int = 6) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 30, (n, 9))
    weights = (rng.random((n, 8)) < rng.random((n, 1))).astype(np.float32)  # some rows have many targets, some few
    weights[0] = 0.0
    return Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy(), weights)


def part(batch: Batch, start: int, end: int) -> Batch:
    return Batch(batch.ids[start:end], batch.targets[start:end], batch.weights[start:end])


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 2, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_the_mean_is_over_tokens_whatever_the_micro_batches(cuts: tuple[int, ...]) -> None:
    batch = rows(1)
    whole, cut = Trainer(small_model(), LOOP), Trainer(small_model(), LOOP)
    one = whole.step([batch], LanguageModelLoss(), 1.0)
    parts = [part(batch, a, b) for a, b in pairwise(cuts)]
    many = cut.step(parts, LanguageModelLoss(), 1.0)
    assert many == pytest.approx(one, rel=1e-4)
    for p, q in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.allclose(p.grad, q.grad, atol=1e-5)
    by_hand = LanguageModelLoss()(small_model(), batch).item() / float(batch.weights.sum())
    assert one["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_a_step_without_any_target_is_harmless() -> None:
    trainer = Trainer(small_model(), LOOP)
    batch = rows(1)
    empty = Batch(batch.ids, batch.targets, torch.zeros_like(batch.weights))
    metrics = trainer.step([empty, empty], LanguageModelLoss(), 1.0)
    assert metrics["loss"] == metrics["grad_norm"] == 0.0
    fresh = small_model().parameters()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), fresh, strict=True))


def test_gradients_are_clipped_together_and_the_norm_before_is_told() -> None:
    plain = replace(LOOP, clip=1e9, optim=replace(LOOP.optim, use_muon=False))
    free, clipped = Trainer(small_model(), plain), Trainer(small_model(), replace(plain, clip=0.05))
    before = free.step([rows(2)], LanguageModelLoss(), 0.0)["grad_norm"]
    assert clipped.step([rows(2)], LanguageModelLoss(), 0.0)["grad_norm"] == pytest.approx(before) and before > 0.05
    seen = {n: m / (1.0 - plain.optim.beta1) for n, m in clipped.optimizer.first.items()}  # what the moments took in
    assert math.sqrt(sum(float((g**2).sum()) for g in seen.values())) == pytest.approx(0.05, rel=1e-3)
    for name, m in free.optimizer.first.items():
        assert torch.allclose(m / (1.0 - plain.optim.beta1) * (0.05 / before), seen[name], atol=1e-6)


def not_a_number(model: GPT, batch: Batch) -> Tensor:
    return LanguageModelLoss()(model, batch) * float("nan")


def infinite(model: GPT, batch: Batch) -> Tensor:
    return LanguageModelLoss()(model, batch) + float("inf")


def infinite_gradient(model: GPT, batch: Batch) -> Tensor:
    weight = model.model.norm.weight
    return LanguageModelLoss()(model, batch) + (weight - weight.detach()).clamp(min=0).sqrt().sum()


@pytest.mark.parametrize("bad", [not_a_number, infinite, infinite_gradient])
def test_a_bad_number_stops_before_anything_changed(bad: Callable[[GPT, Batch], Tensor]) -> None:
    trainer = Trainer(small_model(), LOOP)
    trainer.step([rows(1)], LanguageModelLoss(), 1.0)
    before = everything(trainer)
    with pytest.raises(ModelError, match="optimizer step 1; nothing was changed"):
        trainer.step([rows(2)], bad, 1.0)
    assert same(before, everything(trainer))
    again = Trainer(small_model(), LOOP)
    again.load(before)
    assert trainer.step([rows(2)], LanguageModelLoss(), 1.0) == again.step([rows(2)], LanguageModelLoss(), 1.0)
    assert same(everything(trainer), everything(again))  # the bad gradient left nothing behind


def test_one_poisoned_micro_batch_among_good_ones_is_enough() -> None:
    trainer = Trainer(small_model(), LOOP)
    before = everything(trainer)
    poisoned = replace(rows(3), weights=torch.full((6, 8), float("nan")))
    with pytest.raises(ModelError):
        trainer.step([rows(1), poisoned, rows(2)], LanguageModelLoss(), 1.0)
    assert same(before, everything(trainer))


# ---------------------------------------------------------------------------------------------------------------- fit


class Stopped(Exception):
    """Stands for a kill."""


def train(path: Path, steps: int = 6, *, die_after: int = 99, save_every_s: float = -1.0) -> tuple[Trainer, list[int]]:
    """A run of `fit` that goes on from what `path` has. Returns the trainer and the steps the callback was told."""
    trainer, told = Trainer(small_model(), replace(LOOP, save_every_s=save_every_s)), []

    def callback(step: int, metrics: dict[str, float]) -> None:
        told.append(step)
        assert bool(metrics) == (step > 0)
        if step == die_after:
            raise Stopped

    def batches(step: int) -> Sequence[Batch]:
        return [rows(10 + step), rows(50 + step, 2)]

    fit(
        trainer, batches, LanguageModelLoss(), steps=steps, factor=lambda step: 1.0 - step / steps,
        state=TrainState(path), on_resume=lambda step: told.append(1000 + step), callbacks=(callback,),
    )  # fmt: skip
    return trainer, told


@pytest.mark.parametrize("deaths", [(4,), (6,), (2, 3, 3)])
@pytest.mark.parametrize("save_every_s", [-1.0, 1e9])
def test_stopped_and_continued_it_ends_in_the_same_bits(
    deaths: tuple[int, ...], save_every_s: float, tmp_path: Path
) -> None:
    expected = everything(train(tmp_path / "straight")[0])
    for death in deaths:
        with pytest.raises(Stopped):
            train(tmp_path / "torn", die_after=death, save_every_s=save_every_s)
    trainer, _ = train(tmp_path / "torn", save_every_s=save_every_s)
    assert same(everything(trainer), expected)


@pytest.mark.parametrize("micro", [0, 1, 2])
def test_stopped_between_the_micro_batches_of_a_step_it_ends_in_the_same_bits(micro: int, tmp_path: Path) -> None:
    def run(path: Path, die_at: int) -> dict[str, Tensor]:
        trainer, taken = Trainer(small_model(), replace(LOOP, save_every_s=-1.0)), [0]

        def loss(model: GPT, batch: Batch) -> Tensor:
            taken[0] += 1
            if taken[0] == die_at:
                raise Stopped  # some gradients of the step are there, others not yet
            return LanguageModelLoss()(model, batch)

        fit(
            trainer, lambda step: [rows(10 * step + k, 2 + k) for k in range(3)], loss, steps=5,
            factor=lambda step: 1.0 - step / 5, state=TrainState(path),
        )  # fmt: skip
        return everything(trainer)

    with pytest.raises(Stopped):
        run(tmp_path / "torn", 3 * 3 + micro + 1)
    found = TrainState(tmp_path / "torn").latest()
    assert found is not None and found[0] == 3
    assert same(run(tmp_path / "torn", -1), run(tmp_path / "straight", -1))


def test_it_says_where_it_continues(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, die_after=0)
    with pytest.raises(Stopped):  # the state after step 5 was not saved: its callback died
        train(tmp_path, die_after=5)
    _, told = train(tmp_path)
    assert told == [1004, 5, 6]
    assert train(tmp_path)[1] == [1006]
    assert train(tmp_path / "new", steps=2)[1] == [999, 0, 1, 2]  # -1: nothing to continue from


def test_a_run_that_meets_a_bad_number_keeps_its_last_good_state(tmp_path: Path) -> None:
    trainer = Trainer(small_model(), replace(LOOP, save_every_s=-1.0))

    def poison_third(model: GPT, batch: Batch) -> Tensor:
        value = LanguageModelLoss()(model, batch)
        return value * float("nan") if trainer.optimizer.step_count == 3 else value

    with pytest.raises(ModelError):
        fit(trainer, lambda step: [rows(step)], poison_third, steps=9, factor=lambda step: 1.0,
            state=TrainState(tmp_path))  # fmt: skip
    found = TrainState(tmp_path).latest()
    assert found is not None and found[0] == 3
    assert all(tensor.isfinite().all() for tensor in found[1].values())


# ------------------------------------------------------------------------------------------------ any model, any batch


@dataclass(frozen=True)
class Points:
    """A regression's points: the loop knows a batch by its weight alone."""

    x: Tensor
    y: Tensor

    @property
    def weight(self) -> float:
        return float(len(self.y))


def test_it_learns_a_line(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    truth = torch.tensor([2.0, -1.0, 0.5])
    x = torch.randn(64, 3, generator=g)
    data = Points(x, x @ truth)
    model = nn.Linear(3, 1, bias=False)
    config = replace(LOOP, optim=replace(LOOP.optim, lr=0.05, weight_decay=0.0))
    fit(Trainer(model, config), lambda step: [data],
        lambda m, b: ((m(b.x).squeeze(-1) - b.y) ** 2).sum(), steps=150,
        factor=lambda step: 1 - step / 150, state=TrainState(tmp_path))  # fmt: skip
    assert torch.allclose(model.weight[0], truth, atol=1e-2)
