"""The way through a decoder by torch's operations: the forward pass of `model.gpt.GPT` for rows that have a cache.

Owns: the fused copies of the weights, the cache's memory, and the two passes, `prefill` (many tokens, no logits) and
`decode` (one token per row). Knows nothing of requests or sampling. The model's own `forward` is the reference; tests
compare the two. On CPUs with a compiler `infer.forward` is faster; on other devices `infer.static` goes on from here.

What makes it fast on small models, where the number of operations counts more than their size: query, key and value
are one product, gate and up another; both residual additions are part of the product (`addmm`); the rotation, which
GPT-2 lacks, is one complex multiplication. For the last, dimension i of each query and key head is placed beside its
partner i + D/2 by permuting rows of the weights once: attention only sees dot products of queries and keys, which no
common permutation changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateofgpt.infer.cache import BLOCK, blocks_of, zeroed
from stateofgpt.infer.transfer import column, sent
from stateofgpt.model.gpt import GPT, MLP, Block, LayerNorm, RMSNorm
from stateofgpt.model.lora import effective_weight
from stateofgpt.model.rotary import rotary_angles


@dataclass
class _Norm:
    gain: Tensor  # [C]
    shift: Tensor | None  # [C] where it is a LayerNorm
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.shift is None:
            return F.rms_norm(x, self.gain.shape, self.gain, self.eps)
        return F.layer_norm(x, self.gain.shape, self.gain, self.shift, self.eps)


class _Linear:
    """Several projections of one input as one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias  # [outputs, inputs], [outputs]
        self.transposed = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """`x` plus the projection of `y`, both [N, .]."""
        return torch.addmm(x if self.bias is None else x + self.bias, y, self.transposed)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """Add the projection of `y` to `x`: on a GPU that saves a copy."""
        if self.bias is not None:
            x.add_(self.bias)
        x.addmm_(y, self.transposed)


@dataclass
class _Layer:
    norm_in: _Norm
    qkv: _Linear  # to (H + 2 KVH) D
    qk_gain: Tensor | None  # [H + KVH, D], always float32
    out: _Linear
    norm_mlp: _Norm
    up: _Linear  # to 2 I, gate and up; to I where there is no gate
    down: _Linear


