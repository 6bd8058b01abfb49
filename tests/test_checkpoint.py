"""Checkpoint folders: whole or absent, the same bytes for the same weights, and no trust in any file."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stateofgpt.errors import CheckpointError, RunError
from stateofgpt.model.checkpoint import load_model, load_reward, read_lineage, save_checkpoint, verify
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.text.tokenizer import Tokenizer

CONFIG = GPTConfig(
    vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, intermediate_size=48, max_position_embeddings=32,
)  # fmt: skip
POINTS = ("begin", "files", "before_manifest", "before_rename", "between_renames", "renamed")
# Saves a checkpoint of seed argv[3] at argv[1] with the tokenizer of argv[2], in a process that may die.
SAVER = """
import sys
sys.path.insert(0, sys.argv[4])
from test_checkpoint import save, some_model
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.errors import RunError
try:
    save(sys.argv[1], some_model(int(sys.argv[3])), Tokenizer.load(sys.argv[2]))
except RunError as failure:
    sys.exit(f"RunError: {failure}")
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["the quick brown fox jumps over the lazy dog " * 30]), 290)


def some_model(seed: int = 0) -> GPT:
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2, generator=generator)
    return model


def save(path: Path | str, model: torch.nn.Module, tokenizer: Tokenizer, stage: str = "sft", **more: Any) -> Any:
    return save_checkpoint(path, model, tokenizer=tokenizer, stage=stage, run="laptop", **more)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def in_a_process(
    path: Path, tokenizer_at: Path, seed: int, program: str = SAVER, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-c", program, str(path), str(tokenizer_at), str(seed), str(Path(__file__).parent)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer, tied: bool) -> None:
    model = GPT(GPTConfig(**{**vars(CONFIG), "tie_word_embeddings": tied}))
    save(tmp_path / "c", model, tokenizer)
    loaded = load_model(tmp_path / "c")
    assert same(model, loaded) and loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert Tokenizer.load(tmp_path / "c").sha256 == tokenizer.sha256


def test_a_reward_model_is_loaded_bit_for_bit_and_kept_apart_from_language_models(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    reward = RewardModel(some_model(), tokenizer.pad)
    save(tmp_path / "r", reward, tokenizer, "reward")
    save(tmp_path / "c", some_model(), tokenizer)
    assert same(reward, load_reward(tmp_path / "r")) and load_reward(tmp_path / "r").pad_id == tokenizer.pad
    with pytest.raises(CheckpointError, match="is a reward model"):
        load_model(tmp_path / "r")
    with pytest.raises(CheckpointError, match="is a language model"):
        load_reward(tmp_path / "c")
    with pytest.raises(CheckpointError, match="ValueModel"):
        save(tmp_path / "v", ValueModel(reward), tokenizer)


def test_the_same_weights_give_the_same_file_whenever_and_wherever(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = save(tmp_path / "a", some_model(), tokenizer, metrics={"loss": 1.0})
    second = save(tmp_path / "elsewhere" / "b", some_model(), tokenizer, metrics={"loss": 2.0})
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "elsewhere" / "b" / name).read_bytes()
    assert first.id == second.id
    assert save(tmp_path / "c", some_model(1), tokenizer).id != first.id


def test_the_folder_is_a_hugging_face_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path / "c", some_model(), tokenizer, "pretrain", metrics={"val_bpb": 1.5, "bad": float("nan")})
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "chat_template.jinja", "README.md", "MANIFEST.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["dtype"] == "float32" and "auto_map" not in config
    assert config["eos_token_id"] == tokenizer.eot
    assert "lm_head.weight" not in load_file(tmp_path / "c" / "model.safetensors")
    card = (tmp_path / "c" / "README.md").read_text()
    assert card.startswith("---\nlicense: ") and "val_bpb | 1.5" in card


def test_lineage_names_the_parents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    base = save(tmp_path / "base", some_model(), tokenizer, "pretrain")
    sft = save(tmp_path / "sft", some_model(1), tokenizer, parents=[tmp_path / "base"], metrics={"loss": 0.5})
    reward = RewardModel(some_model(2), tokenizer.pad)
    save(tmp_path / "rm", reward, tokenizer, "reward", parents=[tmp_path / "sft"])
    rl = save(tmp_path / "rl", some_model(3), tokenizer, "rl", parents=[tmp_path / "sft", tmp_path / "rm"])
    assert base.parents == () and sft.parents[0].id == base.id and sft.metrics == {"loss": 0.5}
    assert [p.name for p in rl.parents] == ["laptop:sft", "laptop:reward"]
    assert read_lineage(tmp_path / "rl") == rl and rl.created.startswith("20")
    assert len({base.id, sft.id, rl.id}) == 3


def test_loading_does_not_move_the_random_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path / "c", some_model(), tokenizer)
    before = torch.get_rng_state()
    load_model(tmp_path / "c")
    assert torch.equal(before, torch.get_rng_state())


