"""The page's own API: chatting, regenerating, stopping, and what people say about answers.

An answer is written in a thread of its own and streamed as server-sent events; when the reader leaves or presses stop
it ends within a step, and what was written is stored as a partial answer. If the database fails while chatting, the
answer is shown all the same and a note says that it was not stored. Where keys are asked for, a conversation is its
key's alone, and to anybody else it is not there.
"""

from __future__ import annotations

import contextlib
import functools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stateofgpt.assistant.session import Streamed
from stateofgpt.data.feedback import (
    LOCAL,
    MAX_CORRECTION_CHARS,
    MAX_REASON_CHARS,
    FeedbackConflict,
    FeedbackStore,
    StoredMessage,
    UnknownMessage,
)
from stateofgpt.errors import FeedbackError
from stateofgpt.serve import protocol
from stateofgpt.serve.answering import Answer, Assistant, gathered
from stateofgpt.serve.fields import ApiError, flag, identifier, parse_body, text
from stateofgpt.serve.guard import read_body, sentence
from stateofgpt.serve.service import Service, apart, who_asks
from stateofgpt.serve.streams import EventStream, Pieces
from stateofgpt.text.chat import Conversation, Message


def author_of(request: Request) -> str:
    """Who is talking; one person where there are no keys."""
    return who_asks(request).name


