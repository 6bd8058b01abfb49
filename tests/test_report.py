"""report/: a page for every run, however far it got, that shows what the models wrote and never obeys it."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_run import MAKERS, MODELS, SOURCES, fake_run

from stateofgpt.errors import RunError
from stateofgpt.report.build import CHAPTERS, build, render
from stateofgpt.report.pages import bar, clean, count, decimal, duration, said, size, table
from stateofgpt.report.plots import Series, line_chart, running_mean, short, thin, ticks
from stateofgpt.report.record import Record
from stateofgpt.report.training import TOKENIZED_TEXT
from stateofgpt.report.tree import Node, print_tree, read_nodes, text_tree, tree_svg
from stateofgpt.run import Run

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = '</div></style><script>alert(1)</script><img src=x onerror="alert(2)">\x00\ud800 &amp; "quoted" <b>'


class _Page(HTMLParser):
    """What a browser would see: elements with attributes, text, and whether every element was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("work") / "runs" / "laptop")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return build(run).read_text("utf-8")


def test_the_report_is_one_small_file_that_loads_nothing(html: str) -> None:
    assert len(html.encode()) < 300_000
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.elements}
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert links and all(link is not None and link.startswith("#") for link in links)
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html


def test_the_chapters_come_in_the_order_of_the_talk_and_the_contents_link_to_them(html: str) -> None:
    page = _Page(html)
    sections = [a["id"] for tag, a in page.elements if tag == "section"]
    assert sections == [
        "pipeline",
        "mixture",
        "tokens",
        "pretraining",
        "lesson",
        "base",
        "sft",
        "reward",
        "health",
        "rl",
        "skills",
        "diversity",
        "arena",
        "tree",
        "cost",
        "onward",
    ]
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert all(f"#{section}" in links for section in sections)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_report_holds_the_numbers_of_the_run(html: str) -> None:
    text = " ".join(_Page(html).text.split())
    for fact in (
        "An assistant, raised in 10 minutes", "1.92 million", "1.71 bits per byte, down from 7.93", "88.4%", "92.1%",
        "from 0.612 to 0.874", "1,261", "1,229 – 1,298", "AMD EPYC 9R45", "25 GB", "2.31 GB of memory", "67.0%",
        "1.661", "1.976", "sog improve laptop", "24,000 demonstrations",
        "5,400 pairs of answers to 900 prompts", "lookup(Ohio, area)", "calculator 4729+386", "RL, after",
        "Verdict: with care", "The votes preferred the shorter", "Annotator 2",
        "60 of 100 different", "enots", "calculator(39538223 / 733391)",
    ):  # fmt: skip
        assert fact in text, fact
    assert "To make it:" not in text


def test_every_chart_says_in_words_what_it_shows(html: str) -> None:
    pictures = [a for tag, a in _Page(html).elements if tag == "svg"]
    assert len(pictures) == 15
    assert all(a.get("role") == "img" and len(a.get("aria-label") or "") > 20 for a in pictures)


def test_the_coloured_tokens_are_the_text(run: Path, html: str) -> None:
    start = html.index('<div class="text">')
    shown = _Page(html[start : html.index("</div>", start) + 6]).text
    assert shown.replace("↵\n", "\n") == TOKENIZED_TEXT
    record = Record.read(run)
    assert record.tokenizer is not None
    start = html.index('<div class="ids">')
    told = _Page(html[start : html.index("</div>", start) + 6]).text
    assert [int(i) for i in told.split()] == record.tokenizer.encode(TOKENIZED_TEXT)


def test_the_same_folder_makes_the_same_bytes(run: Path, html: str) -> None:
    assert render(Record.read(run)) == html


@pytest.mark.parametrize("reached", range(len(MAKERS) + 1))
def test_a_run_that_stopped_anywhere_has_a_report_that_says_what_is_missing(tmp_path: Path, reached: int) -> None:
    names = tuple(MAKERS)[:reached]
    page = _Page(build(fake_run(tmp_path / "runs" / "part", names)).read_text("utf-8"))
    assert [tag for tag, _ in page.elements].count("section") == len(CHAPTERS)
    for stage in ("collect", "tokenize", "pretrain", "sft", "reward", "rl", "eval", "arena"):
        command = f"sog {stage} --out part"
        if stage in ("collect", "eval"):
            assert (command in page.text) == (stage not in names)
        else:
            assert page.text.count(command) == (stage not in names)


def test_a_run_without_a_summary_shows_what_its_stages_measured(tmp_path: Path, html: str) -> None:
    text = _Page(build(fake_run(tmp_path / "runs" / "part", tuple(MAKERS))).read_text("utf-8")).text
    for fact in ("88.4%", "1,229 – 1,298", "60 of 100 different", "1.92 million", "16,395 documents"):
        assert fact in text, fact


