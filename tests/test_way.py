"""Which way a run takes, and that one which began before a way was there does not change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stateofgpt.infer.forward import load
from stateofgpt.run import Run
from stateofgpt.stages.way import as_config, decide_engine, is_native, way_of

PLAN = {"dtype": "float32", "fused": True}


def opened(root: Path, **config: Any) -> Run:
    return Run.open(root, "debug", config, 0)


def test_a_run_that_began_before_the_native_path_goes_on_without_it(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.stage("pretrain").decide("plan", lambda: PLAN)
        before = (run.stage("pretrain").dir / "decisions.json").read_bytes()
        assert not is_native(run) and not way_of(run).native
        assert (run.stage("pretrain").dir / "decisions.json").read_bytes() == before
        assert as_config(way_of(run)) == PLAN  # a round that carries its way is still the same round


def test_a_new_run_decides_once_and_its_rounds_carry_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "run") as run:
        run.stage("pretrain").decide("plan", lambda: PLAN)
        decide_engine(run)
        assert is_native(run) == (load() is not None)
        monkeypatch.setattr("stateofgpt.stages.way.load", lambda: None)
        decide_engine(run)
        assert way_of(run).native == (load() is not None)
        carried = as_config(way_of(run))
    with opened(tmp_path / "round", way=carried) as after:
        assert is_native(after) == way_of(after).native == carried.get("native", False)
