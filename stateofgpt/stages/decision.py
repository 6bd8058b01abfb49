"""What pretraining decides before it begins: device, precision, way, shape, and on a GPU the rows of a step.

Owns the plan, a plain dict that is kept in the run, and reading a device back from it. The trials are the dial's
(`train.dial`, `train.dial_gpu`). A plan says nothing of a device that is the CPU, nor of rows that are the
configuration's: plans from before there were others are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stateofgpt.errors import ConfigError, RunError
from stateofgpt.model.device import CPU, choose_device
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train import dial_gpu, fused
from stateofgpt.train.dial import COMPILE_SECONDS, can_compile, can_fuse, choose, fastest_dtype
from stateofgpt.train.law_file import LADDER, choose_law
from stateofgpt.train.loss import Dtype

if TYPE_CHECKING:
    from stateofgpt.stages.pretrain import Config


def planned_device(plan: Mapping[str, Any]) -> str:
    """Where a run computes, as its pretraining decided. RunError where this machine has no such device."""
    device: str = plan.get("device", CPU)
    try:
        return choose_device(device)
    except ConfigError as failure:
        raise RunError(
            f"this run computes on {device}, as its pretraining decided, and this machine has no such device; go on "
            "with it where there is one, or begin another run with --out"
        ) from failure


def plan_new(c: Config, vocab_size: int, root: Path) -> dict[str, Any]:
    """For a model from nothing, of the run in the folder `root`."""
    vocab, device = -(-vocab_size // 64) * 64, _device(c)
    if c.width is not None and c.layers is not None:
        config = c.form().shape(c.width, c.layers, vocab, c.context)
        return {"model": asdict(config), **_way_of_known(c, config, c.context, device)}
    if c.seconds is None:
        raise ConfigError("pretrain without seconds needs both width and layers")
    law, told = choose_law(c.law, root.parent / "ladder" / LADDER, vocab, c.context)
    asked: dict[str, Any] = {"rows": c.rows, "law": law, "form": c.form(), "fewest_layers": c.fewest_layers or 1}
    if device == CPU:
        choice, there = choose(vocab, c.context, c.seconds, **asked), {}
    else:
        choice, filled = dial_gpu.choose(device, vocab, c.context, c.seconds, **asked)
        there = {"device": device, **_rows(filled)}
    return {
        "model": asdict(choice.config),
        "dtype": choice.dtype if c.dtype == "auto" else c.dtype,
        "compiled": choice.compiled if c.compiled is None else c.compiled,
        "fused": device == CPU and ((choice.fused and not c.compiled) if c.fused is None else c.fused),
        "rates": choice.rates,
        "law": told,
        **there,
    }


def plan_for(c: Config, model: GPT) -> dict[str, Any]:
    """For a model that is there: precision and compilation, and how much of its context a row uses."""
    shape_of, device = model.config, _device(c)
    context = min(c.context, shape_of.max_position_embeddings)
    if device != CPU:
        return {"model": asdict(shape_of), **_way_of_known(c, shape_of, context, device), "context": context}
    fits = fused.fits(model, torch.zeros(c.rows, context, dtype=torch.int64))
    dtype: Dtype = "float32" if c.dtype == "auto" else c.dtype
    if c.dtype == "auto" and c.seconds is not None:
        dtype = fastest_dtype(shape_of.vocab_size, context, fused=fits and can_fuse())
    compiled = c.compiled
    if compiled is None:
        compiled = c.seconds is not None and not fits and can_compile() and c.seconds > 3 * COMPILE_SECONDS
    return {
        "model": asdict(shape_of),
        "dtype": dtype,
        "compiled": compiled,
        "fused": (can_fuse() and not compiled) if c.fused is None else c.fused,
        "rates": {},
        "context": context,
    }


def _device(c: Config) -> str:
    device = choose_device(c.device)
    if c.fused and device != CPU:
        raise ConfigError(f"--pretrain.fused true is the CPU's, and this run trains on {device}; leave one of them out")
    return device


def _way_of_known(c: Config, config: GPTConfig, context: int, device: str) -> dict[str, Any]:
    """Everything but the shape. On a GPU, with seconds to fill, by trials; with steps as it is configured."""
    dtype: Dtype = "float32" if c.dtype == "auto" else c.dtype
    if device == CPU:
        fused_too = (can_fuse() and not c.compiled) if c.fused is None else c.fused
        return {"dtype": dtype, "compiled": bool(c.compiled), "fused": fused_too, "rates": {}}
    compiled, there = bool(c.compiled), {}
    if c.seconds is not None:
        if c.dtype == "auto":
            dtype = dial_gpu.fastest_dtype(config.vocab_size, context, device, c.rows)
        if c.compiled is None:
            compiled = dial_gpu.can_compile() and c.seconds > 3 * dial_gpu.COMPILE_SECONDS
        within = dial_gpu.TRIALS * c.seconds
        there = _rows(dial_gpu.fill_shape(config, dtype, context, c.rows, device, run_seconds=c.seconds, within=within))
    return {"dtype": dtype, "compiled": compiled, "fused": False, "rates": {}, "device": device, **there}


def _rows(filled: dial_gpu.Filled | None) -> dict[str, Any]:
    if filled is None:
        raise ConfigError("a step of a single row does not fit into the device's memory; take a smaller model")
    return {"rows": filled.rows, "rates_by_rows": filled.rates}
