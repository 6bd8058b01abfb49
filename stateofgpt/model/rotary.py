"""Rotary positions: how far each pair of a head's dimensions turns at each place of a text.

Owns the angles, LLaMA 3's way to stretch them over longer texts, and the rotation. Knows nothing of attention or files.

Sources: rotary positions (arXiv 2104.09864); the stretching as transformers computes it for `rope_type` llama3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stateofgpt.errors import ConfigError

OWN_THETA = 10000.0  # of every model raised here; its frequencies keep the rounding with which runs began


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3's stretching, in the field names of Hugging Face configs; the defaults are LLaMA 3.1's.

    A pair that turns fewer than `low_freq_factor` times within the original context turns `factor` times slower, one
    that turns more than `high_freq_factor` times stays as it is, and between the two it goes over smoothly.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ConfigError(f"factor of the rotary scaling is {self.factor}, must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor ({self.low_freq_factor}) must be above 0 and below high_freq_factor "
                f"({self.high_freq_factor})"
            )
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}, must be at least 1"
            )


def rotary_angles(head_dim: int, theta: float, length: int, scaling: RopeScaling | None = None) -> Tensor:
    """Angles [length, head_dim / 2] in radians, float32: pair i at position t has turned by t * frequency_i."""
    half = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if theta == OWN_THETA and scaling is None:
        frequencies = theta**-half
    else:  # the same number but for its last bit, which thousands of positions later is 2e-4 of a log-probability
        frequencies = 1.0 / theta**half
    if scaling is not None:
        frequencies = _stretched(frequencies, scaling)
    return torch.outer(torch.arange(length, dtype=torch.float32), frequencies)


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by position; `x` [B, H, T, D], tables broadcastable to [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
