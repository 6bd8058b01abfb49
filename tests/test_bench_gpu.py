"""The benchmark of training on a GPU, tried on the CPU: every part answers, and a part that fails ends alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_every_part_of_it_prints_a_line_and_no_failure_stops_the_next() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "benchmarks/bench_gpu_train.py", "--tiny", "--seconds", "40", "--peer-seconds", "4"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--parts", "peak", "rate", "loss"], cwd=BENCHMARKS.parent, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, rate, loss = map(json.loads, done.stdout.splitlines())
    assert peak["peak"] > 1e8 and rate["tokens_per_second"] > 10
    by_hand = 6 * rate["parameters"] + 6 * 1 * 64 * 32  # one layer of 64 over a context of 32
    assert rate["flops_per_token"] == pytest.approx(by_hand, rel=0.01)
    assert rate["share"] == pytest.approx(rate["tokens_per_second"] * by_hand / peak["peak"], rel=0.01)
    assert loss["as_good"] == (loss["ours"]["val_loss"] <= loss["peer"]["val_loss"])
    assert loss["times_as_fast"] == pytest.approx(loss["peer"]["wall"] / loss["ours"]["wall"])
    assert all(side["steps"] > 0 for side in (loss["peer"], loss["ours"]))
    broken = subprocess.run(
        [*command, "--text", "nowhere", "--parts", "loss", "peak"], cwd=BENCHMARKS.parent, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    loss, peak = map(json.loads, broken.stdout.splitlines())
    assert "nowhere" in loss["error"] and peak["peak"] > 1e8


def test_made_up_ids_are_the_same_again_and_can_be_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import texts

    a, b = (texts.make_up(tmp_path / name, 50_000, 64, length=50) for name in ("a", "b"))
    assert np.array_equal(a.train, b.train) and len(a.train) + len(a.validation) == 50_000
    assert len(a.validation) == 100 * 50 and int(a.train.max()) < 64
    counts = np.ones((64, 64))
    np.add.at(counts, (a.train[:-1], a.train[1:]), 1)
    model = counts / counts.sum(1, keepdims=True)
    loss = -np.log(model[a.validation[:-1], a.validation[1:]]).mean()
    unigram = counts.sum(0) / counts.sum()
    assert loss < -np.log(unigram[a.validation]).mean() - 0.2  # what comes next depends on what came last
