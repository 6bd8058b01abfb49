"""Guards around a policy that is really trained: a reward that is hacked is stopped, an honest one is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stateofgpt.assistant.session import Turn
from stateofgpt.data.skills import Problem
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import load_model
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.rl.optimization import UpdateConfig
from stateofgpt.rl.ppo import PPO
from stateofgpt.run import Run, read_json, write_json
from stateofgpt.stages import rl
from stateofgpt.stages.judge import FEWEST, NO_END, Judged, better_than_a_coin, rankings_apart, second_judge
from stateofgpt.stages.watch import LOOKS, SMALL_BATCH, STOPPED, Watch, restore
from stateofgpt.stages.way import way_of
from stateofgpt.text.chat import ChatFormat, Message
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig

EOT, END, PAD, GOOD = 0, 2, 3, 20
SHAPE = GPTConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    head_dim=8, intermediate_size=24, max_position_embeddings=40,
)  # fmt: skip
FAST = LoopConfig(optim=OptimConfig(lr=3e-3, eps=1e-5, weight_decay=0.0, use_muon=False))
PROMPTS = [Problem("copy", f"prompt {i}", "", "") for i in range(40)]
Measure = Callable[[Turn], float]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model(seed: int = 0) -> GPT:
    made, g = GPT(SHAPE), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.2, generator=g)
    return made


def answers(policy: GPT, n: int, seed: int) -> list[Turn]:
    prompts = [[EOT, 1, 7 + i % 5] for i in range(n)]
    made = Engine(policy, max_batch=64).complete(prompts, SamplingParams(max_tokens=16, seed=seed, stop_ids=(END, EOT)))
    return [
        Turn((Message("assistant", ""),), prompt, list(c.ids), [1] * len(c.ids), list(c.logprobs), "stop")
        for prompt, c in zip(prompts, made, strict=True)
    ]


class Scripted:
    """A reward that a program hands out."""

    mean, std = 0.0, 1.0

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def __call__(self, turns: Sequence[Turn], problems: Sequence[Problem | None] = ()) -> Tensor:
        return torch.tensor([self.measure(turn) for turn in turns])


def train(
    reward: Measure, truth: Measure, folder: Path, config: GuardConfig | None = None, iterations: int = 40
) -> tuple[str, Watch, PPO]:
    """PPO on a reward under guards whose judge knows the truth, as the rl stage does it."""
    update = UpdateConfig(kl_coefficient=0.0, policy=FAST, value=FAST)
    value = ValueModel(RewardModel(model(1), PAD))
    ppo = PPO(model(), model(), value, Scripted(reward), update, pad_id=PAD, way=Way())
    judge = lambda problems, turns: [truth(turn) for turn in turns]  # noqa: E731
    guards = config or GuardConfig(every=2, entropy_floor=None, length_drift=None)
    stopped = ""
    with Run.open(folder, "test", {}, 0) as run:
        ask = lambda problems: answers(ppo.policy, len(problems), 999)  # noqa: E731
        watch = Watch(guards, run.stage("rl"), ppo, ask, PROMPTS, Judged("a program", judge), judge)
        watch.begin()
        for i in range(iterations):
            experience, watched = ppo.experience(answers(ppo.policy, 32, i))
            ppo.update(experience, torch.Generator().manual_seed(i), 1.0, watched["kl"])
            if stopped := watch.after(i + 1):
                restore(ppo.policy, watch.best)
                break
        watch.told()
    return stopped, watch, ppo


def good(turn: Turn) -> float:
    return float(turn.ids.count(GOOD))


def varied(turn: Turn) -> float:
    """What people would say of an answer: different words are good, the same one again and again is not."""
    return float(len(set(turn.ids))) - 0.5 * max(0, turn.ids.count(GOOD) - 2)


def length(turn: Turn) -> float:
    return float(len(turn.ids))


def low(turn: Turn) -> float:
    return float(sum(token < 300 for token in turn.ids))


# ---------------------------------------------------------------------------------------------------- hacks and honesty


@pytest.mark.slow
def test_a_reward_that_pays_for_one_token_is_stopped_and_the_best_policy_kept(tmp_path: Path) -> None:
    stopped, watch, ppo = train(good, varied, tmp_path / "run")
    looks = watch.watcher.looks
    assert "held-out score fell" in stopped and looks[-1].reward > looks[0].reward + 1
    best = watch.watcher.best
    assert best is not None and best.score > looks[-1].score + 0.5
    # what is left is the policy of the best look: asked again it says what it said then
    again = [varied(turn) for turn in answers(ppo.policy, len(PROMPTS), 999)]
    assert again == list(best.scores)
    assert read_json(tmp_path / "run" / "rl" / LOOKS)["looks"][-1]["step"] == looks[-1].step


@pytest.mark.slow
def test_a_reward_that_pays_for_length_is_stopped_by_length_alone(tmp_path: Path) -> None:
    config = GuardConfig(every=2, fall=None, entropy_floor=None, length_drift=1.3)
    stopped, watch, _ = train(lambda turn: -length(turn), lambda turn: 0.0, tmp_path / "run", config)
    assert "answers shrank" in stopped and "more than 1.3 times" in stopped
    assert watch.watcher.best is watch.watcher.looks[0] and "kept is the policy it began with" in stopped


@pytest.mark.slow
def test_a_policy_that_repeats_one_thing_is_stopped_by_its_entropy(tmp_path: Path) -> None:
    config = GuardConfig(every=2, fall=None, entropy_floor=0.6, length_drift=None)
    stopped, _, _ = train(good, good, tmp_path / "run", config)
    assert "the entropy fell" in stopped and "under the floor of 60%" in stopped


@pytest.mark.slow
def test_an_honest_reward_is_climbed_to_the_end(tmp_path: Path) -> None:
    stopped, watch, _ = train(good, good, tmp_path / "run", GuardConfig(every=2, entropy_floor=None))
    assert stopped == "" and len(watch.watcher.looks) == 21
    assert watch.watcher.looks[-1].score > watch.watcher.looks[0].score + 2


def test_a_count_of_right_pairs_must_leave_a_coin_behind() -> None:
    assert better_than_a_coin(70, 100) and not better_than_a_coin(58, 100)
    assert not better_than_a_coin(0, 0) and not better_than_a_coin(3, 4)


def test_too_few_rankings_make_no_judge_and_no_verdict_on_scores(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "test", {}, 0) as run:
        judged = second_judge(run, tmp_path, [], None, Way())  # type: ignore[arg-type]
        assert judged.judge is None and f"a judge needs {FEWEST}" in judged.name
        ppo = PPO(model(), model(), ValueModel(RewardModel(model(1), PAD)), Scripted(good), UpdateConfig(),
                  pad_id=PAD, way=Way())  # fmt: skip
        scores = lambda problems, turns: [0.0 for _ in turns]  # noqa: E731
        watch = Watch(GuardConfig(), run.stage("rl"), ppo, lambda problems: [], PROMPTS, judged, scores)
        assert watch.config.fall is None and watch.judge is scores


@pytest.mark.slow
def test_a_second_judge_learns_from_its_own_rankings_once_and_is_trusted_only_if_it_knows_something(
    debug_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "debug"
    shutil.copytree(debug_run, folder)
    raw = json.loads((folder / "run.json").read_text())
    with Run.open(folder, raw["recipe"], raw["config"], raw["seed"]) as run:
        reward, start = run.stage("reward").dir, run.stage("sft").checkpoint
        assert rankings_apart(run, None) is None  # simulated: the truth is known
        apart = 2 * (rankings_apart(run, str(reward / "rankings_held_out.jsonl")) or [])
        chat = ChatFormat(Tokenizer.load(start))
        judged = second_judge(run, start, apart, chat, way_of(run))
        result = run.inside("rl/judge").result() or {}
        assert result["n"] > 20 and f"{result['right']} of {result['n']} pairs" in judged.name
        assert (judged.judge is None) == (not better_than_a_coin(result["right"], result["n"]))
        monkeypatch.setattr("stateofgpt.stages.judge.better_than_a_coin", lambda right, n: True)
        monkeypatch.setattr("stateofgpt.stages.proxies.learn", None)  # it is read back, not trained again
        judge = second_judge(run, start, apart, chat, way_of(run)).judge
        turns = [Turn((), [chat.tokenizer.eot, 300], [301, chat.end], [1, 1], [0.0] * 2, "stop"),
                 Turn((), [chat.tokenizer.eot, 300], [301], [1], [0.0], "length")]  # fmt: skip
        assert judge is not None
        scores = judge([], turns)
        assert scores[1] == NO_END and scores[0] != NO_END
        stored = read_json(run.stage("reward").dir / "result.json")
        write_json(run.stage("reward").dir / "result.json", {**stored, "simulated": False})
        assert len(rankings_apart(run, None) or []) == len(apart) // 2  # people ranked: those held out


# ------------------------------------------------------------------------------------------------ in the stage, resumed


class Killed(Exception):
    pass


def begun_again(debug_run: Path, folder: Path) -> Path:
    """A debug run whose reinforcement learning has not begun."""
    shutil.copytree(debug_run, folder)
    for later in ("rl", "eval", "arena"):
        shutil.rmtree(folder / later)
    return folder


def hack(
    run_folder: Path,
    killed_at: int | None = None,
    *,
    killed_looking: bool = False,
    beyond_at: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The rl stage of a debug run, with a reward for some tokens and a judge who dislikes them."""
    raw = json.loads((run_folder / "run.json").read_text())
    with Run.open(run_folder, raw["recipe"], raw["config"], raw["seed"]) as run:
        fast = replace(UpdateConfig(), policy=FAST, value=FAST, kl_coefficient=0.0)
        config = rl.Config(
            iterations=14, batch=8, max_tokens=20, held_out_prompts=8, max_kl=1e9, save_every_s=0.0, ppo=fast,
            guards=GuardConfig(every=2, prompts=12, entropy_floor=None, length_drift=None),
        )  # fmt: skip
        config = replace(config, **changes)
        stage = run.stage("rl")
        with stage.timed():
            training = rl.PolicyTraining(
                config, run, stage, run.stage("sft").checkpoint, run.stage("reward").checkpoint, way_of(run), 0.0, 1.0
            )
            training.optimization.scorer = Scripted(low)
            training.watch.judge = lambda problems, turns: [-low(turn) for turn in turns]
            iterate = training._iterate

            def until(i: int, n: int) -> float:
                if i == killed_at:
                    raise Killed
                kl = iterate(i, n)
                return 1e12 if i == beyond_at else kl

            def no_look(step: int) -> str:
                raise Killed

            training._iterate = until  # type: ignore[method-assign]
            if killed_looking:
                training.watch.close = no_look  # type: ignore[method-assign]
            return training.work()


