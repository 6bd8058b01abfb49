"""Accelerators a plan can be priced on.

Owns: a small table of their data sheets' peak bfloat16 rates (dense, no sparsity), memory, and a round price per hour
that is no more than a place to start from. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

from stateofgpt.config import suggestion
from stateofgpt.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """`peak` in bfloat16 FLOP/s without sparsity, `memory` in bytes, `price` in dollars an hour for one of them."""

    name: str
    peak: float
    memory: float
    price: float


GPUS = (  # peaks: the vendors' data sheets, halved where only the rate with sparsity is given
    Gpu("A100", 312e12, 80e9, 1.5),
    Gpu("H100", 989e12, 80e9, 2.5),
    Gpu("H200", 989e12, 141e9, 3.0),
    Gpu("B200", 2250e12, 180e9, 5.0),
    Gpu("MI300X", 1307e12, 192e9, 2.5),
    Gpu("L40S", 362e12, 48e9, 1.0),
    Gpu("L4", 121e12, 24e9, 0.7),
    Gpu("RTX4090", 165e12, 24e9, 0.4),
)
UTILISATION = 0.4  # of the peak; LLaMA's published hours are 0.44 to 0.51 by 6 N D


def gpu(name: str) -> Gpu:
    """The GPU with that name, whatever its case and dashes; ConfigError names the others."""
    plain = name.upper().replace("-", "").replace(" ", "").replace("_", "")
    known = {g.name.upper(): g for g in GPUS}
    if plain in known:
        return known[plain]
    raise ConfigError(
        f'--gpu: there is no "{name}" in the table{suggestion(plain, known) or "; there are " + ", ".join(known)}'
    )
