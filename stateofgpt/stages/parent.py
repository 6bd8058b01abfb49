"""The model that a run begins from, where it does not begin from random weights.

Owns: what such a model must have, its identity in the run (another one in the same place is refused), that dropout it
asks for is left out, and which of its parameters are trained. Knows nothing of what a stage teaches it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from stateofgpt.errors import CheckpointError, RunError
from stateofgpt.model.checkpoint import asked_dropout, load_model, read_lineage
from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.model.lora import LoraConfig, add_lora
from stateofgpt.run import Stage
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer

Decoder = TypeVar("Decoder", GPT, RewardModel, ValueModel)


def check(folder: Path) -> None:
    """Raise CheckpointError when no run can begin from the model in `folder`, before any time is spent."""
    tokenizer = Tokenizer.load(folder)
    ChatFormat(tokenizer)
    _fits(folder, load_model(folder), tokenizer)


def begin_from(folder: Path, stage: Stage, rank: int | None, seed: int) -> GPT:
    """The model in `folder`, ready to be trained on (see `trained`). RunError when it is not the one this stage began
    with."""
    lineage = read_lineage(folder)
    here = {"id": lineage.id, "name": lineage.name}
    known = stage.decide("parent", lambda: here)
    if known["id"] != here["id"]:
        raise RunError(
            f"{folder} holds another model than the one this run began from ({known['name']}, {known['id']}); put that "
            "one back, or choose another --out"
        )
    if left_out := stage.decide("dropout left out", lambda: asked_dropout(folder)):
        asked = ", ".join(f"{key} {value:g}" for key, value in left_out.items())
        print(f"note: the model asks for dropout in training ({asked}), and is trained without", file=sys.stderr)
    model = load_model(folder)
    _fits(folder, model, Tokenizer.load(stage.dir.with_name("tokenize")))
    return trained(model, rank, seed)


def trained(model: Decoder, rank: int | None, seed: int) -> Decoder:
    """`model` with the parameters marked that training may change: all of them, or with a `rank` those of adapters that
    are put beside every frozen matrix, drawn from `seed`, and a scalar head, which is new."""
    if rank is None:
        return model.requires_grad_(True)
    add_lora(model, adapters_of(model, rank), torch.Generator().manual_seed(seed))
    return model


def adapters_of(model: GPT | RewardModel | ValueModel, rank: int) -> LoraConfig:
    """Adapters of one rank beside all matrices of the blocks, with the usual strength of twice the rank."""
    found = {
        name.rpartition(".")[2] for name, layer in model.model.layers.named_modules() if isinstance(layer, nn.Linear)
    }
    return LoraConfig(r=rank, alpha=2.0 * rank, target_modules=tuple(sorted(found)))


def _fits(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} tokens and the model knows "
            f"{model.config.vocab_size:,}; give a folder whose files belong together"
        )
