"""`summary.json`: what a run measured, in one file that anyone can check. Owns its keys; reads the stages' results."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from stateofgpt.data.mixture import as_json, plan
from stateofgpt.recipes.recipe import Recipe
from stateofgpt.run import STAGES, Run, read_json, write_json
from stateofgpt.train.dial import peak_memory_bytes


def write_summary(recipe: Recipe, run: Run, seconds: float) -> None:
    """Write what the finished stages found; a stage that has not run yet is left out."""
    results = {name: run.stage(name).result() if name in recipe.order() else None for name in STAGES}
    stages = {s.name: round(s.seconds(), 2) for s in run.stages()}
    before = _read(run)
    told = before.get("wall_seconds", {}).get("total", 0.0)  # looking at a finished run again does not make it shorter
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "minutes_asked": recipe.minutes,
        "wall_seconds": {"total": round(max(seconds, sum(stages.values()), told), 2), **stages},
        "peak_memory_bytes": max(peak_memory_bytes(), before.get("peak_memory_bytes", 0)),
        "machine": machine(),
    }
    if (collected := results["collect"]) is not None:
        tokenized, trained = results["tokenize"], results["pretrain"]
        tokens = tokenized["tokens"] if tokenized else {}
        rows = plan(collected["sources"], tokens, trained["tokens"] if trained else None)
        summary["data"] = {"sources": as_json(rows)}
    keep: dict[str, tuple[str, tuple[str, ...]]] = {
        "tokenizer": ("tokenize", ("vocab_size", "bytes_per_token")),
        "pretrain": ("pretrain", ("n_params", "tokens", "tokens_per_second", "val_bpb_start", "val_bpb")),
        "reward": ("reward", ("pair_accuracy", "ceiling", "rank_correlation", "apart", "n")),
        "rl": ("rl", ("true_sft", "true_rl", "p_value", "kl", "entropy_sft", "entropy_rl", "stopped", "given_up")),
    }
    for key, (stage, names) in keep.items():
        if (result := results[stage]) is not None:
            summary[key] = {name: result[name] for name in names if name in result}
    if beside := _sizes(run):
        summary["sizes"] = beside
    if (measured := results["eval"]) is not None:
        summary["skills"] = measured["skills"]
        names = ("entropy", "distinct", "new", "plausible", "n")
        summary["diversity"] = {m: {k: d[k] for k in names} for m, d in measured["diversity"].items()}
        summary["variety"] = measured.get("variety", {})  # a run of an earlier version has not measured it
    if (battles := results["arena"]) is not None:
        summary["arena"] = battles["leaderboard"]
    write_json(run.summary_path, summary)


def _sizes(run: Run) -> list[dict[str, Any]]:
    """The models pretrained beside the run's own, the smallest first."""
    names = ("n_params", "tokens", "tokens_per_second", "val_bpb")
    found = []
    for path in run.root.glob("pretrain/*x*/result.json"):
        result = read_json(path)
        found.append({"size": path.parent.name, **{name: result[name] for name in names}})
    return sorted(found, key=lambda row: (row["n_params"], row["size"]))


def machine() -> dict[str, Any]:
    """What this run was made on."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _read(run: Run) -> dict[str, Any]:
    before: dict[str, Any] = read_json(run.summary_path) if run.summary_path.exists() else {}
    return before
