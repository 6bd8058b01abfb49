"""The planner against shapes counted tensor by tensor, the papers' own numbers, and the models this project builds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from command import one_sentence, sog

from stateofgpt.cli import main
from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.report.plan import HERE, STAGE_LR
from stateofgpt.train import dial
from stateofgpt.train.hardware import GPUS, gpu
from stateofgpt.train.optim import MuonAdamW, OptimConfig
from stateofgpt.train.planner import (
    activation_bytes,
    batch_tokens,
    count,
    learning_rate,
    make_plan,
    memory,
    shape_for,
    train_flops,
)
from stateofgpt.train.published import GPT3, LLAMA_65B, TALK, Published
from stateofgpt.train.scaling import EPOCH, HOFFMANN, KAPLAN


def tensors(m: Published) -> Iterator[tuple[int, ...]]:
    """The shape of every tensor of a model, one by one, as its paper describes the architecture."""
    yield (m.vocab_size, m.width)
    gpt3 = m.kind == "gpt3"
    if gpt3:
        yield (m.context, m.width)  # learned positions
    else:
        yield (m.vocab_size, m.width)  # the head
    norm = [(m.width,)] * (2 if gpt3 else 1)  # LayerNorm has a gain and a bias, RMSNorm a gain
    for _ in range(m.n_layer):
        yield from norm
        for _ in ("query", "key", "value", "output"):
            yield (m.width, m.width)
            if gpt3:
                yield (m.width,)
        yield from norm
        for rows, columns in [(m.width, m.feed_forward), (m.feed_forward, m.width)] + [(m.width, m.feed_forward)] * (
            not gpt3
        ):
            yield (rows, columns)
            if gpt3:
                yield (columns,)
    yield from norm


@pytest.mark.parametrize("model", TALK, ids=lambda m: m.name)
def test_published_models_are_counted_exactly_and_within_a_percent_of_what_their_papers_say(model: Published) -> None:
    assert model.n_params == sum(math.prod(shape) for shape in tensors(model))
    assert model.n_params == pytest.approx(model.told_params, rel=0.01)
    assert model.width % model.n_head == 0 and model.width // model.n_head == 128
    tables = model.vocab_size * (1 if model.kind == "gpt3" else 2) + (model.context if model.kind == "gpt3" else 0)
    assert model.n_params - model.non_embedding == tables * model.width


@pytest.mark.parametrize("model", TALK[1:], ids=lambda m: m.name)
def test_our_own_llama_of_that_shape_has_as_many(model: Published) -> None:
    config = GPTConfig(
        "llama",
        model.vocab_size,
        model.width,
        model.n_layer,
        model.n_head,
        model.n_head,
        128,
        model.feed_forward,
        model.context,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        assert GPT(config).n_params() == model.n_params == count(config)[0]


def test_the_published_gpu_hours_are_twenty_one_days_and_a_plausible_utilisation() -> None:
    assert LLAMA_65B.a100_hours is not None
    assert LLAMA_65B.a100_hours == pytest.approx(2048 * 21 * 24, rel=0.01)
    for model in TALK[1:]:
        assert model.a100_hours is not None
        assert 0.4 < model.flops / (model.a100_hours * 3600 * 312e12) < 0.55


def test_the_talks_table_ranks_the_two_models_by_each_law(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--talk", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    by_name = {m["name"]: m for m in told["models"]}
    big, small = by_name["GPT-3 175B"]["losses"], by_name["LLaMA-65B"]["losses"]
    assert small["epoch"] == pytest.approx(1.976, abs=1e-3) and big["epoch"] == pytest.approx(2.009, abs=1e-3)
    assert small["kaplan"] == pytest.approx(1.702, abs=1e-3) and big["kaplan"] == pytest.approx(1.661, abs=1e-3)
    assert "Epoch's constants rank LLaMA-65B better" in told["lesson"]
    assert by_name["GPT-3 175B"]["flops"] == pytest.approx(3.14e23, rel=0.01)  # table D.1 of its paper
    assert by_name["LLaMA-65B"]["told"]["a100_days"] == pytest.approx(1_022_362 / 24)
    main(["plan", "--talk"])
    assert "LLaMA-65B" in capsys.readouterr().out


@pytest.mark.parametrize("law", [EPOCH, HOFFMANN, KAPLAN])
@pytest.mark.parametrize("flops", [1e14, 1e19, 3.14e23])
def test_every_laws_optimum_beats_its_neighbours_and_tokens_for_undoes_it(law: object, flops: float) -> None:
    chosen = next(one for one in (EPOCH, HOFFMANN, KAPLAN) if one is law)
    best = chosen.optimum(flops)
    assert 6 * best.n_params * best.tokens == pytest.approx(flops)
    for factor in (0.5, 0.98, 1.02, 2.0):
        n_params = best.n_params * factor
        assert chosen.loss(n_params, flops / (6 * n_params)) > best.loss
    assert chosen.tokens_for(best.n_params) == pytest.approx(best.tokens, rel=1e-6)


def test_kaplans_law_would_have_bought_gpt3_with_gpt3s_compute_and_leans_to_size_as_budgets_grow() -> None:
    best = KAPLAN.optimum(GPT3.flops)
    assert best.n_params == pytest.approx(175e9, rel=0.05) and best.tokens == pytest.approx(300e9, rel=0.05)
    slope = math.log(KAPLAN.optimum(1e24).n_params / KAPLAN.optimum(1e22).n_params) / math.log(100)
    assert slope == pytest.approx(0.575, abs=0.002)
    assert slope > math.log(EPOCH.optimum(1e24).n_params / EPOCH.optimum(1e22).n_params) / math.log(100)


@pytest.mark.parametrize("wanted", [6e4, 3e5, 1.1e6, 5e6, 3e7, 1.24e8, 1e9, 7e9, 7e10, 1e12])
def test_a_shape_is_near_the_size_asked_for_and_is_one_the_model_can_have(wanted: float) -> None:
    config = shape_for(wanted)
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    with torch.device("meta"):
        assert GPT(config).n_params() == count(config)[0] if wanted < 1e10 else True
    assert count(config)[0] == pytest.approx(wanted, rel=0.25 if wanted < 2e6 else 0.1)
    assert 8 <= config.hidden_size / config.num_hidden_layers <= 170


def test_memory_is_what_a_trainer_of_that_shape_holds() -> None:
    config = dial.shape(128, 3, 512, 64)
    model = GPT(config)
    optimizer = MuonAdamW(model.named_parameters(), OptimConfig())
    held = sum(t.nbytes for name, t in optimizer.state().items() if name != "step_count")
    made = memory(config, 4)
    assert made.weights == made.gradients == sum(p.nbytes for p in model.parameters())
    assert made.optimizer == held
    assert activation_bytes(config, 8) == 2 * made.activations


def test_activations_are_near_what_autograd_keeps() -> None:
    config = dial.shape(128, 3, 512, 64)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if not any(t.data_ptr() == p.data_ptr() for p in model.parameters()):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.zeros(4, 64, dtype=torch.int64))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), torch.zeros(256, dtype=torch.int64))
    assert 0.5 < activation_bytes(config, 4) / sum(kept.values()) < 2.0


def test_flops_are_six_a_parameter_and_token_and_attention_on_top() -> None:
    config = shape_for(7e9)
    assert 1.0 < train_flops(config) / (6 * count(config)[0]) < 1.2


def test_batches_grow_as_tokens_to_the_power_0_383_through_llamas_four_million() -> None:
    assert batch_tokens(1.4e12, 2048) == pytest.approx(4e6, rel=0.001)
    assert batch_tokens(1.4e12, 2048) / batch_tokens(1.4e10, 2048) == pytest.approx(100**0.383, rel=0.01)
    assert batch_tokens(5000, 256) == 256  # never less than a row


def test_the_learning_rate_goes_through_gpt3s_family_and_ends_near_this_projects_own() -> None:
    assert learning_rate(125e6) == pytest.approx(6e-4)
    assert learning_rate(175e9) == pytest.approx(0.6e-4)
    assert learning_rate(13e9) == pytest.approx(1.0e-4, rel=0.4)  # table 2.1
    assert learning_rate(1.1e6) == pytest.approx(OptimConfig().lr, rel=0.15)


def test_a_bigger_budget_never_buys_a_smaller_model_or_fewer_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    sizes, tokens = [], []
    for flops in ("1e15", "1e17", "1e19", "1e21", "1e23"):
        assert main(["plan", "--flops", flops, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        sizes.append(told["plan"]["n_params"])
        tokens.append(told["plan"]["tokens"])
        assert told["plan"]["flops"] == pytest.approx(float(flops), rel=1e-3)
        assert told["plan"]["n_params"] == pytest.approx(EPOCH.optimum(float(flops)).n_params, rel=0.15)
    assert sizes == sorted(sizes) and tokens == sorted(tokens)


def test_dollars_become_gpu_hours_by_price_and_flops_by_utilisation(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--dollars", "200", "--gpu", "a100", "--price", "2", "--utilisation", "0.5", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["budget"]["gpu_hours"] == 100
    assert told["plan"]["flops"] == pytest.approx(100 * 3600 * 312e12 * 0.5, rel=1e-3)
    a100 = next(g for g in told["gpus"] if g["gpu"] == "A100")
    assert a100["dollars"] == pytest.approx(200, rel=1e-3) and a100["gpu_hours"] == pytest.approx(100, rel=1e-3)


def test_a_size_gets_the_laws_tokens_or_the_ones_given(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--params", "70B", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["tokens"] == pytest.approx(1.29e12, rel=0.03)  # Epoch's optimum for about 70B
    main(["plan", "--params", "7B", "--tokens", "1T", "--law", "kaplan", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["tokens"] == 10**12 and told["law"] == "kaplan"
    assert {row["law"] for row in told["laws"]} == {"kaplan", "chinchilla", "epoch"}


def test_minutes_are_planned_by_the_dials_own_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flops = 1e11

    def rate(config: GPTConfig, dtype: str, *, rows: int, context: int, **how: object) -> float:
        return flops / (6 * count(config)[0])

    monkeypatch.setattr(dial, "measure_rate", rate)
    monkeypatch.setattr(dial, "can_compile", lambda: False)
    monkeypatch.setattr(dial, "can_fuse", lambda: False)
    assert main(["plan", "--minutes", "10", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = dial.choose(HERE[0], HERE[1], 600.0, rows=HERE[2]).config
    made = told["plan"]
    assert (made["width"], made["layers"]) == (expected.hidden_size, expected.num_hidden_layers)
    assert 6 * made["n_params"] * made["tokens"] == pytest.approx(flops * 600, rel=1e-3)
    assert made["seconds"] == 600 and made["batch_tokens"] == 2048 and made["lr"] == STAGE_LR == OptimConfig().lr
    main(["plan", "--minutes", "10"])
    assert "on this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan"], "a plan needs one budget"),
        (["plan", "--minutes", "5", "--flops", "1e18"], "one budget, not minutes and flops"),
        (["plan", "--dollars", "5"], "--dollars needs --gpu; there are A100"),
        (["plan", "--dollars", "5", "--gpu", "H10"], 'did you mean "H100"'),
        (["plan", "--flops", "1e18", "--tokens", "5"], "--tokens goes with --params"),
        (["plan", "--flops", "lots"], 'a number above 0, as 1e9, 7B or 1.4T, not "lots"'),
        (["plan", "--flops", "nan"], "a number above 0"),
        (["plan", "--params", "10"], "it must have 5e4 to 1e14"),
        (["plan", "--flops", "1"], "cannot be planned"),
        (["plan", "--flops", "1e18", "--law", "kaplen"], "neither"),
        (["plan", "--flops", "1e18", "--utilisation", "7"], "a share"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said.replace("neither", "neither") in one_sentence(capsys.readouterr().err)


def test_the_table_of_gpus_finds_names_however_written() -> None:
    assert gpu("rtx-4090").name == "RTX4090" and gpu("h100").peak == 989e12
    assert all(g.peak > 1e14 and g.memory >= 24e9 and g.price > 0 for g in GPUS)
    with pytest.raises(ConfigError, match="there is no"):
        gpu("abacus")


def test_a_plan_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        make_plan(shape_for(1e6), 0.5)


@pytest.mark.slow
def test_plan_works_as_a_command() -> None:
    done = sog("plan", "--talk")
    assert done.returncode == 0 and "Kaplan" in done.stdout
