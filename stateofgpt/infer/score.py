"""How likely given texts are.

Owns: the scoring of whole sequences by the model's own forward pass, in batches of similar length and bounded memory.
Knows nothing of sampling or caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from stateofgpt.errors import ModelError
from stateofgpt.model.gpt import GPT

_LOGITS = 1 << 24  # held at once: 64 MiB in float32


@torch.inference_mode()
def score(model: GPT, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of each token after the first, for each sequence; [] for one of fewer than two tokens.

    Raises ModelError if a sequence without its last token, which is only predicted, does not fit the context.
    """
    limit = model.config.max_position_embeddings
    device = model.lm_head.weight.device
    scores: list[list[float]] = [[] for _ in sequences]
    order = sorted((i for i, s in enumerate(sequences) if len(s) > 1), key=lambda i: len(sequences[i]))
    if order and len(sequences[order[-1]]) > limit + 1:
        raise ModelError(f"a text of {len(sequences[order[-1]])} tokens does not fit a context of {limit}; split it")
    while order:
        width = len(sequences[order[-1]]) - 1
        count = max(1, _LOGITS // (width * model.config.vocab_size))
        batch, order = order[-count:], order[:-count]
        ids = torch.zeros(len(batch), width + 1, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
        ids = ids.to(device)
        logits = model(ids[:, :-1]).float().flatten(0, 1)  # padding stands behind the text: causality hides it
        found = -F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(batch), width)
        for i, row_scores in zip(batch, found.tolist(), strict=True):
            scores[i] = row_scores[: len(sequences[i]) - 1]
    return scores
