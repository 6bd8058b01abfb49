"""Recipes: a run as a function that returns frozen configurations. A module is a scale, its `recipe` the function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateofgpt.errors import ConfigError

if TYPE_CHECKING:
    from stateofgpt.recipes.recipe import Recipe

_NAMES = ("debug", "laptop", "overoptimise", "shakespeare")


def names() -> tuple[str, ...]:
    """All recipes."""
    return _NAMES


def load(
    name: str,
    *,
    minutes: float | None,
    seed: int,
    corpus: tuple[Path, ...],
    overrides: Mapping[str, str],
    model: Path | None = None,
) -> Recipe:
    """The recipe `name` with the user's minutes, seed, texts and dotted overrides; from a model, where one is given.

    Raises ConfigError for what a setting cannot be.
    """
    from stateofgpt.config import apply_overrides
    from stateofgpt.recipes.limits import check

    module = import_module(f"stateofgpt.recipes.{name}")
    made: Any = module.recipe(minutes)
    if model is not None:
        from stateofgpt.recipes.continued import continued

        made = getattr(module, "begin_from", continued)(made, model)
    if corpus:
        if not hasattr(made, "collect"):
            raise ConfigError(f"the recipe {name} reads no texts; leave --corpus out")
        made = replace(made, collect=replace(made.collect, corpus=tuple(str(path.resolve()) for path in corpus)))
    chosen: Recipe = apply_overrides(replace(made, seed=seed), overrides)
    check(chosen)
    return chosen


def runner(name: str) -> Callable[..., None]:
    """What carries out the recipe `name`, as `execute(recipe, out, only)`: the pipeline, or what its module has."""
    from stateofgpt.recipes.pipeline import execute

    run: Callable[..., None] = getattr(import_module(f"stateofgpt.recipes.{name}"), "execute", execute)
    return run
