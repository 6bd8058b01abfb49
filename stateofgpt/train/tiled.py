"""The fused pass of a narrow decoder, a few tokens at a time: all of its blocks, and its head, by products of our own.

Owns: which models go this way, the two autograd functions of it, and the same without autograd, over `train.tiles`.
Weights come in float32 and are rounded there; their gradients are summed and given in float32.

Why: at widths of 64 or 128 each of torch's products writes to memory what the next pass reads from there again, and
its inner dimension is too short for its tiles; and what Python and autograd do between calls is done on one core, while
the others wait. Here a step is three calls (`docs/decisions/0034-a-step-in-one-call.md`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stateofgpt.model.gpt import GPTConfig
from stateofgpt.train.kernels import Kernels
from stateofgpt.train.tiles import OF_LAYER, Rows, Weights

NARROW = 256  # hidden numbers of models that always go this way
WIDEST = 768  # as far as it was measured: three layers of 768 gain 4 % in bfloat16 and 14 % in float32
MOST_COPIES = 1 << 26  # weights of the blocks of a wider model times threads, each of which sums gradients of its own


def fits(kernels: Kernels, config: GPTConfig, dtype: torch.dtype) -> bool:
    """Whether blocks go this way: the processor can, widths are multiples of 32, and copies of what is summed fit."""
    c = config
    heads, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    if not kernels.has_tiles(dtype) or any(w % 32 for w in (c.hidden_size, heads, c.intermediate_size, c.head_dim)):
        return False
    weights = c.num_hidden_layers * c.hidden_size * (2 * heads + 2 * keys + 3 * c.intermediate_size)
    few = weights * torch.get_num_threads() <= MOST_COPIES
    return c.hidden_size <= NARROW or (c.hidden_size <= WIDEST and few)


def fits_head(kernels: Kernels, config: GPTConfig, dtype: torch.dtype) -> bool:
    """Whether the head does, of any vocabulary: threads share it, and none has sums of its own."""
    return kernels.has_tiles(dtype) and config.hidden_size <= WIDEST and config.hidden_size % 32 == 0


class TiledTrunk(torch.autograd.Function):
    """Embedding and all blocks: ids [B, T] of `rows` -> [B T, C], before the last norm. `layers` are the `OF_LAYER`
    tensors of each layer, one after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        embedding: Tensor,
        rows: Rows,
        dtype: torch.dtype,
        eps: float,
        kernels: Kernels,
        *layers: Tensor | None,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        out, room = kernels.trunk(embedding, layers, rows, dtype, eps, keep)
        if keep:
            ctx.rows, ctx.kernels, ctx.vocabulary = rows, kernels, embedding.shape[0]
            ctx.save_for_backward(room, *layers)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        room, *layers = ctx.saved_tensors
        embedding = torch.zeros(ctx.vocabulary, ctx.rows.sizes[2]) if ctx.needs_input_grad[0] else None
        grads = ctx.kernels.trunk_backward(dout.contiguous(), layers, ctx.rows, room, embedding)
        pairs = zip(layers, _apart(grads, ctx.rows.sizes[2:]), strict=True)
        return embedding, None, None, None, None, *(None if layer is None else grad for layer, grad in pairs)


def _apart(grads: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The layers' gradients as `trunk.h` lays them out, in the order and the shapes of their tensors."""
    C, H, K, D, inner, n_layers = sizes
    shapes = (
        (H * D, C),
        (K * D, C),
        (K * D, C),
        (C,),
        (H, D),
        (K, D),
        (C, H * D),
        (inner, C),
        (inner, C),
        (C, inner),
        (C,),
    )
    parts = grads.split([math.prod(shape) for shape in shapes] * n_layers)
    out: list[Tensor] = []
    for at in range(0, len(parts), OF_LAYER):
        q, k, v, norm, of_q, of_k, o, gate, up, down, norm_mlp = map(Tensor.view, parts[at : at + OF_LAYER], shapes)
        out += norm, q, k, v, of_q[0], of_k[0], o, norm_mlp, gate, up, down
    return out


class TiledHead(torch.autograd.Function):
    """The final norm, the head and its loss: x [N, C] -> a summed loss. Gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        eps: float,
        kernels: Kernels,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        losses, *grads = kernels.head(x, norm, weight, targets, weights, eps, wanted)
        if wanted:
            ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dnorm = ctx.saved_tensors
        scaled = dweight.mul_(dout)  # in place: it may be large
        return dx * dout.to(dx.dtype), dnorm * dout, scaled, None, None, None, None


class Narrow:
    """A model's step without autograd, whose bookkeeping would take a tenth of it: where tensors and their gradients
    lie is looked up once. For a model that keeps its parameters: no weight may be replaced, or become an adapter's, and
    what learns goes on learning."""

    def __init__(self, kernels: Kernels, model: Weights, dtype: torch.dtype) -> None:
        self._model, self._learn = model, kernels.learn(model, dtype)
        self._grads = torch.empty(sum(self._learn.parts))
        self._own = self._named(self._grads)

    def _named(self, grads: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Parameters that learn, and their parts of `grads`."""
        model = self._model
        of_layers, of_head, of_norm, *of_embedding = grads.split(self._learn.parts)
        of_head = of_head.view(-1, of_norm.numel())[: model.head.shape[0]]
        parts = [*_apart(of_layers, model.sizes), of_norm, of_head, *(x.view_as(of_head) for x in of_embedding)]
        tensors = [*model.layers, model.norm, model.head, *(() if model.tied else (model.embedding,))]
        pairs = zip(tensors, parts, strict=True)
        return [(tensor, part) for tensor, part in pairs if tensor is not None and tensor.requires_grad]

    @torch.no_grad()
    def backward(self, ids: Tensor, targets: Tensor, weights: Tensor, firsts: Tensor | None, divisor: float) -> Tensor:
        """Cross-entropy summed by `weights`, over `divisor`. Its gradients are added to the parameters' `.grad`; where
        there are none they become it, in memory that the next step uses again."""
        given = (ids, targets, weights, firsts, divisor)
        if all(parameter.grad is None for parameter, _ in self._own):
            losses = self._learn(self._grads, *given)
            for parameter, own in self._own:
                parameter.grad = own
            return losses.sum()
        more = torch.empty_like(self._grads)
        losses = self._learn(more, *given)
        if all(parameter.grad is own for parameter, own in self._own):
            self._grads += more
            return losses.sum()
        for parameter, own in self._named(more):
            parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)
        return losses.sum()
