"""`POST /v1/responses`: the stateless core of OpenAI's Responses API, streamed or whole. Stores nothing.

Owns the reading of its items and the order of its typed events. What an answer is drawn from is `chat`'s.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve import fields
from stateofgpt.serve.fields import ApiError, flag, mapping
from stateofgpt.serve.loader import LoadedAssistant
from stateofgpt.serve.openai.chat import BrokenAnswer, chat_sources, deltas, heard_out, ready
from stateofgpt.serve.openai.requests import (
    Asked,
    ChatRequest,
    messages,
    offered,
    response_format,
    sampling,
    without_calls,
)
from stateofgpt.serve.openai.shapes import Choice, Delta
from stateofgpt.serve.protocol import frame
from stateofgpt.serve.service import Job, Service, apart, tenant_of
from stateofgpt.serve.streams import EventStream

MAX_INSTRUCTIONS = 16_000
STATEFUL = ("previous_response_id", "conversation", "background", "prompt")


def parse_response(body: Mapping[str, Any], vocab_size: int, defaults: SamplingParams) -> ChatRequest:
    """Read a `POST /v1/responses` as the chat completion it is. ApiError names the field that cannot be used."""
    for name in STATEFUL:
        if body.get(name):
            raise ApiError(400, f"{name} needs a server that stores answers: send the whole input", param=name)
    said = _items(body.get("input"))
    instructions = fields.text(body, "instructions", limit=MAX_INSTRUCTIONS, default="")
    if instructions:
        said = [{"role": "system", "content": instructions}, *said]
    params = sampling(body, vocab_size, defaults, length="max_output_tokens")
    offer = offered(body.get("tools"), body.get("tool_choice"), flag(body, "parallel_tool_calls", True))
    constraint = response_format(mapping(body, "text").get("format"), "text")
    asked = Asked(
        params=replace(params, constraint=constraint),
        stream=flag(body, "stream"),
        offer=without_calls(offer, "text") if constraint else offer,
    )
    return ChatRequest(messages(said, "input"), asked)


def _items(given: Any) -> list[dict[str, Any]]:
    """The input as chat messages."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given or len(given) > fields.MAX_MESSAGES:
        raise ApiError(400, f"input must be a string or a list of 1 to {fields.MAX_MESSAGES} items", param="input")
    said: list[dict[str, Any]] = []
    for position, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            said.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            call = {"function": {"name": item.get("name"), "arguments": item.get("arguments")}}
            if said and said[-1].get("tool_calls"):
                said[-1]["tool_calls"].append(call)
            else:
                said.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            said.append({"role": "tool", "content": item.get("output")})
        elif kind != "reasoning":
            message = f"input[{position}] must be a message, a function_call or a function_call_output"
            raise ApiError(400, message, param=f"input[{position}]")
    return said


async def responses(service: Service, request: Request) -> Response:
    """The route."""
    body = await service.body(request)
    visit = service.enter(request, body)
    try:
        model: LoadedAssistant = visit.model
        asked = await apart(parse_response, body, model.vocab_size, service.defaults)
        prompt = await ready(service, model, asked.conversation, asked.asked, "input")
        sources = chat_sources(model, asked, tenant_of(request))
        job = service.begin(request, visit, sources, len(prompt) + asked.asked.params.max_tokens)
    except BaseException:
        visit.end()
        raise
    shapes = Shapes(job.id, model.name, body, len(prompt), asked.asked.params)
    choice = Choice(())
    if asked.asked.stream:
        frames = _streamed(job, choice, shapes)
        return EventStream(frames, job.stop)
    failed = await heard_out(job, [choice], request)
    return failed or JSONResponse(shapes.whole(choice))


