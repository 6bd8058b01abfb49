"""A GGUF file becomes the model it was made from: weights, tokenizer and template; a bad one becomes a sentence."""

from __future__ import annotations

import json
import random
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from command import one_sentence, sog
from foreign import (
    SPECIALS,
    TEMPLATE,
    TEXTS,
    byte_level_tokenizer,
    dequantised,
    gguf_tensors,
    log_probabilities,
    rotary_pairs,
    some_ids,
    tiny_llama,
    write_gguf,
)

from stateofgpt.errors import CheckpointError, StateOfGptError
from stateofgpt.infer.score import score
from stateofgpt.interchange import gguf_header
from stateofgpt.interchange.source import import_model
from stateofgpt.model.checkpoint import load_model, read_lineage, verify

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def llama(tokenizer: Any) -> Any:
    return tiny_llama(tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, llama: Any, tokenizer: Any) -> bytes:
    """The bytes of a sound file."""
    path = tmp_path_factory.mktemp("good") / "tiny.gguf"
    write_gguf(path, llama, tokenizer, "Q8_0")
    return path.read_bytes()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, llama: Any, tokenizer: Any) -> Path:
    """The folder of an import. Look, do not touch."""
    path = tmp_path_factory.mktemp("imported") / "tiny.gguf"
    write_gguf(path, llama, tokenizer)
    return import_model(str(path), path.parent / "out")


