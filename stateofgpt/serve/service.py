"""One request for text, from the right to be answered to the end of its last answer.

Owns: the order in which a request takes what it needs (a model, its key's limits, a place among the answers being
written) and that all of it is given back exactly once, however the answers end. Knows nothing of shapes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from starlette.requests import Request

from stateofgpt.assistant.session import Streamed
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve.access import LOCAL, Access
from stateofgpt.serve.answering import Answer, Stop, gathered
from stateofgpt.serve.fields import ApiError, parse_body
from stateofgpt.serve.guard import read_body
from stateofgpt.serve.keys import Key
from stateofgpt.serve.metrics import Metrics
from stateofgpt.serve.shelf import Lease, Shelf, UnknownModel
from stateofgpt.serve.streams import Pieces, Running

Source = Callable[[Stop], Iterator[Streamed]]


async def apart(work: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Run blocking work in a thread."""
    return await anyio.to_thread.run_sync(functools.partial(work, *args, **named))


def who_asks(request: Request) -> Key:
    """Whose key the request came with."""
    who: Key = request.scope.get("sog.who", LOCAL)
    return who


def tenant_of(request: Request) -> str:
    """Among whose requests a cache may be shared."""
    return who_asks(request).name


@dataclass
class Job:
    """The answers to one request. Setting `stop` ends them all, `stops[i]` one."""

    id: str
    stop: Stop
    stops: list[Stop]
    pieces: Pieces[Streamed | Answer]

    def __aiter__(self) -> AsyncIterator[tuple[int, Streamed | Answer]]:
        return self.pieces.__aiter__()


@dataclass(frozen=True)
class Service:
    """What all routes share."""

    shelf: Shelf
    running: Running
    metrics: Metrics
    access: Access
    defaults: SamplingParams

    async def body(self, request: Request) -> dict[str, Any]:
        """The request's JSON object; its arrival is when time begins to count."""
        body = parse_body(await read_body(request))
        request.state.began = time.perf_counter()
        return body

    def lease(self, body: dict[str, Any]) -> Lease:
        """The model a request names, or the default one; ApiError 404 as OpenAI answers it."""
        name = body.get("model")
        if name is not None and not isinstance(name, str):
            raise ApiError(400, "model must be a string", param="model")
        try:
            return self.shelf.lease(name or None)
        except UnknownModel as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error

    def begin(self, request: Request, lease: Lease, sources: Sequence[Source], tokens: int) -> Job:
        """Begin an answer from each source; `tokens` is the most they may take. The lease ends with the last one.

        ApiError 429 beyond the key's limits, ServeError where too many are being written.
        """
        grant = self.access.begin(who_asks(request), tokens)
        try:
            id, stop = self.running.begin(len(sources))
        except BaseException:
            grant.settle(tokens)
            raise
        stops = [Stop() for _ in sources]
        for one in stops:
            stop.then(one.set)
        name, used = lease.assistant.name, [0] * len(sources)

        def heard(index: int) -> Iterator[Streamed | Answer]:
            events = gathered(_begun(sources[index], stops[index]), stops[index])
            for event in self.metrics.timed(events, name, request.state.began):
                if isinstance(event, Answer):
                    used[index] = event.prompt_tokens + event.completion_tokens
                yield event

        def ended() -> None:
            self.running.end(id)
            lease.end()
            grant.settle(sum(used))

        return Job(id, stop, stops, Pieces([heard(index) for index in range(len(sources))], ended))


def _begun(source: Source, stop: Stop) -> Iterator[Streamed]:
    """The source's events; what it raises before the first is raised in the reader's turn, not here."""
    yield from source(stop)
