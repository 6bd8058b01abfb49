"""Rollouts: what a policy answered, as the tensors that policy optimisation needs.

Owns the layout (prompt, sampled tokens, tool output, padding) and the forward passes over it, whose results are on
the model's device. Where tokens were sampled is known on the CPU too, so that a device is never asked for a shape.
Knows nothing of objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stateofgpt.assistant.session import Turn
from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import ValueModel
from stateofgpt.rl.objective import chosen_logprobs, token_logprobs
from stateofgpt.rl.packed import Placed, pad, parts_of, together
from stateofgpt.train.fused import LONGEST
from stateofgpt.train.loss import Way


@dataclass(frozen=True)
class Rollouts:
    """`ids` [B, T+1] padded on the right; `mask` [B, T], 1 at t where token t+1 was sampled by the policy. `sampled` is
    the mask as bool, and `asked` [B] has the same number where the prompts are the same; both are always on the CPU."""

    ids: Tensor
    mask: Tensor
    sampled: Tensor
    asked: Tensor

    @staticmethod
    def of(ids: Tensor, mask: Tensor, together: bool = True) -> Rollouts:
        """From tensors of the CPU. Unless rows are to go `together` that answer the same, no prompt is the same."""
        sampled = mask > 0
        known: dict[bytes, int] = {}
        prompts = (row[: n + 1].numpy().tobytes() for row, n in zip(ids, sampled.int().argmax(1).tolist(), strict=True))
        same = [known.setdefault(key, len(known)) for key in prompts] if together else range(len(ids))
        return Rollouts(ids, mask, sampled, torch.tensor(same))

    @property
    def inputs(self) -> Tensor:
        return self.ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        return self.ids[:, 1:]

    @property
    def prompts(self) -> Tensor:
        """How many tokens stand before the first that was sampled [B], on the CPU; 1 where none was."""
        return self.sampled.int().argmax(1) + 1

    @property
    def ends(self) -> Tensor:
        """Where the last token of each row was sampled [B], on the CPU; 0 where none was."""
        return (self.sampled * torch.arange(1, self.sampled.shape[1] + 1)).argmax(1)

    def rows(self, index: Tensor) -> Rollouts:
        """Some rows (`index` is on the CPU), without the columns that are padding in all of them."""
        sampled = self.sampled[index]
        used = int(sampled.any(0).nonzero().max()) + 1 if sampled.any() else 1
        there = index.to(self.ids.device, non_blocking=True)
        ids, mask = self.ids[there][:, : used + 1], self.mask[there][:, :used]
        return Rollouts(ids, mask, sampled[:, :used], self.asked[index])

    def to(self, device: torch.device) -> Rollouts:
        """The same on another device, or itself where it is there already."""
        if self.ids.device == device:
            return self
        ids, mask = (x.to(device, non_blocking=True) for x in (self.ids, self.mask))
        return Rollouts(ids, mask, self.sampled, self.asked)


def rollouts_of(turns: Sequence[Turn], pad_id: int, together: bool = True) -> Rollouts:
    """Lay out turns of a session, on the CPU; `together` as in `Rollouts.of`."""
    ids = pad([[*turn.prompt_ids, *turn.ids] for turn in turns], pad_id)
    mask = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    for row, turn in enumerate(turns):
        start = len(turn.prompt_ids) - 1
        mask[row, start : start + len(turn.mask)] = torch.tensor(turn.mask, dtype=torch.float32)
    return Rollouts.of(ids, mask, together)


def laid_out(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, context: int, together: bool = True
) -> Rollouts:
    """Texts that were not sampled, as (ids, mask of the ids that are learned from); the oldest ids of those longer than
    the context are dropped. `together` as in `Rollouts.of`."""
    ids = pad([row[-context:] for row, _ in rows], pad_id, context)
    mask = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    for number, (_, learned) in enumerate(rows):
        kept = learned[-context:][1:]  # the first id of a text is predicted by nothing
        mask[number, : len(kept)] = torch.tensor(kept, dtype=torch.float32)
    return Rollouts.of(ids, mask, together)


def policy_logprobs(model: GPT, rollouts: Rollouts, way: Way) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens and entropies, each [B, T], at temperature 1; zero outside the mask."""
    places, logits = _sampled_logits(model, rollouts, way)
    chosen, entropy = token_logprobs(logits, rollouts.targets[places])
    empty = torch.zeros(rollouts.mask.shape, device=logits.device)
    return empty.index_put(places, chosen), empty.index_put(places, entropy)


