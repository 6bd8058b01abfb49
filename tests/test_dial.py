"""The dial with a machine made of numbers, so that what it must choose can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from stateofgpt.errors import ConfigError
from stateofgpt.model.form import Form
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train import dial
from stateofgpt.train.dial import SHAPES, choose, choose_way, measure_rate, peak_memory_bytes, shape, timed_steps


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def parameters(width: int, layers: int, vocab: int) -> int:
    """By hand: embedding, four attention and three feed-forward matrices, and the gains."""
    return vocab * width + layers * (4 * width**2 + 3 * width * 3 * width + 2 * width + 2 * 64) + width


def machine(
    monkeypatch: pytest.MonkeyPatch,
    flops: float,
    *,
    bf16: float = 2.0,
    compiler: bool = True,
    kernels: float | None = None,
) -> list[str]:
    """A machine of so many operations a second; returns what was measured on it."""
    asked: list[str] = []

    def rate(config: GPTConfig, dtype: str, *, rows: int, context: int, repeats: int = 2, fused: bool = False) -> float:
        asked.append(f"{config.hidden_size}x{config.num_hidden_layers} {dtype}{' fused' if fused else ''}")
        n = parameters(config.hidden_size, config.num_hidden_layers, config.vocab_size)
        gain = kernels if fused and kernels is not None else 1.0
        return flops * (bf16 if dtype == "bfloat16" else 1.0) * gain / (6 * n)

    monkeypatch.setattr(dial, "measure_rate", rate)
    monkeypatch.setattr(dial, "can_compile", lambda: compiler)
    monkeypatch.setattr(dial, "can_fuse", lambda: kernels is not None)
    return asked


def expected(flops: float, seconds: float) -> tuple[int, int]:
    """The shape of least loss by Epoch's law (arXiv 2404.10102), its constants typed in."""

    def loss(size: tuple[int, int]) -> float:
        n = parameters(*size, 1024)
        return 1.8172 + 482.01 / n**0.3478 + 2085.43 / (flops * seconds / (6 * n)) ** 0.3658

    return min(SHAPES, key=loss)


@pytest.mark.parametrize("flops", [1e9, 1e10, 1e11, 1e12, 1e13, 1e14])
@pytest.mark.parametrize("seconds", [10.0, 40.0])
def test_it_takes_the_shape_of_least_predicted_loss(
    monkeypatch: pytest.MonkeyPatch, flops: float, seconds: float
) -> None:
    machine(monkeypatch, flops, bf16=0.5)
    made = choose(1024, 128, seconds, rows=16)
    assert (made.config.hidden_size, made.config.num_hidden_layers) == expected(flops, seconds)
    assert made.dtype == "float32" and not made.compiled


def test_more_time_never_buys_a_smaller_model(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1e11)
    widths = [choose(1024, 128, s, rows=16).config.hidden_size for s in (5, 30, 100, 200, 600, 3600, 40000)]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_it_stops_measuring_once_models_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = machine(monkeypatch, 1e9)
    made = choose(1024, 128, 10.0, rows=16)
    assert len(asked) == 2 + len(made.rates) < 2 + len(SHAPES)
    assert list(made.rates) == [f"{w}x{n}" for w, n in SHAPES[: len(made.rates)]]


def test_precision_is_what_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1e10, bf16=1.5)
    assert choose_way(1024, 64) == ("bfloat16", False)
    assert choose(1024, 64, 30.0, rows=8).dtype == "bfloat16"
    machine(monkeypatch, 1e10, bf16=0.9)
    assert choose_way(1024, 64) == ("float32", False)


def test_fused_kernels_are_taken_where_they_are_faster_and_nothing_is_compiled_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, 1e10, kernels=1.5)
    made = choose(1024, 64, 600.0, rows=8)
    assert made.fused and made.dtype == "bfloat16" and not made.compiled
    machine(monkeypatch, 1e10, kernels=0.9)
    made = choose(1024, 64, 600.0, rows=8)
    assert not made.fused and made.compiled


def test_compilation_needs_a_compiler_and_time_to_earn_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1e11)
    assert choose(1024, 64, 600.0, rows=8).compiled
    assert not choose(1024, 64, 30.0, rows=8).compiled
    machine(monkeypatch, 1e11, compiler=False)
    assert not choose(1024, 64, 600.0, rows=8).compiled


def test_the_dial_measures_the_family_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = machine(monkeypatch, 1e10, kernels=1.5)
    made = choose(1024, 64, 30.0, rows=8, form=Form("gpt2"))
    assert made.config.arch == "gpt2" and made.config.intermediate_size == 4 * made.config.hidden_size
    assert not any("fused" in trial for trial in asked)  # the fused pass does not know it
    assert made.fused and not made.compiled  # the optimizer's kernels do
    assert choose(1024, 64, 600.0, rows=8, form=Form("gpt2")).compiled
    made = choose(1024, 64, 600.0, rows=8, form=Form("llama"))
    assert made.config.arch == "llama" and made.fused


def test_the_dial_takes_only_widths_that_the_form_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1e13)
    made = choose(1024, 128, 4000.0, rows=16, form=Form(kv_heads=4))
    assert set(made.rates) <= {"256x6", "512x8", "768x12"} and made.config.num_key_value_heads == 4
    with pytest.raises(ConfigError, match="so it is with every width the dial knows"):
        choose(1024, 128, 40.0, rows=16, form=Form(kv_heads=7))


def test_the_dial_takes_no_model_with_fewer_layers_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1e10)
    free, deep = (choose(1024, 128, 10.0, rows=16, fewest_layers=n).config for n in (1, 4))
    assert free.num_hidden_layers < 4 <= deep.num_hidden_layers
    with pytest.raises(ConfigError, match="knows none deeper than 12"):
        choose(1024, 128, 10.0, rows=16, fewest_layers=13)


@pytest.mark.parametrize(("width", "layers"), SHAPES)
def test_all_shapes_are_whole_and_as_large_as_computed(width: int, layers: int) -> None:
    config = shape(width, layers, 1024, 128)
    assert config.num_attention_heads * config.head_dim == width and config.max_position_embeddings == 128
    with torch.device("meta"):
        assert GPT(config).n_params() == parameters(width, layers, 1024)


def test_a_width_below_one_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="below 64, the size of a head"):
        shape(32, 2, 1024, 128)


def test_measuring_leaves_no_gradient_and_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 1)
    clock = iter([0, 100, 100, 101, 101, 106, 106, 108])  # a slow first pass, then 1, 5 and 2 seconds
    monkeypatch.setattr(dial.time, "perf_counter", lambda: float(next(clock)))
    assert timed_steps(lambda: model(torch.ones(1, 2)).sum(), model, 3) == 2.0
    assert all(p.grad is None for p in model.parameters())


def test_a_real_trial_gives_a_rate() -> None:
    assert measure_rate(shape(64, 1, 64, 16), "float32", rows=2, context=16, repeats=1) > 0


def test_peak_memory_is_at_least_what_was_just_held() -> None:
    block = torch.ones(16 << 20)  # 64 MiB, touched
    assert peak_memory_bytes() > block.nbytes
    assert peak_memory_bytes() < 1 << 40
