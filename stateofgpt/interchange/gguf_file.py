"""A GGUF file of the llama architecture as a model of ours.

Owns: which metadata describes the shape, the names of tensors in GGUF and in transformers, and dequantisation into
float32. The bytes are read by the `gguf` package, after `gguf_header` has checked them. Knows nothing of folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.interchange import gguf_header
from stateofgpt.interchange.byte_level import vocabulary
from stateofgpt.interchange.imported import Imported, Origin, from_interleaved
from stateofgpt.model.gpt import GPTConfig

ARCHITECTURE = "llama"
_WHOLE = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OTHER = {
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "vocab_size",
}  # fmt: skip
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD = "output.weight"
MAX_PARAMETERS = 4_000_000_000  # 16 GB in float32, all of it in memory while it is written


def read(path: Path, origin: Origin | None = None) -> Imported:
    """The model in the GGUF file; `origin` replaces what the file says of itself.

    Raises CheckpointError in one sentence for a damaged or hostile file, another architecture, or a setting under which
    this program's forward pass would not be the model's.
    """
    reader, metadata = _open(path)
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{path} holds the architecture {str(architecture)[:40]!r}, readable is {ARCHITECTURE}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, path, tied=_HEAD not in stored)
    words = vocabulary(metadata, config.vocab_size, str(path))
    names = dict(tensor_names(config))
    expected = _shapes(config)
    if missing := sorted(names.keys() - stored.keys()) or sorted(stored.keys() - names.keys()):
        what = "lacks" if missing[0] in names else "holds the unknown"
        raise CheckpointError(f"{path} {what} tensor {missing[0][:80]}; it is damaged or no plain {ARCHITECTURE} model")
    for ours, theirs in ((names[name], tensor) for name, tensor in stored.items()):
        shape = tuple(int(n) for n in reversed(theirs.shape.tolist()))
        if shape != expected[ours]:
            raise CheckpointError(
                f"{path}: tensor {theirs.name} has shape {list(shape)}, its metadata asks for {list(expected[ours])}"
            )
    tensors = {names[name]: _tensor(tensor, names[name], config) for name, tensor in stored.items()}
    return Imported(origin or _origin(metadata, path, stored), config, tensors, words)


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    gguf_header.check(path)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"reading {path.name} takes the gguf package; install it with: pip install 'stateofgpt[gguf]'"
        ) from error
    try:
        reader = GGUFReader(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises whatever it stumbles over
        raise CheckpointError(
            f"{path} is no readable GGUF file ({type(error).__name__}: {str(error)[:120]})"
        ) from error


def _config(metadata: Mapping[str, Any], path: Path, tied: bool) -> GPTConfig:
    own = {k.partition(".")[2]: v for k, v in metadata.items() if k.startswith(f"{ARCHITECTURE}.")}
    if own.get("rope.scaling.type") == "none":
        own.pop("rope.scaling.type")
    if unknown := sorted(own.keys() - _WHOLE.keys() - _OTHER):
        raise CheckpointError(f"{path} has {ARCHITECTURE}.{unknown[0]} = {str(own[unknown[0]])[:40]}, unknown here")
    sizes: dict[str, Any] = {ours: _whole(own, key, path) for key, ours in _WHOLE.items()}
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    head_dim = _whole(own, "attention.key_length", path, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _whole(own, key, path, head_dim) != head_dim:
            raise CheckpointError(f"{path} has {ARCHITECTURE}.{key} = {own[key]}, this model only knows {head_dim}")
    words = metadata.get("tokenizer.ggml.tokens")
    n_words = len(words) if isinstance(words, list) else 0
    if not n_words or _whole(own, "vocab_size", path, n_words) != n_words:
        raise CheckpointError(f"{path} holds {n_words:,} tokens, which is not its vocab_size; it is damaged")
    try:
        config = GPTConfig(
            arch="llama",
            vocab_size=n_words,
            **sizes,
            num_key_value_heads=_whole(own, "attention.head_count_kv", path, heads),
            head_dim=head_dim,
            rope_theta=_real(own, "rope.freq_base", path, 10000.0),
            rms_norm_eps=_real(own, "attention.layer_norm_rms_epsilon", path),
            tie_word_embeddings=tied,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if config.num_hidden_layers > gguf_header.MAX_TENSORS or _parameters(config) > MAX_PARAMETERS:
        raise CheckpointError(
            f"{path} describes {_parameters(config):,} parameters, at most {MAX_PARAMETERS:,} are imported"
        )
    return config


def _parameters(config: GPTConfig) -> int:
    attention = 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + tables


def _whole(own: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = own.get(key, default)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise CheckpointError(f"{path} has {ARCHITECTURE}.{key} = {str(value)[:40]}, expected a whole number from 1")
    return value


def _real(own: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value = own.get(key, default)
    if not isinstance(value, float) or not 0 < value < 1e30:
        raise CheckpointError(f"{path} has {ARCHITECTURE}.{key} = {str(value)[:40]}, expected a number above 0")
    return float(f"{value:.7g}")  # the file has float32: 1e-5 would come out as 9.999999747378752e-06


def tensor_names(config: GPTConfig) -> Iterator[tuple[str, str]]:
    """The name of every tensor in GGUF, and in transformers."""
    yield "token_embd.weight", "model.embed_tokens.weight"
    yield "output_norm.weight", "model.norm.weight"
    if not config.tie_word_embeddings:
        yield _HEAD, "lm_head.weight"
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _OF_LAYER.items():
            yield f"blk.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight"


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor under its name in transformers."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
        "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
    }  # fmt: skip
    shapes = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in of_layer.items()
    }
    tables = {name: (config.vocab_size, width) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return {**shapes, **tables, "model.norm.weight": (width,)}


def _tensor(stored: Any, name: str, config: GPTConfig) -> Tensor:
    import numpy
    from gguf.quants import dequantize

    values = torch.from_numpy(numpy.array(dequantize(stored.data, stored.tensor_type), dtype=numpy.float32))
    if name.endswith("q_proj.weight"):
        return from_interleaved(values, config.num_attention_heads).contiguous()
    if name.endswith("k_proj.weight"):
        return from_interleaved(values, config.num_key_value_heads).contiguous()
    return values


def _origin(metadata: Mapping[str, Any], path: Path, stored: Mapping[str, Any]) -> Origin:
    """What the file says of itself, which is not more than a claim."""
    name, licence, maker = (metadata.get(f"general.{key}") for key in ("name", "license", "organization"))
    kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in stored.values()}))
    return Origin(
        name=name if isinstance(name, str) and name else path.stem,
        source=f"the GGUF file {path.name}, its weights dequantised from {kinds}",
        licence=licence if isinstance(licence, str) and licence else None,
        page=maker if isinstance(maker, str) and maker else None,
    )
