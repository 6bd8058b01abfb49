"""Models with one number for an output: the reward model and PPO's value model.

Owns the scalar heads on a decoder's trunk. Knows nothing of losses, files or text. Parameter names are those of
transformers' `...ForSequenceClassification` with one label, so that a reward model is a checkpoint like any other.

Sources: Ziegler et al. (arXiv 1909.08593, section 2.1) for reading the last token and for the head's initial std of
1/sqrt(d+1), InstructGPT (2203.02155) for the value model starting as the reward model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stateofgpt.model.gpt import GPT, GPTConfig


def last_real(ids: Tensor, pad_id: int) -> Tensor:
    """Index [B] of the rightmost token of `ids` [B, T] that is no padding (0 where all are)."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return ((ids != pad_id) * places).argmax(dim=-1)


def _score_head(gpt: GPT, generator: torch.Generator | None) -> nn.Linear:
    # By way of "meta": a head must not draw from the global generator, which a resumed run would then find elsewhere.
    width = gpt.config.hidden_size
    head = nn.Linear(width, 1, bias=False, device="meta").to_empty(device="cpu")
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5, generator=generator or torch.Generator().manual_seed(0))
    return head.to(gpt.lm_head.weight.device)


class RewardModel(nn.Module):
    """A scalar for a whole text: `ids` [B, T], padded on the right with `pad_id`, -> rewards [B].

    Takes over the trunk of `gpt` (it is trained on, not copied) and leaves the language-model head behind.
    """

    def __init__(self, gpt: GPT, pad_id: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config: GPTConfig = gpt.config
        self.pad_id = pad_id
        self.model = gpt.model
        self.score = _score_head(gpt, generator)

    def forward(self, ids: Tensor) -> Tensor:
        """Rewards [B]. Attention is causal, so what is padded on the right cannot reach the token that is read."""
        return self.read(self.model(ids), ids)

    def read(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Rewards [B] from the final hidden states [B, T, C] of `ids`."""
        last = last_real(ids, self.pad_id)
        read = hidden[torch.arange(ids.shape[0], device=ids.device), last]
        rewards: Tensor = self.score(read).squeeze(-1)
        return rewards


class ValueModel(nn.Module):
    """A scalar per token: `ids` [B, T] -> values [B, T], the value at t having seen ids[:, : t + 1].

    Takes over the trunk of `source` (not a copy), and the head too when the source is a reward model.
    """

    def __init__(self, source: GPT | RewardModel, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config: GPTConfig = source.config
        self.model = source.model
        if isinstance(source, RewardModel):
            self.score = source.score
        else:
            self.score = _score_head(source, generator)

    def forward(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Values [B, T]; `mask` and `positions` as in `GPT.hidden`."""
        values: Tensor = self.score(self.model(ids, mask, positions)).squeeze(-1)
        return values
