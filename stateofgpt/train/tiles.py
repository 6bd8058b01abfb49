"""The calls of a narrow decoder's products: all of its blocks, its head, and Muon's iteration.

Owns: how the functions of `trunk.h` and `tiles.h` are called on tensors, and what they are given. Knows no autograd and
no module. `train.kernels` loads the library, and has the calls of all other kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stateofgpt.errors import ModelError

SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

# cosines and sines [positions, D / 2], and the positions [B, T] int64 where they are not 0, 1, 2 ...
Tables = tuple[Tensor, Tensor, Tensor | None]
Value = Tensor | int | float | ctypes.Array[Any] | None
OF_LAYER = 11  # tensors: norm, q, k, v, gains of queries and of keys (or None), output, norm, gate, up, down


@dataclass(frozen=True)
class Rows:
    """Rows of tokens `ids` [B, T] int64 and what a decoder is told of them: `sizes` B, T, C, H, K, D, I, layers;
    `firsts` and `shared` [B, T] int32 as in `softmax_`."""

    ids: Tensor
    sizes: tuple[int, ...]
    tables: Tables
    firsts: Tensor | None
    shared: Tensor | None

    def arrays(self) -> tuple[ctypes.Array[Any], tuple[Tensor | None, ...]]:
        """The sizes, and tables and masks, as the library takes them."""
        return (ctypes.c_int64 * len(self.sizes))(*self.sizes), (*self.tables, self.firsts, self.shared)


@dataclass(frozen=True)
class Weights:
    """A decoder whose tensors stay where they are: `layers` are the `OF_LAYER` tensors of each layer, `tables` cosines
    and sines, `sizes` those of `Rows` after B and T."""

    embedding: Tensor
    layers: Sequence[Tensor | None]
    norm: Tensor
    head: Tensor
    tables: tuple[Tensor, Tensor]
    sizes: tuple[int, ...]
    eps: float

    @property
    def tied(self) -> bool:
        return self.head is self.embedding


class Calls:
    """A loaded library, and how its functions are called."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def _call(self, name: str, *values: Value) -> None:
        """Call a function: tensors and arrays by address, whole numbers as int64, fractions as float, None as null."""
        self._ask(name, *values)

    def _ask(self, name: str, *values: Value) -> int:
        """The same for a function that gives back an int64."""
        words: list[object] = []
        for value in values:
            if isinstance(value, Tensor):
                words.append(ctypes.c_void_p(value.data_ptr()))
            elif value is None:
                words.append(ctypes.c_void_p(None))
            elif isinstance(value, int):
                words.append(ctypes.c_int64(value))
            elif isinstance(value, ctypes.Array):
                words.append(value)
            else:
                words.append(ctypes.c_float(value))
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64  # of one that gives back nothing it is never looked at
        return int(function(*words, ctypes.c_int(torch.get_num_threads())))


