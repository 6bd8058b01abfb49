"""Small models in the formats of other software, written by the formats' own descriptions and not by our code."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The king said 4729 times that it is 12.\n",
    "It isn't  far, the old man's dog said: run!",
    "Grüße, 東京 ½ 😀 \t end",
]
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_llama(vocab_size: int, *, tied: bool = True, seed: int = 5, context: int = 64) -> Any:
    """A LlamaForCausalLM of transformers in which every weight matters."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.3 if p.ndim == 1 else 0.15, generator=generator)
    return model


def some_ids(vocab_size: int, length: int = 40) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(6))


def rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from transformers' order to pairs side by side, one row at a time."""
    size = weight.shape[0] // heads
    out = torch.empty_like(weight)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + i + size // 2]
    return out


# ----------------------------------------------------------------------------------------------------------------- GGUF


def byte_level_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """As SmolLM2's is made: special tokens first, digits one by one, GPT-2's pattern."""
    backend = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return backend


def write_gguf(path: Path, model: Any, tokenizer: Tokenizer, storage: str = "F32", **changes: Any) -> dict[str, Any]:
    """The model as llama.cpp's converter writes it; returns each matrix's stored bytes by transformers' name.

    `changes` are metadata that differs: a value of None leaves the key out. `tensors` replaces or adds tensors.
    """
    gguf = pytest.importorskip("gguf")
    import json

    config, definition = model.config, json.loads(tokenizer.to_str())["model"]
    tokens = sorted(definition["vocab"], key=definition["vocab"].__getitem__)
    replaced = changes.pop("tensors", {})
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    metadata: dict[str, Any] = {
        "general.name": "Tiny", "general.license": "mit",
        "llama.block_count": config.num_hidden_layers, "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size, "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps, "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": config.head_dim, "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in definition["merges"]],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip
    for key, value in {**metadata, **changes}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    kind, stored = gguf.GGMLQuantizationType[storage], {}
    for name, weight in gguf_tensors(model).items():
        values = replaced.pop(name, weight)
        if values is None:
            continue
        if values.ndim == 1 or storage == "F32":
            writer.add_tensor(name, values)
        else:
            stored[name] = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, stored[name], raw_dtype=kind)
    for name, values in replaced.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def gguf_tensors(model: Any) -> dict[str, Any]:
    """The weights under GGUF's names."""
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    out = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    if not model.config.tie_word_embeddings:
        out["output.weight"] = model.lm_head.weight
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach()
            if theirs in ("attn_q", "attn_k"):
                config = model.config
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = rotary_pairs(weight, heads)
            out[f"blk.{number}.{theirs}.weight"] = weight
    return {name: weight.detach().numpy() for name, weight in out.items()}


def dequantised(raw: Any, storage: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of quantised bytes, block by block, by ggml's description of the two types."""
    out: list[float] = []
    data = raw.tobytes()
    if storage == "Q8_0":  # a half-precision scale, 32 signed bytes
        for at in range(0, len(data), 34):
            (scale,) = struct.unpack_from("<e", data, at)
            out += [scale * q for q in struct.unpack_from("<32b", data, at + 2)]
    else:  # Q4_1: scale and least value in half precision; the low nibbles of 16 bytes, then the high ones
        for at in range(0, len(data), 20):
            scale, least = struct.unpack_from("<2e", data, at)
            packed = data[at + 4 : at + 20]
            out += [scale * q + least for q in [*(b & 15 for b in packed), *(b >> 4 for b in packed)]]
    return torch.tensor(out, dtype=torch.float32).view(shape)


# ------------------------------------------------------------------------------------------------------------- llama2.c


def write_llama2c(path: Path, model: Any) -> None:
    """The model as llama2.c's `export.py --version 0` writes it."""
    c, layers = model.config, model.model.layers
    vocab = c.vocab_size if c.tie_word_embeddings else -c.vocab_size
    numbers = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
    blocks = [model.model.embed_tokens.weight, *(layer.input_layernorm.weight for layer in layers)]
    blocks += [rotary_pairs(layer.self_attn.q_proj.weight, c.num_attention_heads) for layer in layers]
    blocks += [rotary_pairs(layer.self_attn.k_proj.weight, c.num_key_value_heads) for layer in layers]
    blocks += [layer.self_attn.v_proj.weight for layer in layers]
    blocks += [layer.self_attn.o_proj.weight for layer in layers]
    blocks += [layer.post_attention_layernorm.weight for layer in layers]
    for name in ("gate_proj", "down_proj", "up_proj"):
        blocks += [layer.mlp.get_submodule(name).weight for layer in layers]
    blocks.append(model.model.norm.weight)
    angles = torch.arange(c.max_position_embeddings)[:, None] / 10000.0 ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
    blocks += [angles.cos(), angles.sin()]
    if not c.tie_word_embeddings:
        blocks.append(model.lm_head.weight)
    data = b"".join(block.detach().numpy().astype("<f4").tobytes() for block in blocks)
    path.write_bytes(struct.pack("<7i", *numbers, vocab, c.max_position_embeddings) + data)


def pieces(words: list[str]) -> list[tuple[str, float]]:
    """llama2.c's tokens and scores: specials, bytes, then each word's prefixes-of-merges in order, best score first."""
    out = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256))]
    return out + [(word, -float(rank)) for rank, word in enumerate(words)]


def write_tokenizer_bin(path: Path, tokens: list[tuple[str, float]]) -> None:
    encoded = [(text.encode(), score) for text, score in tokens]
    head = struct.pack("<i", max(len(text) for text, _ in encoded))
    path.write_bytes(head + b"".join(struct.pack("<fi", score, len(text)) + text for text, score in encoded))


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).float().log_softmax(-1)


def as_float32(data: bytes, count: int, at: int) -> Any:
    return numpy.frombuffer(data, dtype="<f4", count=count, offset=at)
