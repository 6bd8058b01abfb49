"""Every algorithm in the stage: the same loop, measure, guard and resumption, whatever learns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import records, result, weights

from stateofgpt.data.comparisons import read_rankings, write_rankings
from stateofgpt.errors import ConfigError, DataError, RunError
from stateofgpt.model.checkpoint import load_model, read_lineage
from stateofgpt.recipes import load
from stateofgpt.recipes.pipeline import execute
from stateofgpt.rl.group import GroupConfig
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.rl.optimization import UpdateConfig
from stateofgpt.rl.preference import OfflineConfig
from stateofgpt.run import Run
from stateofgpt.stages import rl
from stateofgpt.train.loop import Trainer

ALGORITHMS = ("ppo", "grpo", "dr_grpo", "rloo", "reinforce", "best_of_n", "rejection", "dpo", "ipo", "kto")
SMALL = rl.Config(
    iterations=3, batch=8, max_tokens=16, held_out_prompts=6, save_every_s=0.0, offline=OfflineConfig(pairs=12),
    groups=GroupConfig(accept=-9.0), guards=GuardConfig(stop=False),  # what was learned is published, good or bad
)  # fmt: skip
RECIPE = {
    "pretrain.steps": "6", "pretrain.sample_tokens": "4", "sft.steps": "12", "reward.n_prompts": "24",
    "reward.held_out_prompts": "12", "reward.max_tokens": "24",
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def every_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a few steps does not end its turns, and equal scores of all answers teach nothing."""
    monkeypatch.setattr("stateofgpt.rl.scoring.ended", lambda turn, end_id: True)


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its reward stage."""
    root = tmp_path_factory.mktemp("algorithms") / "debug"
    recipe = load("debug", minutes=None, seed=0, corpus=(), overrides=RECIPE)
    for stage in ("collect", "tokenize", "pretrain", "sft", "reward"):
        execute(recipe, root, only=stage)
    return root


def learn(run: Path, config: rl.Config) -> dict[str, object]:
    asked = json.loads((run / "run.json").read_text())
    with Run.open(run, asked["recipe"], asked["config"], asked["seed"]) as opened:
        return rl.run(config, opened)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to / "debug")
    return to / "debug"


class Killed(Exception):
    """Stands in for `kill -9`: nothing of ours handles it."""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_inside_an_iteration_it_ends_with_the_same_weights(
    algorithm: rl.Algorithm, rewarded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, algorithm=algorithm, iterations=2, ppo=UpdateConfig(kl_target=0.5))
    whole, torn = copied(rewarded, tmp_path / "whole"), copied(rewarded, tmp_path / "torn")
    told = learn(whole, config)
    assert told["algorithm"] == algorithm and told["n"] == 6 and not told["stopped"]

    step, steps = Trainer.step, []

    def failing(self, *arguments):  # type: ignore[no-untyped-def]
        steps.append(1)
        if len(steps) == per_iteration + 2:  # in the middle of the second iteration, after an update of it
            raise Killed
        return step(self, *arguments)

    offline = algorithm in ("dpo", "ipo", "kto")
    per_iteration = 2 if offline else 8 if algorithm == "ppo" else 4
    monkeypatch.setattr(Trainer, "step", failing)
    with pytest.raises(Killed):
        learn(torn, config)
    monkeypatch.setattr(Trainer, "step", step)
    learn(torn, config)
    assert weights(torn, "rl") == weights(whole, "rl")
    assert records(torn / "rl" / "metrics.jsonl") == records(whole / "rl" / "metrics.jsonl")
    assert records(torn / "rl" / "samples.jsonl") == records(whole / "rl" / "samples.jsonl")
    assert result(torn, "rl") == result(whole, "rl")
    assert weights(whole, "rl") != weights(whole, "sft")


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "rejection"])
def test_beyond_the_budget_of_kl_it_stops_with_the_policy_before(
    algorithm: rl.Algorithm, rewarded: Path, tmp_path: Path
) -> None:
    run = copied(rewarded, tmp_path)
    fast = replace(UpdateConfig().policy, optim=replace(UpdateConfig().policy.optim, lr=0.02))
    config = replace(SMALL, algorithm=algorithm, max_kl=0.05, iterations=6, ppo=UpdateConfig(policy=fast))
    told = learn(run, config)
    assert "passed the budget" in str(told["stopped"])
    logged = [line for line in records(run / "rl" / "metrics.jsonl") if "kl" in line]  # others are the guards' looks
    assert logged[-1]["kl"] > 0.05 and all(line["kl"] <= 0.05 for line in logged[:-1])
    if len(logged) == 2:  # one update, which is what was taken back
        for a, b in zip(
            load_model(run / "rl/checkpoint").parameters(), load_model(run / "sft/checkpoint").parameters(), strict=True
        ):
            assert torch.equal(a, b)


def test_verified_rewards_need_no_reward_model_and_are_what_is_right(rewarded: Path, tmp_path: Path) -> None:
    run = copied(rewarded, tmp_path)
    shutil.rmtree(run / "reward")
    for algorithm in ("ppo", "grpo"):
        shutil.rmtree(run / "rl", ignore_errors=True)
        told = learn(run, replace(SMALL, algorithm=algorithm, reward="verified"))
        assert told["reward"] == "verified"
        assert [p.name for p in read_lineage(run / "rl" / "checkpoint").parents] == ["debug:sft"]
        logged = [line for line in records(run / "rl" / "metrics.jsonl") if "proxy_reward" in line]
        assert len(logged) == 3 and all(0 <= line["proxy_reward"] <= 1 for line in logged)
    shutil.rmtree(run / "rl")
    with pytest.raises(RunError, match="reward"):
        learn(run, SMALL)
    with pytest.raises(RunError, match=r"rl\.rankings"):
        learn(run, replace(SMALL, algorithm="dpo"))


def test_word_problems_of_a_file_are_asked_and_checked(rewarded: Path, tmp_path: Path) -> None:
    run, file = copied(rewarded, tmp_path), tmp_path / "problems.jsonl"
    rows = [
        {"question": f"I have {i} and get 2. How many?", "answer": f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}"}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = learn(run, replace(SMALL, algorithm="rloo", reward="verified", tasks=str(file)))
    assert told["n"] == 4  # a tenth is held out
    held_out = 0 <= told["true_sft"] <= 1  # type: ignore[operator]
    assert held_out and all(s["prompt"].startswith("I have") for s in records(run / "rl" / "samples.jsonl"))


def test_a_users_rankings_are_learned_from(rewarded: Path, tmp_path: Path) -> None:
    run, file = copied(rewarded, tmp_path), tmp_path / "own.jsonl"
    write_rankings(file, read_rankings(run / "reward" / "rankings.jsonl")[:5])
    learn(run, replace(SMALL, algorithm="dpo", rankings=str(file)))
    other = copied(rewarded, tmp_path / "other")
    learn(other, replace(SMALL, algorithm="dpo"))
    assert weights(run, "rl") != weights(other, "rl")
    file.write_text("nonsense\n")
    shutil.rmtree(run / "rl")
    with pytest.raises(DataError, match=r"own\.jsonl:1"):
        learn(run, replace(SMALL, algorithm="dpo", rankings=str(file)))


def test_texts_of_pretraining_go_beside_the_updates(rewarded: Path, tmp_path: Path) -> None:
    run, without = copied(rewarded, tmp_path / "a"), copied(rewarded, tmp_path / "b")
    learn(run, replace(SMALL, ppo=UpdateConfig(pretraining=1.0, pretraining_rows=2)))
    learn(without, SMALL)
    assert weights(run, "rl") != weights(without, "rl")


def test_by_time_iterations_are_measured_and_the_measuring_leaves_no_trace(rewarded: Path, tmp_path: Path) -> None:
    run, fixed = copied(rewarded, tmp_path / "a"), copied(rewarded, tmp_path / "b")
    timed = learn(run, replace(SMALL, algorithm="rloo", iterations=None, seconds=0.1))
    assert timed["iterations"] == 4
    learn(fixed, replace(SMALL, algorithm="rloo", iterations=4))
    assert weights(run, "rl") == weights(fixed, "rl")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"algorithm": "grpo", "group": 1}, "at least 2"),
        ({"algorithm": "rloo", "group": 3}, "no multiple"),
        ({"group": 0}, "at least 1"),
        ({"algorithm": "dpo", "ppo": UpdateConfig(pretraining=1.0)}, "that sample"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(SMALL, **wrong)  # type: ignore[arg-type]


def test_a_recipe_without_a_reward_stage_says_at_once_what_it_needs() -> None:
    stages = {"stages": "collect,tokenize,pretrain,sft,rl"}
    for more, said in (({}, "--rl.reward verified"), ({"rl.algorithm": "ipo"}, "--rl.rankings")):
        with pytest.raises(ConfigError, match=said):
            load("debug", minutes=None, seed=0, corpus=(), overrides={**stages, **more})
    for more in ({"rl.reward": "verified"}, {"rl.algorithm": "kto", "rl.rankings": "x.jsonl"}):
        load("debug", minutes=None, seed=0, corpus=(), overrides={**stages, **more})