class Tiles(Calls):
    """The products of our own. Weights are float32 and rounded in the library; gradients of weights are float32."""

    def has_tiles(self, dtype: torch.dtype) -> bool:
        """Whether this processor can do what `tiles.h` has, in this precision."""
        return dtype in SUFFIX and hasattr(self._library, f"tiles_{SUFFIX[dtype]}")

    def trunk(
        self, embedding: Tensor, layers: Sequence[Tensor | None], rows: Rows, dtype: torch.dtype, eps: float, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """What a decoder makes of `rows`: [B T, C], not normalised yet; and what its way back needs, where it is to
        `keep` that. `embedding` [vocabulary, C]; `layers`: `OF_LAYER` tensors of each."""
        B, T, C, *_ = rows.sizes
        sizes, (cosines, sines, positions, firsts, shared) = rows.arrays()
        needed = (ctypes.c_int64 * 1)()
        self._call(f"trunk_bytes_{SUFFIX[dtype]}", sizes, firsts, shared, int(keep), needed)
        room, out = torch.empty(needed[0], dtype=torch.uint8), torch.empty(B * T, C, dtype=dtype)
        told = (rows.ids, cosines, sines, positions, firsts, shared)
        given = (sizes, _addresses(layers), embedding, embedding.shape[0], *told, int(keep), room, out, float(eps))
        _known(self._ask(f"trunk_{SUFFIX[dtype]}", *given), rows.ids, embedding.shape[0])
        return out, room

    def trunk_backward(
        self, dout: Tensor, layers: Sequence[Tensor | None], rows: Rows, room: Tensor, embedding: Tensor | None
    ) -> Tensor:
        """From the gradient of `trunk`'s result those of all layers, one after the other as `trunk.h` lays them out;
        that of the embedding is added to `embedding` [vocabulary, C] float32, where it is wanted."""
        sizes, told = rows.arrays()
        grads = torch.empty(_of_layers(rows.sizes[2:]))
        given = (sizes, _addresses(layers), rows.ids, *told, room, dout, grads, embedding)
        self._call(f"trunk_backward_{SUFFIX[dout.dtype]}", *given)
        return grads

    def head(
        self, x: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, eps: float, wanted: bool
    ) -> tuple[Tensor, ...]:
        """Weighted losses [N] of `x` [N, C] after `norm` through the head [V, C]; and where they are `wanted` the
        gradients of x, and of head and norm in float32."""
        (n, c), vocab = x.shape, weight.shape[0]
        losses, dx, sums = torch.empty(n), None, None
        if wanted:
            dx, sums = torch.empty_like(x), torch.empty(_rounded(vocab) * c + c)
        name = f"head_{SUFFIX[x.dtype]}"
        self._call(name, x, norm, weight, targets, weights, losses, dx, sums, n, c, vocab, float(eps))
        if dx is None or sums is None:
            return (losses,)
        return losses, dx, sums[: vocab * c].view(vocab, c), sums[-c:]

    def learn(self, model: Weights, dtype: torch.dtype) -> Learn:
        """`Learn` of a whole model."""
        return Learn(self._ask, f"learn_{SUFFIX[dtype]}", model)

    def polar_(self, update: Tensor, steps: Sequence[Sequence[float]]) -> Tensor:
        """Muon's iteration with the coefficients `steps`, on matrices [n, rows, columns] in bfloat16, in place."""
        numbers = [x for step in steps for x in step]
        self._call("polar", update, *update.shape, (ctypes.c_float * len(numbers))(*numbers), len(steps))
        return update


class Learn:
    """`learn` of `trunk.h` for one model, whose tensors stay where they are; `parts` are the sizes of the gradients of
    layers, head, last norm, and of the embedding where it is not the head."""

    def __init__(self, ask: Callable[..., int], name: str, model: Weights) -> None:
        vocab, width = model.head.shape
        self.parts = [_of_layers(model.sizes), _rounded(vocab) * width, width]
        self.parts += [] if model.tied else [vocab * width]
        self._ask, self._name, self._sizes, self._vocab = ask, name, model.sizes, vocab
        told = (model.embedding, model.norm, model.head, vocab, *model.tables, float(model.eps))
        self._model = (_addresses(model.layers), *told)

    def __call__(
        self, grads: Tensor, ids: Tensor, targets: Tensor, weights: Tensor, firsts: Tensor | None, divisor: float
    ) -> Tensor:
        """Losses [B T] over `divisor`; their gradients go to `grads`. `ids`, `targets`, `weights` [B, T]."""
        losses, sizes = torch.empty(ids.numel()), (ctypes.c_int64 * 8)(*ids.shape, *self._sizes)
        asked = [x.contiguous() for x in (ids, targets, weights)]
        seen = None if firsts is None else firsts.contiguous()
        bad = self._ask(self._name, sizes, *self._model, grads, *asked, float(divisor), seen, losses)
        _known(bad, torch.stack(asked[:2]) if bad >= 0 else ids, self._vocab)
        return losses


def _known(bad: int, ids: Tensor, vocab: int) -> None:
    """Raise ModelError where the id at `bad` is none of the vocabulary's."""
    if bad >= 0:
        raise ModelError(f"token {ids.flatten()[bad].item()} of a batch is not in the model's vocabulary of {vocab}")


def _rounded(vocab: int) -> int:
    """Rows of the gradient of a head."""
    return -(-vocab // 32) * 32


def _of_layers(sizes: tuple[int, ...]) -> int:
    """How many numbers the gradients of all layers have."""
    C, H, K, D, inner, n_layers = sizes
    return n_layers * (C * (2 * H + 2 * K) * D + 3 * inner * C + 2 * C + (H + K) * D)


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[Any]:
    """Where tensors lie; nowhere where there is none."""
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))