@pytest.mark.slow
def test_a_stopped_run_that_was_killed_on_the_way_ends_in_the_same_bits(debug_run: Path, tmp_path: Path) -> None:
    ends = []
    for name, kills in (("whole", ()), ("killed", (1, 3))):
        folder = begun_again(debug_run, tmp_path / name / "debug")
        for at in kills:
            with pytest.raises(Killed):
                hack(folder, at)
        result = hack(folder)
        ends.append((result, (folder / "rl/checkpoint/model.safetensors").read_bytes(),
                     (folder / "rl" / STOPPED / "model.safetensors").read_bytes(),
                     (folder / "rl" / LOOKS).read_bytes()))  # fmt: skip
    assert ends[0] == ends[1]
    result = ends[0][0]
    assert "held-out score fell" in result["stopped"]
    assert result["guards"]["score_best"] > result["guards"]["score_last"]
    assert ends[0][1] != ends[0][2]  # what is kept is not what was stopped


WEIGHTS = "model.safetensors"
SHORT = {"iterations": 3, "guards": GuardConfig(every=4, prompts=12, entropy_floor=None, length_drift=None)}


@pytest.mark.slow
def test_a_training_too_short_for_the_guards_that_ends_worse_leaves_the_policy_it_began_with(
    debug_run: Path, tmp_path: Path
) -> None:
    ends = []
    for name, kills in (("whole", ()), ("killed", ({"killed_at": 1}, {"killed_at": 2}, {"killed_looking": True}))):
        folder = begun_again(debug_run, tmp_path / name / "debug")
        for kill in kills:
            with pytest.raises(Killed):
                hack(folder, **SHORT, **kill)  # type: ignore[arg-type]
        result = hack(folder, **SHORT)
        files = (f"checkpoint/{WEIGHTS}", f"{STOPPED}/{WEIGHTS}", LOOKS)
        ends.append((result, *((folder / "rl" / file).read_bytes() for file in files)))
    assert ends[0] == ends[1]
    result, published, given_up, _ = ends[0]
    assert result["stopped"] == "" and result["given_up"].endswith("kept is the policy it began with")
    assert result["kl"] == 0.0 and result["true_rl"] == result["true_sft"] and result["guards"]["looks"] == 2
    begin = load_model(debug_run / "sft/checkpoint").state_dict()
    kept = load_model(tmp_path / "whole/debug/rl/checkpoint").state_dict()
    assert all(torch.equal(begin[name], tensor) for name, tensor in kept.items()) and published != given_up
    # one that was begun before there was a look at the end publishes what it would have published
    folder = begun_again(debug_run, tmp_path / "before/debug")
    with pytest.raises(Killed):
        hack(folder, 2, **SHORT)  # type: ignore[arg-type]
    decisions = read_json(folder / "rl/decisions.json")
    write_json(folder / "rl/decisions.json", {k: v for k, v in decisions.items() if k != "closes"})
    result = hack(folder, **SHORT)
    assert result["given_up"] == "" and result["guards"]["looks"] == 1
    assert (folder / "rl/checkpoint" / WEIGHTS).read_bytes() == given_up and not (folder / "rl" / STOPPED).exists()


