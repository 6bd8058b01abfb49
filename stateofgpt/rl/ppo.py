"""Proximal policy optimisation against a reward model: one iteration of rollouts and updates.

The steps, as in InstructGPT (arXiv 2203.02155) and Huang et al. (2403.17031): sample answers to prompts; score each
with the reward model, normalised; penalise every token's divergence from the SFT policy; estimate advantages with a
value model that began as the reward model; whiten them; a few epochs of clipped updates of policy and value. Knows no
files and no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stateofgpt.assistant.session import Turn
from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.rl.objective import (
    adapt_kl_coefficient,
    advantages,
    clipped_policy_loss,
    clipped_value_loss,
    masked_mean,
    shaped_rewards,
    whiten,
)
from stateofgpt.rl.reward_training import score_ids
from stateofgpt.rl.rollout import Rollouts, policy_logprobs, rollouts_of, values
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig


def _adam(lr: float) -> LoopConfig:
    return LoopConfig(optim=OptimConfig(lr=lr, eps=1e-5, weight_decay=0.0, use_muon=False))


@dataclass(frozen=True)
class PPOConfig:
    """Everything about the updates. KL is in nats per answer, summed over its sampled tokens.

    `kl_gain` is how fast the coefficient follows: the paper's 0.1 is for thousands of batches, a run here has tens.
    """

    epochs: int = 2
    minibatches: int = 2
    clip: float = 0.2
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    kl_coefficient: float = 0.15
    kl_target: float | None = None
    kl_gain: float = 1.0
    no_end_score: float = -2.0
    policy: LoopConfig = field(default_factory=lambda: _adam(1.5e-4))
    value: LoopConfig = field(default_factory=lambda: _adam(3e-4))

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ppo.{name} is {getattr(self, name)}, must be at least 1")
        for name in ("clip", "value_clip", "kl_target"):
            if (value := getattr(self, name)) is not None and not value > 0.0:
                raise ConfigError(f"ppo.{name} is {value}, must be above 0")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"ppo.{name} is {getattr(self, name)}, must be from 0 to 1")


@dataclass(frozen=True)
class Experience:
    """Rollouts with all that the updates hold fixed; tensors [B, T]."""

    rollouts: Rollouts
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def weight(self) -> float:
        return float(self.rollouts.mask.sum())

    def rows(self, index: Tensor) -> Experience:
        part = self.rollouts.rows(index)
        used = part.mask.shape[1]
        cut = [x[index][:, :used] for x in (self.logprobs, self.values, self.advantages, self.returns)]
        return Experience(part, *cut)


class PPO:
    """Policy, reference, reward and value model, with the optimizers of the two that learn."""

    def __init__(
        self,
        policy: GPT,
        reference: GPT,
        reward: RewardModel,
        value: ValueModel,
        config: PPOConfig,
        *,
        pad_id: int,
        end_id: int,
        reward_mean: float,
        reward_std: float,
        way: Way,
    ) -> None:
        self.policy, self.reference, self.reward, self.value = policy, reference, reward, value
        self.config, self.pad_id, self.end_id, self.way = config, pad_id, end_id, way
        self.mean, self.std = reward_mean, reward_std
        self.kl_coefficient = config.kl_coefficient
        self.policy_trainer = Trainer(policy, config.policy, way.kernels)
        self.value_trainer = Trainer(value, config.value, way.kernels)

    def scores(self, turns: Sequence[Turn]) -> Tensor:
        """Normalised rewards [B]; an answer that did not end its turn gets `no_end_score`, whatever it says."""
        context = self.reward.config.max_position_embeddings
        raw = score_ids(self.reward, [[*t.prompt_ids, *t.ids][-context:] for t in turns], self.pad_id)
        normal = [(s - self.mean) / self.std for s in raw]
        ended = [t.finish == "stop" and t.ids[-1] == self.end_id for t in turns]
        return torch.tensor([s if end else self.config.no_end_score for s, end in zip(normal, ended, strict=True)])

    @torch.no_grad()
    def experience(self, turns: Sequence[Turn]) -> tuple[Experience, dict[str, float]]:
        """Score turns and estimate advantages; also what there is to watch before the update."""
        rollouts = rollouts_of(turns, self.pad_id)
        mask = rollouts.mask
        logprobs, entropy = self._in_parts(lambda part: policy_logprobs(self.policy, part, self.way), rollouts)
        reference, _ = self._in_parts(lambda part: policy_logprobs(self.reference, part, self.way), rollouts)
        (value,) = self._in_parts(lambda part: (self._values(self.value, part),), rollouts)
        scores = self.scores(turns)
        rewards = shaped_rewards(scores, logprobs, reference, mask, self.kl_coefficient)
        advantage, returns = advantages(rewards, value, mask, gamma=self.config.gamma, lam=self.config.lam)
        kl = ((logprobs - reference) * mask).sum(1).mean().item()
        watched = {
            "proxy_reward": scores.mean().item(),
            "kl": kl,
            "entropy": masked_mean(entropy, mask).item(),
            "length": mask.sum(1).mean().item(),
            "kl_coefficient": self.kl_coefficient,
        }
        return Experience(rollouts, logprobs, value, whiten(advantage, mask), returns), watched

    def update(self, experience: Experience, order: torch.Generator, factor: float, kl: float) -> dict[str, float]:
        """All epochs over one batch of experience; learning rates times `factor`."""
        c, rows = self.config, experience.rollouts.ids.shape[0]
        sums = {"policy_loss": 0.0, "value_loss": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0}
        updates = 0
        for _ in range(c.epochs):
            for index in torch.randperm(rows, generator=order).chunk(c.minibatches):
                batch = experience.rows(index)
                updates += 1
                sums["policy_loss"] += self.policy_trainer.step([batch], self._policy_loss(sums), factor)["loss"]
                sums["value_loss"] += self.value_trainer.step([batch], self._value_loss, factor)["loss"]
        if c.kl_target is not None:
            self.kl_coefficient = adapt_kl_coefficient(self.kl_coefficient, kl, c.kl_target, c.kl_gain)
        return {name: total / updates for name, total in sums.items()}

    def _policy_loss(self, sums: dict[str, float]) -> Callable[[GPT, Experience], Tensor]:
        def loss(model: GPT, batch: Experience) -> Tensor:
            new, _ = policy_logprobs(model, batch.rollouts, self.way)
            out = clipped_policy_loss(new, batch.logprobs, batch.advantages, batch.rollouts.mask, self.config.clip)
            sums["clip_fraction"] += out.clip_fraction.item()
            sums["approx_kl"] += out.approx_kl.item()
            return out.loss * batch.weight

        return loss

    def _values(self, model: ValueModel, rollouts: Rollouts) -> Tensor:
        """Values on the scale of the normalised scores: the model began as the reward model, on its raw scale."""
        return (values(model, rollouts, self.way) - self.mean) / self.std

    def _value_loss(self, model: ValueModel, batch: Experience) -> Tensor:
        new = self._values(model, batch.rollouts)
        mask = batch.rollouts.mask
        return clipped_value_loss(new, batch.values, batch.returns, mask, self.config.value_clip) * batch.weight

    def _in_parts(
        self, forward: Callable[[Rollouts], tuple[Tensor, ...]], rollouts: Rollouts, at_once: int = 16
    ) -> tuple[Tensor, ...]:
        """Run a forward pass over rows in parts of like length, and put the results back into [B, T]."""
        B, T = rollouts.mask.shape
        last = (rollouts.mask * torch.arange(1, T + 1)).argmax(1)
        outs: list[Tensor] = []
        for index in last.argsort(stable=True).split(at_once):
            parts = forward(rollouts.rows(index))
            if not outs:
                outs = [torch.zeros(B, T) for _ in parts]
            for whole, part in zip(outs, parts, strict=True):
                whole[index, : part.shape[1]] = part
        return tuple(outs)
