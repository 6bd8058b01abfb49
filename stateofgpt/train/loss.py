"""The language-model loss: cross-entropy of the next token, masked, summed over a batch.

Owns the precision and the compilation of a training forward pass. Knows no optimizer, no stage and no text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stateofgpt.model.gpt import GPT

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Batch:
    """`ids`, `targets` [B, T] int64; `weights` [B, T] float32, 0 where a target does not count."""

    ids: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def weight(self) -> float:
        return float(self.weights.sum())

    @staticmethod
    def of(ids: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> Batch:
        """From numpy arrays of shape [B, T]; without weights every target counts."""
        targets_tensor = torch.from_numpy(targets)
        ones = torch.ones(targets.shape) if weights is None else torch.from_numpy(weights).float()
        return Batch(torch.from_numpy(ids), targets_tensor, ones)


class LanguageModelLoss:
    """`loss(model, batch) -> summed loss in nats`, in one precision, compiled or not.

    The embedding look-up stays outside the compiled part: its gradient is a scatter, which the compiler would turn into
    atomic adds whose order, and so whose rounding, differs from run to run.
    """

    def __init__(self, dtype: Dtype = "float32", compiled: bool = False) -> None:
        self.dtype: Dtype = dtype
        self.compiled = compiled
        self._after_embedding = torch.compile(_after_embedding, dynamic=False) if compiled else _after_embedding

    def __call__(self, model: GPT, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            embedded = model.model.embed_tokens(batch.ids)
            out: Tensor = self._after_embedding(model, embedded, batch.targets, batch.weights)
        return out


def _after_embedding(model: GPT, embedded: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = model.lm_head(model.model.run(embedded))
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()
