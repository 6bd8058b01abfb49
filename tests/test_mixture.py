"""The mixture: shares, epochs and the table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from stateofgpt.data.mixture import as_json, plan, shares, size, table, with_corpus
from stateofgpt.errors import ConfigError

# LLaMA paper (arXiv 2302.13971), table 1: sampling proportion, epochs over a run of 1.4T tokens, size in GB.
LLAMA = {
    "CommonCrawl": (0.67, 1.10, 3300),
    "C4": (0.15, 1.06, 783),
    "Github": (0.045, 0.64, 328),
    "Wikipedia": (0.045, 2.45, 83),
    "Books": (0.045, 2.23, 85),
    "ArXiv": (0.025, 1.06, 92),
    "StackExchange": (0.02, 1.03, 78),
}


def llama_sources() -> list[dict[str, object]]:
    return [
        {"name": name, "weight": share, "documents": 10, "bytes": gigabytes * 10**9, "dropped": {"duplicate": 2}}
        for name, (share, _, gigabytes) in LLAMA.items()
    ]


def test_shares_add_up_to_one_and_keep_proportions() -> None:
    assert shares({"a": 3, "b": 1, "c": 0}) == {"a": 0.75, "b": 0.25, "c": 0.0}


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": float("nan")}, {"a": float("inf")}])
def test_impossible_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        shares(weights)


def test_a_corpus_gets_its_share_and_the_rest_keeps_its_proportions() -> None:
    assert with_corpus({"a": 3, "b": 1}, "corpus", 0.5) == {"a": 0.375, "b": 0.125, "corpus": 0.5}
    assert with_corpus({}, "corpus", 0.5) == {"corpus": 1.0}
    with pytest.raises(ConfigError, match="corpus_weight"):
        with_corpus({"a": 1}, "corpus", 0)


def test_llamas_epochs_come_out_of_llamas_proportions_and_token_counts() -> None:
    tokens = {"CommonCrawl": 853 * 10**9, "Wikipedia": 25_700 * 10**6}
    rows = {row.name: row for row in plan(llama_sources(), tokens, planned=1400 * 10**9)}
    assert rows["CommonCrawl"].epochs == pytest.approx(1.10, abs=0.01)
    assert rows["Wikipedia"].epochs == pytest.approx(2.45, abs=0.01)
    assert rows["Books"].epochs is None
    assert sum(row.share or 0 for row in rows.values()) == pytest.approx(1)


def test_the_table_prints_every_source_with_its_columns() -> None:
    out = io.StringIO()
    tokens = {name: 10**9 for name in LLAMA}
    Console(file=out, width=120).print(table(plan(llama_sources(), tokens, planned=10**9)))
    text = out.getvalue()
    assert "CommonCrawl     67.0%" in text and "3.3 TB" in text and "epochs" in text and "0.67" in text
    assert all(name in text for name in LLAMA)
    out = io.StringIO()
    Console(file=out, width=80).print(table(plan(llama_sources(), {})))
    assert "2 duplicate" in out.getvalue() and "epochs" not in out.getvalue()


def test_the_rows_are_stored_with_the_keys_of_the_summary() -> None:
    row = as_json(plan(llama_sources(), {"C4": 1000}, planned=10))[1]
    assert set(row) == {"name", "weight", "documents", "dropped", "bytes", "tokens", "share", "epochs"}
    assert row["tokens"] == 1000 and row["share"] == pytest.approx(0.15) and row["epochs"] == pytest.approx(0.0015)


@pytest.mark.parametrize(
    ("n", "said"), [(0, "0 B"), (999, "999 B"), (464_970, "465.0 kB"), (3.3e12, "3.3 TB"), (2e15, "2000.0 TB")]
)
def test_sizes_read_well(n: float, said: str) -> None:
    assert size(n) == said
