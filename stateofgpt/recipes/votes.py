"""A reward model from a file of votes, from the command to the report; and the health of one that is there.

Owns the run folder such a model lives in and what is printed. What is learned and measured is the stage's and
`eval/health.py`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from stateofgpt.config import to_dict
from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.eval import health as measures
from stateofgpt.model.checkpoint import load_reward, read_lineage
from stateofgpt.model.device import choose_device
from stateofgpt.report.build import build
from stateofgpt.report.health import told
from stateofgpt.rl.reward_training import score_rankings
from stateofgpt.run import Run, sha256_file, write_json
from stateofgpt.run.files import plain
from stateofgpt.stages import votes
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer

RECIPE = "votes"


def train(
    data: Path,
    model: Path,
    out: Path,
    *,
    minutes: float | None,
    seed: int,
    as_json: bool,
    lora: int | None,
    layers: int | None,
    folds: int,
    context: int,
    device: str | None,
) -> None:
    """Train a reward model on the votes in `data` from `model` in the run folder `out`, or continue that."""
    console = Console(highlight=False, stderr=as_json)
    config = votes.Config(
        data=str(data.resolve()),
        model=str(model.resolve()),
        seconds=None if minutes is None else minutes * 60.0,
        lora=lora,
        layers=layers,
        folds=folds,
        context=context,
        device=device,
    )
    with Run.open(out, RECIPE, to_dict(config), seed, ignore_keys=("seconds", "data", "model", "device")) as run:
        result = votes.run(config, run, lambda line: console.print(line, style="dim", markup=False, soft_wrap=True))
        write_json(run.summary_path, {"reward": {k: v for k, v in result.items() if k != "examples"}})
        build(run.root)
        if as_json:
            print(json.dumps(plain(result), indent=2, ensure_ascii=False))
            return
        console.print("\n" + "\n".join(told(result["health"])), markup=False, soft_wrap=True)
        console.print(
            f"\nmodel     {run.stage('reward').checkpoint}\nreport    {run.report_path}", markup=False, soft_wrap=True
        )


def health(model: Path, data: Path, *, as_json: bool, device: str | None = None) -> None:
    """Print whether the reward model can be trusted on the votes in `data`."""
    found = read_comparisons(data)
    reward = load_reward(model).to(choose_device(device))
    scores = score_rankings(reward, ChatFormat(Tokenizer.load(model)), found.rankings)
    seen = read_lineage(model).metrics.get("trained_on") == sha256_file(data)
    measured: dict[str, Any] = measures.health(scores, found.rankings, seen=seen)
    if as_json:
        print(json.dumps(plain({"model": str(model), "data": str(data), **measured}), indent=2, ensure_ascii=False))
        return
    print(found.told())
    print("\n".join(told(measured)))