def test_what_models_and_files_say_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    root = fake_run(tmp_path / "runs" / "laptop")

    def poison(value: object) -> object:
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()} | {HOSTILE: {"right": 1, "n": 2}}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return HOSTILE if isinstance(value, str) else value

    for path in (root / "summary.json", *root.glob("*/result.json")):
        path.write_text(json.dumps(poison(json.loads(path.read_text()))))
    for path in root.glob("*/samples.jsonl"):
        path.write_text("".join(json.dumps(poison(json.loads(line))) + "\n" for line in path.read_text().splitlines()))
    for path in root.glob("*/checkpoint/MANIFEST.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"name": HOSTILE, "stage": HOSTILE, "metrics": {"val_bpb": HOSTILE}}))
    html = build(root).read_text("utf-8")
    page = _Page(html)
    assert not {"script", "img", "b\x00"} & {tag for tag, _ in page.elements}
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "\x00" not in html and "␀" in html


def test_numbers_that_are_none_leave_gaps(tmp_path: Path) -> None:
    root = fake_run(tmp_path / "runs" / "laptop")

    def spoil(value: object, depth: int = 0) -> object:
        if isinstance(value, dict):
            return {k: spoil(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, depth + 1) for v in value] if depth < 3 else "no list"
        return None if isinstance(value, int | float) else value

    for name in ("summary.json", "eval/result.json", "reward/result.json", "arena/result.json"):
        (root / name).write_text(json.dumps(spoil(json.loads((root / name).read_text()))))
    for path in root.glob("*/metrics.jsonl"):
        path.write_text('{"step": 0, "time": 0.0, "loss": null}\n{"step": 1, "time": 1.0}\n')
    assert "nan" not in _Page(build(root).read_text("utf-8")).text.lower().split()


def test_files_that_cannot_be_read_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    root = fake_run(tmp_path / "runs" / "laptop")
    (root / "summary.json").write_text('{"recipe": ')
    (root / "rl" / "result.json").write_bytes(b"\xff\xfe")
    (root / "tokenize" / "tokenizer.json").write_text("{}")
    (root / "sft" / "checkpoint" / "MANIFEST.json").write_text("[[[")
    text = _Page(build(root).read_text("utf-8")).text
    assert "Not everything could be read" in text
    assert "summary.json" in text and "1.92 million" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run"):
        build(tmp_path)


def test_a_run_outside_of_runs_is_named_by_its_path(tmp_path: Path) -> None:
    root = fake_run(tmp_path / "elsewhere", ("collect",))
    assert Record.read(root).name == str(root)


def test_the_report_can_be_built_while_the_run_is_at_work(tmp_path: Path) -> None:
    root = fake_run(tmp_path / "runs" / "laptop")
    with Run.open(root, "laptop", {"minutes": 10}, 1):
        assert build(root).is_file()


# --- the tree ----------------------------------------------------------------------------------------------------


def test_the_tree_hangs_each_model_below_the_one_it_continues(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = text_tree(read_nodes(run)).splitlines()
    assert [line.split("  ")[0].rstrip() for line in lines] == ["laptop:pretrain", "└─ laptop:sft", "", ""]
    assert [line.strip().split("  ")[0] for line in lines][2:] == ["├─ laptop:reward", "└─ laptop:rl"]
    assert "with laptop:reward" in lines[3] and "true rl 0.874" in lines[3]
    print_tree(run.parent)
    assert capsys.readouterr().out.splitlines() == lines


def test_a_folder_without_models_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_tree(tmp_path)
    assert "sog run laptop" in capsys.readouterr().out


def test_a_parent_in_another_folder_is_shown_as_such_and_a_copy_only_once(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "rl" / "checkpoint", tmp_path / "a" / "checkpoint")
    shutil.copytree(run / "rl" / "checkpoint", tmp_path / "b" / "checkpoint")
    shutil.copytree(run / "sft" / "checkpoint", tmp_path / "c" / "resume")
    nodes = read_nodes(tmp_path)
    assert [(node.name, node.path is not None) for node in nodes] == [
        ("laptop:sft", False), ("laptop:reward", False), ("laptop:rl", True),
    ]  # fmt: skip
    assert text_tree(nodes).count("(not in this folder)") == 2


def test_no_two_boxes_of_the_drawn_tree_touch(run: Path) -> None:
    nodes = [Node("0", "base", "pretrain"), Node("1", "sft", "sft", ("0",))]
    for i in range(
        2, 12, 2
    ):  # a chain of improvements, each from the last policy and a new reward model, and side lines
        nodes += [Node(f"{i}", f"reward {i}", "reward", (f"{i - 1}",))]
        nodes += [Node(f"{i + 1}", f"rl {i}", "rl", (f"{i - 1}", f"{i}")), Node(f"s{i}", f"side {i}", "sft", ("0",))]
    root = ElementTree.fromstring(str(tree_svg(nodes)))
    boxes = [
        tuple(float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        for rect in root.iter("rect") if rect.attrib["class"] == "box"
    ]  # fmt: skip
    assert len(boxes) == len(nodes)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for i, (x, y, w, h) in enumerate(boxes):
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        assert not any(abs(x - u) < w and abs(y - v) < h for u, v, _, _ in boxes[:i])


def test_a_crafted_circle_of_parents_ends(tmp_path: Path) -> None:
    for own, parent in (("a", "b"), ("b", "a"), ("c", "c")):
        (tmp_path / own).mkdir()
        told = [{"id": parent, "name": parent, "stage": "sft"}]
        (tmp_path / own / "MANIFEST.json").write_text(
            json.dumps({"id": own, "name": own, "stage": "sft", "parents": told})
        )
    nodes = read_nodes(tmp_path)
    assert sorted(node.id for node in nodes) == ["a", "b", "c"]
    assert all(name in text_tree(nodes) for name in "abc")
    assert str(tree_svg(nodes)).count('class="box"') == 3


# --- pieces ------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_lie_within() -> None:
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.52, 4) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert ticks(5, 5) == [5]
    for low, high in ((-3.2, 8.7), (1e-6, 3e-6), (1e9, 7e9)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 12 and min(found) >= low - 1e-12 and max(found) <= high * (1 + 1e-9)


def test_thinning_keeps_the_ends_and_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100 and few[0] == points[0] and few[-1] == points[-1]
    assert sum(y for _, y in few) / 100 == pytest.approx(3.0, abs=0.1)
    assert thin(points[:50], 100) == points[:50]


def test_a_running_mean_keeps_a_straight_line_straight_where_it_begins() -> None:
    line = [(float(i), 3.0 * i) for i in range(200)]
    assert [y for _, y in running_mean(line)[:150]] == pytest.approx([y for _, y in line[:150]])
    assert running_mean([(0.0, 1.0), (1.0, 1.0)]) == [(0.0, 1.0), (1.0, 1.0)]


def test_a_chart_stays_inside_its_frame_whatever_the_numbers() -> None:
    nan = float("nan")
    points = [(0.0, 1.0), (1.0, nan), (2.0, -1e30), (3.0, 5e-9)]
    root = ElementTree.fromstring(
        str(line_chart([Series("x", points), Series("y", [(0, 0), (3, 0)])], title="t", x_name="s"))
    )
    for line in root.iter("polyline"):
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 400 and 0 <= y <= 225
    labels = sorted(float(t.attrib["y"]) for t in root.iter("text") if "label" in t.attrib["class"])
    assert labels[1] - labels[0] >= 13
    assert line_chart([Series("x", [(0, 1.0)])], title="t", x_name="s") == ""
    assert "svg" in line_chart([Series("x", [(0, 2.0), (1, 2.0)])], title="flat", x_name="s")


def test_numbers_are_written_as_people_write_them() -> None:
    assert [short(x) for x in (0, 0.034, 1.5, 12, 1234, 250_000, 2.5e6, 3e11, -0.5)] == [
        "0", "0.034", "1.5", "12", "1.23k", "250k", "2.5M", "300B", "−0.5",
    ]  # fmt: skip
    assert (count(16395), count(1.92e6), count(None)) == ("16,395", "1.92 million", "–")
    assert (decimal(-0.5), size(4.1e6), size(None)) == ("−0.50", "4.1 MB", "–")
    assert [duration(s) for s in (9.1, 59.4, 75, 3700)] == ["9.1 s", "59 s", "1 min 15 s", "1 h 1 min"]


def test_text_is_made_printable_and_tool_calls_are_set_apart() -> None:
    assert clean("a\x00b\x1b[0m\ud800") == "a␀b␛[0m?"
    assert len(clean("x" * 5000)) < 1300
    call = '<tool_call>{"name": "lookup", "arguments": {"name": "Ohio", "field": "area"}}</tool_call>'
    assert '<code class="call">lookup(Ohio, area)</code>' in said(f"Let me see. {call}")
    assert '<code class="call">{&#34;name&#34;: oops</code>' in said('<tool_call>{"name": oops')
    assert "(nothing)" in said("  \n")


def test_plain_text_is_escaped_in_tables_and_bars() -> None:
    html = table(["<a>"], [["<b>"]], caption="<c>") + bar(2.0, "base", "<d>")
    assert not {"a", "b", "c", "d"} & {tag for tag, _ in _Page(html).elements} - {"b"}
    assert "&lt;b&gt;" in html and "--v:100.0%" in html
    assert len(MODELS) == 3 and len(SOURCES) == 6
