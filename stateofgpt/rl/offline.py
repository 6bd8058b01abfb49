"""Losses of preference optimisation without sampling: DPO, IPO, KTO. Pure functions of answers' log-probabilities.

Every tensor is [N], the log-probability of a whole answer given its prompt: the sum over the tokens that the assistant
wrote. `policy` is the model that learns, `reference` the one it began as.

Sources: DPO (Rafailov et al., arXiv 2305.18290), IPO (Azar et al., 2310.12036), KTO (Ethayarajh et al., 2402.01306).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_logprobs(logprobs: Tensor, mask: Tensor, *, per_token: bool = False) -> Tensor:
    """[N], the log-probability of whole answers, from that of their tokens [N, T]; or its mean `per_token`."""
    whole = (logprobs * mask).sum(1)
    return whole / mask.sum(1).clamp(min=1) if per_token else whole


def margins(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> Tensor:
    """How much more the policy prefers the chosen answer than the reference does, in nats: the h of DPO and IPO."""
    return (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)


def dpo_loss(margin: Tensor, beta: float) -> Tensor:
    """[N], -log sigmoid(beta h): DPO equation 7. beta is the strength of the KL penalty of the equivalent reinforcement
    learning; beta (log pi - log pi_ref) is the reward that the policy implies."""
    return -F.logsigmoid(beta * margin)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """[N], (h - 1 / (2 beta))^2: IPO equation 17, with its tau called beta. The gap has an aim and does not grow for
    ever, as DPO's does where every label agrees. A square needs answers of any length to be on one scale, so h is made
    of means per token, as in the public implementations (the paper's answers are single actions)."""
    return (margin - 1.0 / (2.0 * beta)) ** 2


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    divergence: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """[N], weight (1 - v): KTO equations 7 and 8; `desirable` [N] is True where an answer was liked.

    v = sigmoid(beta (r - z)) for liked answers and sigmoid(beta (z - r)) for others, r = log pi - log pi_ref, and z the
    policy's `divergence`, a number without gradient (see `mismatched_divergence`).
    """
    above = beta * ((policy - reference) - divergence.detach())
    liked = desirable_weight * (1.0 - torch.sigmoid(above))
    disliked = undesirable_weight * (1.0 - torch.sigmoid(-above))
    return torch.where(desirable, liked, disliked)


def mismatched_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """The z of KTO: the mean of log pi - log pi_ref over answers to *other* prompts, not below 0 (section 4.1)."""
    if policy.numel() == 0:
        return torch.zeros((), device=policy.device)
    return (policy - reference).mean().detach().clamp(min=0.0)
