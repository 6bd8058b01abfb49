"""A model whose every token is written beforehand, under everything that is real above the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from stateofgpt.errors import ConfigError, ModelError
from stateofgpt.infer.engine import Event
from stateofgpt.infer.guide import Constraint
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.infer.score import Scored
from stateofgpt.serve.loader import About, LoadedAssistant
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer

Say = Callable[[str, SamplingParams], "str | list[int]"]


def tokenizer() -> Tokenizer:
    """Ours, of little more than bytes."""
    return Tokenizer.train(iter(["What is four? It is four. assistant user tool"] * 8), 300)


class ScriptedLoop:
    """In place of an `EngineLoop`: says what `say` gives for the prompt's text, token by token.

    Knows what it was asked (`asked`), which requests are open, and can fail, pause, and refuse constraints.
    """

    def __init__(self, tokens: Tokenizer, say: Say | str = "It is four.", max_context: int = 4096) -> None:
        self.tokenizer = tokens
        self.say: Say = (lambda _, __: say) if isinstance(say, str) else say
        self.max_context = max_context
        self.pause = 0.0
        self.fail: Exception | None = None
        self.fail_at = 2
        self.asked: list[tuple[list[int], SamplingParams, str]] = []
        self.open: dict[int, list[int]] = {}
        self.steps = 0
        self.wrong: set[str] = set()  # sources of constraints that cannot be kept
        self.engine = SimpleNamespace(
            model=SimpleNamespace(config=SimpleNamespace(vocab_size=tokens.vocab_size)),
            guides=self._guide,
            device="cpu",
            guide=lambda params: self._guide(params.constraint),
        )
        self.turn = None
        self.alive, self.load = True, {"open": 0, "waiting": 0}
        self.closed = False

    def _guide(self, constraint: Constraint) -> None:
        if constraint.source in self.wrong:
            raise ConfigError("the schema cannot be used: it is a test")

    @property
    def busy(self) -> int:
        return len(self.open)

    def close(self, wait_s: float | None = None) -> None:
        self.closed = True

    def add(self, prompt: Sequence[int], params: SamplingParams, *, hold: bool = False, tenant: str = "") -> int:
        if len(prompt) > self.max_context - 1:
            raise ModelError("too long")
        self.asked.append((list(prompt), params, tenant))
        said = self.say(self.tokenizer.decode(prompt, skip_special=False), params)
        ids = [*self.tokenizer.encode(said), self.tokenizer.im_end] if isinstance(said, str) else said
        number = len(self.asked)
        self.open[number] = ids[: params.max_tokens]
        return number

    def extend(self, request: int, ids: Sequence[int]) -> None:
        raise ModelError("a script is not extended")

    def cancel(self, request: int) -> None:
        self.open.pop(request, None)

    def events(self, requests: Iterable[int]) -> Iterator[Event]:
        (request,) = requests
        for position, token in enumerate(ids := list(self.open.get(request, ()))):
            if self.pause:
                time.sleep(self.pause)
            if request not in self.open:
                return
            if self.fail is not None and position == self.fail_at:
                raise self.fail
            self.steps += 1
            ends = token in self.asked[request - 1][1].stop_ids
            finish: Any = "stop" if ends else "length" if position == len(ids) - 1 else None
            top = tuple((other, -1.0 - other) for other in range(self.asked[request - 1][1].top_logprobs))
            yield Event(request, token, -0.25 * (position + 1), finish, top)
            if ends:
                break
        self.open.pop(request, None)

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0) -> list[Any]:
        alternatives = tuple((other, -1.0 - other) for other in range(top))
        return [[Scored(-float(token), alternatives) for token in ids[1:]] for ids in sequences]

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[0.6, 0.8, 0.0] if len(ids) % 2 else [0.0, 0.6, 0.8] for ids in sequences]


def served(loop: ScriptedLoop, name: str = "run:rl") -> LoadedAssistant:
    """The script as an assistant."""
    anything: Any = loop
    return LoadedAssistant(anything, ChatFormat(loop.tokenizer), About(name, ("pretrain", "sft", "rl"), "0123abcd"))
