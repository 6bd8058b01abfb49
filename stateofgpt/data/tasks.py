"""What may be asked where an answer can be checked: the skills, a file of word problems, or tasks of reasoning_gym.

Owns the order in which problems are asked (a pure function of seed and index), which of them training never sees, and
the check. Knows nothing of models or of what a right answer is worth.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from stateofgpt.config import suggestion
from stateofgpt.data import gsm8k
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.data.skills import Problem, Split, final_text, is_right, stated_number
from stateofgpt.errors import ConfigError, DataError
from stateofgpt.text.chat import Conversation

GYM = "reasoning_gym:"
_HELD_OUT_ONE_IN = 10
_FEWEST = 20
_ATTEMPTS = 1000


class Tasks(Protocol):
    """A source of problems with a check."""

    def problems(self, n: int, split: Split, start: int) -> list[Problem]:
        """Problems `start` to `start + n` of an endless list; of a finite held-out set at most all of it."""
        ...

    def check(self, problem: Problem, messages: Conversation) -> float:
        """How right an answer is, from 0 to 1."""
        ...


def tasks_of(name: str | None, seed: int, config: PromptConfig) -> Tasks:
    """The skills for None, tasks of reasoning_gym for "reasoning_gym:NAME", else the problems in a file."""
    if name is None:
        return SkillTasks(seed, config)
    if name.startswith(GYM):
        return GymTasks(name.removeprefix(GYM), seed)
    return FileTasks(gsm8k.read_problems(Path(name)), seed)


class SkillTasks:
    """The generated problems of `data.skills`."""

    def __init__(self, seed: int, config: PromptConfig) -> None:
        self.seed, self.config = seed, config

    def problems(self, n: int, split: Split, start: int) -> list[Problem]:
        return prompts(self.seed, n, self.config, split, start)

    def check(self, problem: Problem, messages: Conversation) -> float:
        return float(is_right(problem, messages))


class FileTasks:
    """A list of problems, every one once an epoch, in a fresh order; a tenth, by the hash of its key, is held out."""

    def __init__(self, found: Sequence[Problem], seed: int) -> None:
        if len(found) < _FEWEST:
            raise DataError(f"there are {len(found)} problems; at least {_FEWEST} are needed, some to be held out")
        ordered = sorted(found, key=lambda problem: _digest(problem.key))
        cut = max(2, len(ordered) // _HELD_OUT_ONE_IN)
        self.split: dict[Split, list[Problem]] = {"heldout": ordered[:cut], "train": ordered[cut:]}
        self.seed = seed

    def problems(self, n: int, split: Split, start: int) -> list[Problem]:
        there = self.split[split]
        if split == "heldout":
            n = min(n, len(there))
        out = []
        for index in range(start, start + n):
            epoch, place = divmod(index, len(there))
            out.append(there[_order(self.seed, epoch, len(there))[place]])
        return out

    def check(self, problem: Problem, messages: Conversation) -> float:
        return float(is_right(problem, messages))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> list[int]:
    order = list(range(n))
    random.Random(f"tasks {seed} {epoch}").shuffle(order)
    return order


class GymTasks:
    """One procedural dataset of the package reasoning_gym, which also checks the answers."""

    def __init__(self, name: str, seed: int) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError(
                f"{GYM}{name} needs the package reasoning-gym; install it with `pip install reasoning-gym`"
            )
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            known = suggestion(name, DATASETS) or f"; there are {len(DATASETS)}, for example chain_sum"
            raise ConfigError(f'reasoning_gym has no tasks "{name}"{known}')
        self.name = name
        self.dataset: Any = reasoning_gym.create_dataset(name, seed=seed, size=1 << 30)

    def problems(self, n: int, split: Split, start: int) -> list[Problem]:
        return [self._problem(index, split) for index in range(start, start + n)]

    def _problem(self, index: int, split: Split) -> Problem:
        """The first of the entries index, index + 2^20, ... whose question is in the split."""
        for attempt in range(_ATTEMPTS):
            place = (index + (attempt << 20)) % (1 << 30)
            entry = self.dataset[place]
            question = str(entry["question"])
            held_out = int(_digest(question)[:8], 16) % _HELD_OUT_ONE_IN == 0
            if held_out == (split == "heldout"):
                skill = f"{GYM}{self.name}"
                return Problem(skill, question, str(entry["answer"]), f"{skill}:{question}", {"place": place})
        raise DataError(f"reasoning_gym's {self.name} has too few different questions to hold some out")

    def check(self, problem: Problem, messages: Conversation) -> float:
        """1 where the package gives full marks to what the last message says: to all of it, its one number, or what
        follows its last colon. Its partial marks are not taken: 817 gets two thirds where 81 is right."""
        text = final_text(messages)
        if not text:
            return 0.0
        entry = self.dataset[int(problem.meta["place"])]
        told = {text, stated_number(text), text.rpartition(":")[2].strip().removesuffix(".")}
        scores = [float(self.dataset.score_answer(answer=answer, entry=entry)) for answer in told if answer]
        return float(max(scores) > 0.999)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
