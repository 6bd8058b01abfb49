"""Proximal policy optimisation: a value model says what to expect, and clipped updates keep near what answered.

The steps, as in InstructGPT (arXiv 2203.02155) and Huang et al. (2403.17031): sample answers to prompts; score each,
normalised; penalise every token's divergence from the SFT policy; estimate advantages with a value model that began as
the reward model; whiten them; a few epochs of clipped updates of policy and value, and, if asked for, of the loss on
pretraining's texts beside them. Knows no files and no labels.
"""

from __future__ import annotations

from torch import Tensor

from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import ValueModel
from stateofgpt.rl.advantage import advantages, shaped_rewards, whiten
from stateofgpt.rl.objective import clipped_policy_loss, clipped_value_loss
from stateofgpt.rl.optimization import AT_ONCE, Experience, Logprobs, Optimization, Seen, Told, UpdateConfig
from stateofgpt.rl.rollout import Rollouts, in_parts, values
from stateofgpt.rl.scoring import Scorer
from stateofgpt.train.loop import Trainer
from stateofgpt.train.loss import Batch, Way

PPOConfig = UpdateConfig


class PPO(Optimization):
    """Policy, reference, scores and value model, with the optimizers of the two that learn."""

    told = (*Optimization.told, "value_loss")

    def __init__(
        self,
        policy: GPT,
        reference: GPT,
        value: ValueModel,
        scorer: Scorer,
        config: UpdateConfig,
        *,
        pad_id: int,
        way: Way,
        logprobs: Logprobs = "training",
    ) -> None:
        super().__init__(policy, reference, scorer, config, pad_id=pad_id, way=way, logprobs=logprobs)
        self.value = value
        self.trainers["value"] = Trainer(value, config.value, way.kernels)

    def _experience(self, seen: Seen) -> Experience:
        mask = seen.rollouts.mask
        (value,) = in_parts(lambda part: (self._values(self.value, part),), seen.there, AT_ONCE)
        value = value.cpu()
        rewards = shaped_rewards(seen.scores, seen.logprobs, seen.reference, mask, self.kl_coefficient)
        c = self.config
        advantage, returns = advantages(rewards, value, mask, gamma=c.gamma, lam=c.lam)
        if c.value_lam is not None:
            returns = advantages(rewards, value, mask, gamma=c.gamma, lam=c.value_lam)[1]
        return Experience(seen.there, seen.logprobs, seen.reference, whiten(advantage, mask), value, returns)

    def _policy_loss(self, model: GPT, batch: Experience, told: Told) -> Tensor:
        new = self._new_logprobs(model, batch.rollouts)
        out = clipped_policy_loss(new, batch.logprobs, batch.advantages, batch.rollouts.mask, self.config.clip)
        told.add("clip_fraction", out.clip_fraction)
        told.add("approx_kl", out.approx_kl)
        return out.loss

    def _learn(self, batch: Experience, extra: Batch | None, told: Told, factor: float) -> None:
        super()._learn(batch, extra, told, factor)
        told.add("value_loss", self.trainers["value"].step([batch], self._value_loss, factor)["loss"])

    def _values(self, model: ValueModel, rollouts: Rollouts) -> Tensor:
        """Values on the scale of the scores: where the model began as the reward model, it is on its raw scale."""
        return (values(model, rollouts, self.way) - self.scorer.mean) / self.scorer.std

    def _value_loss(self, model: ValueModel, batch: Experience) -> Tensor:
        assert batch.values is not None and batch.returns is not None
        new = self._updated(lambda part: self._values(model, part), batch.rollouts)
        mask = batch.rollouts.mask
        return clipped_value_loss(new, batch.values, batch.returns, mask, self.config.value_clip) * batch.weight
