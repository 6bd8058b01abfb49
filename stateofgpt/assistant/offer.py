"""Tools that somebody else runs: how they are offered to the model, and an answer that may call them.

Owns: what the model is told of the tools, and the phases of such an answer. It speaks freely until it opens a call;
from there a constraint lets it write nothing but JSON that fits one of the tools, so that a call can always be parsed;
then it speaks again. A call that must be made begins the answer. Knows nothing of HTTP, nor of what the tools do.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stateofgpt.assistant.session import CallDelta, Done, Streamed, TextDelta, TokenSource, Turn
from stateofgpt.infer.engine import Event
from stateofgpt.infer.guide import Constraint
from stateofgpt.infer.sampling import SamplingParams, derive_seed
from stateofgpt.text.chat import ChatFormat, Conversation, Message
from stateofgpt.text.messages import INVALID, ToolCall, read_call
from stateofgpt.text.specials import TOOL_CLOSE, TOOL_OPEN

MAX_CALLS = 8  # of one answer
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref"}
_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"\s*:\s*(?=\S)', re.DOTALL)


@dataclass(frozen=True)
class Tool:
    """A function that the client has: `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """The client's tools, and whether one must be called. `parallel`: several calls in one answer are welcome."""

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    parallel: bool = True

    @property
    def open(self) -> bool:
        """Whether there is anything to call."""
        return bool(self.tools) and self.choice != "none"

    def schema(self) -> dict[str, Any]:
        """The JSON schema of one call."""
        calls = [_call_schema(tool, number) for number, tool in enumerate(self.tools)]
        defs = {name: schema for _, found in calls for name, schema in found.items()}
        one = [call for call, _ in calls]
        return {**(one[0] if len(one) == 1 else {"anyOf": one}), **({"$defs": defs} if defs else {})}

    def constraint(self) -> Constraint:
        """What the text of a call is held to."""
        return Constraint("json_schema", json.dumps(self.schema(), ensure_ascii=False))


def told(conversation: Conversation, offer: Offer) -> Conversation:
    """The conversation, with the tools described in its first system message."""
    if not offer.open:
        return conversation
    lines = [
        json.dumps(
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters}, ensure_ascii=False
        )
        for tool in offer.tools
    ]
    example = '{"name": ..., "arguments": {...}}'
    text = "\n".join(["Functions you can call, one JSON object a line:", *lines])
    text += f"\nTo call one, write {TOOL_OPEN}{example}{TOOL_CLOSE} and wait for its result."
    if conversation and conversation[0].role == "system":
        first = replace(conversation[0], content=f"{conversation[0].content}\n\n{text}")
        return (first, *conversation[1:])
    return (Message("system", text), *conversation)


def _call_schema(tool: Tool, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One tool's call, and the definitions it refers to, under names of their own. Parameters that do not say whether
    there may be others have no others: a small model would make some up."""
    parameters = dict(tool.parameters) or {"type": "object"}
    if "properties" in parameters and not parameters.keys() & _OPEN:
        parameters["additionalProperties"] = False
    found: dict[str, Any] = {}
    for group in ("$defs", "definitions"):
        inner = parameters.pop(group, None)
        found |= inner if isinstance(inner, dict) else {}
    moved = {f"{number}.{name}": _pointing(schema, number) for name, schema in found.items()}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": _pointing(parameters, number)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }, moved


def _pointing(schema: Any, number: int) -> Any:
    """`schema` with its references to its own definitions led to where those are now."""
    if isinstance(schema, dict):
        return {
            key: re.sub(r"^#/(\$defs|definitions)/", f"#/$defs/{number}.", value)
            if key == "$ref" and isinstance(value, str)
            else _pointing(value, number)
            for key, value in schema.items()
        }
    return [_pointing(one, number) for one in schema] if isinstance(schema, list) else schema


@dataclass
class _Written:
    """What there is of an answer, over all its phases."""

    prompt: list[int]
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    drawn: int = 0
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"

    def turn(self) -> Turn:
        message = Message("assistant", self.text, tuple(self.calls))
        return Turn((message,), self.prompt, self.ids, [1] * self.drawn, [0.0] * self.drawn, self.finish)


class Caller:
    """Answers with a client's tools. `constrained`: whether the engine can be held to a schema."""

    def __init__(self, engine: TokenSource, chat: ChatFormat, *, constrained: bool) -> None:
        self.engine, self.chat, self.constrained = engine, chat, constrained
        self._tokenizer = chat.tokenizer

    def stream(self, conversation: Conversation, params: SamplingParams, offer: Offer) -> Iterator[Streamed]:
        """The answer piece by piece; its calls as CallDelta, and in the turn at the end.

        Where the engine cannot be constrained, `choice` must not be "required", and a call that is no JSON is text.
        """
        prompt = self.chat.render(told(conversation, offer), add_generation_prompt=True).ids
        written = _Written(prompt, params.max_tokens)
        params = replace(params, stop_ids=tuple(dict.fromkeys((*params.stop_ids, *self.chat.stops))))
        asked = replace(params, constraint=offer.constraint()) if self.constrained else params
        must = offer.choice == "required"
        if must:
            written.ids += self._opening()
        for phase in range(2 * MAX_CALLS):
            seed = params.seed if phase == 0 else derive_seed(params.seed, phase)
            left = params.max_tokens - written.drawn
            if left < 1 or len(prompt) + len(written.ids) >= self.engine.max_context - 1:
                written.finish = "length"
                break
            if must:
                yield from self._call(written, replace(asked, seed=seed, max_tokens=left))
                if written.finish == "length" or not offer.parallel or offer.choice == "required":
                    break
                written.ids += self._closing()
                must = False
            else:
                must = yield from self._speak(written, replace(params, seed=seed, max_tokens=left))
                if not must:
                    break
        yield Done(written.turn())

    def _speak(self, written: _Written, params: SamplingParams) -> Generator[Streamed, None, bool]:
        """Free speech. Returns whether it has opened a call."""
        request = self.engine.add([*written.prompt, *written.ids], params)
        speech = self.chat.speech()
        waiting: list[Event] = []
        said: list[int] = []
        written.finish = "length"
        try:
            for event in self.engine.events([request]):
                said.append(event.token)
                written.drawn += 1
                text = speech.hear(event.token)
                if not speech.calling and event.token not in self.chat.stops:
                    waiting.append(event)
                if event.finish:
                    text += speech.end()
                    written.finish = event.finish
                if text:
                    written.text += text
                    yield TextDelta(text, tuple(waiting))
                    waiting = []
                if speech.calling and self.constrained:
                    written.ids += self._up_to_mark(said)
                    return True
        finally:
            self.engine.cancel(request)
        written.ids += said
        if not self.constrained:
            yield from self._read_calls(written, said)
        return False

    def _call(self, written: _Written, params: SamplingParams) -> Iterator[Streamed]:
        """One call under constraint, its arguments passed on as they come."""
        request = self.engine.add([*written.prompt, *written.ids], params)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        index, raw, sent = len(written.calls), "", 0
        begun: re.Match[str] | None = None
        written.finish = "length"
        try:
            for event in self.engine.events([request]):
                written.drawn += 1
                if event.finish:
                    written.finish = event.finish
                if event.token not in self.chat.stops:
                    written.ids.append(event.token)
                    raw += decoder.decode(self._tokenizer.decode_bytes([event.token], inner=True))
                if begun is None and (begun := _CALL.match(raw)):
                    sent = begun.end()
                    yield CallDelta(index, json.loads(f'"{begun[1]}"'), "")
                ready = _arguments_end(raw, closed=event.finish == "stop")
                if begun and ready > sent:
                    yield CallDelta(index, None, raw[sent:ready])
                    sent = ready
        finally:
            self.engine.cancel(request)
        if written.finish == "stop":
            written.calls.append(read_call(raw))

    def _read_calls(self, written: _Written, said: Sequence[int]) -> Iterator[Streamed]:
        """The calls of unconstrained speech, as far as they can be read; the others are text."""
        for call in self.chat.parse(said).tool_calls[:MAX_CALLS]:
            if call.name == INVALID:
                written.text += str(call.arguments["text"])
                yield TextDelta(str(call.arguments["text"]))
                continue
            arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
            yield CallDelta(len(written.calls), call.name, arguments)
            written.calls.append(call)

    def _opening(self) -> list[int]:
        mark = self._tokenizer.tool_open
        return [mark] if mark is not None else self._tokenizer.encode_after(TOOL_OPEN, special=True)

    def _closing(self) -> list[int]:
        mark = self._tokenizer.tool_close
        return [mark] if mark is not None else self._tokenizer.encode_after(TOOL_CLOSE, special=False)

    def _up_to_mark(self, said: list[int]) -> list[int]:
        """What was said, without what the token that completed the mark may hold beyond it."""
        if self._tokenizer.tool_open is not None:
            return said
        text = self._tokenizer.decode(said, inner=True)
        before, mark, after = text.rpartition(TOOL_OPEN)
        return said if not after.strip() else self._tokenizer.encode_after(before + mark, special=True)


def _arguments_end(raw: str, *, closed: bool) -> int:
    """How much of a call's text belongs to its arguments for certain: the brace that closes the call does not."""
    inside = raw.rstrip()
    if inside.endswith("}"):
        return len(inside[:-1].rstrip()) if closed else len(inside) - 1
    return len(inside)
