"""Overrides, JSON round trips and fingerprints of frozen dataclasses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateofgpt.config import apply_overrides, fingerprint, from_dict, keys, suggestion, to_dict
from stateofgpt.errors import ConfigError


@dataclass(frozen=True)
class Adam:
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, not {self.lr}")


@dataclass(frozen=True)
class Pretrain:
    steps: int = 100
    compile: bool = False
    arch: Literal["qwen3", "llama", 2] = "qwen3"
    corpus: tuple[Path, ...] = ()
    minutes: float | None = None
    low: int = 1
    high: int = 2
    adam: Adam = field(default_factory=Adam)

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError("low must be below high")


@dataclass(frozen=True)
class Recipe:
    name: str
    pretrain: Pretrain = field(default_factory=Pretrain)
    maybe: Adam | None = None
    adams: tuple[Adam, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)


RECIPE = Recipe("debug")


@pytest.mark.parametrize(
    ("key", "text", "want"),
    [
        ("pretrain.steps", "7", 7),
        ("pretrain.steps", "2e6", 2_000_000),
        ("pretrain.steps", "1_000", 1000),
        ("pretrain.compile", "Yes", True),
        ("pretrain.compile", "0", False),
        ("pretrain.arch", "llama", "llama"),
        ("pretrain.arch", "2", 2),
        ("pretrain.corpus", "a.txt, b", (Path("a.txt"), Path("b"))),
        ("pretrain.corpus", "", ()),
        ("pretrain.minutes", "2.5", 2.5),
        ("pretrain.minutes", "none", None),
        ("pretrain.adam.lr", "3e-4", 3e-4),
        ("pretrain.adam.betas", "(0.8, 0.99)", (0.8, 0.99)),
        ("maybe.lr", "0.5", 0.5),
        ("name", "", ""),
    ],
)
def test_an_override_takes_the_type_of_its_field(key: str, text: str, want: object) -> None:
    value: Any = apply_overrides(RECIPE, {key: text})
    for part in key.split("."):
        value = getattr(value, part)
    assert value == want
    assert type(value) is type(want)


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("pretrain.steps", "many", 'pretrain.steps must be a whole number, not "many"'),
        ("pretrain.steps", "1.5", "whole number"),
        ("pretrain.steps", "inf", "whole number"),
        ("pretrain.adam.lr", "nan", "must be a number"),
        ("pretrain.adam.lr", "-1", "pretrain.adam.lr: lr must be positive"),
        ("pretrain.adam.betas", "0.9", "2 values"),
        ("pretrain.compile", "maybe", "true or false"),
        ("pretrain.arch", "lama", 'did you mean "llama"'),
        ("pretrain.minutes", "x", "must be a number"),
        ("pretrain.step", "1", 'did you mean "pretrain.steps"'),
        ("pretain.steps", "1", 'did you mean "pretrain.steps"'),
        ("lr", "1", 'did you mean "pretrain.adam.lr"'),
        ("pretrain.steps.more", "1", "is a single value"),
        ("pretrain.", "1", "unknown setting"),
        ("", "1", "unknown setting"),
        ("pretrain", "1", "cannot be set on the command line"),
        ("adams", "1", "cannot be set on the command line"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(key: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        apply_overrides(RECIPE, {key: text})
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_overrides_that_are_only_right_together_are_applied_together() -> None:
    changed = apply_overrides(RECIPE, {"pretrain.low": "10", "pretrain.high": "20"})
    assert (changed.pretrain.low, changed.pretrain.high) == (10, 20)
    assert RECIPE.pretrain.low == 1


@dataclass(frozen=True)
class Loop:
    adam: Adam = field(default_factory=Adam)
    other: Adam = field(default_factory=Adam)
    clip: float = 1.0


@dataclass(frozen=True)
class Deep:
    pretrain: Loop = field(default_factory=Loop)
    sft: Pretrain = field(default_factory=Pretrain)


def test_the_middle_of_a_key_may_be_left_out_where_only_one_key_fits() -> None:
    changed = apply_overrides(Deep(), {"sft.lr": "0.5", "pretrain.other.lr": "0.25", "pretrain.clip": "2"})
    assert (changed.sft.adam.lr, changed.pretrain.other.lr, changed.pretrain.adam.lr) == (0.5, 0.25, 0.01)
    with pytest.raises(ConfigError, match=r'"pretrain.lr" could be pretrain.adam.lr or pretrain.other.lr; say which'):
        apply_overrides(Deep(), {"pretrain.lr": "0.5"})
    with pytest.raises(ConfigError, match=r'"sft.adam.lr" is given twice'):
        apply_overrides(Deep(), {"sft.lr": "0.5", "sft.adam.lr": "0.5"})
    with pytest.raises(ConfigError, match="unknown setting"):
        apply_overrides(Deep(), {"adam.lr": "0.5"})


def test_no_override_changes_nothing() -> None:
    assert apply_overrides(RECIPE, {}) is RECIPE


def test_every_key_can_be_listed_and_none_is_a_table() -> None:
    assert keys(RECIPE)[:3] == ("name", "pretrain.steps", "pretrain.compile")
    assert "maybe.betas" in keys(RECIPE)
    assert "pretrain.adam" not in keys(RECIPE)


def test_a_configuration_survives_json() -> None:
    pretrain = Pretrain(corpus=(Path("x"),), minutes=1, adam=Adam(0.5))
    recipe = Recipe("r", pretrain, maybe=Adam(), adams=(Adam(1.0), Adam(2.0)), weights={"kjv": 1})
    back = from_dict(Recipe, to_dict(recipe))
    assert back == recipe
    assert to_dict(back)["pretrain"]["corpus"] == ["x"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"name": "x", "pretrian": {}}, 'unknown setting "pretrian"; did you mean "pretrain"'),
        ({"name": "x", "pretrain": {"adam": {"rl": 1}}}, 'unknown setting "pretrain.adam.rl"'),
        ({}, '"name" is missing'),
        ({"name": 3}, "name must be str, not 3"),
        ({"name": "x", "pretrain": 3}, "pretrain must be a table"),
        ({"name": "x", "pretrain": {"steps": True}}, "pretrain.steps must be int"),
        ({"name": "x", "pretrain": {"steps": 1.5}}, "pretrain.steps must be int"),
        ({"name": "x", "pretrain": {"arch": "bert"}}, "must be one of"),
        ({"name": "x", "pretrain": {"adam": {"betas": [1]}}}, "betas"),
        ({"name": "x", "adams": [{"lr": 0}]}, "lr must be positive"),
        ({"name": "x", "maybe": 1}, "maybe must be a table"),
    ],
)
def test_json_that_does_not_fit_is_refused(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=None) as refused:
        from_dict(Recipe, data)
    assert says in str(refused.value)


def test_a_fingerprint_is_the_hash_of_canonical_json_and_changes_with_any_field() -> None:
    assert fingerprint(Adam()) == hashlib.sha256(b'{"betas":[0.9,0.95],"lr":0.01}').hexdigest()
    assert fingerprint(RECIPE) == fingerprint(from_dict(Recipe, to_dict(RECIPE))) == fingerprint(to_dict(RECIPE))
    assert fingerprint(apply_overrides(RECIPE, {"pretrain.adam.lr": "0.02"})) != fingerprint(RECIPE)


@given(st.integers(), st.floats(allow_nan=False), st.lists(st.text("abc./", min_size=1).map(str.strip)))
def test_any_value_written_as_text_is_read_back(steps: int, minutes: float, parts: list[str]) -> None:
    texts = {"pretrain.steps": str(steps), "pretrain.minutes": repr(minutes), "pretrain.corpus": ",".join(parts)}
    pretrain = apply_overrides(RECIPE, texts).pretrain
    assert (pretrain.steps, pretrain.minutes, pretrain.corpus) == (steps, minutes, tuple(map(Path, parts)))


def test_a_suggestion_is_made_only_for_something_close() -> None:
    assert suggestion("pretrian", ["pretrain", "sft"]) == '; did you mean "pretrain"?'
    assert suggestion("zzz", ["pretrain", "sft"]) == ""
