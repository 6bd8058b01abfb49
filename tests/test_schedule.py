"""Schedules: shapes over all steps, and the ends."""

from __future__ import annotations

import doctest
import math

import pytest

from stateofgpt.errors import ConfigError
from stateofgpt.train import schedule
from stateofgpt.train.schedule import warmup_stable_decay

SHAPES = [(1, 1, 1.0), (7, 10, 0.0), (10, 2, 0.5), (100, 0, 0.6), (100, 20, 0.6), (100, 60, 0.9), (33, 5, 0.0)]


@pytest.mark.parametrize(("steps", "warmup", "decay_share"), SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_factors_rise_stay_and_fall_within_floor_and_one(
    steps: int, warmup: int, decay_share: float, floor: float
) -> None:
    factors = [warmup_stable_decay(s, steps, warmup=warmup, decay_share=decay_share, floor=floor) for s in range(steps)]
    assert all(floor < f <= 1.0 for f in factors)  # no step of a run is wasted on a rate of zero
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    fall = max(1, round(decay_share * steps))
    for step in range(warmup, steps - fall):
        assert factors[step] == 1.0
    assert factors[-1] == pytest.approx(floor + (1 - floor) * min(1 / fall, steps / max(1, warmup), 1.0))


def test_the_warmup_is_linear_and_reaches_one() -> None:
    factors = [warmup_stable_decay(s, 100, warmup=4, decay_share=0.1) for s in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("step", [10, 11, 500])
def test_past_its_end_a_schedule_stays_at_its_floor(step: int) -> None:
    assert warmup_stable_decay(step, 10, warmup=2, decay_share=0.5) == 0.0
    assert warmup_stable_decay(step, 10, warmup=2, decay_share=0.5, floor=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(("steps", "decay_share"), [(0, 0.5), (10, -0.1), (10, 1.1), (10, math.nan)])
def test_a_schedule_that_cannot_be_is_refused(steps: int, decay_share: float) -> None:
    with pytest.raises(ConfigError, match="decay_share"):
        warmup_stable_decay(0, steps, warmup=1, decay_share=decay_share)


def test_the_docstrings_are_true() -> None:
    assert doctest.testmod(schedule).failed == 0