class Desk:
    """The routes, over one assistant and one store."""

    def __init__(self, service: Service, store: FeedbackStore) -> None:
        self.service, self.store = service, store
        self.running, self.defaults = service.running, service.defaults
        self.savers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="save")

    @property
    def assistant(self) -> Assistant:
        """The model of the page."""
        found: Assistant = self.service.shelf.peek()
        return found

    # -- the page's API ------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        failed = self.service.shelf.failed
        status = "failed" if failed else "ok"
        known: dict[str, Any] = {"status": status, "model": self.assistant.name, "answers_running": len(self.running)}
        known["devices"] = self.service.shelf.devices
        if hung := self.service.shelf.hung:
            known["reason"] = hung
        return JSONResponse(known, 503 if failed else 200)

    async def model(self, _: Request) -> Response:
        """Who answers here, and what there is to learn from so far."""
        counts = await apart(self.store.counts)
        return JSONResponse(
            {"name": self.assistant.name, "lineage": list(self.assistant.lineage), "feedback": vars(counts)}
        )

    async def conversations(self, request: Request) -> Response:
        rows = await apart(self.store.conversations, author=author_of(request))
        return JSONResponse({"conversations": [{"id": id, "created": at, "title": title} for id, at, title in rows]})

    async def conversation(self, request: Request) -> Response:
        thread = await apart(self.store.thread, request.path_params["id"], author_of(request))
        messages = [protocol.show_message(node, thread.verdicts.get(node.id)) for node in thread.messages]
        return JSONResponse({"id": thread.id, "messages": messages})

    async def chat(self, request: Request) -> Response:
        """A new user message, under `parent` of `conversation` or at the root of a new one; streams the answer."""
        body = parse_body(await read_body(request))
        author = author_of(request)
        content = text(body, "content")
        known = identifier(body, "conversation", optional=True)
        parent = identifier(body, "parent", optional=True)
        if parent is not None and known is None:
            raise ApiError(400, "a parent needs its conversation", param="conversation")
        before: Conversation = ()
        if parent is not None:
            path = await apart(self.store.path, parent, author)
            if path[-1].conversation != known:
                raise UnknownMessage(f"message {parent!r} is not part of conversation {known!r}")
            before = tuple(message for node in path for message in node.messages)
        elif known is not None:
            await apart(self.store.thread, known, author)
        said = (Message("user", content),)
        ids = known or uuid.uuid4().hex, uuid.uuid4().hex
        draft = Draft(*ids, (*before, *said), author, self.defaults.seed + len(before))
        return await self._answered(
            request, draft, functools.partial(self._save_user, draft, parent, said, known is None)
        )

    def _save_user(self, draft: Draft, parent: str | None, said: Conversation, new: bool) -> None:
        if new:
            with contextlib.suppress(FeedbackConflict):  # a second attempt, of which the first half succeeded
                self.store.new_conversation(draft.author, id=draft.conversation)
        self.store.add_message(draft.conversation, parent, said, id=draft.parent)

    async def regenerate(self, request: Request) -> Response:
        """Another answer beside `message`, or the first one to it when it is a user's; the old ones stay."""
        body = parse_body(await read_body(request))
        author = author_of(request)
        path = await apart(self.store.path, identifier(body, "message") or "", author)
        node = path[-1]
        asked = path if node.role == "user" else path[:-1]
        if not asked or asked[-1].role != "user":
            raise ApiError(400, "there is no question before this message to answer again", param="message")
        thread = await apart(self.store.thread, node.conversation, author)
        siblings = sum(other.parent == asked[-1].id for other in thread.messages)
        before = tuple(message for turn in asked for message in turn.messages)
        seed = self.defaults.seed + len(before) - 1 + 1000 * siblings
        return await self._answered(request, Draft(node.conversation, asked[-1].id, before, author, seed), None)

    async def stop(self, request: Request) -> Response:
        body = parse_body(await read_body(request))
        return JSONResponse({"stopped": self.running.stop(identifier(body, "generation") or "")})

    async def feedback(self, request: Request) -> Response:
        """One event; answered when it is on the disk. The same `key` again changes nothing, so a retry is safe."""
        body = parse_body(await read_body(request))
        rating = body.get("rating")
        if rating not in (None, "up", "down"):
            raise ApiError(400, "rating must be up, down or null", param="rating")
        author, message = author_of(request), identifier(body, "message")
        if author != LOCAL:
            await apart(self.store.path, message, author)  # another's answer is not there
        verdict = await apart(
            self.store.rate,
            message,
            identifier(body, "key"),
            rating,
            reason=text(body, "reason", limit=MAX_REASON_CHARS, default=""),
            correction=text(body, "correction", limit=MAX_CORRECTION_CHARS, default=""),
            retracted=flag(body, "retracted"),
            author=author,
        )
        return JSONResponse(vars(verdict))

    async def _answered(self, request: Request, draft: Draft, save_user: Callable[[], None] | None) -> Response:
        """The stream of one answer. What cannot be answered is refused before anything is stored."""
        service, began = self.service, time.perf_counter()
        visit = service.enter(request, {})
        try:
            model: Assistant = visit.model
            fitted, dropped = await apart(model.fit, draft.said, self.defaults.max_tokens)
            visit.grant.take(self.defaults.max_tokens)
            generation, stop = self.running.begin()
        except BaseException:
            visit.end()
            raise
        params = replace(self.defaults, seed=draft.seed)
        drawn = gathered(model.stream(fitted, params, stop, draft.author), stop)
        events = service.metrics.timed(drawn, model.name, began)
        writing = self._write(draft, events, model.name, dropped, save_user, generation)

        def ended() -> None:
            self.running.end(generation)
            visit.end(self.defaults.max_tokens)

        frames = _frames(Pieces([writing], stop, ended))
        return EventStream(frames, stop)

    def _write(
        self,
        draft: Draft,
        events: Iterator[Streamed | Answer],
        model: str,
        dropped: int,
        save_user: Callable[[], None] | None,
        generation: str,
    ) -> Iterator[dict[str, Any]]:
        """Write one answer and store it: the events that the page sees. Runs in a thread of its own."""
        saving = None if save_user is None else self.savers.submit(save_user)  # a locked database holds up no answer
        yield {"type": "start", "generation": generation, "conversation": draft.conversation, "parent": draft.parent}
        if dropped:
            yield {"type": "note", "text": f"The conversation is longer than the model can read: {dropped} of its "
                   "oldest messages were left out."}  # fmt: skip
        result = Answer((), "error")
        for event in events:
            if isinstance(event, Answer):
                result = event
            elif (shown := protocol.show_event(event)) is not None:
                yield shown
        if result.error is not None:
            yield {"type": "error", "message": sentence(result.error)}
        node, problem = self._store_answer(draft, result, model, save_user, saving)
        if problem:
            yield {"type": "note", "text": f"Not stored: {problem}."}
        shown = protocol.show_message(node) if node else protocol.show_answer(result, draft.parent, model)
        yield {"type": "done", "finish": result.finish, "stored": node is not None, "message": shown}

    def _store_answer(
        self,
        draft: Draft,
        result: Answer,
        model: str,
        save_user: Callable[[], None] | None,
        saving: Future[None] | None,
    ) -> tuple[StoredMessage | None, str]:
        """Store what was said and answered; the stored answer, or why there is none."""
        try:
            if saving is not None and saving.exception() is not None and save_user is not None:
                save_user()
            if result.empty:
                return None, ""
            add, where = self.store.add_message, (draft.conversation, draft.parent)
            return add(*where, result.messages, model=model, partial=result.partial), ""
        except FeedbackError as error:
            return None, str(error)


@dataclass(frozen=True)
class Draft:
    """An answer to be written: where it belongs, what was said before it, whose it is, and the seed of its sampling."""

    conversation: str
    parent: str
    said: Conversation
    author: str
    seed: int


async def _frames(pieces: Pieces[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for _, piece in pieces:
        yield protocol.frame(piece)
