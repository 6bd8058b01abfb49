"""What numbers a setting can take, by its name: a wrong one is refused at once, before anything is read or trained.

Owns the ranges that every configuration shares. What depends on another setting is judged by the dataclass that has
both. Knows nothing of what a setting does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from stateofgpt.config import to_dict
from stateofgpt.errors import ConfigError

MAY_BE_NEGATIVE = ("no_end_score", "accept")  # scores
AT_LEAST_ONE = (
    "rows", "validation_rows", "context", "width", "layers", "fewest_layers", "steps", "n_prompts", "held_out_prompts",
    "prompts_per_step", "looks", "max_tokens", "eval_tokens", "train_bytes", "corpus_max_bytes", "key", "other",
)  # fmt: skip
ABOVE_ZERO = ("eps", "clip", "minutes")
AT_MOST_ONE = ("decay_share", "corpus_weight", "files_share", "validation_share", "two_tasks_share", "dialogue_share")
BELOW_ONE = ("beta1", "beta2", "momentum")
LARGEST = 2**53  # whole numbers above it are no floats


def check(config: object) -> None:
    """Raise ConfigError, naming the setting, where one of a configuration's numbers is none that it can be."""
    for key, value in _numbers(to_dict(config)):
        if (wanted := _misfit(key.rpartition(".")[2], value)) is not None:
            raise ConfigError(f"{key} is {value:g}, must be {wanted}")


def _misfit(name: str, value: float) -> str | None:
    """What a setting of this name must be, if `value` is not that."""
    if name in AT_LEAST_ONE and value < 1:
        return "at least 1"
    if name in ABOVE_ZERO and value <= 0:
        return "above 0"
    if name in AT_MOST_ONE and not 0 <= value <= 1:
        return "from 0 to 1"
    if name in BELOW_ONE and not 0 <= value < 1:
        return "from 0 to below 1"
    if name not in MAY_BE_NEGATIVE and value < 0:
        return "at least 0"
    if isinstance(value, int) and value > LARGEST:
        return f"at most {LARGEST:,}"
    return "a number" if math.isnan(value) else None


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a configuration with its dotted name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value
