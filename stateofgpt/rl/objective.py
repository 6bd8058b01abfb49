"""The mathematics of learning from preferences: ranking loss, advantages, PPO. Pure functions of tensors.

Shapes: a batch of B sequences seen as T transitions; entry [b, t] is about choosing token t+1 of sequence b after the
first t+1 tokens. `mask` [B, T] is 1 where that token was sampled by the policy, 0 for prompt, tool output and padding.

Sources: InstructGPT (arXiv 2203.02155), PPO (1707.06347), GAE (1506.02438), details in Huang et al. (2403.17031).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp() of 89 is infinite, and its gradient NaN even where the clip ignores it


def ranking_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Mean over prompts of the mean over pairs of -log sigmoid(better - worse), InstructGPT equation 1.

    `scores`, `ranks` [prompts, K]; rank 1 is best, rank 0 says that there is no such completion; pairs of equal rank do
    not count. Zero when no pair is left.
    """
    better = _beats(ranks)
    margin = scores[:, :, None] - scores[:, None, :]
    losses = -F.logsigmoid(margin) * better
    pairs = better.sum((1, 2))
    per_prompt = losses.sum((1, 2)) / pairs.clamp(min=1)
    return per_prompt.sum() / (pairs > 0).sum().clamp(min=1)


def pair_accuracy(scores: Tensor, ranks: Tensor) -> tuple[int, int]:
    """(pairs ordered as ranked, pairs); `scores`, `ranks` [prompts, K]; equal scores count as wrong."""
    better = _beats(ranks)
    right = (scores[:, :, None] > scores[:, None, :]) & better
    return int(right.sum()), int(better.sum())


def ranked(ranks: Tensor) -> Tensor:
    """[prompts], True where at least one pair of a prompt's completions is ordered by `ranks` [prompts, K]."""
    return _beats(ranks).any(2).any(1)


def _beats(ranks: Tensor) -> Tensor:
    """[prompts, K, K], True at [i, j] where completion i is ranked above completion j and both exist."""
    first, second = ranks[:, :, None], ranks[:, None, :]
    return (first < second) & (first > 0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is 1; zero for an empty mask."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """`x` shifted and scaled to mean 0 and variance 1 over the mask; zero outside of it."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def shaped_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Rewards [B, T]: -kl_coefficient * (log pi - log pi_ref) at each sampled token, and `scores` [B] at the last."""
    rewards = -kl_coefficient * (logprobs - reference) * mask
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(dim=1)
    rows = torch.arange(mask.shape[0])
    rewards[rows, last] += scores * mask[rows, last]
    return rewards


def advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, each [B, T] (GAE equation 16), zero outside the mask.

    Tokens the policy did not sample are no decisions of its own: the state after a tool's answer follows its last token
    directly, so estimates are carried across masked entries unchanged.
    """
    out = torch.zeros_like(rewards)
    next_value = torch.zeros(rewards.shape[0])
    running = torch.zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, values[:, t], next_value)
        out[:, t] = running * here
    return out, (out + values) * mask


@dataclass(frozen=True)
class PolicyLoss:
    """A loss with what one wants to watch about it."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def clipped_policy_loss(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: float) -> PolicyLoss:
    """PPO's clipped surrogate (equation 7), negated, mean over sampled tokens. `new`, `old` are log-probabilities."""
    log_ratio = ((new - old) * mask).clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip, 1.0 + clip)
    return PolicyLoss(
        masked_mean(torch.maximum(plain, clipped), mask),
        masked_mean((clipped > plain).float(), mask).detach(),
        masked_mean(ratio - 1.0 - log_ratio, mask).detach(),
    )


def clipped_value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the squared error of values, the larger of plain and clipped around `old`, mean over sampled tokens."""
    clipped = old + (new - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((new - returns) ** 2, (clipped - returns) ** 2), mask)


def token_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of `targets`, entropy of the distribution in nats), each [B, T], from logits [B, T, V]."""
    logprobs = F.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(-1, targets[..., None]).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, gain: float = 0.1) -> float:
    """Next KL coefficient after a batch whose KL was `kl`; `gain` is K_beta.

    Ziegler et al. (1909.08593), section 2.2: e = clip((kl - target) / target, -0.2, 0.2), then times 1 + K_beta e, with
    K_beta 0.1 for each of thousands of batches.
    """
    return coefficient * (1.0 + gain * max(-0.2, min(0.2, kl / target - 1.0)))
