"""What a request changes about the logits before a token is drawn: penalties, biases, and what is forbidden.

Owns: the formulas of the repetition penalty (CTRL, arXiv 1909.05858, as transformers has it), of the presence and
frequency penalties (as OpenAI's API defines them), of biases and masks, in this order. Knows nothing of how a token is
drawn from what they leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.infer.transfer import column, sent


def adjust(
    row: Tensor, params: SamplingParams, seen: Sequence[int], counts: Mapping[int, int], mask: np.ndarray | None
) -> None:
    """Change the logits `row` [V], float32, in place. `seen` are the ids of prompt and answer, `counts` how often each
    was drawn, `mask` which ids are allowed (those past its end are not)."""
    if params.repetition_penalty != 1.0:
        ids = column(sorted(set(seen)), torch.int64, row.device)
        found = row[ids]
        row[ids] = torch.where(found < 0, found * params.repetition_penalty, found / params.repetition_penalty)
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids = column(list(counts), torch.int64, row.device)
        often = column(list(counts.values()), torch.float32, row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * often
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        added = column(biases, row.dtype, row.device)  # they may be whole numbers
        row.index_add_(0, column(tokens, torch.int64, row.device), added)
    if mask is not None:
        row[len(mask) :] = -torch.inf
        row[: len(mask)].masked_fill_(sent(torch.from_numpy(~mask[: len(row)]), row.device), -torch.inf)
