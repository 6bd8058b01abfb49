"""How likely given texts are, and where they lie.

Owns: the scoring and the embedding of whole sequences by the model's own forward pass, in batches of similar length and
bounded memory. Knows nothing of sampling or caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stateofgpt.errors import ModelError
from stateofgpt.infer.transfer import column, sent
from stateofgpt.model.gpt import GPT

_LOGITS = 1 << 24  # held at once: 64 MiB in float32
_STATES = 1 << 22
_MORE = 8  # times as much on other devices than the CPU, where a pass over few tokens takes as long


class Scored(NamedTuple):
    """A token's log-probability, and the most likely tokens in its place with theirs, most likely first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@torch.inference_mode()
def score(model: GPT, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of each token after the first, for each sequence; [] for one of fewer than two tokens.

    Raises ModelError if a sequence without its last token, which is only predicted, does not fit the context.
    """
    scores: list[list[float]] = [[] for _ in sequences]
    for batch, ids in _scored(model, sequences):
        logits = model(ids[:, :-1]).float().flatten(0, 1)  # padding stands behind the text: causality hides it
        found = -F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
        for i, row_scores in zip(batch, found.tolist(), strict=True):
            scores[i] = row_scores[: len(sequences[i]) - 1]
    return scores


@torch.inference_mode()
def score_with_top(model: GPT, sequences: Sequence[Sequence[int]], top: int) -> list[list[Scored]]:
    """As `score`, each with the `top` most likely tokens in its place."""
    scores: list[list[Scored]] = [[] for _ in sequences]
    for batch, ids in _scored(model, sequences):
        logprobs = model(ids[:, :-1]).float().log_softmax(-1)
        own = logprobs.gather(2, ids[:, 1:, None])[:, :, 0].tolist()
        best = logprobs.topk(min(top, logprobs.shape[-1]))
        tops = (best.indices.tolist(), best.values.tolist())
        for row, i in enumerate(batch):
            scores[i] = [
                Scored(own[row][t], tuple(zip(tops[0][row][t], tops[1][row][t], strict=True)))
                for t in range(len(sequences[i]) - 1)
            ]
    return scores


@torch.inference_mode()
def embed(model: GPT, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each sequence the mean over its tokens of the final hidden states, scaled to length 1: a vector of
    `hidden_size` numbers. ModelError where one is empty or does not fit the context."""
    if any(not ids for ids in sequences):
        raise ModelError("an empty text has no embedding; give at least one token")
    vectors: list[list[float]] = [[] for _ in sequences]
    for batch, ids in _batches(model, sequences, spare=0, per_token=model.config.hidden_size, most=_STATES):
        sizes = column([len(sequences[i]) for i in batch], torch.int64, ids.device)
        inside = torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]
        states = model.hidden(ids).float() * inside[:, :, None]
        for i, vector in zip(batch, F.normalize(states.sum(1) / sizes[:, None], dim=-1).tolist(), strict=True):
            vectors[i] = vector
    return vectors


def _scored(model: GPT, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    return _batches(model, sequences, spare=1, per_token=model.config.vocab_size, most=_LOGITS)


def _batches(
    model: GPT, sequences: Sequence[Sequence[int]], *, spare: int, per_token: int, most: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of sequences and their ids padded with 0, the longest first, so many together that `most` numbers hold
    `per_token` of each token. The last `spare` tokens of a sequence are not read; it is left out if none remains."""
    limit, device = model.config.max_position_embeddings, model.lm_head.weight.device
    most *= 1 if device.type == "cpu" else _MORE
    order = sorted((i for i, s in enumerate(sequences) if len(s) > spare), key=lambda i: len(sequences[i]))
    if order and len(sequences[order[-1]]) > limit + spare:
        raise ModelError(f"a text of {len(sequences[order[-1]])} tokens does not fit a context of {limit}; split it")
    while order:
        width = len(sequences[order[-1]]) - spare
        count = max(1, most // (width * per_token))
        batch, order = order[-count:], order[:-count]
        ids = torch.zeros(len(batch), width + spare, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
        yield batch, sent(ids, device)
