"""eval/likelihood.py against compression, which it is."""

from __future__ import annotations

import math

import pytest

from stateofgpt.eval.likelihood import bits_per_byte, in_parts


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


def test_every_token_of_a_text_is_scored_once_however_it_is_cut() -> None:
    ids = list(range(100, 123))
    for context in (1, 7, 23, 50):
        parts = list(in_parts(ids, begin=0, context=context))
        assert [token for part in parts for token in part[1:]] == ids
        assert all(part[0] == 0 and len(part) <= context + 1 for part in parts)
