"""Training the last blocks of a reward model on cached hidden states, resumably, within the time.

Owns the steps, their rates and how many there are. The module and its loss are `rl/upper.py`'s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from stateofgpt.errors import ConfigError
from stateofgpt.model.device import wait
from stateofgpt.model.gpt import GPT
from stateofgpt.rl.linear import Floats, Ints
from stateofgpt.rl.reward_training import step_order
from stateofgpt.rl.upper import Cached, Upper, VoteLoss, scored
from stateofgpt.run import Stage
from stateofgpt.stages.parent import adapters_of
from stateofgpt.stages.vote_features import Material
from stateofgpt.train.loop import LoopConfig, Trainer, fit
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig
from stateofgpt.train.schedule import warmup_stable_decay
from stateofgpt.train.state import TrainState

ADAPTERS = OptimConfig(lr=1e-4, muon_lr=5e-3, weight_decay=0.0)
WHOLE = OptimConfig(lr=5e-5, muon_lr=2e-4, weight_decay=0.0)


@dataclass(frozen=True)
class UpperConfig:
    """How the last blocks learn: `rank` of adapters, or None for whole blocks; `seconds` in all, for every fold."""

    rank: int | None = None
    seconds: float | None = None
    epochs: int = 1
    prompts_per_step: int = 16
    warmup: int = 8
    optim: OptimConfig | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.prompts_per_step < 1:
            raise ConfigError("epochs and prompts_per_step must be at least 1")


@dataclass(frozen=True)
class Trained:
    """A trained upper part with what it needs to score."""

    module: Upper
    cached: Cached
    way: Way

    @torch.no_grad()
    def scores(self, made: Material, chosen: Ints) -> list[list[float]]:
        """Scores of the completions of some rankings, in their order."""
        out: dict[int, list[float]] = {}
        for part, batch in self.cached.parts([int(i) for i in chosen]):
            numbers = iter(scored(self.module, batch, self.way).cpu().tolist())
            for i in part:
                out[i] = [next(numbers) for _ in made.rows[i].completions]
        return [out[int(i)] for i in chosen]


def train_upper(
    gpt: GPT,
    cut: int,
    head: Floats,
    made: Material,
    learn: Ints,
    own: Stage,
    config: UpperConfig,
    seed: int,
    *,
    folds: int,
    parent: Stage,
) -> Trained:
    """Train on the rankings `learn`, beginning from `head`; state is kept in the folder `own`. How many steps an epoch
    may have is measured once, in `parent`, and is the same for all folds."""
    upper = Upper(gpt, cut, head, None if config.rank is None else adapters_of(gpt, config.rank), seed)
    if config.rank is None:
        upper.requires_grad_(True)
    cached = Cached(made.rows, made.states, made.pairs, pad_id=0)
    loss = VoteLoss(made.way)
    epochs = [step_order(len(learn), seed * 10 + epoch, config.prompts_per_step) for epoch in range(config.epochs)]
    order = [[int(learn[i]) for i in step] for epoch in epochs for step in epoch]
    optim = config.optim or (WHOLE if config.rank is None else ADAPTERS)
    loop = LoopConfig(optim=optim)
    if config.seconds is not None:
        steps = parent.decide(
            "upper_steps", lambda: _affordable(upper, cached, order, loop, loss, config, parent, folds)
        )["steps"]
        order = order[:steps]
    fit(
        Trainer(upper, loop),
        lambda step: cached.batches(order[step]),
        loss,
        steps=len(order),
        factor=lambda step: warmup_stable_decay(step, len(order), warmup=config.warmup, decay_share=0.7),
        state=TrainState(own.resume_dir),
        on_resume=own.truncate_metrics,
        callbacks=(lambda step, metrics: own.log(step, **metrics) if metrics else None,),
    )
    TrainState(own.resume_dir).clear()
    return Trained(upper, cached, made.way)


def _affordable(
    upper: Upper,
    cached: Cached,
    order: list[list[int]],
    loop: LoopConfig,
    loss: VoteLoss,
    config: UpperConfig,
    parent: Stage,
    folds: int,
) -> dict[str, int]:
    """Steps for each fold and for the last training, from what two steps at rate 0 take."""
    trainer = Trainer(upper, replace(loop, optim=replace(loop.optim, weight_decay=0.0)))
    timed = order[len(order) // 2 :][:2]
    trainer.step(cached.batches(timed[0]), loss, 0.0)
    wait(upper.score.weight.device)
    began = time.monotonic()
    for step in timed:
        trainer.step(cached.batches(step), loss, 0.0)
    wait(upper.score.weight.device)
    each = (time.monotonic() - began) / len(timed)
    assert config.seconds is not None
    left = config.seconds - parent.seconds()
    scoring = 0.35  # of a step's time goes to each row that is scored after it
    return {"steps": int(np.clip(left / (folds + 1) / (each * (1.0 + scoring)), 1, len(order)))}
