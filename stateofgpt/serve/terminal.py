"""Chatting in the terminal: a prompt, streamed answers, and the same feedback as on the page.

Plain text both ways, so that it works through a pipe; what a model or a tool writes cannot move the cursor, set the
title or reach the clipboard, because control characters are taken out. Knows nothing of HTTP.
"""

from __future__ import annotations

import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from stateofgpt.assistant.session import TextDelta, ToolCalled, ToolReturned
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import FeedbackError, StateOfGptError
from stateofgpt.infer.decoders import Precision
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve.answering import Answer, Assistant, answer, describe
from stateofgpt.text.chat import Conversation, Message

HELP = """\
/up [reason]      the last answer was good      /regen   another answer to the same question
/down [reason]    the last answer was bad       /new     a new conversation
/correct TEXT     what it should have said      /undo    take back what you said of the last answer
/help             this list                     /quit    leave (or Ctrl-D); Ctrl-C stops an answer"""
MAX_TOKENS = 512
_BIDI = frozenset(range(0x202A, 0x202F)) | frozenset(range(0x2066, 0x206A)) | {0x200E, 0x200F, 0x061C}


def chat(
    model_dir: Path,
    feedback: Path | None,
    temperature: float,
    seed: int,
    weights: Precision | None = None,
    device: str | None = None,
) -> None:
    """Chat with the model in a folder on the standard streams; with `feedback`, store what is said there."""
    from stateofgpt.serve.loader import load_assistant

    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=seed)
    with load_assistant(model_dir, max_batch=1, weights=weights, device=device) as assistant, ExitStack() as stack:
        store = None if feedback is None else stack.enter_context(FeedbackStore(feedback))
        Terminal(assistant, store, params, sys.stdin, sys.stdout).run()


def plain(text: str) -> str:
    """`text` without what a terminal would obey: control characters (but newline and tab) and direction overrides."""
    return "".join(letter for letter in text if letter in "\n\t" or _shown(ord(letter)))


def _shown(code: int) -> bool:
    return code >= 0x20 and not 0x7F <= code <= 0x9F and code not in _BIDI and not 0xD800 <= code <= 0xDFFF


