"""What a setting cannot be is refused at once, by its name, in every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from stateofgpt.cli import main
from stateofgpt.errors import ConfigError
from stateofgpt.recipes import limits, load, names


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_within_the_limits_as_it_comes(name: str) -> None:
    corpus = (Path(__file__),) if name == "shakespeare" else ()
    load(name, minutes=None, seed=0, corpus=corpus, overrides={})


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("pretrain.rows", "0", "pretrain.rows is 0, must be at least 1"),
        ("pretrain.context", "-3", "pretrain.context is -3, must be at least 1"),
        ("pretrain.lr", "-0.1", "pretrain.loop.optim.lr is -0.1, must be at least 0"),
        ("pretrain.beta2", "1", "pretrain.loop.optim.beta2 is 1, must be from 0 to below 1"),
        ("pretrain.decay_share", "1.5", "pretrain.decay_share is 1.5, must be from 0 to 1"),
        ("sft.clip", "0", "sft.loop.clip is 0, must be above 0"),
        ("sft.data.names", "-2", "sft.data.names is -2, must be at least 0"),
        ("rl.held_out_prompts", "0", "rl.held_out_prompts is 0, must be at least 1"),
        ("rl.temperature", "-1", "rl.temperature is -1, must be at least 0"),
        ("rl.iterations", "1e30", "rl.iterations is 1e+30, must be at most 9,007,199,254,740,992"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_its_whole_name(setting: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load("debug", minutes=None, seed=0, corpus=(), overrides={setting: value})
    assert str(refused.value) == says


def test_a_score_may_be_negative_and_a_list_is_looked_through() -> None:
    load("debug", minutes=None, seed=0, corpus=(), overrides={"rl.no_end_score": "-9", "rl.groups.accept": "-1"})
    assert list(limits._numbers({"a": {"b": [1, [2.5]], "c": True, "d": "7", "e": None}})) == [("a.b", 1), ("a.b", 2.5)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--pretrain.device", "cuda:99"), "'cuda:99' is not on this machine"),
        (("--pretrain.device", "mps"), "no numbers of 64 bits"),
        (("--pretrain.width", "7"), "a width of 7 is below 64, the size of a head"),
    ],
)
def test_what_pretraining_cannot_do_is_said_before_texts_are_read(
    words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "debug", "--out", str(tmp_path / "run"), *words]) == 2
    told = capsys.readouterr()
    assert says in told.err and not told.out and not (tmp_path / "run").exists()
