"""Rankings files: what is read, what is written, and what is refused with its line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from stateofgpt.data import comparisons
from stateofgpt.data.comparisons import Ranking, read_rankings, write_rankings
from stateofgpt.errors import DataError
from stateofgpt.text.chat import Message, ToolCall


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def says(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def file_of(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_k_completions_without_ties_give_k_times_k_minus_one_over_two_pairs() -> None:
    for k in range(2, 7):
        for ranks in itertools.islice(itertools.permutations(range(1, k + 1)), 24):
            pairs = Ranking(user("q"), tuple(says(str(i)) for i in range(k)), ranks).pairs()
            assert len(pairs) == k * (k - 1) // 2 == len({frozenset(p) for p in pairs})
            assert all(ranks[better] < ranks[worse] for better, worse in pairs)


def test_tied_completions_make_no_pair() -> None:
    assert Ranking(user("q"), (says("a"), says("b"), says("c")), (1, 2, 2)).pairs() == [(0, 1), (0, 2)]
    assert Ranking(user("q"), (says("a"), says("b")), (1, 1)).pairs() == []


def test_what_is_written_is_read_back_tools_and_problem_too(tmp_path: Path) -> None:
    tool = (
        Message("assistant", "", (ToolCall("calculator", {"expression": "2 + 2"}),)),
        Message("tool", "4"),
        Message("assistant", "4 é 漢 <|im_end|>"),
    )
    rankings = [
        Ranking((Message("system", "be brief"), *user("2 + 2?")), (tool, says("5")), (1, 2), {"skill": "arithmetic"}),
        Ranking(user("hi"), (says("a"), says("b"), says("")), (2, 1, 2)),
    ]
    assert write_rankings(tmp_path / "r.jsonl", rankings) == 2
    assert read_rankings(tmp_path / "r.jsonl") == rankings


def test_every_form_of_a_row_is_read(tmp_path: Path) -> None:
    question, four, five = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, says("5")
    wrong = {"role": "assistant", "content": "5"}
    expected = Ranking(user("2+2?"), (says("4"), five), (1, 2))
    rows = [
        {"prompt": "2+2?", "completions": ["4", "5"], "ranks": [1, 2], "source": "extra columns are no error"},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [question], "chosen": [four], "rejected": [wrong]},
        {"prompt": "2+2?", "chosen": [question, four], "rejected": [question, wrong]},
        {"chosen": [question, four], "rejected": [question, wrong]},
    ]
    assert read_rankings(file_of(tmp_path, *rows)) == [expected] * len(rows)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "JSON"),
        ("[1]", "must be an object"),
        ("[" * 100_000, "JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", "JSON"),
        ({"prompt": "q"}, "no completions"),
        ({"prompt": "q", "completions": ["a", "b"], "ranks": [1]}, "one rank to each"),
        ({"prompt": "q", "completions": ["a"], "ranks": [1]}, "2 to"),
        ({"prompt": "q", "completions": ["a", "b"], "ranks": [0, 1]}, "whole numbers"),
        ({"prompt": "q", "completions": ["a", "b"], "ranks": [True, 2]}, "whole numbers"),
        ({"prompt": " ", "completions": ["a", "b"], "ranks": [1, 2]}, "prompt is empty"),
        ({"prompt": [], "completions": ["a", "b"], "ranks": [1, 2]}, "prompt is empty"),
        ({"prompt": 5, "completions": ["a", "b"], "ranks": [1, 2]}, "list of messages"),
        ({"prompt": [{"role": "boss", "content": "x"}], "chosen": "a", "rejected": "b"}, "boss"),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"}, "begin with"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "begin with"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ('{"prompt": "q", "chosen": "\\ud800", "rejected": "b"}', "surrogate"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "problem": 3}, "problem"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, row: Any, reason: str) -> None:
    path = file_of(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"}, "", row)
    with pytest.raises(DataError) as caught:
        read_rankings(path)
    assert str(caught.value).startswith(f"{path}:3: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_utf8_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl:2: byte 13 .* not UTF-8"):
        read_rankings(path)


def test_a_line_too_long_is_refused_before_it_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "MAX_LINE_BYTES", 1 << 20)
    path = file_of(tmp_path, "x" * (3 << 20))
    with pytest.raises(DataError, match=r":1: the line is longer than 1 MB"):
        read_rankings(path)


def test_a_missing_or_empty_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the rankings"):
        read_rankings(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="holds no rankings"):
        read_rankings(file_of(tmp_path, "", "  "))
