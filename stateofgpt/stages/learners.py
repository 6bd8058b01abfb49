"""The models of policy optimisation: what learns, what it began as, and which of them share their weights.

Owns which parameters train. Without adapters every model has weights of its own. With adapters of some rank the policy
is its start with adapters, and its reference the same weights with the adapters off (`model.lora.switched_off`); the
value model is the reward model's trunk with adapters and a head of its own, and the reward model reads the trunk with
the adapters off. Knows no algorithm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from stateofgpt.model.checkpoint import load_model, load_reward
from stateofgpt.model.device import CPU
from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.stages.parent import trained


def policy_of(start: Path, rank: int | None, seed: int, device: str = CPU) -> tuple[GPT, GPT]:
    """(policy, reference) from the model in `start`; one and the same where adapters tell them apart."""
    policy = trained(load_model(start).to(device), rank, seed)
    return policy, policy if rank is not None else load_model(start).to(device)


def value_of(
    start: Path, reward: RewardModel | None, folder: Path | None, rank: int | None, seed: int, device: str = CPU
) -> ValueModel:
    """The value model: from the reward model, which lies in `folder` and is in use as `reward`, else from `start`."""
    if reward is None or folder is None:
        return trained(ValueModel(load_model(start).to(device)), rank, seed)
    if rank is None:
        return ValueModel(load_reward(folder).to(device))
    value = ValueModel(reward)
    value.score = copy.deepcopy(reward.score)
    return trained(value, rank, seed)


def kept(model: nn.Module) -> dict[str, Tensor]:
    """The weights as they are now: a copy of what learns, and the rest itself."""
    return {name: p.detach().clone() if p.requires_grad else p.detach() for name, p in model.named_parameters()}


def learned(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `weights` that learn in `model`: what a state to resume from needs."""
    return {name: weights[name] for name, p in model.named_parameters() if p.requires_grad}
