"""Conversations as tokens, and back: the only owner of the chat template.

Owns: the order of special tokens around a message, which tokens an assistant is taught (the loss mask), the same
template in Jinja for `transformers`, and the reading of a sampled turn. What a model made elsewhere has in place of it
is `text.template`'s. Knows nothing of models, tools or data files. One conversation as text, special tokens shown by
name:

    <|endoftext|><|im_start|>user
    What is 4729 + 386?<|im_end|>
    <|im_start|>assistant
    <tool_call>{"name": "calculator", "arguments": {"expression": "4729 + 386"}}</tool_call><|im_end|>
    <|im_start|>tool
    5115<|im_end|>
    <|im_start|>assistant
    5115<|im_end|>

Only this file and `text.template` write special ids, and they take them from no text: a user, a tool or a document that
says "<|im_end|>" has said ten characters. Every piece (a header, a content, a call) is encoded alone, so a
conversation's ids never change when it grows: what was sampled stays a prefix of what is rendered later, and the
engine's cache stays valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from stateofgpt.text.messages import (
    INVALID,
    ROLES,
    Conversation,
    Message,
    Rendered,
    Role,
    ToolCall,
    call_to_text,
    message_from_json,
    message_to_json,
)
from stateofgpt.text.template import TemplateLayout
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.text.turns import Speech, TurnReader

__all__ = [
    "CHAT_TEMPLATE",
    "INVALID",
    "ROLES",
    "ChatFormat",
    "Conversation",
    "Message",
    "Rendered",
    "Role",
    "ToolCall",
    "message_from_json",
    "message_to_json",
]

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


class Layout(Protocol):
    """How one model's conversations are laid out."""

    template: str
    end: int
    reader: TurnReader
    notes: tuple[str, ...]

    def render(self, conversation: Sequence[Message], *, add_generation_prompt: bool) -> Rendered: ...
    def continuation(self, messages: Sequence[Message]) -> list[int]: ...


class ChatFormat:
    """The chat format of one tokenizer: ours, or the template that came with it.

    `end` is the id that closes an assistant's turn, and sampling stops at any of `stops`. `notes` say where a foreign
    template differs from what one would expect, a sentence each.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """CheckpointError when the tokenizer's template cannot be used."""
        self.tokenizer = tokenizer
        self._layout: Layout = _OwnLayout(tokenizer) if tokenizer.own else TemplateLayout(tokenizer)
        self.template, self.end = self._layout.template, self._layout.end
        self.stops: tuple[int, ...] = tuple(dict.fromkeys((self.end, *tokenizer.stops)))
        self.notes: tuple[str, ...] = (*tokenizer.notes, *self._layout.notes)

    def render(self, conversation: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
        """The conversation as ids. The mask is 1 on an assistant's content, its tool calls and what closes its turn.

        With `add_generation_prompt` the ids end where an assistant's next turn begins. DataError when a foreign
        template does not take the conversation.
        """
        return self._layout.render(conversation, add_generation_prompt=add_generation_prompt)

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        """The ids that follow an assistant's closed turn, up to where its next one begins.

        For a turn of sampled ids that end with `end`: prompt + turn + continuation(new messages) is what `render`
        would give for all of it, without encoding the past again.
        """
        return self._layout.continuation(messages)

    def parse(self, ids: Iterable[int]) -> Message:
        """The message in the ids an assistant sampled, with or without what closes it; whatever follows that is not
        read. A call that is not JSON of the right shape becomes one named `INVALID` with its text."""
        return self._layout.reader.parse(ids)

    def speech(self) -> Speech:
        """A listener that turns the ids of one sampled message into text to show, one by one."""
        return self._layout.reader.speech()


class _OwnLayout:
    """`CHAT_TEMPLATE`, without Jinja."""

    template = CHAT_TEMPLATE
    notes: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        start, opening, closing = tokenizer.im_start, tokenizer.tool_open, tokenizer.tool_close
        assert start is not None and opening is not None and closing is not None  # as in every tokenizer of ours
        self.tokenizer, self.end = tokenizer, tokenizer.im_end
        self._tool_open, self._tool_close = opening, closing
        self._newline = tokenizer.encode("\n")
        self._headers = {role: [start, *tokenizer.encode(f"{role}\n")] for role in ROLES}
        self.reader = TurnReader(tokenizer, (self.end,))

    def render(self, conversation: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        ids, mask = [self.tokenizer.eot], [0]
        for message in conversation:
            header, body = self._headers[message.role], [*self._body(message), self.end]
            ids += [*header, *body, *self._newline]
            learned = int(message.role == "assistant")
            mask += [0] * len(header) + [learned] * len(body) + [0] * len(self._newline)
        if add_generation_prompt:
            ids += self._headers["assistant"]
            mask += [0] * len(self._headers["assistant"])
        return Rendered(ids, mask)

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        ids = list(self._newline)
        for message in messages:
            ids += [*self._headers[message.role], *self._body(message), self.end, *self._newline]
        return ids + self._headers["assistant"]

    def _body(self, message: Message) -> list[int]:
        ids = self.tokenizer.encode(message.content) if message.content else []
        for call in message.tool_calls if message.role == "assistant" else ():
            ids += [self._tool_open, *self.tokenizer.encode(call_to_text(call)), self._tool_close]
        return ids
