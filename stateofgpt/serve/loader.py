"""A model folder as an assistant that many can talk to at once.

Owns: putting model, tokenizer, template, engine and tools together, what is dropped of a conversation that is too long
for the model, and the names of the stages it went through. Knows nothing of HTTP or feedback.
"""

from __future__ import annotations

import codecs
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from stateofgpt.assistant.offer import Caller, Offer, told
from stateofgpt.assistant.session import Done, Session, Streamed, TextDelta, Turn
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.errors import CheckpointError, ModelError, StateOfGptError
from stateofgpt.infer.decoders import CachePrecision, Precision
from stateofgpt.infer.engine import Engine, Event
from stateofgpt.infer.grammar import library
from stateofgpt.infer.guide import Constraint, Guides
from stateofgpt.infer.loop import EngineHung, EngineLoop
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.infer.transfer import room_on
from stateofgpt.model.checkpoint import Lineage, load_model, read_lineage
from stateofgpt.model.device import CPU, choose_device
from stateofgpt.run import resolve_model
from stateofgpt.serve.answering import Stop, Stopped
from stateofgpt.text.chat import ChatFormat, Conversation, Message
from stateofgpt.text.tokenizer import Tokenizer

TOKENS_PER_MESSAGE = 4  # a message takes at least so many, so more than context / 4 messages never fit
STEP_TOKENS = 256  # of prompts, read between two tokens of the answers that are being written
GPU_STEP_TOKENS = 4096  # there a few hundred take no less time than a few thousand
MIN_ANSWER_TOKENS = 16  # room that must be left
MOST_ROWS = 64  # answers that are written in one batch
CLOSE_S = 30.0  # is waited for a step, then the engine is left behind
UNREAD = 64  # tokens that are drawn ahead of a reader that lags behind
SLOW = 5e9  # operations a second that every machine makes on which a model is worth serving
SIDE_BRANCHES = frozenset({"reward"})  # parents that judged, and wrote none of the weights


class ContextTooLong(ModelError):
    """What was sent does not fit the model's context."""


def load_assistant(
    model_dir: Path,
    *,
    max_batch: int = 8,
    weights: Precision | None = None,
    cache: CachePrecision | None = None,
    device: str | None = None,
) -> LoadedAssistant:
    """Load the checkpoint in `model_dir`; CheckpointError, one sentence, when that cannot be done.

    `max_batch` answers are written at the same time; more wait for their turn. `weights` and `cache` as of `Engine`;
    `device` as of `choose_device`.
    """
    model_dir, where = Path(model_dir), choose_device(device)
    lineage = read_lineage(model_dir)
    tokenizer = Tokenizer.load(model_dir)
    with room_on(where):
        engine = Engine(
            load_model(model_dir).eval().to(where),
            max_batch=min(max_batch, MOST_ROWS),
            native=True,
            weights=weights,
            cache=cache,
            prefixes=True,
            step_tokens=STEP_TOKENS if where == CPU else GPU_STEP_TOKENS,
            guides=_guides(tokenizer),
        )
    chat = ChatFormat(tokenizer)
    for note in chat.notes:
        print(f"note: {note}", file=sys.stderr)
    about = About(lineage.name, stages_of(model_dir, lineage), lineage.id)
    return LoadedAssistant(EngineLoop(engine, unread=UNREAD), chat, about)


@dataclass(frozen=True)
class About:
    """What a model is called, the stages it went through, and the id of its checkpoint, which is of its content."""

    name: str
    lineage: tuple[str, ...]
    id: str


