"""What a frozen model makes of each completion: hidden states, computed once, from which a head is fitted in moments.

Owns one pass over packed rows and what is kept of it. At each of some depths a completion is described by the final
norm of the hidden state of its last token, which is what a reward model cut off at that depth reads, and by the mean
over its own tokens. Where upper layers are to be trained, the hidden states of all tokens at the cut are kept too.
All of it is on the CPU, copied there once per pass; the pass is where the model is. Knows nothing of heads, votes or
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stateofgpt.model.gpt import GPT
from stateofgpt.rl.packed import PackedRow, batch, by_length
from stateofgpt.train.loss import Way

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Features:
    """`last`, `mean` [completions, depths, C] float32, completions in the order of rows; `states`: for each row the
    hidden states [tokens, C] before block `cut`, in bfloat16, or nothing."""

    last: Tensor
    mean: Tensor
    states: tuple[Tensor, ...]


def depths_of(n_layers: int, wanted: int = 4) -> tuple[int, ...]:
    """Numbers of blocks after which a head could read: `wanted` of them, from half of all blocks to all."""
    first = max(1, n_layers // 2)
    steps = max(1, min(wanted, n_layers - first + 1))
    span = n_layers - first
    return tuple(dict.fromkeys(first + round(span * i / max(1, steps - 1)) if steps > 1 else n_layers
                               for i in range(steps)))  # fmt: skip


@torch.no_grad()
def compute(
    model: GPT, rows: Sequence[PackedRow], pad_id: int, depths: Sequence[int], way: Way, cut: int | None = None
) -> Features:
    """Features of all completions of `rows`."""
    n = [len(row.completions) for row in rows]
    first = [sum(n[:i]) for i in range(len(n))]
    width = model.config.hidden_size
    last = torch.zeros(sum(n), len(depths), width)
    mean = torch.zeros(sum(n), len(depths), width)
    states: list[Tensor] = [torch.empty(0)] * (0 if cut is None else len(rows))
    trunk, device = model.model, model.lm_head.weight.device
    for chosen in by_length(rows, TOKENS_AT_ONCE):
        packed = batch([rows[i] for i in chosen], pad_id).to(device)
        seen = _Seen(trunk.layers, depths, cut)
        with way.autocast():
            trunk.run(trunk.embed_tokens(packed.ids), packed.branches.mask, packed.branches.positions, run_block=seen)
            normed = [trunk.norm(x).float().cpu() for x in seen.after]
        before = None if seen.before is None else seen.before.to(torch.bfloat16).cpu()
        for b, i in enumerate(chosen):
            if before is not None:
                states[i] = before[b, : len(rows[i])].clone()
            for k, (begin, end) in enumerate(packed.spans[b]):
                for d, x in enumerate(normed):
                    last[first[i] + k, d] = x[b, end - 1]
                    mean[first[i] + k, d] = x[b, begin:end].mean(0)
    return Features(last, mean, tuple(states))


class _Seen:
    """Runs a block and remembers hidden states on the way: after some depths, and before the block `cut`."""

    def __init__(self, layers: nn.ModuleList, depths: Sequence[int], cut: int | None) -> None:
        self._number = {id(block): i for i, block in enumerate(layers)}
        self._depths, self._cut = tuple(depths), cut
        self.after: list[Tensor] = []
        self.before: Tensor | None = None

    def __call__(self, block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        number = self._number[id(block)]
        if number == self._cut:
            self.before = x
        out: Tensor = block(x, cos, sin, mask)
        if number + 1 in self._depths:
            self.after.append(out)
        return out
