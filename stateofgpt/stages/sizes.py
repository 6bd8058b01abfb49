"""Pretraining in more than one size: beside the model that the dial chose, the next smaller ones, step for step.

Owns: which smaller shapes, how the time is divided, and what the samples begin with. All sizes read the same batches:
the number of steps is one, so the order of data is one, and their curves can be laid over each other. A smaller model
has a folder of its own in the stage's, as `pretrain/128x4`. With one size it is the pretrain stage and nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from stateofgpt.config import from_dict
from stateofgpt.errors import ConfigError
from stateofgpt.model.device import CPU
from stateofgpt.model.form import USUAL, Form
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.run import Run, Stage
from stateofgpt.stages import pretrain
from stateofgpt.stages.collect import documents_of
from stateofgpt.stages.decision import planned_device
from stateofgpt.train import dial, dial_gpu
from stateofgpt.train.dial import measure_step
from stateofgpt.train.ramp import seconds_per_batch

ALL_SHAPES = ((64, 1), *dial_gpu.SHAPES)
CLEARLY_SMALLER = 0.7  # of the parameters
LARGEST_SHARE = 0.6  # of the time, for the size the dial chooses; the steps are then what fits all sizes
FEWEST_STEPS = 20
SPARE = 0.06  # of the time, for a machine that has other work
LOOKS = 10.0  # looks at held-out text cost about this many steps of each size
SAMPLE_SECONDS = 1.0  # each time, of each size
PROMPT_CHARACTERS = 24


def run(config: pretrain.Config, run: Run) -> dict[str, Any]:
    """Train the smaller sizes, then the largest; returns the largest one's result."""
    beside = (config.sizes or 1) - 1
    if not beside:
        return pretrain.run(config, run)
    stage = run.stage("pretrain")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        if config.prompts is None:
            texts = stage.decide("prompts", lambda: {"texts": _beginnings(run)})["texts"]
            config = replace(config, prompts=tuple(texts))
        plan = stage.decide("plan", lambda: _plan(config, run))
        config = replace(config, rows=plan.get("rows", config.rows))  # all sizes read the same batches
        model = from_dict(GPTConfig, plan["model"])
        smaller = _smaller(model, beside, config.form())
        steps = stage.decide("steps", lambda: {"steps": _steps(config, plan, [*smaller, model], stage)})["steps"]
        for made in smaller:
            width, layers = made.hidden_size, made.num_hidden_layers
            of_this = replace(
                config, seconds=None, steps=steps, width=width, layers=layers, dtype=plan["dtype"], compiled=False,
                fused=plan["fused"], device=plan.get("device", CPU),
            )  # fmt: skip
            folder = run.inside(f"pretrain/{width}x{layers}")
            with folder.timed():
                if folder.result() is None:
                    pretrain.train(of_this, run, folder)
        return pretrain.train(config, run, stage)


def _plan(config: pretrain.Config, run: Run) -> dict[str, Any]:
    asked = replace(config, seconds=LARGEST_SHARE * config.seconds) if config.seconds is not None else config
    return pretrain.plan(asked, run)


def _smaller(model: GPTConfig, n: int, form: Form = USUAL) -> list[GPTConfig]:
    """The `n` shapes of the list next below the model in parameters, the smallest first; fewer where there are none."""
    vocab, context = model.vocab_size, model.max_position_embeddings
    shapes = [form.shape(width, layers, vocab, context) for width, layers in ALL_SHAPES if not form.misfit(width)]
    below = [made for made in shapes if _parameters(made) <= CLEARLY_SMALLER * _parameters(model)]
    return below[-n:]


def _parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).n_params()


def _steps(config: pretrain.Config, plan: dict[str, Any], models: list[GPTConfig], stage: Stage) -> int:
    """Whole batches so that all sizes, the largest compiled if the plan says so, fit what is left of the seconds."""
    if config.steps is not None:
        return config.steps
    assert config.seconds is not None
    rows, context, device = config.rows, config.context, planned_device(plan)

    def seconds(model: GPTConfig, rows: int) -> float:
        return measure_step(model, plan["dtype"], rows=rows, context=context, fused=plan["fused"], device=device)

    each = [seconds_per_batch(partial(seconds, model), rows, config.growing()) for model in models]
    looks = sum(each) * LOOKS * config.eval_tokens / 8192
    left = config.seconds * (1 - SPARE) - stage.seconds() - looks - SAMPLE_SECONDS * len(config.sample_at) * len(models)
    if plan["compiled"]:
        costs = dial if device == CPU else dial_gpu
        each[-1] /= costs.COMPILE_GAIN
        left -= costs.COMPILE_SECONDS
    return max(FEWEST_STEPS, int(left / sum(each)))


def _beginnings(run: Run) -> list[str]:
    """What samples begin with: nothing, and the first words of two held-out documents, or of one and of its middle."""
    collected = run.stage("collect").result()
    if collected is None:
        raise ConfigError(f"{run.root} has no collected texts yet; run `sog collect` first")
    texts = [text for s in collected["sources"] for text in documents_of(run, s["name"], "validation")]
    texts += [text[len(text) // 2 :].partition("\n")[2] for text in texts[:2]]
    starts = (text.lstrip()[: PROMPT_CHARACTERS + 1] for text in texts)
    whole = [start[: start.rfind(" ")] if " " in start.strip() else start[:PROMPT_CHARACTERS] for start in starts]
    return ["", *[start for start in dict.fromkeys(whole) if start.strip()][:2]]
