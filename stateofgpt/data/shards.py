"""Shards: each source's documents as token ids in one flat file, memory-mapped.

Owns: the files of a tokenized corpus, their writing, and the checks that find a damaged one. Knows nothing of text (it
is given ids) and nothing of the order in which a model reads them. A folder of shards:

    index.json                what there is: counts, sizes and sha256 of every file, and the special ids in them
    NAME.train.bin            the ids of all documents, uint16 (uint32 past 65,536), `eot` before each
    NAME.train.offsets.bin    where each document starts, and where the last one ends, int64
    NAME.train.json           the same facts as in the index, written when that part was complete
    token_bytes.bin           how many bytes of text each id stands for, int64 (0 for special tokens)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stateofgpt.config import from_dict
from stateofgpt.errors import DataError, StateOfGptError
from stateofgpt.run import read_json, sha256_file, write_atomic, write_json

VERSION = 1
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
Ids = NDArray[Any]  # uint16 or uint32


@dataclass(frozen=True)
class Part:
    """The facts of one source's split."""

    file: str
    offsets_file: str
    dtype: str
    documents: int
    tokens: int
    bytes: int
    sha256: str
    offsets_sha256: str


@dataclass(frozen=True)
class Marks:
    """What of the ids is not text: `eot` before every document, `pad` behind the last one of a row, and how many bytes
    of a document's first token the tokenizer has put there (`dummy_space`, 0 or 1). The defaults are ours."""

    eot: int = 0
    pad: int = 3
    dummy_space: int = 0


OWN_MARKS = Marks()


def write_part(
    folder: Path,
    name: str,
    split: Split,
    documents: Iterable[Sequence[int]],
    token_bytes: Ids,
    marks: Marks = OWN_MARKS,
) -> Part:
    """Write the ids of a split's documents; the receipt NAME.SPLIT.json comes last, so it vouches for the others."""
    dtype = np.dtype("<u2" if len(token_bytes) <= 1 << 16 else "<u4")
    arrays = [np.asarray(document, dtype=dtype) for document in documents]
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    offsets = np.zeros(len(arrays) + 1, "<i8")
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    file, offsets_file = folder / f"{name}.{split}.bin", folder / f"{name}.{split}.offsets.bin"
    write_atomic(file, tokens.tobytes())
    write_atomic(offsets_file, offsets.tobytes())
    part = Part(
        file=file.name,
        offsets_file=offsets_file.name,
        dtype=dtype.str,
        documents=len(arrays),
        tokens=len(tokens),
        bytes=int(token_bytes[tokens].sum()) - marks.dummy_space * sum(len(array) > 1 for array in arrays),
        sha256=sha256_file(file),
        offsets_sha256=sha256_file(offsets_file),
    )
    write_json(folder / f"{name}.{split}.json", asdict(part))
    return part


def read_part(folder: Path, name: str, split: Split) -> Part | None:
    """The part a killed process had finished, or None when it has to be made (again)."""
    path = folder / f"{name}.{split}.json"
    if not path.exists():
        return None
    try:
        part = from_dict(Part, read_json(path))
        _open_part(folder, part)
    except StateOfGptError:
        return None
    return part


def write_index(
    folder: Path,
    parts: Mapping[str, Mapping[Split, Part]],
    tokenizer_sha256: str,
    token_bytes: Sequence[int],
    marks: Marks = OWN_MARKS,
) -> None:
    """Declare the shards complete."""
    write_atomic(folder / "token_bytes.bin", np.asarray(token_bytes, "<i8").tobytes())
    sources = {name: {split: asdict(part) for split, part in splits.items()} for name, splits in parts.items()}
    write_json(
        folder / "index.json",
        {
            "version": VERSION,
            "tokenizer_sha256": tokenizer_sha256,
            "token_bytes_sha256": sha256_file(folder / "token_bytes.bin"),
            "vocab_size": len(token_bytes),
            "marks": asdict(marks),
            "sources": sources,
        },
    )


