"""Rows of tokens in which several texts go on from one beginning, which is computed once.

Owns what a decoder must know to give each text the hidden states that it would have alone: positions, and who sees
whom. Knows nothing of what the texts are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """A token sees those from `firsts` [B, T] int32 on up to itself, and the first `shared` [B, T] int32 of its row;
    what it sees twice is not meant to be: `shared` ends where, or before, `firsts` begins. `positions` [B, T] int64
    count within each text; they are all below `longest`."""

    positions: Tensor
    firsts: Tensor
    shared: Tensor
    longest: int

    @property
    def mask(self) -> Tensor:
        """Who sees whom [B, 1, T, T] (True: may look), for attention that takes a mask."""
        places = torch.arange(self.firsts.shape[1], device=self.firsts.device)
        own = (places >= self.firsts[..., None]) & (places <= places[:, None])
        return (own | (places < self.shared[..., None]))[:, None]

    def blocks(self, size: int) -> list[tuple[int, int, int, int]]:
        """For every `size` queries of the rows, on the CPU: where they begin and end, how many keys at the rows'
        beginnings they see, and how many after these none of them sees."""
        length = self.firsts.shape[1]
        found = []
        for start in range(0, length, size):
            end = min(start + size, length)
            shared, first = int(self.shared[:, start:end].max()), int(self.firsts[:, start:end].min())
            found.append((start, end, shared, max(0, first - shared)))
        return found

    def to(self, device: torch.device) -> Branches:
        """The same on another device."""
        positions, firsts, shared = (
            x.to(device, non_blocking=True) for x in (self.positions, self.firsts, self.shared)
        )
        return Branches(positions, firsts, shared, self.longest)
