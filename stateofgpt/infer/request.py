"""What is asked of an engine, and what comes back.

Owns: the events and completions that callers see, the state of one request inside, and what is refused.
Knows nothing of models, rows or blocks beyond their numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from stateofgpt.errors import ModelError
from stateofgpt.infer.blocks import Node
from stateofgpt.infer.guide import Guide
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.infer.speculate import Lookup

Finish = Literal["stop", "length"]
State = Literal["waiting", "live", "held"]


class Event(NamedTuple):
    """One token of one request. `logprob` is that of the model itself: temperature 1, no filter, no penalty; `top` are
    the `top_logprobs` most likely tokens with theirs, most likely first."""

    request: int
    token: int
    logprob: float
    finish: Finish | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """All that was drawn for one prompt. `ids` ends with the stop id where `finish` is "stop", but for constrained
    answers, which also end where nothing more may follow."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish


@dataclass(slots=True, eq=False)
class Request:
    """A request under way. `ids` are the prompt and all that was drawn or given since; the last is not read yet."""

    id: int
    arrival: int
    ids: list[int]
    params: SamplingParams
    hold: bool
    tenant: str
    prompt: tuple[int, ...]  # what is read before the first draw: all of the prompt but its last token
    guide: Guide | None = None
    mask: np.ndarray | None = None  # which tokens the guide allows next, where that is known
    state: State = "waiting"
    drawn: int = 0
    read: int = 0  # how many of `ids` are in the cache
    row: int | None = None
    blocks: list[int] = field(default_factory=list)  # of the cache, in the order of positions
    path: list[Node] = field(default_factory=list)  # those of them that are in the tree of prefixes
    counts: Counter[int] | None = None  # of drawn tokens, where a penalty wants them
    lookup: Lookup | None = None
    paused: bool = False  # held in the middle of its answer

    @property
    def target(self) -> int:
        """How many ids have to be read before the next draw."""
        return len(self.ids) - 1

    def last(self, more: Sequence[int] = ()) -> list[int]:
        """The token that is read next, and `more`."""
        return [self.ids[-1], *more]


def check(prompt: Sequence[int], params: SamplingParams | None, max_context: int, vocab: int) -> None:
    """Raise ModelError if `prompt` cannot be continued by a model of that context and vocabulary, or not with these
    `params`."""
    if not prompt:
        raise ModelError("the prompt is empty; give at least one token, for example <|endoftext|>")
    if len(prompt) > max_context - 1:
        raise ModelError(
            f"the prompt has {len(prompt)} tokens and the context holds {max_context}, which leaves no room for an "
            "answer; shorten the prompt"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise ModelError(f"the prompt has a token id outside 0..{vocab - 1}; was it made by another tokenizer?")
    if params is not None and any(token >= vocab for token, _ in params.logit_bias):
        raise ModelError(f"logit_bias has a token id outside 0..{vocab - 1}; was it made for another tokenizer?")
