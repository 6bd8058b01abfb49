"""Answers being written in threads of their own, read from the event loop.

Owns the bound on how many there are, stopping one by its id, and the way from a thread to the loop. Knows nothing of
what an answer is.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from stateofgpt.errors import ServeError

T = TypeVar("T")


class Running:
    """The answers being written now; bounded, so that a crowd is told to wait instead of slowing everybody."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def __len__(self) -> int:
        return len(self._stops)

    def begin(self) -> tuple[str, threading.Event]:
        with self._lock:
            if len(self._stops) >= self._limit:
                raise ServeError(f"{self._limit} answers are being written already: try again in a moment")
            id, stop = uuid.uuid4().hex, threading.Event()
            self._stops[id] = stop
            return id, stop

    def end(self, id: str) -> None:
        with self._lock:
            self._stops.pop(id, None)

    def stop(self, id: str) -> bool:
        """Ask one answer to end; False when it has ended already."""
        with self._lock:
            found = self._stops.get(id)
        if found is not None:
            found.set()
        return found is not None

    def stop_all(self) -> None:
        with self._lock:
            for stop in self._stops.values():
                stop.set()


class Pieces(Generic[T]):
    """An iterator run in a thread from now on, whether it is read or not; to be read once, from the event loop.

    `ended` is called in the thread when the iterator is through, however. What it raised is raised to the reader.
    """

    def __init__(self, pieces: Iterator[T], ended: Callable[[], None]) -> None:
        self._pieces, self._ended = pieces, ended
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_Piece[T] | None] = asyncio.Queue()  # bounded by the tokens of one answer
        threading.Thread(target=self._work, daemon=True, name="answer").start()

    async def __aiter__(self) -> AsyncIterator[T]:
        while (piece := await self._queue.get()) is not None:
            if piece.error is not None:
                raise piece.error
            yield piece.value

    def _work(self) -> None:
        try:
            for value in self._pieces:
                self._post(_Piece(value))
        except Exception as error:
            self._post(_Piece(None, error))  # type: ignore[arg-type]
        finally:
            self._ended()
            self._post(None)

    def _post(self, piece: _Piece[T] | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody reads any more, and the work goes on to its end
            return


@dataclass(frozen=True)
class _Piece(Generic[T]):
    value: T
    error: Exception | None = None
