"""The wire: what requests may hold, and how answers, errors and streams look, OpenAI's shapes among them.

Owns every limit on input and every JSON shape. Pure functions of data: knows nothing of routes, threads or storage.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stateofgpt.assistant.session import Streamed, TextDelta, ToolCalled, ToolReturned
from stateofgpt.data.feedback import StoredMessage, Verdict
from stateofgpt.errors import StateOfGptError
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve.answering import Answer, describe, parts
from stateofgpt.serve.markdown import render
from stateofgpt.text.chat import Conversation, message_from_json

MAX_BODY_BYTES = 1_000_000
MAX_MESSAGE_CHARS = 16_000
MAX_MESSAGES = 1_000
MAX_TOKENS = 4_096
MAX_STOPS = 4


class ApiError(Exception):
    """A request that cannot be answered: HTTP status, and one sentence for whoever sent it."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def frame(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode("utf-8", "replace")


# -- what requests may hold ------------------------------------------------------------------------------------------


def parse_body(raw: bytes) -> dict[str, Any]:
    """A JSON object; ApiError 400 for anything else."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON: send a UTF-8 JSON object") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(name)


def text(body: Mapping[str, Any], name: str, *, limit: int = MAX_MESSAGE_CHARS, default: str | None = None) -> str:
    """A string field of at most `limit` characters; without `default` it must be there and not blank."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ApiError(400, f"{name} must be a string", param=name)
    if default is None and not value.strip():
        raise ApiError(400, f"{name} is empty: write something", param=name)
    if len(value) > limit:
        raise ApiError(413, f"{name} has {len(value)} characters: {limit} is the limit, so shorten it", param=name)
    return value.encode("utf-8", "replace").decode("utf-8").replace("\x00", "")


def identifier(body: Mapping[str, Any], name: str, *, optional: bool = False) -> str | None:
    """The id of something stored."""
    value = body.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= 80 or not value.isprintable():
        raise ApiError(400, f"{name} must be an id of 1 to 80 characters", param=name)
    return value


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return value


def number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}", param=name)
    if not math.isfinite(value):
        raise ApiError(400, f"{name} must be finite", param=name)
    return value