class LoadedAssistant:
    """One model, its tools, and one engine that writes all answers; safe to use from many threads."""

    def __init__(self, loop: EngineLoop, chat: ChatFormat, about: About) -> None:
        self._loop, self.chat, self.tokenizer = loop, chat, chat.tokenizer
        self._tools = Toolbox()
        self.name, self.lineage, self.id = about.name, about.lineage, about.id
        self.max_context, self.constrained = loop.max_context, loop.engine.guides is not None
        self.vocab_size = loop.engine.model.config.vocab_size
        self.device = str(loop.engine.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.close(CLOSE_S)

    # -- talking -------------------------------------------------------------------------------------------------

    def stream(
        self, conversation: Conversation, params: SamplingParams, stopped: threading.Event, tenant: str = ""
    ) -> Iterator[Streamed]:
        """Events of one answer to the conversation as it is (see `fit` and `prompt`). Raises Stopped once `stopped` is
        set; its row is free at once.

        What was read for one `tenant` is never found again for another.
        """
        engine = _Stoppable(self._loop, stopped, tenant)
        tools = None if params.constraint else self._tools
        return Session(engine, self.chat, tools).stream(conversation, params, whole=True)

    def offered(
        self,
        conversation: Conversation,
        params: SamplingParams,
        offer: Offer,
        stopped: threading.Event,
        tenant: str = "",
    ) -> Iterator[Streamed]:
        """As `stream`, with the client's tools in place of the assistant's own."""
        engine = _Stoppable(self._loop, stopped, tenant)
        if not offer.open:
            mark = self.tokenizer.tool_open
            if mark is not None and not params.constraint:
                params = replace(params, logit_bias=(*params.logit_bias, (mark, -100.0)))
            return Session(engine, self.chat).stream(conversation, params, whole=True)
        return Caller(engine, self.chat, constrained=self.constrained).stream(conversation, params, offer)

    def fit(self, conversation: Conversation, max_tokens: int) -> tuple[Conversation, int]:
        """The newest exchanges that leave room for an answer, and how many messages were dropped.

        ModelError when what was said last is too long alone.
        """
        newest = conversation[-(self.max_context // TOKENS_PER_MESSAGE) :]
        fitted = Session(self._loop, self.chat).fit(newest)
        tokens = len(self.chat.render(fitted, add_generation_prompt=True).ids)
        room = self.max_context - min(max_tokens, MIN_ANSWER_TOKENS)
        if tokens > room:
            raise ModelError(f"the message has {tokens} tokens, and this model can read {room}: shorten it")
        return fitted, len(conversation) - len(fitted)

    def prompt(self, conversation: Conversation, offer: Offer | None = None) -> list[int]:
        """The ids that an answer follows; ContextTooLong where they leave no room for one."""
        if len(conversation) > self.max_context // TOKENS_PER_MESSAGE + 1:
            raise ContextTooLong(f"{len(conversation)} messages are more than a context of {self.max_context} can hold")
        said = told(conversation, offer) if offer else conversation
        return self.check(self.chat.render(said, add_generation_prompt=True).ids)

    # -- text ----------------------------------------------------------------------------------------------------

    def check(self, ids: list[int], room: int = 1) -> list[int]:
        """`ids`, if this model can read them and then write `room` more; ContextTooLong or ModelError if not."""
        if len(ids) + room > self.max_context:
            raise ContextTooLong(
                f"this model's context holds {self.max_context} tokens, and the request has {len(ids)}: shorten it"
            )
        if not ids:
            raise ModelError("there is no token to go on from: send at least one")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ModelError(f"a token id is outside of 0 to {self.vocab_size - 1}: was it made by another tokenizer?")
        return ids

    def continued(
        self, ids: Sequence[int], params: SamplingParams, stopped: threading.Event, tenant: str = ""
    ) -> Iterator[Streamed]:
        """The text that follows `ids`, and last of all Done. Every token that was drawn is in a delta, with no text if
        it has none, as the one has that ends it all."""
        engine = _Stoppable(self._loop, stopped, tenant)
        params = replace(params, stop_ids=tuple(dict.fromkeys((*params.stop_ids, *self.tokenizer.stops))))
        request = engine.add(ids, params)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        waiting: list[Event] = []
        drawn: list[Event] = []
        try:
            for event in engine.events([request]):
                drawn.append(event)
                waiting.append(event)
                ends, last = event.token in params.stop_ids, event.finish is not None
                data = b"" if ends else self.tokenizer.decode_bytes([event.token], inner=True)
                text = decoder.decode(data, final=last)
                if text or last:
                    yield TextDelta(text, tuple(waiting))
                    waiting = []
            finish = drawn[-1].finish if drawn else None
            ids_drawn = [event.token for event in drawn]
            probabilities = [event.logprob for event in drawn]
            yield Done(Turn((), list(ids), ids_drawn, [1] * len(drawn), probabilities, finish or "length"))
        finally:
            engine.cancel(request)

    def scored(self, ids: Sequence[int], top: int) -> list[Event]:
        """Every token after the first as if it had been drawn, with its `top` alternatives."""
        found = self._loop.score([ids], max(top, 1))[0]
        return [Event(0, ids[i + 1], one.logprob, None, one.top[:top]) for i, one in enumerate(found)]

    def embedded(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """A vector of length 1 for each sequence."""
        return self._loop.embed(sequences)

    def compile(self, constraint: Constraint) -> None:
        """ConfigError or ModelError where the engine cannot be held to `constraint`."""
        if not self.constrained:
            raise ModelError(
                "this server cannot constrain answers to a schema: install the extra `constrained` and start it again"
            )
        self._loop.engine.guide(SamplingParams(constraint=constraint))

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._loop.alive

    @property
    def died(self) -> BaseException | None:
        """What ended the engine's thread."""
        return self._loop.died

    @property
    def turn(self) -> tuple[int, float] | None:
        """Which turn the engine is in and how many seconds that may take on a slow machine; None where it waits."""
        turn = self._loop.turn
        return turn and (turn.number, 2 * self._loop.engine.model.n_params() * turn.tokens / SLOW)

    def give_up(self, seconds: float) -> str:
        """The engine has been in one turn for so long that it will not come back: tell all who wait. Where it is."""
        self._loop.give_up(EngineHung(f"a step has not come back for {seconds:.0f} s"))
        return self._loop.where()

    def load(self) -> dict[str, float]:
        """What the engine is doing now."""
        return {what: float(count) for what, count in self._loop.load.items()}

    def smoke_test(self) -> None:
        """CheckpointError where the model does not write at all, or writes what is no probability."""
        conversation = (Message("user", "Hello"),)
        stopped = threading.Event()
        for event in self.offered(conversation, SamplingParams(max_tokens=4, temperature=0.0), Offer(), stopped):
            if isinstance(event, Done):
                turn = event.turn
                if turn.ids and all(math.isfinite(one) and one <= 1e-3 for one in turn.logprobs):
                    return
        raise CheckpointError(f"{self.name} does not write: its probabilities are not finite")


class _Stoppable:
    """The engine's loop as one answer sees it: its events end with Stopped when the answer is to end."""

    def __init__(self, loop: EngineLoop, stopped: threading.Event, tenant: str = "") -> None:
        self._loop, self._stopped, self._tenant = loop, stopped, tenant
        self.max_context = loop.max_context
        self.extend, self.cancel = loop.extend, loop.cancel

    def add(self, prompt: Sequence[int], params: SamplingParams, *, hold: bool = False) -> int:
        if self._stopped.is_set():
            raise Stopped
        request = self._loop.add(prompt, params, hold=hold, tenant=self._tenant)
        if isinstance(self._stopped, Stop):  # nobody waits for the next token of an answer that is to end
            self._stopped.then(lambda: self._loop.cancel(request))
        return request

    def events(self, requests: Iterable[int]) -> Iterator[Event]:
        for event in self._loop.events(requests):
            if self._stopped.is_set():
                raise Stopped
            yield event
        if self._stopped.is_set():
            raise Stopped


def _guides(tokenizer: Tokenizer) -> Guides | None:
    """What constrains answers; None where the package for it is not installed."""
    try:
        library()
    except ModelError:
        return None
    return Guides(tokenizer)


def stages_of(model_dir: Path, lineage: Lineage) -> tuple[str, ...]:
    """The stages whose weights became this model's, oldest first, as far as their checkpoints are still there."""
    stages = [lineage.stage]
    here = Path(model_dir).resolve()
    for _ in range(16):  # longer chains are cut: this is a line on a page
        parents = [parent for parent in lineage.parents if parent.stage not in SIDE_BRANCHES]
        if not parents:
            break
        stages.append(parents[0].stage)
        try:
            here = resolve_model(parents[0].name, runs_dir=here.parents[2])
            lineage = read_lineage(here)
        except (StateOfGptError, IndexError):
            break
        if lineage.id != parents[0].id:  # the run was made anew since
            break
        here = here.resolve()
    return tuple(reversed(stages))
