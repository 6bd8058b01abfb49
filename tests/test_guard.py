"""Loss spikes and what is done about them, and the average of the tail: alone, in training, and across a kill."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stateofgpt.errors import ConfigError
from stateofgpt.train.guard import Policy, SpikeConfig, SpikeGuard
from stateofgpt.train.loop import LoopConfig, Trainer, fit
from stateofgpt.train.optim import OptimConfig
from stateofgpt.train.state import TrainState


def losses(n: int, seed: int = 0) -> list[float]:
    """A noisy fall as of a language model on mixed rows."""
    rng = random.Random(seed)
    return [4.0 * math.exp(-step / 200) + 1.0 + rng.gauss(0.0, 0.15) for step in range(n)]


# ---------------------------------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_noise_is_no_spike(seed: int) -> None:
    guard, rng = SpikeGuard(SpikeConfig()), random.Random(seed)
    assert not any(guard.is_spike(loss, math.exp(rng.gauss(0.0, 0.4))) for loss in losses(600, seed))


def test_a_loss_far_out_with_a_large_gradient_is_one_each_time_it_comes() -> None:
    guard = SpikeGuard(SpikeConfig())
    for loss in losses(100):
        guard.is_spike(loss, 1.0)
    assert all(guard.is_spike(8.0, 10.0) for _ in range(50))  # spikes do not become the new normal
    assert not guard.is_spike(8.0, 1.0) and not guard.is_spike(losses(101)[-1], 10.0)  # one sign alone is not enough


def test_without_a_history_nothing_is_judged() -> None:
    guard = SpikeGuard(SpikeConfig(window=64))
    assert not any(guard.is_spike(100.0 * (step % 7), 10.0 ** (step % 5)) for step in range(32))


def test_its_state_goes_through_json_and_judges_the_same() -> None:
    guard, again = SpikeGuard(SpikeConfig()), SpikeGuard(SpikeConfig())
    for loss in losses(80):
        guard.is_spike(loss, 1.0)
    guard.lower_from(80)
    again.load(guard.state())
    assert again.state() == guard.state() and again.rate(100) == 0.5 and again.rate(281) == 1.0


@pytest.mark.parametrize("wrong", [{"window": 4}, {"spread": 0.0}, {"norm": -1.0}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SpikeConfig(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- in training


@dataclass(frozen=True)
class Points:
    x: Tensor
    y: Tensor

    @property
    def weight(self) -> float:
        return float(len(self.y))


BAD = 40  # the step whose batch is poison: labels a thousand times too large


def batches(step: int) -> Sequence[Points]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0]) + 0.3 * torch.randn(16, generator=generator)
    return [Points(x, y * (1000.0 if step == BAD else 1.0))]


def squared(model: nn.Module, batch: Points) -> Tensor:
    return ((model(batch.x).squeeze(-1) - batch.y) ** 2).sum()


class Stopped(Exception):
    """Stands for a kill."""


def train(
    path: Path, policy: Policy, *, steps: int = 60, die_after: int = -1, every_step: bool = True, average: float = 0.0
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights after training, and the metrics that remain when what a resumption or a roll-back undid is forgotten."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    spikes = SpikeConfig(policy=policy, window=16, lower_steps=10)
    optim = OptimConfig(lr=0.05, use_muon=False, weight_decay=0.0)
    config = LoopConfig(
        optim=optim, clip=1e9, save_every_s=-1.0 if every_step else 1e9, spikes=spikes, average_share=average
    )
    log: list[dict[str, float]] = []

    def resume(step: int) -> None:
        log[:] = [line for line in log if line["step"] <= step]

    def callback(step: int, metrics: dict[str, float]) -> None:
        if metrics:
            log.append({"step": step, **metrics})
        if step == die_after:
            raise Stopped

    trainer = Trainer(model, config)
    fit(
        trainer, batches, squared, steps=steps, factor=lambda step: 1.0, state=TrainState(path),
        on_resume=resume, callbacks=(callback,),
    )  # fmt: skip
    return {name: p.detach().clone() for name, p in model.named_parameters()}, log


def error(weights: dict[str, Tensor]) -> float:
    return float((weights["weight"][0] - torch.tensor([1.0, -2.0, 0.5, 3.0])).norm())


def test_noted_it_is_logged_and_nothing_else_changes(tmp_path: Path) -> None:
    _, log = train(tmp_path, "note")
    assert [line["step"] for line in log if "spike" in line] == [BAD + 1] and "refused" not in log[BAD]


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_leaving_the_step_out_ends_nearer_to_the_truth_than_doing_nothing(policy: Policy, tmp_path: Path) -> None:
    nothing, _ = train(tmp_path / "a", "note", steps=BAD + 5)
    mended, _ = train(tmp_path / "b", policy, steps=BAD + 5)
    assert error(mended) < error(nothing)


def test_skipped_the_step_changes_nothing_and_the_next_ones_go_on(tmp_path: Path) -> None:
    before, _ = train(tmp_path / "a", "skip", steps=BAD)
    after, log = train(tmp_path / "b", "skip", steps=BAD + 1)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert log[-1]["refused"] == log[-1]["spike"] == 1.0


def test_lowered_the_rate_is_low_for_the_steps_after_it(tmp_path: Path) -> None:
    _, log = train(tmp_path, "lower")
    assert [line["lr"] for line in log[BAD : BAD + 13]] == [0.05, *[0.025] * 10, 0.05, 0.05]


def test_rolled_back_it_is_as_if_the_step_had_never_been(tmp_path: Path) -> None:
    rolled, log = train(tmp_path, "roll_back")
    assert BAD + 1 not in [line["step"] for line in log] and len(log) == 59
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    trainer = Trainer(model, LoopConfig(optim=OptimConfig(lr=0.05, use_muon=False, weight_decay=0.0), clip=1e9))
    for step in range(60):
        if step != BAD:
            trainer.step(batches(step), squared, 1.0)
    assert all(torch.equal(rolled[name], p) for name, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "lower", "roll_back"])
@pytest.mark.parametrize("deaths", [(BAD - 1,), (10, BAD + 5)])
@pytest.mark.parametrize("every_step", [True, False])
def test_killed_and_continued_every_policy_ends_in_the_same_bits(
    policy: Policy, deaths: tuple[int, ...], every_step: bool, tmp_path: Path
) -> None:
    straight, told = train(tmp_path / "straight", policy, average=0.5)
    for death in deaths:
        with pytest.raises(Stopped):
            train(tmp_path / "torn", policy, die_after=death, every_step=every_step, average=0.5)
    torn, log = train(tmp_path / "torn", policy, every_step=every_step, average=0.5)
    assert all(torch.equal(straight[name], torn[name]) for name in straight)
    assert log == told[len(told) - len(log) :]


# ---------------------------------------------------------------------------------------------------------- the average


def test_the_average_is_that_of_the_weights_after_each_of_the_last_steps(tmp_path: Path) -> None:
    averaged, _ = train(tmp_path / "averaged", "skip", steps=20, average=0.25)
    each = [train(tmp_path / str(n), "skip", steps=n)[0] for n in range(16, 21)]
    for name, mean in averaged.items():
        torch.testing.assert_close(mean, torch.stack([weights[name] for weights in each]).mean(0))


def test_a_finished_run_that_is_looked_at_again_is_averaged_again(tmp_path: Path) -> None:
    once, _ = train(tmp_path, "skip", steps=20, average=0.25)
    again, _ = train(tmp_path, "skip", steps=20, average=0.25)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_share_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="average_share is 1"):
        replace(LoopConfig(), average_share=1.5)
