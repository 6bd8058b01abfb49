"""Training a reward model from rankings, and asking it for scores. Knows where no ranking comes from.

InstructGPT (arXiv 2203.02155, section 3.5): starts from the SFT weights, all K(K-1)/2 pairs of a prompt in one batch,
one epoch, scores then shifted to mean 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stateofgpt.data.comparisons import Ranking
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.objective import pair_accuracy, ranked, ranking_loss
from stateofgpt.rl.packed import PackedBatch, batch, pack, pad, parts_of, together
from stateofgpt.text.chat import ChatFormat
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.loss import PLAIN, Way
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
    """Prompts, each packed with its completions; `ranks` [prompts, K], 0 where a prompt has fewer completions;
    `margins` [prompts], where there are any, are by how much a better answer has to score higher. On the CPU."""

    packed: PackedBatch
    ranks: Tensor
    margins: Tensor | None = None

    @property
    def weight(self) -> float:
        """Prompts with something to learn: those whose ranks are not all equal."""
        return float(ranked(self.ranks).sum())

    @property
    def ends(self) -> Tensor:
        """[prompts, K], which of all places of the batch is each completion's last token; a prompt with fewer
        completions has its last one again."""
        most, width = self.ranks.shape[1], self.packed.ids.shape[1]
        last = [[end - 1 for _, end in spans] for spans in self.packed.spans]
        return torch.tensor(
            [[b * width + row[min(k, len(row) - 1)] for k in range(most)] for b, row in enumerate(last)]
        )


def ranked_batch(
    chat: ChatFormat, rankings: Sequence[Ranking], context: int, margin: float | None = None
) -> RankedBatch:
    """One batch of several prompts with all their completions; `margin` as in `RewardTraining`."""
    most = max(len(r.ranks) for r in rankings)
    ranks = torch.tensor([[*r.ranks, *[0] * (most - len(r.ranks))] for r in rankings])
    margins = None if margin is None else torch.tensor([margin * (r.margin or 0.0) for r in rankings])
    return RankedBatch(batch([pack(chat, r, context) for r in rankings], chat.tokenizer.pad), ranks, margins)


class RankingLoss:
    """`loss(model, batch)`: ranking loss summed over the batch's prompts that have a pair, computed where the model
    is."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self._seen: list[tuple[Tensor, Tensor]] = []  # scores and ranks since last asked, of what was trained on

    def __call__(self, model: RewardModel, batch: RankedBatch) -> Tensor:
        device = model.score.weight.device
        packed, ranks = batch.packed.to(device), batch.ranks.to(device, non_blocking=True)
        margins = None if batch.margins is None else batch.margins.to(device, non_blocking=True)
        hidden = self.way.hidden(model, packed.ids, packed.branches).flatten(0, 1)
        with self.way.autocast():
            scores = model.score(hidden[batch.ends.to(device, non_blocking=True)]).squeeze(-1).float()
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


@torch.no_grad()
def score_ids(
    model: RewardModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    at_once: int = 64,
    tokens: int | None = None,
    prompts: Sequence[int] | None = None,
    way: Way = PLAIN,
) -> list[float]:
    """Raw scores of id rows, computed in float32, shortest first so that little is padding: `at_once` together, or as
    many as hold `tokens` with their padding. `prompts` is how many ids of each row are its prompt's; what the same
    prompt begins then goes together, where the fused pass of `way` can compute it."""
    exact, device = replace(way, dtype="float32"), model.score.weight.device
    known, lengths = dict[tuple[int, ...], int](), [len(row) for row in rows]
    if prompts is None or not exact.fuses(model):
        prompts, same = lengths, list(range(len(rows)))
    else:
        same = [known.setdefault(tuple(row[:n]), len(known)) for row, n in zip(rows, prompts, strict=True)]
    order, found = list[int](), list[Tensor]()
    for part in parts_of(lengths, prompts, same, at_once, tokens):
        chosen = [rows[i] for i in part]
        ends = torch.tensor([lengths[i] for i in part])
        if len({same[i] for i in part}) < len(part):
            begins = torch.tensor([prompts[i] for i in part])
            placed = together(chosen, [same[i] for i in part], begins, ends)
            hidden = exact.hidden(model, placed.packed.ids, placed.packed.branches).flatten(0, 1)
            read = hidden[placed.places(torch.arange(len(part)), ends - 1)]
        else:
            ids = pad(chosen, pad_id, model.config.max_position_embeddings).to(device, non_blocking=True)
            places = torch.arange(len(part)).to(device), (ends - 1).to(device, non_blocking=True)
            read = exact.hidden(model, ids)[places]
        order += part
        found.append(model.score(read).squeeze(-1))
    scores = torch.cat(found).tolist() if found else []  # waited for once
    return [score for _, score in sorted(zip(order, scores, strict=True))]


def score_rankings(
    model: RewardModel,
    chat: ChatFormat,
    rankings: Sequence[Ranking],
    way: Way = PLAIN,
) -> list[list[float]]:
    """Raw scores of every completion of every ranking."""
    context = model.config.max_position_embeddings
    rows = [(row.prompt, tail) for row in (pack(chat, r, context) for r in rankings) for tail in row.completions]
    whole, prompts = [[*prompt, *tail] for prompt, tail in rows], [len(prompt) for prompt, _ in rows]
    flat = iter(score_ids(model, whole, chat.tokenizer.pad, prompts=prompts, way=way))
    return [[next(flat) for _ in r.completions] for r in rankings]


def held_out_accuracy(scores: Sequence[Sequence[float]], rankings: Sequence[Ranking]) -> tuple[int, int]:
    """(pairs ordered as ranked, pairs) over rankings with any numbers of completions."""
    right = pairs = 0
    for row, ranking in zip(scores, rankings, strict=True):
        for better, worse in ranking.pairs():
            right += row[better] > row[worse]
            pairs += 1
    return right, pairs
