"""Conversations as tokens, and back: the only owner of the chat template.

Owns: what a message is, the order of special tokens around it, which tokens an assistant is taught (the loss mask), the
same template in Jinja for `transformers`, and the reading of a sampled turn. Knows nothing of models, tools or data
files. One conversation as text, special tokens shown by name:

    <|endoftext|><|im_start|>user
    What is 4729 + 386?<|im_end|>
    <|im_start|>assistant
    <tool_call>{"name": "calculator", "arguments": {"expression": "4729 + 386"}}</tool_call><|im_end|>
    <|im_start|>tool
    5115<|im_end|>
    <|im_start|>assistant
    5115<|im_end|>

Only this file writes special ids, and it takes them from no text: a user, a tool or a document that says "<|im_end|>"
has said ten characters. Every piece (a header, a content, a call) is encoded alone, so a conversation's ids never
change when it grows: what was sampled stays a prefix of what is rendered later, and the engine's cache stays valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from stateofgpt.errors import DataError
from stateofgpt.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
INVALID = "invalid"  # the name of a call whose JSON could not be read; arguments {"text": what was written}

CHAT_TEMPLATE = """\
{{- '<|endoftext|>' -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- elif message.content -%}
        {%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
    {%- for item in message.tool_calls or [] if message.role == 'assistant' -%}
        {%- set call = item.function or item -%}
        {{- '<tool_call>{"name": ' + call.name | tojson + ', "arguments": ' -}}
        {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
        {{- '}</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


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


class ChatFormat:
    """The chat template over one tokenizer."""

    template = CHAT_TEMPLATE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._newline = tokenizer.encode("\n")
        self._headers = {role: [tokenizer.im_start, *tokenizer.encode(f"{role}\n")] for role in ROLES}

    def render(self, conversation: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
        """The conversation as ids. The mask is 1 on an assistant's content, its tool calls and its closing <|im_end|>.

        With `add_generation_prompt` the ids end where an assistant's next turn begins.
        """
        ids, mask = [self.tokenizer.eot], [0]
        for message in conversation:
            header, body = self._headers[message.role], [*self._body(message), self.tokenizer.im_end]
            ids += [*header, *body, *self._newline]
            learned = int(message.role == "assistant")
            mask += [0] * len(header) + [learned] * len(body) + [0] * len(self._newline)
        if add_generation_prompt:
            ids += self._headers["assistant"]
            mask += [0] * len(self._headers["assistant"])
        return Rendered(ids, mask)

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        """The ids that follow an assistant's closed turn, up to where its next one begins.

        For a turn of sampled ids that end with <|im_end|>: prompt + turn + continuation(new messages) is what `render`
        would give for all of it, without encoding the past again.
        """
        ids = list(self._newline)
        for message in messages:
            ids += [*self._headers[message.role], *self._body(message), self.tokenizer.im_end, *self._newline]
        return ids + self._headers["assistant"]

    def parse(self, ids: Iterable[int]) -> Message:
        """The message in the ids an assistant sampled, with or without the closing <|im_end|>; whatever follows it is
        not read. A call that is not JSON of the right shape becomes one named `INVALID` with its text."""
        tokenizer = self.tokenizer
        content: list[int] = []
        calls: list[ToolCall] = []
        call: list[int] | None = None  # the ids of the call we are inside of
        for number in ids:
            if number == tokenizer.im_end:
                break
            if number in (tokenizer.tool_open, tokenizer.tool_close):
                if call is not None:
                    calls.append(_read_call(tokenizer.decode(call)))
                call = [] if number == tokenizer.tool_open else None
            elif call is None:
                content.append(number)
            else:
                call.append(number)
        if call is not None:  # cut short: still a call, and never one that can be run by accident
            calls.append(ToolCall(INVALID, {"text": tokenizer.decode(call)}))
        return Message("assistant", tokenizer.decode(content), tuple(calls))

    def _body(self, message: Message) -> list[int]:
        ids = self.tokenizer.encode(message.content) if message.content else []
        for call in message.tool_calls if message.role == "assistant" else ():
            text = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
            ids += [self.tokenizer.tool_open, *self.tokenizer.encode(text), self.tokenizer.tool_close]
        return ids


def _read_call(text: str) -> ToolCall:
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
