"""A model folder as an assistant that many can talk to at once.

Owns: putting model, tokenizer, template, engine and tools together, what is dropped of a conversation that is too long
for the model, and the names of the stages it went through. Knows nothing of HTTP or feedback.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from stateofgpt.assistant.session import Session
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.errors import ModelError, StateOfGptError
from stateofgpt.infer.engine import Engine
from stateofgpt.infer.loop import EngineLoop
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.model.checkpoint import Lineage, load_model, read_lineage
from stateofgpt.run import resolve_model
from stateofgpt.serve.answering import Event
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.text.tokenizer import Tokenizer

SIDE_BRANCHES = frozenset({"reward"})  # parents that judged, and wrote none of the weights


def load_assistant(model_dir: Path, *, max_batch: int = 8) -> LoadedAssistant:
    """Load the checkpoint in `model_dir`; CheckpointError, one sentence, when that cannot be done.

    `max_batch` answers are written at the same time; more wait for their turn.
    """
    model_dir = Path(model_dir)
    lineage = read_lineage(model_dir)
    engine = Engine(load_model(model_dir).eval(), max_batch=max_batch)
    chat = ChatFormat(Tokenizer.load(model_dir))
    return LoadedAssistant(EngineLoop(engine), chat, lineage.name, stages_of(model_dir, lineage))


class LoadedAssistant:
    """One model, its tools, and one engine that writes all answers; safe to use from many threads."""

    def __init__(self, loop: EngineLoop, chat: ChatFormat, name: str, lineage: tuple[str, ...]) -> None:
        self._loop, self._chat = loop, chat
        self._session = Session(loop, chat, Toolbox())
        self.name, self.lineage = name, lineage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.close()

    def stream(self, conversation: Conversation, params: SamplingParams) -> Iterator[Event]:
        """Events of one answer; closing the iterator ends the generation within a step."""
        return self._session.stream(conversation, params)

    def fit(self, conversation: Conversation, max_tokens: int) -> tuple[Conversation, int]:
        """The newest turns that leave room for an answer, and how many messages were dropped.

        Whole turns go, oldest first, and never the system's message. ModelError when the last turn alone is too long.
        """
        context = self._loop.max_context
        room = context - min(max_tokens, context // 4)
        system = conversation[:1] if conversation and conversation[0].role == "system" else ()
        rest = conversation[len(system) :]
        starts = [i for i, message in enumerate(rest) if message.role == "user"] or [0]
        costs = [len(self._chat.render((message,)).ids) - 1 for message in rest]
        fixed = len(self._chat.render(system, add_generation_prompt=True).ids)
        for start in [0, *starts]:
            if fixed + sum(costs[start:]) <= room:
                return (*system, *rest[start:]), start
        raise ModelError(
            f"the message has {sum(costs[starts[-1] :])} tokens, and this model can read {room - fixed} before it "
            "answers: shorten it"
        )


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
