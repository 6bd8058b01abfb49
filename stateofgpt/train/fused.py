"""The training forward and backward pass of a Qwen3 or LLaMA decoder, with few and large operations.

Owns: the same mathematics as `model.gpt` from embeddings to the summed loss, with its own gradients: matrix products by
torch, what lies between them by `train.kernels`. The model's own `forward` is the reference; tests compare losses and
every gradient. Knows no optimizer and no data.

Narrow models go through `train.tiled`, whose products are not torch's, and rows that branch through `train.attention`.

Three things make it fast on a CPU. Weights of a kind are cast to the working precision together, once a step. Attention
is two batched products around a softmax in place, in blocks that skip most of the future (torch's fused CPU kernel
takes three to six times as long here, most of it in its backward pass). The head never holds more than a few megabytes
of logits, which become their own gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stateofgpt.model.gpt import GPT, MLP, Attention, Block, GPTConfig, Trunk
from stateofgpt.model.lora import LoraLinear, effective_weight
from stateofgpt.train import tiled
from stateofgpt.train.attention import BLOCK, Queries, attend, attend_backward
from stateofgpt.train.branches import Branches
from stateofgpt.train.kernels import Kernels, Tables
from stateofgpt.train.tiles import Weights

LOGITS = 1 << 21  # logits held at a time, or those of as many rows as the next line says, if these are more
HEAD_ROWS = 512  # fewer rows at once spend more on adding up the head's gradient than on making it
LONGEST = 1024  # tokens of context: attention keeps its probabilities, which grow with the square of this


@dataclass(frozen=True)
class _Spec:
    """What all blocks share."""

    kernels: Kernels
    sizes: tuple[int, int, int, int, int]  # B, T, H, K, D
    tables: Tables
    blocks: tuple[Queries, ...]
    firsts: Tensor | None
    shared: Tensor | None
    eps: float


class Decoder(Protocol):
    """Anything on a decoder's trunk: a language model, a reward model, a value model."""

    config: GPTConfig
    model: Trunk


def knows(model: Decoder) -> bool:
    """Whether the fused pass can compute this model; it knows no biases, and no dropout in adapters."""
    c = model.config
    known = c.arch in ("qwen3", "llama") and c.head_dim % 2 == 0 and not (c.attention_bias or c.mlp_bias)
    return known and not any(isinstance(m, LoraLinear) and m.lora_dropout for m in model.model.modules())


def fits(model: Decoder, ids: Tensor, branches: Branches | None = None) -> bool:
    """Whether the fused pass can take this model and ids [B, T]."""
    longest = ids.shape[1] if branches is None else branches.longest
    return knows(model) and longest <= LONGEST and ids.device.type == "cpu"


