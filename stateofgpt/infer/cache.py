"""The memory of what requests have read: how much there is of it, and where it comes from.

Owns: the size of a block (16 positions of all layers), the choice of how many there are, and zeroed memory that the
machine only gives when it is written to. What is in a block is the decoder's, whose it is `infer.blocks`'.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stateofgpt.errors import ConfigError, ModelError

BLOCK = 16  # positions: the unit in which memory is given out and shared
SHARE = 4  # by default the cache takes up to a quarter of the memory that is free
GPU_SHARE = 2  # of a GPU, which has less else to do, up to half


def zeroed(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on CPUs pages that exist from their first use on. Unwritten places must be no garbage: a masked NaN would
    still spread."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(*shape, dtype=dtype, device=device)
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(*shape)
    except (OSError, ValueError, OverflowError) as error:
        raise ModelError(
            f"there is no memory for a cache of {size:,} bytes ({error}); make cache_bytes less"
        ) from error


def blocks_of(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK)


def how_many(cache_bytes: int | None, block_bytes: int, max_batch: int, max_context: int, device: torch.device) -> int:
    """The number of blocks: as many as `cache_bytes` hold, or by default all that could be of use and a quarter of the
    free memory (of a GPU's half) has room for. Never more than twice what full rows need (the second half keeps
    prefixes), never less than one full row: ConfigError where `cache_bytes` is."""
    row = blocks_of(max_context)
    useful = 2 * row * max_batch
    if cache_bytes is None:
        return min(
            useful, max(row, free_memory(device) // (GPU_SHARE if device.type == "cuda" else SHARE) // block_bytes)
        )
    if cache_bytes < row * block_bytes:
        raise ConfigError(
            f"cache_bytes is {cache_bytes:,}, and one text of {max_context} tokens needs {row * block_bytes:,}; give "
            "more, or a smaller max_context"
        )
    return min(useful, cache_bytes // block_bytes)


def free_memory(device: torch.device) -> int:
    """Bytes that a program could still take on this machine, or on this GPU, as far as it says so."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(1024 * int(line.split()[1]), _limit())
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 4 << 30


def _limit() -> int:
    """What the control group of a container leaves."""
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return max(0, int(most) - int(used)) if most != "max" else 1 << 62
    except (OSError, ValueError):
        return 1 << 62
