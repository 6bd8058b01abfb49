"""The over-optimisation experiment: its numbers from made-up samples, its page, and its smallest run, also killed."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import sog

from stateofgpt.errors import ConfigError
from stateofgpt.recipes import load
from stateofgpt.recipes.overoptimise import execute
from stateofgpt.report.build import build
from stateofgpt.rl.overoptimisation import best_of_n_kl
from stateofgpt.run import Run, write_json
from stateofgpt.stages.overoptimise import RESULT, Config
from stateofgpt.stages.overoptimised import Pool, Prompted, Trained, guarded, told

N, PROMPTS = 32, 40


def made_up(seed: int = 0) -> tuple[Pool, Trained]:
    """Samples of which a reward model likes two things: what is good, and what spoils it when there is much."""
    rng = np.random.default_rng(seed)
    prompts, rewards = [], []
    for i in range(PROMPTS):
        good, trick = rng.normal(0, 1, (2, N))
        true = good - 0.6 * np.maximum(trick, 0) ** 2
        prompts.append(Prompted(f"p{i}", [[1]] * N, [True] * N, [float(x) for x in true], list(range(N))))
        rewards.append([float(x) for x in 0.5 * good + trick])
    looks = []
    for step in range(0, 40, 4):
        d = step / 10
        scores = [float(p.true[0] + 0.8 * d - 0.3 * d * d + rng.normal(0, 0.2)) for p in prompts]
        looks.append({"step": step, "kl": d * d, "entropy": 0.1, "length": 30.0, "scores": scores,
                      "rewards": [r[0] + d for r in rewards]})  # fmt: skip
    about = {"share": 0.1, "repeat": 0, "rankings": 60, "steps": 24}
    return Pool(prompts, N), Trained("10", about, rewards, looks)


def test_the_numbers_show_a_true_reward_that_rises_and_falls() -> None:
    pool, one = made_up()
    result = told(pool, [one], (1, 2, 4, 8, 16), 0)["proxies"][0]
    chosen = result["best_of_n"]
    assert chosen[0]["true"] == pytest.approx(0.0, abs=1e-9) and chosen[0]["kl"] == 0.0  # the best of one is one
    assert chosen[3]["kl"] == pytest.approx(best_of_n_kl(8))
    assert chosen[3]["d"] == pytest.approx(math.sqrt(best_of_n_kl(8)))
    assert all(a["proxy"] < b["proxy"] for a, b in itertools.pairwise(chosen))
    fit = result["fits"]["rl"]
    assert fit["beta"] > 0 and fit["peak"] is not None
    assert result["rl"][-1]["true"] < max(point["true"] for point in result["rl"]) - 0.1
    assert result["guard"]["stopped_at"] is not None and "held-out score fell" in result["guard"]["why"]


def test_answers_that_came_more_often_count_more_often() -> None:
    prompts = [Prompted("p", [[1], [2]], [True, False], [1.0, -1.0], [0, 0, 0, 1])]
    pool = Pool(prompts, 4)
    assert pool.true.tolist() == [[1.0, 1.0, 1.0, -1.0]]
    assert pool.spread([[5.0, 7.0]]).tolist() == [[5.0, 5.0, 5.0, 7.0]]


def test_guards_leave_a_policy_alone_that_gets_better() -> None:
    same = {"kl": 0.1, "entropy": 0.1, "length": 30.0}
    looks = [{**same, "step": s, "scores": [0.1 * s, 0.2 * s], "rewards": [s, s]} for s in (0, 4, 8, 12)]
    assert guarded(looks) == {"stopped_at": None, "kept": None, "why": ""}


# ---------------------------------------------------------------------------------------------------------- the page


def experiment(folder: Path) -> Path:
    pool, one = made_up()
    with Run.open(folder, "overoptimise", {}, 0):
        about = {"format": 1, "prompts": PROMPTS, "samples": N, "start": {"name": "laptop:sft", "id": "x"}}
        write_json(folder / RESULT, {**about, **told(pool, [one], (1, 2, 4, 8, 16), 0)})
    return folder


def test_the_page_shows_every_chapter_and_the_same_file_makes_the_same_bytes(tmp_path: Path) -> None:
    page = build(experiment(tmp_path / "runs" / "over"))
    text = page.read_text(encoding="utf-8")
    for word in ("Best-of-n", "PPO", "The fits", "What more labels do", "The guards", "60 rankings", "<svg"):
        assert word in text
    assert "<script" not in text and "nan" not in text.lower().replace("finance", "")
    first = page.read_bytes()
    assert build(tmp_path / "runs" / "over").read_bytes() == first


# ----------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    "wrong", [{"shares": ()}, {"shares": (0.0,)}, {"ns": (1, 256)}, {"repeats": 0}, {"every": 0}]
)  # fmt: skip
def test_an_experiment_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="overoptimise"):
        Config(**wrong)


def test_the_recipe_takes_minutes_and_settings_and_no_texts(tmp_path: Path) -> None:
    made = load("overoptimise", minutes=3, seed=1, corpus=(), overrides={"overoptimise.shares": "0.5,1"})
    assert made.minutes == 3 and made.seed == 1 and made.overoptimise.shares == (0.5, 1.0)
    with pytest.raises(ConfigError, match="at least 2"):
        load("overoptimise", minutes=1, seed=0, corpus=(), overrides={})
    with pytest.raises(ConfigError, match="reads no texts"):
        load("overoptimise", minutes=None, seed=0, corpus=(tmp_path,), overrides={})


def test_without_a_model_it_makes_one_in_the_first_part_of_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, begun = [], []
    monkeypatch.setattr("stateofgpt.recipes.pipeline.execute", lambda recipe, out: made.append((recipe, out)))

    def run(config: Config, run: Run, start: Path) -> dict[str, Any]:
        begun.append((config, start))
        return {"proxies": []}

    monkeypatch.setattr("stateofgpt.stages.overoptimise.run", run)
    monkeypatch.setattr("stateofgpt.recipes.overoptimise.build", lambda root: root / "page.html")
    execute(load("overoptimise", minutes=20, seed=3, corpus=(), overrides={}), tmp_path / "over")
    ((recipe, out),) = made
    assert recipe.order() == ("collect", "tokenize", "pretrain", "sft") and (recipe.minutes, recipe.seed) == (8, 3)
    assert out == tmp_path / "over" / "models"
    assert begun[0][0].seconds == pytest.approx(12 * 60) and begun[0][1] == out / "sft" / "checkpoint"


TINY = {
    "seconds": "none", "rankings": 24, "shares": "0.5,1", "prompts": 6, "samples": 8, "ns": "1,2,4", "every": 1,
    "max_tokens": 16, "least_steps": 2, "rl.iterations": 3, "rl.batch": 8, "rl.held_out_prompts": 4,
    "rl.save_every_s": 0,
}  # fmt: skip


@pytest.mark.slow
def test_the_smallest_experiment_runs_from_a_model_and_a_killed_one_ends_the_same(
    debug_run: Path, tmp_path: Path
) -> None:
    settings = [f"--overoptimise.{name}={value}" for name, value in TINY.items()]

    def run(out: Path, **environment: str) -> Any:
        model = debug_run / "sft" / "checkpoint"
        return sog("run", "overoptimise", "--from", model, "--out", out, *settings, **environment)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    made = run(whole)
    assert made.returncode == 0, made.stderr
    assert "best-of-n" in made.stdout and "PPO" in made.stdout
    assert run(killed, SOG_CRASH_AT="save:renamed@ppo/50/resume/step_2").returncode == 137
    made = run(killed)
    assert made.returncode == 0, made.stderr
    assert (whole / RESULT).read_bytes() == (killed / RESULT).read_bytes()
    result = json.loads((whole / RESULT).read_text())
    assert [proxy["rankings"] for proxy in result["proxies"]] == [12, 24]
    assert build(whole).read_bytes() == (whole / "overoptimise.html").read_bytes()
    refused = sog("eval", "--out", whole)
    assert refused.returncode == 2 and "holds an experiment" in refused.stderr
