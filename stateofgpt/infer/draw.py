"""From the logits of a step to the tokens of its requests.

Owns: which rows are adjusted first (`infer.adjust`), the sampler of the rows that are at work (`infer.sampling`), the
alternatives that some ask for, and that all of it is waited for once. Knows nothing of models, nor of what a drawn
token does to its request.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from stateofgpt.infer.adjust import adjust
from stateofgpt.infer.request import Request
from stateofgpt.infer.sampling import Sampler, alternatives
from stateofgpt.infer.transfer import fetched


class Drawn(NamedTuple):
    """One token with its log-probability by the model as it is, and the most likely ones in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Draws:
    """Draws tokens for rows, step after step; what can be kept for the same rows is kept."""

    def __init__(self) -> None:
        self._sampler: tuple[list[int], Sampler] = ([], Sampler([]))  # for these requests, in this order

    def __call__(self, rows: Sequence[Request], logits: Tensor, ahead: Sequence[int] | None = None) -> list[Drawn]:
        """One token for each row of `logits` [n, V]; rows[i] is whose it is, `ahead[i]` how many tokens after the next
        one of that request (0 by default)."""
        numbers = [r.id for r in rows]
        if self._sampler[0] != numbers:
            self._sampler = (numbers, Sampler([r.params for r in rows], logits.device))
        offsets = ahead or [0] * len(rows)
        positions = [r.drawn + i for r, i in zip(rows, offsets, strict=True)]
        tokens, logprobs = self._sampler[1](logits, positions, _adjusted(rows, logits))
        asking = [i for i, r in enumerate(rows) if r.params.top_logprobs]
        # a CPU takes each row by itself: which of two equals comes first depends on how many are looked at
        groups = [[i] for i in asking] if logits.device.type == "cpu" else [asking] if asking else []
        parts = [alternatives(logits, group, max(rows[i].params.top_logprobs for i in group)) for group in groups]
        drawn, own, *found = fetched(tokens, logprobs, *chain.from_iterable(parts))
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
        for group, ids, values in zip(groups, found[::2], found[1::2], strict=True):
            for i, best, likely in zip(group, ids, values, strict=True):
                tops[i] = tuple(zip(best, likely, strict=True))[: rows[i].params.top_logprobs]
        return [Drawn(*each) for each in zip(drawn, own, tops, strict=True)]


def _adjusted(rows: Sequence[Request], logits: Tensor) -> Tensor | None:
    """The logits after penalties, biases and constraints; None where no request has any."""
    changed = [i for i, r in enumerate(rows) if r.params.adjusting]
    if not changed:
        return None
    adjusted = logits.float() if logits.dtype != torch.float32 else logits.clone()
    for i in changed:
        r = rows[i]
        if r.guide is not None and r.mask is None:
            r.mask = r.guide.mask()
        adjust(adjusted[i], r.params, r.ids, r.counts or {}, r.mask)
    return adjusted
