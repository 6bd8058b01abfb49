"""The learning-rate schedule, a pure function of the step. Knows nothing of optimizers."""

from __future__ import annotations

from stateofgpt.errors import ConfigError


def warmup_stable_decay(step: float, steps: int, *, warmup: int, decay_share: float, floor: float = 0.0) -> float:
    """Factor in [floor, 1] for `step` of `steps`: linear warm-up, plateau, linear decay over the last `decay_share`;
    between two whole steps too.

    >>> [round(warmup_stable_decay(s, 10, warmup=2, decay_share=0.5), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    if steps < 1 or not 0.0 <= decay_share <= 1.0:
        raise ConfigError(f"a schedule needs steps >= 1 and 0 <= decay_share <= 1, got {steps} and {decay_share}")
    rise = min(1.0, (step + 1) / max(1, warmup))
    decay_steps = max(1, round(steps * decay_share))
    fall = max(0.0, min(1.0, (steps - step) / decay_steps))
    return floor + (1.0 - floor) * min(rise, fall)
