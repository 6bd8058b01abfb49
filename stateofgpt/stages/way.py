"""The way a run trains, precision and kernels: decided in its pretraining, kept by every stage and round after it."""

from __future__ import annotations

from stateofgpt.config import from_dict
from stateofgpt.run import Run
from stateofgpt.train.loss import Way


def way_of(run: Run) -> Way:
    """What pretraining decided; a round of feedback has none of its own and carries it in its configuration."""
    if (kept := run.config.get("way")) is not None:
        return from_dict(Way, kept)
    plan = run.stage("pretrain").decide("plan", dict)
    return Way(plan["dtype"], plan["fused"])
