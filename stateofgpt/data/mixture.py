"""The mixture: which share of training each source gets, and the table that says so as LLaMA's does.

Owns: turning weights into shares, the user's corpus beside the embedded sources, tokens and epochs for a planned number
of tokens, and the printed table (source, weight, documents, size, tokens, epochs: LLaMA paper, arXiv 2302.13971, table
1). Knows nothing of files, tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from stateofgpt.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class MixtureRow:
    """One source. `bytes` and `tokens` are those of its training documents; `share` is its part of what is trained on,
    and `epochs` how often that passes over it. What is not known yet is None."""

    name: str
    weight: float
    documents: int
    bytes: int
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int | None = None
    share: float | None = None
    epochs: float | None = None


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights scaled to a sum of 1. ConfigError when one is negative, or none is above zero."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"the weight of {name} is {weight}; it must be 0 or more")
    total = sum(weights.values())
    if not total > 0:
        raise ConfigError("all weights of the mixture are 0; give at least one source a weight above 0")
    return {name: weight / total for name, weight in weights.items()}


def with_corpus(weights: Mapping[str, float], corpus_name: str, corpus_share: float) -> dict[str, float]:
    """The shares when the user's corpus gets `corpus_share` of all, and the embedded sources what is left."""
    if not 0 < corpus_share <= 1:
        raise ConfigError(f"corpus_weight is {corpus_share}; it must be above 0 and at most 1")
    if not any(weights.values()):
        return {corpus_name: 1.0}
    left = {name: share * (1 - corpus_share) for name, share in shares(weights).items()}
    return {**left, corpus_name: corpus_share}


def plan(
    sources: Iterable[Mapping[str, Any]], tokens: Mapping[str, int], planned: int | None = None
) -> list[MixtureRow]:
    """The table's rows from the result of collect (`sources`) and of tokenize (`tokens` per source). With the `planned`
    number of training tokens also the epochs: share * planned / tokens."""
    found = [dict(source) for source in sources]
    parts = shares({source["name"]: source["weight"] for source in found})
    rows = []
    for source in found:
        n, share = tokens.get(source["name"]), parts[source["name"]]
        rows.append(
            MixtureRow(
                name=source["name"],
                weight=source["weight"],
                documents=source["documents"],
                bytes=source["bytes"],
                dropped=dict(source.get("dropped", {})),
                tokens=n,
                share=share,
                epochs=share * planned / n if planned is not None and n else None,
            )
        )
    return rows


def as_json(rows: Sequence[MixtureRow]) -> list[dict[str, Any]]:
    """The rows as the summary stores them."""
    return [asdict(row) for row in rows]


def table(rows: Sequence[MixtureRow], title: str = "The mixture") -> Table:
    """The rows as LLaMA's table; columns of which nothing is known yet are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table  # only when something is printed

    made = Table(title=title, title_justify="left", show_footer=True, box=SIMPLE_HEAD)
    columns: list[tuple[str, list[str], str]] = [
        ("source", [row.name for row in rows], "all"),
        ("share", [f"{row.share or row.weight:.1%}" for row in rows], ""),
        ("documents", [f"{row.documents:,}" for row in rows], f"{sum(row.documents for row in rows):,}"),
        ("size", [size(row.bytes) for row in rows], size(sum(row.bytes for row in rows))),
    ]
    if any(row.tokens is not None for row in rows):
        counts = [row.tokens or 0 for row in rows]
        columns.append(("tokens", [f"{n:,}" for n in counts], f"{sum(counts):,}"))
        columns.append(("bytes/token", [f"{row.bytes / row.tokens:.2f}" if row.tokens else "" for row in rows], ""))
    else:
        columns.append(("dropped", [_drops(row.dropped) for row in rows], ""))
    if any(row.epochs is not None for row in rows):
        columns.append(("epochs", [f"{row.epochs:.2f}" if row.epochs is not None else "" for row in rows], ""))
    for head, _, foot in columns:
        made.add_column(head, footer=foot, justify="left" if head in ("source", "dropped") else "right")
    for cells in zip(*(cells for _, cells, _ in columns), strict=True):
        made.add_row(*cells)
    return made


def _drops(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items())


def size(n_bytes: float) -> str:
    """Bytes for a reader: 464.9 kB, 3.3 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
