"""The pipeline: every stage of a recipe in order, within the minutes asked for, then the summary and the report.

Owns the order of stages, what each may cost, and `summary.json`. What a stage does is its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from stateofgpt.config import to_dict
from stateofgpt.data.demonstrations import read_demonstrations
from stateofgpt.data.documents import Account, find_files
from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.errors import ConfigError, RunError
from stateofgpt.model.device import choose_device
from stateofgpt.recipes.recipe import Recipe
from stateofgpt.recipes.summary import write_summary
from stateofgpt.report.build import build
from stateofgpt.run import STAGES, Run, Stage
from stateofgpt.stages import algorithms, arena, collect, evaluate, parent, reward, rl, sft, sizes, tokenize

RUNNERS: dict[str, Callable[[Any, Run], dict[str, Any]]] = {
    "collect": collect.run,
    "tokenize": tokenize.run,
    "pretrain": sizes.run,
    "sft": sft.run,
    "reward": reward.run,
    "rl": rl.run,
    "eval": evaluate.run,
    "arena": arena.run,
}
TIMED = {"pretrain": 0.48, "sft": 0.27, "reward": 0.1, "rl": 0.15}  # shares of what training may take in all
MEASURING = 0.12  # share of all minutes kept for evaluation, arena and report
REPORTING = 0.03  # where a recipe has no evaluation


def execute(recipe: Recipe, out: Path, only: str | None = None) -> None:
    """Run all stages that are not done yet (or `only` one of them) in the folder `out`; continue what was begun."""
    began = time.monotonic() - _age_of_process()
    order = recipe.order()
    if only is not None and only not in order:
        raise ConfigError(f"the recipe {recipe.name} has no {only} stage; it has {', '.join(order)}")
    if "collect" in order and not recipe.collect.sources and not recipe.collect.corpus:
        raise ConfigError(f"the recipe {recipe.name} reads no text but yours; give it one with --corpus FILE")
    console = Console(highlight=False)
    if only is None:
        _check_own(recipe, Run.read(out) if (out / "run.json").is_file() else None)
    with Run.open(out, recipe.name, to_dict(recipe), recipe.seed) as run:
        for name in order if only is None else (only,):
            _require_earlier(run, name, order)
            stage = run.stage(name)
            if stage.done:
                console.print(f"[dim]{name:9} done before, in {stage.seconds():.0f} s[/dim]")
                continue
            console.print(f"[bold]{name:9}[/bold]", end=" ")
            result = RUNNERS[name](_config(recipe, run, stage, began), run)
            console.print(f"{_told(name, result)} [dim]({stage.seconds():.0f} s)[/dim]")
        if not _is_told(run):
            write_summary(recipe, run, time.monotonic() - began)
            if only is None:
                build(run.root)
                write_summary(recipe, run, time.monotonic() - began)
        if only is None:
            console.print(f"\nreport    {run.report_path}\n{_next(order, out)}")


def _next(order: tuple[str, ...], out: Path) -> str:
    if "rl" in order:
        return f"chat      sog chat {out}:rl\npage      sog serve {out}:rl"
    models = [name for name in ("sft", "pretrain") if name in order]
    return f"sample    sog sample {out}:{models[0]}" if models else f"models    none: the recipe has {', '.join(order)}"


def _is_told(run: Run) -> bool:
    """Whether summary and report are newer than every result, so that there is nothing new to tell."""
    told = [path.stat().st_mtime for path in (run.summary_path, run.report_path) if path.exists()]
    results = [(stage.dir / "result.json").stat().st_mtime for stage in run.stages() if stage.done]
    return len(told) == 2 and min(told) >= max(results, default=0.0)


def _check_own(recipe: Recipe, run: Run | None) -> None:
    """Look at the user's demonstrations, rankings, model and device now: a mistake in them must not show after minutes
    of training."""
    done = {stage.name for stage in run.stages() if stage.done} if run is not None else set()
    done |= set(STAGES) - set(recipe.order())
    if "collect" not in done:
        find_files(recipe.collect.corpus, Account())
    if "pretrain" not in done:
        choose_device(recipe.pretrain.device)
        if recipe.pretrain.parent is not None:
            parent.check(Path(recipe.pretrain.parent))
    if "sft" not in done:
        for file in recipe.sft.files:
            read_demonstrations(Path(file))
    if "reward" not in done and recipe.reward.rankings is not None:
        read_comparisons(recipe.reward.rankings).strict()
    if "rl" not in done:
        algorithms.check_files(recipe.rl.tasks, recipe.rl.rankings, recipe.rl.prompts)


def _age_of_process() -> float:
    """Seconds since this process began, so that imports count towards the minutes too."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.process_time()


def _require_earlier(run: Run, name: str, order: tuple[str, ...]) -> None:
    for earlier in order[: order.index(name)]:
        if not run.stage(earlier).done and not (name in ("eval", "arena") and earlier in ("reward", "rl", "eval")):
            raise RunError(f"{run.root} has no finished {earlier} stage, which {name} needs; run `sog {earlier}` first")


def _config(recipe: Recipe, run: Run, stage: Stage, began: float) -> Any:
    """The stage's configuration, with its seconds set to a share of what is left of the minutes, decided once."""
    config = getattr(recipe, stage.name)
    if recipe.minutes is None or stage.name not in TIMED or config.seconds is None:
        return config
    order = recipe.order()
    later = [n for n in TIMED if n in order and STAGES.index(n) >= STAGES.index(stage.name)]
    kept = MEASURING if "eval" in order else REPORTING
    share = TIMED[stage.name] / sum(TIMED[n] for n in later)
    minutes = recipe.minutes

    def left() -> dict[str, Any]:
        spent = max(time.monotonic() - began, sum(s.seconds() for s in run.stages()))
        return {"seconds": round(max(5.0, (minutes * 60.0 * (1.0 - kept) - spent) * share), 1)}

    return replace(config, seconds=stage.decide("budget", left)["seconds"])


def _told(name: str, result: dict[str, Any]) -> str:
    """One line about a finished stage."""
    if name == "collect":
        return f"{sum(s['documents'] for s in result['sources']):,} documents of {len(result['sources'])} sources"
    if name == "tokenize":
        return f"vocabulary of {result['vocab_size']:,}, {result['bytes_per_token']['all']:.2f} bytes per token"
    if name == "pretrain":
        return (
            f"{result['n_params'] / 1e6:.1f}M parameters, {result['tokens'] / 1e6:.2f}M tokens, "
            f"{result['val_bpb_start']:.2f} -> {result['val_bpb']:.2f} bits per byte held out"
        )
    if name == "sft":
        return f"{result['conversations']:,} conversations, held-out loss {result['val_loss']:.3f}"
    if name == "reward":
        ceiling = f", noise ceiling {result['ceiling']:.1%}" if "ceiling" in result else ""
        return f"{result['n_prompts']} prompts, held-out pairs {result['pair_accuracy']:.1%} right{ceiling}"
    if name == "rl":
        return (
            f"true score {result['true_sft']:.2f} -> {result['true_rl']:.2f} (p = {result['p_value']:.2g}), "
            f"KL {result['kl']:.1f} nats" + (f"; {why}" if (why := result.get("given_up")) else "")
        )
    if name == "eval":
        right = {
            m: sum(s["right"] for s in of.values()) / max(1, sum(s["n"] for s in of.values()))
            for m, of in result["skills"].items()
        }
        return "skills " + ", ".join(f"{m} {share:.0%}" for m, share in right.items())
    return "  ".join(f"{row['model']} {row['rating']:.0f}" for row in result["leaderboard"])
