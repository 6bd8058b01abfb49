"""The server on this machine: one page, its JSON API, and OpenAI's chat completions.

An answer is written in a thread of its own and streamed as server-sent events; when the reader leaves or presses stop
it ends within a step, and what was written is stored as a partial answer. If the database fails while chatting, the
answer is shown all the same and a note says that it was not stored.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stateofgpt.data.feedback import (
    MAX_CORRECTION_CHARS,
    MAX_REASON_CHARS,
    FeedbackConflict,
    FeedbackStore,
    StoredMessage,
    UnknownMessage,
)
from stateofgpt.errors import FeedbackError, ServeError, StateOfGptError
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve import protocol
from stateofgpt.serve.answering import Answer, Assistant, answer
from stateofgpt.serve.completions import openai_routes
from stateofgpt.serve.guard import LOOPBACK, Guard, read_body, refuse, report_bug
from stateofgpt.serve.protocol import ApiError
from stateofgpt.serve.streams import Pieces, Running
from stateofgpt.text.chat import Conversation, Message

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@dataclass(frozen=True)
class Config:
    """How to serve: where, and how answers are sampled unless a request says otherwise."""

    host: str = "127.0.0.1"
    port: int = 8000
    temperature: float = 0.7
    max_tokens: int = 512
    seed: int = 0
    max_answers: int = 32  # written at the same time
    max_connections: int = 512


def serve(model_dir: Path, feedback: Path | str, config: Config | None = None) -> None:
    """Serve a model folder until Ctrl-C. Raises ServeError when the address cannot be used, before loading anything."""
    config = config or Config()
    listener = listen(config.host, config.port)
    with listener, FeedbackStore(feedback, exclusive=True) as store:
        from stateofgpt.serve.loader import load_assistant

        with load_assistant(model_dir, max_batch=config.max_answers) as assistant:
            host = f"[{config.host}]" if ":" in config.host else config.host
            print(f"{assistant.name} answers at http://{host}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
            print(f"feedback is kept in {store.name}", flush=True)
            run_server(create_app(assistant, store, config), listener, config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on loopback, or a ServeError that says why not."""
    if host not in LOOPBACK:
        raise ServeError(
            f"{host!r} is not this machine's loopback address, and the server has no passwords: use 127.0.0.1, and a "
            "tunnel such as `ssh -L` to reach it from elsewhere"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(512)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ServeError(f"cannot listen on {host} port {port} ({reason}): choose another with --port") from error
    return listener


def run_server(app: Starlette, listener: socket.socket, config: Config) -> None:
    """Run `app` on a listening socket until a signal ends it."""
    import uvicorn

    settings = uvicorn.Config(
        app, http="h11", ws="none", log_level="warning", access_log=False, server_header=False,
        limit_concurrency=config.max_connections, timeout_keep_alive=10, timeout_graceful_shutdown=3,
    )  # fmt: skip
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def create_app(assistant: Assistant, store: FeedbackStore, config: Config | None = None) -> Starlette:
    """The application over one assistant and one store."""
    desk = Desk(assistant, store, config or Config())
    routes = [
        *(Route(address, functools.partial(_file, *file)) for address, file in PAGE.items()),
        Route("/api/health", desk.health),
        Route("/api/model", desk.model),
        Route("/api/chat", desk.chat, methods=["POST"]),
        Route("/api/regenerate", desk.regenerate, methods=["POST"]),
        Route("/api/stop", desk.stop, methods=["POST"]),
        Route("/api/feedback", desk.feedback, methods=["POST"]),
        Route("/api/conversations", desk.conversations),
        Route("/api/conversations/{id}", desk.conversation),
        *openai_routes(assistant, desk.running, desk.defaults),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        desk.running.stop_all()

    async def on_error(_: Request, error: Exception) -> Response:
        return refuse(error)

    application = Starlette(
        routes=routes,
        middleware=[Middleware(Guard)],
        exception_handlers={kind: on_error for kind in (ApiError, StateOfGptError, HTTPException)},
        lifespan=lifespan,
    )
    application.router.redirect_slashes = False  # an address is right or it is not
    return application


async def _file(name: str, kind: str, _: Request) -> Response:
    return Response(resources.files("stateofgpt.serve").joinpath("ui", name).read_bytes(), media_type=kind)


async def _apart(work: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Run blocking work in a thread."""
    return await anyio.to_thread.run_sync(functools.partial(work, *args, **named))


class Desk:
    """The routes, over one assistant and one store."""

    def __init__(self, assistant: Assistant, store: FeedbackStore, config: Config) -> None:
        self.assistant, self.store, self.config = assistant, store, config
        self.running = Running(config.max_answers)
        self.savers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="save")
        self.defaults = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed)

    # -- the page's API ------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.assistant.name, "answers_running": len(self.running)})

    async def model(self, _: Request) -> Response:
        """Who answers here, and what there is to learn from so far."""
        counts = await _apart(self.store.counts)
        return JSONResponse(
            {"name": self.assistant.name, "lineage": list(self.assistant.lineage), "feedback": vars(counts)}
        )

    async def conversations(self, _: Request) -> Response:
        rows = await _apart(self.store.conversations)
        return JSONResponse({"conversations": [{"id": id, "created": at, "title": title} for id, at, title in rows]})

    async def conversation(self, request: Request) -> Response:
        thread = await _apart(self.store.thread, request.path_params["id"])
        messages = [protocol.show_message(node, thread.verdicts.get(node.id)) for node in thread.messages]
        return JSONResponse({"id": thread.id, "messages": messages})

    async def chat(self, request: Request) -> Response:
        """A new user message, under `parent` of `conversation` or at the root of a new one; streams the answer."""
        body = protocol.parse_body(await read_body(request))
        content = protocol.text(body, "content")
        known = protocol.identifier(body, "conversation", optional=True)
        parent = protocol.identifier(body, "parent", optional=True)
        if parent is not None and known is None:
            raise ApiError(400, "a parent needs its conversation", param="conversation")
        before: Conversation = ()
        if parent is not None:
            path = await _apart(self.store.path, parent)
            if path[-1].conversation != known:
                raise UnknownMessage(f"message {parent!r} is not part of conversation {known!r}")
            before = tuple(message for node in path for message in node.messages)
        elif known is not None:
            await _apart(self.store.thread, known)
        said = (Message("user", content),)
        draft = Draft(known or uuid.uuid4().hex, uuid.uuid4().hex, (*before, *said), self.config.seed + len(before))
        return await self._answered(draft, functools.partial(self._save_user, draft, parent, said, known is None))

    def _save_user(self, draft: Draft, parent: str | None, said: Conversation, new: bool) -> None:
        if new:
            with contextlib.suppress(FeedbackConflict):  # a second attempt, of which the first half succeeded
                self.store.new_conversation(id=draft.conversation)
        self.store.add_message(draft.conversation, parent, said, id=draft.parent)

    async def regenerate(self, request: Request) -> Response:
        """Another answer beside `message`, or the first one to it when it is a user's; the old ones stay."""
        body = protocol.parse_body(await read_body(request))
        path = await _apart(self.store.path, protocol.identifier(body, "message") or "")
        node = path[-1]
        asked = path if node.role == "user" else path[:-1]
        if not asked or asked[-1].role != "user":
            raise ApiError(400, "there is no question before this message to answer again", param="message")
        thread = await _apart(self.store.thread, node.conversation)
        siblings = sum(other.parent == asked[-1].id for other in thread.messages)
        before = tuple(message for turn in asked for message in turn.messages)
        seed = self.config.seed + len(before) - 1 + 1000 * siblings
        return await self._answered(Draft(node.conversation, asked[-1].id, before, seed), None)

    async def stop(self, request: Request) -> Response:
        body = protocol.parse_body(await read_body(request))
        return JSONResponse({"stopped": self.running.stop(protocol.identifier(body, "generation") or "")})

    async def feedback(self, request: Request) -> Response:
        """One event; answered when it is on the disk. The same `key` again changes nothing, so a retry is safe."""
        body = protocol.parse_body(await read_body(request))
        rating = body.get("rating")
        if rating not in (None, "up", "down"):
            raise ApiError(400, "rating must be up, down or null", param="rating")
        verdict = await _apart(
            self.store.rate,
            protocol.identifier(body, "message"),
            protocol.identifier(body, "key"),
            rating,
            reason=protocol.text(body, "reason", limit=MAX_REASON_CHARS, default=""),
            correction=protocol.text(body, "correction", limit=MAX_CORRECTION_CHARS, default=""),
            retracted=protocol.flag(body, "retracted"),
        )
        return JSONResponse(vars(verdict))

    async def _answered(self, draft: Draft, save_user: Callable[[], None] | None) -> Response:
        """The stream of one answer. What cannot be answered is refused before anything is stored."""
        fitted, dropped = await _apart(self.assistant.fit, draft.said, self.defaults.max_tokens)
        generation, stop = self.running.begin()
        writing = self._write(replace(draft, said=fitted), dropped, save_user, generation, stop)
        pieces = Pieces(writing, functools.partial(self.running.end, generation))
        return StreamingResponse(_frames(pieces, stop), media_type="text/event-stream", headers=STREAM_HEADERS)

    def _write(
        self,
        draft: Draft,
        dropped: int,
        save_user: Callable[[], None] | None,
        generation: str,
        stop: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        """Write one answer and store it: the events that the page sees. Runs in a thread of its own."""
        saving = None if save_user is None else self.savers.submit(save_user)  # a locked database holds up no answer
        yield {"type": "start", "generation": generation, "conversation": draft.conversation, "parent": draft.parent}
        if dropped:
            yield {"type": "note", "text": f"The conversation is longer than the model can read: {dropped} of its "
                   "oldest messages were left out."}  # fmt: skip
        result = Answer((), "error")
        for event in answer(self.assistant, draft.said, replace(self.defaults, seed=draft.seed), stop):
            if isinstance(event, Answer):
                result = event
            elif (shown := protocol.show_event(event)) is not None:
                yield shown
        if result.error is not None:
            known = isinstance(result.error, StateOfGptError)
            yield {"type": "error", "message": str(result.error) if known else report_bug(result.error)}
        node, problem = self._store_answer(draft, result, save_user, saving)
        if problem:
            yield {"type": "note", "text": f"Not stored: {problem}."}
        shown = protocol.show_message(node) if node else protocol.show_answer(result, draft.parent, self.assistant.name)
        yield {"type": "done", "finish": result.finish, "stored": node is not None, "message": shown}

    def _store_answer(
        self, draft: Draft, result: Answer, save_user: Callable[[], None] | None, saving: Future[None] | None
    ) -> tuple[StoredMessage | None, str]:
        """Store what was said and answered; the stored answer, or why there is none."""
        try:
            if saving is not None and saving.exception() is not None and save_user is not None:
                save_user()
            if result.empty:
                return None, ""
            name, partial = self.assistant.name, result.partial
            store = self.store.add_message
            return store(draft.conversation, draft.parent, result.messages, model=name, partial=partial), ""
        except FeedbackError as error:
            return None, str(error)


@dataclass(frozen=True)
class Draft:
    """An answer to be written: where it belongs, what was said before it, and the seed of its sampling."""

    conversation: str
    parent: str
    said: Conversation
    seed: int


async def _frames(pieces: Pieces[dict[str, Any]], stop: threading.Event) -> AsyncIterator[bytes]:
    try:
        async for piece in pieces:
            yield protocol.frame(piece)
    finally:  # the reader has left, or has it all
        stop.set()
