"""Batches that grow: the same rows in the same order, in more and smaller steps at the beginning."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateofgpt.errors import ConfigError
from stateofgpt.train.ramp import Cuts, Ramp, seconds_per_batch
from stateofgpt.train.schedule import warmup_stable_decay


def sizes(cuts: Cuts) -> list[int]:
    return [cuts.of(step)[1] for step in range(cuts.steps)]


def test_without_a_ramp_a_step_is_a_whole_batch() -> None:
    cuts = Cuts(7, 8)
    assert [cuts.of(step) for step in range(cuts.steps)] == [(8 * step, 8) for step in range(7)]
    assert [cuts.progress(step) for step in range(8)] == list(range(8))
    assert [cuts.step_at(x) for x in (0.0, 0.01, 0.2, 0.5, 1.0)] == [round(x * 7) for x in (0.0, 0.01, 0.2, 0.5, 1.0)]
    assert cuts.step_at(2.0) > cuts.steps


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [  # worked out by hand: ten batches of eight rows
        (Ramp(0.25, 0.4), [2] * 8 + [4] * 4 + [8] * 6),
        (Ramp(0.5, 1.0), [4] * 20),
        (Ramp(0.125, 0.3), [1] * 8 + [2] * 4 + [4] * 2 + [8] * 7),
        (Ramp(0.33, 0.2), [2, 3, 3, 4, 4] + [8] * 8),
        (Ramp(0.9, 0.1), [4, 4] + [8] * 9),
    ],
)
def test_the_first_batches_are_read_in_pieces_that_double(ramp: Ramp, expected: list[int]) -> None:
    assert sizes(Cuts(10, 8, ramp)) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(8, 40), st.floats(0.13, 0.99), st.floats(0.01, 1.0))
def test_a_ramp_leaves_every_row_in_its_place_and_only_grows(
    batches: int, rows: int, start: float, until: float
) -> None:
    cuts = Cuts(batches, rows, Ramp(start, until))
    read = [row for step in range(cuts.steps) for row in range(cuts.of(step)[0], sum(cuts.of(step)))]
    assert read == list(range(batches * rows))
    assert all(cuts.read(step + 1) == cuts.read(step) + cuts.of(step)[1] for step in range(cuts.steps))
    made = sizes(cuts)
    assert min(made) > 0 and max(made) <= rows
    assert all(later >= earlier - 1 for earlier, later in pairwise(made))  # a piece may be a row larger than the next
    whole = cuts.step_at(until)
    assert all(size == rows for size in made[whole + 1 :])


def test_the_rates_follow_what_was_read_and_not_how_it_was_cut() -> None:
    plain, cut = Cuts(40, 8), Cuts(40, 8, Ramp(0.25, 0.5))
    rate = {
        cuts.read(step): warmup_stable_decay(cuts.progress(step), 40, warmup=10, decay_share=0.6)
        for cuts in (plain, cut)
        for step in range(cuts.steps)
    }
    for step in range(cut.steps):
        row = cut.read(step)
        assert warmup_stable_decay(cut.progress(step), 40, warmup=10, decay_share=0.6) == rate[row]
        below, above = rate[row // 8 * 8], rate[min(39, row // 8 + 1) * 8]
        assert min(below, above) <= rate[row] <= max(below, above)


def test_a_batch_in_pieces_costs_as_many_steps() -> None:
    def seconds(rows: int) -> float:
        return 1.0 + 0.5 * rows

    assert seconds_per_batch(seconds, 8, None) == 5.0
    # a fifth of the batches as 4 steps of 2 rows, a fifth as 2 of 4, the rest whole: 0.2 * 8 + 0.2 * 6 + 0.6 * 5
    assert seconds_per_batch(seconds, 8, Ramp(0.25, 0.4)) == pytest.approx(5.8)
    cuts = Cuts(1000, 8, Ramp(0.25, 0.4))
    assert sum(map(seconds, sizes(cuts))) / 1000 == pytest.approx(5.8)


@pytest.mark.parametrize(("start", "until"), [(0.0, 0.5), (1.0, 0.5), (-1.0, 0.5), (0.5, 0.0), (0.5, 1.5)])
def test_a_ramp_that_cannot_be_is_refused(start: float, until: float) -> None:
    with pytest.raises(ConfigError, match="ramp is"):
        Ramp(start, until)


def test_a_batch_is_not_cut_below_a_row() -> None:
    with pytest.raises(ConfigError, match="4 rows cannot be cut into 8"):
        Cuts(10, 4, Ramp(0.125, 0.5))
