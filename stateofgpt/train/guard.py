"""Loss spikes: telling one from noise, and what is done about it.

Owns the rule, the history it looks at, and the policies' memory, all of it plain numbers that are saved with the state
of a run: a resumed run judges as an undisturbed one. Knows no model and no data.

A step is a spike when its loss and its gradient norm both leave what the last steps had: the loss by `spread` times
their spread above their median, the norm by `norm` times their median. Median and median absolute deviation, because a
spike must not hide the next one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from stateofgpt.errors import ConfigError

Policy = Literal["note", "skip", "lower", "roll_back"]
LEAST_SPREAD = 0.02  # nats: a loss that hardly moves would make a spike of every ripple
NORMAL = 1.4826  # from a median absolute deviation to the standard deviation of a normal distribution


@dataclass(frozen=True)
class SpikeConfig:
    """What happens at a spike. `note`: it is logged. `skip`: the step changes nothing. `lower`: that, and learning
    rates times `lower_by` for the next `lower_steps`. `roll_back`: weights and optimizer go back to the last multiple
    of `window` steps, and the step is left out when training comes by again."""

    policy: Policy = "note"
    window: int = 64
    spread: float = 8.0
    norm: float = 4.0
    lower_by: float = 0.5
    lower_steps: int = 200

    def __post_init__(self) -> None:
        if self.window < 8:
            raise ConfigError(f"spikes.window is {self.window}; a spread needs at least 8 steps")
        for name in ("spread", "norm", "lower_by"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"spikes.{name} is {getattr(self, name)}, must be above 0")


class SpikeGuard:
    """Judges one step after another."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.left_out: list[int] = []  # steps that a roll-back leaves out
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._lowered_until = 0

    def is_spike(self, loss: float, norm: float) -> bool:
        """Judge a step by its loss and gradient norm; what is no spike becomes part of the history."""
        if len(self._losses) >= self.config.window // 2:
            middle = median(self._losses)
            spread = max(LEAST_SPREAD, NORMAL * median(abs(x - middle) for x in self._losses))
            if loss > middle + self.config.spread * spread and norm > self.config.norm * median(self._norms):
                return True
        self._losses.append(loss)
        self._norms.append(norm)
        return False

    def lower_from(self, step: int) -> None:
        """Lower the learning rates for the steps after `step`."""
        self._lowered_until = step + 1 + self.config.lower_steps

    def rate(self, step: int) -> float:
        """The factor of the learning rates at `step`."""
        return self.config.lower_by if step < self._lowered_until else 1.0

    def state(self) -> dict[str, Any]:
        """Everything that `load` needs, as JSON."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "lowered_until": self._lowered_until,
            "left_out": self.left_out,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._norms = deque(state["norms"], maxlen=self.config.window)
        self._lowered_until = int(state["lowered_until"])
        self.left_out = list(state["left_out"])
        if not all(map(math.isfinite, self._losses)):
            raise ConfigError("the saved history of losses holds a number that is not finite; begin the stage anew")
