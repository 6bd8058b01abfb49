"""Where the models of a stage are: on the device that the run's pretraining decided for, or that a command is told.

Owns reading that back from a run, and the one decision of a command that begins without a run's plan. How a run
computes there is `stages/way.py`'s, and what devices there are `model/device.py`'s.
"""

from __future__ import annotations

from stateofgpt.errors import ConfigError
from stateofgpt.model.device import CPU, choose_device
from stateofgpt.run import Run, Stage
from stateofgpt.stages.decision import planned_device


def device_of(run: Run) -> str:
    """The device of a run's models: the CPU where pretraining decided nothing else. RunError where this machine does
    not have it."""
    kept = run.config.get("way")
    return planned_device(run.stage("pretrain").decided("plan") if kept is None else kept)


def begin_on(stage: Stage, asked: str | None, begun: bool) -> str:
    """The device of a command that begins without a run's plan, decided once and kept in the stage: what is asked for,
    else a GPU where there is one. One that was `begun` before there was a choice stays on the CPU. ConfigError where
    another one is asked for now, or the machine does not have it."""
    made: str = stage.decide("device", lambda: {"device": CPU if begun else choose_device(asked)})["device"]
    if asked is not None and choose_device(asked) != made:
        raise ConfigError(f"{stage.dir.parent} began on {made}, and --device asks for {asked}; choose another --out")
    return choose_device(made)
