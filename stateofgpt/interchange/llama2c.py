"""Models in llama2.c's first format: seven numbers, then the weights in a fixed order.

Owns: that order, and the limits on the numbers. Knows nothing of the tokenizer beside it (that is `sentencepiece`).

Source: https://github.com/karpathy/llama2.c, `export.py` (`legacy_export`) and `run.c` (`memory_map_weights`). There is
no magic number, so the size of the file is what proves the header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy
import torch
from torch import Tensor

from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.interchange.imported import from_interleaved
from stateofgpt.model.gpt import GPTConfig

_HEADER = struct.Struct("<7i")
_NEWER = 0x616B3432  # "ak42", the magic number of the later formats
_MAX = 1 << 20
ROPE_THETA, EPSILON = 10000.0, 1e-5  # fixed in run.c


def read_config(path: Path) -> GPTConfig:
    """The shape of the model in the file, whose size must be exactly that of such a model; else CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    if len(head) < _HEADER.size:
        raise CheckpointError(f"{path} is too short for a llama2.c model")
    dim, hidden, layers, heads, kv_heads, vocab, context = numbers = _HEADER.unpack(head)
    if dim == _NEWER:
        raise CheckpointError(f"{path} is in a later llama2.c format; export it again with `--version 0`")
    if any(not 1 <= abs(n) <= _MAX for n in numbers) or min(*numbers[:5], context) < 1 or dim % heads:
        raise CheckpointError(f"{path} is no llama2.c model: its header says {', '.join(map(str, numbers))}")
    try:
        config = GPTConfig(
            arch="llama",
            vocab_size=abs(vocab),
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim // heads,
            intermediate_size=hidden,
            max_position_embeddings=context,
            rope_theta=ROPE_THETA,
            rms_norm_eps=EPSILON,
            tie_word_embeddings=vocab > 0,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} is no llama2.c model: {error}") from error
    expected = _HEADER.size + 4 * sum(prod(shape) for _, shape in _order(config))
    if size != expected:
        raise CheckpointError(
            f"{path} is no whole llama2.c model: its header asks for {expected:,} bytes, the file has {size:,}"
        )
    return config


def read_tensors(path: Path, config: GPTConfig) -> dict[str, Tensor]:
    """The weights of the file under transformers' names, float32; `config` is what `read_config` said of it."""
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        file.seek(_HEADER.size)
        for name, shape in _order(config):
            data = file.read(4 * prod(shape))
            if len(data) != 4 * prod(shape):
                raise CheckpointError(f"{path} is cut short")
            if not name:
                continue
            values = torch.from_numpy(numpy.frombuffer(data, dtype="<f4").astype(numpy.float32)).view(shape)
            if "{}" not in name:
                tensors[name] = values
                continue
            for layer, value in enumerate(values):
                tensors[name.format(layer)] = _rotary(name, value, config).clone()
    return tensors


def _rotary(name: str, value: Tensor, config: GPTConfig) -> Tensor:
    if "q_proj" in name:
        return from_interleaved(value, config.num_attention_heads)
    return from_interleaved(value, config.num_key_value_heads) if "k_proj" in name else value


def _order(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each block of the file, in its order; {} is a layer, "" what is computed and not read."""
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    layer = "model.layers.{}."
    yield "model.embed_tokens.weight", (config.vocab_size, width)
    yield layer + "input_layernorm.weight", (layers, width)
    yield layer + "self_attn.q_proj.weight", (layers, width, width)
    yield layer + "self_attn.k_proj.weight", (layers, keys, width)
    yield layer + "self_attn.v_proj.weight", (layers, keys, width)
    yield layer + "self_attn.o_proj.weight", (layers, width, width)
    yield layer + "post_attention_layernorm.weight", (layers, width)
    yield layer + "mlp.gate_proj.weight", (layers, inner, width)  # w1
    yield layer + "mlp.down_proj.weight", (layers, width, inner)  # w2
    yield layer + "mlp.up_proj.weight", (layers, inner, width)  # w3
    yield "model.norm.weight", (width,)
    yield "", (2, config.max_position_embeddings, config.head_dim // 2)  # cosines and sines of the rotary embedding
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, width)
