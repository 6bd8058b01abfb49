"""The command line as users meet it: `sog` in a process of its own, and what it left in its run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TRAINED = ("pretrain", "sft", "reward", "rl")
# One thread: these models are tiny, and two threads beside other work wait for each other (69 s in place of 3).
ENVIRONMENT = {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
CLOCKS = {"time", "seconds", "tokens_per_second", "rates"}  # what may differ between two runs of the same


def start(*words: object, cwd: Path | None = None, code: str = "", **environment: str) -> subprocess.Popen[str]:
    """`sog` with these words, begun; or a program of ours (`code`) with them."""
    return subprocess.Popen(
        [sys.executable, *(("-c", code) if code else ("-m", "stateofgpt")), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def sog(
    *words: object, cwd: Path | None = None, code: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`sog` with these words, finished."""
    process = start(*words, cwd=cwd, code=code, **environment)
    out, err = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def weights(run: Path, stage: str) -> bytes:
    """The weights of a stage's checkpoint."""
    return (run / stage / "checkpoint" / "model.safetensors").read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, the lock left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def result(run: Path, stage: str) -> Any:
    """What a stage found, without what a clock said."""
    return without_clocks(json.loads((run / stage / "result.json").read_bytes()))


def records(path: Path) -> list[Any]:
    """The lines of a JSONL file, without what a clock said; none where there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [without_clocks(json.loads(line)) for line in lines]


def without_clocks(value: Any) -> Any:
    """A JSON value without the keys in `CLOCKS`."""
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def one_sentence(err: str) -> str:
    """What an error on stderr says, after checking that it is one line and no traceback."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0].removeprefix("error: ")
