"""The benchmark of reinforcement learning on a GPU runs where there is none, in small, and tells every part."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_in_small_it_tells_every_part_and_draws_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import bench_gpu_rl

    bench_gpu_rl.main(["--tiny", "--seconds", "4", "--device", "cpu", "--out", str(tmp_path)])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not [row for row in told if "error" in row]
    assert list(dict.fromkeys(row["part"] for row in told)) == ["machine", "reward", "judge", "ppo", "grpo"]
    of_reward = next(row for row in told if row["part"] == "reward")
    assert of_reward["accuracy"]["low"] <= of_reward["accuracy"]["value"] <= 1.0 and "gain" in of_reward["longer"]
    done = next(row for row in told if row.get("done"))
    assert done["iterations"] >= 4 and {"proxy_reward", "kl", "entropy", "length"} <= done["after"].keys()
    curve = [json.loads(line) for line in (tmp_path / "ppo.jsonl").read_text().splitlines()]
    assert len([row for row in curve if "proxy_reward" in row]) == done["iterations"]
    drawn = (tmp_path / "ppo.svg").read_text()
    assert drawn.startswith("<svg xmlns") and drawn.count("<svg width") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ppo.jsonl", "ppo.svg"]


def test_a_part_that_fails_is_told_and_the_next_one_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import bench_gpu_rl

    def fails() -> None:
        raise RuntimeError("out of memory")

    assert bench_gpu_rl.tried("ppo", fails) is None
    assert json.loads(capsys.readouterr().out) == {"part": "ppo", "error": "RuntimeError: out of memory"}
