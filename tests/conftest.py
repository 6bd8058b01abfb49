"""What several test files share: one finished debug run, made through the command line when first asked for.

And what several processes share that run the tests together (`make test`, pytest-xdist): the cores, the files longest
first, and that run.
"""

from __future__ import annotations

import fcntl
import os
import random
import sys
from pathlib import Path

import pytest
from command import sog

from stateofgpt.train.threads import wait_briefly

WORKER = "PYTEST_XDIST_WORKER" in os.environ
MOST_WORKERS = 4  # with more the longest file is what all wait for
LONGEST = (  # files of 16 seconds and more; a file keeps to one worker, so that what it made once is made once
    "test_resume.py",
    "test_from_model.py",
    "test_end_to_end.py",
    "test_improve.py",
    "test_overoptimise.py",
    "test_algorithms.py",
    "test_ladder.py",
    "test_guide.py",
    "test_shakespeare.py",
    "test_device_stages.py",
    "test_watch.py",
    "test_bad_input.py",
    "test_pretrain.py",
    "test_kernels.py",
    "test_training_elsewhere.py",
    "test_lora.py",
    "test_guard.py",
    "test_bench_gpu.py",
    "test_group.py",
)

wait_briefly()  # as the command line does, before any test imports torch
if WORKER:  # a core for each; two threads of each of two workers on two cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many workers `--numprocesses auto` means: one a core that we may use; with one core none beside this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if cores > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that all workers end at about the same time."""
    if WORKER:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws from the generators that a whole process shares are a test's own, whichever tests came before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `sog run debug`, one for all workers. Look, do not touch: copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if WORKER else base) / "finished"
    folder.mkdir(exist_ok=True)
    run, finished = folder / "runs" / "debug", folder / "finished"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds it made
        if not finished.exists():
            made = sog("run", "debug", "--out", run)
            assert made.returncode == 0, made.stderr
            finished.touch()
    return run


def pytest_collection_finish(session: pytest.Session) -> None:
    """Torch asks once in a process, at its first gradient, which devices there are: the twin must be there before."""
    if any("twin" in getattr(item, "fixturenames", ()) for item in session.items):
        from twin_device import install

        install()
