"""A prompt and its K completions as one row, so that the prompt is computed once.

Owns the layout. A completion's tokens see the prompt and their own completion; positions
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
from stateofgpt.train.branches import Branches

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
    """`ids` [B, T], with how their completions branch, for a decoder; `spans[b][k]` is where completion k of row b
    begins and ends (exclusive), so that its last token is at the end less one."""

    ids: Tensor
    branches: Branches
    spans: tuple[tuple[tuple[int, int], ...], ...]

    def to(self, device: torch.device) -> PackedBatch:
        """The same on another device, or itself where it is there already."""
        if self.ids.device == device:
            return self
        return PackedBatch(self.ids.to(device, non_blocking=True), self.branches.to(device), self.spans)


def batch(rows: Sequence[PackedRow], pad_id: int) -> PackedBatch:
    """Rows side by side, padded on the right, on the CPU."""
    longest = max(map(len, rows))
    ids, positions, firsts, shared = [], [], [], []
    spans = []
    for row in rows:
        n, begin, mine = len(row.prompt), len(row.prompt), []
        ids.append([*row.prompt, *(i for tail in row.completions for i in tail)])
        positions.append([*range(n)])
        firsts.append([0] * n)
        for tail in row.completions:
            end = begin + len(tail)
            positions[-1].extend(range(n, n + len(tail)))
            firsts[-1].extend([begin] * len(tail))
            mine.append((begin, end))
            begin = end
        shared.append([0] * n + [n] * (begin - n) + [0] * (longest - begin))
        ids[-1].extend([pad_id] * (longest - begin))
        positions[-1].extend([0] * (longest - begin))
        firsts[-1].extend(range(begin, longest))  # what is padding sees itself
        spans.append(tuple(mine))
    whole = max(len(row.prompt) + max(map(len, row.completions)) for row in rows)
    places = torch.tensor(firsts, dtype=torch.int32), torch.tensor(shared, dtype=torch.int32)
    return PackedBatch(torch.tensor(ids), Branches(torch.tensor(positions), *places, whole), tuple(spans))


@dataclass(frozen=True)
class Placed:
    """Texts that were rows of their own, packed: the token at column c of row b stands at `begins[b]` + c of all packed
    places [B T] if it follows the prompt, and at `prompts[b]` + c in it. All on the CPU."""

    packed: PackedBatch
    begins: Tensor
    prompts: Tensor
    lengths: Tensor  # of the prompts

    def places(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where the tokens at these rows and columns stand."""
        return columns + torch.where(columns < self.lengths[rows], self.prompts[rows], self.begins[rows])


def together(ids: Tensor, same: Tensor, lengths: Tensor, ends: Tensor) -> Placed:
    """Pack rows of `ids` [B, T], each of which counts up to `ends` [B]. Rows with the same number in `same` [B] begin
    with the same prompt of `lengths` [B] tokens."""
    families: dict[int, list[int]] = {}
    for row, number in enumerate(same.tolist()):
        families.setdefault(number, []).append(row)
    size, end = lengths.tolist(), ends.tolist()
    rows = [
        PackedRow(
            tuple(ids[own[0], : size[own[0]]].tolist()), tuple(tuple(ids[b, size[b] : end[b]].tolist()) for b in own)
        )
        for own in families.values()
    ]
    packed = batch(rows, 0)
    width = packed.ids.shape[1]
    begins, prompts = torch.zeros_like(lengths), torch.zeros_like(lengths)
    for g, own in enumerate(families.values()):
        for b, (begin, _) in zip(own, packed.spans[g], strict=True):
            begins[b], prompts[b] = g * width + begin - size[b], g * width
    return Placed(packed, begins, prompts, lengths)


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
