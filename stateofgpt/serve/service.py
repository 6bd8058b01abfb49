"""One request for text, from the right to be answered to the end of its last answer.

Owns: the order in which a request takes what it needs (a model, its key's limits, a place among the answers being
written) and that all of it is given back exactly once, however the answers end. Knows nothing of shapes.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from starlette.requests import Request

from stateofgpt.assistant.session import Streamed
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve.access import LOCAL, Access, Grant
from stateofgpt.serve.answering import Answer, Stop, gathered
from stateofgpt.serve.fields import ApiError, parse_body
from stateofgpt.serve.guard import read_body
from stateofgpt.serve.keys import Key
from stateofgpt.serve.metrics import Metrics
from stateofgpt.serve.shelf import Lease, Shelf, UnknownModel
from stateofgpt.serve.streams import Pieces, Running

SCHEMAS = 4  # that are tried at once
FORWARDS = 8  # requests that are scored or embedded at once
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


class Visit:
    """A request that was let in: its model, and its part of its key's limits. Ends once, however often it is told."""

    def __init__(self, lease: Lease, grant: Grant) -> None:
        self._lease, self.grant = lease, grant
        self.model: Any = lease.assistant

    def end(self, used: int = 0) -> None:
        """Give the model back, and the tokens that were not used."""
        self._lease.end()
        self.grant.end(used)


@dataclass(frozen=True)
class Service:
    """What all routes share. `schemas` and `forwards` keep requests that take long apart from those that do not."""

    shelf: Shelf
    running: Running
    metrics: Metrics
    access: Access
    defaults: SamplingParams
    schemas: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SCHEMAS))
    forwards: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FORWARDS))

    async def body(self, request: Request) -> dict[str, Any]:
        """The request's JSON object; its arrival is when time begins to count."""
        body = parse_body(await read_body(request))
        request.state.began = time.perf_counter()
        return body

    def enter(self, request: Request, body: Mapping[str, Any]) -> Visit:
        """Let a request in to the model it names, or to the default one.

        ApiError 429 beyond its key's limits, 404 (as OpenAI answers it) where there is no such model.
        """
        grant = self.access.begin(who_asks(request))
        name = body.get("model")
        try:
            if name is not None and not isinstance(name, str):
                raise ApiError(400, "model must be a string", param="model")
            return Visit(self.shelf.lease(name or None), grant)
        except UnknownModel as error:
            grant.end()
            raise ApiError(404, str(error), param="model", code="model_not_found") from error
        except BaseException:
            grant.end()
            raise

    def begin(self, request: Request, visit: Visit, sources: Sequence[Source], tokens: int) -> Job:
        """Begin an answer from each source; `tokens` is the most they may take. The visit ends with the last one.

        ApiError 429 beyond the key's limits, ServeError where too many are being written.
        """
        visit.grant.take(tokens)
        id, stop = self.running.begin(len(sources))
        stops = [Stop() for _ in sources]
        for one in stops:
            stop.then(one.set)
        name, used = visit.model.name, [0] * len(sources)

        def heard(index: int) -> Iterator[Streamed | Answer]:
            events = gathered(_begun(sources[index], stops[index]), stops[index])
            for event in self.metrics.timed(events, name, request.state.began):
                if isinstance(event, Answer):
                    used[index] = event.prompt_tokens + event.completion_tokens
                yield event

        def ended() -> None:
            self.running.end(id)
            visit.end(sum(used))

        return Job(id, stop, stops, Pieces([heard(index) for index in range(len(sources))], stop, ended))


def _begun(source: Source, stop: Stop) -> Iterator[Streamed]:
    """The source's events; what it raises before the first is raised in the reader's turn, not here."""
    yield from source(stop)
