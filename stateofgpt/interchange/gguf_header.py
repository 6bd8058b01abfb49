"""The header of a GGUF file, checked in full before a library reads it.

Owns: the limits on what a header may claim, and the walk along its bytes that proves them. Knows nothing of models.

The `gguf` package makes several objects for every element that a header claims, and does not stop where the file does:
twenty bytes that claim 2^60 elements would fill the memory. After this walk every count is small and inside the file.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "File Structure", versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

from stateofgpt.errors import CheckpointError

MAX_HEADER_BYTES = 64 << 20  # a vocabulary of 256,000 with its merges takes about 10 MiB
MAX_KEYS = 4096
MAX_TENSORS = 16384
MAX_ELEMENTS = 4_000_000  # of all arrays together: tokens, types, scores and merges of the largest known vocabularies
MAX_STRING = 1 << 20
MAX_NAME = 256
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Storage types by number: name, weights in a block, bytes of a block. These are the ones that can be dequantised.
STORAGE: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}  # fmt: skip


@dataclass
class _Walk:
    """A place in the file that never leaves it, nor the largest header."""

    file: BinaryIO
    path: Path
    size: int
    at: int = 0
    elements: int = 0
    keys: set[bytes] = field(default_factory=set)
    alignment: int = 32

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is damaged or no GGUF file for this program: {why}")

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > min(self.size, MAX_HEADER_BYTES):
            where = "the file" if self.at > self.size else f"the {MAX_HEADER_BYTES:,} bytes a header may have"
            self.refuse(f"its header goes on past {where}")
        self.file.seek(self.at)

    def take(self, count: int) -> bytes:
        start = self.at
        self.skip(count)
        self.file.seek(start)
        return self.file.read(count)

    def number(self, form: str) -> int:
        return int(struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0])

    def string(self, most: int, what: str) -> bytes:
        length = self.number("Q")
        if length > most:
            self.refuse(f"{what} claims {length:,} bytes, at most {most:,} are allowed")
        return self.take(length)


def check(path: Path) -> None:
    """Raise CheckpointError, in one sentence, unless the header is sound and every tensor lies inside the file."""
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            _check(_Walk(file, path, size))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error


def _check(walk: _Walk) -> None:
    if walk.size < 24 or walk.take(4) != b"GGUF":
        raise CheckpointError(f"{walk.path} is no GGUF file: it does not begin with GGUF")
    version, tensors, keys = walk.number("I"), walk.number("Q"), walk.number("Q")
    if version not in (2, 3):
        walk.refuse(f"its version is {version:,}, readable are 2 and 3 (little-endian)")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        walk.refuse(
            f"it claims {tensors:,} tensors and {keys:,} keys, at most {MAX_TENSORS:,} and {MAX_KEYS:,} are read"
        )
    for _ in range(keys):
        _pass_key(walk)
    spans: list[tuple[int, int, str]] = []
    names: set[str] = set()
    for _ in range(tensors):
        name, begin, end = _tensor(walk)
        if name in names:
            walk.refuse(f"it has tensor {name} twice")
        names.add(name)
        spans.append((begin, end, name))
    start = -(-walk.at // walk.alignment) * walk.alignment
    past = 0
    for begin, end, name in sorted(spans):
        if begin % walk.alignment or begin < past or start + end > walk.size:
            walk.refuse(f"tensor {name} does not lie in the file, aligned and apart from the others; is it cut short?")
        past = end


def _pass_key(walk: _Walk) -> None:
    key = walk.string(MAX_NAME, "a key")
    if key in walk.keys:
        walk.refuse(f"it has the key {_shown(key)} twice")
    walk.keys.add(key)
    kind = walk.number("I")
    if key == b"general.alignment":
        walk.alignment = walk.number("I") if kind == _UINT32 else 0
        if not 1 <= walk.alignment <= MAX_ALIGNMENT or walk.alignment & (walk.alignment - 1):
            walk.refuse(f"its alignment is no power of two up to {MAX_ALIGNMENT:,}")
    elif kind == _ARRAY:
        _pass_array(walk, _shown(key))
    elif kind == _STRING:
        walk.string(MAX_STRING, _shown(key))
    elif kind in _SCALAR_BYTES:
        walk.skip(_SCALAR_BYTES[kind])
    else:
        walk.refuse(f"the key {_shown(key)} has the unknown type {kind}")


def _pass_array(walk: _Walk, key: str) -> None:
    kind, count = walk.number("I"), walk.number("Q")
    walk.elements += count
    if walk.elements > MAX_ELEMENTS:
        walk.refuse(f"{key} claims {count:,} elements, at most {MAX_ELEMENTS:,} are read in all")
    if kind == _STRING:
        for _ in range(count):
            walk.string(MAX_STRING, key)
    elif kind in _SCALAR_BYTES:
        walk.skip(count * _SCALAR_BYTES[kind])
    else:
        walk.refuse(f"{key} is an array of type {kind}, which is not read")


def _tensor(walk: _Walk) -> tuple[str, int, int]:
    """Name of the next tensor, and where it begins and ends, in bytes after the header."""
    name = _shown(walk.string(MAX_NAME, "a tensor's name"))
    dimensions = walk.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        walk.refuse(f"tensor {name} has {dimensions:,} dimensions, 1 to {MAX_DIMENSIONS} are read")
    shape = [walk.number("Q") for _ in range(dimensions)]
    kind, begin = walk.number("I"), walk.number("Q")
    if kind not in STORAGE:
        known = ", ".join(known for known, _, _ in STORAGE.values())
        walk.refuse(f"tensor {name} is stored as type {kind}, readable are {known}")
    storage, block, block_bytes = STORAGE[kind]
    if min(shape) < 1 or max(shape) >= 1 << 31 or math.prod(shape) >= 1 << 40 or shape[0] % block:
        walk.refuse(f"tensor {name} of shape {shape} cannot be stored as {storage}")
    return name, begin, begin + math.prod(shape) // block * block_bytes


def _shown(name: bytes) -> str:
    """A name from the file as it may stand in a sentence."""
    text = name.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)[:80]
