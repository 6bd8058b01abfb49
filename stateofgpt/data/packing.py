"""Packing: conversations of many lengths into rows of one length, with the loss on the assistant's words alone.

Owns how rendered conversations are laid into rows. The rows of a step are a pure function of (seed, step). Knows
nothing of what the conversations say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stateofgpt.text.chat import ChatFormat, Conversation, Rendered

PATIENCE = 12  # conversations that may fail to fit before a step's rows are called full


@dataclass(frozen=True)
class Packed:
    """`ids`, `targets` int64 [rows, context]; `weights` float32, 1 where the target is the assistant's; `firsts` int32,
    the place at which each position's conversation begins; counts."""

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    firsts: np.ndarray
    conversations: int
    truncated: int


class Packer:
    """Fills rows of `context` tokens with conversations drawn one after another.

    `draw(step, i)` is the i-th conversation of a step. Each is laid into the first row with room for it; one longer
    than a row is cut at the row's end and counted. A row's rest is padding, whose targets have weight 0.
    """

    def __init__(
        self, chat: ChatFormat, draw: Callable[[int, int], Conversation], *, rows: int, context: int, pad: int
    ) -> None:
        self.chat, self.draw, self.rows, self.context, self.pad = chat, draw, rows, context, pad

    def step(self, step: int) -> Packed:
        """The rows of one step."""
        room = self.context + 1
        lines: list[list[Rendered]] = [[] for _ in range(self.rows)]
        used = [0] * self.rows
        failures, i, placed, truncated = 0, 0, 0, 0
        while failures < PATIENCE:
            rendered = self.chat.render(self.draw(step, i))
            i += 1
            too_long = len(rendered.ids) > room
            if too_long:
                rendered = Rendered(rendered.ids[:room], rendered.loss_mask[:room])
            row = next((r for r in range(self.rows) if used[r] + len(rendered.ids) <= room), None)
            if row is None:
                failures += 1
                continue
            lines[row].append(rendered)
            used[row] += len(rendered.ids)
            placed += 1
            truncated += too_long
        ids = np.full((self.rows, room), self.pad, dtype=np.int64)
        weights = np.zeros((self.rows, room), dtype=np.float32)
        firsts = np.zeros((self.rows, room), dtype=np.int32)
        for row, parts in enumerate(lines):
            at = 0
            for part in parts:
                ids[row, at : at + len(part.ids)] = part.ids
                weights[row, at : at + len(part.ids)] = part.loss_mask
                firsts[row, at:] = at
                at += len(part.ids)
        firsts = firsts[:, :-1].copy()
        return Packed(ids[:, :-1].copy(), ids[:, 1:].copy(), weights[:, 1:].copy(), firsts, placed, truncated)
