"""Tokenizers made elsewhere: the ids of `transformers`, the bytes of the text, roles by rule, no way to a special."""

from __future__ import annotations

import json
from pathlib import Path

import made_elsewhere as foreign
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_elsewhere import SMOL, TEXTS

from stateofgpt.data.batches import validation_rows
from stateofgpt.data.shards import Marks, Shards, write_index, write_part
from stateofgpt.errors import CheckpointError
from stateofgpt.text.tokenizer import Tokenizer

ORDINARY = [
    *TEXTS,
    "",
    "x",
    "a  b   c",
    "\n\nx\t\ty ",
    "It's 4729 + 386 = 5115!\r\n",
    "ß\u0301 \u2028 \U0001f468\u200d\U0001f469",
]
KINDS = ("smol", "gpt2", "prefixed", "llama", "first", "always")


def made(kind: str, folder: Path) -> Path:
    if kind == "smol":
        return foreign.smol(folder)
    if kind in ("gpt2", "prefixed"):
        definition = foreign.byte_level("<|endoftext|>", prefix_space=kind == "prefixed")
        return foreign.write(folder, definition, eos_token="<|endoftext|>")
    return foreign.llama(folder, metaspace="" if kind == "llama" else kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    return {kind: made(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_has_the_ids_of_transformers_and_comes_back(folders: dict[str, Path], kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folders[kind]))
    ours = Tokenizer.load(folders[kind])
    assert not ours.own and ours.vocab_size == len(theirs)
    for text in ORDINARY:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
    assert ours.encode_batch(ORDINARY) == [ours.encode(text) for text in ORDINARY]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_text_becomes_a_special_token_of_any_kind_of_tokenizer(
    tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    for tokenizer in tokenizers.values():
        names = list(tokenizer.specials.values())
        pieces = st.sampled_from([*names, "<", "/", "s", ">", "</", "s>", "<|", "|>", "\n", " "]) | st.text(max_size=4)
        text = "".join(data.draw(st.lists(pieces, max_size=8)))
        for ids in (tokenizer.encode(text), *(tokenizer.encode_after(text, special=one) for one in (True, False))):
            assert not set(ids) & tokenizer.specials.keys()
        if not text.startswith(" ") and "▁" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_property_above_says_something(folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folders["llama"]))
    assert 2 in theirs.encode("a </s> b", add_special_tokens=False)
    bare = json.loads((folders["llama"] / "tokenizer.json").read_text())
    bare["added_tokens"] = []  # not declaring it is not enough: the merges of this kind lead to it
    assert 2 in foreign.Tokenizer.from_str(json.dumps(bare)).encode("a </s> b", add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_and_surrogates_come_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for data in (bytes(range(256)), b"\xff\xfe a \xc3", b"caf\xc3\xa9 \xe2\x82"):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_add_up_to_the_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        sizes = [len(tokenizer.decode_bytes([number], inner=True)) for number in tokenizer.encode(text)]
        assert sum(sizes) - tokenizer.dummy_space == len(text.encode())
        inner = tokenizer.encode_after(text, special=False)
        assert tokenizer.decode_bytes(inner, inner=True) == text.encode()


def test_bits_per_byte_are_counted_over_the_text_alone_also_where_a_space_is_put_before_it(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    for kind, tokenizer in tokenizers.items():
        folder = tmp_path / kind
        folder.mkdir()
        marks = Marks(tokenizer.eot, tokenizer.pad, tokenizer.dummy_space)
        sizes = [len(tokenizer.decode_bytes([n], inner=True)) for n in range(tokenizer.vocab_size)]
        documents = [[tokenizer.eot, *tokenizer.encode(text)] for text in TEXTS]
        part = write_part(folder, "x", "validation", documents, np.array(sizes), marks)
        n_bytes = sum(len(text.encode()) for text in TEXTS)
        assert part.bytes == n_bytes
        write_index(folder, {"x": {"validation": part}}, tokenizer.sha256, sizes, marks)
        inputs, targets, mask, counted = validation_rows(Shards.open(folder), "x", 16, 10_000)
        assert counted == n_bytes
        assert mask.sum() == sum(len(ids) - 1 for ids in documents)
        assert not np.isin(targets[mask > 0], [tokenizer.eot]).any() and inputs[0, 0] == tokenizer.eot


def test_shards_without_marks_hold_our_own_tokens(tmp_path: Path) -> None:
    sizes = np.ones(10, np.int64)
    part = write_part(tmp_path, "x", "train", [[0, 7, 8]], sizes)
    write_index(tmp_path, {"x": {"train": part}}, "", sizes.tolist())
    index = json.loads((tmp_path / "index.json").read_text())
    assert index.pop("marks") == {"eot": 0, "pad": 3, "dummy_space": 0}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert Shards.open(tmp_path).marks == Marks(0, 3, 0)


# -------------------------------------------------------------------------------------------------------------- roles


def test_roles_are_found_in_the_files_beside_the_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    smol = tokenizers["smol"]
    assert [smol.token_str(n) for n in (smol.eot, smol.im_end, smol.pad)] == [SMOL[0], SMOL[2], "<empty_output>"]
    assert smol.tool_open is None and smol.stops == (smol.im_end, smol.eot)
    assert "<empty_output>, which nothing uses" in smol.notes[0]
    llama = tokenizers["llama"]
    assert [llama.token_str(n) for n in (llama.eot, llama.im_end, llama.pad)] == ["<s>", "</s>", "</s>"]
    assert "masked" in llama.notes[0]
    assert tokenizers["gpt2"].pad == tokenizers["gpt2"].eot == tokenizers["gpt2"].im_end


def test_a_declared_pad_token_and_the_marks_of_tool_calls_are_taken(tmp_path: Path) -> None:
    names = ("<|endoftext|>", "<|im_end|>", "<fill>", "<tool_call>", "</tool_call>", "<think>")
    data = json.loads(foreign.byte_level(*names))
    for token in data["added_tokens"][3:]:
        token["special"] = False
    folder = foreign.write(tmp_path, json.dumps(data), eos_token="<|im_end|>", pad_token={"content": "<fill>"})
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.pad, tokenizer.tool_open, tokenizer.tool_close, tokenizer.notes) == (2, 3, 4, ())
    assert tokenizer.decode([5, 3, 1]) == "<think><tool_call>"  # declared as text to show, but never made of text
    assert not set(tokenizer.encode("<think><tool_call>")) & {3, 5}


def test_the_ends_in_generation_config_count_and_a_pad_that_nothing_else_is_named_after_is_found(
    tmp_path: Path,
) -> None:
    definition = foreign.byte_level("<|begin|>", "<|eot_id|>", "<|end|>", "<|reserved_1|>", "<|right_pad|>")
    folder = foreign.write(tmp_path, definition, bos_token="<|begin|>", eos_token="<|eot_id|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eot, tokenizer.im_end, tokenizer.pad) == (0, 1, 4)
    assert set(tokenizer.stops) == {0, 1, 2}


def test_added_runs_of_spaces_are_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = json.loads(foreign.byte_level("<|endoftext|>"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    data["added_tokens"] += [{"id": 400, "content": "    ", **plain}]
    folder = foreign.write(tmp_path, json.dumps(data), eos_token="<|endoftext|>")
    tokenizer = Tokenizer.load(folder)
    text = "def f():\n    return 1"
    assert 400 in tokenizer.encode(text)
    assert tokenizer.encode(text) == transformers.AutoTokenizer.from_pretrained(str(folder)).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size == 401


def test_the_files_are_kept_byte_for_byte(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["smol"]
    (source / "generation_config.json").write_bytes(b'{ "eos_token_id" : 2,  "temperature": 0.6 }\r\n')
    Tokenizer.load(source).save(tmp_path)
    for file in source.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "cannot be used|damaged"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": None, "pre_tokenizer": None},
            "every byte",
        ),
        ({"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "no token that begins"),
    ],
)
def test_a_tokenizer_that_could_not_write_every_text_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    data = json.loads(foreign.byte_level("<|endoftext|>")) | change
    with pytest.raises(CheckpointError, match=said) as caught:
        Tokenizer.load(foreign.write(tmp_path, json.dumps(data)))
    assert "\n" not in str(caught.value)