@dataclass
class Shapes:
    """The JSON of one response, and of the events that lead to it."""

    id: str
    model: str
    body: Mapping[str, Any]
    prompt_tokens: int
    params: SamplingParams
    created: int = field(default_factory=lambda: int(time.time()))
    sent: int = 0

    def event(self, kind: str, **content: Any) -> bytes:
        """One typed event, numbered."""
        data = {"type": kind, "sequence_number": self.sent, **content}
        self.sent += 1
        return f"event: {kind}\n".encode() + frame(data)

    def whole(self, choice: Choice, status: str = "") -> dict[str, Any]:
        cut = choice.finish == "length"
        tokens = {"input_tokens": self.prompt_tokens, "output_tokens": choice.tokens}
        details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        used = {**tokens, **details, "total_tokens": sum(tokens.values())}
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status or ("incomplete" if cut else "completed"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self.body.get("instructions"),
            "max_output_tokens": self.params.max_tokens,
            "metadata": {},
            "model": self.model,
            "output": self.output(choice),
            "parallel_tool_calls": self.body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.params.temperature,
            "text": {"format": mapping(self.body, "text").get("format") or {"type": "text"}},
            "tool_choice": self.body.get("tool_choice") or "auto",
            "tools": self.body.get("tools") or [],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": used if choice.finish else None,
        }

    def output(self, choice: Choice) -> list[dict[str, Any]]:
        """The items of the answer: its message, where it says something, and its calls."""
        found = [self.message(choice.text)] if choice.text or (choice.finish and not choice.calls) else []
        return [*found, *(self.call(number, **call) for number, call in enumerate(choice.calls))]

    def message(self, text: str, status: str = "completed") -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part(text)]
        known = {"id": f"msg_{self.id}", "type": "message", "role": "assistant"}
        return {**known, "status": status, "content": content}

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def call(self, number: int, name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
        known = {"id": f"fc_{self.id}_{number}", "call_id": f"call_{self.id[:16]}_{number}", "type": "function_call"}
        return {**known, "name": name, "arguments": arguments, "status": status}


async def _streamed(job: Job, choice: Choice, shapes: Shapes) -> AsyncIterator[bytes]:
    items = Items(shapes)
    yield shapes.event("response.created", response=shapes.whole(choice, "in_progress"))
    yield shapes.event("response.in_progress", response=shapes.whole(choice, "in_progress"))
    try:
        async for _, delta in deltas(job, [choice]):
            for data in items.more(delta, choice):
                yield data
    except BrokenAnswer as error:
        failed = {**shapes.whole(choice, "failed"), "error": {"code": "server_error", "message": str(error)}}
        yield shapes.event("response.failed", response=failed)
        return
    for data in items.close(choice):
        yield data
    done = shapes.whole(choice)
    yield shapes.event(f"response.{done['status']}", response=done)


class Items:
    """The events of a response's items: which is open, and what it needs to be opened and closed."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._at = -1  # output_index of the last item begun
        self._open: int | None = None  # -1: the message; from 0: a call
        self._text = ""

    def more(self, delta: Delta, choice: Choice) -> list[bytes]:
        event, out = self._shapes.event, list[bytes]()
        if delta.call is not None:
            if delta.call.name is not None:
                out += self.close(choice)
                self._at, self._open = self._at + 1, delta.call.index
                item = self._shapes.call(delta.call.index, delta.call.name, "", "in_progress")
                out.append(event("response.output_item.added", output_index=self._at, item=item))
            if delta.call.arguments:
                where = {"item_id": f"fc_{self._shapes.id}_{delta.call.index}", "output_index": self._at}
                out.append(event("response.function_call_arguments.delta", **where, delta=delta.call.arguments))
        elif delta.text and not choice.calls:  # what is said beside calls is in the whole
            if self._open is None:
                self._at, self._open = self._at + 1, -1
                item = self._shapes.message("", "in_progress")
                out.append(event("response.output_item.added", output_index=self._at, item=item))
                out.append(event("response.content_part.added", **self._where(), part=self._shapes.part("")))
            self._text += delta.text
            out.append(event("response.output_text.delta", **self._where(), delta=delta.text, logprobs=[]))
        return out

    def close(self, choice: Choice) -> list[bytes]:
        """The events that end what is open."""
        event, number, self._open = self._shapes.event, self._open, None
        if number is None:
            return []
        if number < 0:
            item = self._shapes.message(self._text)
            return [
                event("response.output_text.done", **self._where(), text=self._text, logprobs=[]),
                event("response.content_part.done", **self._where(), part=self._shapes.part(self._text)),
                event("response.output_item.done", output_index=self._at, item=item),
            ]
        item = self._shapes.call(number, **choice.calls[number])
        where = {"item_id": item["id"], "output_index": self._at}
        known = {"name": item["name"], "arguments": item["arguments"]}
        return [
            event("response.function_call_arguments.done", **where, **known),
            event("response.output_item.done", output_index=self._at, item=item),
        ]

    def _where(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._shapes.id}", "output_index": self._at, "content_index": 0}
