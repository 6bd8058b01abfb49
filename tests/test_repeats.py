"""Weight decay by epochs: as it is up to four, then growing, and never without end."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateofgpt.train import repeats
from stateofgpt.train.repeats import decay_times


@given(st.floats(0.0, 1e4), st.floats(0.0, 1e4), st.integers(1, 10**6), st.floats(0.0, 1.0), st.floats(1.0, 100.0))
def test_it_never_falls_with_epochs_and_stays_between_one_and_the_most(
    a: float, b: float, steps: int, shrinking: float, most: float
) -> None:
    low, high = (decay_times(epochs, steps, shrinking, most) for epochs in sorted((a, b)))
    assert 1.0 <= low <= high <= most


@pytest.mark.parametrize(("epochs", "steps"), [(16.0, 300), (40.0, 5000), (5.0, 100)])
@pytest.mark.parametrize("decay", [0.01, 0.02, 0.05])
def test_what_is_reached_does_not_depend_on_the_decay_it_began_with(epochs: float, steps: int, decay: float) -> None:
    shrinking = 0.02 * decay * decay_times(epochs, steps, 0.02 * decay, 1e9)
    assert shrinking * 0.5 * steps == pytest.approx(epochs - 4)


def test_no_decay_stays_none() -> None:
    assert decay_times(100.0, 1000, 0.0) == 1.0


def test_fresh_text_keeps_the_usual_decay() -> None:
    assert [decay_times(epochs, 100, 4e-4) for epochs in (0.0, 0.7, 1.0, 2.5, 4.0)] == [1.0] * 5


@pytest.mark.parametrize("epochs", [1.0, 10.0, 1000.0])
def test_a_most_of_one_turns_it_off(epochs: float) -> None:
    assert decay_times(epochs, 100, 4e-4, 1.0) == 1.0


def test_the_docstring_is_true() -> None:
    assert doctest.testmod(repeats).failed == 0
