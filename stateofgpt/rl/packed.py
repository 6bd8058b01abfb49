"""How texts lie side by side in a batch; a prompt and its K completions as one row, so that it is computed once.

Owns the layout, and which rows go through a model together. A completion's tokens see the prompt and their own
completion; positions go on from the prompt's end in each of them, so that every hidden state is the one that the whole
conversation alone would give. Knows nothing of losses or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stateofgpt.data.comparisons import Ranking
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.train.branches import Branches

UNBOUNDED = 1 << 30


def conversation_ids(chat: ChatFormat, prompt: Conversation, completion: Conversation, context: int) -> list[int]:
    """What a reward model reads: the rendered whole, its oldest tokens dropped where it is longer than the context."""
    ids = chat.render((*prompt, *completion)).ids
    while ids and ids[-1] != chat.end:  # the model is read at the end of the last turn
        ids.pop()
    return ids[-context:]


def pad(rows: Sequence[Sequence[int]], pad_id: int, limit: int | None = None) -> Tensor:
    """Rows of ids as one tensor [n, longest], padded on the right.

    The length is rounded up to a multiple of 16, though not beyond `limit`, the context of the model that reads it.
    """
    needed = max(len(row) for row in rows)
    longest = -(-needed // 16) * 16
    if limit is not None:
        longest = max(needed, min(longest, limit))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.int64)


@dataclass(frozen=True)
class PackedRow:
    """Ids of a prompt, and of what follows it in each completion."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def unpacked(self) -> int:
        """Tokens of the completions' whole conversations, one by one."""
        return len(self.prompt) * len(self.completions) + sum(map(len, self.completions))


def pack(chat: ChatFormat, ranking: Ranking, context: int) -> PackedRow:
    """The row of a ranking: what its rendered conversations begin with alike is the prompt, and at least one id of each
    is not.

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


def together(rows: Sequence[Sequence[int]], same: Sequence[int], lengths: Tensor, ends: Tensor) -> Placed:
    """Pack `rows`, each of which counts up to `ends` [B]. Rows with the same number in `same` begin with the same
    prompt of `lengths` [B] ids."""
    families: dict[int, list[int]] = {}
    for row, number in enumerate(same):
        families.setdefault(number, []).append(row)
    size, end = lengths.tolist(), ends.tolist()
    packed = batch([
        PackedRow(tuple(rows[own[0]][: size[own[0]]]), tuple(tuple(rows[b][size[b] : end[b]]) for b in own))
        for own in families.values()
    ], 0)  # fmt: skip
    width = packed.ids.shape[1]
    begins, prompts = torch.zeros_like(lengths), torch.zeros_like(lengths)
    for g, own in enumerate(families.values()):
        for b, (begin, _) in zip(own, packed.spans[g], strict=True):
            begins[b], prompts[b] = g * width + begin - size[b], g * width
    return Placed(packed, begins, prompts, lengths)


def sizes_of(lengths: Sequence[int], tokens: int) -> list[int]:
    """How many rows go together so that a part holds at most `tokens` with its padding, but one row at least.
    `lengths` rise or fall."""
    sizes: list[int] = []
    longest = 0
    for length in lengths:
        longest = max(longest, length)
        if sizes and (sizes[-1] + 1) * longest <= tokens:
            sizes[-1] += 1
        else:
            sizes.append(1)
            longest = length
    return sizes


def parts_of(
    lengths: Sequence[int], prompts: Sequence[int], same: Sequence[int], rows: int, tokens: int | None = None
) -> list[list[int]]:
    """The numbers of the rows of each part, where rows of like length go together: `rows` rows, or as many as hold
    `tokens` with their padding, but one at least. `lengths` and `prompts` count the ids of whole rows and of their
    prompts; rows with the same number in `same` have the same prompt, and stay together, it being counted once."""
    families: list[list[int]] = []
    sizes: list[int] = []
    latest: dict[int, int] = {}
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        own = lengths[row] - prompts[row]
        family = latest.get(same[row])
        if family is None or (tokens is not None and sizes[family] + own > tokens):
            family = latest[same[row]] = len(families)
            families.append([])
            sizes.append(prompts[row])
        families[family].append(row)
        sizes[family] += own
    order = sorted(range(len(families)), key=lambda family: sizes[family])
    chosen: list[list[int]] = []
    if tokens is not None:
        at = iter(order)
        chosen = [[next(at) for _ in range(n)] for n in sizes_of([sizes[family] for family in order], tokens)]
    else:
        for family in order:
            if not chosen or sum(len(families[f]) for f in [*chosen[-1], family]) > rows:
                chosen.append([])
            chosen[-1].append(family)
    return [[row for family in part for row in families[family]] for part in chosen]


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
