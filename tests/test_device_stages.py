"""The commands that begin without a run's plan, on a device of their own: the CPU's results, and the same bits after a
kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prompted import climb, metrics, place, policy
from test_reward_file import learn
from test_reward_file import place as voted
from torch.nn.attention import SDPBackend, sdpa_kernel
from twin_device import twin

from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.infer.engine import Engine
from stateofgpt.model.checkpoint import load_reward
from stateofgpt.recipes import votes as recipe
from stateofgpt.run import Run, read_json
from stateofgpt.stages import place as where
from stateofgpt.stages import prompted, proxies, rl, vote_features
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import Trainer
from stateofgpt.train.loss import Way

__all__ = ["place", "twin", "voted"]

pytestmark = pytest.mark.slow


class Killed(Exception):
    """Stands in for `kill -9`."""


@pytest.fixture(autouse=True)
def _plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, float32 on every device, and attention as a device without kernels of its own has it."""
    torch.set_num_threads(1)

    def chosen(config: prompted.Config, stage: Any) -> Way:
        return Way("float32", device=where.begin_on(stage, config.device, begun=False))

    monkeypatch.setattr(prompted, "_way", chosen)
    for module in (prompted, rl):
        monkeypatch.setattr(module, "Engine", partial(Engine, dtype=torch.float32))
    monkeypatch.setattr("stateofgpt.rl.scoring.ended", lambda turn, end_id: True)  # equal scores teach nothing
    monkeypatch.setattr(vote_features, "_fastest", lambda *_: "float32")
    with sdpa_kernel(SDPBackend.MATH):
        yield


def dies_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    """Lets a trainer's step number `step` from now on fail; what is returned undoes that."""
    plain, steps = Trainer.step, []

    def failing(self: Trainer, *arguments: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == step:
            raise Killed
        return plain(self, *arguments)

    monkeypatch.setattr(Trainer, "step", failing)
    return lambda: monkeypatch.setattr(Trainer, "step", plain)


@pytest.mark.parametrize(("more", "step"), [((), 6), (("--rl.algorithm", "grpo", "--rl.lora", 2), 3)])
def test_a_policy_learns_there_what_it_learns_here_and_a_kill_changes_nothing(
    more: tuple[object, ...], step: int, place: Path, tmp_path: Path, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--judge", place / "judge", "--rl.save_every_s", 0, "--rl.iterations", 2, "--rl.ppo.epochs", 1, *more)
    words = (*words, "--rl.logprobs", "training")  # as the device has it, where the engine is no float32
    assert climb(place, tmp_path / "here", "--device", "cpu", *words) == 0
    assert climb(place, tmp_path / "there", "--device", twin, *words) == 0
    assert read_json(tmp_path / "there" / "rl" / "decisions.json")["device"] == {"device": twin}
    for mine, its in zip(metrics(tmp_path / "here"), metrics(tmp_path / "there"), strict=True):
        assert mine == pytest.approx(its, rel=1e-2, abs=1e-3)
    apart = [
        torch.linalg.vector_norm(a - b)
        for a, b in zip(policy(tmp_path / "here"), policy(tmp_path / "there"), strict=True)
    ]
    assert max(apart) < 1e-3

    undo = dies_at(monkeypatch, step)  # in the second iteration
    with pytest.raises(Killed):
        climb(place, tmp_path / "torn", "--device", twin, *words)
    undo()
    assert climb(place, tmp_path / "torn", *words) == 0  # the device is kept, and need not be named again
    assert all(map(torch.equal, policy(tmp_path / "torn"), policy(tmp_path / "there")))
    assert metrics(tmp_path / "torn") == metrics(tmp_path / "there")
    assert climb(place, tmp_path / "here", "--device", twin, *words) == 0  # finished: nothing is begun


def test_another_device_than_a_training_began_on_is_refused(
    place: Path, tmp_path: Path, twin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undo = dies_at(monkeypatch, 1)
    with pytest.raises(Killed):
        climb(place, tmp_path / "run", "--device", "cpu")
    undo()
    assert climb(place, tmp_path / "run", "--device", twin) == 2
    assert "began on cpu, and --device asks for twin" in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--lora", 2, "--layers", 2), ()])
def test_votes_are_learned_there_as_here(
    more: tuple[object, ...], voted: Path, tmp_path: Path, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in ("cpu", twin):
        if more and device == twin:
            undo = dies_at(monkeypatch, 8)
            with pytest.raises(Killed):
                learn(voted, tmp_path / device, "--device", device, *more)
            undo()
        assert learn(voted, tmp_path / device, "--device", device, *more) == 0
    here, there = (read_json(tmp_path / device / "reward" / "result.json") for device in ("cpu", twin))
    assert here["depth"] == there["depth"] and here["pair_accuracy"] == pytest.approx(there["pair_accuracy"], abs=0.02)
    assert here["mean"] == pytest.approx(there["mean"], abs=0.05 * here["std"])
    assert here["std"] == pytest.approx(there["std"], rel=0.05)


def test_the_health_of_a_reward_model_is_measured_there(
    voted: Path, place: Path, twin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for device in ("cpu", twin):
        recipe.health(place / "reward", voted / "people.jsonl", as_json=True, device=device)
        found.append(json.loads(capsys.readouterr().out)["accuracy"]["value"])
    assert found[0] == pytest.approx(found[1], abs=0.01)


def test_a_reward_model_of_rankings_learns_there_as_here_and_resumes_to_the_same_bits(
    voted: Path, tmp_path: Path, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatFormat(Tokenizer.load(voted / "model"))
    rankings = [r for r in read_comparisons(voted / "people.jsonl").rankings if r.pairs()][:48]

    def taught(root: Path, device: str) -> list[torch.Tensor]:
        with Run.open(root, "judge", {}, 0) as run:
            proxies.taught(
                run, run.inside("judge"), voted / "model", rankings[8:], rankings[:8], 0, chat=chat,
                way=Way(device=device), usual=rankings, about=lambda _: {}, least_steps=5,
            )  # fmt: skip
            return [p.detach() for p in load_reward(run.inside("judge").checkpoint).parameters()]

    monkeypatch.setattr("stateofgpt.train.loop.time.monotonic", iter(range(0, 10**6, 100)).__next__)  # saves each step
    here, there = taught(tmp_path / "here", "cpu"), taught(tmp_path / "there", twin)
    undo = dies_at(monkeypatch, 4)
    with pytest.raises(Killed):
        taught(tmp_path / "torn", twin)
    undo()
    assert all(map(torch.equal, there, taught(tmp_path / "torn", twin)))
    apart = sum(float(torch.linalg.vector_norm(a - b)) for a, b in zip(here, there, strict=True))
    assert apart < 0.02 * sum(float(torch.linalg.vector_norm(a)) for a in here)
