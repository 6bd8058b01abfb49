"""The last blocks of a reward model, trained alone on the hidden states that the frozen ones below have left.

Owns the module, its batches and its loss. The blocks below `cut` are computed once for all epochs and folds; what is
computed again and again is a few blocks over a prompt packed with its completions. Knows nothing of files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import RewardModel
from stateofgpt.model.lora import LoraConfig, add_lora, merged_state
from stateofgpt.rl.linear import Floats, Judged
from stateofgpt.rl.packed import PackedBatch, PackedRow, batch, by_length
from stateofgpt.train.loss import Way

TOKENS_AT_ONCE = 4096


class Upper(nn.Module):
    """Copies of the blocks of `gpt` from `cut` on, the final norm and a scalar head that begins as `head` [C].

    With `lora` the blocks are frozen and adapters of that rank learn beside them; else all of this learns.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, gpt: GPT, cut: int, head: Floats, lora: LoraConfig | None, seed: int) -> None:
        super().__init__()
        trunk = gpt.model
        inner = nn.Module()
        inner.layers = nn.ModuleList(copy.deepcopy(block) for block in list(trunk.layers)[cut:])
        inner.norm = copy.deepcopy(trunk.norm)
        self.model = inner
        self.score = nn.Linear(gpt.config.hidden_size, 1, bias=False).to(trunk.cos.device)
        with torch.no_grad():
            self.score.weight.copy_(torch.from_numpy(head)[None])
        self.register_buffer("cos", trunk.cos, persistent=False)
        self.register_buffer("sin", trunk.sin, persistent=False)
        if lora is not None:
            add_lora(self, lora, torch.Generator().manual_seed(seed % 2**63))

    def forward(self, x: Tensor, packed: PackedBatch) -> Tensor:
        """Scores of all completions of a batch, in order, from hidden states `x` [B, T, C] before the first block."""
        cos, sin = (t[packed.branches.positions][:, None].to(x.dtype) for t in (self.cos, self.sin))
        mask = packed.branches.mask
        for block in self.model.layers:  # type: ignore[union-attr]
            x = block(x, cos, sin, mask)
        ends = [(b, end - 1) for b, spans in enumerate(packed.spans) for _, end in spans]
        rows, places = (torch.tensor(side).to(x.device, non_blocking=True) for side in zip(*ends, strict=True))
        scores: Tensor = self.score(self.model.norm(x[rows, places])).squeeze(-1)  # type: ignore[operator]
        return scores.float()

    @torch.no_grad()
    def put_into(self, model: RewardModel, cut: int) -> None:
        """Give the whole reward model these weights, adapters merged."""
        state = merged_state(self)
        for i, block in enumerate(list(model.model.layers)[cut:]):
            prefix = f"model.layers.{i}."
            block.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        prefix = "model.norm."
        model.model.norm.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        model.score.weight.copy_(state["score.weight"])


@dataclass(frozen=True)
class UpperBatch:
    """Packed rows with the hidden states they begin from, and their pairs by number of completion in the batch. On the
    CPU; `to` the device of the module that learns."""

    states: Tensor  # [B, T, C]
    packed: PackedBatch
    first: Tensor
    second: Tensor
    target: Tensor
    weights: Tensor

    @property
    def weight(self) -> float:
        return float(self.weights.sum())

    def to(self, device: torch.device) -> UpperBatch:
        """The same on another device, or itself where it is there already."""
        if self.states.device == device:
            return self
        states, *pairs = (
            x.to(device, non_blocking=True) for x in (self.states, self.first, self.second, self.target, self.weights)
        )
        return UpperBatch(states, self.packed.to(device), *pairs)


class Cached:
    """Rows, their hidden states before the cut and their pairs, from which batches are made."""

    def __init__(self, rows: Sequence[PackedRow], states: Sequence[Tensor], pairs: Judged, pad_id: int) -> None:
        self.rows, self.states, self.pairs, self.pad_id = rows, states, pairs, pad_id
        n = np.array([len(row.completions) for row in rows])
        self.begin = np.concatenate(([0], np.cumsum(n)))
        order = np.argsort(pairs.ranking, kind="stable")
        bounds = np.searchsorted(pairs.ranking[order], np.arange(len(rows) + 1))
        self.mine = [order[bounds[i] : bounds[i + 1]] for i in range(len(rows))]

    def batches(self, chosen: Sequence[int]) -> list[UpperBatch]:
        """The rows `chosen` in batches of similar length."""
        return [made for _, made in self.parts(chosen)]

    def parts(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], UpperBatch]]:
        """The same, each with the numbers of its rows."""
        for part in by_length([self.rows[i] for i in chosen], TOKENS_AT_ONCE):
            mine = [chosen[i] for i in part]
            yield mine, self._batch(mine)

    def _batch(self, chosen: Sequence[int]) -> UpperBatch:
        packed = batch([self.rows[i] for i in chosen], self.pad_id)
        width = self.states[chosen[0]].shape[1]
        states = torch.zeros(*packed.ids.shape, width, dtype=torch.float32)
        first, second, target, weights = [], [], [], []
        begin = 0
        for b, i in enumerate(chosen):
            states[b, : len(self.rows[i])] = self.states[i].float()
            shift = begin - int(self.begin[i])
            for pair in self.mine[i]:
                first.append(int(self.pairs.first[pair]) + shift)
                second.append(int(self.pairs.second[pair]) + shift)
                target.append(float(self.pairs.target[pair]))
                weights.append(float(self.pairs.weight[pair]))
            begin += len(self.rows[i].completions)
        return UpperBatch(
            states,
            packed,
            torch.tensor(first, dtype=torch.int64),
            torch.tensor(second, dtype=torch.int64),
            torch.tensor(target),
            torch.tensor(weights),
        )


class VoteLoss:
    """`loss(model, batch)`: cross-entropy of the pairs' targets under Bradley-Terry, in nats, summed by weight."""

    def __init__(self, way: Way) -> None:
        self.way = way

    def __call__(self, model: Upper, chosen: UpperBatch) -> Tensor:
        chosen = chosen.to(model.score.weight.device)
        scores = scored(model, chosen, self.way)
        margin = scores[chosen.first] - scores[chosen.second]
        losses = F.binary_cross_entropy_with_logits(margin, chosen.target, reduction="none")
        return (losses * chosen.weights).sum()


def scored(model: Upper, chosen: UpperBatch, way: Way) -> Tensor:
    """Scores [completions] of a batch, where the model is."""
    chosen = chosen.to(model.score.weight.device)
    with way.autocast():
        out: Tensor = model(chosen.states.to(way.torch_dtype), chosen.packed)
    return out
