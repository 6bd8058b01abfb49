"""Training a reward model from rankings, and asking it for scores. Knows where no ranking comes from.

InstructGPT (arXiv 2203.02155, section 3.5): starts from the SFT weights, all K(K-1)/2 pairs of a prompt in one batch,
one epoch, scores then shifted to mean 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stateofgpt.data.comparisons import Ranking
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.objective import pair_accuracy, ranked, ranking_loss
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig


@dataclass(frozen=True)
class RewardTraining:
    """How a reward model learns. `margin`, where it is given, times what a ranking says of its own margin (0 to 1) is
    by how much its better answer has to score higher; rankings that say nothing have 0. Held-out rankings are scored
    before the first step and `looks` times until the last."""

    prompts_per_step: int = 8
    warmup: int = 4
    decay_share: float = 0.7
    margin: float | None = None
    looks: int = 4
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(optim=OptimConfig(lr=2.5e-4, muon_lr=0.002, weight_decay=0.0))
    )


@dataclass(frozen=True)
class RankedBatch:
    """`ids` [prompts * K, T] padded on the right; `ranks` [prompts, K], 0 where a prompt has fewer completions;
    `margins` [prompts], where there are any, are by how much a better answer has to score higher. On the CPU."""

    ids: Tensor
    ranks: Tensor
    margins: Tensor | None = None

    @property
    def weight(self) -> float:
        """Prompts with something to learn: those whose ranks are not all equal."""
        return float(ranked(self.ranks).sum())


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


def ranked_batch(
    chat: ChatFormat, rankings: Sequence[Ranking], context: int, margin: float | None = None
) -> RankedBatch:
    """One batch of several prompts with all their completions; `margin` as in `RewardTraining`."""
    most = max(len(r.ranks) for r in rankings)
    rows = [
        conversation_ids(chat, r.prompt, r.completions[min(k, len(r.ranks) - 1)], context)
        for r in rankings
        for k in range(most)
    ]
    ranks = torch.tensor([[*r.ranks, *[0] * (most - len(r.ranks))] for r in rankings])
    margins = None if margin is None else torch.tensor([margin * (r.margin or 0.0) for r in rankings])
    return RankedBatch(pad(rows, chat.tokenizer.pad, context), ranks, margins)


class RankingLoss:
    """`loss(model, batch)`: ranking loss summed over the batch's prompts that have a pair, computed where the model
    is."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self._seen: list[tuple[Tensor, Tensor]] = []  # scores and ranks since last asked, of what was trained on

    def __call__(self, model: RewardModel, batch: RankedBatch) -> Tensor:
        device = model.score.weight.device
        ids, ranks = batch.ids.to(device, non_blocking=True), batch.ranks.to(device, non_blocking=True)
        margins = None if batch.margins is None else batch.margins.to(device, non_blocking=True)
        hidden = self.way.hidden(model, ids)
        with self.way.autocast():
            scores = model.read(hidden, ids).float().view(ranks.shape)
        self._seen.append((scores.detach(), batch.ranks))
        return ranking_loss(scores, ranks, margins) * batch.weight

    def accuracy(self) -> float:
        """Share of the pairs trained on since the last call that were ordered right before the step."""
        found = [pair_accuracy(scores.cpu(), ranks) for scores, ranks in self._seen]
        self._seen = []
        return sum(right for right, _ in found) / max(1, sum(pairs for _, pairs in found))


def step_order(n: int, seed: int, per_step: int) -> list[list[int]]:
    """Indices of one shuffled epoch, in steps of `per_step`; a rest too small for a step is left out."""
    order = list(range(n))
    random.Random(f"rankings {seed}").shuffle(order)
    return [order[i : i + per_step] for i in range(0, max(1, n - per_step + 1), per_step)]


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


@torch.no_grad()
def score_ids(
    model: RewardModel, rows: Sequence[Sequence[int]], pad_id: int, at_once: int = 64, tokens: int | None = None
) -> list[float]:
    """Raw scores of id rows, computed in float32, longest first so that little is padding: `at_once` together, or as
    many as hold `tokens` with their padding."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    device = model.score.weight.device
    found: list[Tensor] = []
    limit = model.config.max_position_embeddings
    sizes = [at_once] * -(-len(rows) // at_once) if tokens is None else sizes_of([len(rows[i]) for i in order], tokens)
    start = 0
    for size in sizes:
        chosen = order[start : start + size]
        found.append(model(pad([rows[i] for i in chosen], pad_id, limit).to(device, non_blocking=True)))
        start += size
    out = [0.0] * len(rows)
    for i, score in zip(order, torch.cat(found).cpu().tolist() if found else (), strict=True):
        out[i] = score
    return out


def score_rankings(model: RewardModel, chat: ChatFormat, rankings: Sequence[Ranking]) -> list[list[float]]:
    """Raw scores of every completion of every ranking."""
    context = model.config.max_position_embeddings
    rows = [conversation_ids(chat, r.prompt, c, context) for r in rankings for c in r.completions]
    flat = iter(score_ids(model, rows, chat.tokenizer.pad))
    return [[next(flat) for _ in r.completions] for r in rankings]


def held_out_accuracy(scores: Sequence[Sequence[float]], rankings: Sequence[Ranking]) -> tuple[int, int]:
    """(pairs ordered as ranked, pairs) over rankings with any numbers of completions."""
    right = pairs = 0
    for row, ranking in zip(scores, rankings, strict=True):
        for better, worse in ranking.pairs():
            right += row[better] > row[worse]
            pairs += 1
    return right, pairs
