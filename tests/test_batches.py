"""The order of data: a pure function of seed and row, true to the shares, and every token once per epoch."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateofgpt.data.batches import PretrainBatches, validation_rows
from stateofgpt.data.shards import Shards, write_index, write_part
from stateofgpt.errors import ConfigError, DataError

WEIGHTS = {"prose": 0.5, "code": 0.3, "tiny": 0.2}


def make(folder: Path) -> Shards:
    """Three sources whose ids tell them apart; every document is unlike the others."""
    rng = random.Random(0)
    token_bytes = [0] * 6 + [number % 5 + 1 for number in range(994)]
    parts = {}
    for name, low, n in (("prose", 100, 50), ("code", 400, 30), ("tiny", 700, 2)):
        documents = [[0, *(rng.randrange(low, low + 250) for _ in range(rng.randint(1, 40)))] for _ in range(n)]
        parts[name] = {
            "train": write_part(folder, name, "train", documents, np.array(token_bytes)),
            "validation": write_part(folder, name, "validation", documents[:4], np.array(token_bytes)),
        }
    write_index(folder, parts, "", token_bytes)
    return Shards.open(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("shards"))


def source_of(row: np.ndarray) -> str:
    return {1: "prose", 2: "prose", 3: "prose", 4: "code", 5: "code", 6: "code"}.get(int(row.max()) // 100, "tiny")


def test_rows_and_batches_are_the_same_pure_function(shards: Shards) -> None:
    one, two = (PretrainBatches(shards, WEIGHTS, 8, 16, 3, 400) for _ in range(2))
    late = one.batch(30)
    everything = two.rows(0, 400)
    for step in (30, 0, 7):
        inputs, targets = one.batch(step)
        assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == targets.shape == (8, 16)
        assert (inputs == everything[0][step * 8 : step * 8 + 8]).all()
        assert (targets == everything[1][step * 8 : step * 8 + 8]).all()
    assert (late[0] == one.rows(240, 8)[0]).all()
    assert (one.batch(0)[0] != PretrainBatches(shards, WEIGHTS, 8, 16, 4, 400).batch(0)[0]).any()


def test_targets_are_the_inputs_one_further(shards: Shards) -> None:
    inputs, targets = PretrainBatches(shards, WEIGHTS, 8, 16, 0, 100).rows(0, 100)
    assert (inputs[:, 1:] == targets[:, :-1]).all()


def test_the_shares_are_exact_at_the_end_and_close_at_every_moment(shards: Shards) -> None:
    batches = PretrainBatches(shards, WEIGHTS, 10, 16, 0, 1000)
    inputs, _ = batches.rows(0, 1000)
    names = [source_of(row) for row in inputs]
    assert Counter(names) == {"prose": 500, "code": 300, "tiny": 200}
    assert batches.share() == WEIGHTS
    for n in range(1, 1001):
        seen = Counter(names[:n])
        assert all(abs(seen[name] - share * n) <= 2 for name, share in WEIGHTS.items())


@pytest.mark.parametrize("context", [1, 7, 16, 300])
def test_each_epoch_of_a_source_has_every_document_once_in_a_new_order(shards: Shards, context: int) -> None:
    for name in WEIGHTS:
        n = len(shards.tokens(name))
        rows = -(-3 * n // context)
        batches = PretrainBatches(shards, {name: 1.0}, 1, context, 5, rows)
        stream = batches.rows(0, rows)[0].ravel()[: 3 * n]
        offsets = shards.offsets(name)
        documents = sorted(tuple(shards.tokens(name)[a:b].tolist()) for a, b in pairwise(offsets))
        orders = []
        for epoch in range(3):
            ids = stream[epoch * n : (epoch + 1) * n]
            starts = [*np.flatnonzero(ids == 0).tolist(), n]
            orders.append([tuple(ids[a:b].tolist()) for a, b in pairwise(starts)])
            assert sorted(orders[-1]) == documents
        if len(documents) > 5:
            assert orders[0] != orders[1] != orders[2]
        assert batches.epochs()[name] == pytest.approx(rows * context / n)


def test_rows_of_one_source_follow_each_other_without_a_gap(shards: Shards) -> None:
    mixed = PretrainBatches(shards, WEIGHTS, 10, 16, 9, 500)
    alone = PretrainBatches(shards, {"code": 1.0}, 10, 16, 9, 150)
    inputs, targets = mixed.rows(0, 500)
    code = [number for number in range(500) if source_of(inputs[number]) == "code"]
    assert (inputs[code] == alone.rows(0, 150)[0]).all() and (targets[code] == alone.rows(0, 150)[1]).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_growing_batch_reads_the_same_rows(shards: Shards, sizes: list[int]) -> None:
    batches = PretrainBatches(shards, WEIGHTS, 4, 8, 1, 200)
    pieces, start = [], 0
    for n in sizes:
        pieces.append(batches.rows(start, n)[0])
        start += n
    assert (np.concatenate(pieces) == batches.rows(0, start)[0]).all()


def test_reading_past_the_planned_rows_goes_on_with_the_same_shares(shards: Shards) -> None:
    batches = PretrainBatches(shards, WEIGHTS, 10, 16, 0, 100)
    names = Counter(source_of(row) for row in batches.rows(100, 100)[0])
    assert names == {"prose": 50, "code": 30, "tiny": 20}
    assert (batches.rows(100, 10)[0] != batches.rows(0, 10)[0]).any()


def test_a_source_of_weight_zero_is_not_read(shards: Shards) -> None:
    batches = PretrainBatches(shards, {"prose": 1, "code": 0}, 10, 16, 0, 100)
    assert set(batches.share()) == {"prose"}


def test_what_cannot_be_read_is_refused(shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="poems"):
        PretrainBatches(shards, {"poems": 1}, 10, 16, 0, 100)
    with pytest.raises(ConfigError, match="weight"):
        PretrainBatches(shards, {"prose": -1}, 10, 16, 0, 100)
    with pytest.raises(ConfigError, match="at least 1"):
        PretrainBatches(shards, WEIGHTS, 10, 0, 0, 100)
    empty = {"train": write_part(tmp_path, "empty", "train", [], np.zeros(10, int))}
    write_index(tmp_path, {"empty": empty}, "", [0] * 10)  # type: ignore[dict-item]
    with pytest.raises(DataError, match="empty"):
        PretrainBatches(Shards.open(tmp_path), {"empty": 1}, 10, 16, 0, 100)


@pytest.mark.parametrize("context", [4, 16, 1000])
def test_validation_predicts_every_token_of_text_once_and_counts_its_bytes(shards: Shards, context: int) -> None:
    inputs, targets, mask, n_bytes = validation_rows(shards, "prose", context, 10**6)
    held_out = shards.tokens("prose", "validation")
    text = held_out[held_out != 0]
    assert targets[mask == 1].tolist() == text.tolist()
    assert inputs.shape == targets.shape == mask.shape and mask.dtype == np.float32
    assert n_bytes == shards.bytes("prose", "validation")
    flat = inputs.ravel()[: len(held_out) - 1]
    assert flat.tolist() == held_out[:-1].tolist()


def test_validation_keeps_to_the_asked_tokens(shards: Shards) -> None:
    _, targets, mask, n_bytes = validation_rows(shards, "prose", 8, 20)
    assert 0 < mask.sum() <= 20 and targets.shape == (3, 8)
    assert n_bytes == sum(int(shards.token_bytes[number]) for number in targets[mask == 1])


def test_validation_without_text_has_no_rows(tmp_path: Path) -> None:
    parts = {split: write_part(tmp_path, "a", split, [], np.zeros(10, int)) for split in ("train", "validation")}  # type: ignore[arg-type]
    write_index(tmp_path, {"a": parts}, "", [0] * 10)  # type: ignore[dict-item]
    inputs, _, _, n_bytes = validation_rows(Shards.open(tmp_path), "a", 8, 100)
    assert inputs.shape == (0, 8) and n_bytes == 0


def test_a_batch_takes_milliseconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [np.r_[0, rng.integers(6, 4096, 300)] for _ in range(5000)]
    parts = {"a": {"train": write_part(tmp_path, "a", "train", documents, np.ones(4096, int))}}  # type: ignore[arg-type]
    write_index(tmp_path, parts, "", [1] * 4096)  # type: ignore[arg-type]
    batches = PretrainBatches(Shards.open(tmp_path), {"a": 1}, 64, 256, 0, 20_000)
    batches.batch(0)
    seconds = []
    for step in range(20):
        start = time.perf_counter()
        batches.batch(step)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005  # 0.001 on an idle machine; the minimum, because tests run beside others
