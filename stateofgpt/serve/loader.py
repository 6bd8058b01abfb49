"""A model folder as an assistant that many can talk to at once.

Owns: putting model, tokenizer, template, engine and tools together, what is dropped of a conversation that is too long
for the model, and the names of the stages it went through. Knows nothing of HTTP or feedback.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from stateofgpt.assistant.session import Session, Streamed
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.errors import ModelError, StateOfGptError
from stateofgpt.infer.engine import Engine, Event
from stateofgpt.infer.guide import Guides
from stateofgpt.infer.loop import EngineLoop
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.model.checkpoint import Lineage, load_model, read_lineage
from stateofgpt.run import resolve_model
from stateofgpt.serve.answering import Stopped
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.text.tokenizer import Tokenizer

TOKENS_PER_MESSAGE = 4  # a message takes at least so many, so more than context / 4 messages never fit
STEP_TOKENS = 256  # of prompts, read between two tokens of the answers that are being written
MIN_ANSWER_TOKENS = 16  # room that must be left
SIDE_BRANCHES = frozenset({"reward"})  # parents that judged, and wrote none of the weights


def load_assistant(model_dir: Path, *, max_batch: int = 8) -> LoadedAssistant:
    """Load the checkpoint in `model_dir`; CheckpointError, one sentence, when that cannot be done.

    `max_batch` answers are written at the same time; more wait for their turn.
    """
    model_dir = Path(model_dir)
    lineage = read_lineage(model_dir)
    tokenizer = Tokenizer.load(model_dir)
    engine = Engine(
        load_model(model_dir).eval(),
        max_batch=max_batch,
        native=True,
        prefixes=True,
        step_tokens=STEP_TOKENS,
        guides=Guides(tokenizer),
    )
    chat = ChatFormat(tokenizer)
    for note in chat.notes:
        print(f"note: {note}", file=sys.stderr)
    return LoadedAssistant(EngineLoop(engine), chat, lineage.name, stages_of(model_dir, lineage))


class LoadedAssistant:
    """One model, its tools, and one engine that writes all answers; safe to use from many threads."""

    def __init__(self, loop: EngineLoop, chat: ChatFormat, name: str, lineage: tuple[str, ...]) -> None:
        self._loop, self._chat = loop, chat
        self._tools = Toolbox()
        self.name, self.lineage = name, lineage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.close()

    def stream(
        self, conversation: Conversation, params: SamplingParams, stopped: threading.Event
    ) -> Iterator[Streamed]:
        """Events of one answer. Raises Stopped at the next token once `stopped` is set; its row is free at once."""
        return Session(_Stoppable(self._loop, stopped), self._chat, self._tools).stream(conversation, params)

    def fit(self, conversation: Conversation, max_tokens: int) -> tuple[Conversation, int]:
        """The newest exchanges that leave room for an answer, and how many messages were dropped.

        ModelError when what was said last is too long alone.
        """
        newest = conversation[-(self._loop.max_context // TOKENS_PER_MESSAGE) :]
        fitted = Session(self._loop, self._chat).fit(newest)
        tokens = len(self._chat.render(fitted, add_generation_prompt=True).ids)
        room = self._loop.max_context - min(max_tokens, MIN_ANSWER_TOKENS)
        if tokens > room:
            raise ModelError(f"the message has {tokens} tokens, and this model can read {room}: shorten it")
        return fitted, len(conversation) - len(fitted)


class _Stoppable:
    """The engine's loop as one answer sees it: its events end with Stopped when the answer is to end."""

    def __init__(self, loop: EngineLoop, stopped: threading.Event) -> None:
        self._loop, self._stopped = loop, stopped
        self.max_context = loop.max_context
        self.add, self.extend, self.cancel = loop.add, loop.extend, loop.cancel

    def events(self, requests: Iterable[int]) -> Iterator[Event]:
        for event in self._loop.events(requests):
            if self._stopped.is_set():
                raise Stopped
            yield event


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
