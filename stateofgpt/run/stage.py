"""One stage's folder: its metrics, samples, decisions, clock and result.

Owns: the files of a stage and their formats. Knows nothing of what the stage computes, nor of other stages.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stateofgpt.errors import RunError
from stateofgpt.run.files import append_line, make_folder, read_json, read_lines, write_atomic, write_json

STAGES = ("collect", "tokenize", "pretrain", "sft", "reward", "rl", "eval", "arena")
SECONDS_SAVED_EVERY = 2.0  # a kill loses at most this much of the stage's clock; each save costs an fsync


class Stage:
    """One stage's folder. Made by `Run.stage`."""

    def __init__(self, name: str, folder: Path, *, writable: bool) -> None:
        self.name = name
        self.dir = folder
        self.checkpoint = folder / "checkpoint"
        self.resume_dir = folder / "resume"
        self._writable = writable
        self._started: float | None = None  # monotonic start of this attempt's unsaved seconds
        self._saved: float | None = None  # what seconds.json holds
        if writable:
            make_folder(folder)

    def log(self, step: int, **metrics: float) -> None:
        """Append one line of metrics; `time` is the stage's seconds so far. NaN and infinity are kept as null."""
        self._check_writable()
        numbers = {key: value if isinstance(value, int) else float(value) for key, value in metrics.items()}
        append_line(self.dir / "metrics.jsonl", {"step": step, "time": round(self.seconds(), 3), **numbers})
        if self._started is not None and time.monotonic() - self._started >= SECONDS_SAVED_EVERY:
            self._save_seconds()

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines, oldest first; a null comes back as NaN."""
        lines = read_lines(self.dir / "metrics.jsonl")
        return [{key: math.nan if value is None else value for key, value in line.items()} for line in lines]

    def sample(self, step: int, **fields: object) -> None:
        """Keep what a model said at a step: any JSON fields."""
        self._check_writable()
        append_line(self.dir / "samples.jsonl", {"step": step, **fields})

    def samples(self) -> list[dict[str, Any]]:
        """The kept samples, oldest first."""
        return read_lines(self.dir / "samples.jsonl")

    def truncate_metrics(self, step: int) -> None:
        """Forget metrics and samples of steps after `step`: a resumed stage makes them again.

        -1 forgets all: a stage that was killed before its first saved state begins anew.
        """
        self._check_writable()
        for path in (self.dir / "metrics.jsonl", self.dir / "samples.jsonl"):
            records = read_lines(path)
            kept = [
                json.dumps(record, ensure_ascii=False) + "\n" for record in records if record.get("step", 0) <= step
            ]
            if path.exists() and len(kept) != len(path.read_bytes().splitlines()):
                write_atomic(path, "".join(kept))

    def decide(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make()` measured the first time it was asked, in this run, for ever: resumed runs read it back."""
        path = self.dir / "decisions.json"
        decisions: dict[str, Any] = read_json(path) if path.exists() else {}
        if name not in decisions:
            self._check_writable()
            made = make()
            decisions = {**(read_json(path) if path.exists() else {}), name: made}  # make() may decide things too
            write_json(path, decisions)
            decisions = read_json(path)  # the first run and a resumed one see the same types
        decision: dict[str, Any] = decisions[name]
        return decision

    def decided(self, name: str) -> dict[str, Any]:
        """What was decided under this name; empty where nothing was, and nothing is from now on because of it."""
        path = self.dir / "decisions.json"
        found: dict[str, Any] = (read_json(path) if path.exists() else {}).get(name, {})
        return found

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, the last thing a stage does."""
        self._check_writable()
        self._save_seconds()
        write_json(self.dir / "result.json", result)

    def result(self) -> dict[str, Any] | None:
        """What the finished stage returned, or None when it is not done."""
        path = self.dir / "result.json"
        return read_json(path) if path.exists() else None

    @property
    def done(self) -> bool:
        return (self.dir / "result.json").exists()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time inside towards `seconds()`. May be nested; only the outermost counts."""
        self._check_writable()
        if self._started is not None:
            yield
            return
        self._started = time.monotonic()
        try:
            yield
        finally:
            self._save_seconds()
            self._started = None

    def seconds(self) -> float:
        """Wall seconds spent in this stage over all attempts."""
        if self._saved is None:
            path = self.dir / "seconds.json"
            self._saved = float(read_json(path)["seconds"]) if path.exists() else 0.0
        return self._saved + (time.monotonic() - self._started if self._started is not None else 0.0)

    def _save_seconds(self) -> None:
        if self._started is not None:
            total, now = self.seconds(), time.monotonic()
            write_json(self.dir / "seconds.json", {"seconds": round(total, 3)})
            self._saved, self._started = total, now

    def _check_writable(self) -> None:
        if not self._writable:
            raise RunError(f"{self.dir} was opened for reading only; open the run to write to it")
