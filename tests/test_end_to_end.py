"""The debug recipe from raw text to the leaderboard, through the command line, and everything it leaves behind."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TRAINED, files, one_sentence, records, result, sog, weights

from stateofgpt.cli import main
from stateofgpt.data.demonstrations import demonstration
from stateofgpt.data.documents import read_documents
from stateofgpt.data.prompts import prompts
from stateofgpt.data.skills import SKILLS, Problem, problem_from_json, split_of
from stateofgpt.data.skills.arithmetic import expression_key
from stateofgpt.eval.suites import suite
from stateofgpt.infer.engine import Engine
from stateofgpt.model.checkpoint import load_model, load_reward, read_lineage, verify
from stateofgpt.recipes import debug
from stateofgpt.recipes.recipe import Recipe
from stateofgpt.run import STAGES
from stateofgpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXT = "Q: What is 4729 + 386?\nA: 5115\n\nThe king said <|im_end|> in Zürich: 火."
LANGUAGE_MODELS = ("pretrain", "sft", "rl")


# -------------------------------------------------------------------------------------------------------- summary.json

Check = Callable[[Any], bool]


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high


def whole(low: int = 0) -> Check:
    return lambda v: type(v) is int and v >= low


def named(*values: object) -> Check:
    return lambda v: v in values


def text(v: Any) -> bool:
    return isinstance(v, str)


SHARE = number(0.0, 1.0)
ENTROPY = number(0.0, math.log(1024))
COUNTS = {"right": whole(), "n": whole(1)}
EACH, ROWS = "each value", "each row"

SUMMARY = {  # the keys of the README's table, neither more nor fewer
    "recipe": named("debug"),
    "seed": named(0),
    "minutes_asked": named(None),
    "wall_seconds": {"total": number(1.0, 90.0), **{stage: number(0.01, 90.0) for stage in STAGES}},
    "peak_memory_bytes": number(50e6, 4e9),
    "machine": {
        "system": text, "processor": text, "cores": whole(1), "threads": whole(1), "capability": text,
        "python": text, "torch": text,
    },
    "data": {
        "sources": {
            ROWS: {
                "name": text, "weight": SHARE, "documents": whole(1), "dropped": {EACH: whole(1)},
                "bytes": whole(10_000), "tokens": whole(1_000), "share": SHARE, "epochs": number(0.001, 100.0),
            }
        }
    },
    "tokenizer": {"vocab_size": named(1024), "bytes_per_token": {EACH: number(1.0, 20.0)}},
    "pretrain": {
        "n_params": whole(10_000), "tokens": whole(10_000), "tokens_per_second": number(1.0),
        "val_bpb_start": number(1.0, 10.0), "val_bpb": number(0.5, 10.0),
    },
    "skills": {"base": {EACH: COUNTS}, "sft": {EACH: COUNTS}, "rl": {EACH: COUNTS}},
    "reward": {
        "pair_accuracy": SHARE, "ceiling": SHARE, "rank_correlation": number(-1.0, 1.0), "n": whole(1),
        "apart": {"accuracy": SHARE, "longer": SHARE, "n": whole(0)},
    },
    "rl": {
        "true_sft": number(-10.0, 10.0), "true_rl": number(-10.0, 10.0), "p_value": SHARE, "kl": number(-1.0, 100.0),
        "entropy_sft": ENTROPY, "entropy_rl": ENTROPY, "stopped": text, "given_up": text,
    },
    "diversity": {
        EACH: {"entropy": ENTROPY, "distinct": SHARE, "new": SHARE, "plausible": SHARE, "n": named(100)},
    },
    "variety": {
        EACH: {
            "entropy": number(0.0, 20.0), "tokens": number(0.0, 1000.0), "prompts": whole(1), "answers": whole(2),
            **{f"{of}_distinct": SHARE for of in ("prompt", "across")},
            **{f"{of}_ngrams": number(0.0, 2.0) for of in ("prompt", "across")},
            **{f"{of}_self_bleu": SHARE for of in ("prompt", "across")},
        }
    },
    "arena": {
        ROWS: {
            "model": named("base", "sft", "rl"), "rating": number(0.0, 3000.0), "low": number(), "high": number(),
            "battles": whole(1),
        }
    },
}  # fmt: skip


def faults(value: Any, schema: Any, where: str = "summary") -> Iterator[str]:
    """Everything in which a JSON value differs from a schema of keys and checks."""
    if callable(schema):
        if not schema(value):
            yield f"{where} is {value!r}"
    elif ROWS in schema:
        if not isinstance(value, list) or not value:
            yield f"{where} is no list with rows"
            return
        for i, row in enumerate(value):
            yield from faults(row, schema[ROWS], f"{where}[{i}]")
    elif not isinstance(value, dict):
        yield f"{where} is no object"
    elif EACH in schema:
        for key, item in value.items():
            yield from faults(item, schema[EACH], f"{where}.{key}")
    else:
        yield from (f"{where}.{key} is missing" for key in schema.keys() - value.keys())
        yield from (f"{where}.{key} is not in the schema" for key in value.keys() - schema.keys())
        for key in schema.keys() & value.keys():
            yield from faults(value[key], schema[key], f"{where}.{key}")


def test_the_schema_check_finds_what_is_missing_new_or_out_of_range() -> None:
    schema = {"a": whole(1), "b": {ROWS: {"c": SHARE}}, "d": {EACH: text}}
    assert not list(faults({"a": 1, "b": [{"c": 0.5}], "d": {"x": "y"}}, schema))
    assert sorted(faults({"a": True, "b": [{"c": 2}], "e": 1}, schema)) == [
        "summary.a is True",
        "summary.b[0].c is 2",
        "summary.d is missing",
        "summary.e is not in the schema",
    ]


def test_the_summary_holds_every_key_with_sane_values(debug_run: Path) -> None:
    summary = json.loads((debug_run / "summary.json").read_bytes())
    assert not list(faults(summary, SUMMARY))
    assert sum(source["share"] for source in summary["data"]["sources"]) == pytest.approx(1.0)
    assert summary["wall_seconds"]["total"] >= sum(summary["wall_seconds"][stage] for stage in STAGES)
    assert summary["pretrain"]["val_bpb"] < summary["pretrain"]["val_bpb_start"]
    assert set(summary["skills"]["sft"]) == set(summary["skills"]["rl"]) == set(SKILLS)
    assert set(summary["diversity"]) == {"base", "sft", "rl"} == {row["model"] for row in summary["arena"]}
    assert all(row["low"] <= row["rating"] <= row["high"] for row in summary["arena"])
    assert all(s["right"] <= s["n"] for of in summary["skills"].values() for s in of.values())


# -------------------------------------------------------------------------------------------------------------- report


class Loads(HTMLParser):
    """What a page would fetch when it is opened: every address in an attribute, links to follow left out."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action") or (name.endswith("href") and tag != "a"):
                self.addresses.append(value or "")
            if name == "style":
                self.addresses += re.findall(r"url\(([^)]*)\)", value or "")


