"""How to serve: where, for how many, and how long a client is waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stateofgpt.infer.decoders import CachePrecision, Precision


@dataclass(frozen=True)
class Config:
    """The address, how answers are sampled unless a request says otherwise, and limits; times in seconds.

    `names` are further host names the server goes by; "*" any address in digits. `device` is where the engines compute
    (None: a GPU where there is one), `weights` and `cache` are what they keep weights, and keys and values, in (None:
    float32 on the CPU, bfloat16 elsewhere).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    temperature: float = 0.7
    max_tokens: int = 512
    seed: int = 0
    device: str | None = None
    weights: Precision | None = None
    cache: CachePrecision | None = None
    max_answers: int = 64  # being written, or waiting to be
    max_connections: int = 1024
    max_per_address: int = 64  # connections, loopback aside
    header_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 30.0
    keep_alive_s: int = 10
    drain_s: float = 20.0  # for answers to finish after SIGTERM
    step_s: float = 120.0  # a step of an engine that takes longer is given up; more where a model needs more
