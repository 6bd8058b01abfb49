"""Guards of reinforcement learning: telling from a few looks that a policy exploits its reward, and which was the best.

Owns the limits, the rule, and the sentence that says why a run stopped. Pure: it sees numbers of one look after the
other and knows no model, prompt or file. Everything it decides follows from the looks it has seen, so a resumed run
that shows it the same looks is judged as an undisturbed one.

A *look* is a measurement on prompts that no stage trains on: the reward that is climbed, and the scores of a judge that
the policy never learns from. Over-optimisation is the first going up while the second goes down (Gao et al., arXiv
2210.10760); the policy's entropy and length say in which way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, pstdev, stdev
from typing import Any

from stateofgpt.errors import ConfigError

SURELY = (
    2.0  # standard errors of the paired difference by which the best look must lead for a last policy to be given up
)


@dataclass(frozen=True)
class GuardConfig:
    """When a policy counts as lost. A limit of `none` is no limit; with `stop` false the looks are taken and told, and
    nothing is stopped or given up.

    `every` iterations `prompts` held-out prompts are asked. `entropy_floor` is a share of the entropy before training,
    `length_drift` a factor, up or down, on the length before. The judge's mean score has fallen where it is below that
    of the best look by `fall` times the spread of scores before training and by `errors` standard errors of the paired
    difference. `patience` is the number of looks in a row that must find the same. `rankings` is a file of rankings
    that the reward model did not learn from, for a judge where people ranked.
    """

    every: int = 4
    prompts: int = 48
    patience: int = 2
    entropy_floor: float | None = 0.02
    length_drift: float | None = 3.0
    fall: float | None = 0.1
    errors: float = 3.0
    stop: bool = True
    rankings: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("prompts", 2), ("patience", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"guards.{name} is {getattr(self, name)}, must be at least {least}")
        if self.entropy_floor is not None and not 0.0 <= self.entropy_floor < 1.0:
            raise ConfigError(f"guards.entropy_floor is {self.entropy_floor}, must be from 0 and below 1, a share")
        if self.length_drift is not None and not self.length_drift > 1.0:
            raise ConfigError(f"guards.length_drift is {self.length_drift}, must be a factor above 1")
        for name in ("fall", "errors"):
            if (value := getattr(self, name)) is not None and not value >= 0.0:
                raise ConfigError(f"guards.{name} is {value}, must be at least 0")


@dataclass(frozen=True)
class Look:
    """One measurement after `step` iterations; `scores` and `rewards` are the judge's and the reward model's, one for
    each held-out prompt, the same prompts in every look. `kl` is in nats per answer, `entropy` in nats per token,
    `length` in tokens per answer."""

    step: int
    kl: float
    entropy: float
    length: float
    scores: tuple[float, ...]
    rewards: tuple[float, ...]

    @property
    def score(self) -> float:
        return fmean(self.scores)

    @property
    def reward(self) -> float:
        return fmean(self.rewards)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Look:
        told = {**value, "scores": tuple(value["scores"]), "rewards": tuple(value["rewards"])}
        return cls(**told)


@dataclass
class Watcher:
    """Sees the looks of one run in order. The first is of the policy before training."""

    config: GuardConfig
    looks: list[Look] = field(default_factory=list)
    best: Look | None = None  # the highest mean score among looks within the limits on entropy and length
    bad: int = 0  # looks in a row, the last included, that found the reward up and a guard down

    @classmethod
    def resumed(cls, config: GuardConfig, looks: Iterable[Mapping[str, Any]]) -> Watcher:
        """The watcher that has seen these looks."""
        watcher = cls(config)
        for look in looks:
            watcher.see(Look.from_json(look))
        return watcher

    def see(self, look: Look) -> str:
        """Judge a look; returns why the run should stop, one sentence without a full stop, or nothing."""
        if self.looks and len(look.scores) != len(self.looks[0].scores):
            raise ValueError(f"a look has {len(look.scores)} scores and the first {len(self.looks[0].scores)}")
        self.looks.append(look)
        if self.best is None:
            self.best = look
            return ""
        limits, fallen = self._past_limits(look), self._fallen(look)
        risen = look.reward > self.best.reward
        self.bad = self.bad + 1 if risen and (limits or fallen) else 0
        if not limits and not fallen and look.score > self.best.score:
            self.best = look
        if self.bad < self.config.patience or not self.config.stop:
            return ""
        return self._sentence(look, [*fallen, *limits])

    def close(self) -> str:
        """Asked after the last look: why the policy that it saw is given up for that of the best look, one sentence
        without a full stop, or nothing.

        It is where the score ended below the first look's, or where the best look leads it by `SURELY` standard errors
        of the paired difference. Without a verdict on scores (`fall` None) there is none here either.
        """
        best, last, c = self.best, self.looks[-1] if self.looks else None, self.config
        if best is None or last is None or best is last or not c.stop or c.fall is None:
            return ""
        lead, error = mean_and_error(best.scores, last.scores)
        if last.score < (first := self.looks[0].score):
            found = f"below the {first:.2f} before training"
        elif lead > SURELY * error:
            found = f"surely below the {best.score:.2f} of iteration {best.step}"
        else:
            return ""
        return f"the held-out score ended at {last.score:.2f}, {found}; kept is {self._kept()}"

    def won(self, look: Look) -> float:
        """Share of held-out prompts on which the judge prefers the look's answer to that before training, ties as
        half."""
        pairs = list(zip(look.scores, self.looks[0].scores, strict=True))
        return fmean(0.5 if abs(a - b) < 1e-9 else float(a > b) for a, b in pairs)

    def _past_limits(self, look: Look) -> list[str]:
        first, c = self.looks[0], self.config
        found = []
        if c.entropy_floor is not None and look.entropy < c.entropy_floor * first.entropy:
            found.append(
                f"the entropy fell from {first.entropy:.3g} to {look.entropy:.3g} nats per token, under the floor of "
                f"{c.entropy_floor:.0%}"
            )
        if c.length_drift is not None and first.length > 0:
            ratio = look.length / first.length
            if ratio > c.length_drift or ratio * c.length_drift < 1.0:
                way = "grew" if ratio > 1 else "shrank"
                found.append(
                    f"answers {way} from {first.length:.0f} to {look.length:.0f} tokens, more than {c.length_drift:g} "
                    "times"
                )
        return found

    def _fallen(self, look: Look) -> list[str]:
        assert self.best is not None
        if self.config.fall is None:
            return []
        down = -mean_and_error(look.scores, self.best.scores)[0]
        error = mean_and_error(look.scores, self.best.scores)[1]
        least = max(self.config.fall * pstdev(self.looks[0].scores), self.config.errors * error)
        if down <= least or down <= 0.0:
            return []
        return [f"the held-out score fell from {self.best.score:.2f} to {look.score:.2f}"]

    def _sentence(self, look: Look, found: Sequence[str]) -> str:
        assert self.best is not None
        times = f"{self.bad} looks in a row" if self.bad > 1 else "at a look"
        return (
            f"{' and '.join(found)} while the reward rose from {self.best.reward:.2f} to {look.reward:.2f}, {times} up "
            f"to iteration {look.step}; kept is {self._kept()}"
        )

    def _kept(self) -> str:
        assert self.best is not None
        return f"the policy of iteration {self.best.step}" if self.best.step else "the policy it began with"


def mean_and_error(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences a - b and its standard error (0 for a single pair)."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return fmean(differences), 0.0
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))
