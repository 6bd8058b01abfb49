"""Folders of model weights as other software writes them: names, layouts and leftovers of every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stateofgpt.errors import CheckpointError
from stateofgpt.model import convert, layout
from stateofgpt.model.checkpoint import asked_dropout, load_model, load_reward, save_checkpoint
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel
from stateofgpt.text.tokenizer import Tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "intermediate_size": 48, "max_position_embeddings": 24,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPTConfig("gpt2", num_key_value_heads=4, **SIZES),
    "llama": GPTConfig("llama", num_key_value_heads=2, attention_bias=True, mlp_bias=True, **SIZES),
    "qwen3": GPTConfig("qwen3", num_key_value_heads=2, **SIZES),
}
PREFIX = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model."}
EMBEDDING = {
    "gpt2": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
    "qwen3": "model.embed_tokens.weight",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["the quick brown fox jumps over the lazy dog " * 30]), 290)


def some_model(arch: str) -> GPT:
    model, generator = GPT(CONFIGS[arch]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2, generator=generator)
    return model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def foreign(at: Path, model: torch.nn.Module, tokenizer: Tokenizer, **config: Any) -> dict[str, Tensor]:
    """A folder without a manifest, `config` in its config.json; returns the tensors of its file."""
    save_checkpoint(at, model, tokenizer=tokenizer, stage="sft", run="laptop")
    (at / "MANIFEST.json").unlink()
    raw = json.loads((at / "config.json").read_text()) | config
    (at / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "left out"}))
    tensors: dict[str, Tensor] = load_file(at / "model.safetensors")
    return tensors


def write(at: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, at / "model.safetensors")


def test_a_gpt2_is_stored_under_the_names_and_in_the_shapes_of_openai(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = some_model("gpt2")
    stored = foreign(tmp_path / "c", model, tokenizer)
    block = {
        "ln_1.weight": [32], "ln_1.bias": [32], "attn.c_attn.weight": [32, 96], "attn.c_attn.bias": [96],
        "attn.c_proj.weight": [32, 32], "attn.c_proj.bias": [32], "ln_2.weight": [32], "ln_2.bias": [32],
        "mlp.c_fc.weight": [32, 48], "mlp.c_fc.bias": [48], "mlp.c_proj.weight": [48, 32], "mlp.c_proj.bias": [32],
    }  # fmt: skip
    whole = {"wte.weight": [320, 32], "wpe.weight": [24, 32], "ln_f.weight": [32], "ln_f.bias": [32]}
    whole |= {f"h.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert {name: list(t.shape) for name, t in stored.items()} == {f"transformer.{n}": s for n, s in whole.items()}
    attn = model.model.layers[1].self_attn
    for third, part in enumerate((attn.q_proj, attn.k_proj, attn.v_proj)):
        columns = slice(32 * third, 32 * (third + 1))
        assert torch.equal(stored["transformer.h.1.attn.c_attn.weight"][:, columns], part.weight.t())
        assert torch.equal(stored["transformer.h.1.attn.c_attn.bias"][columns], part.bias)
    raw = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (raw["architectures"], raw["n_embd"], raw["n_inner"], raw["n_positions"]) == (
        ["GPT2LMHeadModel"],
        32,
        48,
        24,
    )
    assert "context: 24 tokens" in (tmp_path / "c" / "README.md").read_text()


@pytest.mark.parametrize("arch", CONFIGS)
def test_what_is_saved_is_loaded_bit_for_bit(arch: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = some_model(arch)
    save_checkpoint(tmp_path / "c", model, tokenizer=tokenizer, stage="sft", run="laptop")
    loaded = load_model(tmp_path / "c")
    assert same(loaded, model) and loaded.config == model.config
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    reward = RewardModel(model, tokenizer.pad)
    save_checkpoint(tmp_path / "r", reward, tokenizer=tokenizer, stage="reward", run="laptop")
    assert same(load_reward(tmp_path / "r"), reward)


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_trunk_saved_without_its_prefix_and_old_constants_beside_it_load(
    arch: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = some_model(arch)
    stored = foreign(tmp_path / "c", model, tokenizer)
    bare = {name.removeprefix(PREFIX[arch]): t for name, t in stored.items()}
    extra = {
        "gpt2": {
            "h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.uint8),
            "transformer.h.1.attn.bias": torch.ones(24, 24).tril().bool(),
            "h.0.attn.masked_bias": torch.tensor(float("-inf")),
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "rotary_emb.inv_freq": torch.ones(4)},
        "qwen3": {"layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    }[arch]
    write(tmp_path / "c", bare | extra)
    assert same(load_model(tmp_path / "c"), model)
    write(tmp_path / "c", stored | extra)
    assert same(load_model(tmp_path / "c"), model)


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_constant_of_another_architecture_is_an_unknown_tensor(
    arch: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    stored = foreign(tmp_path / "c", some_model(arch), tokenizer)
    name = "model.rotary_emb.inv_freq" if arch == "gpt2" else "h.0.attn.bias"
    write(tmp_path / "c", {**stored, name: torch.ones(4)})
    with pytest.raises(CheckpointError, match=f"holds unknown tensors: {name}"):
        load_model(tmp_path / "c")


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_tied_head_that_is_stored_must_be_the_embedding(arch: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = some_model(arch)
    stored = foreign(tmp_path / "c", model, tokenizer)
    embedding = stored[EMBEDDING[arch]]
    write(tmp_path / "c", {**stored, "lm_head.weight": embedding.clone()})
    assert same(load_model(tmp_path / "c"), model)
    for wrong in (embedding.clone().index_fill_(0, torch.tensor([7]), 0.5), embedding[:-1].clone()):
        write(tmp_path / "c", {**stored, "lm_head.weight": wrong})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight (is not the embedding|has shape)"):
            load_model(tmp_path / "c")


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_head_beside_a_reward_model_is_an_unknown_tensor(arch: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    stored = foreign(tmp_path / "r", RewardModel(some_model(arch), tokenizer.pad), tokenizer)
    for name in ("lm_head.weight", "score.bias"):
        write(tmp_path / "r", {**stored, name: stored[EMBEDDING[arch]].clone()})
        with pytest.raises(CheckpointError, match=f"holds unknown tensors: {name}"):
            load_reward(tmp_path / "r")


def test_a_tensor_with_and_without_its_prefix_is_there_twice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stored = foreign(tmp_path / "c", some_model("gpt2"), tokenizer)
    write(tmp_path / "c", {**stored, "ln_f.bias": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"holds tensor transformer\.ln_f\.bias a second time"):
        load_model(tmp_path / "c")


CHANGED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    r"lacks tensors: transformer\.h\.1\.mlp\.c_fc\.bias": lambda t: {
        k: v for k, v in t.items() if "1.mlp.c_fc.b" not in k
    },
    r"holds unknown tensors: transformer\.h\.2\.ln_1\.weight": lambda t: {
        **t, "transformer.h.2.ln_1.weight": torch.ones(32)
    },
    r"attn\.c_attn\.weight has shape \[96, 32\], config\.json asks for \[32, 96\]": lambda t: {
        k: v.t() if "0.attn.c_attn.weight" in k else v for k, v in t.items()
    },
    r"transformer\.wpe\.weight holds NaN": lambda t: t | {"transformer.wpe.weight": torch.full((24, 32), torch.nan)},
}  # fmt: skip


@pytest.mark.parametrize("reason", CHANGED)
def test_weights_of_a_gpt2_that_are_not_the_models_are_refused_by_name(
    reason: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    stored = foreign(tmp_path / "c", some_model("gpt2"), tokenizer)
    write(tmp_path / "c", CHANGED[reason](stored))
    with pytest.raises(CheckpointError, match=reason):
        load_model(tmp_path / "c")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel"),
        ({"activation_function": "gelu"}, "activation_function = gelu, this model only knows gelu_new or"),
        ({"activation_function": ["relu"]}, "activation_function"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_embd": 33}, "n_embd = 33, which must be a multiple of n_head"),
        ({"n_embd": "32"}, "n_embd"),
        ({"n_embd": 2**30}, "larger than the weights"),
        ({"n_layer": 10**9}, "larger than the weights"),
        ({"n_positions": 2**30}, "more positions than the weights"),
        ({"n_positions": 25}, r"wpe\.weight has shape"),
        ({"n_head": 0}, "n_head"),
        ({"n_inner": 0}, "n_inner"),
        ({"n_inner": None}, r"mlp\.c_fc\.bias has shape \[48\], config\.json asks for \[128\]"),
        ({"vocab_size": "left out"}, "vocab_size = None"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        ({"n_layer": 3}, r"lacks tensors: transformer\.h\.2"),
        ({"n_layer": 1}, r"holds unknown tensors: transformer\.h\.1"),
        ({"tie_word_embeddings": False}, "lacks tensors: lm_head.weight"),
    ],
)
def test_a_gpt2_config_that_is_not_this_model_is_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, config: dict[str, Any], reason: str
) -> None:
    foreign(tmp_path / "c", some_model("gpt2"), tokenizer, **config)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_model(tmp_path / "c")
    assert len(str(caught.value)) < 500


def test_the_config_of_the_first_gpt2_is_read_with_its_defaults(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As openai-community/gpt2 has it: n_ctx beside n_positions, no n_inner, no tie_word_embeddings, dropout, tasks."""
    wide = GPT(GPTConfig("gpt2", num_key_value_heads=4, rms_norm_eps=1e-5, **{**SIZES, "intermediate_size": 128}))
    left_out = dict.fromkeys(
        ("n_inner", "tie_word_embeddings", "pad_token_id", "dtype", "activation_function"), "left out"
    )
    more = {
        "n_ctx": 24, "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02,
        "summary_type": "cls_index", "task_specific_params": {"text-generation": {"do_sample": True}},
    }  # fmt: skip
    foreign(tmp_path / "c", wide, tokenizer, **more, **left_out)
    assert load_model(tmp_path / "c").config == wide.config


