"""The losses of learning from preferences: ranking, clipped policies and values, divergence. Pure functions of tensors.

Owns what is minimised; how good an answer was is `rl.advantage`'s, and learning without sampling is `rl.offline`'s.

Shapes: a batch of B sequences seen as T transitions; entry [b, t] is about choosing token t+1 of sequence b after the
first t+1 tokens. `mask` [B, T] is 1 where that token was sampled by the policy, 0 for prompt, tool output and padding.

Sources: InstructGPT (arXiv 2203.02155), PPO (1707.06347), RLOO (2402.14740), GRPO (2402.03300) and its bias-free form
(2503.20783), details in Huang et al. (2403.17031).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Normalisation = Literal["token", "sequence", "constant"]
MAX_LOG_RATIO = 20.0  # exp() of 89 is infinite, and its gradient NaN even where the clip ignores it


def ranking_loss(scores: Tensor, ranks: Tensor, margins: Tensor | None = None) -> Tensor:
    """Mean over prompts of the mean over pairs of -log sigmoid(better - worse), InstructGPT equation 1.

    `scores`, `ranks` [prompts, K]; rank 1 is best, rank 0 says that there is no such completion; pairs of equal rank do
    not count. Zero when no pair is left. `margins` [prompts] are taken off each difference, so that clear cases must be
    told apart by more (Llama 2, arXiv 2307.09288, equation 2).
    """
    better = _beats(ranks)
    margin = scores[:, :, None] - scores[:, None, :]
    if margins is not None:
        margin = margin - margins[:, None, None]
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


def aggregate(x: Tensor, mask: Tensor, normalise: Normalisation, length: int = 0) -> Tensor:
    """One number from terms [B, T] of sampled tokens.

    "token": the mean over all of them. "sequence": the mean over answers of each one's mean, so that a token of a short
    answer weighs more (GRPO, 2402.03300 equation 3). "constant": the sum by B times `length`, the longest answer there
    may be: every token weighs the same whatever the lengths (2503.20783, appendix A).
    """
    x = x * mask
    if normalise == "token":
        return x.sum() / mask.sum().clamp(min=1)
    if normalise == "sequence":
        return (x.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return x.sum() / (mask.shape[0] * max(1, length))


@dataclass(frozen=True)
class PolicyLoss:
    """A loss with what one wants to watch about it."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def clipped_policy_loss(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: float,
    normalise: Normalisation = "token",
    length: int = 0,
) -> PolicyLoss:
    """PPO's clipped surrogate (equation 7), negated. `new`, `old` are log-probabilities, `advantage` [B, T] or [B, 1].

    By default the mean over sampled tokens; see `aggregate` for the others.
    """
    log_ratio = ((new - old) * mask).clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip, 1.0 + clip)
    return PolicyLoss(
        aggregate(torch.maximum(plain, clipped), mask, normalise, length),
        masked_mean((clipped > plain).float(), mask).detach(),
        masked_mean(ratio - 1.0 - log_ratio, mask).detach(),
    )


def answer_policy_loss(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: float) -> PolicyLoss:
    """The same with a whole answer as one action: the ratio is that of its probability, the mean is over answers.

    `advantage` [B] or [B, 1]. At a ratio of 1 the gradient is REINFORCE's, -A grad log pi(answer) (2402.14740).
    """
    log_ratio = ((new - old) * mask).sum(1).clamp(max=MAX_LOG_RATIO)
    ratio, advantage = log_ratio.exp(), advantage.reshape(-1)
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip, 1.0 + clip)
    tokens = mask.sum().clamp(min=1)
    return PolicyLoss(
        torch.maximum(plain, clipped).mean(),
        (clipped > plain).float().mean().detach(),
        ((ratio - 1.0 - log_ratio).sum() / tokens).detach(),
    )


def kl_to_reference(new: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Per sampled token [B, T] r - 1 - log r with r = pi_ref / pi: never negative, and KL(pi, pi_ref) in the mean over
    tokens of pi (Schulman's k3; GRPO equation 4)."""
    log_ratio = ((reference - new) * mask).clamp(max=MAX_LOG_RATIO)
    return log_ratio.exp() - 1.0 - log_ratio


def likelihood_loss(new: Tensor, mask: Tensor) -> Tensor:
    """Supervised finetuning on answers that were sampled: mean over their tokens of -log pi."""
    return -masked_mean(new, mask)


def clipped_value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the squared error of values, the larger of plain and clipped around `old`, mean over sampled tokens."""
    clipped = old + (new - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((new - returns) ** 2, (clipped - returns) ** 2), mask)


def token_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of `targets`, entropy of the distribution in nats), each [B, T], from logits [B, T, V]."""
    logprobs = F.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(-1, targets[..., None]).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def chosen_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """The first of the two alone."""
    return F.log_softmax(logits.float(), dim=-1).gather(-1, targets[..., None]).squeeze(-1)


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, gain: float = 0.1) -> float:
    """Next KL coefficient after a batch whose KL was `kl`; `gain` is K_beta.

    Ziegler et al. (1909.08593), section 2.2: e = clip((kl - target) / target, -0.2, 0.2), then times 1 + K_beta e, with
    K_beta 0.1 for each of thousands of batches.
    """
    return coefficient * (1.0 + gain * max(-0.2, min(0.2, kl / target - 1.0)))
