"""Held-out bits per byte of a base model, per source of the mixture. Owns nothing else; trains nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stateofgpt.data.batches import validation_rows
from stateofgpt.data.shards import Shards
from stateofgpt.eval.likelihood import bits_per_byte
from stateofgpt.model.gpt import GPT
from stateofgpt.train.loss import Batch, LanguageModelLoss

_AT_ONCE = 16  # rows


@torch.no_grad()
def held_out(
    model: GPT, shards: Shards, weights: Mapping[str, float], context: int, max_tokens: int, begins: int | None
) -> dict[str, float]:
    """`val_bpb_SOURCE` of up to `max_tokens` held-out tokens each, and `val_bpb`, their mean by mixture weight.

    In float32, not compiled, so that runs of any way compare. `begins` is the id with which documents begin, where they
    are kept apart.
    """
    loss, out = LanguageModelLoss("float32"), {}
    for name in shards.sources:
        ids, targets, mask, n_bytes = validation_rows(shards, name, context, max_tokens)
        if n_bytes == 0:
            continue
        nats = sum(
            loss(model, Batch.of(*(x[i : i + _AT_ONCE] for x in (ids, targets, mask)), begins=begins)).item()
            for i in range(0, len(ids), _AT_ONCE)
        )
        out[f"val_bpb_{name}"] = bits_per_byte(nats, n_bytes)
    total = sum(weights[n.removeprefix("val_bpb_")] for n in out)
    mean = sum(weights[n.removeprefix("val_bpb_")] * v for n, v in out.items()) / total
    return {"val_bpb": mean, **out}
