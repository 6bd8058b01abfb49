"""A folder that is either whole or not there, and tensors read from files that nobody vouches for.

Owns: publishing a folder (`NAME.incomplete/` -> fsync -> `MANIFEST.json` with every file's sha256 -> rename), checking
one against its manifest, and the safetensors header, which is checked in full before a single tensor is read. Knows
nothing of models: checkpoints (`model/checkpoint.py`) and the state to resume from (`train/state.py`) both stand on it.

Nothing here unpickles. A crafted file is refused from its first kilobytes, so it costs no memory to refuse it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stateofgpt.errors import CheckpointError, RunError
from stateofgpt.run import sha256_file, write_atomic

MANIFEST = "MANIFEST.json"
MAX_JSON_BYTES = 1 << 20  # config, manifest, index, safetensors header: a real one of 600 layers stays below
HEADER_DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def crash_point(point: str, folder: Path) -> None:
    """For tests of durability only: die here, as `kill -9` would, when SOG_CRASH_AT asks for it.

    SOG_CRASH_AT is `POINT` or `POINT@FOLDER`, FOLDER being the end of a path: "save:before_manifest@sft/checkpoint".
    The points of a save, in order: save:begin, save:files, save:before_manifest, save:before_rename,
    save:between_renames (only where an older folder is replaced), save:renamed.
    """
    asked, _, where = os.environ.get("SOG_CRASH_AT", "").partition("@")
    if asked == point and folder.as_posix().endswith(where):
        os._exit(137)


# ---------------------------------------------------------------------------------------------------------- publishing


def publish(path: Path, fill: Callable[[Path], None], about: Callable[[Path], Mapping[str, Any]], needed: int) -> None:
    """Make `path` a folder holding what `fill(folder)` writes and, last, a manifest with `about(folder)` in it.

    Whoever looks sees the old folder or the new one, whole. `needed` is the size in bytes that `fill` will write.
    Raises RunError when the disk is full; the old folder is then still there and nothing of the new one is.
    """
    path = Path(path)
    work = _sibling(path, "incomplete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        shutil.rmtree(work, ignore_errors=True)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, "not enough free space")
        work.mkdir()
        crash_point("save:begin", path)
        fill(work)
        crash_point("save:files", path)
        _write_manifest(path, work, about)
        _swap_in(path, work)
    except (OSError, RunError, SafetensorError) as failure:
        shutil.rmtree(work, ignore_errors=True)
        recover(path)
        _explain(failure, path, needed)


def _write_manifest(path: Path, work: Path, about: Callable[[Path], Mapping[str, Any]]) -> None:
    files = sorted(p for p in work.iterdir() if p.is_file())
    for file in files:
        _fsync(file)
    listing = {f.name: {"sha256": sha256_file(f), "bytes": f.stat().st_size} for f in files}
    crash_point("save:before_manifest", path)
    manifest = {"format": 1, **about(work), "files": listing}
    write_atomic(work / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    _fsync(work)


def _swap_in(path: Path, work: Path) -> None:
    crash_point("save:before_rename", path)
    old = _sibling(path, "previous")
    if path.exists():
        os.rename(path, old)
        crash_point("save:between_renames", path)
    os.rename(work, path)
    _fsync(path.parent)
    crash_point("save:renamed", path)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Put back the older folder when a crash fell between the two renames that replace it, or else drop it."""
    old = _sibling(path, "previous")
    if old.is_dir():
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, path)
            _fsync(path.parent)


def present(path: Path) -> Path:
    """Where the folder is now: `path`, or the older one beside it after a crash that `recover` would mend."""
    old = _sibling(path, "previous")
    return old if old.is_dir() and not path.exists() else path


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(failure: Exception, path: Path, needed: int) -> NoReturn:
    """One sentence for a save that failed; safetensors wraps the OS error in text, hence the look at it."""
    text = str(failure)
    full = isinstance(failure, OSError) and failure.errno in _FULL
    if full or "disk full" in text or any(f"os error {code}" in text for code in _FULL):
        raise RunError(
            f"disk full: saving {path} needs {needed:,} bytes and {_free_bytes(path):,} are free; what was saved "
            "before is untouched, so free some space and give the same command again"
        ) from failure
    if isinstance(failure, RunError):
        raise failure
    raise RunError(f"cannot save {path}: {getattr(failure, 'strerror', None) or text}") from failure


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


