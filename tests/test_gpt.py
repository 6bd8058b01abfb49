"""The decoder's own promises; that it computes what transformers computes is test_parity.py's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import GPT, GPTConfig, rotary_tables
from stateofgpt.model.rotary import RopeScaling, rotary_angles, rotate

CONFIG = GPTConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, intermediate_size=40, max_position_embeddings=20,
)  # fmt: skip
GPT2 = replace(CONFIG, arch="gpt2", num_key_value_heads=4)
CONFIGS = {
    "qwen3": CONFIG,
    "llama": replace(CONFIG, arch="llama"),
    "llama, biased": replace(CONFIG, arch="llama", attention_bias=True, mlp_bias=True),
    "gpt2": GPT2,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_model(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    model, g = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.3, generator=g)
    return model


def some_ids(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", CONFIGS)
def test_no_token_sees_what_comes_after_it(arch: str) -> None:
    model, ids = random_model(CONFIGS[arch]), some_ids()
    logits = model(ids)
    for t in (1, 5, 11):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 50
        assert torch.allclose(model(changed)[:, :t], logits[:, :t], atol=1e-5)
        assert not torch.allclose(model(changed)[:, t], logits[:, t], atol=1e-2)


def test_in_gpt2_the_place_itself_matters_and_the_token_behind_a_place_is_the_one_given() -> None:
    model, ids = random_model(GPT2), some_ids()
    assert torch.equal(model(ids, positions=torch.arange(12)[None]), model(ids))
    moved = model(ids, positions=torch.arange(12)[None].expand(2, -1) + 8)
    assert not torch.allclose(moved, model(ids), atol=1e-2)
    with torch.no_grad():  # as if the vectors of these places were the first ones
        model.model.embed_positions.weight[:12] = model.model.embed_positions.weight[8:].clone()
    assert torch.allclose(model(ids), moved, atol=1e-5)


def test_order_matters_but_only_distance_does() -> None:
    model, ids = random_model(), some_ids()
    swapped = ids[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(model(swapped)[:, -1], model(ids)[:, -1], atol=1e-3)
    moved = torch.arange(12)[None].expand(2, -1) + 8  # all of it 8 places later: rotary positions are relative
    assert torch.allclose(model(ids, positions=moved), model(ids), atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["qwen3", "gpt2"])
def test_rows_padded_on_the_left_read_the_same_with_their_mask_and_positions(config: GPTConfig) -> None:
    model, ids = random_model(config), some_ids(1, 7)
    alone = model(ids)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    real = torch.tensor([[False] * 4 + [True] * 7])
    mask = (real[:, None, None, :] & torch.ones(11, 11, dtype=torch.bool).tril()) | torch.eye(11, dtype=torch.bool)
    positions = (torch.arange(11) - 4).clamp(min=0)[None]
    assert torch.allclose(model(padded, mask, positions)[:, 4:], alone, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["qwen3", "gpt2"])
def test_a_block_mask_keeps_two_texts_in_one_row_apart(config: GPTConfig) -> None:
    model, first, second = random_model(config), some_ids(1, 5, 2), some_ids(1, 6, 3)
    row = torch.cat([first, second], dim=1)
    text = torch.tensor([0] * 5 + [1] * 6)
    mask = ((text[:, None] == text[None, :]) & torch.ones(11, 11, dtype=torch.bool).tril())[None, None]
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    logits = model(row, mask, positions)
    assert torch.allclose(logits[:, :5], model(first), atol=1e-4)
    assert torch.allclose(logits[:, 5:], model(second), atol=1e-4)


def test_rotation_keeps_lengths_and_turns_products_with_distance() -> None:
    cos, sin = rotary_tables(CONFIG, 20)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, generator=g), torch.randn(6, generator=g)
    turned_q, turned_k = (rotate(x.expand(1, 1, 20, 6), cos, sin)[0, 0] for x in (q, k))
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(20), atol=1e-5)
    products = turned_q @ turned_k.T
    for distance in range(-19, 20):
        along = products.diagonal(distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    # by complex numbers, as the paper has it: pair (i, i + 3) turns by position * theta^(-2i/6)
    as_complex = torch.complex(q[:3], q[3:])
    angles = 7.0 * CONFIG.rope_theta ** (-torch.arange(3) * 2 / 6)
    expected = as_complex * torch.polar(torch.ones(3), angles)
    assert torch.allclose(turned_q[7], torch.cat([expected.real, expected.imag]), atol=1e-5)


def test_a_new_model_is_the_identity_between_embedding_and_head() -> None:
    model = GPT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = some_ids()
    embedded = model.model.embed_tokens(ids)
    normed = embedded * torch.rsqrt((embedded**2).mean(-1, keepdim=True) + CONFIG.rms_norm_eps)
    assert torch.allclose(model(ids), normed @ model.model.embed_tokens.weight.T, atol=1e-5)


def test_a_new_gpt2_is_the_identity_too_and_its_biases_are_zero() -> None:
    model = GPT(GPT2)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = some_ids()
    x = model.model.embed_tokens(ids) + model.model.embed_positions.weight[:12]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + GPT2.rms_norm_eps).sqrt()
    assert torch.allclose(model(ids), normed @ model.model.embed_tokens.weight.T, atol=1e-5)
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith(".bias"))
    assert model.model.embed_positions.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_initialisation_is_a_function_of_the_generator_alone() -> None:
    wide = replace(CONFIG, hidden_size=192, intermediate_size=384, num_hidden_layers=1)
    models = [GPT(wide) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(seed * 17 + id(model) % 1000)  # whatever the global generator is at
        model.init_weights(torch.Generator().manual_seed(seed))
    a, b, c = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(
        a["model.embed_tokens.weight"], c["model.embed_tokens.weight"]
    )
    up = a["model.layers.0.mlp.up_proj.weight"]
    assert up.std().item() == pytest.approx(192**-0.5, rel=0.03) and up.abs().max() <= (3 / 192) ** 0.5
    assert a["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(("arch", "tied"), [("qwen3", True), ("qwen3", False), ("llama", True)])
def test_parameters_are_counted_once(arch: str, tied: bool) -> None:
    config = replace(CONFIG, arch=arch, tie_word_embeddings=tied)  # type: ignore[arg-type]
    c, heads, kv = 24, 4 * 6, 2 * 6
    per_layer = c * heads * 2 + c * kv * 2 + 3 * c * 40 + 2 * c + (2 * 6 if arch == "qwen3" else 0)
    assert GPT(config).n_params() == 50 * c * (1 if tied else 2) + 2 * per_layer + c


def test_parameters_of_gpt2_are_those_that_its_paper_counts() -> None:
    small = GPTConfig("gpt2", 50257, 768, 12, 12, 12, 64, 3072, 1024)
    with torch.device("meta"):
        assert GPT(small).n_params() == 124_439_808


def test_a_tied_head_is_the_embedding_and_stays_so() -> None:
    model = random_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.load_state_dict(random_model(seed=2).state_dict())
    model(some_ids()).sum().backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not {n for n in model.state_dict() if n.endswith((".cos", ".sin"))}


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_gradients_agree_with_finite_differences_in_double_precision(arch: str) -> None:
    tiny = replace(CONFIG, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                   head_dim=4, intermediate_size=5, vocab_size=7)  # fmt: skip
    if arch == "gpt2":
        tiny = replace(tiny, arch="gpt2", hidden_size=8, num_key_value_heads=2)
    model = random_model(tiny).double()
    ids = torch.tensor([[1, 3, 2, 6]])
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.model.run(x), (embedded,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocab_size": 0}, {"hidden_size": -3}, {"num_hidden_layers": 0}, {"num_attention_heads": 0},
        {"num_key_value_heads": 0}, {"num_key_value_heads": 3}, {"head_dim": 7}, {"intermediate_size": 0},
        {"max_position_embeddings": 0}, {"mlp_bias": True},
    ],
)  # fmt: skip
def test_a_shape_that_cannot_be_is_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_key_value_heads": 2}, r"num_key_value_heads is 2, in gpt2 it must be num_attention_heads \(4\)"),
        ({"head_dim": 8}, "head_dim is 8, in gpt2 it must be hidden_size / num_attention_heads"),
        ({"attention_bias": True}, "gpt2 always has biases"),
        ({"rope_scaling": RopeScaling()}, "never rotary"),
    ],
)
def test_what_gpt2_cannot_have_is_refused_with_the_reason(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        replace(GPT2, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"factor": 0.5}, {"low_freq_factor": 4.0}, {"low_freq_factor": 0.0}, {"original_max_position_embeddings": 0}],
)
def test_a_stretching_that_cannot_be_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RopeScaling(**wrong)  # type: ignore[arg-type]


def test_stretching_slows_what_turns_less_than_once_and_leaves_what_turns_often() -> None:
    scaling = RopeScaling(8.0, 1.0, 4.0, 100)
    plain, stretched = (rotary_angles(64, 5000.0, 2, s)[1].double() for s in (None, scaling))
    turns = plain * 100 / (2 * math.pi)  # within the original context
    assert torch.allclose(stretched[turns >= 4], plain[turns >= 4], rtol=1e-6)
    assert torch.allclose(stretched[turns <= 1], plain[turns <= 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.sum() >= 4 and (turns <= 1).sum() >= 4
    assert bool((stretched < plain)[between].all() and (stretched > plain / 8)[between].all())


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["qwen3", "gpt2"])
def test_a_text_longer_than_the_context_is_refused(config: GPTConfig) -> None:
    model = random_model(config)
    assert model(some_ids(1, 20)).shape == (1, 20, 50)
    with pytest.raises(ConfigError, match="21 tokens do not fit a context of 20"):
        model(some_ids(1, 21))
