"""Answers being written in threads of their own, read from the event loop.

Owns the bound on how many there are, stopping one by its id, the way from a thread to the loop, and that an answer
waits for its reader and ends when it leaves. Knows nothing of what an answer is.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from stateofgpt.errors import ServeError
from stateofgpt.serve.answering import Stop

T = TypeVar("T")
AHEAD = 64  # pieces of an answer that may wait for a reader who lags behind; then nothing more is drawn for it


class Running:
    """The answers being written now; bounded, so that a crowd is told to wait instead of slowing everybody."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._stops: dict[str, Stop] = {}
        self._weights: dict[str, int] = {}
        self.draining = False  # no answer is begun any more

    def __len__(self) -> int:
        return sum(self._weights.values())

    def begin(self, answers: int = 1) -> tuple[str, Stop]:
        """A place for so many answers to one request; ServeError where there is none."""
        with self._lock:
            if self.draining:
                raise ServeError("the server is stopping: try again in a moment")
            if len(self) + answers > self._limit:
                raise ServeError(f"{self._limit} answers can be written at once: try again in a moment")
            id, stop = uuid.uuid4().hex, Stop()
            self._stops[id], self._weights[id] = stop, answers
            return id, stop

    def end(self, id: str) -> None:
        with self._lock:
            self._stops.pop(id, None)
            self._weights.pop(id, None)

    def stop(self, id: str) -> bool:
        """Ask one answer to end; False when it has ended already."""
        with self._lock:
            found = self._stops.get(id)
        if found is not None:
            found.set()
        return found is not None

    def stop_all(self) -> None:
        with self._lock:
            stops = list(self._stops.values())
        for stop in stops:
            stop.set()


class Pieces(Generic[T]):
    """Iterators run in threads of their own from now on; to be read once, from the event loop, as (which of them,
    piece) in the order of coming. They are run `AHEAD` pieces each ahead of the reader, and then wait for it, until
    `stop` is set.

    `ended` is called once, in a thread, when all are through, however. What one raised is raised to the reader.
    """

    def __init__(self, sources: Sequence[Iterator[T]], stop: Stop, ended: Callable[[], None]) -> None:
        self._ended, self._left = ended, len(sources)
        self._room, self._stop = AHEAD * len(sources), stop
        self._lock = threading.Lock()
        self._read = threading.Condition(self._lock)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_Piece[T] | None] = asyncio.Queue()
        stop.then(self._wake)
        for index, source in enumerate(sources):
            threading.Thread(target=self._work, args=(index, source), daemon=True, name="answer").start()

    async def __aiter__(self) -> AsyncIterator[tuple[int, T]]:
        while (piece := await self._queue.get()) is not None:
            with self._read:
                self._room += 1
                if self._room == 1:
                    self._read.notify()
            if piece.error is not None:
                raise piece.error
            yield piece.index, piece.value

    def _work(self, index: int, source: Iterator[T]) -> None:
        try:
            for value in source:
                self._wait_for_room()
                self._post(_Piece(index, value))
        except Exception as error:
            self._post(_Piece(index, None, error))  # type: ignore[arg-type]
        finally:
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._ended()
                self._post(None)

    def _wait_for_room(self) -> None:
        with self._read:
            while self._room <= 0 and not self._stop.is_set():
                self._read.wait()
            self._room -= 1
            if self._room > 0:
                self._read.notify()  # another source may wait, too

    def _wake(self) -> None:
        with self._read:
            self._read.notify_all()

    def _post(self, piece: _Piece[T] | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody reads any more, and the work goes on to its end
            return


@dataclass(frozen=True)
class _Piece(Generic[T]):
    index: int
    value: T
    error: Exception | None = None


class EventStream(StreamingResponse):
    """Server-sent events. `stop` is set when they have been sent, or cannot be, even if none was asked for."""

    def __init__(self, frames: AsyncIterator[bytes], stop: Stop) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(frames, media_type="text/event-stream", headers=headers)
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stop.set()


async def until_gone(request: Request, stop: Stop) -> None:
    """Set `stop` when the client of a request, whose body has been read, goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stop.set()
