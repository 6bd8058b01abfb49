"""The lock that keeps two processes out of one run folder.

Owns: who works in a folder, and when a lock is stale. Knows nothing of what is in the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from stateofgpt.errors import RunError
from stateofgpt.run.files import cannot_write


class Lock:
    """One process at a time in a run folder.

    The kernel's record lock says whether the holder lives, is gone with `kill -9`, and is not inherited by children.
    The file's content (pid, host, boot) is for the message, and for file systems whose locks do not reach other
    machines. Within one process the lock does not keep anyone out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise cannot_write(path, error) from error
        me = {"pid": os.getpid(), "host": os.uname().nodename, "boot": _boot_id()}
        try:
            free = self._try_kernel_lock()
            holder = self._holder()
            pid, host, boot = (holder.get(key) for key in ("pid", "host", "boot"))
            here = boot == me["boot"] if boot else host == me["host"]
            if free is False or (free is None and here and pid != me["pid"] and _alive(pid)):
                raise RunError(f"{path.parent} is in use by process {pid} on {host}; wait for it, or stop it first")
            if holder and not here and host != me["host"]:
                raise RunError(f"{path.parent} is in use on {host}; if nothing runs there any more, delete {path}")
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(me).encode(), 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _try_kernel_lock(self) -> bool | None:
        """True: it is ours. False: a live process has it. None: this file system has no locks."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
        return True

    def _holder(self) -> dict[str, Any]:
        """Who wrote the lock. Nothing, or half a line from a process that died writing it, is nobody."""
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _alive(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
