"""The state that training resumes from: tensors and numbers, saved so that `kill -9` costs no more than the last steps.

Owns the `step_N` folders (two are kept), the choice of the newest one that verifies, the random states of libraries,
and laying out nested state (an optimizer's `state_dict()`) as named tensors and JSON. Knows nothing of what the
tensors mean. Nothing is pickled.

    state = TrainState(stage.resume_dir)
    state.save(100, {"model.wte": w}, {"tokens": 51200})
    step, tensors, scalars = state.latest()
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


# --------------------------------------------------------------------------------------------------------- nested state


def flatten(tree: Any, prefix: str = "state") -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and tuples into named tensors and a JSON skeleton; `unflatten` is the inverse.

    Made for `optimizer.state_dict()`, whose integer keys and tuples JSON alone would lose.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node
            return {"tensor": name}
        if isinstance(node, Mapping):
            return {"dict": [[key, walk(value, f"{name}.{key}")] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return {type(node).__name__: [walk(value, f"{name}.{i}") for i, value in enumerate(node)]}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"{name} is a {type(node).__name__}, which is neither a tensor nor JSON")

    skeleton = walk(tree, prefix)
    return tensors, skeleton


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild what `flatten` split."""
    if not isinstance(skeleton, Mapping):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unflatten(node, tensors) for key, node in value}
    nodes = [unflatten(node, tensors) for node in value]
    return tuple(nodes) if kind == "tuple" else nodes


# -------------------------------------------------------------------------------------------------------- random states


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the global generators of torch (CPU), Python and NumPy, as (tensors, scalars) to be saved."""
    version, words, gauss = random.getstate()
    name, keys, at, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "rng.torch": torch.get_rng_state(),
        "rng.python": torch.tensor(words, dtype=torch.int64),
        "rng.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    return tensors, {"python": [version, gauss], "numpy": [str(name), int(at), int(has_gauss), float(cached)]}


def restore_rng(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Put the generators back to what `rng_state` returned."""
    torch.set_rng_state(tensors["rng.torch"])
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["rng.python"].tolist()), gauss))
    name, at, has_gauss, cached = scalars["numpy"]
    np.random.set_state((name, tensors["rng.numpy"].numpy().astype(np.uint32), at, has_gauss, cached))
