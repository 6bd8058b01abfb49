"""Where tensors are computed: the CPU, or an accelerator that torch has.

Owns the choice of a device by its name, its refusal, waiting for it, and the order in which it adds. Knows nothing of
models. A device is told by torch's name for it ("cpu", "cuda", "cuda:1"), which can be written into a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stateofgpt.errors import ConfigError

CPU = "cpu"


def choose_device(asked: str | None = None) -> str:
    """The device that was asked for; without one the first GPU that CUDA has, else the CPU.

    Raises ConfigError for one that this machine (or this build of torch) does not have, or that has no float64, in
    which losses are added up and drawn ids come back. The first of a kind goes by the kind's name alone.
    """
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else CPU
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError(f"there is no device {asked!r}: name cpu, cuda, or one of several as cuda:1") from None
    if device.type == CPU:
        return CPU
    if device.type == "mps":
        raise ConfigError("device 'mps' has no numbers of 64 bits, which are needed here; leave it out, or take cpu")
    try:
        have = torch.get_device_module(device)
        count = have.device_count() if have.is_available() else 0
    except RuntimeError:  # a kind of device that is none to compute on, like "meta"
        count = 0
    if (device.index or 0) >= count:
        found = f"torch finds {count} of its kind" if count else f"torch finds no {device.type} device"
        raise ConfigError(f"device {asked!r} is not on this machine: {found}; leave it out, or take cpu")
    if device.type == "cuda":  # before anything asks cuBLAS for a workspace: see in_order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return str(device) if device.index else device.type


def wait(device: torch.device | str) -> None:
    """Return when `device` has done all that it was asked to do: before a clock is read. The CPU always has."""
    if (kind := torch.device(device).type) != CPU:
        torch.get_device_module(kind).synchronize(device)


@contextmanager
def in_order(device: torch.device | str, wanted: bool = True) -> Iterator[None]:
    """Inside, a GPU adds in one order, so that the same work gives the same bits; the CPU does so anyway.

    Where it matters: the way back through attention, which otherwise adds up as its parts end. RuntimeError of torch's
    for an operation that has no such way. cuBLAS needs its workspace to be of a fixed size for it.
    """
    if torch.device(device).type != "cuda" or not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
