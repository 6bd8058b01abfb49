"""The fast path through a decoder: the forward pass of `model.gpt.GPT` for rows that have a cache.

Owns: the fused copies of the weights and the two passes, `prefill` (many tokens, no logits) and `decode` (one token
per row). Knows nothing of requests or sampling. The model's own `forward` is the reference; tests compare the two.

What makes it fast on small models, where the number of operations counts more than their size: query, key and value
are one product, gate and up another; both residual additions are part of the product (`addmm`); the rotation is one
complex multiplication. For the last, dimension i of each query and key head is placed beside its partner i + D/2 by
permuting rows of the weights once: attention only sees dot products of queries and keys, which no common permutation
changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stateofgpt.infer.cache import KVCache
from stateofgpt.model.gpt import GPT, Block
from stateofgpt.model.lora import effective_weight


@dataclass
class _Layer:
    norm_in: Tensor  # [C]
    qkv: Tensor  # [(H + 2 KVH) D, C]
    qk_gain: Tensor | None  # [H + KVH, D], always float32
    out: Tensor  # [H D, C], transposed
    norm_mlp: Tensor
    gate_up: Tensor  # [2 I, C]
    down: Tensor  # [I, C], transposed


class Decoder:
    """Fused weights of one model, adapters merged. `refresh()` after every change of the model's weights."""

    def __init__(self, model: GPT, dtype: torch.dtype, max_context: int) -> None:
        c = model.config
        self.config, self.dtype, self._model = c, dtype, model
        self._group = c.num_attention_heads // c.num_key_value_heads
        half = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        angles = torch.outer(torch.arange(max_context, dtype=torch.float32), c.rope_theta**-half)
        weight = model.lm_head.weight
        self._turns = torch.polar(torch.ones_like(angles), angles).to(weight.device)  # [max_context, D/2] complex
        self.refresh()

    @property
    def device(self) -> torch.device:
        return self._turns.device

    @torch.inference_mode()
    def refresh(self) -> None:
        """Read the model's weights again."""
        trunk = self._model.model
        self._embed = trunk.embed_tokens.weight.detach().to(self.dtype)
        self._head = self._model.lm_head.weight.detach().to(self.dtype)
        self._norm = trunk.norm.weight.detach().to(self.dtype)
        self._layers = [self._fuse(block) for block in trunk.layers if isinstance(block, Block)]

    def _fuse(self, block: Block) -> _Layer:
        c, attn, mlp = self.config, block.self_attn, block.mlp
        pairs = torch.arange(c.head_dim, device=self.device).view(2, -1).t().reshape(-1)  # 0, D/2, 1, D/2 + 1, ...

        def paired(weight: Tensor) -> Tensor:
            return weight.view(-1, c.head_dim, c.hidden_size)[:, pairs].reshape(-1, c.hidden_size)

        gain = None
        if c.qk_norm:
            q, k = attn.q_norm.weight[pairs], attn.k_norm.weight[pairs]
            gain = torch.cat((q.expand(c.num_attention_heads, -1), k.expand(c.num_key_value_heads, -1))).float()
        query, key, value = (effective_weight(linear) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
        qkv = torch.cat((paired(query), paired(key), value))
        return _Layer(
            norm_in=block.input_layernorm.weight.to(self.dtype),
            qkv=qkv.to(self.dtype),
            qk_gain=gain,
            out=effective_weight(attn.o_proj).detach().to(self.dtype).t(),
            norm_mlp=block.post_attention_layernorm.weight.to(self.dtype),
            gate_up=torch.cat((effective_weight(mlp.gate_proj), effective_weight(mlp.up_proj))).to(self.dtype),
            down=effective_weight(mlp.down_proj).detach().to(self.dtype).t(),
        )

    def _queries_keys_values(self, layer: _Layer, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens `x` [N, C]: queries [N, H, D], keys and values [N, KVH, D]; normalised and rotated."""
        c = self.config
        n_turned = c.num_attention_heads + c.num_key_value_heads
        h = F.rms_norm(x, (c.hidden_size,), layer.norm_in, c.rms_norm_eps)
        qkv = F.linear(h, layer.qkv).view(x.shape[0], -1, c.head_dim)
        qk = qkv[:, :n_turned].float()  # rotation and norm in float32, as complex bfloat16 does not exist
        if layer.qk_gain is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.rms_norm_eps).mul_(layer.qk_gain)
        qk = (qk.view(torch.complex64) * turns).view(torch.float32).to(self.dtype)
        return qk[:, : c.num_attention_heads], qk[:, c.num_attention_heads :], qkv[:, n_turned:]

    def _rest(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and feed-forward with their residuals; `x` and `attended` are [N, C] and [N, H D]."""
        c = self.config
        x = torch.addmm(x, attended, layer.out)
        h = F.rms_norm(x, (c.hidden_size,), layer.norm_mlp, c.rms_norm_eps)
        gate, up = F.linear(h, layer.gate_up).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate).mul_(up), layer.down)

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache, longest: int) -> Tensor:
        """Read token `ids` [n] at `positions` [n] in rows 0..n of the cache; logits [n, V] of the next ones.

        `longest` is one more than the largest position: nothing behind it is looked at.
        """
        c, n = self.config, ids.shape[0]
        x = self._embed[ids]
        turns = self._turns[positions][:, None]
        place = positions.view(n, 1, 1, 1).expand(n, c.num_key_value_heads, 1, c.head_dim)
        behind = torch.arange(longest, device=self.device) > positions[:, None]
        mask = torch.zeros(n, 1, 1, longest, dtype=self.dtype, device=self.device)
        mask.masked_fill_(behind[:, None, None], -torch.inf)
        for index, layer in enumerate(self._layers):
            q, k, v = self._queries_keys_values(layer, x, turns)
            keys, values = (part[:n, :, :longest] for part in cache.layer(index))
            keys.scatter_(2, place, k[:, :, None])
            values.scatter_(2, place, v[:, :, None])
            # the query heads that share a key head stand as several queries of it: no key is repeated in memory
            q = q.unflatten(1, (-1, self._group))
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = self._rest(layer, x, y.reshape(n, -1))
        return F.linear(F.rms_norm(x, (c.hidden_size,), self._norm, c.rms_norm_eps), self._head)

    def prefill(self, ids: list[list[int]], starts: list[int], rows: list[int], cache: KVCache) -> None:
        """Read `ids[i]` at positions starts[i], starts[i] + 1, ... of row rows[i] into the cache.

        The products run over the tokens of all rows in one packed list, without padding; only attention is padded.
        """
        c, B, T = self.config, len(ids), max(map(len, ids))
        sizes = torch.tensor([len(x) for x in ids], device=self.device)
        start = torch.tensor(starts, device=self.device)
        row = torch.tensor(rows, device=self.device)
        who, when = (torch.arange(T, device=self.device) < sizes[:, None]).nonzero(as_tuple=True)  # [N] each
        where = when + start[who]
        target = (row[who], where)
        longest = max(s + len(x) for s, x in zip(starts, ids, strict=True))
        fresh = not any(starts)
        mask = None
        if not fresh:  # [B, 1, T, longest]: a token sees all positions up to its own
            own = start[:, None] + torch.arange(T, device=self.device)
            seen = torch.arange(longest, device=self.device) <= own[:, :, None]
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)[
                :, None
            ]
        x = self._embed[torch.tensor([t for one in ids for t in one], device=self.device)]
        turns = self._turns[where][:, None]
        for index, layer in enumerate(self._layers):
            q, k, v = self._queries_keys_values(layer, x, turns)
            keys, values = (part.transpose(1, 2) for part in cache.layer(index))  # [rows, length, KVH, D]
            keys.index_put_(target, k)
            values.index_put_(target, v)
            if index == len(self._layers) - 1:
                return  # the last layer's output would only be needed for logits
            padded = q.new_zeros(B, T, c.num_attention_heads, c.head_dim)
            padded[who, when] = q
            y = F.scaled_dot_product_attention(
                padded.transpose(1, 2),
                keys[row, :longest].transpose(1, 2),
                values[row, :longest].transpose(1, 2),
                attn_mask=mask,
                is_causal=fresh,
                enable_gqa=self._group > 1,
            )
            x = self._rest(layer, x, y.transpose(1, 2)[who, when].flatten(1))
