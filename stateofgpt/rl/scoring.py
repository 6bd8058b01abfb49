"""Where the score of an answer comes from: a reward model that learned from rankings, or a check that knows.

Owns turning answers into one number each. Knows nothing of advantages, of updates or of files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stateofgpt.assistant.session import Turn
from stateofgpt.data.skills import Problem
from stateofgpt.errors import ConfigError
from stateofgpt.model.heads import RewardModel
from stateofgpt.model.lora import switched_off
from stateofgpt.rl.reward_training import score_ids
from stateofgpt.text.chat import Conversation
from stateofgpt.train.loss import PLAIN, Way

Check = Callable[[Problem, Conversation], float]  # the problem and the answer's messages -> 1 right .. 0 wrong


class Scorer(Protocol):
    """Scores [B] of answers. `mean` and `std` say how a value model's raw numbers become scores: (raw - mean) / std."""

    mean: float
    std: float

    def __call__(self, turns: Sequence[Turn], problems: Sequence[Problem | None]) -> Tensor: ...


def ended(turn: Turn, end_id: int) -> bool:
    """Whether the assistant ended its turn itself, and not the document, the context or the patience of the tools."""
    return turn.finish == "stop" and bool(turn.ids) and turn.ids[-1] == end_id


class LearnedScorer:
    """A reward model's scores, shifted and scaled by what is usual. An answer that did not end its turn gets
    `no_end_score`, whatever it says. With `part_tokens` as many answers are read together as hold these."""

    def __init__(
        self,
        model: RewardModel,
        *,
        mean: float,
        std: float,
        pad_id: int,
        end_id: int,
        no_end_score: float,
        part_tokens: int | None = None,
        way: Way = PLAIN,
    ) -> None:
        self.model, self.mean, self.std, self.way = model, mean, std, way
        self.pad_id, self.end_id, self.no_end_score, self.part_tokens = pad_id, end_id, no_end_score, part_tokens

    def __call__(self, turns: Sequence[Turn], problems: Sequence[Problem | None] = ()) -> Tensor:
        context = self.model.config.max_position_embeddings
        with switched_off(self.model):  # where a value model has adapters on the same trunk
            rows = [[*t.prompt_ids, *t.ids][-context:] for t in turns]
            prompts = [max(0, len(row) - len(t.ids)) for row, t in zip(rows, turns, strict=True)]
            tokens = self.part_tokens
            raw = score_ids(self.model, rows, self.pad_id, tokens=tokens, prompts=prompts, way=self.way)
        normal = [(s - self.mean) / self.std for s in raw]
        stopped = [ended(t, self.end_id) for t in turns]
        return torch.tensor([s if end else self.no_end_score for s, end in zip(normal, stopped, strict=True)])


class VerifiedScorer:
    """What a check of the answer says, usually 1 for right and 0 for wrong; 0 for an answer that did not end."""

    mean, std = 0.0, 1.0

    def __init__(self, check: Check, *, end_id: int) -> None:
        self.check, self.end_id = check, end_id

    def __call__(self, turns: Sequence[Turn], problems: Sequence[Problem | None]) -> Tensor:
        if len(problems) != len(turns) or None in problems:
            raise ConfigError("verified rewards need prompts with known answers; leave out prompts of people's own")
        return torch.tensor([
            self.check(problem, turn.messages) if problem is not None and ended(turn, self.end_id) else 0.0
            for turn, problem in zip(turns, problems, strict=True)
        ])  # fmt: skip
