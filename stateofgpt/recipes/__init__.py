"""Recipes: a run as a function that returns frozen configurations. A module is a scale, its `recipe` the function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stateofgpt.recipes.recipe import Recipe

_NAMES = ("debug", "laptop", "shakespeare")


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
    """The recipe `name` with the user's minutes, seed, texts and dotted overrides; from a model, where one is given."""
    from stateofgpt.config import apply_overrides

    made: Any = import_module(f"stateofgpt.recipes.{name}").recipe(minutes)
    if model is not None:
        from stateofgpt.recipes.continued import continued

        made = continued(made, model)
    if corpus:
        made = replace(made, collect=replace(made.collect, corpus=tuple(str(path.resolve()) for path in corpus)))
    chosen: Recipe = apply_overrides(replace(made, seed=seed), overrides)
    return chosen