@pytest.mark.slow
def test_a_policy_stopped_by_its_kl_is_looked_at_as_it_is_left(debug_run: Path, tmp_path: Path) -> None:
    folder = begun_again(debug_run, tmp_path / "debug")
    result = hack(folder, max_kl=1e-6, **SHORT)  # type: ignore[arg-type]
    seen = read_json(folder / "rl" / LOOKS)["looks"]
    assert "passed the budget" in result["stopped"] and result["given_up"] == ""
    assert [look["step"] for look in seen] == [0, 2]  # what the first update led to was taken back
    assert seen[0]["scores"] == seen[1]["scores"] and not (folder / "rl" / STOPPED).exists()
    folder = begun_again(debug_run, tmp_path / "later/debug")
    result = hack(folder, beyond_at=2, **{**SHORT, "iterations": 9})  # type: ignore[arg-type]
    assert "at iteration 3" in result["stopped"] and result["given_up"].endswith("kept is the policy it began with")
    assert result["kl"] == 0.0 and (folder / "rl" / STOPPED / WEIGHTS).exists()


def test_the_seconds_of_all_looks_are_kept_free(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "test", {}, 0) as run:
        ppo = PPO(model(), model(), ValueModel(RewardModel(model(1), PAD)), Scripted(good), UpdateConfig(),
                  pad_id=PAD, way=Way())  # fmt: skip
        scores = lambda problems, turns: [0.0 for _ in turns]  # noqa: E731
        for every in (0, 1, 3, 4):
            watch = Watch(GuardConfig(every=every), run.stage("rl"), ppo, lambda problems: [], PROMPTS,
                          Judged("a program", scores), scores)  # fmt: skip
            look = SMALL_BATCH * 0.01 * len(PROMPTS)
            for seconds in (0.3, 5.0, 11.0, 40.0, 97.3):
                n = watch.affordable(seconds, 2.0, 0.01)
                steps = [{0, *(k for k in range(m + 1) if every and k % every == 0), m} for m in (n, n + 1)]
                costs = [2.0 * m + look * len(at) * (every > 0) for m, at in zip((n, n + 1), steps, strict=True)]
                assert costs[1] > seconds and (costs[0] <= seconds or n == 0), (every, seconds, n)
