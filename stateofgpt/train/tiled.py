"""The fused pass of a narrow decoder, a few tokens at a time: blocks and head whose products are our own.

Owns: which models go this way, and the two autograd functions of it, over `tiles.h`. What lies around them is
`train.fused`'s. Weights come in float32 and are rounded here; their gradients are summed and given in float32.

Why: at widths of 64 or 128 each of torch's products writes to memory what the next pass reads from there again, its
inner dimension is too short for its tiles, and a call costs as much as a tenth of a product. Here a block is four calls
for the way forward and back, and two for its attention.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from stateofgpt.model.gpt import GPTConfig
from stateofgpt.train.kernels import Kernels

WIDEST = 256  # hidden numbers: past this torch's products take less time
MOST_HEAD = 1 << 20  # weights of a head: each thread sums their gradient apart


class Spec(Protocol):
    """What all blocks share: sizes are B, T, H, K, D; tables cosines and sines [T, D / 2]."""

    @property
    def kernels(self) -> Kernels: ...
    @property
    def sizes(self) -> tuple[int, int, int, int, int]: ...
    @property
    def tables(self) -> tuple[Tensor, Tensor]: ...
    @property
    def firsts(self) -> Tensor | None: ...
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
    """One residual block: x [N, C] -> [N, C]. `rounded` are the four weights in the precision of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        qkv_w: Tensor,
        o_w: Tensor,
        gate_up_w: Tensor,
        down_w: Tensor,
        norm_in: Tensor,
        norm_mlp: Tensor,
        gains: Tensor | None,
        rounded: tuple[Tensor, Tensor, Tensor, Tensor],
        spec: Spec,
    ) -> Tensor:
        k, (qkv_r, *rest) = spec.kernels, rounded
        q, key, v, qkv, rstd, rstd_qk = k.enter_block(x, norm_in, qkv_r, gains, spec.tables, spec.sizes, spec.eps)
        y, probs = k.attend(q, key, v, spec.firsts, spec.sizes)
        out, middle, rstd_mlp, gate_up = k.leave_block(y, x, norm_mlp, rest, spec.eps)
        ctx.spec = spec
        ctx.save_for_backward(
            x, norm_in, norm_mlp, gains, *rounded, q, key, v, qkv, rstd, rstd_qk, y, probs, middle, rstd_mlp, gate_up
        )
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, norm_in, norm_mlp, gains, qkv_r, o_r, gate_up_r, down_r, q, key, v, qkv, rstd, rstd_qk, y, probs, middle,
            rstd_mlp, gate_up,
        ) = ctx.saved_tensors  # fmt: skip
        spec, k = ctx.spec, ctx.spec.kernels
        weights = (o_r, gate_up_r, down_r)
        kept = (y, middle, rstd_mlp, gate_up)
        dmiddle, dy, of_rest = k.leave_block_backward(dout.contiguous(), norm_mlp, weights, kept)
        grads = k.attend_backward(dy, q, key, v, probs, spec.sizes)
        dx, of_qkv = k.enter_block_backward(
            grads, dmiddle, x, norm_in, qkv_r, gains, spec.tables, (rstd, qkv, rstd_qk), spec.sizes
        )
        dqkv_w, dnorm_in, dgains = of_qkv
        do_w, dgate_up_w, ddown_w, dnorm_mlp = of_rest
        dgains = None if gains is None else dgains
        return dx, dqkv_w, do_w, dgate_up_w, ddown_w, dnorm_in, dnorm_mlp, dgains, None, None


class TiledHead(torch.autograd.Function):
    """The final norm, the head and its loss: x [N, C] -> a summed loss. Gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, spec: Spec
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        rounded = weight.detach().to(x.dtype)
        losses, *grads = spec.kernels.head(x, norm, rounded, targets, weights, spec.eps, wanted)
        if wanted:
            ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dnorm = ctx.saved_tensors
        return dx * dout.to(dx.dtype), dnorm * dout, dweight * dout, None, None, None
