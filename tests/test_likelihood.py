"""eval/likelihood.py against compression, which it is."""

from __future__ import annotations

import math

import pytest

from stateofgpt.eval.likelihood import bits_per_byte


def test_a_uniform_guess_over_bytes_costs_eight_bits() -> None:
    assert bits_per_byte(77 * math.log(256), 77) == pytest.approx(8.0)


def test_the_unit_does_not_depend_on_how_a_text_is_cut_into_tokens() -> None:
    text = "naïve – 数".encode()
    per_byte = [math.log(256)] * len(text)
    pairs = [sum(per_byte[i : i + 2]) for i in range(0, len(per_byte), 2)]
    assert bits_per_byte(sum(per_byte), len(text)) == pytest.approx(bits_per_byte(sum(pairs), len(text)))


def test_a_text_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 0)
