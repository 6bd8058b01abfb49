"""Bits per byte: the loss of a language model in a unit that does not depend on its tokenizer.

Owns the conversion. Knows nothing about models: whoever sums the loss hands over a sum and a count of bytes.
"""

from __future__ import annotations

import math


def bits_per_byte(sum_nll_nats: float, n_bytes: int) -> float:
    """Bits per UTF-8 byte of a text whose tokens' negative log-probabilities sum to `sum_nll_nats` nats.

    A uniform guess over all byte values costs exactly 8:

    >>> bits_per_byte(1000 * math.log(256), 1000)
    8.0
    """
    if n_bytes <= 0:
        raise ValueError(f"bits per byte need at least one byte, got {n_bytes}")
    return sum_nll_nats / (n_bytes * math.log(2))
