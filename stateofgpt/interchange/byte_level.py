"""The tokenizer of a GGUF file, when it is byte-level BPE, as a `tokenizer.json`.

Owns: which pre-tokenizers are known, and how GGUF's lists of tokens, types and merges become a tokenizer of the
`tokenizers` library. Knows nothing of weights.

The tokens that the file calls control tokens become special tokens. There is no unknown token inside the model: a
character whose bytes the vocabulary lacks then gives nothing, where it would otherwise give a special id, which text
must never do. (SmolLM2's vocabulary lacks 21 bytes; 13 of them are in no UTF-8.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stateofgpt.errors import CheckpointError
from stateofgpt.interchange.imported import Vocabulary

# llama.cpp's name of a pre-tokenizer, and whether each digit is split off before GPT-2's pattern.
PRE_TOKENIZERS: Mapping[str, bool] = {"smollm": True, "gpt-2": False}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5


def vocabulary(metadata: Mapping[str, Any], size: int, where: str) -> Vocabulary:
    """The tokenizer and chat template in the metadata of the file at `where`; CheckpointError when they are unsound."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(
            f"{where} has the tokenizer {str(kind)[:40]} with pre-tokenizer {str(pre)[:40]}, "
            f"readable is gpt2 (byte-level BPE) with {known}"
        )
    if metadata.get("tokenizer.ggml.add_space_prefix", False) is not False:
        raise CheckpointError(f"{where} wants a space before every text, which byte-level BPE does not do here")
    tokens = _list(metadata, "tokens", str, where)
    types = _list(metadata, "token_type", int, where)
    merges = _list(metadata, "merges", str, where)
    if len(types) != size or len(tokens) != size or len(set(tokens)) != size:
        raise CheckpointError(f"{where} is damaged: its {size:,} tokens need one type each and must differ")
    if bad := [kind for kind in types if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED)]:
        raise CheckpointError(f"{where} has a token of type {bad[0]}, which byte-level BPE does not know")
    ids = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=_pairs(merges, ids, where), fuse_unk=False, byte_fallback=False))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = [pre_tokenizers.Digits(individual_digits=True)] if PRE_TOKENIZERS[pre] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    specials = tuple(number for number, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN))
    added = [number for number, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN, _USER)]
    backend.add_tokens(  # in order of ids, so that each keeps its own
        [AddedToken(tokens[n], special=types[n] != _USER, normalized=False) for n in added]
    )
    eos = _id(metadata, "eos", size, where)
    if eos is None or eos not in specials:
        raise CheckpointError(f"{where} names no control token as its end of text, so no answer would ever end")
    bos, pad = _id(metadata, "bos", size, where), _id(metadata, "padding", size, where)
    template = metadata.get("tokenizer.chat_template")
    return Vocabulary(
        definition=backend.to_str(pretty=True),
        tokens=tuple(tokens),
        bos=eos if bos is None else bos,
        eos=(eos,),
        pad=eos if pad is None else pad,
        unk=_id(metadata, "unknown", size, where),
        specials=specials,
        chat_template=template if isinstance(template, str) else None,
    )


def _list(metadata: Mapping[str, Any], key: str, kind: type, where: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise CheckpointError(f"{where} is damaged: tokenizer.ggml.{key} is no list of {kind.__name__}")
    return values


def _id(metadata: Mapping[str, Any], role: str, size: int, where: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if value is not None and (type(value) is not int or not 0 <= value < size):
        raise CheckpointError(f"{where} is damaged: its {role} token {str(value)[:40]} is outside the vocabulary")
    return value


def _pairs(merges: list[str], ids: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"{where} is damaged: its merge {merge[:40]!r} uses tokens that it lacks")
        pairs.append((left, right))
    return pairs
