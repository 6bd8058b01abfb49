"""Ladder: small models of several sizes, each trained over several numbers of tokens, and the law that fits them.

Owns: which rungs there are, how long they may be, and `ladder.json`. A rung is a whole run of the pretrain stage with
its own schedule. Branching the falling part of the schedule off one long trunk per size would save little here: the
stage's rate falls over 60 % of the steps, so of 1 + 2 + 4 parts of work only the plateaus are shared, 17 %; and a rung
would not be what the stage does. All rungs read the same stream of every source from its beginning.

Each rung keeps its own folder and result, so a killed ladder goes on where it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stateofgpt.data.shards import Shards
from stateofgpt.errors import ConfigError
from stateofgpt.model.device import CPU
from stateofgpt.model.gpt import GPTConfig
from stateofgpt.run import Run, write_json
from stateofgpt.stages import pretrain
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.dial import can_fuse, choose_way, measure_step, shape
from stateofgpt.train.fit import FEWEST_VALUES, Fit, Point, fit_law
from stateofgpt.train.law_file import LADDER

RUNGS = "rungs"  # the folder of the stage
FEWEST_STEPS = 20  # of the shortest rung: its warm-up is 10
HELD_OUT_COST = 0.7  # of a training step of as many tokens: forward only, but in float32
SPARE = 0.08  # of the time, for starting, saving and a machine that has other work
MOST_EPOCHS = 4.0


@dataclass(frozen=True)
class Config:
    """`sizes` are width x layers, such as the dial chooses among. Each is trained for `steps` x each of `multiples`.
    With `seconds` every size has the same time, and as many steps as that gives; where the largest would have too few,
    it is left out, and so on down to three."""

    seconds: float | None = 240.0
    steps: int | None = None
    sizes: tuple[str, ...] = ("64x2", "128x2", "128x4", "192x5")
    multiples: tuple[int, ...] = (1, 2, 4)
    context: int = 256
    rows: int = 8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    eval_tokens: int = 2048
    resamples: int = 200

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ConfigError("a ladder needs either seconds or steps, and not both")
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) or int(size.split("x")[0]) % 64:
                raise ConfigError(f'"{size}" is no size of a ladder; write width x layers, as 128x4, widths by 64')
        if self.multiples and min(self.multiples) < 1:
            raise ConfigError(f"a length of {min(self.multiples)} parts is none; --ladder.multiples are from 1")
        if len(set(self.sizes)) < FEWEST_VALUES or len(set(self.multiples)) < FEWEST_VALUES:
            raise ConfigError(
                f"a ladder of {len(set(self.sizes))} sizes and {len(set(self.multiples))} lengths cannot be fitted; "
                f"give at least {FEWEST_VALUES} of each"
            )


@dataclass(frozen=True)
class Rung:
    """One run: a size and its number of steps."""

    size: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.steps}"


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train every rung that is not done, fit the law, write `ladder.json`; returns what that holds."""
    stage = run.inside(RUNGS)
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        tokenizer = Tokenizer.load(run.stage("tokenize").dir)
        vocab = -(-tokenizer.vocab_size // 64) * 64
        shards = Shards.open(run.stage("tokenize").dir)
        plan = stage.decide("plan", lambda: _plan(config, vocab, len(shards.sources)))
        steps = plan["steps"]
        if isinstance(steps, int):  # of a ladder that was begun when every size had the same
            steps = dict.fromkeys(plan["sizes"], steps)
        rungs = [Rung(size, steps[size] * k) for size in plan["sizes"] for k in config.multiples]
        results = {rung: _train(config, run, rung, plan) for rung in rungs}
        result = _result(config, run, vocab, results)
        write_json(run.root / LADDER, result)
        stage.finish(result)
    return result


def _shape(size: str, vocab: int, context: int) -> GPTConfig:
    width, layers = map(int, size.split("x"))
    return shape(width, layers, vocab, context)


def _plan(config: Config, vocab: int, n_sources: int) -> dict[str, Any]:
    """Precision, and the steps of each size's shortest rung so that all of them fit the time.

    Equal time, not equal tokens: what the law will be asked is which size is best after a time, and so each time is a
    row of sizes on both sides of the best one. With equal tokens the small sizes had next to none, and a large one's
    were those of the best size at ten times the budget.
    """
    if config.dtype == "auto":
        dtype, fused = choose_way(vocab, config.context)
    else:
        dtype, fused = config.dtype, can_fuse()
    way = {"dtype": dtype, "fused": fused}
    if config.steps is not None:
        steps = dict.fromkeys(config.sizes, config.steps)
        return {**way, "sizes": list(config.sizes), "steps": steps, "step_seconds": {}}
    assert config.seconds is not None
    seconds = {
        size: measure_step(
            _shape(size, vocab, config.context), dtype, rows=config.rows, context=config.context, fused=fused
        )
        for size in config.sizes
    }
    looks = HELD_OUT_COST * n_sources * config.eval_tokens / (config.rows * config.context) * len(config.multiples)
    sizes = sorted(config.sizes, key=lambda size: seconds[size])
    while True:
        each = config.seconds * (1 - SPARE) / len(sizes)
        steps = {size: int((each / seconds[size] - looks) / sum(config.multiples)) for size in sizes}
        if steps[sizes[-1]] >= FEWEST_STEPS or len(sizes) == FEWEST_VALUES:
            break
        sizes.pop()
    if steps[sizes[-1]] < FEWEST_STEPS:
        needed = len(sizes) * seconds[sizes[-1]] * (FEWEST_STEPS * sum(config.multiples) + looks) / (1 - SPARE)
        raise ConfigError(
            f"{config.seconds:.0f} seconds are too few for these {len(sizes)} sizes on this machine, which need "
            f"{math.ceil(needed)}; give more minutes, or smaller --ladder.sizes"
        )
    return {**way, "sizes": sizes, "steps": steps, "step_seconds": seconds}


def _train(config: Config, run: Run, rung: Rung, plan: dict[str, Any]) -> dict[str, Any]:
    stage = run.inside(f"{RUNGS}/{rung.name}")
    width, layers = map(int, rung.size.split("x"))
    made = pretrain.Config(
        steps=rung.steps,
        width=width,
        layers=layers,
        context=config.context,
        rows=config.rows,
        dtype=plan["dtype"],
        compiled=False,
        fused=plan["fused"],
        sample_at=(),
        eval_at=(1.0,),
        eval_tokens=config.eval_tokens,
        device=CPU,  # where the plan was measured
    )
    with stage.timed():
        return stage.result() or pretrain.train(made, run, stage)


def _result(config: Config, run: Run, vocab: int, results: dict[Rung, dict[str, Any]]) -> dict[str, Any]:
    tokenized = run.stage("tokenize").result() or {}
    # bits per byte -> nats per token: the unit of the laws; a factor for all, so it moves no optimum
    factor = math.log(2) * tokenized["bytes_per_token"]["all"]
    points = [Point(r["n_params"], r["tokens"], r["val_bpb"] * factor) for r in results.values()]
    fit = fit_law(points, resamples=config.resamples, seed=run.seed)
    rungs = [
        {
            "name": rung.name,
            "size": rung.size,
            **asdict(point),
            "val_bpb": result["val_bpb"],
            "fitted": fit.law.loss(point.n_params, point.tokens),
            "residual": residual,
            "epochs": max(result["realised"]["epochs"].values()),
        }
        for (rung, result), point, residual in zip(results.items(), points, fit.residuals, strict=True)
    ]
    return {
        "format": 1,
        "unit": "nats per token",
        "vocab_size": vocab,
        "context": config.context,
        "rows": config.rows,
        "tokenizer_sha256": tokenized["tokenizer_sha256"],
        "seed": run.seed,
        "law": asdict(fit.law),
        "intervals": {name: list(span) for name, span in fit.intervals.items()},
        "rms_residual": fit.rms,
        "doubt": _doubt(fit, rungs),
        "rungs": rungs,
    }


def _doubt(fit: Fit, rungs: Sequence[dict[str, Any]]) -> str:
    if fit.doubt:
        return fit.doubt
    most = max(rung["epochs"] for rung in rungs)
    if most > MOST_EPOCHS:
        return f"a source was read {most:.1f} times, and repeated text is worth less than the law takes it for"
    return ""