# -------------------------------------------------------------------------------------------------------- durability


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_in_a_save_the_folder_is_the_old_or_the_new_one(
    tmp_path: Path, tokenizer: Tokenizer, point: str
) -> None:
    at, old, new = tmp_path / "c", some_model(0), some_model(1)
    save(at, old, tokenizer)
    assert in_a_process(at, at, 1, SOG_CRASH_AT=f"save:{point}@/c").returncode == 137
    verify(at)
    assert same(load_model(at), new if point == "renamed" else old)
    save(at, some_model(2), tokenizer)
    assert same(load_model(at), some_model(2))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.slow
def test_killed_in_a_first_save_there_is_no_checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tok")
    assert in_a_process(tmp_path / "c", tmp_path / "tok", 1, SOG_CRASH_AT="save:before_rename").returncode == 137
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "c")


def test_a_full_disk_is_told_with_the_bytes_needed_and_the_old_folder_stays(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c", some_model(0), tokenizer)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(RunError, match=r"disk full: saving .* needs [\d,]{7,} bytes and 1,000 are free"):
        save(tmp_path / "c", some_model(1), tokenizer)
    assert same(load_model(tmp_path / "c"), some_model(0))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.slow
def test_a_disk_that_fills_during_the_save_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path / "c", some_model(0), tokenizer)
    size = (tmp_path / "c" / "model.safetensors").stat().st_size
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n{SAVER}"
    result = in_a_process(tmp_path / "c", tmp_path / "c", 1, program)
    assert "RunError: disk full" in result.stderr, result.stderr
    assert same(load_model(tmp_path / "c"), some_model(0))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path / "c", some_model(0), tokenizer)
    broken = some_model(1)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN"):
        save(tmp_path / "c", broken, tokenizer)
    assert same(load_model(tmp_path / "c"), some_model(0))


# ------------------------------------------------------------------------------------------------------------- trust


def test_one_flipped_byte_in_any_file_is_found_and_the_file_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path / "c", some_model(), tokenizer)
    for file in sorted((tmp_path / "c").iterdir()):
        if file.name == "MANIFEST.json":
            continue
        good = file.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        for tampered in (bytes(bad), good[:-1], good + b" ", None):
            if tampered is None:
                file.unlink()
            else:
                file.write_bytes(tampered)
            with pytest.raises(CheckpointError, match=file.name):
                load_model(tmp_path / "c")
        file.write_bytes(good)
    load_model(tmp_path / "c")


@pytest.mark.parametrize("path", ["nowhere", "a_file", "empty", "nul\0"])
def test_what_is_no_checkpoint_is_said_in_one_sentence(tmp_path: Path, path: str) -> None:
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "empty").mkdir()
    for read in (load_model, load_reward, read_lineage, verify):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            read(tmp_path / path)


class Canary:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("canary",))


