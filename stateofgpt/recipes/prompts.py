"""`sog rl PROMPTS`: a policy from a model, a reward model and a file of prompts, from the command to the report.

Owns the settings such a training begins with, the run folder it lives in and what is printed. What is asked and learned
is the stage's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from stateofgpt.config import apply_overrides, to_dict
from stateofgpt.recipes.continued import BATCH, SAVE_EVERY_S, gentle, is_large
from stateofgpt.recipes.limits import check
from stateofgpt.report.build import build
from stateofgpt.rl.optimization import UpdateConfig
from stateofgpt.run import Run, write_json
from stateofgpt.stages import prompted, rl

RECIPE = "prompts"
ITERATIONS = 50
PART_TOKENS = 8192  # of a batch of answers that go through a model together


def settings(
    prompts: Path,
    model: Path,
    reward: Path,
    *,
    judge: Path | None,
    context: int,
    device: str | None,
    minutes: float | None,
    overrides: Mapping[str, str],
) -> prompted.Config:
    """What a training begins with, with the user's dotted overrides: of `minutes`, else of some iterations.

    Raises ConfigError for what a setting cannot be.
    """
    ppo = gentle(UpdateConfig(part_tokens=PART_TOKENS), is_large(model))
    seconds = None if minutes is None else minutes * 60.0
    config = rl.Config(
        seconds=seconds, iterations=ITERATIONS if seconds is None else None, batch=BATCH, save_every_s=SAVE_EVERY_S,
        ppo=ppo,
    )  # fmt: skip
    made = prompted.Config(
        prompts=str(prompts.resolve()),
        model=str(model.resolve()),
        reward=str(reward.resolve()),
        judge=None if judge is None else str(judge.resolve()),
        context=context,
        device=device,
        rl=config,
    )
    chosen = apply_overrides(made, overrides)
    check(chosen)
    return chosen


def train(config: prompted.Config, out: Path, seed: int) -> dict[str, Any]:
    """Train in the run folder `out`, or continue that; the stage's result."""
    config.check()
    console = Console(highlight=False)
    ignored = ("rl.seconds", "device", "prompts", "model", "reward", "judge")  # the stage knows them by their content
    with Run.open(out, RECIPE, to_dict(config), seed, ignore_keys=ignored) as run:
        result = prompted.run(config, run, lambda line: console.print(line, style="dim", markup=False, soft_wrap=True))
        write_json(run.summary_path, {"rl": result})
        build(run.root)
        console.print("\n".join(_told(result)), markup=False, soft_wrap=True)
        end = f"\nmodel     {run.stage('rl').checkpoint}\nreport    {run.report_path}"
        console.print(end, markup=False, soft_wrap=True)
    return result


def _told(result: Mapping[str, Any]) -> list[str]:
    before, after, judge = result["before"], result["after"], result["guards"].get("judge", prompted.NOBODY)
    lines = [
        f"{result['n']} held-out prompts, before and after {result['iterations']} iterations of {result['algorithm']}"
    ]
    rows = [
        ("reward", "proxy_reward", "{:+.2f}"),
        ("nats per token", "entropy", "{:.3f}"),
        ("tokens", "length", "{:.0f}"),
    ]
    lines += [f"  {name:15} {form.format(before[key])} -> {form.format(after[key])}" for name, key, form in rows]
    lines += [f"  {'KL in nats':15} {result['kl']:.2f}"]
    lines += [
        f"  {'score':15} {result['score_before']:+.2f} -> {result['score_after']:+.2f}, p = {result['p_value']:.2g}"
    ]
    lines += [f"judge: {judge}"]
    return lines + [f"note: {why}" for why in (result["stopped"], result["given_up"]) if why]