def integer(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a whole number from {low} to {high}", param=name)
    return value


@dataclass(frozen=True)
class CompletionRequest:
    """A chat completion as OpenAI's clients ask for it."""

    conversation: Conversation
    params: SamplingParams
    stream: bool
    include_usage: bool
    stop: tuple[str, ...] = ()


def parse_completion(body: Mapping[str, Any], model: str, defaults: SamplingParams) -> CompletionRequest:
    """Read a `POST /v1/chat/completions`; unknown fields are ignored, as OpenAI does, unsupported ones refused."""
    if body.get("model") not in (None, model):
        message = f"there is no model {str(body['model'])[:80]!r} here, only {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if integer(body, "n", 1, 1, 1_000_000) != 1:
        raise ApiError(400, "n must be 1: this server writes one answer per request", param="n")
    for name in ("tools", "functions", "logprobs", "top_logprobs", "logit_bias"):
        if body.get(name):
            raise ApiError(400, f"{name} is not supported by this server: leave it out", param=name)
    kind = body.get("response_format") or {"type": "text"}
    if not isinstance(kind, dict) or kind.get("type") != "text":
        raise ApiError(400, "response_format must be of type text on this server", param="response_format")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    params = SamplingParams(
        max_tokens=integer(body, limit, defaults.max_tokens, 1, MAX_TOKENS),
        temperature=number(body, "temperature", defaults.temperature, 0.0, 2.0),
        top_k=integer(body, "top_k", defaults.top_k, 0, 1_000_000),
        top_p=number(body, "top_p", defaults.top_p, 1e-6, 1.0),
        min_p=number(body, "min_p", defaults.min_p, 0.0, 1.0),
        seed=integer(body, "seed", defaults.seed, -(2**63), 2**63 - 1) & (2**63 - 1),
    )
    return CompletionRequest(
        _messages(body), params, flag(body, "stream"), flag(options, "include_usage"), _stops(body.get("stop"))
    )


def _messages(body: Mapping[str, Any]) -> Conversation:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    if len(given) > MAX_MESSAGES:
        raise ApiError(413, f"messages has {len(given)} entries: {MAX_MESSAGES} is the limit", param="messages")
    conversation = []
    for position, given_message in enumerate(given):
        where = f"messages[{position}]"
        try:
            message = message_from_json(given_message)
        except StateOfGptError as error:
            raise ApiError(400, f"{where} cannot be used: {error}", param=where) from error
        conversation.append(replace(message, content=text({where: message.content}, where, default="")))
    if conversation[-1].role not in ("user", "tool"):
        raise ApiError(400, "the last message must be the user's or a tool's", param="messages")
    return tuple(conversation)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    usable = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not usable or not all(isinstance(stop, str) and 0 < len(stop) <= 200 for stop in stops):
        raise ApiError(400, f"stop must be a string or a list of at most {MAX_STOPS} strings", param="stop")
    return tuple(stops)


class StopStrings:
    """Passes text on until one of the strings comes, holding back what may be the beginning of one.

    >>> stop = StopStrings(("END",)); stop.feed("abE"), stop.feed("xEN"), stop.feed("D more"), stop.hit
    ('ab', 'Ex', '', True)
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""
        self.hit = False

    def feed(self, piece: str) -> str:
        if self.hit:
            return ""
        self._held += piece
        found = [at for at in (self._held.find(s) for s in self._strings) if at >= 0]
        if found:
            self.hit = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((n for s in self._strings for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        out, self._held = self._held, ""
        return "" if self.hit else out


# -- how answers look ------------------------------------------------------------------------------------------------


def show_event(event: Streamed) -> dict[str, Any] | None:
    """An event of the page's stream; None for what is not shown."""
    if isinstance(event, TextDelta):
        return {"type": "delta", "text": event.text}
    if isinstance(event, ToolCalled):
        return {"type": "tool_call", "name": event.call.name, "arguments": describe(event.call)}
    if isinstance(event, ToolReturned):
        return {"type": "tool_result", "result": event.text}
    return None


def show_message(node: StoredMessage, verdict: Verdict | None = None) -> dict[str, Any]:
    """A stored turn as the page shows it; the HTML is safe."""
    return {
        "id": node.id,
        "parent": node.parent,
        "role": node.role,
        "model": node.model,
        "partial": node.partial,
        "parts": show_parts(node.messages, html=node.role == "assistant"),
        "text": node.text,
        "rating": verdict.rating if verdict else None,
        "reason": verdict.reason if verdict else "",
        "correction": verdict.correction if verdict else "",
    }


def show_answer(answer: Answer, parent: str, model: str) -> dict[str, Any]:
    """An answer that could not be stored, or is empty, in the same shape; it has no id, so nobody can rate it."""
    node = StoredMessage(0, "", "", parent, "assistant", answer.messages, model, answer.partial, 0.0)
    return {**show_message(node), "id": None}


def show_parts(messages: Conversation, *, html: bool) -> list[dict[str, Any]]:
    shown = parts(messages)
    if html:
        for part in shown:
            if part["type"] == "text":
                part["html"] = render(part["text"])
    return shown


class CompletionShapes:
    """The JSON of one OpenAI completion, streamed or whole."""

    def __init__(self, id: str, model: str, include_usage: bool) -> None:
        self._head = {"id": f"chatcmpl-{id}", "created": int(time.time()), "model": model}
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}

    def chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **self._usage}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}

    def whole(self, content: str, answer: Answer, finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def finish_reason(answer: Answer) -> str:
    """OpenAI's word for why an answer ended."""
    return "length" if answer.finish in ("length", "tool_limit") else "stop"


def model_list(name: str, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "stateofgpt"}]}