def test_the_report_is_one_file_that_opens_offline(debug_run: Path) -> None:
    page = (debug_run / "report.html").read_text("utf-8")
    loads = Loads()
    loads.feed(page)
    assert not [a for a in loads.addresses if a and not a.startswith(("data:", "#"))]
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//|fetch\(|XMLHttpRequest|<iframe|<script[^>]*\ssrc", page)
    for told in ("skills", "dictionary", "bits per byte", "debug"):
        assert told in page


# --------------------------------------------------------------------------------------------------- stages and models


def test_every_stage_keeps_the_contract(debug_run: Path) -> None:
    config = json.loads((debug_run / "run.json").read_bytes())["config"]
    for stage in STAGES:
        folder = debug_run / stage
        assert isinstance(config[stage], dict) and config[stage], stage
        assert result(debug_run, stage), stage
        assert not (folder / "resume").exists(), f"{stage} keeps the state of a training that is over"
        left = [p.name for p in folder.rglob("*") if p.name.endswith((".tmp", ".incomplete", ".previous", ".damaged"))]
        assert not left, stage
        if stage in TRAINED:
            steps = [line["step"] for line in records(folder / "metrics.jsonl")]
            assert steps == sorted(steps) and steps[-1] > 1, stage
            verify(folder / "checkpoint")
        if stage not in ("collect", "tokenize"):  # those two keep documents and shards, which are texts already
            assert samples_of(debug_run, stage), f"{stage} shows nothing of what its model says"


