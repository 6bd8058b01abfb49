"""Batches that grow: how the rows of a run are cut into the batches of its optimizer steps.

Owns: a pure function from the number of a step to the rows it reads. Knows nothing of what a row is. A ramp only cuts:
the first whole batches are read in pieces, each a step of its own, so that the rows and their order are those of a run
without a ramp, and a resumed run asks for the same rows. Pieces become twice as large from one part to the next, which
keeps the number of different sizes, and so of compilations, small.

Why one would: early on the gradient of few rows says as much as that of many, so that more steps can be made of the
same text (the critical batch grows as training goes on: arXiv 1812.06162, 2505.23971).

    Cuts(10, 8, Ramp(0.25, 0.4))  ->  steps of 2 rows for two batches, of 4 for two, then of 8
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from stateofgpt.errors import ConfigError


@dataclass(frozen=True)
class Ramp:
    """The first batches are `start` of a whole one; from the share `until` of all rows on they are whole."""

    start: float
    until: float

    def __post_init__(self) -> None:
        if not 0.0 < self.start < 1.0 or not 0.0 < self.until <= 1.0:
            raise ConfigError(
                f"ramp is {self.start:g},{self.until:g}; it is the share of a batch that the first ones have, between "
                "0 and 1, and the share of all rows after which they are whole, above 0 and at most 1"
            )

    def parts(self) -> list[tuple[int, float]]:
        """(pieces that a whole batch is cut into, share of all rows), in order; what is left is read whole."""
        pieces = [max(2, round(1.0 / self.start))]
        while pieces[-1] > 2:
            pieces.append(-(-pieces[-1] // 2))
        return [(n, self.until / len(pieces)) for n in pieces]


class Cuts:
    """The steps of a run over `batches` whole batches of `rows` rows each."""

    def __init__(self, batches: int, rows: int, ramp: Ramp | None = None) -> None:
        self.batches, self.rows = batches, rows
        parts = [] if ramp is None else ramp.parts()
        if parts and parts[0][0] > rows:
            raise ConfigError(f"a batch of {rows} rows cannot be cut into {parts[0][0]}; begin the ramp higher")
        self._firsts = [0]
        ends = [round(batches * share) for share in accumulate(share for _, share in parts)]
        for (pieces, _), (first, end) in zip(parts, pairwise([0, *ends]), strict=True):
            for batch in range(first, end):
                self._firsts += [batch * rows + rows * k // pieces for k in range(1, pieces + 1)]
        whole = range(ends[-1] if ends else 0, batches)
        self._firsts += [(batch + 1) * rows for batch in whole]

    @property
    def steps(self) -> int:
        return len(self._firsts) - 1

    def of(self, step: int) -> tuple[int, int]:
        """The first row of a step, and how many it reads."""
        return self._firsts[step], self._firsts[step + 1] - self._firsts[step]

    def read(self, step: int) -> int:
        """Rows read by the first `step` steps."""
        return self._firsts[step]

    def progress(self, step: int) -> float:
        """Whole batches read before `step`; without a ramp it is `step`."""
        return self._firsts[step] / self.rows

    def step_at(self, share: float) -> int:
        """The number of steps that have read this share of the rows, to the nearest whole batch; past the last step
        for more than all of them."""
        return bisect_left(self._firsts, round(share * self.batches) * self.rows)


def seconds_per_batch(step_seconds: Callable[[int], float], rows: int, ramp: Ramp | None) -> float:
    """Mean seconds of a whole batch, from those of a step of so many rows: a batch in pieces is several steps."""
    parts = [] if ramp is None else ramp.parts()
    cut = sum(share * pieces * step_seconds(-(-rows // pieces)) for pieces, share in parts)
    return cut + (1.0 - sum(share for _, share in parts)) * step_seconds(rows)