class Shards:
    """The tokenized corpus of a run, for reading. Made by `Shards.open`."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder = folder
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.marks = from_dict(Marks, index.get("marks", {}))  # folders without them hold our tokens
        self._token_bytes_sha256: str = index["token_bytes_sha256"]
        self._parts: dict[tuple[str, str], Part] = {
            (name, split): from_dict(Part, part)
            for name, splits in index["sources"].items()
            for split, part in splits.items()
        }
        self._arrays = {key: _open_part(folder, part) for key, part in self._parts.items()}
        self.token_bytes = _map(folder / "token_bytes.bin", "<i8", index["vocab_size"])  # bytes of text per id

    @classmethod
    def open(cls, folder: Path | str) -> Shards:
        """Map the shards of a folder. DataError, naming the file, when one is missing, cut short or does not fit the
        index; `verify` finds what sizes cannot show."""
        folder = Path(folder)
        path = folder / "index.json"
        if not path.is_file():
            raise DataError(f"{folder} holds no shards (there is no index.json in it); run `sog tokenize` first")
        try:
            index = read_json(path)
            if index["version"] != VERSION:
                raise DataError(f"{path} is of version {index['version']}, not {VERSION}; tokenize again")
            return cls(folder, index)
        except DataError:
            raise
        except (StateOfGptError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); delete the tokenize stage and run it again") from error

    @property
    def sources(self) -> list[str]:
        """The names of the sources, in the order of the mixture."""
        return list(dict.fromkeys(name for name, _ in self._parts))

    def tokens(self, source: str, split: Split = "train") -> Ids:
        """All ids of a split, memory-mapped."""
        return self._of(source, split)[0]

    def offsets(self, source: str, split: Split = "train") -> NDArray[np.int64]:
        """Where each document starts in `tokens`, and where the last one ends."""
        return self._of(source, split)[1]

    def lengths(self, source: str, split: Split = "train") -> NDArray[np.int64]:
        """The number of ids in each document, its `eot` included."""
        return np.diff(self.offsets(source, split))

    def documents(self, source: str, split: Split = "train") -> int:
        """How many documents a split has."""
        return self._part(source, split).documents

    def bytes(self, source: str, split: Split = "train") -> int:
        """How many bytes of text a split stands for."""
        return self._part(source, split).bytes

    def verify(self) -> None:
        """Read every file and compare its sha256 with the index. DataError names the first that differs."""
        expected = {"token_bytes.bin": self._token_bytes_sha256}
        for part in self._parts.values():
            expected |= {part.file: part.sha256, part.offsets_file: part.offsets_sha256}
        for name, sha256 in expected.items():
            if sha256_file(self.folder / name) != sha256:
                raise DataError(_damaged(self.folder / name, "its content is not what was written"))

    def _part(self, source: str, split: str) -> Part:
        if (source, split) not in self._parts:
            raise DataError(f'the shards have no {split} part of "{source}"; they have {", ".join(self.sources)}')
        return self._parts[source, split]

    def _of(self, source: str, split: str) -> tuple[Ids, NDArray[np.int64]]:
        self._part(source, split)
        return self._arrays[source, split]


def _open_part(folder: Path, part: Part) -> tuple[Ids, NDArray[np.int64]]:
    if part.dtype not in ("<u2", "<u4") or "/" in part.file + part.offsets_file:
        raise DataError(_damaged(folder / "index.json", f"it describes {part.file} in a way this program never writes"))
    tokens = _map(folder / part.file, part.dtype, part.tokens)
    offsets = _map(folder / part.offsets_file, "<i8", part.documents + 1)
    if offsets[0] != 0 or offsets[-1] != part.tokens or bool((np.diff(offsets) <= 0).any()):
        raise DataError(_damaged(folder / part.offsets_file, "its offsets do not fit the tokens"))
    return tokens, offsets


def _map(path: Path, dtype: str, n: int) -> NDArray[Any]:
    try:
        found, needed = path.stat().st_size, n * np.dtype(dtype).itemsize
    except OSError as error:
        raise DataError(_damaged(path, "it is missing")) from error
    if found != needed:
        raise DataError(_damaged(path, f"it has {found} bytes and must have {needed}"))
    if n == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", shape=(n,))


def _damaged(path: Path, why: str) -> str:
    return f"the shard {path} is damaged: {why}; delete the folder {path.parent} and run the same command again"
