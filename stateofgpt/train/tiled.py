"""The fused pass of a narrow decoder, a few tokens at a time: blocks and head whose products are our own.

Owns: which models go this way, and the two autograd functions of it, over `tiles.h`. What lies around them is
`train.fused`'s. Weights come in float32 and are rounded here; their gradients are summed and given in float32.

Why: at widths of 64 or 128 each of torch's products writes to memory what the next pass reads from there again, and
its inner dimension is too short for its tiles. Here a block is four calls on the way forward and back, its attention
two (`docs/decisions/0033-products-of-our-own.md`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from stateofgpt.model.gpt import GPTConfig
from stateofgpt.train.attention import Attended, attend, attend_backward
from stateofgpt.train.kernels import Kernels, Tables

WIDEST = 256  # hidden numbers; with 384 a step of float32 gains 5 % and one of bfloat16 loses 3 %
MOST_HEAD = 1 << 19  # weights of a head: 192 x 2,048 gain 3 %, 256 x 4,096 nothing


class Spec(Attended, Protocol):
    """What all blocks share."""

    @property
    def tables(self) -> Tables: ...
    @property
    def eps(self) -> float: ...


def fits(kernels: Kernels, config: GPTConfig, dtype: torch.dtype) -> bool:
    """Whether blocks go this way: the processor can, and the widths are small and multiples of 32."""
    c = config
    widths = (c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size, c.head_dim)
    return kernels.has_tiles(dtype) and c.hidden_size <= WIDEST and all(width % 32 == 0 for width in widths)


def fits_head(kernels: Kernels, config: GPTConfig, dtype: torch.dtype) -> bool:
    """Whether the head does too."""
    return fits(kernels, config, dtype) and config.vocab_size * config.hidden_size <= MOST_HEAD


class TiledBlock(torch.autograd.Function):
    """One residual block: x [N, C] -> [N, C]. `weights` are those of q, k, v, output, gate, up and down."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_in: Tensor, norm_mlp: Tensor, gains: Tensor | None, spec: Spec, *weights: Tensor
    ) -> Tensor:
        k = spec.kernels
        q, key, v, qkv, *rstd = k.enter_block(x, norm_in, weights[:3], gains, spec.tables, spec.sizes, spec.eps)
        if spec.shared is None:
            y, *probs = k.attend(q, key, v, spec.firsts, spec.sizes)
        else:
            y, probs = attend(q, key, v, spec)
        out, *rest = k.leave_block(y, x, norm_mlp, weights[3:], spec.eps)
        ctx.spec = spec
        ctx.save_for_backward(x, norm_in, norm_mlp, gains, *weights, q, key, v, qkv, *rstd, y, *rest, *probs)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_in, norm_mlp, gains, *kept = ctx.saved_tensors
        into, rest, (q, key, v, qkv, rstd, rstd_qk), left, probs = (
            kept[:3],
            kept[3:7],
            kept[7:13],
            kept[13:17],
            kept[17:],
        )
        k, sizes, tables = ctx.spec.kernels, ctx.spec.sizes, ctx.spec.tables
        dmiddle, dy, (*of_rest, dnorm_mlp) = k.leave_block_backward(dout.contiguous(), norm_mlp, rest, left)
        if ctx.spec.shared is None:
            grads = k.attend_backward(dy, q, key, v, probs[0], sizes)
        else:
            grads = tuple(x.contiguous() for x in attend_backward(dy, q, key, v, probs, ctx.spec))
        dx, (*of_into, dnorm_in, dgains) = k.enter_block_backward(
            grads, dmiddle, x, norm_in, into, gains, tables, (rstd, qkv, rstd_qk), sizes
        )
        return dx, dnorm_in, dnorm_mlp, None if gains is None else dgains, None, *of_into, *of_rest


class TiledHead(torch.autograd.Function):
    """The final norm, the head and its loss: x [N, C] -> a summed loss. Gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, spec: Spec
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        losses, *grads = spec.kernels.head(x, norm, weight, targets, weights, spec.eps, wanted)
        if wanted:
            ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dnorm = ctx.saved_tensors
        return dx * dout.to(dx.dtype), dnorm * dout, dweight * dout, None, None, None
