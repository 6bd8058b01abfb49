"""The prompts of reward modelling and reinforcement learning: questions without answers.

Owns which skills are asked how often. Prompt i is a pure function of (seed, i). Knows nothing of models or rewards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from stateofgpt.data.skills import SKILLS, Problem, Split, problem
from stateofgpt.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class PromptConfig:
    """Share of each skill among the prompts, before normalising; a skill that is not named is not asked.

    Plain sums lead, because there the manner of answering is free and so there is something to prefer.
    """

    arithmetic: float = 6.0
    arithmetic_direct: float = 0.5
    arithmetic_steps: float = 1.0
    arithmetic_tool: float = 0.5
    fact: float = 0.5
    compare: float = 1.0
    copy: float = 0.4
    reverse: float = 0.4
    count: float = 0.4
    sort: float = 0.4
    names: float = 0.5
    greet: float = 0.3
    thanks: float = 0.2
    identity: float = 0.3
    decline: float = 0.4


def prompt(seed: int, index: int, config: PromptConfig, split: Split = "train") -> Problem:
    """Prompt `index` of the endless list that belongs to `seed` and `split`."""
    weights = [float(getattr(config, skill)) for skill in SKILLS]
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise DataError("the prompts need finite weights of at least 0 with one above 0; put one skill's weight up")
    rng = random.Random(f"prompt {split} {seed} {index}")
    return problem(rng.choices(SKILLS, weights)[0], rng, split)


def prompts(seed: int, n: int, config: PromptConfig, split: Split = "train", start: int = 0) -> list[Problem]:
    """Prompts `start` to `start + n`."""
    return [prompt(seed, index, config, split) for index in range(start, start + n)]


def repeated(items: Sequence[T], times: int) -> list[T]:
    """Each item `times` times, its copies side by side: what is asked for several answers to everything."""
    return [item for item in items for _ in range(times)]
