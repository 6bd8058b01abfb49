"""Low-rank adaptation: against the paper's formula written out, and against what was there before.

What PEFT itself computes is compared in test_adapter.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stateofgpt.errors import ConfigError, ModelError
from stateofgpt.infer.engine import Engine
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.infer.score import score
from stateofgpt.model.checkpoint import load_model, save_checkpoint
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.model.lora import (
    LoraConfig,
    adapters,
    add_lora,
    effective_weight,
    lora_state_dict,
    merge,
    merged_state,
    switched_off,
    trainable_parameters,
    unmerge,
)
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train import kernels
from stateofgpt.train.loop import LoopConfig, Trainer, fit
from stateofgpt.train.loss import Batch, LanguageModelLoss
from stateofgpt.train.optim import OptimConfig
from stateofgpt.train.state import TrainState

SHAPE = GPTConfig(
    vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, intermediate_size=48, max_position_embeddings=32,
)  # fmt: skip
RANK3 = LoraConfig(r=3, alpha=5.0)
M = TypeVar("M", bound=nn.Module)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "language model": lambda: some_model(),
    "reward model": lambda: RewardModel(some_model(), 0),
    "value model": lambda: ValueModel(some_model()),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["the quick brown fox jumps over the lazy dog " * 30]), 290)


def some_model(config: GPTConfig = SHAPE) -> GPT:
    model, g = GPT(config), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.3 if p.ndim == 1 else 0.15, generator=g)
    return model


def some_ids(seed: int = 8) -> Tensor:
    return torch.randint(1, SHAPE.vocab_size, (3, 20), generator=torch.Generator().manual_seed(seed))


def adapt(model: M, config: LoraConfig = RANK3, *, trained: bool = True) -> M:
    """`model` with adapters; `trained` ones have a B that is not zero."""
    add_lora(model, config, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapters(model).values() if trained else ():
            layer.lora_B.weight.normal_(std=0.2, generator=g)
    return model


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------------------ formula


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [RANK3, replace(RANK3, use_rslora=True), LoraConfig(target_modules=("v_proj",))])
def test_outputs_and_gradients_are_those_of_w_plus_alpha_over_r_b_a(kind: str, config: LoraConfig) -> None:
    base, model = KINDS[kind](), adapt(KINDS[kind](), config)
    factors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if ".lora_" in n}
    weights = dict(base.named_parameters())
    for name in [n for n in factors if n.endswith("lora_A.weight")]:
        a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
        scale = 5.0 / 3**0.5 if config.use_rslora else 5.0 / 3 if config.r == 3 else 16.0 / 8
        whole = name.replace("lora_A.", "")
        weights[whole] = weights[whole].detach() + scale * (b @ a)
    expected = torch.func.functional_call(base, weights, (some_ids(),))
    got = model(some_ids())
    assert expected.std() > 0.1 and (got - base(some_ids())).abs().max() > 0.05
    assert (got - expected).abs().max() <= 1e-5
    expected.square().mean().backward()
    got.square().mean().backward()
    own = dict(model.named_parameters())
    for name, twin in factors.items():
        assert twin.grad is not None and own[name].grad is not None
        assert twin.grad.abs().max() > 1e-4
        assert (twin.grad - own[name].grad).abs().max() <= 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit_of_the_output(kind: str) -> None:
    assert torch.equal(adapt(KINDS[kind](), trained=False)(some_ids()), KINDS[kind]()(some_ids()))


def test_a_begins_uniform_within_one_over_the_root_of_fan_in_and_b_at_zero() -> None:
    model = adapt(some_model(), LoraConfig(r=64), trained=False)
    for layer in adapters(model).values():
        bound = layer.in_features**-0.5
        assert not layer.lora_B.weight.any()
        assert 0.98 * bound < layer.lora_A.weight.abs().max() <= bound
        assert layer.lora_A.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_the_beginning_follows_from_the_generator_alone() -> None:
    first, again = adapt(some_model()), adapt(some_model())
    model = some_model()
    before = torch.get_rng_state()
    add_lora(model, RANK3, torch.Generator().manual_seed(5))
    assert torch.equal(before, torch.get_rng_state())  # a resumed run finds the global generator as it was
    assert same(lora_state_dict(first), lora_state_dict(again))
    a = next(n for n in lora_state_dict(model) if "lora_A" in n)
    assert not torch.equal(lora_state_dict(model)[a], lora_state_dict(first)[a])


def test_dropout_acts_on_the_input_of_a_and_only_where_a_gradient_is_computed() -> None:
    model, plain = adapt(some_model(), replace(RANK3, dropout=0.5)), adapt(some_model())
    layer = next(iter(adapters(model).values()))
    x = torch.ones(4000, layer.in_features)
    with torch.no_grad():
        assert torch.equal(model(some_ids()), plain(some_ids()))
        whole = layer(x)
    noisy = layer(x)
    assert not torch.equal(noisy, whole)
    assert torch.allclose(noisy.mean(0), whole[0], atol=0.05)  # kept inputs are doubled, so the mean stays
    assert torch.equal(model.eval()(some_ids()), plain(some_ids()))


# ------------------------------------------------------------------------------------------------ what is adapted


def test_names_are_those_of_peft_and_the_base_keeps_its_own() -> None:
    model = adapt(some_model())
    kept = {n for n in model.state_dict() if ".lora_" not in n}
    assert kept == set(some_model().state_dict())
    names = set(lora_state_dict(model))
    assert len(names) == 2 * 7 * SHAPE.num_hidden_layers
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names


def test_a_reward_models_head_is_trained_whole_and_the_rest_is_frozen() -> None:
    model = adapt(RewardModel(some_model(), 0), LoraConfig(target_modules=("q_proj",)))
    assert set(trainable_parameters(model)) == {
        "score.weight",
        *(f"model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"),
    }
    assert "base_model.model.score.weight" in lora_state_dict(model)


def test_a_dotted_name_means_one_layer() -> None:
    model = adapt(some_model(), LoraConfig(target_modules=("layers.1.self_attn.q_proj",)))
    assert list(adapters(model)) == ["model.layers.1.self_attn.q_proj"]


def test_a_layers_own_bias_stays_and_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    expected = model(torch.ones(2, 6))
    add_lora(model, LoraConfig(r=2, target_modules=("0",)), torch.Generator().manual_seed(0))
    assert torch.equal(model(torch.ones(2, 6)), expected)
    assert set(trainable_parameters(model)) == {"0.lora_A.weight", "0.lora_B.weight"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("q_porj",), "has no layer 'q_porj'; lora can adapt q_proj, k_proj"),
        (("q_proj", "embed_tokens"), "cannot adapt model.embed_tokens, a Embedding"),
        (("self_attn",), "cannot adapt model.layers.0.self_attn, a Attention"),
        (("lm_head",), "cannot adapt the head lm_head"),
    ],
)
def test_a_name_that_means_no_matrix_is_refused_before_anything_has_changed(
    names: tuple[str, ...], message: str
) -> None:
    model = some_model()
    with pytest.raises(ConfigError, match=message):
        add_lora(model, LoraConfig(target_modules=names), torch.Generator())
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"target_modules": ()}, "is empty"),
        ({"target_modules": ("../x",)}, "expected a layer's name"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**wrong)  # type: ignore[arg-type]


def test_a_model_takes_adapters_once() -> None:
    model = adapt(some_model(), LoraConfig(target_modules=("q_proj",)))
    with pytest.raises(ModelError, match="has adapters already"):
        add_lora(model, LoraConfig(target_modules=("v_proj",)), torch.Generator())


# ----------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_computes_the_same_and_unmerged_its_base_is_back_bit_for_bit(kind: str) -> None:
    model = adapt(KINDS[kind]())
    before, expected = copied(model.state_dict()), model(some_ids())
    merge(model)
    assert all(not torch.equal(layer.weight, before[f"{n}.weight"]) for n, layer in adapters(model).items())
    assert (model(some_ids()) - expected).abs().max() <= 1e-5
    learning = set(trainable_parameters(model))
    assert not any(".lora_" in name for name in learning)  # nothing learns that has no part in the output
    unmerge(model)
    assert same(model.state_dict(), before) and torch.equal(model(some_ids()), expected)
    assert len(trainable_parameters(model)) == len(learning) + 2 * len(adapters(model))


def test_merging_twice_or_what_has_no_adapters_is_refused() -> None:
    model = adapt(some_model())
    with pytest.raises(ModelError, match="not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(ModelError, match="already merged"):
        merge(model)
    with pytest.raises(ModelError, match="has no adapters"):
        merge(some_model())
    with pytest.raises(ModelError, match="has no adapters"):
        lora_state_dict(some_model())


def test_the_effective_weight_is_the_merged_one() -> None:
    model, merged = adapt(some_model()), adapt(some_model())
    merge(merged)
    for name, layer in adapters(model).items():
        assert torch.equal(effective_weight(layer), merged.get_submodule(name).weight)
        assert torch.equal(effective_weight(adapters(merged)[name]), adapters(merged)[name].weight)
    plain = nn.Linear(3, 2)
    assert effective_weight(plain) is plain.weight


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_checkpoint_of_an_adapted_model_is_a_plain_model_with_the_updates_inside(
    merged_before: bool, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = adapt(some_model())
    expected = model(some_ids())
    if merged_before:
        merge(model)
    save_checkpoint(tmp_path / "c", model, tokenizer=tokenizer, stage="sft", run="test")
    loaded = load_model(tmp_path / "c")
    assert not adapters(loaded) and same(merged_state(loaded), merged_state(model))
    assert (loaded(some_ids()) - expected).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------------------- engine


def generated(model: GPT) -> list[list[int]]:
    engine = Engine(model)
    return [c.ids for c in engine.complete([[5, 6, 7], [9]], SamplingParams(max_tokens=12, temperature=0.8, seed=3))]


def test_the_engine_writes_what_the_merged_model_writes_and_refresh_takes_up_a_step() -> None:
    model, merged = adapt(some_model()), adapt(some_model())
    merge(merged)
    assert generated(model) == generated(merged) != generated(some_model())
    plain = some_model()
    plain.load_state_dict(merged_state(model))
    assert generated(plain) == generated(model)
    params, prompt = SamplingParams(max_tokens=8, temperature=0.0), [[5, 6, 7]]
    engine = Engine(model)
    stale = engine.complete(prompt, params)[0]
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.weight.mul_(-2.0)
    engine.refresh()
    fresh = engine.complete(prompt, params)[0]
    assert fresh.ids != stale.ids
    scored = score(model, [[*prompt[0], *fresh.ids]])[0][-len(fresh.ids) :]
    assert fresh.logprobs == pytest.approx(scored, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------- training

LOOP = LoopConfig(optim=OptimConfig(lr=1e-2))


def rows(seed: int, n: int = 4) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SHAPE.vocab_size, (n, 13))
    return Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy(), (rng.random((n, 12)) < 0.5).astype(np.float32))


def test_only_what_takes_a_gradient_is_trained_has_a_state_and_is_saved() -> None:
    model = adapt(some_model(), trained=False)
    before = copied(dict(model.named_parameters()))
    trainer = Trainer(model, LOOP)
    losses = [trainer.step([rows(1)], LanguageModelLoss(), 1.0)["loss"] for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    learning = set(trainable_parameters(model))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is (name not in learning), name
        assert (p.grad is None) is (name not in learning), name
    factors = sum(p.numel() for p in trainable_parameters(model).values())
    tensors = trainer.tensors()
    assert {n.removeprefix("model.") for n in tensors if n.startswith("model.")} == learning
    assert sum(t.numel() for n, t in tensors.items() if n.startswith("model.")) == factors
    assert sum(t.numel() for t in tensors.values()) <= 3 * factors + 1


def test_muon_takes_the_factors_of_one_shape_together_and_begins_at_a_zero_b() -> None:
    model = adapt(some_model(), trained=False)
    trainer = Trainer(model, LOOP)
    for step in range(2):
        trainer.step([rows(step)], LanguageModelLoss(), 1.0)
    assert not trainer.optimizer.adam and all(p.isfinite().all() for p in model.parameters())
    assert all(layer.lora_B.weight.any() for layer in adapters(model).values())
    without = Trainer(adapt(some_model()), replace(LOOP, optim=replace(LOOP.optim, use_muon=False)))
    assert not without.optimizer.stacks and len(without.optimizer.adam) == 2 * len(adapters(model))


def test_the_optimizers_fused_passes_take_factors_as_they_take_matrices() -> None:
    if (loaded := kernels.load()) is None:
        pytest.skip("there is no C compiler")
    plain, fused = (Trainer(adapt(some_model()), LOOP, passes) for passes in (None, loaded))
    before = copied(dict(plain.optimizer.params.items()))
    for trainer in (plain, fused):
        trainer.step([rows(1)], LanguageModelLoss(), 1.0)
    for name, p in plain.optimizer.params.items():
        apart, moved = (p - fused.optimizer.params[name]).norm(), (p - before[name]).norm()
        assert moved > 0.0 and apart < 0.05 * moved, name  # Muon's update is in bfloat16


def test_a_model_that_is_frozen_whole_is_no_model_to_train() -> None:
    with pytest.raises(ModelError, match="nothing to train"):
        Trainer(some_model().requires_grad_(False), LOOP)


class Stopped(Exception):
    """Stands for a kill."""


def train(path: Path, config: LoraConfig, *, die_after: int = 99, reward: bool = False) -> dict[str, Tensor]:
    """A run of `fit` on an adapted model that goes on from what `path` has; all of the model at the end."""
    torch.randn(die_after)  # the global generator stands somewhere else in every attempt
    model = adapt(RewardModel(some_model(), 0) if reward else some_model(), config, trained=False)
    trainer = Trainer(model, replace(LOOP, save_every_s=-1.0))

    def callback(step: int, metrics: dict[str, float]) -> None:
        if step == die_after:
            raise Stopped

    def ranked(m: RewardModel, batch: Batch) -> Tensor:
        return (m(batch.ids) - batch.weights.sum(1)).square().sum()

    def batches(step: int) -> Sequence[Batch]:
        return [rows(10 + step), rows(50 + step, 2)]

    fit(
        trainer, batches, ranked if reward else LanguageModelLoss(), steps=6, factor=lambda step: 1.0 - step / 6,
        state=TrainState(path), callbacks=(callback,),
    )  # fmt: skip
    return copied(dict(model.named_parameters()))


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_stopped_and_continued_it_ends_in_the_same_bits(reward: bool, dropout: float, tmp_path: Path) -> None:
    config = replace(RANK3, dropout=dropout)
    expected = train(tmp_path / "straight", config, reward=reward)
    for death in (2, 4):
        with pytest.raises(Stopped):
            train(tmp_path / "torn", config, die_after=death, reward=reward)
    assert same(train(tmp_path / "torn", config, reward=reward), expected)
    found = TrainState(tmp_path / "torn").latest()
    assert found is not None
    assert all(".lora_" in n or "score" in n for n in found[1] if n.startswith("model."))


def test_dropout_draws_other_masks_every_step_and_leaves_the_global_generator_alone() -> None:
    model = adapt(some_model(), replace(RANK3, dropout=0.5))
    trainer = Trainer(model, LOOP)
    before = torch.get_rng_state()
    losses = [trainer.step([rows(1)], LanguageModelLoss(), 0.0)["loss"] for _ in range(3)]
    assert len(set(losses)) == 3 and torch.equal(before, torch.get_rng_state())


def test_the_fused_pass_has_the_adapters_in_it_and_their_gradients() -> None:
    assert kernels.load() is not None
    models = [adapt(some_model()) for _ in range(2)]
    losses = [
        LanguageModelLoss(fused=fused)(model, rows(1)) for fused, model in zip((True, False), models, strict=True)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert not torch.isclose(losses[0], LanguageModelLoss()(some_model(), rows(1)))
    for loss in losses:
        loss.backward()
    mine, theirs = (trainable_parameters(model) for model in models)
    for name, p in theirs.items():
        grad = mine[name].grad
        assert p.grad is not None and grad is not None, name
        assert (grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, name


@pytest.mark.slow
def test_compiled_it_learns_the_same() -> None:
    plain, compiled = adapt(some_model()), adapt(some_model())
    for model, loss in ((plain, LanguageModelLoss()), (compiled, LanguageModelLoss(compiled=True))):
        trainer = Trainer(model, LOOP)
        for step in range(3):
            trainer.step([rows(step)], loss, 1.0)
    own = trainable_parameters(compiled)
    for name, p in trainable_parameters(plain).items():
        assert torch.allclose(p, own[name], atol=1e-3), name


def test_a_copy_of_an_adapted_model_is_adapted_and_apart() -> None:
    model = adapt(some_model())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in adapters(twin).values():
            layer.lora_B.weight.zero_()
    assert torch.equal(twin(some_ids()), some_model()(some_ids()))
    assert not torch.equal(model(some_ids()), some_model()(some_ids()))


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_it_computes_what_the_base_computes_bit_for_bit_and_then_again_what_it_did(kind: str) -> None:
    model, plain = adapt(KINDS[kind]()), KINDS[kind]()
    before = model(some_ids())
    with switched_off(model):
        assert torch.equal(model(some_ids()), plain(some_ids()))
        with switched_off(model):
            pass
        assert torch.equal(model(some_ids()), plain(some_ids()))  # the inner one did not switch it on
        for name, layer in adapters(model).items():
            assert torch.equal(effective_weight(layer), plain.get_submodule(name).weight)  # what the fused pass takes
    assert torch.equal(model(some_ids()), before) and not torch.equal(before, plain(some_ids()))
    with pytest.raises(Stopped), switched_off(model):
        raise Stopped
    assert torch.equal(model(some_ids()), before)


def test_a_merged_model_cannot_be_switched_off_and_one_without_adapters_need_not_be() -> None:
    model = adapt(some_model())
    merge(model)
    with pytest.raises(ModelError, match="unmerge it"), switched_off(model):
        pass
    plain = some_model()
    with switched_off(plain):
        assert torch.equal(plain(some_ids()), some_model()(some_ids()))
