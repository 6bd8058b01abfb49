"""What an assistant has sampled, read: its text, and the calls of tools in it.

Owns: where a turn ends, how a call is marked (by two tokens of the vocabulary where it has them, else by the texts
`<tool_call>` and `</tool_call>`), and the same id by id for somebody who watches. Calls are only ever read from ids
that an assistant sampled. Knows nothing of templates.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import takewhile

from stateofgpt.text.messages import INVALID, Message, ToolCall, read_call
from stateofgpt.text.specials import TOOL_CLOSE, TOOL_OPEN
from stateofgpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TurnReader:
    """Reads turns of one model. `ends` are the ids at which a turn is over. `lead` and `tail` are what the template
    puts before and behind an assistant's content, within what is sampled; they are no part of it."""

    tokenizer: Tokenizer
    ends: Collection[int]
    lead: str = ""
    tail: str = ""

    @property
    def marked(self) -> bool:
        """Whether a tool call stands between two tokens of its own."""
        return self.tokenizer.tool_open is not None

    def parse(self, ids: Iterable[int]) -> Message:
        """The message in the ids an assistant sampled; what follows the end of the turn is not read.

        A call that is not JSON of the right shape becomes one named `INVALID` with its text; so does one cut short.
        """
        said = list(takewhile(lambda number: number not in self.ends, ids))
        content, calls = self._by_tokens(said) if self.marked else self._by_text(said)
        return Message("assistant", content.removeprefix(self.lead).removesuffix(self.tail), tuple(calls))

    def speech(self) -> Speech:
        """A listener to one message, from its first id."""
        return Speech(self)

    def _by_tokens(self, ids: list[int]) -> tuple[str, list[ToolCall]]:
        """Content and calls, where marks are tokens: text in their form is text."""
        content: list[int] = []
        calls: list[ToolCall] = []
        call: list[int] | None = None  # the ids of the call we are inside of
        for number in ids:
            if number in (self.tokenizer.tool_open, self.tokenizer.tool_close):
                if call is not None:
                    calls.append(read_call(self._decode(call)))
                call = [] if number == self.tokenizer.tool_open else None
            elif call is None:
                content.append(number)
            else:
                call.append(number)
        if call is not None:  # cut short: still a call, and never one that can be run by accident
            calls.append(ToolCall(INVALID, {"text": self._decode(call)}))
        return self._decode(content), calls

    def _by_text(self, ids: list[int]) -> tuple[str, list[ToolCall]]:
        """Content and calls, where marks are text."""
        content = ""
        calls: list[ToolCall] = []
        rest = self._decode(ids)
        while True:
            before, found, rest = rest.partition(TOOL_OPEN)
            content += before
            if not found:
                return content, calls
            text, closed, rest = rest.partition(TOOL_CLOSE)
            calls.append(read_call(text) if closed else ToolCall(INVALID, {"text": text}))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, inner=True)


class Speech:
    """One assistant message as text, id by id: bytes of an unfinished character wait, tool calls are no text."""

    def __init__(self, reader: TurnReader) -> None:
        self._reader, self._tokenizer = reader, reader.tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._calling = False
        self._held = ""  # text that may yet turn out to be a mark
        self._lead = reader.lead

    @property
    def calling(self) -> bool:
        """Whether a tool call has begun and not ended."""
        return self._calling

    def hear(self, token: int) -> str:
        """The text that can be shown now."""
        if self._reader.marked:
            if token in (self._tokenizer.tool_open, self._tokenizer.tool_close):
                self._calling = token == self._tokenizer.tool_open
            return "" if self._calling else self._without_lead(self._decode(token))
        return self._without_lead(self._without_calls(self._decode(token)))

    def end(self) -> str:
        """What is left when the message is over."""
        rest = self._decoder.decode(b"", final=True)
        if self._reader.marked:
            return rest
        shown, self._held = self._without_calls(rest) + ("" if self._calling else self._held), ""
        return self._without_lead(shown).removesuffix(self._reader.tail)

    def _decode(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token], inner=True))  # special tokens have no bytes

    def _without_lead(self, text: str) -> str:
        if self._lead and text:
            text, self._lead = text.removeprefix(self._lead), ""
        return text

    def _without_calls(self, text: str) -> str:
        """What of `text` is outside of calls, as far as that is certain."""
        shown = ""
        self._held += text
        while True:
            mark = TOOL_CLOSE if self._calling else TOOL_OPEN
            before, found, after = self._held.partition(mark)
            if not found:
                break
            shown += "" if self._calling else before
            self._calling, self._held = not self._calling, after
        keep = next((n for n in range(len(mark) - 1, 0, -1) if self._held.endswith(mark[:n])), 0)
        certain = len(self._held) - keep
        shown += "" if self._calling else self._held[:certain]
        self._held = self._held[certain:]
        return shown
