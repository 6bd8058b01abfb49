"""What a recipe is: the configuration of every stage, frozen, and where the user's words enter it."""

from __future__ import annotations

from dataclasses import dataclass, field

from stateofgpt.config import suggestion
from stateofgpt.errors import ConfigError
from stateofgpt.run import STAGES
from stateofgpt.stages import algorithms, arena, collect, evaluate, pretrain, reward, rl, sft, tokenize


@dataclass(frozen=True)
class Recipe:
    """One run. With `minutes` the pipeline gives every stage without steps of its own a share of that time. `stages`
    are those that the recipe has, None for all."""

    name: str
    seed: int = 0
    minutes: float | None = None
    collect: collect.Config = field(default_factory=collect.Config)
    tokenize: tokenize.Config = field(default_factory=tokenize.Config)
    pretrain: pretrain.Config = field(default_factory=lambda: pretrain.Config(seconds=200.0))
    sft: sft.Config = field(default_factory=lambda: sft.Config(seconds=110.0))
    reward: reward.Config = field(default_factory=lambda: reward.Config(seconds=70.0))
    rl: rl.Config = field(default_factory=lambda: rl.Config(seconds=100.0))
    eval: evaluate.Config = field(default_factory=evaluate.Config)
    arena: arena.Config = field(default_factory=arena.Config)
    stages: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in self.stages or ():
            if name not in STAGES:
                known = suggestion(name, STAGES) or f"; there are {', '.join(STAGES)}"
                raise ConfigError(f'there is no stage "{name}" to put into a recipe{known}')
        if self.stages is not None and not self.stages:
            raise ConfigError("a recipe needs at least one stage")
        if "rl" in self.order() and "reward" not in self.order():
            algorithms.check_unrewarded(self.rl.chosen, self.rl.reward, self.rl.rankings)

    def order(self) -> tuple[str, ...]:
        """The recipe's stages, in the pipeline's order."""
        return STAGES if self.stages is None else tuple(name for name in STAGES if name in self.stages)
