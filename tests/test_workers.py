"""Several processes run the tests together: how many, in which order, and what is made once for all of them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import conftest
import numpy as np
import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 2), (3, 3), (64, conftest.MOST_WORKERS)])
def test_there_is_a_worker_for_each_core_and_none_where_there_is_one(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert conftest.pytest_xdist_auto_num_workers() == workers


def test_the_files_that_come_first_exist() -> None:
    assert [name for name in conftest.LONGEST if not (HERE / name).is_file()] == []
    assert len(set(conftest.LONGEST)) == len(conftest.LONGEST)


@pytest.mark.parametrize("again", [False, True])
def test_what_a_test_draws_does_not_depend_on_the_tests_before_it(again: bool) -> None:
    drawn = [float(torch.rand(())), random.random(), float(np.random.rand())]
    assert FOUND.setdefault("drawn", drawn) == drawn


FOUND: dict[str, list[float]] = {}
COMMAND = """
import os, subprocess, time
def sog(*words):
    with open(os.environ["TOLD"], "a") as told:
        told.write("made\\n")
    time.sleep(0.5)  # long enough for the other worker to ask for it too
    words[-1].mkdir(parents=True)
    return subprocess.CompletedProcess(words, 0, "", "")
"""
TEST = """
import os
def test_it(debug_run):
    assert debug_run.is_dir()
    with open(os.environ["TOLD"], "a") as told:
        told.write(os.environ["PYTEST_XDIST_WORKER"] + " " + os.environ["OMP_NUM_THREADS"] + "\\n")
"""


@pytest.mark.slow
def test_two_workers_share_one_run_and_take_one_thread_each(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "command.py").write_text(COMMAND)
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(TEST)
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "TOLD": str(tmp_path / "told"), "PYTEST_ADDOPTS": ""}
    for inherited in [name for name in environment if name.startswith("PYTEST_XDIST") or name == "OMP_NUM_THREADS"]:
        del environment[inherited]
    words = ["-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "temporary")]
    command = [sys.executable, "-m", "pytest", "-q", *words, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *rest = (tmp_path / "told").read_text().splitlines()
    assert first == "made" and sorted(rest) == ["gw0 1", "gw1 1"]


def test_the_longest_files_come_first_and_the_others_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Item:
        def __init__(self, name: str) -> None:
            self.path = HERE / name

    names = ["test_a.py", "test_from_model.py", "test_b.py", "test_resume.py", "test_a.py"]
    items = cast(list[pytest.Item], [Item(name) for name in names])
    monkeypatch.setattr(conftest, "WORKER", False)
    conftest.pytest_collection_modifyitems(items)
    assert [item.path.name for item in items] == names
    monkeypatch.setattr(conftest, "WORKER", True)
    conftest.pytest_collection_modifyitems(items)
    assert [item.path.name for item in items] == [
        "test_resume.py",
        "test_from_model.py",
        "test_a.py",
        "test_b.py",
        "test_a.py",
    ]
