"""The wire: how answers, errors and streams look, to the page and to everybody.

Owns the frame of a server-sent event, the shape of an error, stop strings, and what the page sees of messages. Pure
functions of data: knows nothing of routes, threads or storage. What requests may hold is `fields`'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stateofgpt.assistant.session import Streamed, TextDelta, ToolCalled, ToolReturned
from stateofgpt.data.feedback import StoredMessage, Verdict
from stateofgpt.serve.answering import Answer, describe, parts
from stateofgpt.serve.markdown import render
from stateofgpt.text.chat import Conversation

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # line ends to some readers of streams


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def frame(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False).translate(_BREAKS)
    return f"data: {text}\n\n".encode("utf-8", "replace")


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
