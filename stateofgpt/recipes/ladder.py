"""`sog ladder`: texts, tokenizer, a grid of small models, and the law that fits them. A run of its own kind.

Owns what a ladder's run consists of, in which order, and what is printed of it.
"""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from stateofgpt.config import to_dict
from stateofgpt.errors import ConfigError
from stateofgpt.recipes import load
from stateofgpt.recipes.laptop import VOCABULARY
from stateofgpt.report.ladder import build
from stateofgpt.run import Run
from stateofgpt.stages import collect, ladder, tokenize
from stateofgpt.train.law_file import LADDER
from stateofgpt.train.scaling import EPOCH

DEFAULT_MINUTES = 5.0
OUT = Path("runs/ladder")
SYMBOLS = {"irreducible": "E", "a_scale": "A", "b_scale": "B", "a": "alpha", "b": "beta"}


@dataclass(frozen=True)
class Ladder:
    """The laptop recipe's texts and vocabulary, so that its dial can go by the law; `minutes` are for all of it."""

    name: str = "ladder"
    seed: int = 0
    minutes: float | None = DEFAULT_MINUTES
    collect: collect.Config = field(default_factory=collect.Config)
    tokenize: tokenize.Config = field(default_factory=lambda: tokenize.Config(vocab_size=VOCABULARY))
    ladder: ladder.Config = field(default_factory=ladder.Config)


def recipe(minutes: float | None = None) -> Ladder:
    """The default five minutes, or `minutes`."""
    return Ladder(minutes=DEFAULT_MINUTES if minutes is None else minutes)


def climb(options: Namespace) -> None:
    """The verb: train what is not trained yet in `--out`, fit, and say what came out."""
    if options.start is not None:
        raise ConfigError("the models of a ladder begin from nothing; leave --from out")
    made: Any = load(
        "ladder",
        minutes=options.minutes,
        seed=options.seed or 0,
        corpus=tuple(options.corpus or ()),
        overrides=options.overrides,
    )
    make(made, options.out or OUT)


def make(made: Ladder, out: Path) -> None:
    """Continue the ladder in the folder `out`, or begin it."""
    console = Console(highlight=False)
    began = time.monotonic()
    with Run.open(out, made.name, to_dict(made), made.seed) as run:
        for name, stage in (("collect", collect.run), ("tokenize", tokenize.run)):
            if not run.stage(name).done:
                console.print(f"[bold]{name}[/bold]")
            stage(getattr(made, name), run)
        sizes = ", ".join(made.ladder.sizes)
        console.print(f"[bold]rungs[/bold]     as many of {sizes} as fit, each over {_lengths(made.ladder)}")
        result = ladder.run(_within(made, run, began), run)
        page = build(run.root)
    _tell(console, result, out / LADDER, page)


def _lengths(config: ladder.Config) -> str:
    return ", ".join(f"{k}" for k in config.multiples) + " parts of tokens"


def _within(made: Ladder, run: Run, began: float) -> ladder.Config:
    """The ladder's seconds: what collecting and tokenizing left of the minutes, decided once."""
    if made.ladder.seconds is None or made.minutes is None:
        return made.ladder
    asked = made.minutes * 60.0

    def left() -> dict[str, Any]:
        spent = max(time.monotonic() - began, sum(stage.seconds() for stage in run.stages()))
        if asked - spent < 10.0:
            raise ConfigError(f"--minutes {asked / 60:g}: the texts alone took {spent:.0f} s; give the ladder more")
        return {"seconds": round(asked - spent, 1)}

    return replace(made.ladder, seconds=run.inside(ladder.RUNGS).decide("budget", left)["seconds"])


def _tell(console: Console, result: dict[str, Any], path: Path, page: Path) -> None:
    law, epoch = result["law"], {name: getattr(EPOCH, name) for name in SYMBOLS}
    for name, symbol in SYMBOLS.items():
        low, high = result["intervals"][name]
        console.print(f"{symbol:6} {law[name]:12.4g}   95 % {low:.4g} to {high:.4g}   [dim]Epoch {epoch[name]:g}[/dim]")
    console.print(f"off by {result['rms_residual']:.2%} of the loss (root mean square of {len(result['rungs'])} rungs)")
    if result["doubt"]:
        console.print(f"[bold]not for extrapolating:[/bold] {result['doubt']}; the dial stays with Epoch's constants")
    else:
        console.print("the dial goes by this law where vocabulary and context are the same, and the run lies beside it")
    console.print(f"\nlaw       {path}\npicture   {page}")
