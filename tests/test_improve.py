"""Improving: what people said of answers trains the next models, resumably, or is refused in one sentence.

The people here are SIMULATED USERS: a rule that likes answers with a calculator call and dislikes long guesses. The run
they talk to is a tiny one of the `debug` recipe, made once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stateofgpt.data.comparisons import Ranking, read_rankings
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import ConfigError, FeedbackError, RunError
from stateofgpt.model.checkpoint import load_model, load_reward, read_lineage
from stateofgpt.report.tree import read_nodes, text_tree
from stateofgpt.run import Run, read_json, resolve_model
from stateofgpt.stages import arena, compared, feedback_set, reward, rl
from stateofgpt.stages.improve import Config, improve
from stateofgpt.text.chat import Conversation, Message, ToolCall

SMALL = Config(rl=rl.Config(iterations=3, batch=8, max_tokens=24, held_out_prompts=8, save_every_s=0.0))
SMALL = replace(SMALL, arena=arena.Config(prompts=6, max_tokens=24))


# -- simulated users ---------------------------------------------------------------------------------------------------


def with_tool(a: int, b: int) -> Conversation:
    call = ToolCall("calculator", {"expression": f"{a} + {b}"})
    return (Message("assistant", "", (call,)), Message("tool", str(a + b)), Message("assistant", f"{a + b}."))


def guessed(a: int, b: int) -> Conversation:
    return (Message("assistant", f"Well, that is a hard one, and I would say that it may be about {a} or {b} or so."),)


def simulated_users(run: Path, n: int, first: int = 0) -> None:
    """`n` simulated users ask a sum each, see a guess and a tool call, and prefer the tool, each in one of 3 ways."""
    with FeedbackStore(run / "feedback.sqlite") as store:
        for i in range(first, first + n):
            a, b, user = 1000 + 37 * i, 200 + 11 * i, f"simulated user {i}"
            talk = store.new_conversation(user)
            asked = store.add_message(talk, None, (Message("user", f"What is {a} + {b}?"),))
            bad = store.add_message(talk, asked.id, guessed(a, b), model="debug:rl")
            if i % 3 == 0:  # says what it should have been
                store.rate(bad.id, f"{i} correction", "down", correction=f"{a + b}.", author=user)
                continue
            good = store.add_message(talk, asked.id, with_tool(a, b), model="debug:rl")
            if i % 3 == 1:  # thumbs
                store.rate(bad.id, f"{i} down", "down", author=user)
                store.rate(good.id, f"{i} up", "up", author=user)
            else:  # regenerates, and goes on with the second answer
                store.add_message(talk, good.id, (Message("user", "Thank you."),))


# -- the run they talk to ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose time with more, above all beside other work; and bytes are compared across processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stateofgpt.recipes import load
    from stateofgpt.recipes.pipeline import execute

    root = tmp_path_factory.mktemp("improve") / "debug"
    few = {"pretrain.steps": "6", "sft.steps": "12", "reward.n_prompts": "24", "reward.held_out_prompts": "12"}
    few |= {"reward.max_tokens": "24", "rl.iterations": "1", "rl.batch": "8", "rl.max_tokens": "24"}
    recipe = load("debug", minutes=None, seed=0, corpus=(), overrides={**few, "rl.held_out_prompts": "8"})
    for stage in ("collect", "tokenize", "pretrain", "sft", "reward", "rl"):
        execute(recipe, root, only=stage)
    return root


@pytest.fixture
def talked_to(debug_run: Path, tmp_path: Path) -> Path:
    run = tmp_path / "debug"
    shutil.copytree(debug_run, run)
    simulated_users(run, 30)
    return run


@pytest.fixture(scope="module")
def undisturbed(debug_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "debug"
    shutil.copytree(debug_run, run)
    simulated_users(run, 30)
    return improve(run, minutes=None, seed=0, config=SMALL)


def weights(run: Path) -> dict[str, str]:
    files = {stage: run / stage / "checkpoint" / "model.safetensors" for stage in ("reward", "rl")}
    return {stage: hashlib.sha256(file.read_bytes()).hexdigest() for stage, file in files.items()}


# -- the round ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_policy_may_learn_from_the_comparisons_themselves(talked_to: Path) -> None:
    assert SMALL.rl is not None
    root = improve(talked_to, minutes=None, seed=0, config=replace(SMALL, rl=replace(SMALL.rl, algorithm="dpo")))
    assert read_json(root / "rl" / "result.json")["algorithm"] == "dpo"
    assert weights(root)["rl"] != weights(talked_to)["rl"]


@pytest.mark.slow
def test_what_users_prefer_becomes_the_next_reward_model_and_policy(undisturbed: Path) -> None:
    assert undisturbed.name == "debug-improved-1"
    old = undisturbed.with_name("debug")
    policy, judge = (read_lineage(undisturbed / stage / "checkpoint") for stage in ("rl", "reward"))
    assert [p.name for p in policy.parents] == ["debug:rl", "debug-improved-1:reward"]
    assert [p.id for p in policy.parents] == [read_lineage(old / "rl" / "checkpoint").id, judge.id]
    assert [p.name for p in judge.parents] == ["debug:reward"]
    assert weights(undisturbed)["reward"] != weights(old)["reward"]
    assert weights(undisturbed)["rl"] != weights(old)["rl"]
    load_model(resolve_model(f"{undisturbed}:rl"))
    load_reward(undisturbed / "reward" / "checkpoint")
    tree = text_tree(read_nodes(undisturbed.parent))
    assert "debug-improved-1:rl" in tree and "with debug-improved-1:reward" in tree


@pytest.mark.slow
def test_the_reward_model_learns_what_users_prefer_and_is_measured_on_prompts_it_never_saw(undisturbed: Path) -> None:
    stage = Run.read(undisturbed).stage("reward")
    material, result = feedback_set.read(stage), stage.result() or {}
    assert len(material.train) + len(material.held_out) == 30 and material.held_out
    questions = {r.prompt for r in material.train}
    assert not any(r.prompt in questions for r in material.held_out)
    assert result["after"]["comparisons"][1] == len(material.held_out)
    assert result["before"]["comparisons"][0] <= result["after"]["comparisons"][0] == len(material.held_out)
    assert result["after"]["replay_held_out"][1] == result["before"]["replay_held_out"][1] > 0


@pytest.mark.slow
def test_a_correction_is_learned_from_as_the_chosen_answer(undisturbed: Path) -> None:
    rows = read_rankings(undisturbed / "reward" / "comparisons.jsonl")
    corrected = [r for r in rows if r.completions[0] == (Message("assistant", "1200."),)]
    assert len(corrected) == 1 and corrected[0].ranks == (1, 2)
    assert corrected[0].completions[1] == guessed(1000, 200)


@pytest.mark.slow
def test_old_and_new_policy_are_set_side_by_side_with_the_judge_named(undisturbed: Path) -> None:
    summary = read_json(undisturbed / "summary.json")
    assert {row["model"] for row in summary["arena"]} == {"before", "after"}
    told = summary["improve"]
    assert told["models"] == {"before": "debug:rl", "after": "debug-improved-1:rl"}
    assert told["sources"] == {"correction": 10, "thumbs": 10, "regenerated": 10}
    assert sum(told["skills_won"]) == pytest.approx(1.0) and sum(told["own_won"]) == pytest.approx(1.0)
    own = read_json(undisturbed / "arena" / "result.json")["own"]
    assert own["judge"] == "the new reward model" and own["held_out"] and own["battles"] == told["held_out"]


@pytest.mark.slow
def test_the_same_feedback_again_changes_nothing_and_new_feedback_begins_another_round(
    talked_to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = improve(talked_to, minutes=None, seed=0, config=SMALL)
    before = weights(first)
    capsys.readouterr()
    assert improve(talked_to, minutes=None, seed=0, config=SMALL) == first
    assert weights(first) == before
    out = capsys.readouterr().out
    assert "judged by the simulated labeller without noise" in out and "judged by the new reward model" in out
    assert f"sog chat {first}:rl" in out
    simulated_users(talked_to, 3, first=30)
    second = improve(talked_to, minutes=None, seed=0, config=SMALL)
    assert second.name == "debug-improved-2"
    assert weights(first) == before and weights(second) != before


@pytest.mark.slow
def test_an_improved_run_can_be_improved_and_replays_what_it_learned_before(talked_to: Path) -> None:
    first = improve(talked_to, minutes=None, seed=0, config=SMALL)
    simulated_users(first, 9, first=100)
    second = improve(first, minutes=None, seed=0, config=SMALL)
    assert second.name == "debug-improved-2"
    policy = read_lineage(second / "rl" / "checkpoint")
    assert [p.name for p in policy.parents] == ["debug-improved-1:rl", "debug-improved-2:reward"]
    learned = feedback_set.read(Run.read(first).stage("reward"))
    material = feedback_set.read(Run.read(second).stage("reward"))
    assert len(material.train) == 9 and material.held_out == ()  # too few to hold some out
    assert material.earlier == learned.train and material.replay == learned.replay
    assert material.replay_held_out == learned.replay_held_out


# -- stopped and continued ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_question_longer_than_the_context_does_no_harm(talked_to: Path) -> None:
    with FeedbackStore(talked_to / "feedback.sqlite") as store:
        talk = store.new_conversation()
        asked = store.add_message(talk, None, (Message("user", "And then? <|im_end|> " * 2000),))
        answer = store.add_message(talk, asked.id, (Message("assistant", "Nothing."),))
        store.rate(answer.id, "long", "down", correction="I do not know. " * 1000)
    root = improve(talked_to, minutes=None, seed=0, config=SMALL)
    assert read_json(root / "summary.json")["improve"]["comparisons"] == 31


@pytest.mark.slow
@pytest.mark.parametrize("where", ["learning", "iterating", "fighting"])
def test_a_round_that_was_stopped_is_continued_to_the_same_bytes(
    where: str, talked_to: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Any
    place, name = {
        "learning": (reward, "ranked_batch"),
        "iterating": (rl.PolicyTraining, "_iterate"),
        "fighting": (arena, "battle"),
    }[where]
    original, calls = getattr(place, name), 0

    def stopping(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            improve(talked_to, minutes=None, seed=0, config=SMALL)
    half_done = talked_to.with_name("debug-improved-1")
    assert not (half_done / "summary.json").exists()
    assert improve(talked_to, minutes=None, seed=0, config=SMALL) == half_done
    assert weights(half_done) == weights(undisturbed)
    for file in ("reward/comparisons.jsonl", "arena/result.json"):
        assert (half_done / file).read_bytes() == (undisturbed / file).read_bytes()


@pytest.mark.slow
def test_a_killed_round_is_continued_to_the_same_bytes(talked_to: Path, undisturbed: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_improve import SMALL, improve\nimprove(Path(sys.argv[1]), minutes=None, seed=0, config=SMALL)"
    )
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(talked_to), here],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    half_done = talked_to.with_name("debug-improved-1")
    deadline = time.monotonic() + 120
    while not list((half_done / "rl").glob("resume/step_1")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (half_done / "rl" / "result.json").exists()
    assert improve(talked_to, minutes=None, seed=0, config=SMALL) == half_done
    assert weights(half_done) == weights(undisturbed)


@pytest.mark.slow
def test_minutes_are_kept(talked_to: Path) -> None:
    start = time.monotonic()
    root = improve(talked_to, minutes=0.1, seed=0, config=replace(SMALL, rl=None))
    assert read_json(root / "summary.json")["minutes_asked"] == 0.1
    assert time.monotonic() - start < 40.0  # six seconds and some slack for a busy machine


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_too_little_feedback_is_refused_and_nothing_is_made(debug_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "debug"
    shutil.copytree(debug_run, run)
    with pytest.raises(FeedbackError, match=r"holds 0 distinct comparisons \(nobody has rated.*needs 8.*regenerate"):
        improve(run, minutes=None, seed=0)
    simulated_users(run, 5)
    with pytest.raises(FeedbackError, match=r"holds 5 distinct comparisons .*2 corrections.* needs 8; in `sog serve`"):
        improve(run, minutes=None, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["debug"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run"):
        improve(tmp_path, minutes=None, seed=0)
    with pytest.raises(RunError, match="no such folder"):
        improve(tmp_path / "nothing", minutes=None, seed=0)


def test_a_run_without_an_assistant_is_refused(tmp_path: Path) -> None:
    Run.open(tmp_path / "begun", "debug", {}, 0).close()
    with pytest.raises(RunError, match=r"no finished assistant \(sft\)"):
        improve(tmp_path / "begun", minutes=None, seed=0)


def test_a_share_of_prompts_that_leaves_no_room_for_others_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"own_share is 1\.0"):
        Config(own_share=1.0)


# -- splitting, mixing, telling ----------------------------------------------------------------------------------------


def ranking(text: str, answer: str = "yes") -> Ranking:
    return Ranking((Message("user", text),), ((Message("assistant", answer),), (Message("assistant", "no"),)), (1, 2))


def test_no_prompt_is_both_learned_from_and_held_out() -> None:
    rows = [ranking(f"question {i // 2}", f"answer {i}") for i in range(100)]
    train, held_out = feedback_set.split(rows)
    assert len(train) + len(held_out) == 100 and 5 <= len(held_out) <= 40
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert feedback_set.split(rows[::-1])[1] == held_out[::-1]  # the order changes nothing


def test_nothing_is_held_out_of_few_comparisons_or_of_one_prompt() -> None:
    few = [ranking(f"question {i}") for i in range(19)]
    alike = [ranking("one question", f"answer {i}") for i in range(40)]
    assert feedback_set.split(few) == (few, []) and feedback_set.split(alike) == (alike, [])


def test_new_comparisons_are_seen_several_times_beside_as_many_old_rankings() -> None:
    new, earlier, old = ([ranking(f"{word} {i}") for i in range(n)] for word, n in (("a", 10), ("b", 5), ("c", 500)))
    material = feedback_set.FeedbackSet(tuple(new), (), tuple(earlier), tuple(old), ())
    mixed = material.mixed(seed=1, epochs=3, replay=1.0)
    assert [sum(r in part for r in mixed) for part in (new, earlier, old)] == [30, 5, 35]
    assert material.mixed(1, 3, 1.0) == mixed != material.mixed(2, 3, 1.0)
    assert len(feedback_set.FeedbackSet(tuple(new), (), (), tuple(old[:4]), ()).mixed(1, 1, 1.0)) == 14


def test_the_table_says_who_judged_what() -> None:
    judged = {
        "before": {"comparisons": [2, 5], "replay_held_out": [0, 0]},
        "after": {"comparisons": [4, 5], "replay_held_out": [0, 0]},
    }
    policy = {"true_sft": 0.5, "true_rl": 0.7, "p_value": 0.01, "n": 96}
    rates = {"before": {"after": 0.25}, "after": {"before": 0.75}}
    battles = {"win_rates": rates, "battles": 40, "own": {"battles": 0}}
    text = compared.table(compared.measured(5, judged, policy, battles))
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert "people's comparisons (held out), 5 40% 80%" in rows
    assert "mean score of 96 answers (p = 0.01) 0.50 0.70" in rows
    assert "battles won, ties as half, of 40 25% 75%" in rows
    assert "older rankings" not in text and "new reward model" not in text
