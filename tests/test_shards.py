"""Shards: what is written comes back, and a damaged file is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stateofgpt.data.shards import Shards, read_part, write_index, write_part
from stateofgpt.errors import DataError

DOCUMENTS = {
    "prose": {"train": [[0, 7, 8, 9], [0, 10], [0, 11, 12]], "validation": [[0, 13, 14]]},
    "code": {"train": [[0, 6]], "validation": []},
}
TOKEN_BYTES = [0] * 6 + [1] * 6 + [3] * 8


def write(folder: Path, token_bytes: list[int] = TOKEN_BYTES) -> Path:
    sizes = np.array(token_bytes)
    parts = {
        name: {split: write_part(folder, name, split, documents, sizes) for split, documents in splits.items()}  # type: ignore[arg-type]
        for name, splits in DOCUMENTS.items()
    }
    write_index(folder, parts, "the tokenizer", token_bytes)  # type: ignore[arg-type]
    return folder


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    shards = Shards.open(write(tmp_path))
    assert shards.sources == ["prose", "code"] and shards.tokenizer_sha256 == "the tokenizer"
    assert shards.tokens("prose").tolist() == [0, 7, 8, 9, 0, 10, 0, 11, 12]
    assert shards.tokens("prose").dtype == np.uint16
    assert shards.lengths("prose").tolist() == [4, 2, 3]
    assert shards.documents("prose") == 3 and shards.documents("prose", "validation") == 1
    assert shards.bytes("prose") == 1 + 1 + 1 + 1 + 1 + 3 and shards.bytes("prose", "validation") == 6
    assert len(shards.tokens("code", "validation")) == 0 and shards.lengths("code", "validation").tolist() == []
    assert shards.token_bytes.tolist() == TOKEN_BYTES
    shards.verify()


def test_a_vocabulary_past_65536_takes_four_bytes_a_token(tmp_path: Path) -> None:
    assert Shards.open(write(tmp_path, TOKEN_BYTES + [1] * 65536)).tokens("prose").dtype == np.uint32


def test_an_unknown_source_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prose, code"):
        Shards.open(write(tmp_path)).tokens("poems")


@pytest.mark.parametrize("name", ["prose.train.bin", "prose.train.offsets.bin", "token_bytes.bin", "index.json"])
def test_a_file_cut_short_is_found_at_opening_and_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=name):
        Shards.open(tmp_path)


@pytest.mark.parametrize("name", ["prose.train.bin", "token_bytes.bin", "code.train.bin"])
def test_a_flipped_bit_is_found_by_verify_and_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    shards = Shards.open(tmp_path)
    with pytest.raises(DataError, match=name):
        shards.verify()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / "code.train.bin").unlink()
    with pytest.raises(DataError, match=r"code\.train\.bin is damaged: it is missing"):
        Shards.open(tmp_path)


def test_offsets_that_do_not_fit_are_found_at_opening(tmp_path: Path) -> None:
    write(tmp_path)
    for offsets in ([0, 6, 4, 9], [0, 4, 6, 10], [1, 4, 6, 9], [0, 4, 4, 9]):
        (tmp_path / "prose.train.offsets.bin").write_bytes(np.array(offsets, "<i8").tobytes())
        with pytest.raises(DataError, match="offsets"):
            Shards.open(tmp_path)


def test_swapped_parts_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    sources = index["sources"]
    sources["prose"]["train"]["file"], sources["code"]["train"]["file"] = "code.train.bin", "prose.train.bin"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="damaged"):
        Shards.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"sources": 3}, {"sources": {"a": {"train": {}}}}, {"vocab_size": "x"}, {"vocab_size": -1}],
)
def test_an_index_with_nonsense_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(DataError, match=r"index\.json|token_bytes"):
        Shards.open(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["sources"]["prose"]["train"]["file"] = "../../etc/passwd"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="never writes"):
        Shards.open(tmp_path)


def test_a_folder_without_shards_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sog tokenize"):
        Shards.open(tmp_path)


def test_a_finished_part_is_kept_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_part(tmp_path, "prose", "train") is not None
    assert read_part(tmp_path, "poems", "train") is None
    (tmp_path / "prose.train.bin").write_bytes(b"1")
    assert read_part(tmp_path, "prose", "train") is None
    (tmp_path / "code.train.json").write_text("{")
    assert read_part(tmp_path, "code", "train") is None
