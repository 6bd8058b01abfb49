"""The benchmark of the engine on a GPU runs through, in little, on the CPU, and goes on after a part that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.slow
def test_every_part_says_what_it_found_in_a_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu_engine as bench

    def broken(*_: object) -> None:
        raise RuntimeError("not here")

    monkeypatch.setattr(bench.Bench, "managed", broken)  # another's, with threads of its own
    monkeypatch.setattr(sys, "argv", ["bench_gpu_engine.py", "--tiny", "--device", "cpu", "--seconds", "200"])
    bench.main()
    told = {one["part"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    assert told["gate tiny"]["passed"] and told["bandwidth"]["gb_per_second"] > 0
    for rows in ("1 rows", "3 rows"):
        for way in ("", " with torch's attention", " with neither"):
            assert told["stream tiny"][rows + way]["tokens_per_second"] > 0
    for side in ("ours", "clients", "ours without graphs", "static"):
        assert told[f"load tiny: {side}"]["whole"], side
    assert "not here" in told["load tiny: continuous"]["failed"]


def test_what_there_is_no_time_for_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu_engine as bench

    monkeypatch.setattr(sys, "argv", ["bench_gpu_engine.py", "--tiny", "--device", "cpu", "--seconds", "0"])
    bench.main()
    first, *others = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["part"] == "machine" and others and all("skipped" in one for one in others)
