"""What the ids of a byte-pair vocabulary stand for, and how text becomes them without ever becoming markup.

Owns: the twin of a `tokenizer.json` that does not know its special tokens, and the bytes of every id, for byte-level
vocabularies (GPT-2, Llama 3, Qwen, ours) and for those of SentencePiece's kind (Llama 2), which write a space as "▁"
and a byte they have no token for as <0xE2>. Knows nothing of roles or files.

Some vocabularies put a space before every text. It is not in the text, so it is not in what is decoded either, unless
the ids go on from others:

    encode("Hello") -> ▁Hello      decode -> "Hello"      encode_inner("Hello") -> Hello      decode_inner -> " Hello"
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as _Backend

from stateofgpt.errors import CheckpointError
from stateofgpt.text.specials import is_plain

SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SURROGATES = re.compile("([\ud800-\udfff]+)")


class Vocabulary:
    """A parsed tokenizer.json without its markup. `markup` are the ids that no text may become, with their names.

    `dummy` is 1 where `encode` puts a space before a text, else 0; `after_special` says whether it does so too where
    a text follows a special token. CheckpointError for a tokenizer that could not write every text.
    """

    def __init__(self, data: Mapping[str, Any], markup: Mapping[int, str]) -> None:
        model = data["model"]
        self.byte_level = "ByteLevel" in _kinds(data.get("decoder")) | _kinds(data.get("pre_tokenizer"))
        if model.get("type", "BPE") != "BPE" or not (self.byte_level or model.get("byte_fallback")):
            what = model.get("type") if model.get("type", "BPE") != "BPE" else "byte-pair encoding without bytes"
            raise CheckpointError(
                f"its model is {what}; only byte-pair encoding that can write every byte is read here"
            )
        self._markup = markup
        prefixes = list(_prefixes(data))
        self.dummy = int(bool(prefixes))
        self.after_special = "always" in prefixes
        whole = _without_markup(data, set(markup.values()))
        self._fresh = _backend(whole)
        self._inner = _backend(_without_prefix(whole)) if self.dummy else self._fresh
        self._tokens: dict[str, int] = self._fresh.get_vocab()
        self.size = 1 + max(*self._tokens.values(), *markup)

    def encode(self, text: str, *, inner: bool = False) -> list[int]:
        """The ids of a text, or of one that goes on from other ids (`inner`). Lone surrogates, which no UTF-8 has,
        become bytes again as `surrogateescape` and `surrogatepass` define them."""
        backend = self._inner if inner else self._fresh
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # how the backend refuses surrogates
            ids = self._encode_with_surrogates(text, backend)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        try:
            return [one.ids for one in self._fresh.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:  # as in `encode`
            return [self.encode(text) for text in texts]

    def _encode_with_surrogates(self, text: str, backend: _Backend) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(_SURROGATES.split(text)):
            if number % 2 == 0:
                ids += backend.encode(part, add_special_tokens=False).ids
            else:
                known = self._byte_ids
                ids += [known[b] for character in part for b in _surrogate_bytes(character) if b in known]
            backend = self._inner
        return ids

    @cached_property
    def bytes_of(self) -> dict[int, bytes]:
        """The bytes of each id; of markup those of its name."""
        to_byte = {character: byte for byte, character in enumerate(byte_characters())}
        table: dict[int, bytes] = {}
        for token, number in self._tokens.items():
            if not self.byte_level:
                byte = _BYTE.fullmatch(token)
                table[number] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
            elif all(character in to_byte for character in token):
                table[number] = bytes(to_byte[character] for character in token)
            else:  # a run of spaces that was added beside the vocabulary
                table[number] = token.encode()
        return table | {number: name.encode() for number, name in self._markup.items()}

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """The id of each single byte."""
        if self.byte_level:
            return {b: self._tokens[c] for b, c in enumerate(byte_characters()) if c in self._tokens}
        return {b: self._tokens[n] for b in range(256) if (n := f"<0x{b:02X}>") in self._tokens}


def byte_characters() -> Iterator[str]:
    """The printable character that stands for each byte, 0 to 255, in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    stand_in = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield chr(byte)
        else:
            yield chr(stand_in)
            stand_in += 1


def _backend(data: Mapping[str, Any]) -> _Backend:
    return _Backend.from_str(json.dumps(data))


def _without_markup(data: Mapping[str, Any], names: AbstractSet[str]) -> dict[str, Any]:
    """The tokenizer for which its markup is text: neither declared, nor in the vocabulary, nor made by a merge.

    The last two matter where a word that is in the vocabulary is taken whole (`ignore_merges`), and where merges were
    made up from the vocabulary: "</s>" would come out of six letters.
    """
    twin = {**data, "added_tokens": [token for token in data["added_tokens"] if is_plain(token)]}
    twin |= {"post_processor": None, "padding": None, "truncation": None}
    model = dict(data["model"])
    kept = {token: number for token, number in model["vocab"].items() if token not in names}
    model["vocab"] = kept | {token["content"]: token["id"] for token in twin["added_tokens"]}  # or they got other ids
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    model["merges"] = [pair for pair in pairs if not names & {pair[0], pair[1], pair[0] + pair[1]}]
    if model.get("unk_token") in names:
        model["unk_token"] = None
    twin["model"] = model
    return twin


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, and everything in its sequences."""
    if isinstance(node, dict):
        yield node
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in node.get(key) or ():
                yield from _parts(inner)


def _kinds(node: Any) -> set[str]:
    return {str(part.get("type")) for part in _parts(node)}


def _scheme(part: Mapping[str, Any]) -> str | None:
    """When this part puts a space before a text: "always" (after a special token too), "first", or None."""
    kind = part.get("type")
    if kind == "Prepend" or (kind == "ByteLevel" and part.get("add_prefix_space")):
        return "always"
    if kind == "Metaspace":
        scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
        return None if scheme == "never" else str(scheme)
    return None


def _prefixes(data: Mapping[str, Any]) -> Iterator[str]:
    for part in (*_parts(data.get("normalizer")), *_parts(data.get("pre_tokenizer"))):
        if scheme := _scheme(part):
            yield scheme


def _without_prefix(data: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer for text that goes on from other text."""
    inner = copy.deepcopy({key: data[key] for key in ("normalizer", "pre_tokenizer")})
    if isinstance(inner["normalizer"], dict) and inner["normalizer"].get("type") == "Prepend":
        inner["normalizer"] = None
    for part in _parts(inner["normalizer"]):
        if "normalizers" in part:
            part["normalizers"] = [one for one in part["normalizers"] if one.get("type") != "Prepend"]
    for part in _parts(inner["pre_tokenizer"]):
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
        elif part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
    return {**data, **inner}


def _surrogate_bytes(character: str) -> bytes:
    """The byte that `surrogateescape` hid in this character, or the three bytes of `surrogatepass`."""
    code = ord(character)
    return bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else character.encode("utf-8", errors="surrogatepass")
