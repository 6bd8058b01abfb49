"""One iteration of policy optimisation, whatever the algorithm: look at the answers, then update.

Owns what all algorithms share: the policy and what it began as, the scores, log-probabilities, the measured KL with its
coefficient, epochs and minibatches, and what there is to save. What is learned from the answers is a subclass's. Knows
no files and no labels.

What lives where, if the models are on a device of their own: what is looked at (`Seen`: scores, log-probabilities and
all that is made of them, rewards, advantages, whitening) is on the CPU, copied there once per batch; what is learned
from (`Experience`) is on the models' device, copied there once. Between the two no loop waits for the device: sizes are
known on the CPU, and what an update tells is looked at after the last one (`Told`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stateofgpt.assistant.session import Turn
from stateofgpt.data.skills import Problem
from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import GPT
from stateofgpt.model.lora import switched_off
from stateofgpt.rl.objective import adapt_kl_coefficient, masked_mean
from stateofgpt.rl.rollout import (
    Rollouts,
    drawn_logprobs,
    in_parts,
    policy_logprobs,
    rollouts_of,
    sampled_logprobs,
)
from stateofgpt.rl.scoring import Scorer
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, LanguageModelLoss, Way
from stateofgpt.train.optim import OptimConfig

Logprobs = Literal["engine", "training"]
AT_ONCE = 16  # rows that are looked at in one pass


def _adam(lr: float) -> LoopConfig:
    return LoopConfig(optim=OptimConfig(lr=lr, eps=1e-5, weight_decay=0.0, use_muon=False))


@dataclass(frozen=True)
class UpdateConfig:
    """Everything about the updates. KL is in nats per answer, summed over its sampled tokens.

    `kl_gain` is how fast the coefficient follows: the paper's 0.1 is for thousands of batches, a run here has tens.
    `value*`, `gamma` and `lam` are PPO's own, the rest is every algorithm's. The returns that the value model learns
    have a lambda of their own, `value_lam`; None: `lam`. `pretraining` is the weight of the loss on
    texts of pretraining, `pretraining_rows` of which go with every update (InstructGPT's PPO-ptx); None for none.
    `part_tokens` is how many tokens of answers, in the order of their lengths, go through a model together in updates
    and for their scores, so that short ones are not padded to the longest: the same mathematics in other last bits.
    None: all of them.
    """

    epochs: int = 2
    minibatches: int = 2
    clip: float = 0.2
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    value_lam: float | None = None
    kl_coefficient: float = 0.15
    kl_target: float | None = None
    kl_gain: float = 1.0
    no_end_score: float = -2.0
    policy: LoopConfig = field(default_factory=lambda: _adam(1.5e-4))
    value: LoopConfig = field(default_factory=lambda: _adam(3e-4))
    pretraining: float | None = None
    pretraining_rows: int | None = None
    part_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "pretraining_rows", "part_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"ppo.{name} is {value}, must be at least 1")
        for name in ("clip", "value_clip", "kl_target", "pretraining"):
            if (value := getattr(self, name)) is not None and not value > 0.0:
                raise ConfigError(f"ppo.{name} is {value}, must be above 0")
        for name in ("gamma", "lam", "value_lam"):
            if (value := getattr(self, name)) is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"ppo.{name} is {value}, must be from 0 to 1")


@dataclass(frozen=True)
class Experience:
    """Rollouts with all that the updates hold fixed, on the device of what learns. Tensors are [B, T]; advantages may
    be [B, 1]."""

    rollouts: Rollouts
    logprobs: Tensor
    reference: Tensor
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None

    @property
    def weight(self) -> float:
        return float(self.rollouts.sampled.sum())

    def to(self, device: torch.device) -> Experience:
        """The same on another device."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        values, returns = (None if x is None else moved(x) for x in (self.values, self.returns))
        fixed = moved(self.logprobs), moved(self.reference), moved(self.advantages)
        return Experience(self.rollouts.to(device), *fixed, values, returns)

    def rows(self, index: Tensor) -> Experience:
        """Some rows (`index` is on the CPU), without the columns that are padding in all of them."""
        part = self.rollouts.rows(index)
        used = part.mask.shape[1]
        there = index.to(self.logprobs.device, non_blocking=True)

        def cut(x: Tensor) -> Tensor:
            return x[there][:, :used]

        values, returns = (None if x is None else cut(x) for x in (self.values, self.returns))
        return Experience(part, cut(self.logprobs), cut(self.reference), cut(self.advantages), values, returns)


@dataclass(frozen=True)
class Seen:
    """Answers before anything is learned from them, on the CPU: `scores` [B], log-probabilities [B, T], and what to
    tell. `there` are the rollouts on the models' device."""

    rollouts: Rollouts
    there: Rollouts
    logprobs: Tensor
    reference: Tensor
    scores: Tensor
    watched: dict[str, float]


class Told:
    """What updates tell, kept as it comes, so that a number on a device is waited for only when all are there."""

    def __init__(self, names: Sequence[str]) -> None:
        self._found: dict[str, list[float | Tensor]] = {name: [] for name in names}

    def add(self, name: str, value: float | Tensor) -> None:
        self._found[name].append(value)

    def means(self, updates: int) -> dict[str, float]:
        """The sum of each over the number of updates."""
        return {name: sum(self._floats(name), 0.0) / max(1, updates) for name in self._found}

    def _floats(self, name: str) -> list[float]:
        found = self._found[name]
        waiting = [value for value in found if isinstance(value, Tensor)]
        known = iter(torch.stack(waiting).cpu().tolist() if waiting else ())
        return [next(known) if isinstance(value, Tensor) else value for value in found]


class Optimization(ABC):
    """A policy and how it learns from its answers.

    `logprobs` says whose log-probabilities of the drawn tokens are held fixed: "training" computes them again by the
    forward pass that the updates use, "engine" takes those of the rollout. They are the same numbers within 1e-4 where
    the way is float32. In bfloat16 they are not: the rollout is always float32, and against it the ratio of a policy
    that has not changed yet would not be 1 but off by the rounding, token by token, which the clip takes for a change.

    `pretraining`, where it is set, draws a batch of pretraining rows with the generator it is given.
    """

    told: tuple[str, ...] = ("policy_loss", "clip_fraction", "approx_kl")  # of the updates, means over them

    def __init__(
        self,
        policy: GPT,
        reference: GPT,
        scorer: Scorer,
        config: UpdateConfig,
        *,
        pad_id: int,
        way: Way,
        logprobs: Logprobs = "training",
    ) -> None:
        self.policy, self.reference, self.scorer = policy, reference, scorer
        self.config, self.pad_id, self.way, self.logprobs = config, pad_id, way, logprobs
        self.kl_coefficient = config.kl_coefficient
        self.pretraining: Callable[[torch.Generator], Batch] | None = None
        self._language = LanguageModelLoss(way.dtype, fused=way.fused, device=way.device)
        self.trainers: dict[str, Trainer] = {"policy": Trainer(policy, config.policy, way.kernels)}

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.policy.lm_head.weight.device

    @property
    def together(self) -> bool:
        """Whether answers to one prompt go through the models in one row, so that it is computed once."""
        return self.way.fuses(self.policy)

    # ---- answers --------------------------------------------------------------------------------------------------

    def scores(self, turns: Sequence[Turn], problems: Sequence[Problem | None] = ()) -> Tensor:
        """Scores [B]."""
        return self.scorer(turns, problems)

    @torch.no_grad()
    def look(self, turns: Sequence[Turn], problems: Sequence[Problem | None] = (), *, exact: bool = False) -> Seen:
        """Score answers and see how far the policy is from what it began as.

        With the engine's log-probabilities the entropy is estimated, by the mean of -log pi of what was drawn, unless
        an `exact` look is asked for.
        """
        rollouts = rollouts_of(turns, self.pad_id, self.together)
        there, mask = rollouts.to(self.device), rollouts.mask
        if self.logprobs == "engine" and not exact:
            logprobs = drawn_logprobs(turns, rollouts)
            entropy = -logprobs
        else:
            found = in_parts(lambda part: policy_logprobs(self.policy, part, self.way), there, AT_ONCE)
            logprobs, entropy = (x.cpu() for x in found)
        with switched_off(self.reference):  # where it is the policy without its adapters
            (reference,) = in_parts(lambda part: (sampled_logprobs(self.reference, part, self.way),), there, AT_ONCE)
        reference, scores = reference.cpu(), self.scores(turns, problems).cpu()
        watched = {
            "proxy_reward": scores.mean().item(),
            "kl": ((logprobs - reference) * mask).sum(1).mean().item(),
            "entropy": masked_mean(entropy, mask).item(),
            "length": mask.sum(1).mean().item(),
            "kl_coefficient": self.kl_coefficient,
        }
        return Seen(rollouts, there, logprobs, reference, scores, watched)

    @torch.no_grad()
    def experience(
        self, turns: Sequence[Turn], problems: Sequence[Problem | None] = ()
    ) -> tuple[Experience, dict[str, float]]:
        """What can be learned from answers; also what there is to watch before the update."""
        seen = self.look(turns, problems)
        return self._experience(seen).to(self.device), seen.watched

    @abstractmethod
    def _experience(self, seen: Seen) -> Experience:
        """What is held fixed, its rollouts being those `there`."""

    # ---- updates --------------------------------------------------------------------------------------------------

    def update(self, experience: Experience, order: torch.Generator, factor: float, kl: float) -> dict[str, float]:
        """All epochs over one batch of experience; learning rates times `factor`. The means over the updates made."""
        c, rows = self.config, experience.rollouts.ids.shape[0]
        told, updates = Told(self.told), 0
        for _ in range(c.epochs if rows else 0):
            for index in self._shuffled(rows, order).chunk(c.minibatches):
                updates += 1
                extra = None if self.pretraining is None else self.pretraining(order)
                self._learn(experience.rows(index), extra, told, factor)
        self._adapt(kl)
        return told.means(updates)

    def _shuffled(self, rows: int, order: torch.Generator) -> Tensor:
        """The numbers of all rows in the order in which they are learned from."""
        return torch.randperm(rows, generator=order)

    def _learn(self, batch: Experience, extra: Batch | None, told: Told, factor: float) -> None:
        """One update."""

        def loss(model: GPT, batch: Experience) -> Tensor:
            value = self._policy_loss(model, batch, told)
            if extra is not None and self.config.pretraining is not None:
                value = value + self.config.pretraining * self._language(model, extra) / extra.weight
            return value * batch.weight  # the trainer divides by it

        told.add("policy_loss", self.trainers["policy"].step([batch], loss, factor)["loss"])

    def _new_logprobs(self, model: GPT, rollouts: Rollouts) -> Tensor:
        """Log-probabilities [B, T] of the sampled tokens, to be learned by."""
        return self._updated(lambda part: sampled_logprobs(model, part, self.way), rollouts)

    def _updated(self, forward: Callable[[Rollouts], Tensor], rollouts: Rollouts) -> Tensor:
        """A forward pass of an update, over all rows at once or in parts."""
        if self.config.part_tokens is None:
            return forward(rollouts)
        return in_parts(lambda part: (forward(part),), rollouts, AT_ONCE, self.config.part_tokens)[0]

    @abstractmethod
    def _policy_loss(self, model: GPT, batch: Experience, told: Told) -> Tensor:
        """The mean loss of a minibatch."""

    def _adapt(self, kl: float) -> None:
        if self.config.kl_target is not None:
            self.kl_coefficient = adapt_kl_coefficient(
                self.kl_coefficient, kl, self.config.kl_target, self.config.kl_gain
            )

    # ---- state ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All that learning changes, beside `numbers`."""
        return {f"{name}.{n}": t for name, trainer in self.trainers.items() for n, t in trainer.tensors().items()}

    def numbers(self) -> dict[str, float]:
        """The same for what is no tensor."""
        return {"kl_coefficient": self.kl_coefficient}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Take over what both gave."""
        for name, trainer in self.trainers.items():
            prefix = f"{name}."
            trainer.load({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})
        self.kl_coefficient = numbers["kl_coefficient"]
