"""Rewards and advantages: how much better an answer, or a token of it, was than what was to be expected.

Owns rewards per token, generalised advantage estimates, whitening, and the baselines that need no value model: those of
a group of answers to one prompt, and the rest of the batch. Pure functions of tensors; shapes as in `rl.objective`.
They are called with tensors of the CPU, whatever the models' device: a few thousand numbers, and estimates go back in
time token by token, each of which would be several kernels of a GPU (`rl.optimization` says what lives where). A
group's answers stand side by side: rows 0 to K-1 answer the first prompt, K to 2K-1 the second.

Sources: GAE (arXiv 1506.02438), RLOO (Ahmadian et al., 2402.14740), GRPO (DeepSeekMath, 2402.03300), its bias-free form
(Liu et al., 2503.20783), REINFORCE (Williams 1992), best of n (Stiennon et al., 2009.01325).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateofgpt.errors import ConfigError
from stateofgpt.rl.objective import masked_mean

GROUP_EPS = 1e-4  # added to a group's standard deviation, as the published code of GRPO has it


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """`x` shifted and scaled to mean 0 and variance 1 over the mask; zero outside of it."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def shaped_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Rewards [B, T]: -kl_coefficient * (log pi - log pi_ref) at each sampled token, and `scores` [B] at the last."""
    rewards = -kl_coefficient * (logprobs - reference) * mask
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
    rows = torch.arange(mask.shape[0], device=mask.device)
    rewards[rows, last] += scores * mask[rows, last]
    return rewards


def answer_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Rewards [B] of whole answers: the score less kl_coefficient times the answer's summed log pi - log pi_ref
    (2402.14740, equation 3, the whole answer being one action)."""
    return scores - kl_coefficient * ((logprobs - reference) * mask).sum(1)


def advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, each [B, T] (GAE equation 16), zero outside the mask.

    Tokens the policy did not sample are no decisions of its own: the state after a tool's answer follows its last token
    directly, so estimates are carried across masked entries unchanged.
    """
    out = torch.zeros_like(rewards)
    next_value = torch.zeros(rewards.shape[0], device=rewards.device)
    running = torch.zeros(rewards.shape[0], device=rewards.device)
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, values[:, t], next_value)
        out[:, t] = running * here
    return out, (out + values) * mask


def leave_one_out(rewards: Tensor, group: int) -> Tensor:
    """Advantages [B] of RLOO: each reward less the mean of the others of its group (2402.14740, section 3.3).

    With the whole batch as the group this is REINFORCE with the mean of the other answers as its baseline, which does
    not depend on the answer itself and so leaves the gradient unbiased. A group of one has nothing to compare: 0.
    """
    grouped = _grouped(rewards, group)
    if group == 1:
        return torch.zeros_like(rewards)
    # R_i - mean of others = (R_i - mean) K / (K - 1): one subtraction of near numbers and not two
    return ((grouped - grouped.mean(1, keepdim=True)) * (group / (group - 1))).flatten()


def group_relative(rewards: Tensor, group: int, *, scaled: bool) -> Tensor:
    """Advantages [B] of GRPO: reward less the group's mean, `scaled` by its standard deviation (2402.03300, section
    4.1.2), or not, as its bias-free form has it (2503.20783, section 3.2). Equal rewards, or a group of one, give 0.

    The deviation is the sample's (divided by K - 1).
    """
    grouped = _grouped(rewards, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    centred = torch.where(grouped.amax(1, keepdim=True) == grouped.amin(1, keepdim=True), 0.0, centred)
    if scaled and group > 1:
        centred = centred / (grouped.std(1, keepdim=True) + GROUP_EPS)
    return centred.flatten()


def best_of(scores: Tensor, group: int) -> Tensor:
    """[B] bool, True at the best answer of each group, the first of equal ones. Sampling the best of n costs a KL of
    at most log n - (n - 1) / n (2009.01325, appendix G.3)."""
    grouped = _grouped(scores, group)
    best = torch.zeros_like(grouped, dtype=torch.bool)
    best[torch.arange(grouped.shape[0], device=scores.device), grouped.argmax(1)] = True
    return best.flatten()


def _grouped(x: Tensor, group: int) -> Tensor:
    if group < 1 or x.shape[0] % group:
        raise ConfigError(f"{x.shape[0]} answers cannot be groups of {group}; choose a batch that is a multiple of it")
    return x.view(-1, group)
