"""The dial on a GPU, with a device made of numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from twin_device import twin

from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train import dial, dial_gpu
from stateofgpt.train.dial_gpu import Filled, choose, fill, fill_shape

__all__ = ["twin"]


def device(full: int, most: int = 1 << 40, work: float = 1e-4) -> Callable[[int], float]:
    """Seconds of a step: up to `full` rows take the time of `full`; `most` fit into its memory."""

    def seconds(rows: int) -> float:
        if rows > most:
            raise torch.OutOfMemoryError("out of memory")
        return work * max(rows, full)

    return seconds


def filled(seconds: Callable[[int], float], rows: int = 8, run: float = 600.0) -> Filled | None:
    return fill(seconds, 256, rows, run_seconds=run, within=60.0)


def test_rows_are_doubled_until_the_rate_stops_rising() -> None:
    made = filled(device(full=64))
    assert made == Filled(
        64, pytest.approx(256 / 1e-4), {str(n): pytest.approx(256 * min(n, 64) / 64e-4) for n in (8, 16, 32, 64, 128)}
    )  # type: ignore[arg-type]


def test_a_gain_of_a_few_percent_is_not_worth_twice_the_rows() -> None:
    rates = {8: 1.0, 16: 1.9, 32: 2.0, 64: 2.06, 128: 4.0}
    made = filled(lambda rows: rows * 1e-4 / rates[rows])
    assert made is not None and made.rows == 32 and list(made.rates) == ["8", "16", "32", "64"]


def test_rows_stop_where_memory_ends_and_begin_lower_where_it_must() -> None:
    assert (made := filled(device(full=64, most=40))) is not None and made.rows == 32
    assert (made := filled(device(full=64, most=3))) is not None and made.rows == 2
    assert filled(device(full=64, most=0)) is None


def test_rows_leave_a_run_enough_steps() -> None:
    made = filled(device(full=1 << 20, work=1e-6), run=400.0)  # a step takes 1.05 s, whatever its rows
    assert made is not None and made.rows == 8
    made = filled(device(full=1, work=0.01), run=600.0)  # 8 rows take 0.08 s: 7,500 steps; it no longer rises
    assert made is not None and made.rows == 8


@pytest.mark.slow
def test_it_takes_the_size_of_least_predicted_loss_with_the_rows_that_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    def parameters(config: GPTConfig) -> int:
        with torch.device("meta"):
            return GPT(config).n_params()

    def of_shape(config: GPTConfig, *_: object, **__: object) -> Filled:
        rate = 2e14 / (6 * parameters(config))
        return Filled(96, rate, {"96": rate})

    monkeypatch.setattr(dial_gpu, "fill_shape", of_shape)
    monkeypatch.setattr(dial_gpu, "fastest_dtype", lambda *_: "bfloat16")
    monkeypatch.setattr(dial_gpu, "can_compile", lambda: True)
    for seconds, largest in ((60.0, 20e6), (600.0, 200e6), (6000.0, 700e6), (600000.0, 2e9)):
        choice, rows = choose("cuda", 50304, 1024, seconds, rows=8)
        left = (seconds - 60.0) * 1.5 if seconds > 180.0 else seconds

        def loss(size: tuple[int, int], left: float = left) -> float:  # Epoch's law (arXiv 2404.10102), typed in
            n = parameters(dial.shape(*size, 50304, 1024))
            return 1.8172 + 482.01 / n**0.3478 + 2085.43 / (2e14 * left / (6 * n)) ** 0.3658

        best = min(dial_gpu.SHAPES, key=loss)
        assert (choice.config.hidden_size, choice.config.num_hidden_layers) == best
        assert largest / 8 < parameters(choice.config) <= largest
        assert rows.rows == 96 and choice.compiled == (seconds > 180.0) and not choice.fused


def test_what_fits_no_memory_ends_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_shape(config: GPTConfig, *_: object, **__: object) -> Filled | None:
        return Filled(8, 1e5, {}) if config.hidden_size <= most else None

    monkeypatch.setattr(dial_gpu, "fill_shape", of_shape)
    monkeypatch.setattr(dial_gpu, "fastest_dtype", lambda *_: "bfloat16")
    most = 256
    assert choose("cuda", 1024, 256, 1e6, rows=8)[0].config.hidden_size == 256
    most = 0
    with pytest.raises(ConfigError, match="no model fits into the memory of cuda"):
        choose("cuda", 1024, 256, 1e6, rows=8)


def test_the_cpus_shapes_are_what_they_were() -> None:
    assert dial_gpu.SHAPES[:10] == dial.SHAPES and dial.SHAPES[-1] == (768, 12)
    with torch.device("meta"):
        sizes = [GPT(dial.shape(*size, 50304, 1024)).n_params() for size in dial_gpu.SHAPES]
    assert sizes == sorted(sizes) and 1.4e9 < sizes[-1] < 1.6e9


def test_a_real_trial_gives_the_rates_of_the_rows_it_tried(twin: str) -> None:
    made = fill_shape(dial.shape(64, 1, 64, 16), "float32", 16, 1, twin, run_seconds=1e4, within=0.2)
    assert made is not None and made.rate > 0 and str(made.rows) in made.rates
