"""The state that training resumes from: tensors and numbers, saved so that `kill -9` costs no more than the last steps.

Owns the `step_N` folders (two are kept) and the choice of the newest one that verifies. Knows nothing of what the
tensors mean. Nothing is pickled.

    state = TrainState(stage.resume_dir)
    state.save(100, {"model.wte": w}, {"tokens": 51200})
    step, tensors, scalars = state.latest()
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stateofgpt.errors import CheckpointError
from stateofgpt.model import folder

TENSORS, SCALARS = "tensors.safetensors", "scalars.json"
KEEP = 2


class TrainState:
    """The resumable states in one folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def save(self, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Store the state after `step` steps, durable when this returns, and drop all but the newest two.

        `scalars` is anything JSON holds (floats come back bit for bit, NaN and infinities too).
        Raises RunError when the disk is full; the states stored before are untouched.
        """
        text = json.dumps(scalars)

        def fill(work: Path) -> None:
            folder.write_tensors(work / TENSORS, tensors)
            (work / SCALARS).write_text(text, encoding="utf-8")

        needed = folder.tensor_bytes(tensors) + len(text) + (1 << 16)
        folder.publish(self.path / f"step_{step}", fill, lambda _: {"step": step}, needed)
        for old in sorted(self._steps())[:-KEEP]:
            shutil.rmtree(self.path / f"step_{old}", ignore_errors=True)
        for left in (*self.path.glob("step_*.incomplete"), *self.path.glob("step_*.damaged")):
            shutil.rmtree(left, ignore_errors=True)

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest state that is whole, as (step, tensors, scalars), or None where there is none.

        A damaged one is set aside with a line on stderr, and the one before it is taken.
        """
        for left in self.path.glob("step_*.previous"):
            folder.recover(left.with_suffix(""))
        for step in sorted(self._steps(), reverse=True):
            at = self.path / f"step_{step}"
            try:
                return step, *_read(at)
            except CheckpointError as failure:
                print(f"warning: step {step} cannot be resumed from, trying the one before: {failure}", file=sys.stderr)
                shutil.rmtree(at.with_suffix(".damaged"), ignore_errors=True)
                at.rename(at.with_suffix(".damaged"))
        return None

    def clear(self) -> None:
        """Remove all states; a stage does this once its checkpoint is published."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _steps(self) -> list[int]:
        if not self.path.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d+)", p.name) for p in self.path.iterdir() if p.is_dir())
        return [int(name[1]) for name in names if name]


def _read(at: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if folder.verify(at) is None:
        raise CheckpointError(f"{at} has no {folder.MANIFEST}")
    tensors = dict(folder.each_tensor(at / TENSORS))
    # Verified against the manifest, so its size is ours: a rollout's state may pass the limit there is for configs.
    return tensors, folder.parse_object((at / SCALARS).read_bytes(), at / SCALARS)
