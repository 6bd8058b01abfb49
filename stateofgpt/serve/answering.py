"""One answer of an assistant, from the first token to what is kept of it, whoever is listening.

Owns: what a server or a terminal expects of an assistant, the gathering of streamed events into messages, and how an
answer is stopped. Knows nothing of HTTP and stores nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from stateofgpt.assistant.session import Done, Streamed, TextDelta, ToolCalled, ToolReturned
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.text.chat import Conversation, Message, ToolCall


class Assistant(Protocol):
    """What can be talked to: a loaded model folder, or a script in a test."""

    @property
    def name(self) -> str: ...

    @property
    def lineage(self) -> tuple[str, ...]:
        """The stages it went through, oldest first, its own last."""

    def fit(self, conversation: Conversation, max_tokens: int) -> tuple[Conversation, int]:
        """The conversation without its oldest turns where it is too long, and how many messages were dropped."""

    def stream(
        self, conversation: Conversation, params: SamplingParams, stopped: threading.Event, tenant: str = ""
    ) -> Iterator[Streamed]:
        """Events of one answer. Raises Stopped at the next token once `stopped` is set. What is kept of the prompt
        for later is never used for another `tenant`."""


class Stopped(Exception):
    """Somebody has asked the answer to end; raised by an assistant's stream."""


class Stop(threading.Event):
    """Set when an answer is to end; what was given to `then` is called at once in the thread that sets it."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []

    def then(self, callback: Callable[[], object]) -> None:
        """Call `callback` when this is set, or now if it is."""
        with self._lock:
            if not self.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def set(self) -> None:
        with self._lock:
            super().set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


@dataclass(frozen=True)
class Answer:
    """What was written when the answer ended: `finish` is stop, length, tool_limit, cancelled or error."""

    messages: Conversation
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: Exception | None = None

    @property
    def partial(self) -> bool:
        return self.finish in ("cancelled", "error")

    @property
    def empty(self) -> bool:
        return not any(message.content.strip() or message.tool_calls for message in self.messages)


def answer(
    assistant: Assistant, conversation: Conversation, params: SamplingParams, stopped: threading.Event
) -> Iterator[Streamed | Answer]:
    """The events of one answer, and last of all the Answer. Setting `stopped` ends it at the next token."""
    return gathered(assistant.stream(conversation, params, stopped), stopped)


def gathered(events: Iterator[Streamed], stopped: threading.Event) -> Iterator[Streamed | Answer]:
    """The events of one answer, and last of all the Answer. What the assistant raises is in the Answer, beside what
    was written until then."""
    written = _Transcript()
    result: Answer | None = None
    try:
        for event in events:
            if isinstance(event, Done):
                turn = event.turn
                result = Answer(turn.messages, turn.finish, len(turn.prompt_ids), sum(turn.mask))
                break
            written.add(event)
            yield event
            if stopped.is_set():
                break
    except Stopped:
        pass
    except Exception as error:  # what was written before it is kept; the caller says what happened
        result = Answer(written.messages(), "error", error=error)
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()
    yield result or Answer(written.messages(), "cancelled")


class _Transcript:
    """The messages an unfinished answer consists of, gathered from its events."""

    def __init__(self) -> None:
        self._closed: list[Message] = []
        self._text = ""
        self._calls: list[ToolCall] = []

    def add(self, event: Streamed) -> None:
        if isinstance(event, TextDelta):
            self._text += event.text
        elif isinstance(event, ToolCalled):
            self._calls.append(event.call)
        elif isinstance(event, ToolReturned):
            self._close()
            self._closed.append(Message("tool", event.text))

    def messages(self) -> Conversation:
        self._close()
        return tuple(self._closed)

    def _close(self) -> None:
        if self._text or self._calls:
            self._closed.append(Message("assistant", self._text, tuple(self._calls)))
        self._text, self._calls = "", []


def describe(call: ToolCall) -> str:
    """A tool call in one line, as a person would say it: `4729*386`, or `California, population`."""
    values = [value if isinstance(value, str) else json.dumps(value, default=str) for value in call.arguments.values()]
    return " ".join(", ".join(values).split())


def parts(messages: Conversation) -> list[dict[str, Any]]:
    """A turn as what is shown of it: texts, and tool calls with their results."""
    shown: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "tool":
            if waiting:
                waiting.pop(0)["result"] = message.content
            continue
        if message.content.strip():
            shown.append({"type": "text", "text": message.content.strip()})
        for call in message.tool_calls:
            waiting.append({"type": "tool", "name": call.name, "arguments": describe(call), "result": None})
            shown.append(waiting[-1])
    return shown