def sampled_logprobs(model: GPT, rollouts: Rollouts, way: Way) -> Tensor:
    """The first of the two alone, the same bits: what updates need."""
    places, logits = _sampled_logits(model, rollouts, way)
    empty = torch.zeros(rollouts.mask.shape, device=logits.device)
    return empty.index_put(places, chosen_logprobs(logits, rollouts.targets[places]))


def _sampled_logits(model: GPT, rollouts: Rollouts, way: Way) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where tokens were sampled, as (rows, columns), and the logits [sampled, V] there.

    Only the sampled places go through the head: prompts, tool output and padding are more than half of all.
    """
    places, hidden = _sampled_hidden(model, rollouts, way)
    with way.autocast():
        logits = model.lm_head(hidden)
    return places, logits


def _sampled_hidden(model: GPT | ValueModel, rollouts: Rollouts, way: Way) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where tokens were sampled, as (rows, columns), and the hidden states [sampled, C] that they were chosen from."""
    rows, columns = rollouts.sampled.nonzero(as_tuple=True)
    placed = _placed(model, rollouts, way)
    if placed is not None:
        hidden = way.hidden(model, placed.packed.ids, placed.packed.branches).flatten(0, 1)
        return (rows, columns), hidden[placed.places(rows, columns)]
    hidden = way.hidden(model, rollouts.inputs.contiguous())
    places = rows.to(hidden.device, non_blocking=True), columns.to(hidden.device, non_blocking=True)
    return places, hidden[places]


def _placed(model: GPT | ValueModel, rollouts: Rollouts, way: Way) -> Placed | None:
    """Answers to one prompt in one row, where the fused pass computes them and there are fewer tokens so."""
    B, T = rollouts.mask.shape
    if not way.fuses(model) or T > LONGEST or len(rollouts.asked.unique()) == B:
        return None
    placed = together(rollouts.ids.tolist(), rollouts.asked.tolist(), rollouts.prompts, rollouts.ends + 1)
    return placed if placed.packed.ids.numel() < B * T else None


def in_parts(
    forward: Callable[[Rollouts], tuple[Tensor, ...]], rollouts: Rollouts, rows: int, tokens: int | None = None
) -> tuple[Tensor, ...]:
    """Run a forward pass over rows in parts of like length, and put the results back into [B, T]. A part has `rows`
    rows, or as many as hold `tokens` with their padding (at least one); answers to one prompt stay together. Gradients
    go through it, and what a part gives is that of its rows alone."""
    B, T = rollouts.mask.shape
    outs: list[Tensor] = []
    lengths, prompts = (rollouts.ends + 2).tolist(), rollouts.prompts.tolist()
    for numbers in parts_of(lengths, prompts, rollouts.asked.tolist(), rows, tokens):
        index = torch.tensor(numbers)
        parts = forward(rollouts.rows(index))
        if not outs:
            outs = [torch.zeros(B, T, device=part.device) for part in parts]
        for whole, part in zip(outs, parts, strict=True):
            whole[index.to(part.device, non_blocking=True), : part.shape[1]] = part
    return tuple(outs)


def drawn_logprobs(turns: Sequence[Turn], rollouts: Rollouts) -> Tensor:
    """The log-probabilities [B, T] with which the engine drew the sampled tokens, where `rollouts` are; zero outside
    the mask."""
    out = torch.zeros(rollouts.mask.shape)
    for row, turn in enumerate(turns):
        start = len(turn.prompt_ids) - 1
        out[row, start : start + len(turn.logprobs)] = torch.tensor(turn.logprobs)
    return out.to(rollouts.mask.device) * rollouts.mask


def values(model: ValueModel, rollouts: Rollouts, way: Way) -> Tensor:
    """Values [B, T] of the states in which the sampled tokens were chosen; zero outside the mask."""
    places, hidden = _sampled_hidden(model, rollouts, way)
    with way.autocast():
        found = model.score(hidden).squeeze(-1).float()
    return torch.zeros(rollouts.mask.shape, device=found.device).index_put(places, found)
