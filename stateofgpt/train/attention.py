"""Attention of the fused pass by torch's products, for rows that branch too.

Owns: which queries attend together to which keys, and the products around `kernels`' softmax. Knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stateofgpt.train.kernels import Kernels

BLOCK = 128  # queries that attend together: what lies past them is never computed


@dataclass(frozen=True)
class Queries:
    """Queries start..end that attend together, to the keys before `end` but for `gap` of them from `before` on."""

    start: int
    end: int
    before: int = 0
    gap: int = 0

    @property
    def parts(self) -> tuple[tuple[slice, slice], ...]:
        """Which columns of their scores are which keys."""
        if not self.gap:
            return ((slice(0, self.end), slice(0, self.end)),)
        own = slice(self.before, self.end - self.gap), slice(self.before + self.gap, self.end)
        return ((slice(0, self.before), slice(0, self.before)), own)

    def of(self, x: Tensor) -> Tensor:
        """Those of keys or values [N, T, D] that are attended to."""
        seen = [x[:, keys] for _, keys in self.parts]
        return seen[0] if len(seen) == 1 else torch.cat(seen, 1)


class Attended(Protocol):
    """What attention is told."""

    @property
    def kernels(self) -> Kernels: ...
    @property
    def sizes(self) -> tuple[int, int, int, int, int]: ...
    @property
    def blocks(self) -> tuple[Queries, ...]: ...
    @property
    def firsts(self) -> Tensor | None: ...
    @property
    def shared(self) -> Tensor | None: ...


def attend(q: Tensor, key: Tensor, v: Tensor, spec: Attended) -> tuple[Tensor, list[Tensor]]:
    """Causal attention: y [B T, H D], and the probabilities of each block of queries."""
    B, T, H, K, D = spec.sizes
    out, probs = q.new_empty(B, T, H, D), []
    keys, values = _per_query_head(key, H // K), _per_query_head(v, H // K)
    queries = q.view(B * H, T, D)
    for block in spec.blocks:
        own = slice(block.start, block.end)
        scores = torch.bmm(queries[:, own], block.of(keys).mT)
        spec.kernels.softmax_(scores, spec.firsts, block.start, H, D**-0.5, spec.shared, block.gap)
        probs.append(scores)
        out[:, own] = torch.bmm(scores, block.of(values)).view(B, H, -1, D).transpose(1, 2)
    return out.view(B * T, H * D), probs


def attend_backward(
    dy: Tensor, q: Tensor, key: Tensor, v: Tensor, probs: list[Tensor], spec: Attended
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B, H, T, D], keys and values [B, K, T, D]."""
    B, T, H, K, D = spec.sizes
    dy = dy.view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
    keys, values = _per_query_head(key, H // K), _per_query_head(v, H // K)
    queries = q.view(B * H, T, D)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(queries), torch.zeros_like(queries)
    for p, block in zip(probs, spec.blocks, strict=True):
        own = slice(block.start, block.end)
        ds = torch.bmm(dy[:, own], block.of(values).mT)
        for columns, seen in block.parts:
            dv[:, seen].baddbmm_(p[:, :, columns].mT, dy[:, own])
        spec.kernels.softmax_backward_(p, ds, block.start - block.gap, D**-0.5)
        dq[:, own] = torch.bmm(ds, block.of(keys))
        for columns, seen in block.parts:
            dk[:, seen].baddbmm_(ds[:, :, columns].mT, queries[:, own])
    grouped = (B, K, H // K, T, D)
    if H != K:
        dk, dv = dk.view(grouped).sum(2), dv.view(grouped).sum(2)
    return dq.view(B, H, T, D), dk.view(B, K, T, D), dv.view(B, K, T, D)


def _per_query_head(x: Tensor, group: int) -> Tensor:
    """Keys or values [B, K, T, D] as [B H, T, D], repeated for the query heads that share them."""
    B, K, T, D = x.shape
    return x[:, :, None].expand(B, K, group, T, D).reshape(B * K * group, T, D)
