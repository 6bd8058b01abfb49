"""Collect: gather texts from every source of the mixture, clean them, and set some aside for validation.

Owns: which sources a run reads and how much of each, de-duplication across them, and where the stage keeps its
documents. Knows nothing of tokens. One file per source and split, and a receipt per source that is written last: a
killed stage reads only the sources again that have none.

    collect/NAME.train.jsonl  NAME.validation.jsonl  NAME.json
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateofgpt.data.corpora import embedded
from stateofgpt.data.documents import (
    Account,
    clean,
    digest,
    find_files,
    is_validation,
    read_documents,
    read_files,
    write_documents,
)
from stateofgpt.data.mixture import plan, shares, size, table, with_corpus
from stateofgpt.data.shards import SPLITS, Split
from stateofgpt.errors import ConfigError, DataError
from stateofgpt.run import Run, Stage, read_json, write_json

CORPUS = "corpus"  # the name of the user's own source
_MOST_REPEATS = 10_000  # duplicates in a row after which a generator is taken to have no more
_SHOWN_WARNINGS = 10


@dataclass(frozen=True)
class SourceConfig:
    """A source of the embedded default (`data.corpora`): its weight in training, and how many bytes of it to keep."""

    name: str
    weight: float
    max_bytes: int


DEFAULT_SOURCES = (  # 9.4 MB; skills first, because what the assistant is asked must be well known to its base model
    SourceConfig("skills", 0.40, 3_600_000),
    SourceConfig("dialogues", 0.17, 1_900_000),
    SourceConfig("dictionary", 0.11, 1_200_000),
    SourceConfig("bible", 0.08, 800_000),
    SourceConfig("python_prose", 0.05, 460_000),
    SourceConfig("python_docstrings", 0.08, 600_000),
    SourceConfig("python_source", 0.11, 850_000),
)


@dataclass(frozen=True)
class Config:
    """What to collect. `corpus` are the user's own folders and files (.txt, .md, .py, .jsonl with `text`), which get
    `corpus_weight` of the mixture; the embedded sources share what is left by their weights."""

    sources: tuple[SourceConfig, ...] = DEFAULT_SOURCES
    corpus: tuple[str, ...] = ()
    corpus_weight: float = 0.5
    corpus_max_bytes: int = 16_000_000
    fewest_corpus_bytes: int = 10_000
    validation_share: float = 0.02
    most_characters: int = 8_000  # longer texts are split into documents of this size

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share is {self.validation_share}; it must be between 0 and 1")
        if self.most_characters < 256:
            raise ConfigError(f"most_characters is {self.most_characters}; it must be 256 or more")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names) or CORPUS in names:
            raise ConfigError(f'each source can be named once, and none "{CORPUS}"; there are {", ".join(names)}')

    def weights(self) -> dict[str, float]:
        """The share of each source that is read, the user's corpus included; they add up to 1."""
        given = {source.name: source.weight for source in self.sources if source.weight != 0}
        return with_corpus(given, CORPUS, self.corpus_weight) if self.corpus else shares(given)


def run(config: Config, run: Run) -> dict[str, Any]:
    """Collect the documents; returns {"sources": [a row of the mixture table each], "warnings": [...]}."""
    stage = run.stage("collect")
    if (done := stage.result()) is not None:
        return done
    with stage.timed():
        rows: list[dict[str, Any]] = []
        seen: set[bytes] = set()
        for name, weight in config.weights().items():
            receipt = stage.dir / f"{name}.json"
            if receipt.exists():
                for split in SPLITS:
                    seen.update(map(digest, read_documents(_path(stage, name, split))))
            else:
                write_json(receipt, _collect(config, stage, run.seed, name, seen))
            rows.append({"name": name, "weight": weight, **read_json(receipt)})
        warnings = [f"{row['name']}: {warning}" for row in rows for warning in row.pop("warnings")]
        result = {"sources": rows, "warnings": warnings}
        _show(result)
        stage.finish(result)
    return result


def documents_of(run: Run, source: str, split: Split) -> list[str]:
    """The documents that were collected from a source, in a seeded order."""
    return read_documents(_path(run.stage("collect"), source, split))


