"""The terminal chat: through a pipe, with a scripted assistant, storing the same feedback as the page."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stateofgpt.assistant.session import Done, Streamed, TextDelta, ToolCalled, ToolReturned, Turn
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import ModelError
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve.answering import Stopped
from stateofgpt.serve.terminal import Terminal, plain
from stateofgpt.text.chat import Conversation, Message, ToolCall


class Script:
    name = "run:rl"
    lineage = ("pretrain", "sft", "rl")

    def __init__(self, *says: str, tool: bool = False, interrupt_at: int = -1, fail: bool = False) -> None:
        self.says, self.tool, self.interrupt_at, self.fail = list(says), tool, interrupt_at, fail
        self.seen: list[Conversation] = []
        self.seeds: list[int] = []

    def fit(self, conversation: Conversation, max_tokens: int) -> tuple[Conversation, int]:
        return conversation[-5:], max(0, len(conversation) - 5)

    def stream(
        self, conversation: Conversation, params: SamplingParams, stopped: threading.Event
    ) -> Iterator[Streamed]:
        self.seen.append(conversation)
        self.seeds.append(params.seed)
        text = self.says.pop(0) if self.says else "yes"
        if self.tool:
            call = ToolCall("calculator", {"expression": "4729*386"})
            yield ToolCalled(call)
            yield ToolReturned(call, "1825394")
        for number, letter in enumerate(text):
            if number == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            if stopped.is_set():
                raise Stopped
            yield TextDelta(letter)
        if self.fail:
            raise ModelError("the engine failed")
        yield Done(Turn((Message("assistant", text),), [1], [2], [1], [0.0], "stop"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "feedback.sqlite") as opened:
        yield opened


def talk(script: Script, store: FeedbackStore | None, *lines: str) -> str:
    sink = io.StringIO()
    Terminal(script, store, SamplingParams(seed=7), io.StringIO("\n".join(lines) + "\n"), sink).run()
    return sink.getvalue()


def test_a_conversation_through_a_pipe_is_answered_and_stored(store: FeedbackStore) -> None:
    script = Script("Hello.", "Five.")
    out = talk(script, store, "hi", "", "2+3?", "/quit", "never read")
    assert "Hello.\n" in out and "Five.\n" in out and "never" not in out and "pretrain → sft → rl" in out
    assert [m.content for m in script.seen[1]] == ["hi", "Hello.", "2+3?"]
    ((conversation, _, title),) = store.conversations()
    assert title == "hi" and [m.text for m in store.thread(conversation).messages] == ["hi", "Hello.", "2+3?", "Five."]


def test_tool_calls_are_shown_in_one_line(store: FeedbackStore) -> None:
    assert "  [calculator 4729*386 → 1825394]\nIt is that.\n" in talk(Script("It is that.", tool=True), store, "go")


def test_regenerating_keeps_the_old_answer_and_a_thumb_up_compares_them(store: FeedbackStore) -> None:
    script = Script("worse", "better")
    out = talk(script, store, "go", "/regen", "/up much better")
    assert script.seeds[0] != script.seeds[1] and script.seen[0] == script.seen[1]
    (comparison,) = store.comparisons()
    assert (comparison.chosen[-1].content, comparison.rejected[-1].content) == ("better", "worse")
    assert "1 up, 0 down, 1 comparisons" in out


def test_down_correct_and_undo_reach_the_store(store: FeedbackStore) -> None:
    talk(Script("5"), store, "2+2?", "/down wrong", "/correct 4")
    (comparison,) = store.comparisons()
    assert (comparison.chosen[-1].content, comparison.source) == ("4", "correction")
    talk(Script("5"), store, "2+2?", "/down", "/undo")
    assert (store.counts().down, store.counts().answers) == (1, 2)


def test_new_begins_a_new_conversation(store: FeedbackStore) -> None:
    script = Script()
    talk(script, store, "one", "/new", "two")
    assert [len(said) for said in script.seen] == [1, 1] and store.counts().conversations == 2


def test_commands_out_of_place_are_answered_and_nothing_breaks(store: FeedbackStore) -> None:
    out = talk(Script(), store, "/regen", "/up", "/correct", "/nonsense", "/help")
    for words in ("ask something first", "no stored answer", "after /correct", "no command /nonsense", "/undo"):
        assert words in out


def test_without_a_store_one_can_chat_and_is_told_that_nothing_is_kept() -> None:
    out = talk(Script("Hello."), None, "hi", "/up")
    assert "Hello." in out and "nothing is stored" in out


def test_a_model_that_fails_ends_its_answer_and_not_the_chat(store: FeedbackStore) -> None:
    out = talk(Script("Half", fail=True), store, "hi", "/help")
    assert "Half\n(the answer broke off: the engine failed)" in out and "/undo" in out
    ((conversation, _, _),) = store.conversations()
    assert store.thread(conversation).messages[1].partial


def test_ctrl_c_stops_the_answer_and_keeps_what_was_written(store: FeedbackStore) -> None:
    before = signal.getsignal(signal.SIGINT)
    out = talk(Script("abcdefgh", interrupt_at=3), store, "go", "/help")
    assert "abc\n(stopped)" in out and "/undo" in out
    ((conversation, _, _),) = store.conversations()
    answer = store.thread(conversation).messages[1]
    assert answer.partial and answer.text == "abc"
    assert signal.getsignal(signal.SIGINT) is before


def test_dropped_turns_are_told(store: FeedbackStore) -> None:
    assert "2 of its oldest messages" in talk(Script(), store, "1", "2", "3", "4")


@pytest.mark.parametrize(
    "attack",
    [
        "\x1b]52;c;cm0gLXJmIH4=\x07",  # writes the clipboard
        "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",  # a link that says something else
        "\x1b[2J\x1b[H",
        "\x1b]0;title\x07",
        "\x9b31m",
        "fine\rspoofed",
        "\x08\x08\x08",
        "\u202egpj.exe",
        "\u2066x\u2069",
        "\ud800",
    ],
)
def test_terminal_escapes_of_a_model_are_taken_out(attack: str, store: FeedbackStore) -> None:
    out = talk(Script(f"a{attack}b"), store, f"hi {attack}".replace("\r", " "))
    assert not any(ord(c) < 32 and c not in "\n\t" for c in out)
    assert not any(0x7F <= ord(c) <= 0x9F or ord(c) in range(0x202A, 0x202F) or 0x2066 <= ord(c) <= 0x2069 for c in out)


def test_ordinary_text_passes_unchanged() -> None:
    text = "Grüße, 世界 🌳\n\tdone"
    assert plain(text) == text


def test_a_terminal_of_another_encoding_gets_question_marks_and_no_traceback(store: FeedbackStore) -> None:
    raw = io.BytesIO()
    sink = io.TextIOWrapper(raw, encoding="ascii")
    Terminal(Script("Grüße"), store, SamplingParams(), io.StringIO("hi\n"), sink).run()
    assert b"Gr??e" in raw.getvalue()
