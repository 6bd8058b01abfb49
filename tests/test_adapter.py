"""Adapter folders: what PEFT writes is read, what is written PEFT reads, and nothing in a folder is taken on trust."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stateofgpt.errors import CheckpointError
from stateofgpt.model.adapter import load_adapter, save_adapter
from stateofgpt.model.checkpoint import load_model, load_reward, read_lineage, save_checkpoint, verify
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.model.lora import LoraConfig, adapters, add_lora, lora_state_dict, merge
from stateofgpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow  # together they take long

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SHAPES = {
    "qwen3": GPTConfig(
        vocab_size=320, hidden_size=50, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=14, intermediate_size=77, max_position_embeddings=33, tie_word_embeddings=False,
    ),
    "llama": GPTConfig(
        arch="llama", vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, max_position_embeddings=33,
    ),
}  # fmt: skip
LORA = LoraConfig(r=3, alpha=6.0)
CONFIGS = {
    "plain": LORA,
    "rank-stabilised, fractional alpha": LoraConfig(r=5, alpha=2.5, use_rslora=True),
    "two names": LoraConfig(r=2, alpha=7.0, target_modules=("self_attn.v_proj", "down_proj")),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["the quick brown fox jumps over the lazy dog " * 30]), 290)


def some_model(shape: str = "llama") -> GPT:
    model, g = GPT(SHAPES[shape]), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.3 if p.ndim == 1 else 0.15, generator=g)
    return model


def some_ids() -> Tensor:
    return torch.randint(4, 320, (3, 30), generator=torch.Generator().manual_seed(8))


def adapted(model: nn.Module, config: LoraConfig = LORA) -> Any:
    add_lora(model, config, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.weight.normal_(std=0.2, generator=g)
    return model


def save(path: Path, model: nn.Module, base: Path, config: LoraConfig = LORA, **more: Any) -> Any:
    return save_adapter(path, model, config, base=base, stage="sft", run="laptop", **more)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """The checkpoint that adapters are made on. Look, do not touch."""
    return based(tmp_path_factory.mktemp("made") / "base", tokenizer, some_model())


def based(path: Path, tokenizer: Tokenizer, model: nn.Module, stage: str = "pretrain") -> Path:
    save_checkpoint(path, model, tokenizer=tokenizer, stage=stage, run="laptop")
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_saved_is_loaded_bit_for_bit(config: LoraConfig, tmp_path: Path, base: Path) -> None:
    model = adapted(some_model(), config)
    save(tmp_path / "a", model, base, config)
    loaded = load_model(base)
    found = load_adapter(tmp_path / "a", loaded, base=base)
    assert (found.r, found.alpha, found.scale) == (config.r, config.alpha, config.scale)
    assert set(found.target_modules) == set(config.target_modules)
    assert same(lora_state_dict(loaded), lora_state_dict(model))
    assert torch.equal(loaded(some_ids()), model(some_ids()))


def test_a_reward_models_head_travels_with_its_adapter(tmp_path: Path, base: Path) -> None:
    model = adapted(RewardModel(some_model(), 3))
    with torch.no_grad():
        model.score.weight.mul_(-2.0)
    save(tmp_path / "a", model, base)
    fresh = RewardModel(load_model(base), 3)
    load_adapter(tmp_path / "a", fresh, base=base)
    assert torch.equal(fresh(some_ids()), model(some_ids()))
    with pytest.raises(CheckpointError, match="task_type = SEQ_CLS, a GPT takes CAUSAL_LM"):
        load_adapter(tmp_path / "a", load_model(base))


def test_the_folder_is_pefts_with_a_manifest_and_the_base_as_parent(tmp_path: Path, base: Path) -> None:
    lineage = save(tmp_path / "a", adapted(some_model()), base, metrics={"val_loss": float("nan"), "steps": 3})
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "MANIFEST.json"}
    parent = read_lineage(base)
    assert [(p.id, p.name) for p in lineage.parents] == [(parent.id, "laptop:pretrain")]
    assert lineage.name == "laptop:sft" and lineage.metrics == {"val_loss": None, "steps": 3}
    verify(tmp_path / "a")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        tmp_path / "a" / "adapter_model.safetensors"
    )


def test_the_same_adapter_gives_the_same_files_and_the_same_id(tmp_path: Path, base: Path) -> None:
    first = save(tmp_path / "a", adapted(some_model()), base)
    merged = adapted(some_model())
    merge(merged)
    second = save(tmp_path / "b" / "c", merged, base)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / "c" / name).read_bytes()
    assert first.id == second.id
    model = adapted(some_model())
    with torch.no_grad():
        adapters(model)["model.layers.1.mlp.up_proj"].lora_B.weight[0, 0] += 1
    assert save(tmp_path / "d", model, base).id != first.id


def test_an_adapter_can_be_the_parent_of_a_checkpoint(tmp_path: Path, base: Path, tokenizer: Tokenizer) -> None:
    made = save(tmp_path / "a", adapted(some_model()), base)
    child = save_checkpoint(
        tmp_path / "m", adapted(some_model()), tokenizer=tokenizer, stage="sft", run="x", parents=[base, tmp_path / "a"]
    )
    assert [p.id for p in child.parents] == [read_lineage(base).id, made.id]


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path: Path, base: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path / "a", adapted(some_model()), base)
    other = some_model()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    elsewhere = based(tmp_path / "other", tokenizer, other, "rl")
    with pytest.raises(CheckpointError, match=r"was trained on laptop:pretrain \(\w+\), not on laptop:rl \(\w+\)"):
        load_adapter(tmp_path / "a", load_model(elsewhere), base=elsewhere)
    load_adapter(tmp_path / "a", load_model(elsewhere))  # whoever does not say which base it is decides alone


def test_an_adapter_is_no_model_and_a_model_no_adapter(tmp_path: Path, base: Path) -> None:
    save(tmp_path / "a", adapted(some_model()), base)
    for load in (load_model, load_reward):
        with pytest.raises(CheckpointError, match="is an adapter, no whole model; load its base model"):
            load(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"is no adapter: it has no adapter_config\.json"):
        load_adapter(base, some_model())
    for name in ("nowhere", "nul\0"):
        with pytest.raises(CheckpointError, match=r"no adapter at .* does not exist"):
            load_adapter(tmp_path / name, some_model())
    with pytest.raises(CheckpointError, match="ValueModel"):
        save(tmp_path / "v", adapted(ValueModel(some_model())), base)
    with pytest.raises(CheckpointError, match="ValueModel"):
        load_adapter(tmp_path / "a", ValueModel(some_model()))


def test_an_architecture_whose_layers_peft_knows_by_other_names_is_refused(tmp_path: Path, base: Path) -> None:
    model = adapted(some_model())
    model.config = SimpleNamespace(arch="gpt2")
    for use in (lambda: save(tmp_path / "a", model, base), lambda: load_adapter(foreign(tmp_path, base), model)):
        with pytest.raises(CheckpointError, match="adapters of the gpt2 architecture have no format"):
            use()


def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path, base: Path) -> None:
    model = adapted(some_model())
    with torch.no_grad():
        adapters(model)["model.layers.0.mlp.up_proj"].lora_A.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_A\.weight holds NaN"):
        save(tmp_path / "a", model, base)
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------------------------------------- trust


def test_one_changed_byte_in_any_file_is_found_and_the_file_named(tmp_path: Path, base: Path) -> None:
    save(tmp_path / "a", adapted(some_model()), base)
    for file in sorted((tmp_path / "a").iterdir()):
        if file.name == "MANIFEST.json":
            continue
        good = file.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        for tampered in (bytes(bad), good[:-1], good + b" "):
            file.write_bytes(tampered)
            with pytest.raises(CheckpointError, match=file.name):
                load_adapter(tmp_path / "a", some_model())
        file.write_bytes(good)
    load_adapter(tmp_path / "a", some_model())


def foreign(tmp_path: Path, base: Path, **config: Any) -> Path:
    """A folder as other software writes it: no manifest, and whatever the caller wants in its configuration."""
    at = tmp_path / "a"
    save(at, adapted(some_model()), base)
    (at / "MANIFEST.json").unlink()
    raw = json.loads((at / "adapter_config.json").read_text()) | config
    (at / "adapter_config.json").write_text(json.dumps(raw))
    return at


def refused(at: Path, reason: str) -> None:
    model = some_model()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_adapter(at, model)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert same(dict(model.state_dict()), before) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type = IA3, only LORA"),
        ({"use_dora": True}, "use_dora = True, which is not known here"),
        ({"bias": "lora_only"}, "bias = lora_only, only none"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"layers_pattern": "h"}, "layers_pattern = h"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"a_key_of_tomorrow": "on"}, "a_key_of_tomorrow = on"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = olora"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type = SEQ_2_SEQ_LM"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"modules_to_save": "score"}, "modules_to_save"),
        ({"target_modules": "all-linear"}, "target_modules = all-linear, expected a list"),
        ({"target_modules": ".*"}, "expected a list"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["lm_head"]}, "does not fit the model: lora cannot adapt the head lm_head"),
        ({"target_modules": ["c_attn"]}, "has no layer 'c_attn'"),
        ({"target_modules": ["q_proj"]}, "holds unknown tensors"),
        ({"r": 4}, r"lora_A\.weight has shape \[3, "),
        ({"r": 0}, "r = 0"),
        ({"r": True}, "r = True"),
        ({"r": 1 << 40}, "r = 1099511627776"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_dropout": 1.0}, "dropout is 1.0"),
        ({"lora_dropout": "much"}, "lora_dropout"),
        ({"use_rslora": 1}, "use_rslora = 1"),
    ],
)
def test_what_is_no_plain_lora_of_this_model_is_refused_in_one_sentence(
    tmp_path: Path, base: Path, config: dict[str, Any], reason: str
) -> None:
    refused(foreign(tmp_path, base, **config), reason)


def test_keys_that_ask_for_nothing_are_let_pass(tmp_path: Path, base: Path) -> None:
    off: dict[str, Any] = {"use_dora": False, "corda_config": None, "loftq_config": {}, "alora_invocation_tokens": []}
    remarks = {"peft_version": "9.9", "revision": "x", "auto_mapping": {"base_model_class": "X"}}
    at = foreign(tmp_path, base, init_lora_weights="gaussian", **off, **remarks)
    load_adapter(at, some_model())


class Canary:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("canary",))


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "one is missing": (lambda t: t.pop(NAME), "lacks tensors: base_model"),
    "one too many": (lambda t: t.update({"lora_C": torch.ones(2)}), "holds unknown tensors: lora_C"),
    "a whole module": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(320, 32)}), "lm_head"),
    "a wrong shape": (lambda t: t.update({NAME: t[NAME].t()}), "has shape"),
    "an infinity": (lambda t: t[NAME].view(-1)[0].fill_(torch.inf), "NaN or infinite"),
    "integers": (lambda t: t.update({NAME: t[NAME].int()}), "has type I32"),
    "doubles": (lambda t: t.update({NAME: t[NAME].double()}), "has type F64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_not_the_adapters_are_refused(tmp_path: Path, base: Path, change: str) -> None:
    at = foreign(tmp_path, base)
    edit, reason = CHANGES[change]
    tensors = load_file(at / "adapter_model.safetensors")
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, at / "adapter_model.safetensors")
    refused(at, reason)


def test_half_precision_is_read(tmp_path: Path, base: Path) -> None:
    at = foreign(tmp_path, base)
    tensors = {n: t.bfloat16() for n, t in load_file(at / "adapter_model.safetensors").items()}
    save_file(tensors, at / "adapter_model.safetensors")
    model = some_model()
    load_adapter(at, model)
    assert same(lora_state_dict(model), {n: t.float() for n, t in tensors.items()})


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 3) + b"[1]"]
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, base: Path, content: bytes) -> None:
    at = foreign(tmp_path, base)
    (at / "adapter_model.safetensors").write_bytes(content)
    refused(at, "adapter_model.safetensors")


def test_a_pickled_adapter_is_refused_and_never_opened(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    at = foreign(tmp_path, base)
    (at / "adapter_model.safetensors").unlink()
    refused(at, r"has no adapter_model\.safetensors")
    (at / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    refused(at, r"adapter_model\.bin is a pickle")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 99_999, b"{", b"\xff", b'{"r": ' + b"9" * 5000 + b"}"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, base: Path, content: bytes) -> None:
    at = foreign(tmp_path, base)
    (at / "adapter_config.json").write_bytes(content)
    refused(at, "adapter_config.json")


# -------------------------------------------------------------------------------------------------------------- PEFT


def theirs_of(path: Path, kind: str = "CausalLM", **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(path, dtype=torch.float32, **more)


def compare(ours: nn.Module, theirs: Any, output: Callable[[Any], Tensor]) -> None:
    """Outputs and the gradients of all that is trained are at most 1e-5 apart."""
    got, expected = ours(some_ids()), output(theirs(some_ids(), attention_mask=torch.ones(3, 30).long()))
    assert expected.std() > 0.05 and (got - expected).abs().max() <= 1e-5
    got.square().mean().backward()
    expected.square().mean().backward()
    found = {n.replace(".default", "").replace(".modules_to_save", ""): p for n, p in theirs.named_parameters()}
    own = {f"base_model.model.{n}": p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(own) >= 8
    for name, p in own.items():
        assert p.grad is not None and found[name].grad is not None, name
        assert (p.grad - found[name].grad).abs().max() <= 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_loads_what_is_written_here_and_computes_the_same(
    shape: str, config: LoraConfig, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    peft = pytest.importorskip("peft")
    base = based(tmp_path / "base", tokenizer, some_model(shape))
    ours = adapted(some_model(shape), config)
    save(tmp_path / "a", ours, base, config)
    theirs = peft.PeftModel.from_pretrained(theirs_of(base), tmp_path / "a", is_trainable=True)
    assert (ours(some_ids()) - some_model(shape)(some_ids())).abs().max() > 0.1
    compare(ours, theirs, lambda out: out.logits)
    merge(ours)
    assert (ours(some_ids()) - theirs.merge_and_unload()(some_ids()).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", [False, True])
def test_what_peft_writes_is_loaded_here_and_computes_the_same(
    shape: str, half: bool, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    peft = pytest.importorskip("peft")
    base = based(tmp_path / "base", tokenizer, some_model(shape))
    config = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=half, target_modules=["k_proj", "o_proj", "gate_proj"],
                             task_type=None if half else "CAUSAL_LM", init_lora_weights=False)  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs_of(base), config)
    theirs.save_pretrained(tmp_path / "a")
    ours = load_model(base)
    load_adapter(tmp_path / "a", ours, base=base)
    compare(ours, theirs, lambda out: out.logits)


def test_a_reward_models_adapter_goes_both_ways(tmp_path: Path, tokenizer: Tokenizer) -> None:
    peft = pytest.importorskip("peft")
    base = based(tmp_path / "base", tokenizer, RewardModel(some_model("qwen3"), tokenizer.pad), "reward")
    ours = adapted(load_reward(base))
    with torch.no_grad():
        ours.score.weight.mul_(-0.5)
    save(tmp_path / "a", ours, base)
    theirs = peft.PeftModel.from_pretrained(
        theirs_of(base, "SequenceClassification"), tmp_path / "a", is_trainable=True
    )
    compare(ours, theirs, lambda out: out.logits[:, 0])
    theirs.save_pretrained(tmp_path / "b")
    again = load_reward(base)
    load_adapter(tmp_path / "b", again)
    assert same(lora_state_dict(again), lora_state_dict(ours))
