"""Pretraining alone, on one text of the user's: three sizes, and what they write as they learn.

`sog run shakespeare --corpus FILE`, with the text that the talk shows or any other.
"""

from __future__ import annotations

from stateofgpt.errors import ConfigError
from stateofgpt.recipes.recipe import Recipe
from stateofgpt.stages import collect, pretrain, tokenize

DEFAULT_MINUTES = 5.0
FEWEST_MINUTES = 1.0
SIZES = 3
VOCABULARY = 1024  # a megabyte of text teaches no more tokens than that well


def recipe(minutes: float | None = None) -> Recipe:
    """The default five minutes, or `minutes`."""
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if minutes < FEWEST_MINUTES:
        raise ConfigError(f"--minutes {minutes:g}: the shakespeare recipe needs at least {FEWEST_MINUTES:g}")
    return Recipe(
        "shakespeare",
        minutes=minutes,
        stages=("collect", "tokenize", "pretrain"),
        collect=collect.Config(sources=(), corpus_weight=1.0, validation_share=0.05, most_characters=4000),
        tokenize=tokenize.Config(vocab_size=VOCABULARY),
        pretrain=pretrain.Config(
            seconds=200.0,
            sizes=SIZES,
            sample_at=(0.0, 0.01, 0.05, 0.2, 1.0),
            sample_tokens=160,
            eval_at=(0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
        ),
    )
