"""llama2.c's `tokenizer.bin`, SentencePiece BPE with scores, as a `tokenizer.json`.

Owns: the file's format, and how scores become merges in order. Knows nothing of weights.

SentencePiece begins with single characters and joins, again and again, the neighbours that make the token with the best
score. The `tokenizers` library joins by a ranked list of pairs; ranking every pair of tokens whose union is a token by
that token's score gives the same tokens. A space is written ▁ and one is put before every text; a character that is no
token becomes its bytes, <0x00> to <0xFF>.

Source: https://github.com/karpathy/llama2.c, `tokenizer.py` (`export`) and `run.c` (`build_tokenizer`, `encode`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from stateofgpt.errors import CheckpointError
from stateofgpt.interchange.imported import Vocabulary

SPECIALS = ("<unk>", "<s>", "</s>")
_UNK, _BOS, _EOS = range(3)
_FIRST = len(SPECIALS) + 256  # the first token that is neither special nor a byte
_MAX_LENGTH = 1 << 10


def read(path: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of the file, for a model of `vocab_size` tokens; CheckpointError when it is none or another's."""
    tokens, scores = _parse(path, vocab_size)
    expected = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens[: len(SPECIALS)] = [token.strip() for token in tokens[: len(SPECIALS)]]  # the file has "\n<s>\n"
    if tokens[:_FIRST] != expected:
        raise CheckpointError(f"{path} does not begin with <unk>, <s>, </s> and the 256 bytes; it is no tokenizer.bin")
    tokens[_FIRST:] = [token.replace(" ", "▁") for token in tokens[_FIRST:]]
    if len(set(tokens)) != vocab_size:
        raise CheckpointError(f"{path} is damaged: it holds a token twice")
    return Vocabulary(
        definition=_backend(tokens, scores).to_str(pretty=True),
        tokens=tuple(tokens),
        bos=_BOS,
        eos=(_EOS, _BOS),  # llama2.c trains on texts divided by <s>, and stops at one
        pad=_UNK,
        unk=_UNK,
        specials=(_UNK, _BOS, _EOS),
    )


def _parse(path: Path, vocab_size: int) -> tuple[list[str], list[float]]:
    try:
        if path.stat().st_size > 4 + vocab_size * (8 + _MAX_LENGTH):
            raise CheckpointError(f"{path} is larger than a tokenizer of {vocab_size:,} tokens can be")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    tokens: list[str] = []
    scores: list[float] = []
    at = 4  # after the length of the longest token, which nothing here needs
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if not 0 < length <= min(_MAX_LENGTH, len(data) - at) or not math.isfinite(score):
                raise CheckpointError(f"{path} is damaged: token {len(tokens)} has length {length} and score {score}")
            tokens.append(data[at : at + length].decode("utf-8"))
            scores.append(score)
            at += length
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no tokenizer.bin of {vocab_size:,} tokens: {error}") from error
    if at != len(data):
        raise CheckpointError(f"{path} holds more than the model's {vocab_size:,} tokens; it belongs to another model")
    return tokens, scores


def _backend(tokens: Sequence[str], scores: Sequence[float]) -> Tokenizer:
    ids = {token: number for number, token in enumerate(tokens)}
    normal = set(tokens[_FIRST:])
    ranked: list[tuple[float, int, str, str]] = []
    for token in tokens[_FIRST:]:
        for cut in range(1, len(token)):
            if token[:cut] in normal and token[cut:] in normal:
                ranked.append((-scores[ids[token]], cut, token[:cut], token[cut:]))
    pairs = [(left, right) for _, _, left, right in sorted(ranked, key=lambda item: item[:2])]
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=pairs, unk_token=SPECIALS[_UNK], fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos = SPECIALS[_BOS]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, _BOS)]
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return backend
