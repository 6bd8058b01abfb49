"""An assistant in minutes on a laptop's CPU: the minutes dial decides size and steps of everything."""

from __future__ import annotations

from dataclasses import replace

from stateofgpt.errors import ConfigError
from stateofgpt.recipes.recipe import Recipe
from stateofgpt.stages import evaluate, tokenize

DEFAULT_MINUTES = 10.0
FEWEST_MINUTES = 3.0
FEWEST_LAYERS = 4  # by loss alone two would do in ten minutes, but written steps then come out wrong more often
PART_TOKENS = 1024  # answers are of many lengths: updates of PPO take 0.68 of the time, scoring 0.4, at 512 to 2048
VALUE_LAM = 1.0  # a value model that began wrong is not corrected by what it says itself
VOCABULARY = 2048  # at one to three million parameters a larger one is half of the model, and most of it is hardly seen


def recipe(minutes: float | None = None) -> Recipe:
    """The default ten minutes, or `minutes`. Shorter runs also answer fewer questions at the end."""
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if minutes < FEWEST_MINUTES:
        raise ConfigError(
            f"--minutes {minutes:g}: the laptop recipe needs at least {FEWEST_MINUTES:g}; try `sog run debug`"
        )
    made = Recipe("laptop", minutes=minutes)
    share = min(1.0, minutes / DEFAULT_MINUTES)
    return replace(
        made,
        tokenize=tokenize.Config(vocab_size=VOCABULARY),
        pretrain=replace(made.pretrain, fewest_layers=FEWEST_LAYERS),
        rl=replace(made.rl, ppo=replace(made.rl.ppo, part_tokens=PART_TOKENS, value_lam=VALUE_LAM)),
        eval=evaluate.Config(seconds=45.0 * share),
    )
