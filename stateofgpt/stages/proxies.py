"""Reward models of a part of the labels: what more labels are worth is seen by training on fewer.

Owns the choice of the part and how often it is read. How a reward model learns is the reward stage's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stateofgpt.data.comparisons import Ranking
from stateofgpt.model.checkpoint import load_model, save_checkpoint
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.reward_training import RewardTraining, step_order
from stateofgpt.run import Run, Stage
from stateofgpt.stages.reward import USUAL, learn, usual_score
from stateofgpt.text.chat import ChatFormat
from stateofgpt.train.loss import Way
from stateofgpt.train.state import TrainState

LEAST_STEPS = 24


def of_a_share(
    run: Run,
    stage: Stage,
    start: Path,
    rankings: Sequence[Ranking],
    held_out: Sequence[Ranking],
    share: float,
    *,
    chat: ChatFormat,
    way: Way,
    repeat: int = 0,
    training: RewardTraining | None = None,
    least_steps: int = LEAST_STEPS,
) -> dict[str, Any]:
    """Train a reward model from the model in `start` on a share of the rankings, in the stage's folder; its result.

    The rankings are put into an order of (seed, repeat) and the first are taken, so that within a repeat a larger share
    holds the smaller ones. Many are read once, and few as often as `least_steps` steps take. Resumable.
    """
    if (done := stage.result()) is not None:
        return done
    training = training or RewardTraining()
    n = max(2, round(share * len(rankings)))
    order_of = list(range(len(rankings)))
    random.Random(f"labels {run.seed} {repeat}").shuffle(order_of)
    train = [rankings[i] for i in order_of[:n]]
    order: list[list[int]] = []
    while len(order) < least_steps:
        order += step_order(n, run.seed + 1000 * repeat + len(order), training.prompts_per_step)
    with stage.timed():
        model = RewardModel(load_model(start), chat.tokenizer.pad)
        learn(model, chat, train, held_out, order, stage, training, way)
        usual = usual_score(model, chat, rankings[:USUAL])
        save_checkpoint(
            stage.checkpoint,
            model,
            tokenizer=chat.tokenizer,
            stage="reward",
            run=run.root.name,
            parents=[start],
            metrics={"rankings": n},
        )
        TrainState(stage.resume_dir).clear()
        result = {"share": share, "repeat": repeat, "rankings": n, "steps": len(order), **usual}
        stage.finish(result)
    return result
