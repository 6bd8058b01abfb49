"""The way a run trains and draws, precision and kernels: decided in its pretraining, kept by every stage and round
after it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from stateofgpt.config import from_dict
from stateofgpt.infer.forward import load
from stateofgpt.model.device import CPU
from stateofgpt.run import Run
from stateofgpt.stages.decision import planned_device
from stateofgpt.train.loss import Way


def way_of(run: Run) -> Way:
    """What pretraining decided; a round of feedback has none of its own and carries it in its configuration.

    Raises RunError where this machine has no such device.
    """
    if (kept := run.config.get("way")) is not None:
        planned_device(kept)
        return from_dict(Way, kept)
    plan = run.stage("pretrain").decide("plan", dict)
    return Way(plan["dtype"], plan["fused"], is_native(run), planned_device(plan))


def is_native(run: Run) -> bool:
    """Whether this run draws its tokens on the native path. One that was past its pretraining before there was such a
    path goes on without it: it has the same bits when it is resumed."""
    if (kept := run.config.get("way")) is not None:
        return bool(kept.get("native", False))
    return bool(run.stage("pretrain").decided("engine").get("native", False))


def as_config(way: Way) -> dict[str, Any]:
    """A way as a round of feedback carries it: rounds that began before there was a native path, or another device than
    the CPU, have no word of them."""
    usual = {"native": False, "device": CPU}
    return {name: value for name, value in asdict(way).items() if name not in usual or value != usual[name]}


def decide_engine(run: Run) -> None:
    """Let this run draw its tokens on the native path, where the machine can; once, in its pretraining."""
    run.stage("pretrain").decide("engine", lambda: {"native": load() is not None})
