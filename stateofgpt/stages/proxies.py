"""Reward models beside a run's own: of a part of the labels, to see what more of them are worth, or of other labels.

Owns the choice of the part and how often it is read. How a reward model learns is the reward stage's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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


def taught(
    run: Run,
    stage: Stage,
    start: Path,
    rankings: Sequence[Ranking],
    held_out: Sequence[Ranking],
    seed: int,
    *,
    chat: ChatFormat,
    way: Way,
    usual: Sequence[Ranking],
    about: Callable[[RewardModel], dict[str, float]],
    training: RewardTraining | None = None,
    least_steps: int = LEAST_STEPS,
) -> dict[str, Any]:
    """Train a reward model from the model in `start` on all `rankings`, in the stage's folder; its result.

    Many rankings are read once, and few as often as `least_steps` steps take, in an order of `seed`. `usual` says what
    a usual score is, and `about` what else to tell of the finished model. Resumable.
    """
    if (done := stage.result()) is not None:
        return done
    training = training or RewardTraining()
    order: list[list[int]] = []
    while len(order) < least_steps:
        order += step_order(len(rankings), seed + len(order), training.prompts_per_step)
    with stage.timed():
        model = RewardModel(load_model(start).to(way.device), chat.tokenizer.pad)
        learn(model, chat, rankings, held_out, order, stage, training, way)
        told = about(model)
        save_checkpoint(
            stage.checkpoint,
            model,
            tokenizer=chat.tokenizer,
            stage="reward",
            run=run.root.name,
            parents=[start],
            metrics=told,
        )
        TrainState(stage.resume_dir).clear()
        result = {**told, "steps": len(order), **usual_score(model, chat, usual[:USUAL], way)}
        stage.finish(result)
    return result


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
    """A reward model of a share of the rankings; its result.

    They are put into an order of (seed, repeat) and the first are taken, so that within a repeat a larger share holds
    the smaller ones.
    """
    n = max(2, round(share * len(rankings)))
    order_of = list(range(len(rankings)))
    random.Random(f"labels {run.seed} {repeat}").shuffle(order_of)
    about = {"share": share, "repeat": repeat, "rankings": n}
    return taught(
        run,
        stage,
        start,
        [rankings[i] for i in order_of[:n]],
        held_out,
        run.seed + 1000 * repeat,
        chat=chat,
        way=way,
        usual=rankings,
        about=lambda _: about,
        training=training,
        least_steps=least_steps,
    )