# ------------------------------------------------------------------------------------------------------------ checking


def read_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; CheckpointError names the file when it is none."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes, more than the {MAX_JSON_BYTES:,} such a file may have")
        return parse_object(path.read_bytes(), path)
    except OSError as failure:
        raise CheckpointError(f"cannot read {path}: {failure.strerror}") from failure


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """`data` as a JSON object; `path` is where it came from."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as failure:
        raise CheckpointError(f"{path} holds no valid JSON, so the folder is damaged or no checkpoint") from failure
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__} where an object belongs")
    return value


def verify(path: Path) -> dict[str, Any] | None:
    """Compare every file with the manifest and return it, or None for a folder that never had one.

    Raises CheckpointError naming the first file that is missing or differs.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        return None
    manifest = read_json_file(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path / MANIFEST} lists no files, so nothing in the folder can be trusted")
    for name, entry in files.items():
        if not re.fullmatch(r"[\w][\w.\-]*", name) or not isinstance(entry, dict):
            raise CheckpointError(f"{path / MANIFEST} has an entry {name!r} that names no file of its folder")
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; restore it or take another checkpoint")
        if file.stat().st_size != entry.get("bytes") or sha256_file(file) != entry.get("sha256"):
            raise CheckpointError(f"{file} is not the file that was saved (sha256 differs from {MANIFEST}); "
                                  "restore it or take another checkpoint")  # fmt: skip
    return manifest


# ------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; the same tensors always give the same bytes."""
    ready = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    seen: set[int] = set()
    for name, tensor in ready.items():  # the format has no aliases: what shares memory is written twice
        place = tensor.untyped_storage().data_ptr()
        if tensor.numel() and place in seen:
            ready[name] = tensor.clone()
        seen.add(place)
    save_file(ready, path, metadata={"format": "pt"})


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the file that `write_tensors` makes, to within a few kilobytes."""
    return sum(t.numel() * t.element_size() + 200 + len(name) for name, t in tensors.items())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes in a safetensors file, after checking that its bytes are exactly those tensors.

    Source: https://huggingface.co/docs/safetensors, "Format". Tensors must tile the file without gap or overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > min(size - 8, MAX_JSON_BYTES):
                raise CheckpointError(
                    f"{path} is no safetensors file: its header claims {length:,} bytes, the file has {size:,} and "
                    f"{MAX_JSON_BYTES:,} are allowed (a pickled or truncated file looks like this)"
                )
            header = parse_object(file.read(length), path)
    except OSError as failure:
        raise CheckpointError(f"cannot read {path}: {failure.strerror}") from failure
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    infos: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        infos[name], span = _tensor_info(path, name, entry)
        spans.append((*span, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(f"{path} is damaged: tensor {name!r} begins at byte {begin}, expected {at}")
        at = end
    if at != size - 8 - length:
        raise CheckpointError(f"{path} is damaged: its tensors need {at:,} bytes, the file has {size - 8 - length:,}")
    return infos


def _tensor_info(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    bad = CheckpointError(f"{path} is damaged: the header's entry for tensor {name[:80]!r} is malformed")
    if not isinstance(entry, dict):
        raise bad
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _is_ints(shape, 0, 8) or not _is_ints(span, 2, 2):
        raise bad
    if dtype not in HEADER_DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has type {dtype[:20]}, readable are {', '.join(HEADER_DTYPES)}")
    if span[1] - span[0] != math.prod(shape) * HEADER_DTYPES[dtype]:
        raise CheckpointError(
            f"{path} is damaged: tensor {name[:80]!r} of shape {shape} does not fit its {span[1] - span[0]} bytes"
        )
    return TensorInfo(dtype, tuple(shape)), (span[0], span[1])


def _is_ints(value: Any, least: int, most: int) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        return False
    return all(type(v) is int and 0 <= v < 1 << 48 for v in value)


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and content of every tensor of a safetensors file, one at a time, after its header was checked."""
    header = read_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in header:
                yield name, file.get_tensor(name)
    except SafetensorError as failure:
        raise CheckpointError(f"{path} is no readable safetensors file: {failure}") from failure


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None
