"""A prompt and its K completions as one row, so that the prompt is computed once.

Owns the layout, the mask and the positions. A completion's tokens see the prompt and their own completion; positions
go on from the prompt's end in each of them, so that every hidden state is the one that the whole conversation alone
would give. Knows nothing of losses or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stateofgpt.data.comparisons import Ranking
from stateofgpt.rl.reward_training import conversation_ids
from stateofgpt.text.chat import ChatFormat

UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class PackedRow:
    """Ids of a prompt, and of what follows it in each completion (at least one id)."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def unpacked(self) -> int:
        """Tokens of the completions' whole conversations, one by one."""
        return len(self.prompt) * len(self.completions) + sum(map(len, self.completions))


def pack(chat: ChatFormat, ranking: Ranking, context: int) -> PackedRow:
    """The row of a ranking: what its rendered conversations begin with alike is the prompt.

    Where the prompt and the longest completion exceed `context`, the oldest tokens are dropped, from all alike.
    """
    wholes = [conversation_ids(chat, ranking.prompt, c, UNBOUNDED) for c in ranking.completions]
    shared = 0
    shortest = min(map(len, wholes)) - 1
    while shared < shortest and all(ids[shared] == wholes[0][shared] for ids in wholes):
        shared += 1
    tails = [tuple(ids[shared:][-context:]) for ids in wholes]
    room = context - max(map(len, tails))
    prompt = wholes[0][:shared]
    return PackedRow(tuple(prompt[max(0, shared - room) :]), tuple(tails))


@dataclass(frozen=True)
class PackedBatch:
    """`ids`, `positions` [B, T] and `mask` [B, 1, T, T] (True: may look) for a decoder; `spans[b][k]` is where
    completion k of row b begins and ends (exclusive), so that its last token is at the end less one."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    spans: tuple[tuple[tuple[int, int], ...], ...]

    def to(self, device: torch.device) -> PackedBatch:
        """The same on another device, or itself where it is there already."""
        if self.ids.device == device:
            return self
        ids, positions, mask = (x.to(device, non_blocking=True) for x in (self.ids, self.positions, self.mask))
        return PackedBatch(ids, positions, mask, self.spans)


def batch(rows: Sequence[PackedRow], pad_id: int) -> PackedBatch:
    """Rows side by side, padded on the right, on the CPU."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    positions = torch.zeros((len(rows), longest), dtype=torch.int64)
    part = torch.full((len(rows), longest), -1, dtype=torch.int64)  # 0 is the prompt, k + 1 completion k
    spans = []
    for b, row in enumerate(rows):
        begin, mine = len(row.prompt), []
        ids[b, :begin] = torch.tensor(row.prompt, dtype=torch.int64)
        positions[b, :begin] = torch.arange(begin)
        part[b, :begin] = 0
        for k, tail in enumerate(row.completions):
            end = begin + len(tail)
            ids[b, begin:end] = torch.tensor(tail)
            positions[b, begin:end] = len(row.prompt) + torch.arange(len(tail))
            part[b, begin:end] = k + 1
            mine.append((begin, end))
            begin = end
        spans.append(tuple(mine))
    places = torch.arange(longest)
    causal = places[None, :, None] >= places[None, None, :]
    own = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    return PackedBatch(ids, positions, (causal & own)[:, None], tuple(spans))


def by_length(rows: Sequence[PackedRow], most_tokens: int) -> list[list[int]]:
    """Indices of rows in batches of similar length, each of at most `most_tokens` with padding (or one row)."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    out: list[list[int]] = []
    for i in order:
        if out and (len(out[-1]) + 1) * len(rows[i]) <= most_tokens:
            out[-1].append(i)
        else:
            out.append([i])
    return out
