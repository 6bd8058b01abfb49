"""The prompts: a list fixed by its seed, in the shares asked for, train and held-out apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import pytest

from stateofgpt.data.prompts import PromptConfig, prompt, prompts
from stateofgpt.data.skills import SKILLS
from stateofgpt.errors import DataError

NONE = PromptConfig(**{f.name: 0.0 for f in fields(PromptConfig)})


def test_every_skill_has_a_weight_and_every_weight_a_skill() -> None:
    assert {f.name for f in fields(PromptConfig)} == set(SKILLS)


def test_a_prompt_is_a_function_of_seed_and_index_alone() -> None:
    config = PromptConfig()
    whole = prompts(3, 30, config)
    assert whole == [*prompts(3, 12, config), *prompts(3, 18, config, start=12)]
    assert whole[17] == prompt(3, 17, config) == prompt(3, 17, config)
    for other in (prompts(4, 30, config), prompts(3, 30, config, "heldout")):  # not even the same skills in a row
        assert [p.skill for p in whole] != [p.skill for p in other]


def test_skills_come_in_their_shares() -> None:
    config = replace(NONE, arithmetic=6.0, copy=3.0, greet=1.0)
    counts = Counter(p.skill for p in prompts(0, 2000, config))
    assert set(counts) == {"arithmetic", "copy", "greet"}
    for skill, share in (("arithmetic", 0.6), ("copy", 0.3), ("greet", 0.1)):
        assert counts[skill] / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


def test_no_key_is_in_both_splits() -> None:
    config = replace(NONE, arithmetic=1.0, copy=1.0, sort=1.0)
    keys = {split: {(p.skill, p.key) for p in prompts(0, 400, config, split)} for split in ("train", "heldout")}
    assert keys["train"] and keys["heldout"] and not keys["train"] & keys["heldout"]


@pytest.mark.parametrize("bad", [NONE, replace(NONE, copy=1.0, sort=-0.5), replace(NONE, copy=float("nan")),
                                 replace(NONE, copy=float("inf"))])  # fmt: skip
def test_weights_that_cannot_be_are_refused(bad: PromptConfig) -> None:
    with pytest.raises(DataError, match="weights"):
        prompt(0, 0, bad)