def samples_of(run: Path, stage: str) -> list[Any]:
    return records(run / stage / "samples.jsonl") or result(run, stage).get("examples", [])


def test_every_checkpoint_names_its_parents_and_sog_draws_the_tree(debug_run: Path) -> None:
    lineage = {stage: read_lineage(debug_run / stage / "checkpoint") for stage in TRAINED}
    parents = {stage: [parent.id for parent in lineage[stage].parents] for stage in TRAINED}
    assert parents == {
        "pretrain": [],
        "sft": [lineage["pretrain"].id],
        "reward": [lineage["sft"].id],
        "rl": [lineage["sft"].id, lineage["reward"].id],
    }
    tree = sog("runs", debug_run.parent).stdout.splitlines()
    drawn = {re.split(r"\s{2}", line.lstrip("│├└─ "))[0]: len(line) - len(line.lstrip("│├└─ ")) for line in tree}
    assert list(drawn)[:2] == ["debug:pretrain", "debug:sft"] and set(drawn) == {f"debug:{stage}" for stage in TRAINED}
    assert drawn["debug:pretrain"] < drawn["debug:sft"] < drawn["debug:reward"] == drawn["debug:rl"]


@pytest.mark.parametrize("stage", LANGUAGE_MODELS)
def test_transformers_loads_the_checkpoint_and_gives_our_logprobs(
    debug_run: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = debug_run / stage / "checkpoint"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if stage == "rl":  # what the command prints, for one of them
        assert main(["logprobs", f"{debug_run}:{stage}", "--text", TEXT]) == 0
        printed = json.loads(capsys.readouterr().out)
        ids, ours = printed["ids"], printed["logprobs"]
        assert len(printed["tokens"]) == len(ids) == len(ours) + 1
    else:
        ids = Tokenizer.load(folder).encode(TEXT)
        ours = Engine(load_model(folder)).score([ids])[0]
    assert min(ids) > 5, "text became a special token"
    plain = TEXT.replace("<|im_end|>", "")
    assert tokenizer.encode(plain, add_special_tokens=False) == Tokenizer.load(folder).encode(plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    theirs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-4, rtol=0.0, check_dtype=False)


def test_transformers_loads_the_reward_model_and_gives_our_scores(debug_run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = debug_run / "reward" / "checkpoint"
    rows = [Tokenizer.load(folder).encode(TEXT)[:n] for n in (9, 17, 30)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.num_labels == 1
    ours = load_reward(folder)
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            torch.testing.assert_close(ours(ids).view(-1), model(ids).logits.view(-1), atol=1e-4, rtol=0.0)


# ---------------------------------------------------------------------------------------------------- the same command


def test_a_second_call_says_so_and_changes_nothing(debug_run: Path) -> None:
    before = files(debug_run)
    again = sog("run", "debug", "--out", debug_run)
    assert again.returncode == 0, again.stderr
    assert [line.split()[0] for line in again.stdout.splitlines() if "done before" in line] == list(STAGES)
    after = files(debug_run)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--seed", "1"), "seed is 0 there, 1 here"),
        (("--pretrain.warmup", "11"), "pretrain.warmup is 10 there, 11 here"),
        (("--corpus", "."), "collect.corpus"),
    ],
)
def test_another_seed_setting_or_corpus_in_the_same_folder_is_refused(
    debug_run: Path, words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(debug_run)
    assert main(["run", "debug", "--out", str(debug_run), *words]) == 2
    said = one_sentence(capsys.readouterr().err)
    assert "another configuration" in said and named in said
    assert files(debug_run) == before


def test_the_stages_one_by_one_give_the_same_models_and_refuse_to_skip_one(debug_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "debug"
    for number_, stage in enumerate(STAGES):
        if stage == "pretrain":
            refused = sog("sft", "--out", run)
            assert refused.returncode == 2 and "run `sog pretrain` first" in one_sentence(refused.stderr)
        made = sog(stage, "--out", run, *(() if number_ else ("--recipe", "debug", "--seed", "0")))
        assert made.returncode == 0, f"{stage}: {made.stderr}"
    for stage in STAGES:
        assert result(run, stage) == result(debug_run, stage), stage
    assert all(weights(run, stage) == weights(debug_run, stage) for stage in TRAINED)
    assert not list(faults(json.loads((run / "summary.json").read_bytes()), SUMMARY))


# ------------------------------------------------------------------------------------------------------------ held out


def held_out(recipe: Recipe, seed: int) -> list[Problem]:
    """Every problem that eval, reward, rl and arena ask to measure."""
    asked = [p for skill in SKILLS for p in suite(skill, max(recipe.eval.key, recipe.eval.other), seed)]
    asked += prompts(seed, recipe.reward.held_out_prompts, recipe.reward.prompts, "heldout", 0)
    asked += prompts(seed, recipe.rl.held_out_prompts, recipe.rl.prompts, "heldout", 10_000)
    return asked + prompts(seed, recipe.arena.prompts, recipe.arena.mixture, "heldout", 20_000)


def sums(text: str) -> set[str]:
    """The keys of the sums of two numbers, one of them of several digits, that stand in a text as a question would."""
    found = re.findall(r"(?<![\d.,+*/\-] )(?<![\d.,])(\d+) ?([-+*/]) ?(\d+)(?!\d|[.,]\d| ?[-+*/])", text)
    return {expression_key(int(a), op, int(b)) for a, op, b in found if max(int(a), int(b)) >= 10}


def test_what_is_measured_was_never_trained_on(debug_run: Path) -> None:
    recipe = debug.recipe()
    asked = held_out(recipe, 0)
    keys, questions = {p.key for p in asked}, {p.question for p in asked}
    assert all(split_of(p) == "heldout" for p in asked)
    assert all(p.key in sums(p.question) for p in asked if p.skill == "arithmetic" and p.meta["a"] + p.meta["b"] > 18)

    ranked = [problem_from_json(r["problem"]) for r in records(debug_run / "reward" / "rankings.jsonl")]
    measured = [problem_from_json(r["problem"]) for r in records(debug_run / "reward" / "rankings_held_out.jsonl")]
    assert len(ranked) == recipe.reward.n_prompts and len(measured) == recipe.reward.held_out_prompts
    assert keys.isdisjoint(p.key for p in ranked) and keys.issuperset(p.key for p in measured)

    n = recipe.sft.steps or 0
    taught = [demonstration(0, step * 100_000 + i) for step in range(n) for i in range(40)]
    learned = [message.content for conversation in taught for message in conversation if message.role == "user"]
    documents = [
        text for path in sorted((debug_run / "collect").glob("skills.*.jsonl")) for text in read_documents(path)
    ]
    assert len(set().union(*map(sums, documents))) > 300 and len(set().union(*map(sums, learned))) > 500
    for text in (*learned, *documents):
        assert keys.isdisjoint(sums(text)), text
        lines = {line.strip().removeprefix("Q: ").removeprefix("user: ") for line in text.splitlines()}
        assert questions.isdisjoint(lines), text
