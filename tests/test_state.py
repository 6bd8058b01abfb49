"""The resumable state: bit for bit, durable, and the one before when the newest is damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stateofgpt.errors import RunError
from stateofgpt.train.state import TrainState

SAVER = """
import sys, torch
from stateofgpt.train.state import TrainState
TrainState(sys.argv[1]).save(int(sys.argv[2]), {"w": torch.full((1000,), float(sys.argv[2]))}, {})
"""


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((5, 3), value), "count": torch.tensor(7), "half": torch.ones(4, dtype=torch.bfloat16)}


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = TrainState(tmp_path / "resume")
    assert state.latest() is None
    odd = torch.tensor([float("nan"), float("-inf"), 1e-45, -0.0])
    given = {**tensors(0.1), "odd": odd, "turned": torch.arange(6).view(2, 3).t(), "empty": torch.empty(0, 3)}
    scalars = {"lr": 0.1 + 0.2, "best": float("inf"), "seen": [1, 2], "name": "é", "big": 2**60}
    state.save(3, given, scalars)
    found = state.latest()
    assert found is not None
    step, loaded, read = found
    assert step == 3 and read == scalars and loaded.keys() == given.keys()
    for name, tensor in given.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert raw_bytes(loaded[name]).equal(raw_bytes(tensor))


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    w = torch.arange(6.0)
    TrainState(tmp_path).save(1, {"a": w, "b": w, "c": w[2:], "d": w.view(2, 3)}, {})
    found = TrainState(tmp_path).latest()
    assert found is not None
    assert found[1]["b"].equal(w) and found[1]["c"].equal(w[2:]) and found[1]["d"].equal(w.view(2, 3))


def test_the_newest_two_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    state = TrainState(tmp_path)
    for step in (8, 9, 10, 100):
        state.save(step, tensors(step), {})
    assert folders(tmp_path) == ["step_10", "step_100"]
    found = state.latest()
    assert found is not None and found[0] == 100
    state.clear()
    assert state.latest() is None and not tmp_path.exists()


@pytest.mark.parametrize("name", ["tensors.safetensors", "scalars.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    state = TrainState(tmp_path)
    state.save(10, tensors(10), {"seen": 1})
    state.save(20, tensors(20), {"seen": 2})
    file = tmp_path / "step_20" / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    if name == "MANIFEST.json" and damage == "flip":
        file.write_bytes(b"{}")
    found = state.latest()
    assert found is not None and found[0] == 10 and found[2] == {"seen": 1} and found[1]["w"][0, 0] == 10
    assert capsys.readouterr().err.startswith("warning: step 20 cannot be resumed from")
    state.save(15, tensors(15), {})
    assert folders(tmp_path) == ["step_10", "step_15"]


def test_when_all_are_damaged_there_is_nothing_to_resume(tmp_path: Path) -> None:
    TrainState(tmp_path).save(1, tensors(1), {})
    (tmp_path / "step_1" / "MANIFEST.json").unlink()
    assert TrainState(tmp_path).latest() is None


@pytest.mark.slow
@pytest.mark.parametrize("point", ["begin", "files", "before_manifest", "before_rename", "renamed"])
def test_killed_anywhere_in_a_save_a_whole_state_is_found(tmp_path: Path, point: str) -> None:
    TrainState(tmp_path).save(1, {"w": torch.ones(1000)}, {})
    env = {**os.environ, "SOG_CRASH_AT": f"save:{point}@step_2"}
    killed = subprocess.run([sys.executable, "-c", SAVER, str(tmp_path), "2"], env=env, timeout=120)
    assert killed.returncode == 137
    found = TrainState(tmp_path).latest()
    assert found is not None and found[0] == (2 if point == "renamed" else 1)
    assert found[1]["w"].equal(torch.full((1000,), float(found[0])))
    TrainState(tmp_path).save(3, {"w": torch.ones(1)}, {})
    assert folders(tmp_path) in (["step_1", "step_3"], ["step_2", "step_3"])


def test_a_full_disk_keeps_what_was_saved_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState(tmp_path)
    state.save(1, tensors(1), {})
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(RunError, match="disk full"):
        state.save(2, tensors(2), {})
    assert folders(tmp_path) == ["step_1"]
