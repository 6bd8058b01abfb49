"""The Transformer decoder, in the shape of Qwen3 (default) or LLaMA.

Owns the architecture and its initialisation. Parameter names are those of Hugging Face transformers, so that
`state_dict()` is a checkpoint other software loads. Knows nothing of optimizers, files, text or sampling.

Sources: Transformer (arXiv 1706.03762), RMSNorm (1910.07467), rotary positions (2104.09864), SwiGLU (2002.05202),
grouped-query attention (2305.13245), QK-norm (2302.05442) as placed in Qwen3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateofgpt.errors import ConfigError


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a decoder, in the field names of Hugging Face configs."""

    arch: Literal["qwen3", "llama"] = "qwen3"
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 768
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

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
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, rotary positions need an even number")

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys per head; LLaMA does not."""
        return self.arch == "qwen3"


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rotary_tables(config: GPTConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each of shape [length, head_dim]."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), config.rope_theta**-half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by position; `x` [B, H, T, D], tables broadcastable to [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, width, bias=False)
        self.qk_norm = config.qk_norm
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
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        grouped = self.n_head != self.n_kv_head
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

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
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        """Everything after the embedding but the final norm: [B, T, C] -> [B, T, C].

        `positions` [B, T] replace 0, 1, 2 ...; `run_block` (block, x, cos, sin, mask) replaces the plain call of a
        block.
        """
        T = x.shape[1]
        if self.cos.shape[0] < T:
            raise ConfigError(f"{T} tokens do not fit a context of {self.cos.shape[0]}")
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
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
        so that every block begins as the identity (pays at all sizes in public speed-run records).
        """
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.ones_(p)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)
            elif name.endswith("embed_tokens.weight"):
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                bound = (3.0 / p.shape[1]) ** 0.5
                nn.init.uniform_(p, -bound, bound, generator=generator)

    def n_params(self) -> int:
        """Number of distinct parameters (a tied head counts once)."""
        return sum(p.numel() for p in self.parameters())
