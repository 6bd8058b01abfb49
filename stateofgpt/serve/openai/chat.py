"""`POST /v1/chat/completions`: several answers to one conversation, streamed or whole. Stores nothing.

Without `tools` the assistant uses its own inside, and a client sees the text. With them a call is the client's to
make. An answer whose client has left ends within a step.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stateofgpt.errors import ConfigError, ModelError
from stateofgpt.infer.guide import Constraint
from stateofgpt.infer.loop import EngineDied
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve import protocol
from stateofgpt.serve.answering import Answer
from stateofgpt.serve.fields import ApiError
from stateofgpt.serve.guard import sentence
from stateofgpt.serve.loader import ContextTooLong, LoadedAssistant
from stateofgpt.serve.openai.requests import Asked, ChatRequest, parse_chat
from stateofgpt.serve.openai.shapes import ChatShapes, Choice, Delta, usage
from stateofgpt.serve.service import Job, Service, Source, apart, tenant_of
from stateofgpt.serve.streams import EventStream, until_gone
from stateofgpt.text.chat import Conversation

STOPPING = "the server is stopping, and the answer was not finished"


async def chat(service: Service, request: Request) -> Response:
    """The route."""
    body = await service.body(request)
    visit = service.enter(request, body)
    try:
        model: LoadedAssistant = visit.model
        asked = await apart(parse_chat, body, model.vocab_size, service.defaults)
        prompt = await ready(service, model, asked.conversation, asked.asked, "messages")
        sources = chat_sources(model, asked, tenant_of(request))
        most = len(prompt) + asked.asked.n * asked.asked.params.max_tokens
        job = service.begin(request, visit, sources, most)
    except BaseException:
        visit.end()
        raise
    shapes = ChatShapes(
        job.id, model.name, model.id, model.tokenizer, asked.asked.logprobs, asked.asked.include_usage
    )  # fmt: skip
    choices = [Choice(asked.asked.stop) for _ in sources]
    if asked.asked.stream:
        frames = _streamed(job, choices, shapes, len(prompt))
        return EventStream(frames, job.stop)
    failed = await heard_out(job, choices, request)
    return failed or JSONResponse(shapes.whole(choices, usage(len(prompt), choices)))


async def ready(
    service: Service, model: LoadedAssistant, conversation: Conversation, asked: Asked, param: str
) -> list[int]:
    """The prompt's ids, once everything the answer needs is known to be there; ApiError where it is not."""
    offer, constraint = asked.offer, asked.params.constraint
    try:
        ids: list[int] = await apart(model.prompt, conversation, offer)
    except ContextTooLong as error:
        raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error
    calls = offer is not None and offer.open and (model.constrained or offer.choice == "required")
    if constraint is None and not calls:
        return ids
    async with service.schemas:
        if constraint is not None:
            await apart(compiled, model, lambda: constraint, "response_format")
        if offer is not None and calls:
            await apart(compiled, model, offer.constraint, "tools")
    return ids


def compiled(model: LoadedAssistant, constraint: Callable[[], Constraint], param: str) -> None:
    """ApiError where the engine cannot be held to it."""
    try:
        model.compile(constraint())
    except (ConfigError, ModelError) as error:
        raise ApiError(400, f"{param} cannot be kept: {error}", param=param) from error


def chat_sources(model: LoadedAssistant, asked: ChatRequest, tenant: str) -> list[Source]:
    """One source for each answer."""

    def source(params: SamplingParams) -> Source:
        offer = asked.asked.offer
        if offer is None:
            return lambda stop: model.stream(asked.conversation, params, stop, tenant)
        return lambda stop: model.offered(asked.conversation, params, offer, stop, tenant)

    return [source(params) for params in asked.asked.choices()]


async def deltas(job: Job, choices: list[Choice]) -> AsyncIterator[tuple[int, Delta]]:
    """What is new, by answer; ends with BrokenAnswer where one could not be finished."""
    async for index, piece in job:
        for delta in choices[index].hear(piece):
            yield index, delta
        if choices[index].over:
            job.stops[index].set()
        if isinstance(piece, Answer):
            if piece.error is not None:
                raise BrokenAnswer(sentence(piece.error), 503 if isinstance(piece.error, EngineDied) else 500)
            if choices[index].finish is None:
                raise BrokenAnswer(STOPPING, 503)


class BrokenAnswer(Exception):
    """An answer ended before it was complete; the sentence may be shown. The status is 503 where it may be asked for
    again."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


async def heard_out(job: Job, choices: list[Choice], request: Request) -> Response | None:
    """Listen until all answers are complete; a response where one failed. A client that leaves ends them."""
    watching = asyncio.create_task(until_gone(request, job.stop))
    try:
        async for _ in deltas(job, choices):
            pass
    except BrokenAnswer as error:
        headers = {"retry-after": "2"} if error.status == 503 else {"x-should-retry": "false"}
        return JSONResponse(protocol.error_body(str(error), error.status), error.status, headers)
    finally:
        job.stop.set()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    return None


async def _streamed(job: Job, choices: list[Choice], shapes: ChatShapes, prompt_tokens: int) -> AsyncIterator[bytes]:
    for index in range(len(choices)):
        yield protocol.frame(shapes.first(index))
    try:
        async for index, delta in deltas(job, choices):
            yield protocol.frame(shapes.more(index, delta))
    except BrokenAnswer as error:
        yield protocol.frame(protocol.error_body(str(error), 500))
        return
    if shapes.include_usage:
        yield protocol.frame(shapes.usage_chunk(usage(prompt_tokens, choices)))
    yield protocol.frame("[DONE]")
