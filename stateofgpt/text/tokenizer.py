"""The tokenizer: byte-pair encoding, ours or that of any Hugging Face folder.

Owns: the splitting pattern and the training of our own (byte-level, lossless on any bytes), and a tokenizer's files in
a checkpoint: ours are written, those of another are kept byte for byte. What the ids are for is `text.specials`', what
they stand for `text.vocabulary`'s. Knows nothing of conversations (that is `text.chat`) or of where texts come from.

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
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Backend

from stateofgpt.errors import CheckpointError, ConfigError, ModelError
from stateofgpt.run import write_atomic, write_json
from stateofgpt.text.specials import OWN as SPECIALS
from stateofgpt.text.specials import find_specials, is_own, own_specials
from stateofgpt.text.vocabulary import Vocabulary

SMALLEST_VOCABULARY = 256 + len(SPECIALS)
TEMPLATE = "chat_template.jinja"
KEPT = (  # of a folder made elsewhere: what a tokenizer of it consists of
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    TEMPLATE,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
MAX_FILE_BYTES = 128 << 20


def split_pattern(digits_per_token: int) -> str:
    """GPT-4's pattern (cl100k_base in tiktoken), with digits in groups of at most `digits_per_token`."""
    digits = rf"\p{{N}}{{1,{digits_per_token}}}"
    return (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )


class Tokenizer:
    """Text to ids and back. Made by `Tokenizer.train` or `Tokenizer.load`; never changes.

    Ids that no text becomes: `eot` begins every document (and, in ours, every conversation), `im_end` ends a turn,
    `pad` fills a row and is never learned; `tool_open` and `tool_close` stand around a tool call, `im_start` before a
    message, each None where a foreign vocabulary has none. At any of `stops` a text is over.
    """

    def __init__(self, definition: str, files: Mapping[str, bytes] | None = None) -> None:
        """`definition` is the content of a `tokenizer.json`, `files` what else of `KEPT` is in its folder.

        Raises CheckpointError when it is damaged, or cannot be used.
        """
        self.files = dict(files or {})
        try:
            data = json.loads(definition)
            self.own = is_own(data)
            settings = self._json("tokenizer_config.json")
            self.template: str | None = None if self.own else self._template(settings)
            self._specials = own_specials() if self.own else self._find(data, settings)
            self._vocabulary = Vocabulary(data, self._specials.names)
        except CheckpointError as error:
            raise CheckpointError(f"the tokenizer cannot be used: {error}") from error
        except Exception as error:  # the backend raises bare Exception
            raise CheckpointError(f"the tokenizer is damaged ({error!r}); use an undamaged copy") from error
        self._definition = definition
        specials = self._specials
        self.eot, self.im_end, self.pad, self.stops = specials.eot, specials.end, specials.pad, specials.stops
        self.im_start, self.tool_open, self.tool_close = specials.im_start, specials.tool_open, specials.tool_close
        self.notes, self.variables = specials.notes, specials.variables
        self.vocab_size: int = self._vocabulary.size
        self.dummy_space: int = self._vocabulary.dummy  # 1 where `encode` begins with a space that is not in the text

    def _find(self, data: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
        named, generation = self._json("special_tokens_map.json"), self._json("generation_config.json")
        return find_specials(data, settings, named, generation, self.template or "")

    def _json(self, name: str) -> dict[str, Any]:
        found = json.loads(self.files.get(name, b"{}"))
        if not isinstance(found, dict):
            raise CheckpointError(f"{name} is no JSON object")
        return found

    def _template(self, settings: Mapping[str, Any]) -> str | None:
        """The chat template: its own file, or the key of tokenizer_config.json (of several, the one named default)."""
        if TEMPLATE in self.files:
            return self.files[TEMPLATE].decode()
        found = settings.get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

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
        """The tokenizer of a checkpoint folder. Raises CheckpointError when it is missing, damaged or of no use."""
        path = Path(folder) / "tokenizer.json"
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise CheckpointError(f"{path} has more than {MAX_FILE_BYTES:,} bytes, which no tokenizer needs")
            definition = path.read_text(encoding="utf-8")
            beside = [file for name in KEPT if (file := path.with_name(name)).is_file()]
            files = {file.name: file.read_bytes() for file in beside if file.stat().st_size <= MAX_FILE_BYTES}
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path} ({error}); name a folder that holds a tokenizer") from error
        try:
            return cls(definition, files)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, and beside it the small files that `transformers` wants.

        The files of a tokenizer made elsewhere come out byte for byte as they were.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.own:
            roles = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "pad_token": SPECIALS[3]}
            others = [name for name in SPECIALS if name not in roles.values()]
            settings = {"clean_up_tokenization_spaces": False, "model_max_length": int(1e9), "add_prefix_space": False}
            write_json(folder / "special_tokens_map.json", {**roles, "additional_special_tokens": others})
            write_json(
                folder / "tokenizer_config.json",
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    **roles,
                    "additional_special_tokens": others,
                    **settings,
                },
            )
        else:
            for name, content in self.files.items():
                write_atomic(folder / name, content)
        write_atomic(folder / "tokenizer.json", self._definition)

    # ------------------------------------------------------------------------------------------------- text to ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text: never a special id, whatever the text holds.

        Lone surrogates, which no UTF-8 has, become bytes again as `surrogateescape` and `surrogatepass` define them.
        """
        return self._vocabulary.encode(text)

    def encode_after(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text that follows a special token, or else other text: without the space that some
        vocabularies put before a text, where they do not put it there."""
        return self._vocabulary.encode(text, inner=not (special and self._vocabulary.after_special))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return self._vocabulary.encode_batch(texts)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, UTF-8 or not: `decode_bytes` gives them back."""
        return self.encode(data.decode("utf-8", errors="surrogateescape"))

    # ------------------------------------------------------------------------------------------------- ids to text

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True, *, inner: bool = False) -> bytes:
        """The bytes of the ids; special tokens give nothing, or their names.

        `inner`: the ids go on from others, so that a space at their beginning is one of the text.
        """
        hidden = self._specials.hidden if skip_special else ()
        table = self._vocabulary.bytes_of
        found = b"".join(table.get(number, b"") for number in ids if number not in hidden)
        return found.removeprefix(b" ") if self.dummy_space and not inner else found

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, inner: bool = False) -> str:
        """The text of the ids, with U+FFFD where the bytes are no UTF-8. Ids past the vocabulary give nothing."""
        return self.decode_bytes(ids, skip_special, inner=inner).decode("utf-8", errors="replace")

    def token_str(self, number: int) -> str:
        """One token as text to show; special tokens by their name, half a character as U+FFFD."""
        return self._vocabulary.bytes_of.get(number, b"").decode("utf-8", errors="replace")

    # ------------------------------------------------------------------------------------------------- what it is

    @property
    def specials(self) -> Mapping[int, str]:
        """Every id that no text becomes, with its name."""
        return self._specials.names

    def special(self, name: str) -> int:
        """The id of a special token."""
        for number, known in self._specials.names.items():
            if known == name:
                return number
        raise ModelError(f'there is no special token "{name}"; there are {", ".join(self._specials.names.values())}')

    @cached_property
    def sha256(self) -> str:
        """The hash of tokenizer.json: two tokenizers with the same hash give the same ids."""
        return hashlib.sha256(self._definition.encode()).hexdigest()


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")
