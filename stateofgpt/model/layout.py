"""What a model's tensors are called in a file, and how they lie there: as Hugging Face transformers has them.

Owns the names and layouts of every architecture, in both directions. For Qwen3 and LLaMA they are our own. GPT-2's
differ: query, key and value are one tensor, and matrices stand as [inputs, outputs]. Knows nothing of files or configs.

In the optimizer the three projections of a GPT-2 are three matrices, as they are in the other architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.lora import merged_state

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_GPT2_TRUNK = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
_GPT2_BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
# Constants that some writers stored beside the weights: causal masks, and the frequencies of rotary positions.
_BUFFERS = {
    "gpt2": re.compile(r"(.+\.)?attn\.(masked_)?bias"),
    "llama": re.compile(r"(.+\.)?rotary_emb\.inv_freq"),
    "qwen3": re.compile(r"(.+\.)?rotary_emb\.inv_freq"),
}


@dataclass(frozen=True)
class Place:
    """One tensor of a file: one of ours, or several along their first dimension; `transposed` after that."""

    parts: tuple[str, ...]
    transposed: bool = False

    def join(self, own: Mapping[str, Tensor]) -> Tensor:
        """The file's tensor, made of ours."""
        tensor = own[self.parts[0]] if len(self.parts) == 1 else torch.cat([own[name] for name in self.parts])
        return tensor.t() if self.transposed else tensor

    def fill(self, own: Mapping[str, Tensor], tensor: Tensor) -> None:
        """Copy the file's `tensor` into ours."""
        if self.transposed:
            tensor = tensor.t()
        for name, piece in zip(self.parts, tensor.split([own[n].shape[0] for n in self.parts]), strict=True):
            own[name].copy_(piece)


def own_tensors(model: nn.Module, config: GPTConfig) -> dict[str, Tensor]:
    """What is stored of a GPT or a reward model, under our names and with adapters merged; a tied head is the embedding
    and not stored twice."""
    tensors = merged_state(model)
    if isinstance(model, GPT) and config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    return tensors


def places(config: GPTConfig, own: Iterable[str]) -> dict[str, Place]:
    """Every tensor of a file, by its name there, that holds our tensors `own`."""
    own = list(own)
    if config.arch != "gpt2":
        return {name: Place((name,)) for name in own}
    found: dict[str, Place] = {}
    for theirs, ours in _GPT2_TRUNK.items():
        for kind in ("weight", "bias"):
            found[f"transformer.{theirs}.{kind}"] = Place((f"model.{ours}.{kind}",))
    for i in range(config.num_hidden_layers):
        for theirs, parts in _GPT2_BLOCK.items():
            for kind in ("weight", "bias"):
                transposed = kind == "weight" and not theirs.startswith("ln_")
                place = Place(tuple(f"model.layers.{i}.{part}.{kind}" for part in parts), transposed)
                found[f"transformer.h.{i}.{theirs}.{kind}"] = place
    found |= {name: Place((name,)) for name in own if not name.startswith("model.")}  # the head
    held = set(own)
    return {name: place for name, place in found.items() if held.issuperset(place.parts)}


def to_file(config: GPTConfig, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as a file holds them."""
    return {name: place.join(own) for name, place in places(config, own).items()}


def tied_embedding(config: GPTConfig, expected: Mapping[str, object]) -> str | None:
    """The embedding's name in a file whose head, if it is stored too, must equal it; None for other models."""
    if not config.tie_word_embeddings or "score.weight" in expected:
        return None
    return "transformer.wte.weight" if config.arch == "gpt2" else EMBEDDING


def known_as(name: str, expected: Mapping[str, object], config: GPTConfig) -> str | None:
    """The name in `expected` that a file's `name` stands for, or None for a constant that is no weight.

    A trunk that was saved alone has no prefix. What is not known comes back as it is.
    """
    if name in expected:
        return name
    if _BUFFERS[config.arch].fullmatch(name):
        return None
    whole = f"{'transformer' if config.arch == 'gpt2' else 'model'}.{name}"
    return whole if whole in expected else name
