"""How numbers get to the device of a model, and what was drawn back from it.

Owns: copies that nobody waits for on the way there (out of pinned memory, which CUDA reads while the program goes on),
one wait for all that is wanted back, and what is said when a device is full. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stateofgpt.errors import ModelError


def pinned(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers`, which are the CPU's, where `device` copies them from without a wait."""
    return numbers.pin_memory() if device.type == "cuda" else numbers


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers`, which are the CPU's, on `device`; itself on the CPU. Torch keeps the pinned copy until it is read."""
    return numbers if device.type == "cpu" else pinned(numbers, device).to(device, non_blocking=True)


def column(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor on `device`."""
    return sent(torch.tensor(values, dtype=dtype), device)


def fetched(*columns: Tensor) -> list[list[Any]]:
    """The values of some tensors, which are on one device, whole numbers as whole numbers: with one wait for all. A
    double holds every float32 and every id."""
    if columns[0].device.type == "cpu":
        return [each.tolist() for each in columns]
    together = torch.cat([each.double().flatten() for each in columns]).cpu()
    parts = together.split([each.numel() for each in columns])
    return [part.view(each.shape).to(each.dtype).tolist() for part, each in zip(parts, columns, strict=True)]


@contextmanager
def room_on(device: str | torch.device) -> Iterator[None]:
    """ModelError, one sentence, where what is done meanwhile finds no memory on `device`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = str(error).split(". ")[0]
        raise ModelError(
            f"there is not enough memory on {device} for this model and its cache ({told}); free some, take a smaller "
            "model or fewer answers at once, or the CPU"
        ) from error
