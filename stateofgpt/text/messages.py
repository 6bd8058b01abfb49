"""What a message is, and how OpenAI's API writes one.

Owns: roles, messages, tool calls, conversations, and their JSON. Knows nothing of tokens, templates, models or tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from stateofgpt.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
INVALID = "invalid"  # the name of a call whose JSON could not be read; arguments {"text": what was written}


@dataclass(frozen=True)
class ToolCall:
    """A tool's name and what it is given."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. Only an assistant's messages have tool calls; they follow its content."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Rendered:
    """A conversation's ids, and 1 where an assistant is to learn the id, 0 elsewhere; both of one length."""

    ids: list[int]
    loss_mask: list[int]


def call_to_text(call: ToolCall) -> str:
    """The JSON that an assistant writes to call a tool; `read_call` reads it."""
    return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)


def read_call(text: str) -> ToolCall:
    """The call in the JSON an assistant wrote; one named `INVALID` with the text, where it is none."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and data.keys() == {"name", "arguments"}:
        name, arguments = data["name"], data["arguments"]
        if isinstance(name, str) and isinstance(arguments, dict):
            return ToolCall(name, arguments)
    return ToolCall(INVALID, {"text": text})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# ----------------------------------------------------------------------------------- messages as OpenAI's API has them


def message_to_json(message: Message) -> dict[str, Any]:
    """The message as OpenAI's chat completions write it: a call's arguments are a string of JSON."""
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        data["tool_calls"] = [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return data


def message_from_json(data: object) -> Message:
    """The message in OpenAI's JSON; a content may be text, null or a list of text parts, and the role `developer` is
    `system`. Raises DataError with what is wrong; the caller knows where."""
    if not isinstance(data, Mapping):
        raise DataError(f"a message must be a JSON object with role and content, not {_short(data)}")
    role = "system" if data.get("role") == "developer" else data.get("role")
    if role not in ROLES:
        raise DataError(f"a message's role is {_short(data.get('role'))}; it must be one of {', '.join(ROLES)}")
    items = data.get("tool_calls") or []
    if items and role != "assistant":
        raise DataError(f"a message of role {role} has tool_calls; only an assistant's may")
    if not isinstance(items, list):
        raise DataError(f"a message's tool_calls is {_short(items)}; it must be a list")
    if not items and "content" not in data:
        raise DataError("a message has no content")
    return Message(cast(Role, role), _content(data.get("content")), tuple(_call_from_json(item) for item in items))


def _content(content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[object] = [None]
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"a message's content is {_short(content)}; it must be text, or a list of text parts")
    return "".join(str(part) for part in parts)


def _call_from_json(item: object) -> ToolCall:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool call is {_short(item)}; it must have a function with name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the arguments of tool call {_short(function['name'])} are not JSON") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of tool call {_short(function['name'])} must be a JSON object")
    return ToolCall(function["name"], dict(arguments))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
