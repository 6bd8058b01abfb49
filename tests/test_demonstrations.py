"""Demonstrations: the same for the same seed, read from the three usual forms, and bad rows named by line."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from stateofgpt.data.demonstrations import (
    DemonstrationConfig,
    demonstration,
    demonstrations,
    read_demonstrations,
    read_dialogues,
)
from stateofgpt.data.skills import SKILLS
from stateofgpt.errors import DataError
from stateofgpt.text.chat import Message, message_to_json

ONE = (Message("user", "Hi"), Message("assistant", "Hello"))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def test_item_i_is_a_pure_function_of_seed_and_i() -> None:
    listed = list(demonstrations(3, 50))
    shuffled = list(range(50))
    random.Random(0).shuffle(shuffled)
    assert {i: demonstration(3, i) for i in shuffled} == dict(enumerate(listed))
    assert listed != list(demonstrations(4, 50))


def test_weights_choose_the_skills_and_must_be_possible() -> None:
    nothing = {skill: 0.0 for skill in SKILLS}
    config = DemonstrationConfig(**{**nothing, "thanks": 1.0}, two_tasks_share=0.0)
    assert all("welcome" in chat[-1].content for chat in demonstrations(0, 30, config))
    with pytest.raises(DataError, match="weights"):
        demonstration(0, 0, DemonstrationConfig(**nothing))
    two = list(demonstrations(0, 200, replace(DemonstrationConfig(), two_tasks_share=0.5)))
    assert 60 < sum(sum(m.role == "user" for m in chat) == 2 for chat in two) < 140


def test_dialogues_are_mixed_in_by_their_share() -> None:
    mixed = list(demonstrations(0, 1000, replace(DemonstrationConfig(), dialogue_share=0.2), dialogues=[ONE]))
    assert 150 < mixed.count(ONE) < 250
    assert ONE not in list(demonstrations(0, 200))


def test_each_row_is_read_in_its_own_form(tmp_path: Path) -> None:
    tool = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2."},
    ]
    path = lines(
        tmp_path / "mine.jsonl",
        "\ufeff" + json.dumps({"messages": [message_to_json(message) for message in ONE]}),
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": 7},
        "",
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        {"messages": tool},
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    )
    chats = read_demonstrations(path)
    assert chats[:3] == [ONE, ONE, ONE]
    assert chats[3][0].content == "Add\n\n1, 2"
    assert chats[4][1].tool_calls[0].arguments == {"a": 1}
    assert chats[5] == (Message("system", "Be kind."), *ONE)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{not json", "not JSON"),
        ("[1]", "list"),
        ({"text": "x"}, "messages, conversations"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no message of the user"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "martian"),
        ({"conversations": [{"from": "human"}]}, "from and value"),
        ({"instruction": "x"}, "output"),
        ({"instruction": "x", "input": 3, "output": "y"}, "input"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, said: str) -> None:
    good = {"instruction": "Hi", "output": "Hello"}
    path = lines(tmp_path / "mine.jsonl", good, row, good, row)
    with pytest.raises(DataError, match=said) as caught:
        read_demonstrations(path)
    assert str(caught.value).startswith(f"{path}:2: ") and "1 more" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_utf8_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"instruction": "\xff", "output": "y"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:1: .*UTF-8"):
        read_demonstrations(bad)
    with pytest.raises(DataError, match="cannot be read"):
        read_demonstrations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no demonstrations"):
        read_demonstrations(tmp_path / "empty.jsonl")


def test_dialogues_become_short_chats_that_end_with_the_assistant(tmp_path: Path) -> None:
    def turn(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"text": text, "sender": sender} for text in texts]

    data = {
        "a": {"messages": [turn("x", "Hi", "there"), turn("y", "Hello"), turn("x", "Well?"), turn("y", "")]},
        "b": {"messages": [turn("x", "alone")]},
        "c": {"messages": [turn(name, f"{i}") for i, name in enumerate("xyxyxyxyxy")]},
        "d": {"messages": [turn("x", "long " * 200), turn("y", "Yes")]},
    }
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(data))
    first, second = read_dialogues(path)
    assert first == (Message("user", "Hi there"), Message("assistant", "Hello"))
    assert [m.role for m in second] == ["user", "assistant"] * 3
    path.write_text("[]")
    with pytest.raises(DataError, match="chitchat"):
        read_dialogues(path)
