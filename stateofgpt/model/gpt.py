"""The Transformer decoder, in the shape of Qwen3 (default), LLaMA or GPT-2.

Owns the architecture and its initialisation. Parameter names are those that Hugging Face transformers has for Qwen3 and
LLaMA; GPT-2's are the same here, and `model/layout.py` knows what they are called in a file. Knows nothing of
optimizers, files, text or sampling.

Sources: Transformer (arXiv 1706.03762), RMSNorm (1910.07467), SwiGLU (2002.05202), grouped-query attention
(2305.13245), QK-norm (2302.05442) as placed in Qwen3; GPT-2's report (Radford et al. 2019) and GELU (1606.08415).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateofgpt.errors import ConfigError
from stateofgpt.model.rotary import OWN_THETA, RopeScaling, rotary_angles, rotate

Arch = Literal["qwen3", "llama", "gpt2"]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a decoder, in the field names that Hugging Face configs have for Qwen3 and LLaMA.

    In GPT-2 `rms_norm_eps` is LayerNorm's, every linear layer has a bias, and there is nothing rotary.
    """

    arch: Arch = "qwen3"
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 768
    max_position_embeddings: int = 512
    rope_theta: float = OWN_THETA
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.arch == "gpt2":
            self._check_gpt2()
        elif self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, rotary positions need an even number")
        if self.arch == "qwen3" and self.mlp_bias:
            raise ConfigError("mlp_bias is true, and qwen3 has no such bias; take the llama architecture")

    def _check_gpt2(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads != kv_heads:
            raise ConfigError(f"num_key_value_heads is {kv_heads}, in gpt2 it must be num_attention_heads ({heads})")
        if heads * self.head_dim != self.hidden_size:
            raise ConfigError(
                f"head_dim is {self.head_dim}, in gpt2 it must be hidden_size / num_attention_heads "
                f"({self.hidden_size} / {heads})"
            )
        if self.attention_bias or self.mlp_bias or self.rope_scaling is not None:
            raise ConfigError("gpt2 always has biases and never rotary positions: leave attention_bias, mlp_bias and "
                              "rope_scaling out")  # fmt: skip

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys per head; the others do not."""
        return self.arch == "qwen3"

    @property
    def rotary(self) -> bool:
        """GPT-2 has a learned vector for each position instead."""
        return self.arch != "gpt2"


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """Mean and variance normalised over the last dimension, with a learned gain and shift: GPT-2's."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _norm(config: GPTConfig) -> RMSNorm | LayerNorm:
    kind = LayerNorm if config.arch == "gpt2" else RMSNorm
    return kind(config.hidden_size, config.rms_norm_eps)


def rotary_tables(config: GPTConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [length, head_dim]; [length, 0] where nothing is rotated."""
    dim = config.head_dim if config.rotary else 0
    angles = rotary_angles(dim, config.rope_theta, length, config.rope_scaling)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, bias = config.hidden_size, config.attention_bias or config.arch == "gpt2"
        self.q_proj = nn.Linear(width, self.n_head * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, width, bias=bias)
        self.qk_norm, self.rotary = config.qk_norm, config.rotary
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        grouped = self.n_head != self.n_kv_head
        if grouped and mask is not None and x.device.type != "cpu":  # a GPU's kernels take a mask or shared keys
            each = (B, self.n_kv_head, self.n_head // self.n_kv_head, T, self.head_dim)
            k, v = (t[:, :, None].expand(each).reshape(q.shape) for t in (k, v))
            grouped = False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    """GPT-2's feed-forward: GELU in its tanh approximation, no gate."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp = GeluMLP(config) if config.arch == "gpt2" else MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks and the final norm: ids [B, T] -> hidden states [B, T, C]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions: nn.Embedding | None = None
        if not config.rotary:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = _norm(config)
        cos, sin = rotary_tables(config, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        out: Tensor = self.norm(self.run(self.embed_tokens(ids), mask, positions))
        return out

    def run(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        run_block: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ) -> Tensor:
        """Everything after the embedding of tokens but the final norm: [B, T, C] -> [B, T, C].

        `positions` [B, T] replace 0, 1, 2 ...; `run_block` (block, x, cos, sin, mask) replaces the plain call of a
        block.
        """
        T = x.shape[1]
        if positions is None and self.cos.shape[0] < T:
            raise ConfigError(f"{T} tokens do not fit a context of {self.cos.shape[0]}")
        if self.embed_positions is not None:
            x = x + (self.embed_positions.weight[:T] if positions is None else self.embed_positions(positions))
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if positions is None:
            cos, sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        else:  # [B, 1, T, D]
            cos, sin = self.cos[positions][:, None].to(x.dtype), self.sin[positions][:, None].to(x.dtype)
        for block in self.layers:
            x = block(x, cos, sin, mask) if run_block is None else run_block(block, x, cos, sin, mask)
        return x


class GPT(nn.Module):
    """A decoder with a language-model head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Final hidden states [B, T, C] of `ids` [B, T].

        `mask` [B, 1, T, T] (True = may look) replaces plain causality.
        """
        out: Tensor = self.model(ids, mask, positions)
        return out

    def forward(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab_size] of `ids` [B, T]."""
        out: Tensor = self.lm_head(self.hidden(ids, mask, positions))
        return out

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise in place from one generator.

        Matrices get a uniform spread of std 1/sqrt(fan_in); output projections of both residual branches start at zero,
        so that every block begins as the identity (pays at all sizes in public speed-run records). Biases are zero.
        """
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)
            elif name.endswith(("embed_tokens.weight", "embed_positions.weight")):
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                bound = (3.0 / p.shape[1]) ** 0.5
                nn.init.uniform_(p, -bound, bound, generator=generator)

    def n_params(self) -> int:
        """Number of distinct parameters (a tied head counts once)."""
        return sum(p.numel() for p in self.parameters())
