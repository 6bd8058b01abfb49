"""The feedback store: durable when it has answered, safe under many writers, and honest about what people preferred."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stateofgpt.data.feedback import (
    SCHEMA_VERSION,
    FeedbackConflict,
    FeedbackRefused,
    FeedbackStore,
    StoredMessage,
    UnknownMessage,
)
from stateofgpt.errors import FeedbackError
from stateofgpt.text.chat import Message, ToolCall


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "feedback.sqlite") as opened:
        yield opened


def asked(store: FeedbackStore, text: str = "What is 2 + 2?", author: str = "local") -> StoredMessage:
    return store.add_message(store.new_conversation(author), None, (Message("user", text),))


def answered(store: FeedbackStore, above: StoredMessage, text: str, partial: bool = False) -> StoredMessage:
    message = (Message("assistant", text),)
    return store.add_message(above.conversation, above.id, message, model="run:rl", partial=partial)


def pairs(store: FeedbackStore) -> list[tuple[str, str, str]]:
    return [(c.source, c.chosen[-1].content, c.rejected[-1].content) for c in store.comparisons()]


# -- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_comes_back_as_it_was_said_with_its_tool_calls(store: FeedbackStore) -> None:
    question = asked(store, "What is 6 * 7?\n<|im_end|> \u00e9\U0001f333")
    turn = (
        Message("assistant", "", (ToolCall("calculator", {"expression": "6*7"}),)),
        Message("tool", "42"),
        Message("assistant", "It is 42."),
    )
    answer = store.add_message(question.conversation, question.id, turn, model="run:rl")
    assert store.history(answer.id) == (*question.messages, *turn)
    assert store.message(answer.id).model == "run:rl"


def test_an_answer_given_again_is_a_sibling_and_the_first_one_stays(store: FeedbackStore) -> None:
    question = asked(store)
    first, second = answered(store, question, "5"), answered(store, question, "4", partial=True)
    thread = store.thread(question.conversation)
    assert [m.id for m in thread.messages] == [question.id, first.id, second.id]
    assert {first.parent, second.parent} == {question.id}
    assert [m.partial for m in thread.messages] == [False, False, True]


def test_conversations_are_listed_newest_first_with_their_first_words(store: FeedbackStore) -> None:
    asked(store, "first")
    asked(store, "second")
    assert [title for _, _, title in store.conversations()] == ["second", "first"]


def test_a_message_cannot_be_hung_into_another_conversation(store: FeedbackStore) -> None:
    one, other = asked(store), asked(store)
    with pytest.raises(UnknownMessage, match="not part of"):
        store.add_message(one.conversation, other.id, (Message("assistant", "x"),))
    with pytest.raises(UnknownMessage):
        store.add_message("no such", None, (Message("user", "x"),))


def test_sql_in_text_and_ids_is_only_text(store: FeedbackStore) -> None:
    question = asked(store, "'; DROP TABLE messages; --")
    with pytest.raises(UnknownMessage):
        store.message("' OR 1=1 --")
    assert store.message(question.id).text == "'; DROP TABLE messages; --"


# -- events ----------------------------------------------------------------------------------------------------------


def test_the_same_key_twice_is_one_event_and_another_content_under_it_a_conflict(store: FeedbackStore) -> None:
    answer = answered(store, asked(store), "4")
    for _ in range(3):
        store.rate(answer.id, "k1", "up", reason="right")
    with sqlite3.connect(store.name) as raw:
        assert raw.execute("SELECT count(*) FROM feedback").fetchone() == (1,)
    with pytest.raises(FeedbackConflict, match="new key"):
        store.rate(answer.id, "k1", "down")


def test_a_verdict_is_what_the_events_lead_to_and_a_retraction_clears_it(store: FeedbackStore) -> None:
    answer = answered(store, asked(store), "5")
    store.rate(answer.id, "1", "up")
    store.rate(answer.id, "2", "down")
    verdict = store.rate(answer.id, "3", reason="wrong", correction=" 4 ")
    assert (verdict.rating, verdict.reason, verdict.correction) == ("down", "wrong", "4")
    verdict = store.rate(answer.id, "4", retracted=True)
    assert (verdict.rating, verdict.reason, verdict.correction) == (None, "", "")
    assert store.rate(answer.id, "5", "up").rating == "up"
    with sqlite3.connect(store.name) as raw:  # append only: nothing was overwritten on the way
        assert raw.execute("SELECT count(*) FROM feedback").fetchone() == (5,)


@pytest.mark.parametrize(
    "event, reason",
    [
        ({}, "empty"),
        ({"rating": "sideways"}, "'up' or 'down'"),
        ({"reason": "x" * 2001}, "2001"),
        ({"correction": "x" * 16001}, "16001"),
        ({"rating": "up", "key": ""}, "key"),
    ],
)
def test_feedback_that_says_nothing_or_too_much_is_refused(store: FeedbackStore, event: dict, reason: str) -> None:
    answer = answered(store, asked(store), "4")
    with pytest.raises(FeedbackRefused, match=reason):
        store.rate(answer.id, **{"key": "k", **event})


def test_only_answers_that_exist_can_be_rated(store: FeedbackStore) -> None:
    with pytest.raises(UnknownMessage):
        store.rate("nothing", "k", "up")
    with pytest.raises(FeedbackRefused, match="only answers"):
        store.rate(asked(store).id, "k", "up")


# -- comparisons -----------------------------------------------------------------------------------------------------


def test_a_correction_is_better_than_the_original_and_keeps_the_tool_calls_of_both(store: FeedbackStore) -> None:
    question = asked(store)
    turn = (Message("assistant", "", (ToolCall("calculator", {"expression": "2+2"}),)), Message("tool", "4"))
    answer = store.add_message(question.conversation, question.id, (*turn, Message("assistant", "5")))
    store.rate(answer.id, "k", "down", correction="4")
    (comparison,) = store.comparisons()
    assert comparison.prompt == question.messages
    assert comparison.chosen == (*turn, Message("assistant", "4"))
    assert comparison.rejected == (*turn, Message("assistant", "5"))
    assert comparison.source == "correction"


def test_thumbs_pair_answers_to_the_same_prompt_across_conversations(store: FeedbackStore) -> None:
    good, bad, other = (answered(store, asked(store, q), a) for q, a in [("q", "good"), ("q", "bad"), ("p", "other")])
    store.rate(good.id, "1", "up")
    store.rate(bad.id, "2", "down")
    store.rate(other.id, "3", "down")
    assert pairs(store) == [("thumbs", "good", "bad")]


def test_a_prompt_is_all_that_was_said_before(store: FeedbackStore) -> None:
    for number, (opening, answer, rating) in enumerate([("hello", "good", "up"), ("goodbye", "bad", "down")]):
        first = asked(store, opening)
        said = answered(store, first, "yes")
        again = store.add_message(first.conversation, said.id, (Message("user", "same question"),))
        store.rate(answered(store, again, answer).id, str(number), rating)  # type: ignore[arg-type]
    assert pairs(store) == []


def test_a_regenerated_answer_that_was_kept_is_better_than_the_one_before(store: FeedbackStore) -> None:
    question = asked(store)
    answered(store, question, "first")
    assert pairs(store) == []
    second = answered(store, question, "second")
    assert pairs(store) == []  # nobody has said yet which one is kept
    store.add_message(question.conversation, second.id, (Message("user", "go on"),))
    assert pairs(store) == [("regenerated", "second", "first")]


def test_going_on_with_the_first_answer_after_seeing_the_second_prefers_the_first(store: FeedbackStore) -> None:
    question = asked(store)
    first, _ = answered(store, question, "first"), answered(store, question, "second")
    store.add_message(question.conversation, first.id, (Message("user", "go on"),))
    assert pairs(store) == [("regenerated", "first", "second")]


def test_going_on_before_there_was_a_second_answer_prefers_nothing(store: FeedbackStore) -> None:
    question = asked(store)
    first = answered(store, question, "first")
    store.add_message(question.conversation, first.id, (Message("user", "go on"),))
    answered(store, question, "second")
    assert pairs(store) == []


def test_a_thumb_up_on_the_regenerated_answer_is_enough_and_a_thumb_down_is_none(store: FeedbackStore) -> None:
    question = asked(store)
    answered(store, question, "first")
    second = answered(store, question, "second")
    store.rate(second.id, "1", "up")
    assert pairs(store) == [("regenerated", "second", "first")]
    store.rate(second.id, "2", "down")
    store.add_message(question.conversation, second.id, (Message("user", "go on"),))
    assert pairs(store) == []


def test_unfinished_answers_are_compared_with_nothing(store: FeedbackStore) -> None:
    question = asked(store)
    cut, whole = answered(store, question, "fir", partial=True), answered(store, question, "second")
    store.rate(whole.id, "1", "up")
    store.rate(cut.id, "2", "down")
    assert pairs(store) == []


def test_equal_pairs_count_once_and_opposite_ones_not_at_all(store: FeedbackStore) -> None:
    for number, (text, correction) in enumerate([("a", "b"), ("a", "b"), ("c", "d"), ("d", "c"), ("e", "e")]):
        store.rate(answered(store, asked(store), text).id, str(number), correction=correction)
    assert pairs(store) == [("correction", "b", "a")]


def test_a_tie_of_thumbs_says_nothing(store: FeedbackStore) -> None:
    question = asked(store)
    answer, other = answered(store, question, "x"), answered(store, question, "y")
    store.rate(answer.id, "1", "up", author="ann")
    store.rate(answer.id, "2", "down", author="bob")
    store.rate(other.id, "3", "down", author="bob")
    assert pairs(store) == []


def test_a_retracted_thumb_teaches_nothing(store: FeedbackStore) -> None:
    question = asked(store)
    good, bad = answered(store, question, "good"), answered(store, question, "bad")
    store.rate(good.id, "1", "up")
    store.rate(bad.id, "2", "down")
    assert pairs(store) == [("thumbs", "good", "bad")]
    store.rate(good.id, "3", retracted=True)
    store.rate(bad.id, "4", retracted=True)
    assert pairs(store) == [] and store.counts().up == store.counts().down == 0


def test_one_person_or_conversation_gives_a_bounded_number_of_comparisons(store: FeedbackStore) -> None:
    for number in range(12):
        question = asked(store, f"question {number}", author="flood")
        store.rate(answered(store, question, "bad").id, f"f{number}", correction="planted", author="flood")
    question = asked(store, "honest", author="ann")
    store.rate(answered(store, question, "bad").id, "a", correction="good", author="ann")
    kept = [c.chosen[-1].content for c in store.comparisons(per_author=5)]
    assert kept == ["planted"] * 5 + ["good"]
    crowded = asked(store, "again", author="bob")
    for number in range(6):
        store.rate(answered(store, crowded, f"bad {number}").id, f"b{number}", correction="good", author="bob")
    assert sum(c.prompt == crowded.messages for c in store.comparisons(per_conversation=2)) == 2


def test_a_flood_of_thumbs_on_one_answer_is_one_vote(store: FeedbackStore) -> None:
    question = asked(store)
    good, bad = answered(store, question, "good"), answered(store, question, "bad")
    for author in ("ann", "bob"):
        store.rate(good.id, f"g{author}", "up", author=author)
        store.rate(bad.id, f"b{author}", "down", author=author)
    for number in range(200):
        store.rate(bad.id, f"s{number}", "up", author="stuffer")
        store.rate(good.id, f"t{number}", "down", author="stuffer")
    assert pairs(store) == [("thumbs", "good", "bad")]


def test_counts_say_how_much_there_is(store: FeedbackStore) -> None:
    question = asked(store)
    store.rate(answered(store, question, "4").id, "1", "up")
    store.rate(answered(store, question, "5").id, "2", "down", correction="4")
    counts = store.counts()
    assert (counts.conversations, counts.answers, counts.up, counts.down, counts.corrections) == (1, 2, 1, 1, 1)
    assert counts.comparisons == len(store.comparisons()) == 1  # thumbs and correction say the same


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_64_writers_at_once_lose_nothing_and_see_no_lock(store: FeedbackStore) -> None:
    question = asked(store)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            answer = answered(store, question, f"answer {number}")
            store.rate(answer.id, f"key {number}", "up" if number % 2 else "down")
            store.rate(answer.id, "shared" if number == 0 else f"second {number}", reason="because")
            store.comparisons()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    counts = store.counts()
    assert (counts.answers, counts.up, counts.down) == (64, 32, 32)


WRITER = """
import sys
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.text.chat import Message
with FeedbackStore(sys.argv[1]) as store:
    number = 0
    while True:
        question = store.add_message(store.new_conversation(), None, (Message("user", "q"),))
        answer = store.add_message(question.conversation, question.id, (Message("assistant", "a"),))
        store.rate(answer.id, f"{sys.argv[2]}-{number}", "up")
        print(f"{sys.argv[2]}-{number}", flush=True)
        number += 1
