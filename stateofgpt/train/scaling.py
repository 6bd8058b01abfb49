"""Scaling laws: how good a model of N parameters and D tokens will be, and which N and D a budget should buy.

Owns the laws' constants and formulas, as pure functions of numbers. Knows nothing about machines, models or runs:
whoever turns minutes into floating-point operations does so elsewhere and asks here what they should buy.

Losses are in nats per token of the tokenizer the law was fitted with; they rank choices, they do not predict the loss
of a model with another tokenizer. "Parameters" are counted as each paper counts them (Chinchilla: all of them; Kaplan:
without the embeddings).

>>> gpt3, llama = PUBLISHED["GPT-3 175B"], PUBLISHED["LLaMA-65B"]
>>> f"{EPOCH.loss(gpt3.n_params, gpt3.tokens):.3f} {EPOCH.loss(llama.n_params, llama.tokens):.3f}"
'2.009 1.976'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol


@dataclass(frozen=True)
class Optimum:
    """What a budget should buy: parameters, tokens, and the loss the law expects from them."""

    n_params: float
    tokens: float
    loss: float


class Law(Protocol):
    """Anything that expects a loss, in nats per token, of `n_params` parameters after `tokens` tokens."""

    def loss(self, n_params: float, tokens: float) -> float: ...


@dataclass(frozen=True)
class ChinchillaLaw:
    """L(N, D) = E + A / N^a + B / D^b (Hoffmann et al., arXiv 2203.15556, equation 2)."""

    irreducible: float
    a_scale: float
    b_scale: float
    a: float
    b: float

    def loss(self, n_params: float, tokens: float) -> float:
        """Expected loss, nats per token, of `n_params` parameters after `tokens` distinct tokens."""
        _require_positive(n_params=n_params, tokens=tokens)
        return float(self.irreducible + self.a_scale / n_params**self.a + self.b_scale / tokens**self.b)

    def optimum(self, flops: float) -> Optimum:
        """The split of `flops` = 6 N D with the lowest loss (the same paper, equation 4)."""
        _require_positive(flops=flops)
        balance = (self.a * self.a_scale / (self.b * self.b_scale)) ** (1 / (self.a + self.b))
        n_params = balance * (flops / 6) ** (self.b / (self.a + self.b))
        tokens = flops / (6 * n_params)
        return Optimum(n_params, tokens, self.loss(n_params, tokens))

    def tokens_for(self, n_params: float) -> float:
        """The tokens for which `n_params` are the optimum: where a A / N^a = b B / D^b."""
        _require_positive(n_params=n_params)
        return float((self.b * self.b_scale * n_params**self.a / (self.a * self.a_scale)) ** (1 / self.b))


@dataclass(frozen=True)
class KaplanLaw:
    """L(N, D) = [(Nc / N)^(aN / aD) + Dc / D]^aD (Kaplan et al., arXiv 2001.08361, equation 1.5)."""

    n_critical: float
    d_critical: float
    a_n: float
    a_d: float

    def loss(self, n_params: float, tokens: float) -> float:
        """Expected loss, nats per token, of `n_params` non-embedding parameters after `tokens` tokens."""
        _require_positive(n_params=n_params, tokens=tokens)
        return float(((self.n_critical / n_params) ** (self.a_n / self.a_d) + self.d_critical / tokens) ** self.a_d)

    def optimum(self, flops: float) -> Optimum:
        """The split of `flops` = 6 N D with the lowest loss: where d/dN of the bracket of equation 1.5 is zero.

        With r = aN / aD: N = (r Nc^r C / (6 Dc))^(1 / (1 + r)), so N grows as C^0.575. The paper's own rule, from fits
        over training time, is C^0.73. Both lean too far towards size as budgets grow: see `KAPLAN_BIAS`.
        """
        _require_positive(flops=flops)
        r = self.a_n / self.a_d
        n_params = (r * self.n_critical**r * flops / (6 * self.d_critical)) ** (1 / (1 + r))
        tokens = flops / (6 * n_params)
        return Optimum(n_params, tokens, self.loss(n_params, tokens))

    def tokens_for(self, n_params: float) -> float:
        """The tokens for which `n_params` are the optimum: Dc / r (N / Nc)^r."""
        _require_positive(n_params=n_params)
        r = self.a_n / self.a_d
        return float(self.d_critical / r * (n_params / self.n_critical) ** r)


KAPLAN_BIAS = (
    "Kaplan's law leans towards size as budgets grow: its runs shared one learning-rate schedule whatever their length "
    "(arXiv 2203.15556), and it counts parameters without embeddings, at small sizes (arXiv 2406.12907)"
)
HOFFMANN_BIAS = "the Chinchilla paper's rounded constants lean towards tokens (arXiv 2404.10102, which refits them)"

EPOCH = ChinchillaLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # Besiroglu et al., arXiv 2404.10102: the refit
HOFFMANN = ChinchillaLaw(1.69, 406.4, 410.7, 0.34, 0.28)  # the Chinchilla paper's rounded constants: mislead at optima
KAPLAN = KaplanLaw(6.4e13, 1.8e13, 0.076, 0.103)  # table 2 of the Kaplan paper


@dataclass(frozen=True)
class PublishedModel:
    """A model of the literature, as its paper describes it."""

    n_params: float
    tokens: float

    @property
    def flops(self) -> float:
        """Training FLOPs by the usual 6 N D."""
        return 6 * self.n_params * self.tokens


PUBLISHED: Mapping[str, PublishedModel] = MappingProxyType(
    {
        "GPT-3 175B": PublishedModel(175e9, 300e9),  # arXiv 2005.14165
        "LLaMA-65B": PublishedModel(65e9, 1.4e12),  # arXiv 2302.13971, table 2; 65.2e9 exactly
        "LLaMA-7B": PublishedModel(6.7e9, 1.0e12),
    }
)


def flops_per_token(n_params: float, *, n_layer: int = 0, d_attention: int = 0, context: int = 0) -> float:
    """Training FLOPs (forward and backward) for one token: 6 N + 6 n_layer context d_attention.

    `n_params` counts what multiplies each token: everything but the input embedding, the output head included.
    The second term is causal attention's own (Kaplan et al., table 1, times 3 for the backward pass);
    `d_attention` = n_head * head_dim.
    """
    _require_positive(n_params=n_params)
    return 6.0 * n_params + 6.0 * n_layer * context * d_attention


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive finite number, got {value}")
