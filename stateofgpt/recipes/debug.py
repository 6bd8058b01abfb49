"""All stages in about a minute, to see that they work: too little of everything to learn much. Fixed steps, no dial."""

from __future__ import annotations

from dataclasses import replace

from stateofgpt.errors import ConfigError
from stateofgpt.recipes.recipe import Recipe
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.stages import arena, collect, evaluate, pretrain, reward, rl, sft, tokenize


def recipe(minutes: float | None = None) -> Recipe:
    """The debug run; it has no minutes dial."""
    if minutes is not None:
        raise ConfigError("the debug recipe takes no --minutes; use `sog run laptop --minutes N`")
    few = tuple(replace(s, max_bytes=max(40_000, s.max_bytes // 30)) for s in collect.DEFAULT_SOURCES)
    return Recipe(
        "debug",
        collect=collect.Config(sources=few),
        tokenize=tokenize.Config(vocab_size=1024, train_bytes=300_000),
        pretrain=pretrain.Config(steps=40, width=64, layers=2, rows=8, eval_tokens=512, sample_tokens=24),
        sft=sft.Config(steps=40, rows=8, validation_rows=4),
        reward=reward.Config(n_prompts=24, held_out_prompts=24, max_tokens=60),
        rl=rl.Config(
            iterations=3, batch=16, max_tokens=60, held_out_prompts=24, guards=GuardConfig(every=2, prompts=8)
        ),
        eval=evaluate.Config(key=8, other=4, tricks=4, max_tokens=60),
        arena=arena.Config(prompts=16, max_tokens=60),
    )
