"""Raw text into documents: reading the user's files, cleaning, splitting, and telling train from validation.

Owns: what a document is (a text of at most a few thousand characters), the rules by which one is dropped, each with a
reason that is counted, and the JSONL in which documents are kept. Knows nothing of weights, tokens or runs.

Nothing is dropped without a count, and memory stays bounded whatever the files hold: lines longer than
`LONGEST_LINE` are skipped without being read whole, files are read in blocks, and reading ends with the asked bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from stateofgpt.errors import DataError
from stateofgpt.run import write_atomic

KINDS = (".txt", ".md", ".py", ".jsonl")
LONGEST_LINE = 64 << 20  # bytes
BLOCK = 1 << 20  # bytes of a text file that are cleaned at once
FEWEST_CHARACTERS = 16
REPAIRABLE_SHARE = 0.01  # of the characters may be broken UTF-8, and are then replaced by U+FFFD
CONTROL_SHARE = 0.05  # of the characters may be control characters or U+FFFD, else it is not text
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
_REMOVED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Account:
    """What became of the texts that were read: drops by reason, and a warning for the first of each fault."""

    dropped: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: str = "", n: int = 1) -> None:
        """Count a drop. With `where`, the first one of its reason becomes a warning that says where it was."""
        if where and reason not in self.dropped:
            self.warnings.append(f"{where}: dropped ({reason}); more like it are counted, not named")
        self.dropped[reason] += n


# ----------------------------------------------------------------------------------------------------- the user's files


def find_files(paths: Sequence[str | Path], account: Account) -> list[Path]:
    """The files of `KINDS` under the paths, sorted and each once; DataError when a path has none. Hidden ones are left
    out; files of other kinds are counted in a warning."""
    found: dict[Path, None] = {}
    others = 0
    for given in paths:
        path = Path(given)
        if not _exists(path):
            raise DataError(f"there is no corpus {path}; give a folder or a file that exists")
        if path.is_dir():
            files = [file for file in _walk(path, account) if file.is_file()]
            usable = [file for file in files if file.suffix.lower() in KINDS]
            others += len(files) - len(usable)
            if not usable:
                raise DataError(f"the corpus folder {path} has no {', '.join(KINDS)} file; put some text into it")
        elif path.suffix.lower() in KINDS and path.is_file():
            usable = [path]
        else:
            raise DataError(f"the corpus {path} is not a {', '.join(KINDS)} file; convert it, or name another")
        found.update(dict.fromkeys(file.resolve() for file in usable))
    if others:
        account.warnings.append(f"{others} corpus files of other kinds than {', '.join(KINDS)} were left alone")
    return list(found)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be searched
        return False


def _walk(folder: Path, account: Account) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        account.drop("unreadable", f"{error.filename} ({error.strerror})")

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def read_files(files: Sequence[Path], rng: random.Random, account: Account) -> Iterator[str]:
    """The raw texts of the files, in a seeded order of files. DataError when a JSONL file has no good row at all."""
    order = list(files)
    rng.shuffle(order)
    for path in order:
        try:
            with open(path, "rb") as file:
                yield from (
                    _rows(file, path, account) if path.suffix.lower() == ".jsonl" else _blocks(file, path, account)
                )
        except OSError as error:
            account.drop("unreadable", f"{path} ({error.strerror})")


def _rows(file: BinaryIO, path: Path, account: Account) -> Iterator[str]:
    """The `text` of each row of a JSONL file."""
    good, first_bad = 0, ""
    for number, line in enumerate(bounded_lines(file, LONGEST_LINE), start=1):
        where = f"{path}:{number}"
        if line is None:
            account.drop("line too long", where)
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        text, fault = _row(line)
        if text is None:
            first_bad = first_bad or f"{where}: {fault}"
            account.drop("malformed row", f"{where}: {fault}")
        else:
            good += 1
            yield text
    if first_bad and not good:
        raise DataError(f'{first_bad}, and no row of the file is good; a row must be like {{"text": "..."}}')


def _row(line: bytes) -> tuple[str | None, str]:
    try:
        row = json.loads(line)
    except RecursionError:
        return None, "nested too deeply"
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except ValueError:
        return None, "not JSON"
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None, "no text field"
    return row["text"], ""


def _blocks(file: BinaryIO, path: Path, account: Account) -> Iterator[str]:
    """A text file in blocks of whole lines, decoded."""
    block: list[bytes] = []
    size = 0
    for number, line in enumerate(bounded_lines(file, LONGEST_LINE), start=1):
        if line is None:
            account.drop("line too long", f"{path}:{number}")
            continue
        block.append(line)
        size += len(line)
        if size >= BLOCK:
            yield from _decoded(b"".join(block), path, account)
            block, size = [], 0
    if block:
        yield from _decoded(b"".join(block), path, account)


def _decoded(data: bytes, path: Path, account: Account) -> Iterator[str]:
    try:
        yield data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", errors="replace")
        if text.count("\ufffd") > REPAIRABLE_SHARE * len(text):
            account.drop("not UTF-8", str(path))
            return
        account.warnings.append(f"{path}: broken UTF-8 was replaced by U+FFFD")
        yield text


def bounded_lines(file: BinaryIO, longest: int) -> Iterator[bytes | None]:
    """The lines of a file, None in place of one longer than `longest` bytes; never holds more than that."""
    while line := file.readline(longest + 1):
        if len(line) <= longest:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            del line  # let go of the old piece before the next is read
            line = file.readline(BLOCK)
        yield None


# ------------------------------------------------------------------------------------------------------------- cleaning


def clean(text: str, account: Account, most_characters: int) -> Iterator[str]:
    """The documents of a raw text: none when it is dropped, several when it is long. Line ends become newlines,
    control characters go, lone surrogates become U+FFFD; all else stays as it is."""
    if _SURROGATE.search(text):
        text = _SURROGATE.sub("\ufffd", text)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    for piece in split_long(text, most_characters):
        reason = _fault(piece)
        if reason:
            account.drop(reason)
        else:
            yield _REMOVED.sub("", piece).strip("\n")


def _fault(text: str) -> str:
    if not text.strip():
        return "empty"
    if len(text) < FEWEST_CHARACTERS:
        return "too short"
    if len(_CONTROL.findall(text)) > CONTROL_SHARE * len(text) or (len(text) >= 256 and len(set(text)) < 8):
        return "mostly no text"
    return ""


def split_long(text: str, most: int) -> Iterator[str]:
    """The text in pieces of at most `most` characters, cut at the last paragraph, line or space that is not in the
    first half; nothing but those separators is lost."""
    start = 0
    while len(text) - start > most:
        for separator in ("\n\n", "\n", " "):
            cut = text.rfind(separator, start + most // 2, start + most)
            if cut >= 0:
                break
        else:
            cut, separator = start + most, ""
        yield text[start:cut]
        start = cut + len(separator)
    yield text[start:]


# ----------------------------------------------------------------------------------------------- identity and the split


def digest(text: str) -> bytes:
    """What makes two documents the same: the sha256 of the text without the white space around it."""
    return hashlib.sha256(text.strip().encode()).digest()


def is_validation(identity: bytes, share: float) -> bool:
    """Whether the document with this digest is held out: the same answer in every run and for every corpus."""
    return int.from_bytes(identity[:8], "big") < share * 2**64


# -------------------------------------------------------------------------------------------------------------- storage


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """One JSON object with `text` a line, atomically."""
    write_atomic(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))


def read_documents(path: Path) -> list[str]:
    """The documents that `write_documents` wrote; DataError when the file is missing or damaged."""
    try:
        return [json.loads(line)["text"] for line in path.read_bytes().split(b"\n") if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the documents {path} cannot be read ({error}); delete its folder and collect again"
        ) from error
