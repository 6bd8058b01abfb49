"""One decoder on both sides of a benchmark: ours, and the LLaMA of transformers with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stateofgpt.model.gpt import GPT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NAMES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def stir(model: GPT, std: float | None = None) -> None:
    """Draw the output projections, which start at zero and make every layer the identity; of 1 / sqrt(their width)
    where no `std` is given."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.normal_(std=p.shape[1] ** -0.5 if std is None else std, generator=generator)


def llama_of(model: GPT, use_cache: bool = True) -> LlamaForCausalLM:
    """A decoder of the family llama with one matrix for embedding and head, in transformers, in float32; without
    `use_cache`, which is for drawing, it trains faster."""
    from transformers import LlamaConfig, LlamaForCausalLM

    same = {name: getattr(model.config, name) for name in NAMES}
    made = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, use_cache=use_cache, **same))
    made.load_state_dict(model.state_dict())
    return made
