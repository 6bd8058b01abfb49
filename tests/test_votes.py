"""Files of people's votes: every published form is read, told by name, and no file of any kind ends in a traceback."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stateofgpt.data import vote_file
from stateofgpt.data.comparisons import Ranking, read_rankings, write_rankings
from stateofgpt.data.transcripts import is_transcript, read_transcript
from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.data.votes import FORMS, Thumb, form_of, pair_up, vote_from_row
from stateofgpt.errors import DataError
from stateofgpt.text.chat import Message


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def says(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def asked(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def answered(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


BETTER = Ranking(user("2+2?"), (says("4"), says("5")), (1, 2))
SAME_QUESTION = {  # one comparison in every form
    "ranked": {"prompt": "2+2?", "completions": ["4", "5"], "ranks": [1, 2]},
    "pairs": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "transcripts": {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    "conversations": {"chosen": [asked("2+2?"), answered("4")], "rejected": [asked("2+2?"), answered("5")]},
    "arena": {
        "conversation_a": [asked("2+2?"), answered("4")],
        "conversation_b": [asked("2+2?"), answered("5")],
        "winner": "model_a",
    },
}


def file_of(tmp_path: Path, *rows: Any, name: str = "votes.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", SAME_QUESTION)
def test_one_comparison_is_the_same_in_every_form_and_the_form_is_named(form: str, tmp_path: Path) -> None:
    found = read_comparisons(file_of(tmp_path, SAME_QUESTION[form]))
    assert found.form == form and form in FORMS
    assert found.rankings == (BETTER,)
    assert (found.n_rows, found.n_pairs, found.n_faults, found.n_ties) == (1, 1, 0, 0)
    assert form in found.told() and "1 pairs" in found.told()


def test_a_gzipped_file_and_a_json_list_are_read_whatever_their_names(tmp_path: Path) -> None:
    rows = [SAME_QUESTION["pairs"], SAME_QUESTION["ranked"]]
    packed = tmp_path / "a.txt"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    listed = tmp_path / "b.txt"
    listed.write_text("\ufeff " + json.dumps(rows, indent=2), encoding="utf-8")
    both = tmp_path / "c.txt"
    both.write_bytes(gzip.compress(json.dumps(rows).encode()))
    for path in (packed, listed, both):
        assert read_comparisons(path).rankings == (BETTER, BETTER)
    assert read_comparisons(listed).form == "mixed: 1 pairs, 1 ranked"


def test_a_transcript_has_turns_only_after_an_empty_line() -> None:
    text = (
        "\n\nHuman: He said: \nHuman: hi, Assistant: ho\n\nAssistant: First.\n\nSecond.\n\nHuman: Thanks\n\nAssistant:"
    )
    assert read_transcript(text) == (
        Message("user", "He said: \nHuman: hi, Assistant: ho"),
        Message("assistant", "First.\n\nSecond."),
        Message("user", "Thanks"),
        Message("assistant", ""),
    )
    assert is_transcript(text) and not is_transcript("Humans: no") and not is_transcript(None)
    with pytest.raises(DataError, match="no transcript"):
        read_transcript("Once upon a time.\n\nHuman: 2+2?")


def test_the_prompt_of_two_transcripts_is_what_they_begin_with_alike() -> None:
    begin = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    vote = vote_from_row({"chosen": begin + " yes", "rejected": begin + " no"})
    assert isinstance(vote, Ranking)
    assert [m.content for m in vote.prompt] == ["a", "b", "c"] and vote.completions == (says("yes"), says("no"))
    explicit = vote_from_row({"prompt": begin, "chosen": " yes", "rejected": " no"})
    assert explicit == vote


def test_annotators_give_ranks_by_majority_a_margin_and_their_own_votes() -> None:
    def row(*votes: int | None) -> dict[str, Any]:
        people = {f"annotator{i + 1}": vote for i, vote in enumerate(votes)}
        return {"instruction": "Sort.", "input": "b a", "response1": "a b", "response2": "b a", **people}

    for votes in itertools.product((0, 1, 2), repeat=3):
        vote = vote_from_row(row(*votes))
        assert isinstance(vote, Ranking)
        winner = next((choice for choice in (0, 1, 2) if votes.count(choice) >= 2), 0)
        assert vote.ranks == {0: (1, 1), 1: (1, 2), 2: (2, 1)}[winner]
        assert len(vote.votes) == 3 and vote.prompt == user("Sort.\n\nb a")
        if winner:
            assert vote.margin == pytest.approx(abs(votes.count(1) - votes.count(2)) / 3)
    assert vote_from_row(row(None, 2, None)) == vote_from_row({**row(2), "annotator3": None})
    boolean = vote_from_row({**row(1, 1, 1), "response2": True})  # a spreadsheet's TRUE
    assert isinstance(boolean, Ranking) and boolean.completions[1] == says("True")


@pytest.mark.parametrize(
    ("winner", "ranks"),
    [("model_a", (1, 2)), ("model_b", (2, 1)), ("tie", (1, 1)), ("tie (bothbad)", (1, 1)), ("A", (1, 2))],
)
def test_a_battle_says_who_won(winner: str, ranks: tuple[int, int]) -> None:
    vote = vote_from_row({"prompt": "2+2?", "response_a": "4", "response_b": "5", "winner": winner})
    assert vote == Ranking(user("2+2?"), (says("4"), says("5")), ranks)


def test_a_battle_of_several_turns_keeps_the_user_s_later_turns() -> None:
    a = [asked("hi"), answered("ho"), asked("more"), answered("he")]
    b = [asked("hi"), answered("hu"), asked("more"), answered("ha")]
    vote = vote_from_row({"conversation_a": a, "conversation_b": b, "winner": "model_b"})
    assert isinstance(vote, Ranking) and vote.prompt == user("hi") and vote.pairs() == [(1, 0)]
    assert [m.content for m in vote.completions[0]] == ["ho", "more", "he"]


def test_thumbs_are_paired_within_a_prompt_and_what_has_no_partner_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a?", "completion": "good", "label": True},
        {"prompt": "a?", "completion": "bad", "label": False},
        {"prompt": [asked("a?")], "completion": [answered("poor")], "label": 0},
        {"prompt": "b?", "completion": "fine", "label": "up"},
        {"prompt": "c?", "completion": "no", "label": False},
    ]
    found = read_comparisons(file_of(tmp_path, *rows))
    assert found.rankings == (Ranking(user("a?"), (says("good"), says("bad"), says("poor")), (1, 2, 2)),)
    assert found.form == "thumbs" and found.n_unpaired == 2 and found.n_pairs == 2
    assert pair_up([Thumb(user("a?"), says("x"), True), Thumb(user("a?"), says("x"), False)]) is None


def test_a_prompt_with_very_many_thumbs_keeps_both_sides() -> None:
    thumbs = [Thumb(user("a?"), says(str(i)), i < 500) for i in range(1000)]
    made = pair_up(thumbs)
    assert made is not None and len(made.ranks) == 64 and made.ranks.count(1) == made.ranks.count(2) == 32


def test_unranked_completions_are_left_out_and_votes_and_margin_survive_a_file(tmp_path: Path) -> None:
    row = {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [2, None, 1], "margin": 0.5,
           "votes": [[2, None, 1], [1, None, 2]]}  # fmt: skip
    path = file_of(tmp_path, row)
    expected = Ranking(user("q"), (says("a"), says("c")), (2, 1), votes=((2, 1), (1, 2)), margin=0.5)
    assert read_rankings(path) == [expected]
    write_rankings(tmp_path / "again.jsonl", [expected])
    assert list(read_comparisons(tmp_path / "again.jsonl").rankings) == [expected]


BAD = [
    ("{", "JSON"),
    ("[1]", "must be an object"),
    ({"a": 1}, "needs chosen"),
    ({"prompt": "q", "chosen": "same", "rejected": "same"}, "same text"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "same conversation"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"}, "begin differently"),
    ({"chosen": "text", "rejected": "other"}, "without a prompt"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": 5}, "must be text|without a prompt"),
    ({"prompt": "q", "completion": "a", "label": 0.5}, "true or false"),
    ({"prompt": "q", "completion": "a", "label": None}, "true or false"),
    ({"completion": "a", "label": True}, "no prompt"),
    ({"model_a": "x", "model_b": "y", "winner": "model_a"}, "no answers"),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "nobody"}, "winner must"),
    ({"instruction": "q", "response1": "a", "response2": "b", "annotator1": 3}, "annotator1 must"),
    ({"instruction": "q", "response1": "a", "annotator1": 1}, "needs response2"),
    ({"instruction": "q", "response1": "a", "response2": "b", "annotator1": None}, "nobody voted"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1}, "margin must"),
    ({"prompt": "q", "completions": ["a", "b"], "ranks": [1, None]}, "fewer than two"),
    ({"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2], "votes": [[1]]}, "one rank to each"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_by_line_and_costs_only_itself(row: Any, reason: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, SAME_QUESTION["pairs"], "", row, SAME_QUESTION["pairs"])
    found = read_comparisons(path)
    assert len(found.rankings) == 2 and found.n_faults == 1 and found.n_rows == 3
    assert found.faults[0].startswith(f"{path}:3: ") and "1 bad rows" in found.told()
    with pytest.raises(DataError, match=reason):
        found.strict()


def test_a_file_without_a_comparison_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_comparisons(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no comparison"):
        read_comparisons(file_of(tmp_path))
    with pytest.raises(DataError, match="both a liked and a disliked"):
        read_comparisons(file_of(tmp_path, {"prompt": "q", "completion": "a", "label": True}))
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(DataError, match="cut short"):
        read_comparisons(cut)


def test_a_gzip_of_one_endless_line_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vote_file, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(bytes(1 << 20))
        file.write(b"\n" + json.dumps(SAME_QUESTION["pairs"]).encode())
    tracemalloc.start()
    found = read_comparisons(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.n_faults == 1 and "longer than" in found.faults[0] and found.rankings == (BETTER,)
    assert peak < 12 << 20
    monkeypatch.setattr(vote_file, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="divide it"):
        read_comparisons(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "model_a", "tie", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "function", "name"]), inner, max_size=4)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", 3]), "content": inner}),
    max_leaves=8,
)  # fmt: skip
KEYS = ["prompt", "chosen", "rejected", "completions", "ranks", "completion", "label", "winner", "conversation_a",
        "conversation_b", "response_a", "response_b", "instruction", "input", "response1", "response2", "annotator1",
        "annotator2", "margin", "votes", "problem"]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=7), st.sampled_from(sorted(SAME_QUESTION)))
def test_any_row_is_a_vote_or_one_sentence(row: dict[str, Any], base: str) -> None:
    for mixed in (row, {**SAME_QUESTION[base], **row}):
        try:
            vote = vote_from_row(mixed)
        except DataError as fault:
            assert "\n" not in str(fault) and len(str(fault)) < 400
            continue
        assert form_of(mixed) in FORMS
        if isinstance(vote, Ranking):
            assert len(vote.completions) == len(vote.ranks) >= 2 and min(vote.ranks) >= 1
            for conversation in (vote.prompt, *vote.completions):
                assert "".join(m.content for m in conversation).encode() is not None
                assert conversation
        else:
            assert isinstance(vote.liked, bool)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300), packed=st.booleans(), tail=st.booleans())
def test_any_bytes_are_votes_or_one_sentence(data: bytes, packed: bool, tail: bool, tmp_path: Path) -> None:
    path = tmp_path / "any"
    content = data + (b"\n" + json.dumps(SAME_QUESTION["pairs"]).encode() if tail else b"")
    path.write_bytes(gzip.compress(content) if packed else content)
    try:
        found = read_comparisons(path)
    except DataError as fault:
        assert len(str(fault)) < 800
    else:
        assert found.rankings
