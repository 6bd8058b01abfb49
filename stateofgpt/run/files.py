"""Files that survive a crash: whole or not at all, and JSON lines that heal.

Owns: atomic writing, appending and reading, and how an error of the disk is told. Knows nothing of runs and folders.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stateofgpt.errors import RunError


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new and never a part of either.

    Raises RunError when the disk is full or the place cannot be written; the old file is then untouched.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def write_json(path: Path | str, value: object) -> None:
    """`value` as readable JSON, atomically. Paths become strings, and NaN and infinity become null."""
    write_atomic(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """The JSON value in a file; RunError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason(error)}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise RunError(f"{path} is damaged: it is not JSON ({error})") from error


def sha256_file(path: Path | str) -> str:
    """The sha256 of a file's bytes, in hex."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason(error)}") from error


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """One more JSON line. A last line that a kill cut short is removed first."""
    line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                size = path.read_bytes().rfind(b"\n") + 1
                file.truncate(size)
            if file.write(line) != len(line):  # the disk took a part of it: take that back
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise cannot_write(path, error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; unreadable ones at its very end, which a crash leaves, are left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason(error)}") from error
    records: list[dict[str, Any]] = []
    damaged = 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            damaged = damaged or number
        elif damaged:
            raise RunError(f"{path}:{damaged} is damaged: it is not a JSON object; remove that line to go on")
        else:
            records.append(record)
    return records


def plain(value: object) -> object:
    """`value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is not None and not isinstance(value, (str, int)) and hasattr(value, "item"):
        return plain(value.item())  # a scalar of numpy or torch
    return value


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def cannot_write(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(
            f"disk full: could not write {path} ({reason(error)}); free some space, and the same command continues"
        )
    return RunError(f"cannot write {path}: {reason(error)}")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
