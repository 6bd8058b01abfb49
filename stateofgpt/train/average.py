"""The average of the weights over the last part of training: what many late steps agree on.

Owns the running mean and its place in a saved state. Stochastic weight averaging (arXiv 1803.05407), over every step
of the tail. Knows no schedule: where the learning rate falls to zero, the last weights are near their average already.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "average."


class TailAverage:
    """The mean of `weights` (name -> parameter, float32) over the steps at which `add` is called."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._mean: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self) -> None:
        """Take the weights as they are now into the mean."""
        self.count += 1
        for name, weight in self._weights.items():
            if self.count == 1:
                self._mean[name] = weight.detach().clone()
            else:
                self._mean[name].lerp_(weight.detach(), 1.0 / self.count)

    @torch.no_grad()
    def apply(self) -> None:
        """The weights become their mean; without any step in it they stay."""
        for name, mean in self._mean.items():
            self._weights[name].copy_(mean)

    def tensors(self) -> dict[str, Tensor]:
        """The mean, for a saved state; `count` is saved beside it."""
        return {PREFIX + name: mean for name, mean in self._mean.items()}

    def load(self, tensors: Mapping[str, Tensor], count: int) -> None:
        """Take over what `tensors` and `count` were."""
        self.count = count
        here = self._weights.items() if count else ()
        self._mean = {name: tensors[PREFIX + name].to(weight.device, copy=True) for name, weight in here}
