"""One decoder on both sides of a benchmark: ours, and the LLaMA of transformers with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stateofgpt.model.convert import to_huggingface
from stateofgpt.model.gpt import GPT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def stir(model: GPT, std: float | None = None) -> None:
    """Draw the output projections, which start at zero and make every layer the identity; of 1 / sqrt(their width)
    where no `std` is given."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.normal_(std=p.shape[1] ** -0.5 if std is None else std, generator=generator)


def llama_of(model: GPT, use_cache: bool = True) -> LlamaForCausalLM:
    """A decoder of the family llama in transformers, in float32; without `use_cache`, which is for drawing, it trains
    faster."""
    from transformers import LlamaConfig, LlamaForCausalLM

    same = to_huggingface(model.config, "causal", bos=1, eos=[2], pad=2)
    same |= {"pad_token_id": None, "use_cache": use_cache}  # a row for padding would get no gradient
    made = LlamaForCausalLM(LlamaConfig(**same))
    made.load_state_dict(model.state_dict())
    return made
