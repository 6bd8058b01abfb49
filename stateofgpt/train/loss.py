"""The language-model loss: cross-entropy of the next token, masked, summed over a batch.

Owns the precision and the compilation of a training forward pass. Knows no optimizer, no stage and no text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateofgpt.errors import ModelError
from stateofgpt.model.device import CPU
from stateofgpt.model.gpt import GPT
from stateofgpt.train import fused as fused_pass
from stateofgpt.train import head, kernels
from stateofgpt.train.branches import Branches
from stateofgpt.train.kernels import Kernels

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Way:
    """How a forward pass for training runs: its precision, and whether through the fused kernels; whether tokens are
    drawn on the engine's native path; and the device of all models. Kernels and the native path are the CPU's."""

    dtype: Dtype = "float32"
    fused: bool = False
    native: bool = False
    device: str = CPU

    @property
    def kernels(self) -> Kernels | None:
        """The kernels, where they are asked for. Raises ModelError where they cannot be had."""
        if not self.fused or self.device != CPU:
            return None
        found = kernels.load()
        if found is None:
            raise ModelError(
                "this run uses the fused kernels, and they cannot be compiled here: install a C compiler with OpenMP"
            )
        return found

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def fuses(self, model: fused_pass.Decoder) -> bool:
        """Whether the fused kernels compute this model."""
        return self.kernels is not None and fused_pass.knows(model)

    def hidden(self, model: fused_pass.Decoder, ids: Tensor, branches: Branches | None = None) -> Tensor:
        """Final hidden states [B, T, C] of `ids` [B, T]; what follows a document in its row is not seen by it."""
        if (found := self.kernels) is not None and fused_pass.fits(model, ids, branches):
            return fused_pass.fused_hidden(found, model, ids, self.torch_dtype, branches)
        with self.autocast():
            seen = (None, None) if branches is None else (branches.mask, branches.positions)
            out: Tensor = model.model(ids, *seen)
        return out

    def autocast(self) -> torch.autocast:
        """Torch's automatic choice of precision, for what is not fused."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")


PLAIN = Way()


@dataclass(frozen=True)
class Batch:
    """`ids`, `targets` [B, T] int64; `weights` [B, T] float32, 0 where a target does not count.

    `firsts` [B, T] int32, where there are any, is the place at which each position's document begins: a document then
    never attends to the one before it in its row.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    firsts: Tensor | None = None
    known: float | None = None  # the weight, where it was added up before the batch went to another device

    @property
    def weight(self) -> float:
        return float(self.weights.sum()) if self.known is None else self.known

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device, or itself where it is there already.

        To a GPU it goes through memory that is pinned, so that nothing waits for it, and its weight is known before:
        asking the device for it would be waiting.
        """
        device = torch.device(device)
        if self.ids.device == device:
            return self
        firsts = None if self.firsts is None else _sent(self.firsts, device)
        ids, targets, weights = (_sent(x, device) for x in (self.ids, self.targets, self.weights))
        return Batch(ids, targets, weights, firsts, self.weight)

    @staticmethod
    def of(
        ids: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None, *, begins: int | None = None
    ) -> Batch:
        """From numpy arrays of shape [B, T]; without weights every target counts. `begins` is the id with which every
        document begins; with it, documents are kept apart."""
        targets_tensor = torch.from_numpy(targets)
        ones = torch.ones(targets.shape) if weights is None else torch.from_numpy(weights).float()
        firsts = None
        if begins is not None:
            starts = np.where(ids == begins, np.arange(ids.shape[1], dtype=np.int32), np.int32(0))
            firsts = torch.from_numpy(np.maximum.accumulate(starts, axis=1))
        return Batch(torch.from_numpy(ids), targets_tensor, ones, firsts)


class LanguageModelLoss:
    """`loss(model, batch) -> summed loss in nats`, in one precision; plain, compiled, or `fused` (`train.fused`).

    Fused is the fastest on a CPU and needs a C compiler for a second, once on a machine; what it cannot do (other
    architectures, long contexts) goes the plain way.

    On other devices than the CPU the head and its loss go in parts (`train.head`).

    What is compiled is one block, whose code then serves all of them, and the head with its loss: a third of the time
    it takes to compile the whole. The embedding look-up stays outside: its gradient is a scatter, which the compiler
    would turn into atomic adds whose order, and so whose rounding, differs from run to run.
    """

    def __init__(
        self, dtype: Dtype = "float32", compiled: bool = False, fused: bool = False, device: str = CPU
    ) -> None:
        self.way = Way(dtype, fused, device=device)
        self.kernels = self.way.kernels
        self._block = torch.compile(_block, dynamic=False) if compiled else _block
        self._head = torch.compile(_head, dynamic=False) if compiled else _head
        self._part: head.Part = torch.compile(head.part, dynamic=False) if compiled else head.part

    def __call__(self, model: GPT, batch: Batch) -> Tensor:
        batch = batch.to(model.lm_head.weight.device)
        if self.kernels is not None and fused_pass.fits(model, batch.ids):
            return fused_pass.fused_loss(
                self.kernels, model, batch.ids, batch.targets, batch.weights, self.way.torch_dtype, batch.firsts
            )
        with self.way.autocast():
            trunk = model.model
            mask = None if batch.firsts is None else _seen(batch.firsts)
            if mask is not None and mask.device.type != "cpu":  # there every block would make this of it
                mask = torch.zeros_like(mask, dtype=self.way.torch_dtype).masked_fill_(~mask, -math.inf)
            x = trunk.run(trunk.embed_tokens(batch.ids), mask, run_block=self._block)
            rows = head.rows_at_once(batch.ids.numel(), model.config.vocab_size, batch.ids.device)
            if rows is None:
                out: Tensor = self._head(trunk.norm, model.lm_head.weight, x, batch.targets, batch.weights)
                return out
            h = trunk.norm(x).flatten(0, 1).to(self.way.torch_dtype)
            return head.in_parts(
                h, model.lm_head.weight, batch.targets.flatten(), batch.weights.flatten(), rows, self._part
            )

    def bound(self, model: GPT) -> Callable[[Batch, float], Tensor]:
        """`backward(batch, divisor)` of a model that keeps its parameters: `self(model, batch) / divisor`, detached,
        whose gradients are added to the parameters' `.grad`; by autograd, or where all products are our own without."""
        found = None if self.kernels is None else fused_pass.narrow(self.kernels, model, self.way.torch_dtype)

        def backward(batch: Batch, divisor: float) -> Tensor:
            if found is not None and batch.ids.shape[1] <= fused_pass.LONGEST:
                return found.backward(batch.ids, batch.targets, batch.weights, batch.firsts, divisor)
            value = self(model, batch) / divisor
            value.backward()
            return value.detach()

        return backward


def _sent(x: Tensor, device: torch.device) -> Tensor:
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _seen(firsts: Tensor) -> Tensor:
    """The attention mask [B, 1, T, T] of documents that begin at `firsts` [B, T]: True where a query may look."""
    places = torch.arange(firsts.shape[1], device=firsts.device)
    return ((places <= places[:, None]) & (places >= firsts[:, :, None]))[:, None]


def _block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    out: Tensor = block(x, cos, sin, mask)
    return out


def _head(norm: nn.Module, weight: Tensor, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(norm(x), weight)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()
