"""Two programs in turn, start-up included, as whole processes; and how their ratios are told.

Owns: running one side, interleaved pairs, medians, and the machine a result belongs to. Knows nothing of what is run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent


def run(script: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Run `script` of this folder on a task in a process of its own; its result, with `wall` seconds of the process.

    Every run compiles what it compiles anew: caches of compilers are in a folder that did not exist before.
    """
    with tempfile.TemporaryDirectory() as work:
        asked, told = Path(work) / "task.json", Path(work) / "result.json"
        asked.write_text(json.dumps(task))
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor", "XDG_CACHE_HOME": f"{work}/cache"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(HERE / script), str(asked), str(told)], env=environment, capture_output=True, text=True
        )
        wall = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(told.read_text())
    return {**result, "wall": wall}


def compared(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """A pair of runs to a loss, as a row of results."""
    return {
        "peer_seconds": theirs["wall"],
        "seconds": mine["wall"],
        "ratio": theirs["wall"] / mine["wall"],
        "peer_loss": theirs["val_loss"],
        "loss": mine["val_loss"],
        "peer_tokens": theirs["tokens"],
        "tokens": mine["tokens"],
        "peer_parameters": theirs["n_params"],
        "parameters": mine["n_params"],
        "as_good": mine["val_loss"] <= theirs["val_loss"],
    }


def told(row: Mapping[str, Any]) -> str:
    """How a pair went."""
    return f"{row['ratio']:.2f} times as fast{'' if row['as_good'] else ', BUT NOT AS GOOD'}"


def summed_up(rows: Sequence[Mapping[str, Any]]) -> str:
    """How all pairs went."""
    good = sum(row["as_good"] for row in rows)
    return f"ratio {spread([row['ratio'] for row in rows])}, as good in {good} of {len(rows)}"


def machine() -> dict[str, Any]:
    """Where a result was measured, and when."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def spread(values: list[float]) -> str:
    """`median (least to most)`."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
