"""Guessing what comes next from what is already there.

Owns: the look-up of the last tokens of a text in the text before them; what followed there is the guess (prompt lookup
decoding: texts repeat themselves and their prompts). A guess costs nothing to make, and the engine keeps only what it
would have drawn anyway. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 4, 2  # tokens that must agree; one alone is right too seldom


class Lookup:
    """Where each run of two to four tokens of a text was last followed by something."""

    def __init__(self) -> None:
        self._seen = 0
        self._ends: dict[tuple[int, ...], int] = {}

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`, which goes on from the `ids` of the call before; [] where nothing
        like its end stands earlier."""
        for end in range(max(self._seen, _SHORTEST), len(ids)):  # not len(ids): nothing has followed there yet
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._ends[tuple(ids[end - size : end])] = end
        self._seen = max(self._seen, len(ids))
        for size in range(min(_LONGEST, len(ids)), _SHORTEST - 1, -1):
            if (found := self._ends.get(tuple(ids[len(ids) - size :]))) is not None:
                return list(ids[found : found + most])
        return []
