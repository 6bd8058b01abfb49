"""How OpenAI's answers look: one answer's deltas, from which the stream and the whole are both made.

Owns the shapes of chat completions and completions, log-probabilities, usage and reasons to end. Knows nothing of
routes or threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stateofgpt.assistant.session import CallDelta, Streamed, TextDelta
from stateofgpt.infer.engine import Event
from stateofgpt.serve.answering import Answer
from stateofgpt.serve.protocol import StopStrings
from stateofgpt.text.tokenizer import Tokenizer

UNLIKELY = -9999.0  # in place of minus infinity, which JSON has no number for


@dataclass(frozen=True)
class Delta:
    """More of one answer: text with the draws it was made of, or a piece of a call; last of all why it ended."""

    text: str = ""
    drawn: tuple[Event, ...] = ()
    call: CallDelta | None = None
    finish: str | None = None


class Choice:
    """One answer as it is heard: cuts it at stop strings, and gathers what there is of it."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._until = StopStrings(stop)
        self._waiting: list[Event] = []
        self.text, self.drawn = "", 0
        self.calls: list[dict[str, str]] = []
        self.events: list[Event] = []
        self.answer: Answer | None = None
        self.finish: str | None = None

    @property
    def over(self) -> bool:
        """Whether a stop string has come: nothing that follows is of interest."""
        return self._until.hit

    def hear(self, piece: Streamed | Answer) -> Iterator[Delta]:
        if isinstance(piece, TextDelta):
            if self.over:
                return
            self.drawn += len(piece.drawn)
            self._waiting += piece.drawn
            yield from self._text(self._until.feed(piece.text))
        elif isinstance(piece, CallDelta):
            if piece.name is not None:
                self.calls.append({"name": piece.name, "arguments": ""})
            self.calls[piece.index]["arguments"] += piece.arguments
            yield Delta(call=piece)
        elif isinstance(piece, Answer):
            self.answer = piece
            if piece.error is not None or (piece.finish == "cancelled" and not self.over):
                return
            yield from self._text(self._until.rest())
            cut = piece.finish in ("length", "tool_limit")
            self.finish = "stop" if self.over else "length" if cut else "tool_calls" if self.calls else "stop"
            textless = () if self.over else tuple(self._waiting)  # such as the token that ended the answer
            self.events += textless
            yield Delta(drawn=textless, finish=self.finish)

    @property
    def tokens(self) -> int:
        """How many were drawn, as far as one knows."""
        return max(self.drawn, self.answer.completion_tokens if self.answer else 0)

    def _text(self, text: str) -> Iterator[Delta]:
        if text:
            self.text += text
            drawn, self._waiting = tuple(self._waiting), []
            self.events += drawn
            yield Delta(text, drawn)


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    completion = sum(choice.tokens for choice in choices)
    total = prompt_tokens + completion
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion, "total_tokens": total}


# -- chat completions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatShapes:
    """The JSON of one chat completion. `fingerprint` is the id of the model's checkpoint."""

    id: str
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    logprobs: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        known = {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**known, "system_fingerprint": self.fingerprint}

    def chunk(
        self, index: int, delta: Mapping[str, Any], drawn: Sequence[Event] = (), finish: str | None = None
    ) -> dict[str, Any]:
        shown = chat_logprobs(self.tokenizer, drawn) if self.logprobs and drawn else None
        choice = {"index": index, "delta": dict(delta), "logprobs": shown, "finish_reason": finish}
        unused = {"usage": None} if self.include_usage else {}
        return {**self.head("chat.completion.chunk"), "choices": [choice], **unused}

    def first(self, index: int) -> dict[str, Any]:
        return self.chunk(index, {"role": "assistant", "content": ""})

    def more(self, index: int, delta: Delta) -> dict[str, Any]:
        if delta.call is not None:
            return self.chunk(index, {"tool_calls": [self._call(index, delta.call)]})
        if delta.finish is not None:
            return self.chunk(index, {}, (), delta.finish)
        return self.chunk(index, {"content": delta.text}, delta.drawn)

    def usage_chunk(self, counted: Mapping[str, int]) -> dict[str, Any]:
        return {**self.head("chat.completion.chunk"), "choices": [], "usage": dict(counted)}

    def whole(self, choices: Sequence[Choice], counted: Mapping[str, int]) -> dict[str, Any]:
        found = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return {**self.head("chat.completion"), "choices": found, "usage": dict(counted)}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        content = choice.text if choice.text or not choice.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message["tool_calls"] = [
                {"id": self._call_id(index, number), "type": "function", "function": dict(call)}
                for number, call in enumerate(choice.calls)
            ]
        shown = chat_logprobs(self.tokenizer, choice.events) if self.logprobs else None
        return {"index": index, "message": message, "logprobs": shown, "finish_reason": choice.finish}

    def _call(self, index: int, call: CallDelta) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        id = self._call_id(index, call.index)
        return {"index": call.index, "id": id, "type": "function", "function": function}

    def _call_id(self, index: int, number: int) -> str:
        return f"call_{self.id[:16]}_{index}_{number}"


def chat_logprobs(tokenizer: Tokenizer, drawn: Sequence[Event]) -> dict[str, Any]:
    """`logprobs` of a chat completion's choice."""
    entries = []
    for event in drawn:
        top = [_entry(tokenizer, token, logprob) for token, logprob in event.top]
        entries.append({**_entry(tokenizer, event.token, event.logprob), "top_logprobs": top})
    return {"content": entries, "refusal": None}


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.decode_bytes([token], skip_special=False, inner=True)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, UNLIKELY), "bytes": list(data)}


# -- completions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextShapes:
    """The JSON of one completion."""

    id: str
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    logprobs: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self) -> dict[str, Any]:
        known = {"id": f"cmpl-{self.id}", "object": "text_completion", "created": self.created, "model": self.model}
        return {**known, "system_fingerprint": self.fingerprint}

    def choice(
        self, index: int, text: str, events: Sequence[Event], at: int = 0, finish: str | None = None
    ) -> dict[str, Any]:
        """`events` are the tokens of `text`, which begins at character `at` of all that is returned."""
        shown = text_logprobs(self.tokenizer, events, at) if self.logprobs and events else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": finish}

    def chunk(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.head(), "choices": [dict(choice)], **({"usage": None} if self.include_usage else {})}

    def whole(self, choices: Sequence[Mapping[str, Any]], counted: Mapping[str, int]) -> dict[str, Any]:
        return {**self.head(), "choices": list(choices), "usage": dict(counted)}


def text_logprobs(tokenizer: Tokenizer, events: Sequence[Event], at: int) -> dict[str, Any]:
    """`logprobs` of a completion's choice; the token itself is always among its alternatives.

    A token that nothing stands before has no probability: NaN in its event, null in what is shown.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for event in events:
        known = not math.isnan(event.logprob)
        tokens.append(_shown(tokenizer, event.token))
        logprobs.append(max(event.logprob, UNLIKELY) if known else None)
        named: dict[str, float] = {}
        for token, logprob in (*event.top, (event.token, event.logprob)):  # two tokens may look the same
            name = _shown(tokenizer, token)
            named[name] = max(logprob, named.get(name, UNLIKELY))
        tops.append(named if known else None)
        offsets.append(at)
        at += len(tokens[-1])
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _shown(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode_bytes([token], skip_special=False, inner=True).decode("utf-8", "replace")
