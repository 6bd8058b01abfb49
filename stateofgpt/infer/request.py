"""What is asked of an engine, and what comes back.

Owns: the events and completions that callers see, and the state of one request inside. Knows nothing of models, rows
or blocks beyond their numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

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

    @property
    def target(self) -> int:
        """How many ids have to be read before the next draw."""
        return len(self.ids) - 1

    def last(self, more: Sequence[int] = ()) -> list[int]:
        """The token that is read next, and `more`."""
        return [self.ids[-1], *more]
