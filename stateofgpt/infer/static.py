"""The way through a decoder on a GPU: steps whose shapes and memory never change, so that they can be recorded.

Owns: the sizes to which a step is padded, the memory it reads from and writes to, its own copies of the weights, and
which recordings there are (`infer.capture`). The computation is `infer.decode`'s. Knows nothing of requests or
sampling, and runs on every device, though on CPUs padding costs more than launching saves.

A step has room for a number of rows and a number of blocks per row, both of the sizes 1, 2, 3, 4, 6, 8, 12, 16 ...; all
that differs from one step to the next (ids, positions, tables) is one tensor that is copied there at once. Rows that
are nobody's read and write a block that is nobody's. Blocks lie as [head][position], so that what a head reads of a
block is one piece of memory. On a GPU with Triton the kernels of `infer.paged` read the blocks where they lie; without
it a row's keys and values are gathered in one look-up, and torch attends to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateofgpt.infer.cache import BLOCK, blocks_of, zeroed
from stateofgpt.infer.capture import Capture, Step
from stateofgpt.infer.decode import Decoder
from stateofgpt.infer.transfer import pinned
from stateofgpt.model.gpt import GPT

if TYPE_CHECKING:
    from stateofgpt.infer.paged import Kernels

_LEAST_BLOCKS = 8  # of a row: shorter texts cost no less


class _Recorded(NamedTuple):
    inputs: Tensor  # [rows, 2 + blocks]: id, position, table
    logits: Tensor  # [rows, V]
    replay: Step


class StaticDecoder(Decoder):
    """Fused weights of one model, adapters merged, in memory that stays: `refresh()` copies new ones into it."""

    guesses = True
    at_once = 16384

    def __init__(
        self, model: GPT, dtype: torch.dtype, max_context: int, capture: Capture, kernels: Kernels | None = None
    ) -> None:
        self.capture, self.kernels = capture, kernels
        self._steps: dict[tuple[int, int], _Recorded] = {}
        self._logits: dict[int, Tensor] = {}  # by the number of rows
        self._weights: list[Tensor] = []  # in the order in which they are taken
        self._whole = blocks_of(max_context)
        super().__init__(model, dtype, max_context)
        self._logits_dtype = torch.float32 if _rounds_late(dtype, self.device) else dtype

    # ---- weights --------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the model's weights again. Recorded steps stay good, unless the model has changed its shape."""
        self._taken_now = 0
        self._tied: dict[int, Tensor] = {}
        super().refresh()

    def _taken(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of our own, always in the same memory; one for both of a weight that is used twice."""
        if (known := self._tied.get(id(weight))) is not None:
            return known
        i, dtype = self._taken_now, dtype or self.dtype
        self._taken_now += 1
        if (
            i == len(self._weights)
            or self._weights[i].shape != weight.shape
            or self._weights[i].device != weight.device
        ):
            self._weights[i:] = [torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)]
            self._steps.clear()
        self._weights[i].copy_(weight)
        if isinstance(weight, nn.Parameter):  # others may be gone, and their ids another's
            self._tied[id(weight)] = self._weights[i]
        return self._weights[i]

    # ---- memory ---------------------------------------------------------------------------------------------------

    def make_room(self, blocks: int) -> None:
        """Memory for `blocks` blocks, and one that is nobody's; what was in it is lost."""
        c = self.config
        shape = (c.num_hidden_layers, 2, blocks + 1, c.num_key_value_heads, BLOCK, c.head_dim)
        memory = zeroed(shape, self.dtype, self.device)
        self._memory, self._pool = memory, memory.transpose(3, 4)  # as it lies, and as others see it
        pieces = memory.flatten(1, 3).flatten(2)  # [layers, 2 (blocks + 1) KVH, BLOCK D]
        # whole words are copied faster than halves of them
        self._pieces = pieces.view(torch.int64) if pieces.shape[-1] * self.dtype.itemsize % 8 == 0 else pieces
        self.nowhere = blocks
        self._steps.clear()

    def _sources(self, table: Tensor) -> Tensor:
        """Where keys and values are among all pieces of a layer, [2, n, KVH, blocks of a row]."""
        heads = self.config.num_key_value_heads
        head = torch.arange(heads, device=self.device)[:, None]
        keys = table[:, None] * heads + head
        return torch.stack((keys, keys + (self.nowhere + 1) * heads))

    def _past(self, index: int, sources: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        found = self._pieces[index].index_select(0, sources.flatten()).view(self.dtype)
        keys, values = found.view(*sources.shape[:3], -1, self.config.head_dim)[:, :, :, :longest]
        return keys, values

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """As of any decoder; keys are repeated, since on CUDA the kernels that take a mask, or float32, know no
        groups."""
        if self._group > 1:
            keys, values = (x[:, :, None].expand(-1, -1, self._group, -1, -1).flatten(1, 2) for x in (keys, values))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)

    # ---- passes ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(self, ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """Read token ids[i] at positions[i] of the row whose blocks are tables[i]; logits [n, V] of the next ones,
        which last until the next step."""
        rows = rounded(len(ids))
        width = min(max(rounded(blocks_of(max(positions) + 1)), _LEAST_BLOCKS), self._whole)
        known = self._steps.get((rows, width))
        shape = (rows, 2 + width)
        inputs = torch.empty(shape, dtype=torch.int64, device=self.device) if known is None else known.inputs
        inputs.copy_(pinned(_laid_out(ids, positions, tables, shape, self.nowhere), self.device), non_blocking=True)
        if known is None:
            known = self._steps[rows, width] = self._recorded(inputs)
        known.replay()
        return known.logits[: len(ids)]

    def verify(self, ids: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """Read `ids[i]` at positions starts[i], starts[i] + 1 ... of row i; logits [sum of lengths, V] after every
        token. Each is a row of a step: a layer writes all keys before any query reads them."""
        places = [start + i for start, one in zip(starts, ids, strict=True) for i in range(len(one))]
        owners = [table for table, one in zip(tables, ids, strict=True) for _ in one]
        return self.decode(list(chain.from_iterable(ids)), places, owners)

    def _recorded(self, inputs: Tensor) -> _Recorded:
        rows = inputs.shape[0]
        if rows not in self._logits:
            shape = (rows, self.config.vocab_size)
            self._logits[rows] = torch.empty(shape, dtype=self._logits_dtype, device=self.device)
        logits = self._logits[rows]
        return _Recorded(inputs, logits, self.capture(lambda: self._step(inputs, logits)))

    def _step(self, inputs: Tensor, logits: Tensor) -> None:
        """What is recorded: from `inputs` to `logits`, and nothing but tensors between."""
        table = inputs[:, 2:]
        if self.kernels is not None:
            x = self._with_kernels(self.kernels, inputs)
        else:
            x = self._decoded(inputs[:, 0], inputs[:, 1], table, table.shape[1] * BLOCK)
        if logits.dtype == x.dtype:
            torch.mm(x, self._head.t(), out=logits)
        else:
            torch.mm(x, self._head.t(), out_dtype=logits.dtype, out=logits)

    def _with_kernels(self, kernels: Kernels, inputs: Tensor) -> Tensor:
        """As `_decoded`."""
        x = self._embedded(inputs[:, 0], inputs[:, 1])
        for layer, memory in zip(self._layers, self._memory, strict=True):
            qkv = layer.qkv(layer.norm_in(x))
            layer.out.add_to(x, kernels.attention(qkv, self._turns, layer.qk_gain, inputs, memory))
            layer.down.add_to(x, self._active(layer.up(layer.norm_mlp(x))))
        return self._norm(x)

    def _active(self, h: Tensor) -> Tensor:
        if self.kernels is None or self.config.arch == "gpt2":
            return super()._active(h)
        return self.kernels.gated(h)


def rounded(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is not below `count`: at most half as much again."""
    above = 1 << (count - 1).bit_length()
    return above * 3 // 4 if above >= 4 and count <= above * 3 // 4 else above


def _rounds_late(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of `dtype` can give its sums as they are, in float32, as CUDA's can: a logit of 20 in bfloat16
    is one of 20 and 20.125."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        some = torch.ones(16, 16, dtype=dtype, device=device)
        out = torch.empty(16, 16, dtype=torch.float32, device=device)
        torch.mm(some, some.t(), out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):  # an older torch, or another maker's GPU
        return False
    return bool((out == 16).all())


def _laid_out(
    ids: Sequence[int],
    positions: Sequence[int],
    tables: Sequence[Sequence[int]],
    shape: tuple[int, int],
    nowhere: int,
) -> Tensor:
    """The input of a step, int64: a row for each token, and rows of token 0 that are nobody's."""
    n, width = len(ids), shape[1] - 2
    found = np.full(shape, nowhere, dtype=np.int64)
    found[:, :2] = 0
    found[:n, 0], found[:n, 1] = ids, positions
    sizes = np.fromiter((min(len(table), width) for table in tables), dtype=np.int64, count=n)
    flat = np.fromiter(chain.from_iterable(table[:width] for table in tables), dtype=np.int64, count=int(sizes.sum()))
    found[:n, 2:][np.arange(width) < sizes[:, None]] = flat
    return torch.from_numpy(found)
