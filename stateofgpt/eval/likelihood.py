"""Bits per byte: the loss of a language model in a unit that does not depend on its tokenizer.

Owns the conversion, and how a long text is read in parts. Knows nothing about models: whoever sums the loss hands over
a sum and a count of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


def bits_per_byte(sum_nll_nats: float, n_bytes: int) -> float:
    """Bits per UTF-8 byte of a text whose tokens' negative log-probabilities sum to `sum_nll_nats` nats.

    A uniform guess over all byte values costs exactly 8:

    >>> bits_per_byte(1000 * math.log(256), 1000)
    8.0
    """
    if n_bytes <= 0:
        raise ValueError(f"bits per byte need at least one byte, got {n_bytes}")
    return sum_nll_nats / (n_bytes * math.log(2))


def in_parts(ids: Sequence[int], begin: int, context: int) -> Iterator[list[int]]:
    """A text's `ids` in parts of at most `context`, each behind the token `begin` with which documents begin.

    Scoring every part but its first token scores every token of the text once.

    >>> list(in_parts([5, 6, 7], begin=0, context=2))
    [[0, 5, 6], [0, 7]]
    """
    for start in range(0, len(ids), context):
        yield [begin, *ids[start : start + context]]
