"""The order of pretraining data: a pure function of (seed, step).

Owns: which source a row comes from, which window of it, in which order of documents, and the rows of held-out text.
Knows nothing of models or steps of an optimizer. Nothing here has a state: a resumed run asks for the next row.

Row g of all rows belongs to a source. Over every stretch of rows each source has its share, to within a row or two:
source s with n_s rows out of n has them at the places nearest (k + 1/2) n / n_s. Its k-th row is the window
[k T, k T + T] of its stream (T inputs, and T targets one further), and the stream is the source's documents in a fresh
seeded order per epoch, one after the other, without end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stateofgpt.data.mixture import shares
from stateofgpt.data.shards import Shards
from stateofgpt.errors import ConfigError, DataError

Int64 = NDArray[np.int64]
LONGEST_PERIOD = 1 << 20  # rows; a longer run repeats its assignment of rows to sources, which has 10 bytes a row


class PretrainBatches:
    """Rows of a mixture. `total_rows` is how many the run will read: the shares are exact over that many."""

    def __init__(
        self,
        shards: Shards,
        weights: Mapping[str, float],
        batch_size: int,
        context: int,
        seed: int,
        total_rows: int,
    ) -> None:
        if min(batch_size, context, total_rows) < 1:
            raise ConfigError(
                f"batch_size, context and total_rows must be at least 1, and are {batch_size}, {context}, {total_rows}"
            )
        parts = {name: share for name, share in shares(weights).items() if share > 0}
        self._streams = [_Stream(shards, name, seed) for name in parts]
        self._shares = np.array(list(parts.values()))
        self.batch_size, self.context, self.total_rows = batch_size, context, total_rows
        period = min(total_rows, LONGEST_PERIOD)
        self._counts = _apportion(self._shares, period)
        self._source, self._rank = _spread(self._counts)

    def batch(self, step: int) -> tuple[Int64, Int64]:
        """Inputs and targets of a step, [batch_size, context] each."""
        return self.rows(step * self.batch_size, self.batch_size)

    def rows(self, start_row: int, n: int) -> tuple[Int64, Int64]:
        """Inputs and targets of rows start_row .. start_row + n, [n, context] each: for batches of changing size."""
        source, window = self._assign(np.arange(start_row, start_row + n))
        out = np.empty((n, self.context + 1), np.int64)
        span = np.arange(self.context + 1)
        for number in np.unique(source):
            here = np.flatnonzero(source == number)
            positions = window[here, None] * self.context + span
            out[here] = self._streams[number].read(positions)
        return out[:, :-1].copy(), out[:, 1:].copy()

    def share(self) -> dict[str, float]:
        """The realised share of each source in `total_rows` rows."""
        return {name: n / self.total_rows for name, n in self._rows_of().items()}

    def epochs(self) -> dict[str, float]:
        """How often `total_rows` rows pass over each source."""
        rows = self._rows_of()
        return {stream.name: rows[stream.name] * self.context / stream.n_tokens for stream in self._streams}

    def _assign(self, rows: Int64) -> tuple[Int64, Int64]:
        """The source of each row, and how many rows that source had before."""
        lap, place = np.divmod(rows, len(self._source))
        source = self._source[place].astype(np.int64)
        return source, lap * self._counts[source] + self._rank[place]

    def _rows_of(self) -> dict[str, int]:
        laps, rest = divmod(self.total_rows, len(self._source))
        counts = self._counts * laps + np.bincount(self._source[:rest], minlength=len(self._streams))
        return {stream.name: int(n) for stream, n in zip(self._streams, counts, strict=True)}


class _Stream:
    """A source's training documents without end, each epoch in its own order."""

    def __init__(self, shards: Shards, name: str, seed: int) -> None:
        self.name = name
        self._tokens = shards.tokens(name)
        self._lengths, self._starts = shards.lengths(name), shards.offsets(name)[:-1]
        self.n_tokens = len(self._tokens)
        if not self.n_tokens:
            raise DataError(f'the source "{name}" has no training text; give it weight 0, or more text')
        self._seed = [seed & 0xFFFFFFFFFFFFFFFF, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")]
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)

    def read(self, positions: Int64) -> NDArray[Any]:
        """The ids at these positions of the endless stream."""
        epochs, places = np.divmod(positions, self.n_tokens)
        out = np.empty(positions.shape, self._tokens.dtype)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            here = epochs == epoch
            ends, shift = self._epoch(epoch)
            wanted = places[here]
            out[here] = self._tokens[wanted + shift[np.searchsorted(ends, wanted, side="right")]]
        return out

    def _make_epoch(self, epoch: int) -> tuple[Int64, Int64]:
        """Per document, in the epoch's order: where it ends in the epoch, and what leads from a place in the epoch to
        its place in the shard."""
        order = np.random.default_rng([*self._seed, epoch]).permutation(len(self._lengths))
        lengths = self._lengths[order]
        ends = np.cumsum(lengths)
        return ends, self._starts[order] - (ends - lengths)


def _apportion(parts: NDArray[np.float64], n: int) -> Int64:
    """`n` rows by share: the floor of each, and what is left to the largest remainders."""
    exact = parts * n
    counts = np.floor(exact).astype(np.int64)
    left = n - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:left]] += 1
    return counts


def _spread(counts: Int64) -> tuple[NDArray[np.int16], Int64]:
    """A sequence with counts[s] times s, each spread evenly: the source per row, and its rank among that source's."""
    source = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    rank = np.concatenate([np.arange(n) for n in counts]).astype(np.int64)
    order = np.argsort((rank + 0.5) / counts[source], kind="stable")
    return source[order], rank[order]


def validation_rows(
    shards: Shards, source: str, context: int, max_tokens: int
) -> tuple[Int64, Int64, NDArray[np.float32], int]:
    """Held-out rows of a source for bits per byte: (inputs, targets, mask, n_bytes), [rows, context] each.

    The stored order is already a seeded one, so the rows are its beginning, up to `max_tokens` targets. The mask is 1
    on every token of text and 0 on what stands between texts and on padding; `n_bytes` is the number of bytes under
    the mask. Bits per byte = sum of -log2 p over the mask / n_bytes. Without held-out text there are no rows and no
    bytes.
    """
    marks = shards.marks
    stream = shards.tokens(source, "validation")[: max_tokens + 1].astype(np.int64)
    n = max(0, len(stream) - 1)
    rows = -(-n // context)
    inputs, targets = (np.full(rows * context, marks.pad, np.int64) for _ in range(2))
    inputs[:n], targets[:n] = stream[:n], stream[1 : n + 1]
    mask = (targets != marks.eot) & (np.arange(len(targets)) < n)
    firsts = int((mask & (inputs == marks.eot)).sum())  # each may begin with a space that is not in the text
    n_bytes = int(shards.token_bytes[targets[mask]].sum()) - marks.dummy_space * firsts
    shape = (rows, context)
    return inputs.reshape(shape), targets.reshape(shape), mask.astype(np.float32).reshape(shape), n_bytes