class Decoder:
    """Fused weights of one model, adapters merged. `refresh()` after every change of the model's weights."""

    exact = False  # the last bits of a token depend on the batch
    guesses = False  # whether `verify` reads several tokens of a row at once
    at_once = 4096  # tokens that are read at once; bounds the memory of a prefill
    nowhere = 0  # what stands in a table where a row has no block: any, as masks hide it

    def __init__(self, model: GPT, dtype: torch.dtype, max_context: int) -> None:
        c = model.config
        self.block_bytes = 2 * c.num_hidden_layers * BLOCK * c.num_key_value_heads * c.head_dim * dtype.itemsize
        self.config, self.dtype, self._model = c, dtype, model
        self._group = c.num_attention_heads // c.num_key_value_heads
        self.device = model.lm_head.weight.device
        self._turns: Tensor | None = None  # [max_context, D/2] complex
        if c.rotary:
            angles = rotary_angles(c.head_dim, c.rope_theta, max_context, c.rope_scaling)
            self._turns = torch.polar(torch.ones_like(angles), angles).to(self.device)
        self.refresh()

    @torch.inference_mode()
    def refresh(self) -> None:
        """Read the model's weights again."""
        trunk = self._model.model
        self._embed = self._taken(trunk.embed_tokens.weight)
        self._head = self._taken(self._model.lm_head.weight)
        places = trunk.embed_positions
        self._embed_positions = None if places is None else self._taken(places.weight)
        self._norm = self._normed(trunk.norm)
        self._layers = [self._fuse(block) for block in trunk.layers if isinstance(block, Block)]

    def _taken(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A weight as the passes read it, in `dtype` or the decoder's own."""
        return weight.detach().to(dtype or self.dtype)

    def _normed(self, norm: RMSNorm | LayerNorm) -> _Norm:
        shift = self._taken(norm.bias) if isinstance(norm, LayerNorm) else None
        return _Norm(self._taken(norm.weight), shift, norm.eps)

    def _paired(self, rows: Tensor) -> Tensor:
        """Rows [H D, ...] of queries or keys, dimension i of each head beside its partner i + D/2 where it rotates."""
        if self._turns is None:
            return rows
        pairs = torch.arange(self.config.head_dim, device=self.device).view(2, -1).t().reshape(-1)  # 0, D/2, 1, ...
        return rows.unflatten(0, (-1, self.config.head_dim))[:, pairs].flatten(0, 1)

    def _linear(self, *parts: nn.Linear, paired: int = 0) -> _Linear:
        """`parts` as one projection; the outputs of the first `paired` of them are `_paired`."""

        def stacked(tensors: Sequence[Tensor]) -> Tensor:
            ready = [self._paired(t) if i < paired else t for i, t in enumerate(tensors)]
            return self._taken(ready[0] if len(ready) == 1 else torch.cat(ready))

        biases = [part.bias for part in parts if part.bias is not None]
        return _Linear(stacked([effective_weight(part) for part in parts]), stacked(biases) if biases else None)

    def _fuse(self, block: Block) -> _Layer:
        c, attn, mlp = self.config, block.self_attn, block.mlp
        gain = None
        if attn.qk_norm:
            q, k = self._paired(attn.q_norm.weight), self._paired(attn.k_norm.weight)
            gain = torch.cat((q.expand(c.num_attention_heads, -1), k.expand(c.num_key_value_heads, -1)))
            gain = self._taken(gain, torch.float32)
        return _Layer(
            norm_in=self._normed(block.input_layernorm),
            qkv=self._linear(attn.q_proj, attn.k_proj, attn.v_proj, paired=2),
            qk_gain=gain,
            out=self._linear(attn.o_proj),
            norm_mlp=self._normed(block.post_attention_layernorm),
            up=self._linear(mlp.gate_proj, mlp.up_proj) if isinstance(mlp, MLP) else self._linear(mlp.up_proj),
            down=self._linear(mlp.down_proj),
        )

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Vectors [N, C] of tokens `ids` [N] at `positions` [N]."""
        x = self._embed[ids]
        return x if self._embed_positions is None else x + self._embed_positions[positions]

    def _queries_keys_values(self, layer: _Layer, x: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens `x` [N, C]: queries [N, H, D], keys and values [N, KVH, D]; normalised and rotated."""
        c = self.config
        n_turned = c.num_attention_heads + c.num_key_value_heads
        qkv = layer.qkv(layer.norm_in(x)).view(x.shape[0], -1, c.head_dim)
        qk = qkv[:, :n_turned]
        if turns is not None:
            qk = qk.float()  # rotation and norm in float32, as complex bfloat16 does not exist
            if layer.qk_gain is not None:
                qk = F.rms_norm(qk, (c.head_dim,), None, c.rms_norm_eps).mul_(layer.qk_gain)
            qk = (qk.view(torch.complex64) * turns).view(torch.float32).to(self.dtype)
        return qk[:, : c.num_attention_heads], qk[:, c.num_attention_heads :], qkv[:, n_turned:]

    def _rest(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and feed-forward with their residuals; `x` and `attended` are [N, C] and [N, H D]."""
        x = layer.out.added(x, attended)
        return layer.down.added(x, self._active(layer.up(layer.norm_mlp(x))))

    def _active(self, h: Tensor) -> Tensor:
        """What the feed-forward multiplies or bends: [N, I] of [N, 2 I] gates and ups, or of [N, I]."""
        if self.config.arch == "gpt2":
            return F.gelu(h, approximate="tanh")
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def make_room(self, blocks: int) -> None:
        """Memory for `blocks` blocks; what was in it is lost."""
        c = self.config
        shape = (c.num_hidden_layers, 2, blocks, BLOCK, c.num_key_value_heads, c.head_dim)
        self._pool = zeroed(shape, self.dtype, self.device)

    def copy(self, source: int, target: int) -> None:
        """Copy one block to another."""
        self._pool[:, :, target] = self._pool[:, :, source]

    def _table(self, tables: Sequence[Sequence[int]], longest: int) -> Tensor:
        """The blocks of each row as [n, blocks of the longest]."""
        width = blocks_of(longest)
        rows = [list(table[:width]) + [self.nowhere] * (width - len(table)) for table in tables]
        return column(rows, torch.int64, self.device)

    def _sources(self, table: Tensor) -> Tensor:
        """What `_past` wants to know of a table, the same for all layers."""
        return table

    def _past(self, index: int, sources: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, KVH, longest, D] of one layer for the rows of a table, copied together."""
        keys, values = (part[sources].flatten(1, 2)[:, :longest].transpose(1, 2) for part in self._pool[index])
        return keys, values

    def _write(self, index: int, place: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Put keys and values [N, KVH, D] of one layer at `place`: blocks and positions in them, [N] each."""
        for part, new in zip(self._pool[index], (keys, values), strict=True):
            part.index_put_(place, new)

    # ---- passes ---------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """Read token ids[i] at positions[i] of the row whose blocks are tables[i]; logits [n, V] of the next ones."""
        longest = max(positions) + 1
        tokens, where = sent(torch.tensor([ids, positions]), self.device)
        return F.linear(self._decoded(tokens, where, self._table(tables, longest), longest), self._head)

    def _decoded(self, ids: Tensor, where: Tensor, table: Tensor, longest: int) -> Tensor:
        """Final states [n, C] of tokens `ids` [n] at `where` [n], all below `longest`, of the rows of `table`."""
        n = ids.shape[0]
        place = (table[torch.arange(n, device=self.device), where // BLOCK], where % BLOCK)
        x = self._embedded(ids, where)
        turns = None if self._turns is None else self._turns[where][:, None]
        behind = torch.arange(longest, device=self.device) > where[:, None]
        mask = torch.zeros(n, 1, 1, longest, dtype=self.dtype, device=self.device)
        mask.masked_fill_(behind[:, None, None], -torch.inf)
        sources = self._sources(table)
        for index, layer in enumerate(self._layers):
            q, k, v = self._queries_keys_values(layer, x, turns)
            self._write(index, place, k, v)
            keys, values = self._past(index, sources, longest)
            # the query heads that share a key head stand as several queries of it: no key is repeated in memory
            q = q.unflatten(1, (-1, self._group))
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = self._rest(layer, x, y.reshape(n, -1))
        return self._norm(x)

    def prefill(self, ids: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """Read `ids[i]` at positions starts[i], starts[i] + 1, ... of the row whose blocks are tables[i]."""
        for batch in _batches(ids, starts, self.at_once):
            self._prefill([ids[i] for i in batch], [starts[i] for i in batch], [tables[i] for i in batch])

    def _prefill(self, ids: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """The products run over the tokens of all rows in one packed list, without padding; only attention is
        padded."""
        c, B, T = self.config, len(ids), max(map(len, ids))
        longest = max(s + len(x) for s, x in zip(starts, ids, strict=True))
        table = self._table(tables, longest)
        sources = self._sources(table)
        tokens, who, when, where = sent(_packed(ids, starts), self.device).unbind()
        place = (table[who, where // BLOCK], where % BLOCK)
        fresh = not any(starts)
        mask = None
        if not fresh:  # [B, 1, T, longest]: a token sees all positions up to its own
            own = column(starts, torch.int64, self.device)[:, None] + torch.arange(T, device=self.device)
            seen = torch.arange(longest, device=self.device) <= own[:, :, None]
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)[
                :, None
            ]
        x = self._embedded(tokens, where)
        turns = None if self._turns is None else self._turns[where][:, None]
        for index, layer in enumerate(self._layers):
            q, k, v = self._queries_keys_values(layer, x, turns)
            self._write(index, place, k, v)
            if index == len(self._layers) - 1:
                return  # the last layer's output would only be needed for logits
            padded = q.new_zeros(B, T, c.num_attention_heads, c.head_dim)
            padded[who, when] = q
            keys, values = self._past(index, sources, longest)
            y = self._attended(padded.transpose(1, 2), keys, values, mask)
            x = self._rest(layer, x, y.transpose(1, 2)[who, when].flatten(1))

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What queries [B, H, T, D] read of keys and values [B, KVH, ., D]; without a mask of all up to their own."""
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=self._group > 1
        )


def _packed(ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
    """For each token of all rows, one after the other: [id, row, place in what is read, position], as [4, N] int64."""
    sizes = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    found = np.empty((4, int(sizes.sum())), dtype=np.int64)
    found[0] = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=found.shape[1])
    found[1] = np.repeat(np.arange(len(ids)), sizes)
    found[2] = np.arange(found.shape[1]) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found[3] = found[2] + np.array(starts, dtype=np.int64)[found[1]]
    return torch.from_numpy(found)


def _batches(ids: Sequence[Sequence[int]], starts: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows in batches of similar length and at most about `most` tokens, those that start at 0 apart from those that
    continue."""
    batch: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: (starts[i] > 0, len(ids[i]))):
        widest = len(ids[i]) + 1  # the last token of a row is read with the next step
        if batch and ((starts[i] > 0) != (starts[batch[0]] > 0) or widest * (len(batch) + 1) > most):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