def from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `rotary_pairs`, found by sending row numbers through it."""
    order = rotary_pairs(torch.arange(weight.shape[0], dtype=torch.float32)[:, None], heads)[:, 0].long()
    out = torch.empty_like(weight)
    out[order] = weight
    return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("storage", ["F32", "Q8_0", "Q4_1"])
def test_the_imported_model_gives_the_log_probabilities_of_its_source(
    storage: str, tied: bool, tmp_path: Path, tokenizer: Any
) -> None:
    source = tiny_llama(tokenizer.get_vocab_size(), tied=tied)
    stored = write_gguf(tmp_path / "m.gguf", source, tokenizer, storage)
    assert bool(stored) == (storage != "F32")
    heads = {"attn_q": source.config.num_attention_heads, "attn_k": source.config.num_key_value_heads}
    by_name = dict(zip(gguf_tensors(source), [p for _, p in ordered(source)], strict=True))
    with torch.no_grad():  # what quantisation left of the weights
        for name, raw in stored.items():
            values = dequantised(raw, storage, tuple(by_name[name].shape))
            kind = name.split(".")[-2]
            by_name[name].copy_(from_halves(values, heads[kind]) if kind in heads else values)
    out = import_model(str(tmp_path / "m.gguf"), tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = some_ids(tokenizer.get_vocab_size())
    expected = log_probabilities(source, ids)
    assert expected.std() > 0.3
    ours = load_model(out)
    assert (log_probabilities(theirs.eval(), ids) - expected).abs().max() <= 1e-4
    assert (log_probabilities(ours, ids) - expected).abs().max() <= 1e-4
    chosen = expected[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert (torch.tensor(score(ours, ids.tolist())) - chosen).abs().max() <= 1e-4


def ordered(model: Any) -> list[tuple[str, Any]]:
    """The parameters of a model in the order in which `gguf_tensors` names them."""
    found = dict(model.named_parameters())
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if model.config.tie_word_embeddings else ["lm_head.weight"]
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    for layer in range(model.config.num_hidden_layers):
        names += [f"model.layers.{layer}.{part}.weight" for part in parts]
    return [(name, found[name]) for name in names]


def test_the_folder_says_what_the_model_is_and_where_it_comes_from(imported: Path) -> None:
    config = json.loads((imported / "config.json").read_bytes())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 10000.0, True)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    card = (imported / "README.md").read_text()
    assert 'license: "mit"' in card and "# Tiny" in card and "tiny.gguf" in card
    verify(imported)
    lineage = read_lineage(imported)
    assert (lineage.name, lineage.stage, lineage.parents) == ("Tiny", "imported", ())


def test_the_same_file_gives_the_same_folder(imported: Path, tmp_path: Path) -> None:
    again = import_model(str(imported.parent / "tiny.gguf"), tmp_path / "again")
    for file in imported.iterdir():
        if file.name != "MANIFEST.json":
            assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    assert read_lineage(again).id == read_lineage(imported).id


def test_bfloat16_halves_the_weights(imported: Path, tmp_path: Path) -> None:
    out = import_model(str(imported.parent / "tiny.gguf"), tmp_path / "half", dtype="bfloat16")
    exact, rounded = load_model(imported).state_dict(), load_model(out).state_dict()
    assert all(torch.equal(rounded[name], exact[name].bfloat16().float()) for name in exact)
    assert (out / "model.safetensors").stat().st_size < 0.6 * (imported / "model.safetensors").stat().st_size


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_the_tokenizer_gives_the_ids_of_its_source(imported: Path, tokenizer: Any) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(imported)
    rng = random.Random(3)
    letters = "abcdef the king's 'll 0123456789 ½٣ \n\t  .,!?éß東京😀"
    texts = [*TEXTS, *("".join(rng.choice(letters) for _ in range(rng.randrange(50))) for _ in range(200))]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text).ids, text
        assert theirs.decode(ids) == text
    assert [theirs.bos_token, theirs.eos_token, theirs.unk_token] == [SPECIALS[1], SPECIALS[2], SPECIALS[0]]
    assert theirs.model_max_length == 64


def test_every_digit_is_a_token_of_its_own_only_where_the_file_says_so(
    tmp_path: Path, llama: Any, tokenizer: Any
) -> None:
    words = json.loads(tokenizer.to_str())["model"]
    vocab = dict(words["vocab"])
    last = max(vocab, key=vocab.__getitem__)
    tokens = [token if token != last else "12" for token in sorted(vocab, key=vocab.__getitem__)]
    merges = ["1 2", *(" ".join(pair) for pair in words["merges"] if last not in (*pair, "".join(pair)))]
    for pre, expected in (("smollm", ["1", "2"]), ("gpt-2", ["12"])):
        changes = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
        write_gguf(tmp_path / "m.gguf", llama, tokenizer, **changes)
        out = import_model(str(tmp_path / "m.gguf"), tmp_path / pre)
        assert transformers.AutoTokenizer.from_pretrained(out).tokenize("12") == expected


def test_special_tokens_are_declared_and_no_text_becomes_one_without_the_declaration(imported: Path) -> None:
    from tokenizers import Tokenizer

    data = json.loads((imported / "tokenizer.json").read_bytes())
    declared = [(token["content"], token["id"], token["special"]) for token in data["added_tokens"]]
    assert declared == [(name, number, True) for number, name in enumerate(SPECIALS)]
    assert data["model"]["unk_token"] is None
    twin = Tokenizer.from_str(json.dumps({**data, "added_tokens": []}))
    ids = twin.encode("<|im_end|> is ten characters<|endoftext|>").ids
    assert min(ids) >= len(SPECIALS) and twin.decode(ids) == "<|im_end|> is ten characters<|endoftext|>"


def test_the_chat_template_is_the_files_own(imported: Path, tokenizer: Any) -> None:
    assert (imported / "chat_template.jinja").read_text() == TEMPLATE
    theirs = transformers.AutoTokenizer.from_pretrained(imported)
    messages = [{"role": "user", "content": "The king?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    spoken = [tokenizer.encode(text).ids for text in ("user\nThe king?", "\n", "assistant\n")]
    assert ids == [1, *spoken[0], 2, *spoken[1], 1, *spoken[2]]


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(path: Path, *, out: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_model(str(path), out)
    assert not list(out.parent.glob(f"{out.name}*"))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architecture": "qwen2"}, "architecture 'qwen2'"),
    "a scaled rope": ({"llama.rope.scaling.type": "linear"}, "rope.scaling.type"),
    "experts": ({"llama.expert_count": 8}, "expert_count"),
    "a partial rope": ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
    "no layers": ({"llama.block_count": None}, "block_count"),
    "a million layers": ({"llama.block_count": 1_000_000}, "parameters"),
    "heads that do not divide": ({"llama.attention.head_count_kv": 3}, "num_key_value_heads"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    "a wider model than its tensors": ({"llama.feed_forward_length": 128}, "has shape"),
    "another vocab_size": ({"llama.vocab_size": 5}, "vocab_size"),
    "another tokenizer": ({"tokenizer.ggml.model": "llama"}, "readable is gpt2"),
    "another pre-tokenizer": ({"tokenizer.ggml.pre": "llama-bpe"}, "readable is gpt2"),
    "a merge of strangers": ({"tokenizer.ggml.merges": ["q zz"]}, "its merge 'q zz'"),
    "too few types": ({"tokenizer.ggml.token_type": [1, 2]}, "one type each"),
    "no end": ({"tokenizer.ggml.eos_token_id": None}, "end of text"),
    "an end outside": ({"tokenizer.ggml.eos_token_id": 99999}, "outside the vocabulary"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_this_program_would_compute_differently_is_refused(
    case: str, tmp_path: Path, llama: Any, tokenizer: Any
) -> None:
    changes, expected = WRONG[case]
    write_gguf(tmp_path / "m.gguf", llama, tokenizer, **changes)
    assert expected in refused(tmp_path / "m.gguf", out=tmp_path / "out")


def test_a_missing_an_unknown_and_a_damaged_tensor_are_named(tmp_path: Path, llama: Any, tokenizer: Any) -> None:
    spoiled = gguf_tensors(llama)["output_norm.weight"].copy()
    spoiled[3] = float("nan")
    cases = {
        "lacks tensor output_norm.weight": {"output_norm.weight": None},
        "holds the unknown tensor rope_freqs.weight": {"rope_freqs.weight": spoiled[:8]},
        "tensor model.norm.weight holds NaN": {"output_norm.weight": spoiled},
    }
    for expected, tensors in cases.items():
        write_gguf(tmp_path / "m.gguf", llama, tokenizer, tensors=tensors)
        assert expected in refused(tmp_path / "m.gguf", out=tmp_path / "out")


def header(*, tensors: int = 0, keys: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def named(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def one_tensor(shape: tuple[int, ...], kind: int = 0, at: int = 0, *, name: str = "t") -> bytes:
    return named(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "a pickle": (b"\x80\x04\x95" + bytes(64), "no GGUF file"),
    "big-endian": (header(version=3 << 24), "version"),
    "2^60 tensors": (header(tensors=1 << 60), "tensors"),
    "2^60 keys": (header(keys=1 << 60), "keys"),
    "2^60 elements": (header(keys=1, rest=named("a") + struct.pack("<IIQ", 9, 0, 1 << 60)), "elements"),
    "elements past the end": (header(keys=1, rest=named("a") + struct.pack("<IIQ", 9, 0, 4_000_000)), "past the file"),
    "arrays in arrays": (header(keys=1, rest=named("a") + struct.pack("<IIQ", 9, 9, 1) * 99), "array of type 9"),
    "an endless string": (header(keys=1, rest=named("a") + struct.pack("<IQ", 8, 1 << 62)), "at most"),
    "an unknown type": (header(keys=1, rest=named("a") + struct.pack("<I", 77)), "type 77"),
    "a key twice": (header(keys=2, rest=(named("a") + struct.pack("<II", 4, 1)) * 2), "twice"),
    "an odd alignment": (header(keys=1, rest=named("general.alignment") + struct.pack("<II", 4, 7)), "power of two"),
    "a huge tensor": (header(tensors=1, rest=one_tensor((1 << 20, 1 << 20))), "cannot be stored"),
    "a tensor past the end": (header(tensors=1, rest=one_tensor((1 << 16, 1 << 10))), "cut short"),
    "five dimensions": (header(tensors=1, rest=one_tensor((1, 1, 1, 1, 1))), "5 dimensions"),
    "an unknown storage": (header(tensors=1, rest=one_tensor((32,), kind=16)), "type 16"),
    "half a block": (header(tensors=1, rest=one_tensor((33,), kind=8) + bytes(999)), "cannot be stored as Q8_0"),
    "a tensor twice": (header(tensors=2, rest=one_tensor((1,)) + one_tensor((1,), at=32) + bytes(99)), "twice"),
    "tensors that share bytes": (
        header(tensors=2, rest=one_tensor((16,)) + one_tensor((16,), at=32, name="u") + bytes(999)), "apart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_costs_one_sentence_and_no_memory(case: str, tmp_path: Path) -> None:
    data, expected = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        assert expected in refused(tmp_path / "m.gguf", out=tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_file_cut_anywhere_is_refused(good: bytes, tmp_path: Path) -> None:
    for length in [*range(0, 4000, 37), *range(4000, len(good), 9001), len(good) - 33]:
        (tmp_path / "m.gguf").write_bytes(good[:length])
        refused(tmp_path / "m.gguf", out=tmp_path / "out")


@pytest.mark.slow
def test_flipped_bits_give_a_model_or_a_sentence_and_nothing_else(good: bytes, tmp_path: Path) -> None:
    rng = random.Random(11)
    outcomes = {"model": 0, "sentence": 0}
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(rng.choice((64, 1500, 12000)))] ^= 1 << rng.randrange(8)
        (tmp_path / "m.gguf").write_bytes(data)
        try:
            import_model(str(tmp_path / "m.gguf"), tmp_path / "out")
            outcomes["model"] += 1
        except StateOfGptError as error:
            assert "\n" not in str(error)
            outcomes["sentence"] += 1
    assert min(outcomes.values()) > 5, outcomes


def test_the_walk_passes_what_it_should_and_knows_the_sizes_of_ggml(good: bytes, tmp_path: Path) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    (tmp_path / "m.gguf").write_bytes(good)
    gguf_header.check(tmp_path / "m.gguf")
    for number, (name, block, size) in gguf_header.STORAGE.items():
        kind = GGMLQuantizationType(number)
        assert (kind.name, GGML_QUANT_SIZES[kind]) == (name, (block, size))


def test_without_the_gguf_package_the_error_says_what_to_install(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(good)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'stateofgpt[gguf]'" in refused(tmp_path / "m.gguf", out=tmp_path / "out")


@pytest.mark.slow
def test_the_command_prints_the_folder_or_one_sentence(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(good)
    made = sog("import", "tiny.gguf", cwd=tmp_path)
    assert made.returncode == 0 and made.stdout.strip() == str(Path("models") / "tiny"), made.stderr
    load_model(tmp_path / "models" / "tiny")
    (tmp_path / "bad.gguf").write_bytes(good[:3000])
    failed = sog("import", "bad.gguf", cwd=tmp_path)
    assert failed.returncode == 2 and "bad.gguf" in one_sentence(failed.stderr)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]
