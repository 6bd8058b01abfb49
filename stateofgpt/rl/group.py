"""Policy optimisation without a value model: other answers say what was to be expected.

Owns which advantages and which loss an algorithm has: GRPO (arXiv 2402.03300), its bias-free form (2503.20783), RLOO
(2402.14740), REINFORCE with the rest of the batch as its baseline, and finetuning on the best of n (2304.06767) or on
all answers that are good enough. Knows no files and no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import GPT
from stateofgpt.rl.advantage import answer_rewards, best_of, group_relative, leave_one_out
from stateofgpt.rl.objective import (
    Normalisation,
    PolicyLoss,
    aggregate,
    answer_policy_loss,
    clipped_policy_loss,
    kl_to_reference,
    likelihood_loss,
)
from stateofgpt.rl.optimization import Experience, Logprobs, Optimization, Seen, Told, UpdateConfig
from stateofgpt.rl.scoring import Scorer
from stateofgpt.train.loss import Way

GroupAlgorithm = Literal["grpo", "dr_grpo", "rloo", "reinforce", "best_of_n", "rejection"]
COMPARED = ("grpo", "dr_grpo", "rloo", "best_of_n")  # within a group, so that one answer is not enough


@dataclass(frozen=True)
class GroupConfig:
    """None is what the algorithm's paper has.

    `kl_loss` weighs the divergence in the loss (grpo 0.04, dr_grpo 0); rloo and reinforce charge it in the reward, with
    `ppo.kl_coefficient`. `normalise`: see `objective.aggregate` (grpo "sequence", dr_grpo "constant"). `accept` is the
    least score with which best_of_n and rejection keep an answer (for verified rewards 0.5; for learned ones, which are
    normalised, rejection has 0.5 and best_of_n none).
    """

    kl_loss: float | None = None
    normalise: Normalisation | None = None
    accept: float | None = None

    def __post_init__(self) -> None:
        if self.kl_loss is not None and not self.kl_loss >= 0.0:
            raise ConfigError(f"group.kl_loss is {self.kl_loss}, must be at least 0")


class GroupOptimization(Optimization):
    """Policy, reference and scores; `group` answers to every prompt, side by side, of at most `max_tokens` tokens."""

    def __init__(
        self,
        algorithm: GroupAlgorithm,
        policy: GPT,
        reference: GPT,
        scorer: Scorer,
        config: UpdateConfig,
        own: GroupConfig,
        *,
        group: int,
        max_tokens: int,
        pad_id: int,
        way: Way,
        logprobs: Logprobs = "training",
    ) -> None:
        super().__init__(policy, reference, scorer, config, pad_id=pad_id, way=way, logprobs=logprobs)
        if algorithm in COMPARED and group < 2:
            raise ConfigError(f"{algorithm} compares the answers to one prompt; set rl.group to 2 or more")
        self.algorithm, self.group, self.max_tokens = algorithm, group, max_tokens
        kl_loss: dict[str, float] = {"grpo": 0.04}
        normalise: dict[str, Normalisation] = {"grpo": "sequence", "dr_grpo": "constant"}
        self.kl_loss = kl_loss.get(algorithm, 0.0) if own.kl_loss is None else own.kl_loss
        self.normalise = normalise.get(algorithm, "token") if own.normalise is None else own.normalise
        self.accept = own.accept

    def _shuffled(self, rows: int, order: torch.Generator) -> Tensor:
        """Prompts in any order, the answers to each side by side, so that most of them are in one minibatch, where
        their prompt is computed once."""
        group = self.group if rows % self.group == 0 else 1  # of some algorithms not all answers are kept
        first = torch.randperm(rows // group, generator=order) * group
        return (first[:, None] + torch.arange(group)).flatten()

    def _experience(self, seen: Seen) -> Experience:
        if self.algorithm in ("best_of_n", "rejection"):
            kept = self._kept(seen.scores).nonzero().flatten()
            seen.watched["kept"] = len(kept) / max(1, len(seen.scores))
            whole = Experience(seen.there, seen.logprobs, seen.reference, torch.ones(len(seen.scores), 1))
            return whole.to(seen.there.ids.device).rows(kept)
        advantage = self._advantages(seen)[:, None]
        return Experience(seen.there, seen.logprobs, seen.reference, advantage)

    def _advantages(self, seen: Seen) -> Tensor:
        if self.algorithm in ("grpo", "dr_grpo"):
            return group_relative(seen.scores, self.group, scaled=self.algorithm == "grpo")
        mask = seen.rollouts.mask
        rewards = answer_rewards(seen.scores, seen.logprobs, seen.reference, mask, self.kl_coefficient)
        return leave_one_out(rewards, self.group if self.algorithm == "rloo" else len(rewards))

    def _kept(self, scores: Tensor) -> Tensor:
        """[B] bool, the answers that are learned from."""
        least = -torch.inf if self.accept is None else self.accept
        good = scores >= least
        return good & best_of(scores, self.group) if self.algorithm == "best_of_n" else good

    def _policy_loss(self, model: GPT, batch: Experience, told: Told) -> Tensor:
        new = self._new_logprobs(model, batch.rollouts)
        mask = batch.rollouts.mask
        if self.algorithm in ("best_of_n", "rejection"):
            return likelihood_loss(new, mask)
        out = self._clipped(new, batch, mask)
        told.add("clip_fraction", out.clip_fraction)
        told.add("approx_kl", out.approx_kl)
        if self.algorithm not in ("grpo", "dr_grpo") or not self.kl_loss:
            return out.loss
        divergence = kl_to_reference(new, batch.reference, mask)
        return out.loss + self.kl_loss * aggregate(divergence, mask, self.normalise, self.max_tokens)

    def _clipped(self, new: Tensor, batch: Experience, mask: Tensor) -> PolicyLoss:
        if self.algorithm in ("rloo", "reinforce"):
            return answer_policy_loss(new, batch.logprobs, batch.advantages, mask, self.config.clip)
        return clipped_policy_loss(
            new, batch.logprobs, batch.advantages, mask, self.config.clip, self.normalise, self.max_tokens
        )
