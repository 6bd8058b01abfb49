"""A file of votes: read whatever its form, with what could not be read counted and named.

Owns reading: JSON lines or one JSON list, gzipped or not, within bounds of memory. Knows nothing of what a row means
(`data/votes.py`). One bad row does not cost the others; a caller that wants none asks `strict`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from stateofgpt.data.comparisons import MAX_LINE_BYTES, Ranking, no_object, object_of
from stateofgpt.data.documents import bounded_lines
from stateofgpt.data.preferences import text_key
from stateofgpt.data.votes import Thumb, form_of, pair_up, vote_from_row
from stateofgpt.errors import DataError

MAX_BYTES = 2 << 30  # of text after unpacking
MAX_LIST_BYTES = 128 << 20  # a JSON list is read whole
SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Comparisons:
    """A file's rankings, and what became of its rows. `rankings` with no pair (ties) are among them."""

    path: Path
    form: str  # the form of most rows, or "mixed: ..."
    rankings: tuple[Ranking, ...]
    n_rows: int
    n_faults: int
    faults: tuple[str, ...]  # the first of them, "FILE:LINE: what is wrong"
    n_unpaired: int  # thumbs on prompts whose answers are all liked or all disliked

    @property
    def n_ties(self) -> int:
        return sum(not ranking.pairs() for ranking in self.rankings)

    @property
    def n_pairs(self) -> int:
        return sum(len(ranking.pairs()) for ranking in self.rankings)

    def told(self) -> str:
        """One line about the file."""
        parts = [f"{self.path}: {self.form}, {self.n_rows:,} rows, {self.n_pairs:,} pairs"]
        parts += [f"{self.n_ties:,} ties"] if self.n_ties else []
        parts += [f"{self.n_unpaired:,} thumbs with nothing to compare to"] if self.n_unpaired else []
        parts += [f"{self.n_faults:,} bad rows left out (first: {self.faults[0]})"] if self.n_faults else []
        return ", ".join(parts)

    def strict(self) -> list[Ranking]:
        """The rankings; DataError naming the first bad row when there is one."""
        if self.n_faults:
            more = f" (and {self.n_faults - 1} more bad rows)" if self.n_faults > 1 else ""
            raise DataError(self.faults[0] + more)
        return list(self.rankings)


def read_comparisons(path: Path | str) -> Comparisons:
    """All votes of a file in any of the forms of `data/votes.py`, each row by its own keys.

    DataError when the file cannot be read, is too large, or holds no comparison.
    """
    path = Path(path)
    rankings: list[Ranking] = []
    thumbs: dict[str, list[Thumb]] = {}
    forms: Counter[str] = Counter()
    faults: list[str] = []
    n_faults = n_rows = 0
    for place, row in each_row(path):
        n_rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            vote = vote_from_row(row)
        except DataError as fault:
            n_faults += 1
            if len(faults) < SHOWN_FAULTS:
                faults.append(f"{path}:{place}: {fault}")
            continue
        forms[form_of(row)] += 1
        if isinstance(vote, Thumb):
            thumbs.setdefault(text_key(vote.prompt), []).append(vote)
        else:
            rankings.append(vote)
    paired = [(group, pair_up(group)) for group in thumbs.values()]
    rankings += [ranking for _, ranking in paired if ranking is not None]
    unpaired = sum(len(group) for group, ranking in paired if ranking is None)
    form = next(iter(forms), "") if len(forms) < 2 else "mixed: " + ", ".join(f"{n} {f}" for f, n in forms.items())
    found = Comparisons(path, form, tuple(rankings), n_rows, n_faults, tuple(faults), unpaired)
    if not found.n_pairs:
        why = f"; the first bad row is {faults[0]}" if faults else ""
        why = "; no prompt has both a liked and a disliked answer" if unpaired and not why else why
        raise DataError(f"{path} holds no comparison of two answers{why}")
    return found


def each_row(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row; a DataError in place of one that is no JSON object."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
            whole = _list_in(file, path)
            if whole is not None:
                yield from ((f"[{i}]", row if isinstance(row, dict) else no_object(row)) for i, row in enumerate(whole))
                return
            file.seek(0)
            yield from _lines(file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as failure:
        raise DataError(f"{path} is cut short or damaged: it cannot be unpacked; fetch it again") from failure
    except OSError as failure:
        raise DataError(f"cannot read {path}: {failure.strerror or failure}") from failure


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    total = 0
    for number, line in enumerate(bounded_lines(file, MAX_LINE_BYTES), start=1):
        total += MAX_LINE_BYTES if line is None else len(line)
        if total > MAX_BYTES:
            raise DataError(f"{path} holds more than {MAX_BYTES >> 30} GB; divide it")
        if line is None:
            yield str(number), DataError(f"the line is longer than {MAX_LINE_BYTES >> 20} MB; a row is one comparison")
        elif line.strip():
            try:
                yield str(number), object_of(line)
            except DataError as fault:
                yield str(number), fault


def _list_in(file: BinaryIO, path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON list; None where it is something else."""
    head = file.read(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n")
    file.seek(0)
    if not head.startswith(b"["):
        return None
    data = file.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        raise DataError(
            f"{path} is a JSON list of more than {MAX_LIST_BYTES >> 20} MB; write one JSON object a line instead"
        )
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None  # lines that begin with "[": each is told by its number
    return rows if isinstance(rows, list) else None