def _collect(config: Config, stage: Stage, seed: int, name: str, seen: set[bytes]) -> dict[str, Any]:
    """Gather and store one source; what its receipt says."""
    rng = random.Random(f"collect {seed} {name}")
    account = Account()
    if name == CORPUS:
        files = find_files(config.corpus, account)
        texts, max_bytes = read_files(files, rng, account), config.corpus_max_bytes
    else:
        texts = embedded(name, rng)
        max_bytes = next(source.max_bytes for source in config.sources if source.name == name)
    documents, n_bytes = _gather(texts, max_bytes, config.most_characters, account, seen)
    if name == CORPUS:
        _check_corpus(config, account, n_bytes, sum(file.stat().st_size for file in files))
    if len(documents) < 2:
        raise DataError(f"the source {name} has {len(documents)} documents; at least 2 are needed")
    rng.shuffle(documents)
    splits = _split(documents, config.validation_share)
    for split, chosen in splits.items():
        write_documents(_path(stage, name, split), chosen)
    sizes = {split: sum(len(text.encode()) for text in chosen) for split, chosen in splits.items()}
    return {
        "documents": len(splits["train"]),
        "bytes": sizes["train"],
        "validation_documents": len(splits["validation"]),
        "validation_bytes": sizes["validation"],
        "dropped": dict(sorted(account.dropped.items())),
        "warnings": account.warnings,
    }


def _gather(
    texts: Iterator[str], max_bytes: int, most_characters: int, account: Account, seen: set[bytes]
) -> tuple[list[str], int]:
    """Clean documents up to `max_bytes`, none that was seen before, and their size."""
    kept: list[str] = []
    n_bytes = repeats = 0
    for text in texts:
        for document in clean(text, account, most_characters):
            identity = digest(document)
            if identity in seen:
                account.drop("duplicate")
                repeats += 1
                continue
            seen.add(identity)
            kept.append(document)
            n_bytes += len(document.encode())
            repeats = 0
            if n_bytes >= max_bytes:
                return kept, n_bytes
        if repeats > _MOST_REPEATS:
            break
    return kept, n_bytes


def _check_corpus(config: Config, account: Account, n_bytes: int, there: int) -> None:
    if n_bytes < config.fewest_corpus_bytes:
        drops = ", ".join(f"{n} {reason}" for reason, n in sorted(account.dropped.items())) or "nothing"
        raise DataError(
            f"the corpus {', '.join(config.corpus)} holds {n_bytes} bytes of text after cleaning (dropped: {drops}); "
            f"at least {config.fewest_corpus_bytes} are needed, so add more text"
        )
    if n_bytes >= config.corpus_max_bytes:
        account.warnings.append(
            f"kept {size(n_bytes)} of a corpus of {size(there)}; raise --collect.corpus_max_bytes to keep more"
        )


def _split(documents: list[str], validation_share: float) -> dict[Split, list[str]]:
    """Train and validation by each document's hash. A source whose hashes hold out none, or all, still has one of each:
    the document with the lowest hash is held out, the one with the highest is not."""
    identities = [digest(text) for text in documents]
    lowest, highest = min(identities), max(identities)
    splits: dict[Split, list[str]] = {"train": [], "validation": []}
    for text, identity in zip(documents, identities, strict=True):
        held_out = identity == lowest or (is_validation(identity, validation_share) and identity != highest)
        splits["validation" if held_out else "train"].append(text)
    return splits


def _path(stage: Stage, source: str, split: Split) -> Path:
    return stage.dir / f"{source}.{split}.jsonl"


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console  # only when something is printed

    console = Console(highlight=False, markup=False)
    for warning in result["warnings"][:_SHOWN_WARNINGS]:
        console.print(f"warning: {warning}", soft_wrap=True)
    if len(result["warnings"]) > _SHOWN_WARNINGS:
        console.print(f"warning: {len(result['warnings']) - _SHOWN_WARNINGS} more are in the stage's result.json")
    console.print(table(plan(result["sources"], {}), title="Collected"))
