"""`sog run overoptimise`: how far a reward can be climbed before the truth falls. A run of its own kind.

Owns where the model to begin with comes from (a finished run's, or small ones made here first), and what is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from stateofgpt.config import to_dict
from stateofgpt.errors import ConfigError
from stateofgpt.recipes import laptop, pipeline
from stateofgpt.report.overoptimise import build
from stateofgpt.run import Run
from stateofgpt.stages import overoptimise
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer

DEFAULT_MINUTES = 20.0
FEWEST_MINUTES = 2.0
MODELS = "models"  # the folder of the run that makes a model where none is given
MODELS_SHARE = 0.4  # of the minutes
FIRST_STAGES = ("collect", "tokenize", "pretrain", "sft")


@dataclass(frozen=True)
class Overoptimise:
    """`parent` is the checkpoint folder to begin with; None makes one, as the laptop recipe does, in the first part of
    the minutes."""

    name: str = "overoptimise"
    seed: int = 0
    minutes: float | None = DEFAULT_MINUTES
    parent: str | None = None
    overoptimise: overoptimise.Config = field(default_factory=overoptimise.Config)


def recipe(minutes: float | None = None) -> Overoptimise:
    """The default twenty minutes, or `minutes`."""
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if minutes < FEWEST_MINUTES:
        raise ConfigError(f"--minutes {minutes:g}: the overoptimise recipe needs at least {FEWEST_MINUTES:g}")
    return Overoptimise(minutes=minutes)


def begin_from(made: Overoptimise, model: Path) -> Overoptimise:
    """`made`, beginning with the assistant in a folder."""
    ChatFormat(Tokenizer.load(model))  # refuses a model without a chat template before anything is made
    return replace(made, parent=str(model.resolve()))


def execute(made: Overoptimise, out: Path, only: str | None = None) -> None:
    """Begin or continue the experiment in the folder `out`."""
    if only is not None:
        raise ConfigError(f"{out} holds an experiment and no stages; `sog run overoptimise --out {out}` continues it")
    console = Console(highlight=False)
    with Run.open(out, made.name, to_dict(made), made.seed) as run:
        config, start = made.overoptimise, made.parent
        seconds = config.seconds if made.minutes is None else made.minutes * 60.0
        if start is None:
            _make_models(made, out / MODELS)
            start = str(out / MODELS / "sft" / "checkpoint")
            seconds = None if seconds is None else seconds * (1 - MODELS_SHARE)
        if config.seconds is not None:
            config = replace(config, seconds=seconds)
        console.print(f"[bold]experiment[/bold] with {start}, reward models of {_shares(config)} of the labels")
        result = overoptimise.run(config, run, Path(start))
        page = build(run.root)
    _tell(console, result, out / overoptimise.RESULT, page)


def _make_models(made: Overoptimise, out: Path) -> None:
    minutes = max(laptop.FEWEST_MINUTES, (made.minutes or DEFAULT_MINUTES) * MODELS_SHARE)
    small = replace(laptop.recipe(minutes), seed=made.seed, stages=FIRST_STAGES)
    pipeline.execute(small, out)


def _shares(config: overoptimise.Config) -> str:
    return ", ".join(f"{share:.4g}" if share < 0.001 else f"{100 * share:g} %" for share in config.shares)


def _tell(console: Console, result: dict[str, Any], path: Path, page: Path) -> None:
    for proxy in result["proxies"]:
        accuracy = f"{proxy['accuracy']:.1%} of pairs ordered as the truth"
        console.print(f"[bold]{proxy['rankings']} rankings[/bold], {accuracy}")
        for form, words in (("best_of_n", "best-of-n"), ("rl", "PPO")):
            points = proxy[form]
            best, last = max(points, key=lambda point: point["true"]), points[-1]
            console.print(
                f"  {words:9} true reward at most {best['true']:+.2f} at {best['kl']:.1f} nats, {last['true']:+.2f} at "
                f"{last['kl']:.1f}{_peak(proxy['fits'][form])}"
            )
        if proxy["guard"]["stopped_at"] is not None:
            console.print(f"  the guards would have stopped it at iteration {proxy['guard']['stopped_at']}")
    console.print(f"\nnumbers   {path}\npicture   {page}")


def _peak(fit: dict[str, Any] | None) -> str:
    if fit is None:
        return ""
    if fit["peak"] is None:
        return "; its fit does not turn"
    return f"; its fit turns at {fit['peak'][0] ** 2:.1f} nats"
