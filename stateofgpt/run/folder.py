"""The run folder: made once for one configuration, continued by the same, refused to any other.

Owns: `run.json`, the lock and the paths at the top of a run. Knows nothing of what a stage keeps in its own folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from stateofgpt.config import suggestion
from stateofgpt.errors import RunError, StateOfGptError
from stateofgpt.run.files import make_folder, plain, read_json, write_json
from stateofgpt.run.lock import Lock
from stateofgpt.run.stage import STAGES, Stage

BEGINNINGS = (".lock", "run.json", "decisions.json", "seconds.json")  # what a run has that has not done anything yet


@dataclass
class Run:
    """A run folder, opened with `Run.open` (to work in it) or `Run.read` (to look at it)."""

    root: Path
    recipe: str
    seed: int
    config: dict[str, Any] = field(default_factory=dict)
    _lock: Lock | None = field(default=None, repr=False)
    _stages: dict[str, Stage] = field(default_factory=dict, repr=False)
    _new: bool = field(default=False, repr=False)  # begun by this opening
    _made: bool = field(default=False, repr=False)  # and so was its folder

    @classmethod
    def open(
        cls, root: Path | str, recipe: str, config: Mapping[str, Any], seed: int, *, ignore_keys: tuple[str, ...] = ()
    ) -> Run:
        """Make the run, or continue it; `config` is plain JSON (`config.to_dict`).

        Raises RunError when the folder holds a run of another recipe, seed or configuration (dotted `ignore_keys`, and
        what is under them, may differ), something that is no run, or when another process works in it.
        """
        root = Path(root)
        made = not root.exists()
        make_folder(root)
        asked = json.loads(json.dumps(plain({"recipe": recipe, "seed": seed, "config": dict(config)})))
        path = root / "run.json"
        names = os.listdir(root)
        if path.name not in names and any(not name.startswith(".") for name in names):
            raise RunError(f"{root} holds files but no run; choose another --out, or an empty folder")
        lock = Lock(root / ".lock")
        try:
            for leftover in root.rglob(".*.tmp"):  # of killed processes: we hold the lock
                leftover.unlink(missing_ok=True)
            new = not path.exists()
            if new:
                write_json(path, asked)
            else:
                _refuse_another(root, _read_run(path), asked, ignore_keys)
            return cls(root, recipe, seed, _read_run(path)["config"], lock, _new=new, _made=made)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def read(cls, root: Path | str) -> Run:
        """Look at a run without locking it, even while it is at work; RunError when `root` is no run."""
        root = Path(root)
        path = root / "run.json"
        if not path.is_file():
            why = "there is no run.json in it" if root.is_dir() else "there is no such folder"
            raise RunError(f"{root} is no run: {why}")
        data = _read_run(path)
        return cls(root, data["recipe"], data["seed"], data["config"])

    def close(self) -> None:
        """Let others in. The folder stays as it is."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """A new run that ends by a mistake of the user's before anything was done leaves no folder: the mended command
        would be another configuration, and would be refused."""
        if self._new and isinstance(error, StateOfGptError):
            self._forget()
        self.close()

    def _forget(self) -> None:
        paths = sorted(self.root.rglob("*"), reverse=True)  # what is in a folder before the folder
        if any(path.is_symlink() or not (path.is_dir() or path.name in BEGINNINGS) for path in paths):
            return
        with suppress(OSError):
            for path in (*paths, *([self.root] if self._made else [])):
                path.rmdir() if path.is_dir() else path.unlink()

    def stage(self, name: str) -> Stage:
        """The stage's folder; the same object every time."""
        if name not in STAGES:
            raise RunError(
                f'there is no stage "{name}"{suggestion(name, STAGES) or "; there are " + ", ".join(STAGES)}'
            )
        if name not in self._stages:
            self._stages[name] = Stage(name, self.root / name, writable=self._lock is not None)
        return self._stages[name]

    def inside(self, path: str) -> Stage:
        """A folder of a stage's kind for work within a stage, as `pretrain/64x2`: no stage of the pipeline itself."""
        if path not in self._stages:
            self._stages[path] = Stage(Path(path).name, self.root / path, writable=self._lock is not None)
        return self._stages[path]

    def stages(self) -> list[Stage]:
        """The stages that have been begun, in pipeline order."""
        begun = [name for name in STAGES if (self.root / name).is_dir() and any((self.root / name).iterdir())]
        return [self.stage(name) for name in begun]

    @property
    def summary_path(self) -> Path:
        return self.root / "summary.json"

    @property
    def report_path(self) -> Path:
        return self.root / "report.html"

    @property
    def feedback_path(self) -> Path:
        return self.root / "feedback.sqlite"


def _read_run(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict) or not {"recipe", "seed", "config"} <= data.keys():
        raise RunError(f"{path} is damaged: recipe, seed or config is missing; choose another --out")
    return data


def _refuse_another(root: Path, there: dict[str, Any], asked: dict[str, Any], ignore_keys: tuple[str, ...]) -> None:
    old, new = _flat(there), _flat(asked)
    ignored = tuple("config." + key for key in ignore_keys)
    different = [
        f"{key.removeprefix('config.')} is {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and not any(key == skip or key.startswith(skip + ".") for skip in ignored)
    ]
    if different:
        more = f", and {len(different) - 4} more" if len(different) > 4 else ""
        raise RunError(
            f"{root} holds a run of another configuration: {'; '.join(different[:4])}{more}; "
            "choose another --out, or delete that folder"
        )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    inner = {f"{prefix}.{key}" if prefix else str(key): item for key, item in value.items()}
    return {key: leaf for name, item in inner.items() for key, leaf in _flat(item, name).items()}
