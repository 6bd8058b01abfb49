"""OpenAI's chat completions over one assistant, streamed or whole. Stores nothing.

The assistant uses its own tools inside; a client sees the text. An answer whose client has left ends within a step.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import AsyncIterator

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stateofgpt.assistant.session import Streamed, TextDelta
from stateofgpt.errors import StateOfGptError
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve import protocol
from stateofgpt.serve.answering import Answer, Assistant, answer
from stateofgpt.serve.guard import read_body, report_bug
from stateofgpt.serve.protocol import ApiError, CompletionRequest, CompletionShapes, StopStrings
from stateofgpt.serve.streams import Pieces, Running


def openai_routes(assistant: Assistant, running: Running, defaults: SamplingParams) -> list[Route]:
    """`/v1/models` and `/v1/chat/completions`."""
    created = int(time.time())

    async def models(request: Request) -> Response:
        known = protocol.model_list(assistant.name, created)
        asked = request.path_params.get("id")
        if asked not in (None, assistant.name):
            raise ApiError(404, f"there is no model {asked[:80]!r} here", param="model", code="model_not_found")
        return JSONResponse(known if asked is None else known["data"][0])

    async def completions(request: Request) -> Response:
        asked = protocol.parse_completion(protocol.parse_body(await read_body(request)), assistant.name, defaults)
        fit = functools.partial(assistant.fit, asked.conversation, asked.params.max_tokens)
        try:
            _, dropped = await anyio.to_thread.run_sync(fit)
        except StateOfGptError:
            dropped = 1
        if dropped:
            message = "the messages are longer than the model can read: send fewer or shorter ones"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        id, stop = running.begin()
        pieces = Pieces(answer(assistant, asked.conversation, asked.params, stop), functools.partial(running.end, id))
        shapes = CompletionShapes(id, assistant.name, asked.include_usage)
        if asked.stream:
            frames = _streamed(pieces, stop, shapes, asked)
            headers = {"x-accel-buffering": "no"}
            return StreamingResponse(frames, media_type="text/event-stream", headers=headers)
        return await _whole(pieces, stop, shapes, asked, request)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", models),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]


async def _streamed(
    pieces: Pieces[Streamed | Answer], stop: threading.Event, shapes: CompletionShapes, asked: CompletionRequest
) -> AsyncIterator[bytes]:
    until = StopStrings(asked.stop)
    try:
        yield protocol.frame(shapes.chunk({"role": "assistant", "content": ""}))
        async for piece in pieces:
            if isinstance(piece, TextDelta):
                if text := until.feed(piece.text):
                    yield protocol.frame(shapes.chunk({"content": text}))
                if until.hit:
                    stop.set()
            elif isinstance(piece, Answer):
                if piece.error is not None:
                    yield protocol.frame(protocol.error_body(_sentence(piece.error), 500))
                    return
                if rest := until.rest():
                    yield protocol.frame(shapes.chunk({"content": rest}))
                yield protocol.frame(shapes.chunk({}, "stop" if until.hit else protocol.finish_reason(piece)))
                if asked.include_usage:
                    yield protocol.frame(shapes.usage_chunk(piece))
        yield protocol.frame("[DONE]")
    finally:
        stop.set()


async def _whole(
    pieces: Pieces[Streamed | Answer],
    stop: threading.Event,
    shapes: CompletionShapes,
    asked: CompletionRequest,
    request: Request,
) -> Response:
    until, content, result = StopStrings(asked.stop), "", Answer((), "cancelled")
    try:
        async for piece in pieces:
            if isinstance(piece, TextDelta):
                content += until.feed(piece.text)
                if until.hit or await request.is_disconnected():
                    stop.set()
            elif isinstance(piece, Answer):
                result = piece
    finally:
        stop.set()
    if result.error is not None:
        headers = {"x-should-retry": "false"}
        return JSONResponse(protocol.error_body(_sentence(result.error), 500), 500, headers)
    finish = "stop" if until.hit else protocol.finish_reason(result)
    return JSONResponse(shapes.whole((content + until.rest()).strip(), result, finish))


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, StateOfGptError) else report_bug(error)
