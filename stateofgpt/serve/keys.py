"""API keys: a file of hashes, and what each key may do.

Owns the file's format, how a key is made and how one is recognised. A key is 256 random bits, so its plain SHA-256
says nothing about it; the key itself is shown once and stored nowhere. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stateofgpt.config import suggestion
from stateofgpt.errors import ServeError
from stateofgpt.run import write_atomic

PREFIX = "sog-"
RESERVED = ("local", "anybody")  # who comes without a key
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent")


@dataclass(frozen=True)
class Key:
    """Who holds a key, and how much of the server is theirs; a limit of 0 is none. An admin may also reload models
    and read metrics."""

    name: str
    sha256: str = ""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent: int = 0
    admin: bool = False
    created: int = 0


def new_key(path: Path, key: Key) -> str:
    """Add a key to the file, which is made where there is none; returns the secret, which is stored nowhere."""
    if not _NAME.fullmatch(key.name):
        raise ServeError(f"a key's name is 1 to 64 letters, digits, _, -, . and @, not {key.name!r}")
    if key.name in RESERVED:
        raise ServeError(f"{key.name!r} is what the server calls others: choose another name")
    known = read_keys(path) if path.exists() else {}
    if key.name in known:
        raise ServeError(f"{path} has a key named {key.name} already: remove it first, or choose another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    made = replace(key, sha256=_digest(secret), created=int(time.time()))
    _write(path, {**known, key.name: made})
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file; a server that uses it refuses the key from its next request on."""
    known = read_keys(path)
    if name not in known:
        raise ServeError(f"{path} has no key named {name!r}{suggestion(name, known)}")
    _write(path, {other: key for other, key in known.items() if other != name})


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file by name; ServeError, one sentence, where it cannot be read."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ServeError(f"cannot read the keys in {path}: {str(error.strerror).lower()}") from error
    except (ValueError, RecursionError) as error:
        raise ServeError(f"{path} holds no keys: it is not JSON") from error
    rows = data.get("keys") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise ServeError(f'{path} holds no keys: it is no object with a list named "keys"')
    found = [_read(row, f"{path}, key {number}") for number, row in enumerate(rows, 1)]
    return {key.name: key for key in found}


def _read(row: Any, where: str) -> Key:
    if not isinstance(row, dict) or not row.keys() <= Key.__dataclass_fields__.keys():
        raise ServeError(f"{where}: a key has {', '.join(Key.__dataclass_fields__)}, and nothing else")
    if not isinstance(row.get("name"), str) or not re.fullmatch("[0-9a-f]{64}", str(row.get("sha256"))):
        raise ServeError(f"{where}: a key needs a name and the sha256 of its secret")
    for name in _LIMITS:
        value = row.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ServeError(f"{where}: {name} must be a whole number from 0 (no limit)")
    if not isinstance(row.get("admin", False), bool):
        raise ServeError(f"{where}: admin must be true or false")
    return Key(**row)


def _write(path: Path, keys: Mapping[str, Key]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys.values()]}, indent=2) + "\n"
    write_atomic(path, text)
    path.chmod(0o600)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


class KeyRing:
    """The keys of a running server; the file is read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._keys = read_keys(path)

    def find(self, secret: str) -> Key | None:
        """Whose key this is. Takes as long for a wrong one as for any: hashes are compared, and all of them."""
        digest, found = _digest(secret), None
        for key in self._current().values():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _current(self) -> Mapping[str, Key]:
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                self._keys = read_keys(self._path)  # a file that went bad shuts everybody out
                self._seen = stamp
            return self._keys

    def _stamp(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0)
        return (found.st_mtime_ns, found.st_ino)
