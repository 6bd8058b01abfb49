"""The tokenizer: lossless on any bytes, blind to special tokens in text, and the same for `transformers`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.text.tokenizer import SPECIALS, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's what we'll say, and they've said it.\n\n" * 30,
    "def add(a, b):\n    return a + b\n\nprint(add(4729, 386))\n" * 30,
    "Grüße aus Köln: 12345 Äpfel, naïve café, 你好, 世界, 😀\n" * 30,
    f"People write {' and '.join(SPECIALS)} in documents. " * 30,
]
TOKENIZER = Tokenizer.train(TEXTS, 600)

hostile = st.lists(
    st.sampled_from([*SPECIALS, "<|", "|>", "im_", "end", "<tool", "_call>", " ", "\n", "a"]) | st.text()
)


def test_the_special_tokens_have_the_first_ids_in_the_declared_order() -> None:
    assert [TOKENIZER.special(name) for name in SPECIALS] == [0, 1, 2, 3, 4, 5]
    t = TOKENIZER
    assert [t.eot, t.im_start, t.im_end, t.pad, t.tool_open, t.tool_close] == [0, 1, 2, 3, 4, 5]
    assert [TOKENIZER.token_str(number) for number in range(6)] == list(SPECIALS)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_come_back_as_they_were(data: bytes) -> None:
    assert TOKENIZER.decode_bytes(TOKENIZER.encode_bytes(data)) == data


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=[]), max_size=100))
def test_any_string_even_with_lone_surrogates_is_encoded_and_no_special_id_comes_out(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert min(ids, default=6) >= len(SPECIALS)
    expected = text.encode("utf-8", "surrogatepass")
    if not any("\udc80" <= character <= "\udcff" for character in text):
        assert TOKENIZER.decode_bytes(ids) == expected
    assert TOKENIZER.encode_batch([text]) == [ids]


@settings(max_examples=300, deadline=None)
@given(hostile)
def test_special_token_strings_in_text_are_plain_bytes(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = TOKENIZER.encode(text)
    assert min(ids, default=6) >= len(SPECIALS)
    assert TOKENIZER.decode(ids) == text


def test_decoding_names_special_tokens_only_when_asked_and_bears_padded_ids() -> None:
    ids = [TOKENIZER.eot, *TOKENIZER.encode("hi"), TOKENIZER.im_end, 100_000, -1]
    assert TOKENIZER.decode(ids) == "hi"
    assert TOKENIZER.decode(ids, skip_special=False) == "<|endoftext|>hi<|im_end|>"
    assert TOKENIZER.token_str(100_000) == ""


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_digits_come_in_groups_of_the_asked_size(digits: int) -> None:
    tokenizer = Tokenizer.train(["1234567890 " * 50, "999888777 123 123 12 12"] * 20, 500, digits)
    pieces = [tokenizer.token_str(number) for number in tokenizer.encode("4729123 and 123123")]
    assert max(len(piece) for piece in pieces if piece.isdigit()) == digits or digits > 1
    assert all(len(piece.strip()) <= digits for piece in pieces if re.search(r"\d", piece))


def test_training_twice_gives_the_same_tokenizer_and_shorter_sequences_than_bytes() -> None:
    assert Tokenizer.train(TEXTS, 600).sha256 == TOKENIZER.sha256
    assert TOKENIZER.vocab_size <= 600
    assert len(TOKENIZER.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_a_saved_tokenizer_loads_unchanged(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.sha256 == TOKENIZER.sha256
    assert loaded.encode(TEXTS[2]) == TOKENIZER.encode(TEXTS[2])


def test_transformers_reads_it_with_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in [*TEXTS[:3], "It's 4729 + 386 = 5115!\r\n\t  x", "\u00a0\u2028 ß\u0301"]:
        assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
        assert theirs.decode(TOKENIZER.encode(text)) == text
    assert theirs.convert_tokens_to_ids(list(SPECIALS)) == [0, 1, 2, 3, 4, 5]
    assert theirs.encode("a<|im_end|>", add_special_tokens=False) == [*TOKENIZER.encode("a"), TOKENIZER.im_end]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|im_end|>", "<|pad|>")
    assert set(SPECIALS) <= set(theirs.all_special_tokens)


def test_a_missing_damaged_or_unusable_tokenizer_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        Tokenizer.load(tmp_path)
    foreign = json.loads(text)
    foreign["added_tokens"] = foreign["added_tokens"][1:2]
    path.write_text(json.dumps(foreign))
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / beside).unlink()
    with pytest.raises(CheckpointError, match="no token that begins a document"):
        Tokenizer.load(tmp_path)
    foreign["model"] = {"type": "WordPiece", "vocab": {"a": 0}}
    path.write_text(json.dumps(foreign))
    with pytest.raises(CheckpointError, match=r"cannot be used|damaged"):
        Tokenizer.load(tmp_path)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="262"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(ConfigError, match="1, 2 or 3"):
        Tokenizer.train(TEXTS, 600, 4)


@pytest.mark.slow
def test_a_very_long_word_takes_linear_time() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a" * 1_000_000)) == "a" * 1_000_000
    assert len(TOKENIZER.encode(" " * 1_000_000 + "x")) > 1