@pytest.mark.parametrize(
    ("arch", "config", "asked"),
    [
        ("gpt2", {"attn_pdrop": 0.2, "embd_pdrop": 0, "resid_pdrop": 0.0}, {"attn_pdrop": 0.2}),
        ("gpt2", dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), "left out"),
         {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
        ("llama", {"attention_dropout": 0.5}, {"attention_dropout": 0.5}),
        ("qwen3", {"attention_dropout": "left out"}, {}),
    ],
)  # fmt: skip
def test_dropout_in_a_config_is_told_and_changes_nothing_of_the_model(
    arch: str, config: dict[str, Any], asked: dict[str, float], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = some_model(arch)
    foreign(tmp_path / "c", model, tokenizer, **config)
    assert asked_dropout(tmp_path / "c") == asked
    loaded, ids = load_model(tmp_path / "c").train(), torch.arange(20)[None]
    assert torch.equal(loaded(ids), model.eval()(ids))
    save_checkpoint(tmp_path / "again", loaded, tokenizer=tokenizer, stage="sft", run="r", parents=[tmp_path / "c"])
    assert asked_dropout(tmp_path / "again") == {}


def test_what_transformers_takes_for_dropout_where_nothing_is_said() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = {
        "gpt2": transformers.GPT2Config(),
        "llama": transformers.LlamaConfig(),
        "qwen3": transformers.Qwen3Config(),
    }
    for arch, keys in convert._DROPOUT.items():
        assert {key: getattr(theirs[arch], key) for key in keys} == keys


@pytest.mark.parametrize("value", [1.0, -0.1, True, "0.1", float("nan")])
def test_a_dropout_that_is_no_share_is_refused(value: object, tmp_path: Path, tokenizer: Tokenizer) -> None:
    foreign(tmp_path / "c", some_model("gpt2"), tokenizer, embd_pdrop=value)
    with pytest.raises(CheckpointError, match="embd_pdrop"):
        load_model(tmp_path / "c")


def test_an_older_llama3_config_is_read_with_its_scaling(tmp_path: Path, tokenizer: Tokenizer) -> None:
    older = {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 12}
    for written in ({"rope_type": "llama3"}, {"type": "llama3"}):
        foreign(tmp_path / "c", some_model("llama"), tokenizer, rope_parameters="left out", rope_theta=5e5,
                rope_scaling=older | written)  # fmt: skip
        config = load_model(tmp_path / "c").config
        assert config.rope_theta == 5e5 and config.rope_scaling is not None
        assert vars(config.rope_scaling) == older
    foreign(tmp_path / "c", some_model("llama"), tokenizer, rope_scaling={"type": "default"})
    assert load_model(tmp_path / "c").config.rope_scaling is None


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_tensor_of_a_model_has_exactly_one_place_in_a_file(arch: str) -> None:
    own = layout.own_tensors(some_model(arch), CONFIGS[arch])
    parts = [part for place in layout.places(CONFIGS[arch], own).values() for part in place.parts]
    assert sorted(parts) == sorted(own) and len(parts) == len(set(parts))
