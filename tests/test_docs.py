"""The documentation is true: commands parse, settings and links exist, and every key of a run is explained."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stateofgpt.cli import STAGE_VERBS, _parse, _parsers
from stateofgpt.config import ConfigError, apply_overrides, keys
from stateofgpt.run import STAGES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
METRICS = ROOT / "docs" / "metrics.md"
HOSTS = {"127.0.0.1", "arxiv.org", "example.com", "github.com", "huggingface.co", "localhost", "pytorch.org"}
PRIVATE = re.compile(r"(?<![\w.~])/(?:tmp|work|root|home|mnt|Users)/|/dev/shm")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    return FENCE.sub("", text)


every_page = pytest.mark.parametrize("page", PAGES, ids=named)


# ------------------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> Iterator[str]:
    """Every `sog ...` of a page: lines of code blocks without their comments, and spans in the prose."""
    lines = [line for _, block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += [line for line in prose(text).splitlines() if line.startswith("    ")]
    for line in (*lines, *SPAN.findall(prose(text))):
        command = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
        if command.startswith("sog "):
            yield command


@every_page
def test_every_command_parses(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        arguments = shlex.split(command, comments=True)[1:]
        if len(arguments) == 1 and arguments[0] in _parsers()[1]:
            continue  # only the verb is named
        try:
            options = _parse(arguments)
        except SystemExit as left:
            assert not left.code, command
            continue
        except ConfigError as error:
            pytest.fail(f"{command}: {error}")
        if getattr(options, "takes_overrides", False) and getattr(options, "recipe", None) != "RECIPE":
            try:
                recipe(options.recipe or "laptop", options.minutes, tuple(options.overrides.items()))
            except ConfigError as error:
                pytest.fail(f"{command}: {error}")


@cache
def recipe(name: str, minutes: float | None = None, overrides: tuple[tuple[str, str], ...] = ()) -> Any:
    from stateofgpt.recipes import load

    return load(name, minutes=minutes, seed=0, corpus=(), overrides=dict(overrides))


def test_the_readme_shows_the_two_commands_and_they_are_targets_of_the_makefile() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        spans = [*SPAN.findall(prose(page.read_text())), *(b for _, b in FENCE.findall(page.read_text()))]
        for target in (t for span in spans for t in re.findall(r"^make (\w+)", span, re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{named(page)}: make {target}"


# ------------------------------------------------------------------------------------------------------------- settings


@every_page
def test_every_option_and_setting_named_in_prose_exists(page: Path) -> None:
    _, verbs = _parsers()
    declared = {option for parser in verbs.values() for option in parser.declared} | {"--version"}
    for span in SPAN.findall(prose(page.read_text(encoding="utf-8"))):
        name = re.split(r"[ =]", span)[0]
        if name.startswith("--") and "." not in name:
            assert name in declared, f"{named(page)}: {span}"
        elif is_setting(name.removeprefix("--")):
            known = keys(recipe("laptop"))
            full = name.removeprefix("--")
            assert full in known or ends_of(full, known), f"{named(page)}: {span}"


def is_setting(name: str) -> bool:
    stage, _, rest = name.partition(".")
    return (
        stage in STAGES and bool(re.fullmatch(r"[a-z_.]+", rest)) and not rest.endswith(("py", "md", "json", "jsonl"))
    )


def ends_of(name: str, known: tuple[str, ...]) -> bool:
    """Whether the command line finds one setting under this name, as `pretrain.lr` for `pretrain.loop.optim.lr`."""
    try:
        apply_overrides(recipe("laptop"), {name: "\x00"})
    except ConfigError as error:
        return "unknown setting" not in str(error) and "say which" not in str(error)
    return any(key.split(".")[-1] == name.split(".")[-1] for key in known)


def test_a_setting_that_does_not_exist_or_could_be_two_is_found() -> None:
    known = keys(recipe("laptop"))
    assert ends_of("pretrain.lr", known) and ends_of("rl.ppo.policy.lr", known)
    assert not any(ends_of(name, known) for name in ("pretrain.rate", "rl.lr", "pretrain.optim.widht"))


def test_every_stage_has_a_page_that_names_its_verb() -> None:
    for verb in (*STAGE_VERBS, "report"):
        assert f"sog {verb} " in (ROOT / "docs" / f"{verb}.md").read_text()


# ---------------------------------------------------------------------------------------------------------------- links


@every_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{named(page)}: {target}"
        assert there.is_relative_to(ROOT), f"{named(page)}: {target} leaves the project"
        if anchor:
            assert anchor in anchors(there), f"{named(page)}: {target}"


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_page_under_docs_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target
    }
    assert not [named(page) for page in PAGES if "docs" in page.parts and page not in linked]


@every_page
def test_no_page_names_a_path_of_one_machine_or_an_unexpected_host(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not PRIVATE.search(text), f"{named(page)}: {PRIVATE.search(text)}"
    assert set(re.findall(r"https?://([\w.\-]+)", text)) <= HOSTS


# -------------------------------------------------------------------------------------------------------------- metrics


def explained(chapter: str, section: str = "") -> list[str]:
    """The keys in the tables of docs/metrics.md under a heading (`## chapter`, `### section`)."""
    text = METRICS.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(chapter)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, chapter
    body = found[1]
    if section:
        inner = re.search(rf"^### {re.escape(section)}$(.*?)(?=^### |\Z)", body, re.MULTILINE | re.DOTALL)
        body = inner[1] if inner else ""
    return re.findall(r"^\| `([^`]+)` \|", body, re.MULTILINE)


def matches(key: str, pattern: str) -> bool:
    """Words in capitals stand for any name: `skills.MODEL.SKILL.n`, `val_bpb_SOURCE`."""
    return re.fullmatch(re.sub(r"[A-Z]{2,}", r"[^.\\[\\]]+", re.escape(pattern)), key) is not None


def flat(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values in JSON, `[]` for the entries of a list; nothing for an empty list or object."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for inner in value:
            yield from flat(inner, f"{prefix}[]")
    else:
        yield prefix


def unexplained(found: set[str], patterns: list[str]) -> list[str]:
    return sorted(key for key in found if not any(matches(key, pattern) for pattern in patterns))


def stale(found: set[str], patterns: list[str]) -> list[str]:
    return [pattern for pattern in patterns if not any(matches(key, pattern) for key in found)]


def logged(run: Path, stage: str, name: str = "metrics.jsonl") -> set[str]:
    lines = (run / stage / name).read_text(encoding="utf-8").splitlines()
    return {key for line in lines for key in json.loads(line)}


def stored(path: Path) -> set[str]:
    return set(flat(json.loads(path.read_text(encoding="utf-8"))))


def test_the_matcher_knows_a_missing_key() -> None:
    patterns = ["skills.MODEL.SKILL.n", "val_bpb_SOURCE", "arena[].KEY"]
    assert not unexplained({"skills.rl.sort.n", "val_bpb_bible", "arena[].low"}, patterns)
    assert unexplained({"skills.rl.n", "val_bpb", "arena.low"}, patterns) == ["arena.low", "skills.rl.n", "val_bpb"]
    assert stale({"val_bpb_bible"}, patterns) == ["skills.MODEL.SKILL.n", "arena[].KEY"]


@pytest.mark.slow
def test_every_logged_metric_is_explained_and_every_explained_one_is_logged(debug_run: Path) -> None:
    common = explained("metrics.jsonl", "every stage that logs")
    stages = [name for name in STAGES if (debug_run / name / "metrics.jsonl").exists()]
    assert {"pretrain", "sft", "reward", "rl"} <= set(stages)
    for stage in stages:
        patterns = common + explained("metrics.jsonl", stage)
        assert not unexplained(logged(debug_run, stage), patterns), stage
        assert not stale(logged(debug_run, stage), patterns), stage


@pytest.mark.slow
def test_every_key_of_a_sample_is_explained_and_every_explained_one_is_kept(debug_run: Path) -> None:
    for path in sorted(debug_run.glob("*/samples.jsonl")):
        stage = path.parent.name
        found, patterns = logged(debug_run, stage, "samples.jsonl"), explained("samples.jsonl", stage)
        assert not unexplained(found, patterns), stage
        assert not stale(found, patterns), stage


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_result_is_explained(debug_run: Path, stage: str) -> None:
    assert not unexplained(stored(debug_run / stage / "result.json"), explained("result.json", stage))


@pytest.mark.slow
def test_every_key_of_the_summary_is_explained_and_every_explained_one_is_there(debug_run: Path) -> None:
    found, patterns = stored(debug_run / "summary.json"), explained("summary.json")
    assert not unexplained(found, patterns)
    assert not [p for p in stale(found, patterns) if "dropped" not in p]  # of little text nothing need be dropped
