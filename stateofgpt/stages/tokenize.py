"""Tokenize: train the tokenizer on the mixture (or take that of the model the run begins from), and turn every document
into ids.

Owns: the sample the tokenizer learns from, and the stage's folder, which is at once a tokenizer (`Tokenizer.load`) and
its shards (`Shards.open`). Knows nothing of models. Each part is written with its receipt last: a killed stage makes
only the missing ones, and the files are the same bytes as without the kill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stateofgpt.data.mixture import as_json, plan, table
from stateofgpt.data.shards import SPLITS, Ids, Marks, Part, Split, read_part, write_index, write_part
from stateofgpt.errors import CheckpointError, ConfigError, RunError
from stateofgpt.run import Run
from stateofgpt.stages.collect import documents_of
from stateofgpt.text.tokenizer import SMALLEST_VOCABULARY, Tokenizer

_BATCH = 1024  # documents encoded at once


@dataclass(frozen=True)
class Config:
    """The tokenizer's size, how many digits share a token (1 to 3), how many bytes of the mixture it learns from.

    With `parent`, the folder of a model, its tokenizer is taken as it is and the others do not matter."""

    vocab_size: int = 4096
    digits_per_token: int = 1
    train_bytes: int = 6_000_000
    parent: str | None = None

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(f"vocab_size is {self.vocab_size}; it must be {SMALLEST_VOCABULARY} or more")
        if not 1 <= self.digits_per_token <= 3:
            raise ConfigError(f"digits_per_token is {self.digits_per_token}; it must be 1, 2 or 3")


def run(config: Config, run: Run) -> dict[str, Any]:
    """Make tokenizer and shards; returns vocab_size, bytes_per_token and tokens per source, and the mixture's rows."""
    stage = run.stage("tokenize")
    if (done := stage.result()) is not None:
        return done
    collected = run.stage("collect").result()
    if collected is None:
        raise RunError(f"{run.root} has no collected texts yet; run `sog collect` first")
    sources: list[dict[str, Any]] = collected["sources"]
    with stage.timed():
        tokenizer = _tokenizer(config, run, sources)
        lengths = [len(tokenizer.decode_bytes([number], inner=True)) for number in range(tokenizer.vocab_size)]
        token_bytes = np.array(lengths)
        parts = {
            source["name"]: {split: _part(run, source["name"], split, tokenizer, token_bytes) for split in SPLITS}
            for source in sources
        }
        write_index(stage.dir, parts, tokenizer.sha256, lengths, _marks(tokenizer))
        result = _result(tokenizer, parts, sources)
        stage.finish(result)
    return result


def sample(run: Run, sources: Sequence[dict[str, Any]], n_bytes: int) -> Iterator[str]:
    """Training documents of the sources by their weights, `n_bytes` in all; a source that has less gives all it has."""
    total = sum(source["weight"] for source in sources)
    for source in sources:
        left = int(n_bytes * source["weight"] / total)
        for text in documents_of(run, source["name"], "train"):
            if left <= 0:
                break
            left -= len(text.encode())
            yield text


def _tokenizer(config: Config, run: Run, sources: Sequence[dict[str, Any]]) -> Tokenizer:
    """The run's tokenizer: the one a killed attempt had saved, else a new one."""
    folder = run.stage("tokenize").dir
    try:
        return Tokenizer.load(folder)
    except CheckpointError:
        if config.parent is not None:
            tokenizer = Tokenizer.load(config.parent)
        else:
            texts = sample(run, sources, config.train_bytes)
            tokenizer = Tokenizer.train(texts, config.vocab_size, config.digits_per_token)
        tokenizer.save(folder)
        return tokenizer


def _part(run: Run, name: str, split: Split, tokenizer: Tokenizer, token_bytes: Ids) -> Part:
    folder = run.stage("tokenize").dir
    return read_part(folder, name, split) or write_part(
        folder, name, split, _encoded(tokenizer, documents_of(run, name, split)), token_bytes, _marks(tokenizer)
    )


def _marks(tokenizer: Tokenizer) -> Marks:
    return Marks(tokenizer.eot, tokenizer.pad, tokenizer.dummy_space)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _BATCH):
        for ids in tokenizer.encode_batch(texts[start : start + _BATCH]):
            yield [tokenizer.eot, *ids]


def _result(
    tokenizer: Tokenizer, parts: dict[str, dict[Split, Part]], sources: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    from rich.console import Console  # only when something is printed

    tokens = {name: splits["train"].tokens for name, splits in parts.items()}
    n_bytes = {name: splits["train"].bytes for name, splits in parts.items()}
    rows = plan(sources, tokens)
    Console(highlight=False, markup=False).print(table(rows, title=f"Tokenized, {tokenizer.vocab_size:,} tokens"))
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "bytes_per_token": {
            **{name: n_bytes[name] / tokens[name] for name in tokens},
            "all": sum(n_bytes.values()) / sum(tokens.values()),
        },
        "tokens": tokens,
        "validation_tokens": {name: splits["validation"].tokens for name, splits in parts.items()},
        "sources": as_json(rows),
    }
