"""The fused pass of a narrow decoder, a few tokens at a time: all of its blocks, and its head, by products of our own.

Owns: which models go this way, and the two autograd functions of it, over `train.tiles`. Weights come in float32 and are
rounded there; their gradients are summed and given in float32.

Why: at widths of 64 or 128 each of torch's products writes to memory what the next pass reads from there again, and
its inner dimension is too short for its tiles; and what Python and autograd need for each block is as long as a fifth of
its products, on one core while the others wait. Here a step is four calls (`docs/decisions/0033-products-of-our-own.md`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateofgpt.model.gpt import GPTConfig
from stateofgpt.train.kernels import Kernels
from stateofgpt.train.tiles import OF_LAYER, Rows

WIDEST = 256  # hidden numbers; with 384 a step of float32 gains 5 % and one of bfloat16 loses 3 %
MOST_HEAD = 1 << 19  # weights of a head: 192 x 2,048 gain 3 %, 256 x 4,096 nothing


def fits(kernels: Kernels, config: GPTConfig, dtype: torch.dtype) -> bool:
    """Whether blocks go this way: the processor can, and the widths are small and multiples of 32."""
    c = config
    widths = (c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size, c.head_dim)
    return kernels.has_tiles(dtype) and c.hidden_size <= WIDEST and all(width % 32 == 0 for width in widths)


def fits_head(kernels: Kernels, config: GPTConfig, dtype: torch.dtype) -> bool:
    """Whether the head does too."""
    return fits(kernels, config, dtype) and config.vocab_size * config.hidden_size <= MOST_HEAD


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
        vocabulary = ctx.vocabulary if ctx.needs_input_grad[0] else None
        embedding, grads = ctx.kernels.trunk_backward(dout.contiguous(), layers, ctx.rows, room, vocabulary)
        starts = range(0, len(layers), OF_LAYER)
        apart = (_apart(own, layers[at : at + OF_LAYER], ctx.rows) for own, at in zip(grads, starts, strict=True))
        return embedding, None, None, None, None, *(grad for layer in apart for grad in layer)


def _apart(grads: Tensor, layer: list[Tensor | None], rows: Rows) -> tuple[Tensor | None, ...]:
    """A layer's gradients as `trunk.h` lays them out, in the order and the shapes of its tensors."""
    _, _, C, H, K, D, inner, _ = rows.sizes
    A, of_keys, of_gate = H * D, K * D, inner * C
    sizes = (A * C, of_keys * C, of_keys * C, C, A, of_keys, C * A, of_gate, of_gate, of_gate, C)
    q, k, v, norm, of_q, of_k, *rest = grads.split(sizes)
    ordered = (norm, q, k, v, of_q[:D], of_k[:D], *rest[:1], rest[-1], *rest[1:-1])
    return tuple(None if x is None else g.view(x.shape) for g, x in zip(ordered, layer, strict=True))


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
        return dx * dout.to(dx.dtype), dnorm * dout, dweight * dout, None, None, None, None
