"""What several test files share: one finished debug run, made through the command line when first asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import sog

from stateofgpt.train.threads import wait_briefly

wait_briefly()  # as the command line does, before any test imports torch


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `sog run debug`. Look, do not touch: copy it to change it."""
    run = tmp_path_factory.mktemp("finished") / "runs" / "debug"
    made = sog("run", "debug", "--out", run)
    assert made.returncode == 0, made.stderr
    return run


def pytest_collection_finish(session: pytest.Session) -> None:
    """Torch asks once in a process, at its first gradient, which devices there are: the twin must be there before."""
    if any("twin" in getattr(item, "fixturenames", ()) for item in session.items):
        from twin_device import install

        install()
