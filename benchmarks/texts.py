"""The data of the benchmarks of training: one text file, as characters or as byte-pair tokens, split once.

Owns the folder in which both sides find the same ids: `train.npy`, `validation.npy` (the last tenth of the text, as is
the custom for this recipe) and `corpus.json`; and which windows of that tenth both sides are asked: at most 120,000
tokens from all over it, because a long text must not make this a benchmark of measuring.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HELD_OUT = 120_000  # tokens


@dataclass(frozen=True)
class Corpus:
    """Ids of a text. `train` and `validation` are flat arrays; `bytes_per_token` is that of the last tenth."""

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    bytes_per_token: float

    @staticmethod
    def open(folder: Path) -> Corpus:
        """The corpus that `prepare` wrote."""
        about = json.loads((folder / "corpus.json").read_text())
        parts = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("train", "validation"))
        return Corpus(*parts, about["vocab_size"], about["bytes_per_token"])


def prepare(text: str, folder: Path, vocab_size: int | None = None) -> Corpus:
    """Split and encode a text: by characters, or with a byte-pair vocabulary trained on the training part."""
    cut = int(len(text) * 0.9)
    parts = {"train": text[:cut], "validation": text[cut:]}
    if vocab_size is None:
        index = {character: number for number, character in enumerate(sorted(set(text)))}
        ids = {name: [index[c] for c in part] for name, part in parts.items()}
        size = len(index)
    else:
        from stateofgpt.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.train([parts["train"][i : i + 5000] for i in range(0, cut, 5000)], vocab_size)
        ids = {name: tokenizer.encode(part) for name, part in parts.items()}
        size = -(-tokenizer.vocab_size // 64) * 64
    folder.mkdir(parents=True, exist_ok=True)
    ratio = len(parts["validation"].encode()) / len(ids["validation"])
    for name, numbers in ids.items():
        np.save(folder / f"{name}.npy", np.asarray(numbers, np.uint16), allow_pickle=False)
    (folder / "corpus.json").write_text(json.dumps({"vocab_size": size, "bytes_per_token": ratio}))
    return Corpus.open(folder)


def validation_windows(corpus: Corpus, context: int, at_once: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole windows of the held-out part, evenly from all of it: (ids, targets) [<= at_once, context]."""
    n = (len(corpus.validation) - 1) // context
    ids = corpus.validation[: n * context].astype(np.int64).reshape(n, context)
    targets = corpus.validation[1 : n * context + 1].astype(np.int64).reshape(n, context)
    asked = np.linspace(0, n - 1, min(n, HELD_OUT // context)).round().astype(np.int64)
    for i in range(0, len(asked), at_once):
        yield ids[asked[i : i + at_once]], targets[asked[i : i + at_once]]


def make_up(folder: Path, n_tokens: int, vocab_size: int, length: int = 1024, seed: int = 0) -> Corpus:
    """Ids that nobody wrote, for machines without a text; the last 200 documents, or a tenth if that is less, are held
    out.

    A document of `length` ids has a topic and a distance. Its next id is one of 16 successors of the last one, the
    likely ones first (45 %), one of its topic's own (40 %), or the one that stood at its distance before (15 %): there
    are tables to be learned, something to infer from what was read, and noise that nothing predicts.
    """
    rng = np.random.default_rng(seed)
    rows = max(10, n_tokens // length)
    successors = rng.integers(0, vocab_size, (vocab_size, 16), dtype=np.int32)
    topics = rng.integers(0, vocab_size, (64, 256), dtype=np.int32)
    topic, distance = rng.integers(0, 64, rows), rng.integers(2, min(64, length // 2), rows)
    out = np.empty((length, rows), np.uint16)
    out[0] = rng.integers(0, vocab_size, rows)
    every = np.arange(rows)
    for t in range(1, length):
        kind = rng.random(rows)
        rank = (16 ** rng.random(rows)).astype(np.int32) - 1  # Zipf, nearly
        own = (256 ** rng.random(rows)).astype(np.int32) - 1
        back = out[np.maximum(0, t - distance), every]
        out[t] = np.where(kind < 0.45, successors[out[t - 1], rank], np.where(kind < 0.85, topics[topic, own], back))
    ids, held_out = np.ascontiguousarray(out.T), min(200, rows // 10)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train.npy", ids[:-held_out].reshape(-1), allow_pickle=False)
    np.save(folder / "validation.npy", ids[-held_out:].reshape(-1), allow_pickle=False)
    (folder / "corpus.json").write_text(json.dumps({"vocab_size": vocab_size, "bytes_per_token": 0.0}))
    return Corpus.open(folder)