def header(entries: Any, body: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


CRAFTED: dict[str, Callable[[], bytes]] = {
    "a pickle by another name": lambda: pickle.dumps(Canary()),
    "an empty file": lambda: b"",
    "a header of 2^63 bytes": lambda: struct.pack("<Q", 1 << 63) + b"{}",
    "a header as long as a 64 MB file": lambda: struct.pack("<Q", (64 << 20) - 8) + b" " * ((64 << 20) - 8),
    "a header that is no JSON": lambda: header(b"\x80\x02]" * 9),
    "a header nested without end": lambda: header(b"[" * 200_000),
    "a header that is a list": lambda: header([1, 2]),
    "an entry that is a number": lambda: header({"a": 5}),
    "overlapping tensors": lambda: header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
    "a gap between tensors": lambda: header({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, b"\0" * 16),
    "a shape that overflows 64 bits": lambda: header({"a": entry([1 << 40, 1 << 24, 2], 0, 8)}, b"\0" * 8),
    "a shape of a hundred thousand numbers": lambda: header({"a": entry([(1 << 47)] * 50_000, 0, 8)}, b"\0" * 8),
    "a negative shape": lambda: header({"a": entry([-1], 0, 4)}, b"\0" * 4),
    "an offset backwards": lambda: header({"a": entry([1], 8, 4)}, b"\0" * 8),
    "a shape of booleans": lambda: header({"a": entry([True], 0, 4)}, b"\0" * 4),
    "tensors longer than the file": lambda: header({"a": entry([1 << 30], 0, 4 << 30)}, b"\0" * 8),
    "an unknown type": lambda: header({"a": entry([1], 0, 4, "PICKLE")}, b"\0" * 4),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_weights_file_is_refused_without_memory_or_running_anything(
    tmp_path: Path, tokenizer: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign(tmp_path, tokenizer, weights=CRAFTED[name]())
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            load_model(tmp_path / "c")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_before < 100 << 10  # kilobytes
    assert "model.safetensors" in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "canary").exists()


def foreign(tmp_path: Path, tokenizer: Tokenizer, weights: bytes | None = None, **config: Any) -> Path:
    """A folder as other software writes it: no manifest, and whatever the caller wants in it."""
    at = tmp_path / "c"
    save(at, some_model(), tokenizer)
    (at / "MANIFEST.json").unlink()
    if weights is not None:
        (at / "model.safetensors").write_bytes(weights)
    raw = json.loads((at / "config.json").read_text()) | config
    (at / "config.json").write_text(json.dumps(raw))
    return at


def test_a_foreign_folder_without_a_manifest_loads_and_is_its_own_beginning(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    at = foreign(tmp_path, tokenizer)
    assert same(load_model(at), some_model())
    assert read_lineage(at).stage == "imported" and read_lineage(at).parents == ()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": []}, "architecture"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, r"lacks tensors: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 0.5, "low_freq_factor": 1, "high_freq_factor": 4}},
            "factor",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq",
        ),
        ({"rope_scaling": 5}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}, "rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "larger than the weights"),
        ({"hidden_size": 2**30}, "larger than the weights"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "larger than the weights"),
        ({"max_position_embeddings": 2**30}, "max_position_embeddings"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_hidden_layers": 3}, "lacks tensors: model.layers.2"),
        ({"num_hidden_layers": 1}, "holds unknown tensors: model.layers.1"),
        ({"tie_word_embeddings": False}, "lacks tensors: lm_head.weight"),
        ({"intermediate_size": 47}, "mlp.down_proj.weight has shape"),
    ],
)
def test_a_config_that_is_not_this_model_is_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, config: dict[str, Any], reason: str
) -> None:
    at = foreign(tmp_path, tokenizer, **config)
    with pytest.raises(CheckpointError, match=reason):
        load_model(at)


def test_weights_with_nan_or_of_integers_are_refused_by_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    at = foreign(tmp_path, tokenizer)
    good = load_file(at / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for bad in (good[name].index_fill(0, torch.tensor([2]), float("inf")), torch.zeros_like(good[name]).int()):
        save_file({**good, name: bad}, at / "model.safetensors")
        with pytest.raises(CheckpointError, match=name):
            load_model(at)


def test_pickled_weights_are_refused_and_never_opened(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    at = foreign(tmp_path, tokenizer)
    (at / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_model(at)
    (at / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        load_model(at)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "absent.safetensors", "config.json"])
def test_an_index_or_a_manifest_cannot_point_outside_its_folder(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    at = foreign(tmp_path, tokenizer)
    (at / "model.safetensors").rename(tmp_path / "out.safetensors")
    (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="index"):
        load_model(at)
    (at / "MANIFEST.json").write_text(json.dumps({"files": {"../out.safetensors": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match="names no file of its folder"):
        load_model(at)
