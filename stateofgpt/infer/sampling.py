"""How one token is drawn from logits.

Owns: `SamplingParams`, the filters (top-k, top-p, min-p), and where randomness comes from. Knows nothing of models,
caches or requests; penalties, which look at a request's tokens, are `infer.adjust`'s.

Randomness is not a stream but a function: the uniform number of a draw is a hash of (seed, how many tokens the
request has drawn before). A request therefore draws the same tokens alone, in any batch, in any order and after a
restart, as far as its logits are the same. (Matrix products of different batch sizes may differ in the last bit of a
float; a draw changes only where the uniform number falls into that gap.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stateofgpt.errors import ConfigError
from stateofgpt.infer.grammar import Constraint
from stateofgpt.infer.transfer import column, sent

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
BIAS = 100.0  # decides between any two logits
ALTERNATIVES = 64
_CPU = torch.device("cpu")
_HEAD = 128  # how many of the most likely tokens top-p looks at before it sorts a whole row


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks of the sampler.

    What changes logits comes first (see `infer.adjust`): the repetition penalty (arXiv 1909.05858) divides positive
    logits of tokens that occur in the prompt or the answer and multiplies negative ones; the other two are subtracted
    for tokens of the answer, once, or as often as they occur there; `logit_bias` are (id, number to add); a
    `constraint` forbids. Then temperature, then filters in the order top-k, top-p, min-p (that of transformers). Each
    is a threshold on probability, so tokens that tie with the last one kept are kept too. Log-probabilities that are
    reported are those of the model as it is: temperature 1, nothing changed, no filter. `top_logprobs` is how many of
    the most likely tokens are reported with each.
    """

    max_tokens: int = 256
    temperature: float = 1.0  # 0 = the most likely token
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0  # 1 = off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1")
        _require(0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, name, value, "between -2 and 2")
        for token, bias in self.logit_bias:
            _require(token >= 0, "a token of logit_bias", token, "0 or more")
            _require(-BIAS <= bias <= BIAS, f"logit_bias of token {token}", bias, f"between -{BIAS:g} and {BIAS:g}")
        _require(0 <= self.top_logprobs <= ALTERNATIVES, "top_logprobs", self.top_logprobs, f"0 to {ALTERNATIVES}")

    @property
    def adjusting(self) -> bool:
        """Whether the logits are changed by what was drawn before, or by anything else but temperature."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias) or self.constraint is not None


def _require(ok: bool, name: str, value: float, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value}, must be {rule}")


def derive_seed(seed: int, *path: int) -> int:
    """A 64-bit seed for the place `path` under `seed`; different paths give unrelated seeds."""
    for i in path:
        seed = _splitmix(_splitmix(seed) + i)
    return seed & _MASK


def _splitmix(x: int) -> int:
    """One output of splitmix64 (Steele, Lea and Flood 2014) for the state `x`."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One float32 in [0, 1) for each (seed, position), both uint64 [n]: two rounds of splitmix64, vectorised.

    23 bits are kept: then u * total < total holds in float32, and a draw can never fall behind the last token.
    """
    x = seeds
    for add in (np.uint64(0), positions):
        x = x + add + np.uint64(_GOLDEN)  # uint64 arrays wrap around
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(41)).astype(np.float32)) * np.float32(2.0**-23)


class Sampler:
    """The parameters of the rows of a batch, as tensors: build once per set of rows, call once per step."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device = _CPU) -> None:
        def floats(values: list[float]) -> Tensor:
            return column(values, torch.float32, device)[:, None]

        self._seeds = np.array([p.seed & _MASK for p in params], dtype=np.uint64)
        greedy = [p.temperature == 0.0 for p in params]
        self._greedy = column(greedy, torch.bool, device)
        self._any_greedy, self._all_greedy = any(greedy), all(greedy)
        self._plain = all(p.temperature in (0.0, 1.0) for p in params)
        self._temperature = floats([p.temperature or 1.0 for p in params])
        self._max_k = max((p.top_k for p in params), default=0)
        self._top_k = column([p.top_k for p in params], torch.int64, device)[:, None]
        self._any_p = any(p.top_p < 1.0 for p in params)
        self._top_p = floats([p.top_p for p in params])
        self._any_min_p = any(p.min_p > 0.0 for p in params)
        self._log_min_p = floats([p.min_p for p in params]).log()

    def __call__(
        self, logits: Tensor, positions: Sequence[int], adjusted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw from `adjusted` [n, V], or from `logits`; `positions` are how many tokens each request has drawn before.

        Returns tokens [n] (int64) and their log-probabilities [n] (float32) under softmax(logits).
        """
        model = logits.float().log_softmax(-1)
        logprobs = model if adjusted is None else adjusted.float().log_softmax(-1)
        if self._all_greedy:
            tokens = logprobs.argmax(-1)
        else:
            u = torch.from_numpy(uniforms(self._seeds, np.array(positions, dtype=np.uint64)))
            tokens = _first_above(self._weights(logprobs), sent(u, logits.device)[:, None])
            if self._any_greedy:
                tokens = torch.where(self._greedy, logprobs.argmax(-1), tokens)
        return tokens, model.gather(1, tokens[:, None])[:, 0]

    def _weights(self, logprobs: Tensor) -> Tensor:
        """Unnormalised probabilities [n, V] after temperature and filters."""
        if self._plain:
            z = logprobs
        else:
            z = (logprobs - logprobs.amax(-1, keepdim=True)) / self._temperature
        if not (self._max_k or self._any_p or self._any_min_p):
            return z.exp()
        peak = z.amax(-1, keepdim=True)
        floor = torch.full_like(peak, -torch.inf)
        if self._max_k:
            ranked = z.topk(min(self._max_k, z.shape[-1])).values
            kth = ranked.gather(1, (self._top_k.clamp(max=ranked.shape[1]) - 1).clamp_(min=0))
            floor = torch.where(self._top_k > 0, kth, floor)
        if self._any_p:
            floor = torch.maximum(floor, _nucleus_floor(z, floor, self._top_p))
        if self._any_min_p:
            floor = torch.maximum(floor, peak + self._log_min_p)
        return torch.where(z >= floor, z.exp(), 0.0)


def _first_above(weights: Tensor, share: Tensor) -> Tensor:
    """For each row of `weights` [n, V] the first token [n] with which their sum exceeds `share` [n, 1] of the whole."""
    cdf = weights.cumsum(-1)
    target = share * cdf[:, -1:]
    if cdf.device.type == "cpu":  # added up one after the other: where the sum grows, the weight is above 0
        return torch.searchsorted(cdf, target, right=True)[:, 0]
    # a GPU adds up in parts, and by their rounding the sum may grow, or fall, at a token that must not be drawn
    found = (cdf > target) & (weights > 0)
    return torch.where(found.any(-1), found.int().argmax(-1), weights.argmax(-1))


def alternatives(logits: Tensor, rows: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """The `count` most likely tokens of some `rows` of logits [n, V], most likely first, and their log-probabilities,
    each [rows, count]."""
    chosen = logits if len(rows) == len(logits) else logits[column(rows, torch.int64, logits.device)]
    found = chosen.float().log_softmax(-1).topk(min(count, logits.shape[-1]))
    return found.indices, found.values


def _nucleus_floor(z: Tensor, floor: Tensor, top_p: Tensor) -> Tensor:
    """Log-weight [n, 1] of the last token of the nucleus: the shortest head of the ranking that holds `top_p` of the
    mass at or above `floor` (Holtzman et al., arXiv 1904.09751). Rows with top_p = 1 get -inf."""
    # not `sum`, which adds up a single row in another order than many
    total = torch.where(z >= floor, z.exp(), 0.0).cumsum(-1)[:, -1:]
    size = min(_HEAD, z.shape[-1])
    while True:
        ranked = z.topk(size).values
        mass = torch.where(ranked >= floor, ranked.exp(), 0.0).cumsum(-1)
        enough = (mass[:, -1:] >= top_p * total) | (top_p >= 1.0)
        if size == z.shape[-1] or bool(enough.all()):
            break
        size = z.shape[-1]  # some row is too flat for the head of its ranking: sort it all
    # tokens before which less than top_p has been gathered belong to the nucleus; there is always a first one
    count = (mass < top_p * total).sum(-1, keepdim=True).clamp_(max=size - 1)
    return torch.where(top_p < 1.0, ranked.gather(1, count), -torch.inf)
