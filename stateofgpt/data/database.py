"""How the feedback database is opened, kept durable and kept to one server: knows no table.

SQLite by path: write-ahead log, `synchronous=FULL`, one writer connection for which threads queue, readers that cannot
write, transactions that take the write lock at their start. Any other database by SQLAlchemy URL. Whatever fails
becomes a FeedbackError of one sentence.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from stateofgpt.errors import FeedbackError


class FeedbackRefused(FeedbackError):
    """What was to be stored is not acceptable; the sentence says why."""


class UnknownMessage(FeedbackRefused):
    """There is no such conversation or message."""


class FeedbackConflict(FeedbackRefused):
    """An id or idempotency key came back with something else."""


class Database:
    """Transactions on a path or an SQLAlchemy URL. `exclusive`: refuse to share a file with another server."""

    def __init__(self, url_or_path: str | Path, *, exclusive: bool, busy_timeout_s: float) -> None:
        text = str(url_or_path)
        self._lock: IO[str] | None = None
        if "://" not in text:
            self.name, path = text, Path(text)
        else:
            try:
                url = sa.make_url(text)
                self.name = url.render_as_string(hide_password=True)
                path = Path(url.database or "")
                if url.get_backend_name() != "sqlite":
                    self._writer = self._reader = sa.create_engine(url, pool_pre_ping=True)
                    return
            except (ArgumentError, NoSuchModuleError, ImportError) as error:
                raise FeedbackError(f"the feedback database address cannot be used: {error}") from error
        _make_room(path)
        self._lock = _hold(path) if exclusive else None
        self._writer, self._reader = _open_sqlite(path, busy_timeout_s)

    def close(self) -> None:
        self._reader.dispose()
        self._writer.dispose()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that is on the disk when the block has ended."""
        with self._explained(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the database."""
        with self._explained(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            raise FeedbackConflict(f"{self.name} already holds this entry: send it under a new id") from error
        except (DBAPIError, PoolTimeout, sqlite3.Error) as error:
            raise FeedbackError(_explain(self.name, error)) from error


def _make_room(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FeedbackError(f"cannot make the folder {path.parent} for the feedback: {error.strerror}") from error
    if path.is_dir():
        raise FeedbackError(f"{path} is a folder: name a file for the feedback, such as {path / 'feedback.sqlite'}")


def _open_sqlite(path: Path, busy_timeout_s: float) -> tuple[sa.Engine, sa.Engine]:
    """The engine of the one writer, and the engine of readers."""
    url = sa.URL.create("sqlite", database=str(path))
    options: dict[str, Any] = {
        "connect_args": {"timeout": busy_timeout_s, "check_same_thread": False},
        "poolclass": sa.QueuePool,
    }
    writer = sa.create_engine(url, pool_size=1, max_overflow=0, **options)
    reader = sa.create_engine(url, pool_size=4, max_overflow=60, **options)

    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions begin where we say so
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {pragma}")

    def connect_reader(connection: Any, record: object) -> None:
        connect(connection, record)
        connection.execute("PRAGMA query_only=ON")

    def begin_writing(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def begin_reading(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    sa.event.listen(writer, "connect", connect)
    sa.event.listen(writer, "begin", begin_writing)
    sa.event.listen(reader, "connect", connect_reader)
    sa.event.listen(reader, "begin", begin_reading)
    return writer, reader


def _hold(path: Path) -> IO[str]:
    """Lock `path` for one server; the lock ends with the process, however it ends."""
    try:
        handle = open(path.with_name(path.name + ".lock"), "a", encoding="utf-8")  # noqa: SIM115 held until close()
    except OSError as error:
        raise FeedbackError(f"cannot write beside {path}: {error.strerror}; choose another file") from error
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there the database's own locks still keep writes apart
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        raise FeedbackError(
            f"another server is using {path}: stop it first, or give this one its own file with --feedback"
        ) from error
    return handle


def _explain(name: str, error: Exception) -> str:
    reason = str(error.orig if isinstance(error, DBAPIError) else error).strip()
    text = reason.splitlines()[0] if reason else type(error).__name__
    if "locked" in text or "QueuePool limit" in text:
        return f"{name} is locked by another program, so nothing was stored: try again in a moment"
    if "full" in text:
        return f"the disk is full, so nothing was stored in {name}: free some space and try again"
    if "not a database" in text or "malformed" in text or "no such" in text:
        return f"{name} is damaged or no feedback database ({text}): move it away, or restore a copy"
    if "unable to open" in text or "readonly" in text:
        return f"{name} cannot be opened for writing ({text}): check that the folder exists and is yours"
    return f"{name} could not be used: {text}"
