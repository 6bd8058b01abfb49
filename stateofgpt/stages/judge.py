"""Who judges the answers of a policy in training: somebody whom that policy never learns from.

Owns the choice and, where people ranked, a second reward model of its own: trained from the SFT model on rankings that
the first one did not see, and trusted only if it orders the first one's rankings better than a coin. Where the
simulated labeller ranked, its score without noise is the truth and nothing needs to be trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateofgpt.assistant.session import Turn
from stateofgpt.data.comparisons import Ranking, read_rankings
from stateofgpt.data.skills import Problem
from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.model.checkpoint import load_reward
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.reward_training import held_out_accuracy, score_rankings
from stateofgpt.rl.scoring import LearnedScorer
from stateofgpt.run import Run
from stateofgpt.stages.proxies import taught
from stateofgpt.text.chat import ChatFormat
from stateofgpt.train.loss import Way

Judge = Callable[[Sequence[Problem], Sequence[Turn]], list[float]]

LABELLER, TASKS = "the simulated labeller without noise", "the tasks' own check"
FOLDER = "rl/judge"
FEWEST = 40  # rankings; fewer teach a reward model nothing that could be told from chance
CHECKED = 200  # rankings of the first reward model that the second must order better than a coin
NO_END = -2.0  # as for the first


@dataclass(frozen=True)
class Judged:
    """A judge with its name; without one (`judge` None) the name says why."""

    name: str
    judge: Judge | None


def rankings_apart(run: Run, file: str | None) -> list[Ranking] | None:
    """Rankings that the run's reward model did not learn from, for a judge of its own: a file's, else those its stage
    held out. None where the simulated labeller ranked and no file is named: then the truth is known."""
    if file is not None:
        return read_comparisons(file).strict()
    stage = run.stage("reward")
    if (stage.result() or {"simulated": True})["simulated"]:
        return None
    path = stage.dir / "rankings_held_out.jsonl"
    return read_rankings(path) if path.exists() else []


def second_judge(run: Run, start: Path, rankings: Sequence[Ranking], chat: ChatFormat, way: Way) -> Judged:
    """A reward model trained on `rankings` from the model in `start`, kept in the run's folder; resumable."""
    if len(rankings) < FEWEST:
        return Judged(f"nobody: {len(rankings)} rankings are held out, and a judge needs {FEWEST}", None)
    stage = run.inside(FOLDER)
    result = stage.result() or _train(run, start, rankings, chat, way)
    right, n = result["right"], result["n"]
    told = f"a second reward model that ordered {right} of {n} pairs right which only the first had seen"
    if not better_than_a_coin(right, n):
        return Judged(f"nobody: {told}, no better than a coin", None)
    scorer = LearnedScorer(
        load_reward(stage.checkpoint).to(way.device),
        mean=result["mean"],
        std=result["std"],
        pad_id=chat.tokenizer.pad,
        end_id=chat.end,
        no_end_score=NO_END,
        way=way,
    )
    return Judged(told, lambda problems, turns: [float(score) for score in scorer(turns, problems)])


def better_than_a_coin(right: int, n: int) -> bool:
    """Whether the share right is above a half by two standard errors of a coin."""
    return n > 0 and right / n - 0.5 > 1.0 / math.sqrt(n)


def _train(run: Run, start: Path, rankings: Sequence[Ranking], chat: ChatFormat, way: Way) -> dict[str, Any]:
    seen = run.stage("reward").dir / "rankings.jsonl"
    others = read_rankings(seen)[:CHECKED] if seen.exists() else []

    def checked(model: RewardModel) -> dict[str, float]:
        right, n = held_out_accuracy(score_rankings(model, chat, others, way), others)
        return {"right": right, "n": n, "pair_accuracy": right / max(1, n)}

    stage = run.inside(FOLDER)
    return taught(run, stage, start, rankings, others[:16], run.seed, chat=chat, way=way, usual=rankings, about=checked)
