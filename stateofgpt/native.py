"""C that is compiled on the machine it runs on: once, in seconds, kept in a cache.

Owns: the search for a compiler and for torch's OpenMP threads, the compiler's command, and the cache of what it made.
Knows nothing of what the C computes: who loads a library checks it against torch before using it.

Libraries share torch's own OpenMP threads: two pools on the same cores would wait for each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
COMPILER_TIMEOUT_S = 120


def load(sources: Sequence[Path], flags: Sequence[str]) -> ctypes.CDLL | None:
    """The library made of the first of `sources` (the others are its headers); None where there is no compiler, or
    where what it made does not load."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    threads = openmp()
    if compiler is None or threads is None or sys.byteorder != "little":
        return None
    try:
        built = _built(compiler, sources, flags)
        ctypes.CDLL(str(threads), mode=ctypes.RTLD_GLOBAL)  # torch's threads are what the library finds
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home to keep it in
        return None


def openmp() -> Path | None:
    """The OpenMP library that torch brought along."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    places = (root / "lib", root.parent / "torch.libs")
    found = (path for place in places for name in ("libgomp*", "libomp*", "libiomp5*") for path in place.glob(name))
    return next(found, None)


def _built(compiler: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """The compiled library, from the cache or made now; its name is made of all that it depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILER_TIMEOUT_S, check=True)
    parts = [*(path.read_bytes() for path in sources), repr(tuple(flags)).encode(), version.stdout, _processor()]
    name = f"{sources[0].stem}-{hashlib.sha256(b'/'.join(parts)).hexdigest()[:24]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stateofgpt"
    if (folder / name).is_file():
        return folder / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made, object_file = Path(work) / name, Path(work) / "kernels.o"
        for command in (
            [compiler, *flags, "-c", str(sources[0]), "-o", str(object_file)],
            [compiler, "-shared", str(object_file), "-o", str(made), "-lm"],  # OpenMP stays open, for torch's to fill
        ):
            subprocess.run(command, capture_output=True, timeout=COMPILER_TIMEOUT_S, check=True)
        os.replace(made, folder / name)
    return folder / name


def _processor() -> bytes:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(
            next((line for line in lines if line.startswith(key)), b"") for key in (b"model name", b"flags")
        )
    except OSError:
        return platform.processor().encode()
