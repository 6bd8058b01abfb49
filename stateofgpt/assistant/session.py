"""The session: an assistant answers, calling tools on the way.

Owns: the loop of drawing a turn, running the tools it calls, giving their results back and drawing on; and the same
as a stream of text for somebody who watches. What was drawn is kept as the ids that were drawn: nothing is ever
encoded again, so a turn can be learned from as it is. Knows nothing of training, HTTP, or what tools do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from stateofgpt.infer.engine import Event
from stateofgpt.infer.sampling import SamplingParams, derive_seed
from stateofgpt.text.chat import ChatFormat, Conversation, Message, ToolCall

ANSWER_TOKENS = 192  # two look-ups, a calculation and a sentence about them take 170


class Tools(Protocol):
    """What a session needs of a toolbox."""

    def call(self, call: ToolCall, /) -> str: ...


class TokenSource(Protocol):
    """What a session needs of `infer.engine.Engine` or `infer.loop.EngineLoop`."""

    max_context: int

    def add(self, prompt: Sequence[int], params: SamplingParams, *, hold: bool = False) -> int: ...
    def extend(self, request: int, ids: Sequence[int]) -> None: ...
    def cancel(self, request: int) -> None: ...
    def events(self, requests: Iterable[int]) -> Iterator[Event]: ...


TurnFinish = Literal["stop", "length", "tool_limit"]


@dataclass(frozen=True)
class Turn:
    """All that happened between a prompt and the end of the assistant's answer.

    `ids` follow `prompt_ids`; `mask` is 1 where the model drew the id and 0 where a tool's message was given,
    `logprobs` is 0 there. `finish`: "stop" (the assistant ended its turn), "length" (max_tokens or the context ran
    out) or "tool_limit".
    """

    messages: Conversation
    prompt_ids: list[int]
    ids: list[int]
    mask: list[int]
    logprobs: list[float]
    finish: TurnFinish


@dataclass(frozen=True)
class TextDelta:
    """More of the assistant's text, and the draws it was made of (a character may take several)."""

    text: str
    drawn: tuple[Event, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class ToolCalled:
    """The assistant has asked for a tool, which is about to be run."""

    call: ToolCall


@dataclass(frozen=True)
class ToolReturned:
    """The tool has answered."""

    call: ToolCall
    text: str


@dataclass(frozen=True)
class CallDelta:
    """More of call number `index` of a tool that is not run here: its name at first, then JSON of its arguments."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Done:
    """The turn is over; always the last event of a stream."""

    turn: Turn


Streamed = TextDelta | ToolCalled | ToolReturned | CallDelta | Done


@dataclass
class _Open:
    """A turn under way."""

    prompt_ids: list[int]
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    finish: TurnFinish = "length"
    rounds: int = 0
    said: int = 0  # where in `ids` the assistant's present message begins

    def drew(self, event: Event) -> None:
        self.ids.append(event.token)
        self.mask.append(1)
        self.logprobs.append(event.logprob)

    def given(self, ids: list[int]) -> None:
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.said = len(self.ids)

    def close(self) -> Turn:
        return Turn(tuple(self.messages), self.prompt_ids, self.ids, self.mask, self.logprobs, self.finish)


class Session:
    """A model with a chat format and, perhaps, tools. Holds no conversation: it may serve any number of them.

    `max_rounds` is how many times in one turn the assistant may stop for tools. `converse` and `stream` may be called
    from several threads when `engine` is an EngineLoop.
    """

    def __init__(
        self, engine: TokenSource, chat: ChatFormat, toolbox: Tools | None = None, max_rounds: int = 6
    ) -> None:
        self.engine, self.chat, self.toolbox, self.max_rounds = engine, chat, toolbox, max_rounds
        self._stops = chat.stops

    def converse(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        seeds: Sequence[int] | None = None,
    ) -> list[Turn]:
        """Answer all `conversations` at once; each goes its own way, none waits for another.

        Row i draws with seeds[i], or with derive_seed(params.seed, i) where no seeds are given. `max_tokens` counts
        the drawn tokens of a whole turn. Raises ModelError if a prompt does not fit the context.
        """
        if seeds is None:
            seeds = [derive_seed(params.seed, i) for i in range(len(conversations))]
        turns: dict[int, _Open] = {}
        opened: list[_Open] = []
        try:
            for conversation, seed in zip(conversations, seeds, strict=True):
                request, turn = self._begin(conversation, replace(params, seed=seed))
                turns[request] = turn
                opened.append(turn)
            for event in self.engine.events(turns):
                turn = turns[event.request]
                turn.drew(event)
                if event.finish:
                    calls = self._finish(turn, event)
                    if not self._go_on(event.request, turn, [self._answer(call) for call in calls]):
                        self.engine.cancel(event.request)  # its row is free for another
        finally:
            for request in turns:
                self.engine.cancel(request)
        return [turn.close() for turn in opened]

    def stream(
        self,
        conversation: Conversation,
        params: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        *,
        whole: bool = False,
    ) -> Iterator[Streamed]:
        """Answer one conversation piece by piece. `params.seed` is used as it is. Closing the iterator cancels the
        request.

        A conversation too long for the context loses its oldest exchanges (see `fit`), unless it is to be read `whole`.
        """
        request, turn = self._begin(conversation if whole else self.fit(conversation), params)
        try:
            speech = self.chat.speech()
            waiting: list[Event] = []
            for event in self.engine.events([request]):
                turn.drew(event)
                text = speech.hear(event.token)
                if not speech.calling and event.token not in self._stops:
                    waiting.append(event)
                if event.finish:
                    text += speech.end()
                if text:
                    yield TextDelta(text, tuple(waiting))
                    waiting = []
                if event.finish:
                    answers = []
                    for call in self._finish(turn, event):
                        yield ToolCalled(call)
                        answers.append(self._answer(call))
                        yield ToolReturned(call, answers[-1])
                    if self._go_on(request, turn, answers):
                        speech = self.chat.speech()
            yield Done(turn.close())
        finally:
            self.engine.cancel(request)

    def fit(self, conversation: Conversation) -> Conversation:
        """The conversation without its oldest exchanges, as many as it takes to leave room for an answer.

        That is a quarter of the context, but `ANSWER_TOKENS` where a quarter is less, as far as three quarters of it.
        System messages stay, and so does all from the last user message on.
        """
        kept, context = list(conversation), self.engine.max_context
        room = max(context // 4, min(ANSWER_TOKENS, context * 3 // 4))
        while len(self.chat.render(kept, add_generation_prompt=True).ids) > context - room:
            asked = [i for i, message in enumerate(kept) if message.role == "user"]
            if len(asked) < 2:
                break
            kept = [m for i, m in enumerate(kept) if m.role == "system" or i >= asked[1]]
        return tuple(kept)

    def _begin(self, conversation: Conversation, params: SamplingParams) -> tuple[int, _Open]:
        prompt = self.chat.render(conversation, add_generation_prompt=True).ids
        stops = tuple(dict.fromkeys((*params.stop_ids, *self._stops)))
        request = self.engine.add(prompt, replace(params, stop_ids=stops), hold=self.toolbox is not None)
        return request, _Open(prompt, params.max_tokens)

    def _finish(self, turn: _Open, event: Event) -> tuple[ToolCall, ...]:
        """Read the message that has just ended. Returns the calls to run: none if the turn ends here."""
        message = self.chat.parse(turn.ids[turn.said :])
        turn.messages.append(message)
        turn.finish = "length" if event.finish == "length" else "stop"
        if self.toolbox is None or not message.tool_calls or event.token != self.chat.end:
            return ()
        if turn.rounds >= self.max_rounds:
            turn.finish = "tool_limit"
            return ()
        if sum(turn.mask) >= turn.max_tokens:
            turn.finish = "length"
            return ()
        turn.rounds += 1
        return message.tool_calls

    def _answer(self, call: ToolCall) -> str:
        assert self.toolbox is not None
        return self.toolbox.call(call)

    def _go_on(self, request: int, turn: _Open, answers: list[str]) -> bool:
        """Give the tools' answers to the model and let it draw on, if there were any and there is room."""
        if not answers:
            return False
        results = [Message("tool", answer) for answer in answers]
        new = self.chat.continuation(results)
        if len(turn.prompt_ids) + len(turn.ids) + len(new) > self.engine.max_context - 1:
            turn.finish = "length"
            return False
        self.engine.extend(request, new)
        turn.messages += results
        turn.given(new)
        return True
