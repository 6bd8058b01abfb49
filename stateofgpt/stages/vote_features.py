"""A frozen model's features of every completion of a file of votes, computed in chunks that a kill does not lose.

Owns the chunks in `features/`, what fits the time, and putting them together. What a feature is, is `rl/features.py`'s.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from stateofgpt.data.comparisons import Ranking
from stateofgpt.model.gpt import GPT
from stateofgpt.rl.features import compute, depths_of
from stateofgpt.rl.linear import Floats, Judged, judged
from stateofgpt.rl.packed import PackedRow, pack
from stateofgpt.run import Stage, write_atomic
from stateofgpt.text.chat import ChatFormat
from stateofgpt.train.loss import Dtype, Way

FEATURES = "features"  # the folder of the chunks
CHUNK = 64  # rankings computed and stored together
TIMED = 8  # rankings by which the precision is chosen


@dataclass(frozen=True)
class Material:
    """What is learned from: rankings, their packed rows and pairs, features [completions, depths, C], and, where upper
    blocks are to be trained, hidden states [tokens, C] of each row."""

    rankings: tuple[Ranking, ...]
    rows: tuple[PackedRow, ...]
    pairs: Judged
    depths: tuple[int, ...]
    last: NDArray[np.float32]
    mean: NDArray[np.float32]
    states: tuple[Tensor, ...]
    way: Way
    n_left_out: int

    def scores(self, flat: Floats) -> list[list[float]]:
        """Numbers of completions [completions] as a list for each ranking."""
        numbers = iter(flat.tolist())
        return [[next(numbers) for _ in row.completions] for row in self.rows]


def material(
    model: GPT,
    chat: ChatFormat,
    rankings: Sequence[Ranking],
    stage: Stage,
    *,
    context: int,
    cut: int | None,
    seconds: float | None,
    seed: int,
    tell: Callable[[str], None],
) -> Material:
    """Features of as many rankings as fit `seconds` (all when None), drawn by `seed`; goes on where it was killed."""
    order = list(range(len(rankings)))
    random.Random(f"votes {seed}").shuffle(order)
    rows = [pack(chat, rankings[i], context) for i in order]
    depths = depths_of(model.config.num_hidden_layers)
    dtype = stage.decide("features", lambda: {"dtype": _fastest(model, rows[:TIMED], chat, depths)})["dtype"]
    way = Way(dtype, device=str(model.lm_head.weight.device))
    folder = stage.dir / FEATURES
    folder.mkdir(exist_ok=True)

    def chunk(start: int) -> dict[str, Tensor]:
        path = folder / f"{start:07d}.safetensors"
        if (kept := _kept(path)) is not None:
            return kept
        found = compute(model, rows[start : start + CHUNK], chat.tokenizer.pad, depths, way, cut)
        tensors = {"last": found.last, "mean": found.mean}
        if cut is not None:
            tensors["states"] = torch.cat(found.states)
        write_atomic(path, save_tensors(tensors))
        return tensors

    def timed() -> dict[str, float]:
        (folder / f"{0:07d}.safetensors").unlink(missing_ok=True)  # of an attempt that ended before it was timed
        began = time.monotonic()
        chunk(0)
        return {"per_token": (time.monotonic() - began) / max(1, sum(map(len, rows[:CHUNK])))}

    per_token = stage.decide("speed", timed)["per_token"]

    def fitting() -> dict[str, int]:
        tokens, n = 0.0, 0
        for n, row in enumerate(rows, start=1):
            tokens += len(row)
            if seconds is not None and n >= CHUNK and tokens * per_token > seconds:
                break
        return {"rankings": n}

    n = stage.decide("rankings", fitting)["rankings"]
    total = sum(map(len, rows[:n]))
    tell(f"features of {n:,} of {len(rows):,} rankings, {total:,} tokens, about {total * per_token:.0f} s")
    parts = [chunk(start) for start in range(0, n, CHUNK)]
    return _together([rankings[i] for i in order[:n]], rows[:n], parts, depths, way, len(rows) - n)


def _together(
    rankings: list[Ranking],
    rows: list[PackedRow],
    parts: list[dict[str, Tensor]],
    depths: tuple[int, ...],
    way: Way,
    n_left_out: int,
) -> Material:
    n_completions = sum(len(row.completions) for row in rows)
    last, mean = (
        torch.cat([part[name] for part in parts])[:n_completions].numpy().astype(np.float32)
        for name in ("last", "mean")
    )
    states: tuple[Tensor, ...] = ()
    if "states" in parts[0]:
        sizes = [len(row) for row in rows]
        flat = torch.cat([part["states"] for part in parts])[: sum(sizes)]
        states = tuple(flat.split(sizes))
    return Material(tuple(rankings), tuple(rows), judged(rankings), depths, last, mean, states, way, n_left_out)


def _kept(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_tensors(path.read_bytes())
    except (OSError, SafetensorError):
        return None


def _fastest(model: GPT, rows: Sequence[PackedRow], chat: ChatFormat, depths: Sequence[int]) -> Dtype:
    """The precision in which features are computed faster here, each once warm."""
    took: dict[Dtype, float] = {}
    device = str(model.lm_head.weight.device)
    for dtype in ("float32", "bfloat16"):
        compute(model, rows[:1], chat.tokenizer.pad, depths, Way(dtype, device=device))
        began = time.perf_counter()  # features are on the CPU when they are there
        compute(model, rows, chat.tokenizer.pad, depths, Way(dtype, device=device))
        took[dtype] = time.perf_counter() - began
    return min(took, key=lambda dtype: took[dtype])