"""


@pytest.mark.slow
def test_every_acknowledged_event_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    acknowledged: list[str] = []
    for life in range(3):
        command = [sys.executable, "-c", WRITER, str(path), str(life)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(0.03 + 0.05 * life)
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [first.strip(), *(line.strip() for line in writer.stdout if line.endswith("\n"))]
        writer.wait()
    with sqlite3.connect(path) as raw:
        stored = [key for (key,) in raw.execute("SELECT key FROM feedback")]
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert len(acknowledged) > 3
    assert set(acknowledged) <= set(stored) and len(stored) == len(set(stored))


def test_a_second_server_on_the_same_file_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    with FeedbackStore(path, exclusive=True):
        with pytest.raises(FeedbackError, match="another server"):
            FeedbackStore(path, exclusive=True)
        with FeedbackStore(path) as reader:
            assert reader.counts().answers == 0
    FeedbackStore(path, exclusive=True).close()


def test_a_locked_database_is_said_to_be_locked_and_works_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    with FeedbackStore(path, busy_timeout_s=0.05) as store:
        answer = answered(store, asked(store), "4")
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(FeedbackError, match="locked by another program"):
            store.rate(answer.id, "k", "up")
        assert store.message(answer.id).text == "4"  # reading goes on
        blocker.execute("ROLLBACK")
        blocker.close()
        assert store.rate(answer.id, "k", "up").rating == "up"


def test_a_full_disk_is_said_to_be_full_and_nothing_is_half_stored(store: FeedbackStore) -> None:
    question = asked(store)
    with store._database.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(FeedbackError, match="disk is full"):
        answered(store, question, "x" * 100_000)
    assert len(store.thread(question.conversation).messages) == 1


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_file_is_refused_in_one_sentence_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "feedback.sqlite"
    path.write_bytes(content)
    with pytest.raises(FeedbackError, match="damaged or no feedback database") as caught:
        FeedbackStore(path)
    assert "\n" not in str(caught.value) and path.read_bytes() == content


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    FeedbackStore(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE meta SET value = ?", (str(SCHEMA_VERSION + 1),))
    with pytest.raises(FeedbackError, match="update stateofgpt"):
        FeedbackStore(path)


def test_a_folder_or_an_unusable_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="is a folder"):
        FeedbackStore(tmp_path)
    with pytest.raises(FeedbackError, match="cannot be used"):
        FeedbackStore("nonsense://somewhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FeedbackError, match="cannot make the folder"):
        FeedbackStore(tmp_path / "file" / "feedback.sqlite")


def test_the_database_is_durable_by_its_settings(store: FeedbackStore) -> None:
    with store._database.write() as connection:
        pragma = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in
                  ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")}  # fmt: skip
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