def fused_loss(
    kernels: Kernels,
    model: GPT,
    ids: Tensor,
    targets: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    firsts: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats, summed by `weights`; `ids`, `targets` [B, T] int64, `weights` [B, T] float32.

    `firsts` [B, T] int32 is where each position's document begins: nothing before it is attended to.
    """
    x, spec = _decoded(kernels, model, ids, dtype, firsts)
    norm, head, asked = model.model.norm.weight, model.lm_head.weight, (targets.reshape(-1), weights.reshape(-1))
    if tiled.fits_head(kernels, model.config, dtype) and head.requires_grad:  # if not, torch's way makes no gradient
        out: Tensor = tiled.TiledHead.apply(x, norm, head, *asked, spec.eps, kernels)
    else:
        out = _Head.apply(x, norm, head.to(dtype), *asked, spec)
    return out


def narrow(kernels: Kernels, model: GPT, dtype: torch.dtype) -> tiled.Narrow | None:
    """A step of `model` without autograd; None where only autograd can do it: with torch's products, or adapters."""
    c, trunk = model.config, model.model
    fit = tiled.fits(kernels, c, dtype) and tiled.fits_head(kernels, c, dtype)
    if not (knows(model) and fit and model.lm_head.weight.requires_grad):
        return None
    layers = [layer for layer in trunk.layers if isinstance(layer, Block)]
    tensors = [tensor for layer in layers for tensor in _tensors(layer, c)]
    if not all(tensor is None or tensor.is_leaf for tensor in tensors):
        return None
    ends = (trunk.embed_tokens.weight, tensors, trunk.norm.weight, model.lm_head.weight)
    whole = Weights(*ends, _tables(trunk, c, LONGEST), _sizes(c, len(layers)), c.rms_norm_eps)
    return tiled.Narrow(kernels, whole, dtype)


def fused_hidden(
    kernels: Kernels, model: Decoder, ids: Tensor, dtype: torch.dtype, branches: Branches | None = None
) -> Tensor:
    """Final hidden states [B, T, C] of `ids` [B, T], after the last norm, in `dtype`."""
    x, spec = _decoded(kernels, model, ids, dtype, None, branches)
    out: Tensor = _Norm.apply(x, model.model.norm.weight, spec)
    return out.view(*ids.shape, -1)


def _decoded(
    kernels: Kernels,
    model: Decoder,
    ids: Tensor,
    dtype: torch.dtype,
    firsts: Tensor | None,
    branches: Branches | None = None,
) -> tuple[Tensor, _Spec]:
    """Everything from the embedding up to the final norm: [B T, C]."""
    c, trunk = model.config, model.model
    B, T = ids.shape
    shared, positions = None, None
    length, blocks = T, tuple(Queries(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK))
    if branches is not None:
        firsts, shared, positions, length = branches.firsts, branches.shared, branches.positions, branches.longest
        blocks = tuple(Queries(*numbers) for numbers in branches.blocks(BLOCK))
    tables = (*_tables(trunk, c, length), positions)
    sizes = (B, T, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    spec = _Spec(kernels, sizes, tables, blocks, firsts, shared, c.rms_norm_eps)
    layers = [layer for layer in trunk.layers if isinstance(layer, Block)]
    if tiled.fits(kernels, c, dtype):
        rows = tiled.Rows(ids.long().contiguous(), (B, T, *_sizes(c, len(layers))), tables, firsts, shared)
        tensors = (tensor for layer in layers for tensor in _tensors(layer, c))
        return tiled.TiledTrunk.apply(trunk.embed_tokens.weight, rows, dtype, spec.eps, kernels, *tensors), spec
    x = trunk.embed_tokens(ids).view(B * T, c.hidden_size).to(dtype)
    for layer, parts in zip(layers, _prepared(layers, dtype), strict=True):
        x = _Block.apply(x, *parts, *_norms(layer), _gains(layer.self_attn, c), spec)
    return x, spec


def _tables(trunk: Trunk, config: GPTConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first `length` positions [length, D / 2]."""
    half = config.head_dim // 2
    return trunk.cos[:length, :half].contiguous(), trunk.sin[:length, :half].contiguous()


def _sizes(config: GPTConfig, n_layers: int) -> tuple[int, ...]:
    """Those of `tiles.Rows` after B and T."""
    c = config
    return (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size, n_layers)


def _tensors(layer: Block, config: GPTConfig) -> tuple[Tensor | None, ...]:
    """A layer's tensors in the order of `tiles.OF_LAYER`."""
    norm, norm_mlp = _norms(layer)
    q, k, v, o, *rest = _weights(layer)
    a = layer.self_attn
    gains = (a.q_norm.weight, a.k_norm.weight) if config.qk_norm else (None, None)
    return norm, q, k, v, *gains, o, norm_mlp, *rest


def _norms(layer: Block) -> tuple[Tensor, Tensor]:
    """The gains of a layer's two norms."""
    return layer.input_layernorm.weight, layer.post_attention_layernorm.weight


def _weights(layer: Block) -> tuple[Tensor, ...]:
    """Query, key, value, output, gate, up and down weights of a layer, adapters in."""
    a, m = layer.self_attn, layer.mlp
    assert isinstance(m, MLP)  # `fits` has looked
    return tuple(map(effective_weight, (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)))


def _prepared(layers: list[Block], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Of each layer: query-key-value, output, gate-and-up and down weights in the working precision, adapters in."""
    of_layers = [_weights(layer) for layer in layers]
    kinds = ((0, 1, 2), (3,), (4, 5), (6,))
    weights = ([ws[i] for ws in of_layers for i in kind] for kind in kinds)
    return list(zip(*(torch.cat(kind).to(dtype).chunk(len(layers)) for kind in weights), strict=True))


def _gains(attention: Attention, config: GPTConfig) -> Tensor | None:
    """The gains of all query and key heads [H + K, D], or None."""
    if not config.qk_norm:
        return None
    q = attention.q_norm.weight.expand(config.num_attention_heads, -1)
    return torch.cat((q, attention.k_norm.weight.expand(config.num_key_value_heads, -1)))


class _Block(torch.autograd.Function):
    """One residual block: x [N, C] -> [N, C]."""

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
        spec: _Spec,
    ) -> Tensor:
        k = spec.kernels
        h, rstd = k.rmsnorm(x, norm_in, spec.eps)
        qkv = h @ qkv_w.t()
        q, key, v, rstd_qk = k.rope(qkv, gains, spec.tables, spec.sizes, spec.eps)
        y, probs = attend(q, key, v, spec)
        middle = torch.addmm(x, y, o_w.t())
        h_mlp, rstd_mlp = k.rmsnorm(middle, norm_mlp, spec.eps)
        gate_up = h_mlp @ gate_up_w.t()
        hidden = k.swiglu(gate_up)
        ctx.spec, ctx.n_probs = spec, len(probs)
        ctx.save_for_backward(
            x, qkv_w, o_w, gate_up_w, down_w, norm_in, norm_mlp, gains, h, rstd, qkv, q, key, v, rstd_qk, y, middle,
            h_mlp, rstd_mlp, gate_up, hidden, *probs,
        )  # fmt: skip
        return torch.addmm(middle, hidden, down_w.t())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, qkv_w, o_w, gate_up_w, down_w, norm_in, norm_mlp, gains, h, rstd, qkv, q, key, v, rstd_qk, y, middle,
            h_mlp, rstd_mlp, gate_up, hidden, *probs,
        ) = ctx.saved_tensors  # fmt: skip
        spec, k = ctx.spec, ctx.spec.kernels
        dout = dout.contiguous()
        dgate_up = k.swiglu_backward(dout @ down_w, gate_up)
        dmiddle, dnorm_mlp = k.rmsnorm_backward(dgate_up @ gate_up_w, middle, norm_mlp, rstd_mlp, dout)
        grads = attend_backward(dmiddle @ o_w, q, key, v, probs, spec)
        dqkv, dgains = k.rope_backward(grads, qkv, gains, spec.tables, rstd_qk, spec.sizes)
        dx, dnorm_in = k.rmsnorm_backward(dqkv @ qkv_w, x, norm_in, rstd, dmiddle)
        return (
            dx,
            dqkv.t() @ h,
            dmiddle.t() @ y,
            dgate_up.t() @ h_mlp,
            dout.t() @ hidden,
            dnorm_in,
            dnorm_mlp,
            None if gains is None else dgains,
            None,
        )


class _Norm(torch.autograd.Function):
    """The final norm alone: x [N, C] -> [N, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, spec: _Spec) -> Tensor:
        y, rstd = spec.kernels.rmsnorm(x, norm, spec.eps)
        ctx.spec = spec
        ctx.save_for_backward(x, norm, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, rstd = ctx.saved_tensors
        dx, dnorm = ctx.spec.kernels.rmsnorm_backward(dy.contiguous(), x, norm, rstd, torch.zeros_like(x))
        return dx, dnorm, None


class _Head(torch.autograd.Function):
    """The final norm, the head and its loss: x [N, C] -> a summed loss. Gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, spec: _Spec
    ) -> Tensor:
        k = spec.kernels
        wanted = any(ctx.needs_input_grad)
        h, rstd = k.rmsnorm(x, norm, spec.eps)
        dh, dweight = torch.empty_like(h), torch.zeros(weight.shape) if ctx.needs_input_grad[2] else None
        losses = []
        rows = max(HEAD_ROWS, LOGITS // weight.shape[0])
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            logits = h[part] @ weight.t()
            losses.append(k.cross_entropy_(logits, targets[part], weights[part], wanted))
            if wanted:
                torch.mm(logits, weight, out=dh[part])
                if dweight is not None:
                    dweight += logits.t() @ h[part]
        ctx.spec = spec
        ctx.save_for_backward(x, norm, rstd, dh, dweight)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, rstd, dh, dweight = ctx.saved_tensors
        dh = dh * dout.to(dh.dtype)
        dx, dnorm = ctx.spec.kernels.rmsnorm_backward(dh, x, norm, rstd, torch.zeros_like(x))
        return dx, dnorm, None if dweight is None else (dweight * dout).to(x.dtype), None, None, None