@contextmanager
def _interrupting(stopped: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `stopped` instead of breaking off in the middle of a step; a second one breaks off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Terminal:
    """One person at one prompt. `store` None: nothing is kept, and the feedback commands say so."""

    def __init__(
        self, assistant: Assistant, store: FeedbackStore | None, params: SamplingParams, source: TextIO, sink: TextIO
    ) -> None:
        self.assistant, self.store, self.params = assistant, store, params
        self.source, self.sink = source, sink
        self.interactive = source.isatty() and sink.isatty()
        self.commands: Mapping[str, Callable[[str], None]] = {
            "/up": lambda rest: self._rate("up", reason=rest),
            "/down": lambda rest: self._rate("down", reason=rest),
            "/correct": self._correct,
            "/undo": lambda _: self._rate(None, retracted=True),
            "/regen": lambda _: self._regenerate(),
            "/new": lambda _: self._forget(),
            "/help": lambda _: self._say(HELP),
        }
        self._forget()

    def run(self) -> None:
        """Read lines until /quit or the end of the input."""
        kept = f"feedback is kept in {self.store.name}" if self.store else "nothing is stored"
        self._say(f"{self.assistant.name} ({' → '.join(self.assistant.lineage)}); {kept}. /help lists the commands.")
        for line in self._lines():
            command, _, rest = line.partition(" ")
            try:
                if command in ("/quit", "/exit"):
                    return
                if command in self.commands:
                    self.commands[command](rest.strip())
                elif line.startswith("/"):
                    self._say(f"there is no command {command}: /help lists them")
                elif line:
                    self._ask(line)
            except StateOfGptError as error:
                self._say(f"error: {error}")

    def _lines(self) -> Iterator[str]:
        if self.interactive:
            import readline  # noqa: F401 gives input() its history and editing

            while True:
                try:
                    yield input("\n> ").strip()
                except EOFError:
                    self._say("")
                    return
                except KeyboardInterrupt:
                    self._say("\n/quit or Ctrl-D leaves")
        else:
            yield from self._piped(self.source)

    def _piped(self, source: Iterable[str]) -> Iterator[str]:
        for line in source:
            self._say(f"> {plain(line.strip())}")
            yield line.strip()

    # -- asking --------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self.said: Conversation = ()  # up to and including the last question
        self.answered: Conversation = ()
        self.tries = 0
        self.conversation: str | None = None
        self.question: str | None = None  # ids of what is stored; None where it is not
        self.node: str | None = None

    def _ask(self, question: str) -> None:
        above = self.node
        self.said = (*self.said, *self.answered, Message("user", question))
        self.answered, self.tries, self.question, self.node = (), 0, None, None
        if self.store is not None:
            try:
                self.conversation = self.conversation or self.store.new_conversation()
                self.question = self.store.add_message(self.conversation, above, (Message("user", question),)).id
            except FeedbackError as error:
                self._say(f"(not stored: {error})")
        self._answer()

    def _regenerate(self) -> None:
        if not self.said:
            self._say("ask something first")
            return
        self.tries += 1
        self._answer()

    def _answer(self) -> None:
        fitted, dropped = self.assistant.fit(self.said, self.params.max_tokens)
        if dropped:
            self._say(f"(the conversation is too long: {dropped} of its oldest messages were left out)")
        params = replace(self.params, seed=self.params.seed + len(self.said) - 1 + 1000 * self.tries)
        result = self._stream(fitted, params)
        self.answered, self.node = result.messages, None
        if result.error is not None:
            reason = str(result.error) if isinstance(result.error, StateOfGptError) else repr(result.error)
            self._say(f"(the answer broke off: {plain(reason)})")
        elif result.finish != "stop":
            self._say({"length": "(cut at the length limit)", "cancelled": "(stopped)"}.get(result.finish, ""))
        if self.store is not None and self.conversation and self.question and not result.empty:
            try:
                self.node = self.store.add_message(
                    self.conversation, self.question, result.messages,
                    model=self.assistant.name, partial=result.partial,
                ).id  # fmt: skip
            except FeedbackError as error:
                self._say(f"(not stored: {error})")

    def _stream(self, conversation: Conversation, params: SamplingParams) -> Answer:
        """Print an answer as it comes; Ctrl-C ends it."""
        stopped = threading.Event()
        result = Answer((), "cancelled")
        fresh = True  # at the beginning of a line
        with _interrupting(stopped):
            for piece in answer(self.assistant, conversation, params, stopped):
                if isinstance(piece, Answer):
                    result = piece
                elif isinstance(piece, TextDelta):
                    self._put(plain(piece.text))
                    fresh = piece.text.endswith("\n") if piece.text else fresh
                elif isinstance(piece, ToolCalled):
                    self._put(("" if fresh else "\n") + plain(f"  [{piece.call.name} {describe(piece.call)}"))
                    fresh = False
                elif isinstance(piece, ToolReturned):
                    self._put(plain(f" → {' '.join(piece.text.split())}]") + "\n")
                    fresh = True
        if not fresh:
            self._put("\n")
        return result

    # -- feedback ------------------------------------------------------------------------------------------------

    def _correct(self, correction: str) -> None:
        if not correction:
            self._say("write what it should have said after /correct")
            return
        self._rate(None, correction=correction)

    def _rate(self, rating: str | None, *, reason: str = "", correction: str = "", retracted: bool = False) -> None:
        if self.store is None:
            self._say("nothing is stored in this chat, so there is nothing to rate")
        elif self.node is None:
            self._say("there is no stored answer to say that of")
        else:
            self.store.rate(
                self.node, uuid.uuid4().hex,
                "up" if rating == "up" else "down" if rating == "down" else None,
                reason=reason, correction=correction, retracted=retracted,
            )  # fmt: skip
            counts = self.store.counts()
            done = "taken back" if retracted else "stored"
            self._say(f"{done}: {counts.up} up, {counts.down} down, {counts.comparisons} comparisons to learn from")

    # -- output --------------------------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        self._put(line + "\n")

    def _put(self, text: str) -> None:
        encoding = self.sink.encoding or "utf-8" if hasattr(self.sink, "encoding") else "utf-8"
        self.sink.write(text.encode(encoding, "replace").decode(encoding))
        self.sink.flush()
