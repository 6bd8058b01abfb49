"""The tokenizer: byte-level byte-pair encoding, lossless on any bytes.

Owns: the special tokens and their ids, the splitting pattern, training, and the tokenizer's files in a checkpoint.
Knows nothing of conversations (that is `text.chat`) or of where texts come from.

The pattern is GPT-4's, with digits in groups of `digits_per_token` (one by default: a small model then learns to add
column by column, which it cannot when "4729" is one token today and two tomorrow).

Special tokens are never the result of encoding text. The saved `tokenizer.json` declares them, because `transformers`
must know them; encoding here goes through a twin without that declaration, in which "<|im_end|>" is ten characters:

    >>> tokenizer.encode("<|im_end|>")          # a few ordinary ids
    >>> tokenizer.im_end                        # 2, which only `text.chat` and the data loaders ever write
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Backend

from stateofgpt.errors import CheckpointError, ConfigError, ModelError
from stateofgpt.run import write_atomic, write_json

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<tool_call>", "</tool_call>")
SMALLEST_VOCABULARY = 256 + len(SPECIALS)
_SURROGATES = re.compile("([\ud800-\udfff]+)")


def split_pattern(digits_per_token: int) -> str:
    """GPT-4's pattern (cl100k_base in tiktoken), with digits in groups of at most `digits_per_token`."""
    digits = rf"\p{{N}}{{1,{digits_per_token}}}"
    return (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )


class Tokenizer:
    """Text to ids and back. Made by `Tokenizer.train` or `Tokenizer.load`; never changes."""

    eot = 0  # begins every document and every conversation
    im_start = 1  # begins a message
    im_end = 2  # ends a message
    pad = 3  # fills a row; never learned, never an end
    tool_open = 4  # begins a tool call
    tool_close = 5  # ends a tool call

    def __init__(self, definition: str) -> None:
        """`definition` is the content of a `tokenizer.json`. Raises CheckpointError when it is not one of ours."""
        try:
            data = json.loads(definition)
            declared = {token["content"]: token["id"] for token in data["added_tokens"] if token["special"]}
            data["added_tokens"] = []
            self._backend = _Backend.from_str(json.dumps(data))
        except Exception as error:  # the backend raises bare Exception
            raise CheckpointError(f"the tokenizer is damaged ({error}); use an undamaged copy") from error
        if declared != {name: number for number, name in enumerate(SPECIALS)}:
            raise CheckpointError(
                f"not one of our tokenizers: its special tokens must be {', '.join(SPECIALS)}, with ids from 0 up"
            )
        self._definition = definition
        self.vocab_size: int = self._backend.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, digits_per_token: int = 1) -> Tokenizer:
        """Learn merges from `texts`; the same texts in the same order give the same tokenizer.

        The vocabulary is smaller than `vocab_size` when the texts do not hold enough pairs to merge.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"vocab_size is {vocab_size}; it takes {SMALLEST_VOCABULARY} or more (bytes and specials)"
            )
        if not 1 <= digits_per_token <= 3:
            raise ConfigError(f"digits_per_token is {digits_per_token}; it must be 1, 2 or 3")
        backend = _Backend(models.BPE())
        pattern = Regex(split_pattern(digits_per_token))
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((_without_surrogates(text) for text in texts), trainer)
        return cls(backend.to_str(pretty=True))

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a checkpoint folder. Raises CheckpointError when it is missing or damaged."""
        path = Path(folder) / "tokenizer.json"
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path} ({error}); name a folder that holds a tokenizer") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, and beside it the two small files that `transformers` wants."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "pad_token": SPECIALS[3]}
        others = [name for name in SPECIALS if name not in roles.values()]
        settings = {"clean_up_tokenization_spaces": False, "model_max_length": int(1e9), "add_prefix_space": False}
        write_json(folder / "special_tokens_map.json", {**roles, "additional_special_tokens": others})
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "additional_special_tokens": others, **settings},
        )
        write_atomic(folder / "tokenizer.json", self._definition)

    # ------------------------------------------------------------------------------------------------- text to ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text: never a special id, whatever the text holds.

        Lone surrogates, which no UTF-8 has, become bytes again as `surrogateescape` and `surrogatepass` define them.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # how the backend refuses surrogates
            ids = self._encode_with_surrogates(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:  # as in `encode`
            return [self.encode(text) for text in texts]

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, UTF-8 or not: `decode_bytes` gives them back."""
        return self.encode(data.decode("utf-8", errors="surrogateescape"))

    def _encode_with_surrogates(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(_SURROGATES.split(text)):
            if number % 2 == 0:
                ids += self._backend.encode(part, add_special_tokens=False).ids
            else:
                ids += [self._byte_ids[byte] for character in part for byte in _surrogate_bytes(character)]
        return ids

    # ------------------------------------------------------------------------------------------------- ids to text

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        """The bytes of the ids; special tokens give nothing, or their names."""
        first = len(SPECIALS)
        table = self._token_bytes
        return b"".join(table.get(number, b"") for number in ids if number >= first or not skip_special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids, with U+FFFD where the bytes are no UTF-8. Ids past the vocabulary give nothing."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    def token_str(self, number: int) -> str:
        """One token as text to show; special tokens by their name, half a character as U+FFFD."""
        return self._token_bytes.get(number, b"").decode("utf-8", errors="replace")

    # ------------------------------------------------------------------------------------------------- what it is

    def special(self, name: str) -> int:
        """The id of a special token."""
        try:
            return SPECIALS.index(name)
        except ValueError:
            raise ModelError(f'there is no special token "{name}"; there are {", ".join(SPECIALS)}') from None

    @cached_property
    def sha256(self) -> str:
        """The hash of tokenizer.json: two tokenizers with the same hash give the same ids."""
        return hashlib.sha256(self._definition.encode()).hexdigest()

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        """The bytes of each id."""
        to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
        table = {}
        for token, number in self._backend.get_vocab().items():
            special = number < len(SPECIALS)
            table[number] = token.encode() if special else bytes(to_byte[character] for character in token)
        return table

    @cached_property
    def _byte_ids(self) -> list[int]:
        """The id of each single byte."""
        vocabulary = self._backend.get_vocab()
        return [vocabulary[character] for character in _byte_characters()]


def _byte_characters() -> Iterator[str]:
    """The printable character that stands for each byte, 0 to 255, in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    stand_in = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield chr(byte)
        else:
            yield chr(stand_in)
            stand_in += 1


def _surrogate_bytes(character: str) -> bytes:
    """The byte that `surrogateescape` hid in this character, or the three bytes of `surrogatepass`."""
    code = ord(character)
    return bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else character.encode("utf-8", errors="surrogatepass")


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")
