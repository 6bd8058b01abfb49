"""Where tensors are computed: the CPU, or an accelerator that torch has.

Owns the choice of a device by its name, and its refusal. Knows nothing of models. A device is told by torch's name for
it ("cpu", "cuda", "cuda:1"), which can be written into a file.
"""

from __future__ import annotations

import torch

from stateofgpt.errors import ConfigError

CPU = "cpu"


def choose_device(asked: str | None = None) -> str:
    """The device that was asked for; without one the first GPU that CUDA has, else the CPU.

    Raises ConfigError for one that this machine (or this build of torch) does not have.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else CPU
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError(f"there is no device {asked!r}: name cpu, cuda, or one of several as cuda:1") from None
    if device.type == CPU:
        return CPU
    try:
        have = torch.get_device_module(device)
        count = have.device_count() if have.is_available() else 0
    except RuntimeError:  # a kind of device that is none to compute on, like "meta"
        count = 0
    if (device.index or 0) >= count:
        found = f"torch finds {count} of its kind" if count else f"torch finds no {device.type} device"
        raise ConfigError(f"device {asked!r} is not on this machine: {found}; leave it out, or take cpu")
    return str(device)
