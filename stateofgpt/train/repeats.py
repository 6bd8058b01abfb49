"""What changes when a small text is read many times: weight decay becomes stronger.

Owns the rule, a pure function of a run's budget. Knows no text and no optimizer.

Up to about four epochs a repeated token is nearly a fresh one (arXiv 2305.16264). Beyond, a model begins to know its
text by heart, and the decay that is best grows far beyond the usual (arXiv 2509.14786: thirty times). What stays put is
how long a weight remembers, counted in epochs (arXiv 2405.13698): the shrinking of a step, rate times decay, is one
over that memory in steps. So decay is made so strong that the memory is half an epoch, in proportion to the epochs
beyond the fourth. Measured in `benchmarks/bench_repeats.py`; numbers in docs/decisions/0020.
"""

from __future__ import annotations

FRESH = 4.0  # epochs that count as fresh text
MEMORY = 0.5  # epochs; a cautious decay acts on about half of the weights, so that theirs is about one
MOST = 300.0  # times the usual decay: nothing beyond was measured in more than one run


def decay_times(epochs: float, steps: int, shrinking: float, most: float = MOST) -> float:
    """By what weight decay is multiplied in a run of `steps` steps that reads its text `epochs` times.

    `shrinking` is the share of itself that a weight loses in a step at the usual decay: rate times decay.

    >>> [round(decay_times(epochs, 1000, 4e-4)) for epochs in (1, 4, 8, 16, 64, 100)]
    [1, 1, 20, 60, 300, 300]
    """
    if epochs <= FRESH or shrinking <= 0.0:
        return 1.0
    wanted = (epochs - FRESH) / (MEMORY * steps)
    return min(max(1.0, most), max(1.0, wanted / shrinking))
