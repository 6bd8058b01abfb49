"""A ladder of tiny models, end to end: its law, its picture, a kill in the middle, and who goes by the law."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from command import sog, start, without_clocks

from stateofgpt.cli import main
from stateofgpt.errors import ConfigError, RunError
from stateofgpt.recipes.ladder import Ladder, make
from stateofgpt.report.ladder import build
from stateofgpt.run import Run
from stateofgpt.stages import collect, decision, ladder, pretrain, tokenize
from stateofgpt.train.law_file import LADDER, choose_law, read_law
from stateofgpt.train.scaling import EPOCH, ChinchillaLaw

WORDS = ("the", "a", "king", "queen", "sees", "hears", "old", "young", "house", "river", "and", "of", "in", "night")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=9)) + "." for _ in range(1500)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


def tiny(text: Path) -> Ladder:
    return Ladder(
        minutes=None,
        collect=collect.Config(sources=(), corpus=(str(text),), validation_share=0.1, most_characters=1000),
        tokenize=tokenize.Config(vocab_size=320),
        ladder=ladder.Config(
            seconds=None,
            steps=4,
            sizes=("64x1", "64x2", "128x2"),
            context=32,
            rows=4,
            dtype="float32",
            eval_tokens=512,
            resamples=20,
        ),
    )


@pytest.fixture(scope="module")
def climbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "ladder"
    make(tiny(text), root)
    return root


@pytest.mark.slow
def test_a_ladder_trains_every_rung_and_tells_its_law(climbed: Path) -> None:
    told = json.loads((climbed / LADDER).read_text())
    rungs = told["rungs"]
    assert [r["name"] for r in rungs] == [f"{s}-{n}" for s in ("64x1", "64x2", "128x2") for n in (4, 8, 16)]
    assert [r["tokens"] for r in rungs[:3]] == [4 * 4 * 32, 8 * 4 * 32, 16 * 4 * 32]
    assert all(r["loss"] < 7 and r["val_bpb"] < r["loss"] * 2 for r in rungs)
    assert rungs[0]["loss"] > rungs[2]["loss"]  # more tokens, less loss
    law = read_law(climbed / LADDER)
    assert (law.vocab_size, law.context) == (320, 32) and read_law(climbed) == law
    for rung in rungs:
        fitted = law.law.loss(rung["n_params"], rung["tokens"])
        assert rung["fitted"] == pytest.approx(fitted)
        assert rung["loss"] / fitted == pytest.approx(2.718281828 ** rung["residual"])
    for name, value in told["law"].items():
        low, high = told["intervals"][name]
        assert value > 0 and low <= high
    assert "64x1-4" in {path.name for path in (climbed / "rungs").iterdir()}


def test_all_rungs_read_the_same_stream_from_its_beginning(climbed: Path) -> None:
    from stateofgpt.data.batches import PretrainBatches
    from stateofgpt.data.shards import Shards

    shards = Shards.open(climbed / "tokenize")
    short, long = (PretrainBatches(shards, {"corpus": 1.0}, 4, 32, 0, steps * 4) for steps in (4, 16))
    for step in range(4):
        assert (short.batch(step)[0] == long.batch(step)[0]).all()


def test_the_same_command_does_nothing_again(climbed: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (climbed / LADDER).stat().st_mtime_ns
    make(tiny(text), climbed)
    assert (climbed / LADDER).stat().st_mtime_ns == before
    assert "picture" in capsys.readouterr().out


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]


def test_a_ladder_begun_when_every_size_had_the_same_steps_goes_on(climbed: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(climbed, tmp_path / "ladder")
    (tmp_path / "ladder" / "rungs" / "result.json").unlink()
    decisions = tmp_path / "ladder" / "rungs" / "decisions.json"
    kept = json.loads(decisions.read_text())
    kept["plan"]["steps"] = 4
    decisions.write_text(json.dumps(kept))
    make(tiny(text), tmp_path / "ladder")
    assert (tmp_path / "ladder" / LADDER).read_bytes() == (climbed / LADDER).read_bytes()


def test_the_picture_is_one_page_with_nothing_from_elsewhere_and_the_same_bytes_every_time(climbed: Path) -> None:
    path = build(climbed)
    once = path.read_bytes()
    assert build(climbed).read_bytes() == once
    page = Page()
    page.feed(once.decode())
    assert page.tags.count("svg") == 4 and "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert page.tags.count("circle") >= 3 * 9  # a dot a rung: by tokens, by size, and what is left over
    for said in ("The law", "What it leaves over", "128x2", "Epoch 2024"):
        assert said in once.decode()


def test_there_is_no_picture_of_an_unfinished_ladder(tmp_path: Path) -> None:
    with Run.open(tmp_path / "ladder", "ladder", {}, 0):
        pass
    with pytest.raises(RunError, match="sog ladder --out"):
        build(tmp_path / "ladder")


CODE = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_ladder import tiny
from stateofgpt.recipes.ladder import make
make(tiny(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_ladder_goes_on_and_ends_in_the_same_numbers(climbed: Path, text: Path, tmp_path: Path) -> None:
    root = tmp_path / "ladder"
    here = str(Path(__file__).parent)
    threads = str(torch.get_num_threads())  # those of `climbed`: the same bits
    for rung in ("64x1-8", "128x2-4"):
        process = start(text, root, here, code=CODE, OMP_NUM_THREADS=threads)
        deadline = time.monotonic() + 300
        while not (root / "rungs" / rung / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (root / LADDER).exists()
    done = sog(text, root, here, code=CODE, OMP_NUM_THREADS=threads)
    assert done.returncode == 0, done.stderr
    assert (root / LADDER).read_bytes() == (climbed / LADDER).read_bytes()
    for path in sorted(climbed.glob("rungs/*/result.json")):
        again = json.loads((root / path.relative_to(climbed)).read_bytes())
        assert without_clocks(again) == without_clocks(json.loads(path.read_bytes()))


# ------------------------------------------------------------------------------------------------------- who goes by it


def written(path: Path, *, vocab: int = 2048, context: int = 256, doubt: str = "") -> ChinchillaLaw:
    law = ChinchillaLaw(1.2, 90.0, 800.0, 0.3, 0.41)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"law": asdict(law), "vocab_size": vocab, "context": context, "doubt": doubt}))
    return law


def test_a_law_is_taken_where_it_lies_beside_the_run_and_was_measured_alike(tmp_path: Path) -> None:
    beside = tmp_path / "ladder" / LADDER
    law, told = choose_law(None, beside, 2048, 256)
    assert law == EPOCH and told["name"] == "epoch" and "ladder_left" not in told
    mine = written(beside)
    law, told = choose_law(None, beside, 2048, 256)
    assert law == mine and told == {"name": str(beside), **asdict(mine)}
    law, told = choose_law(None, beside, 4096, 256)
    assert law == EPOCH and "vocabulary of 2048" in told["ladder_left"]
    written(beside, doubt="the 95 % interval is wide")
    assert choose_law(None, beside, 2048, 256)[0] == EPOCH
    assert choose_law(beside, tmp_path / "none", 2048, 256)[0] == mine  # the user's word goes
    beside.write_text("{}")
    assert "no ladder's law" in choose_law(None, beside, 2048, 256)[1]["ladder_left"]


def test_a_law_that_is_named_and_does_not_fit_is_refused(tmp_path: Path) -> None:
    written(tmp_path / LADDER, context=128)
    with pytest.raises(ConfigError, match="a context of 128, and this is 2048 and 256"):
        choose_law(tmp_path, tmp_path / "none", 2048, 256)
    with pytest.raises(ConfigError, match="there is no ladder"):
        choose_law(tmp_path / "nothing.json", tmp_path / "none", 2048, 256)


def test_the_pretrain_stage_goes_by_the_law_beside_its_run_and_records_it(
    climbed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def choose(vocab: int, context: int, seconds: float, *, rows: int, law: object, **_: object) -> object:
        asked.append(law)
        raise KeyboardInterrupt

    monkeypatch.setattr(decision, "choose", choose)
    mine = written(climbed.parent / "ladder" / "other.json", vocab=320, context=32)
    with Run.open(climbed.parent / "run", "laptop", {}, 0) as run:
        collect.run(tiny(text).collect, run)
        tokenize.run(tiny(text).tokenize, run)
        for law in (None, climbed / "other.json"):
            with pytest.raises(KeyboardInterrupt):
                pretrain.plan(pretrain.Config(seconds=5.0, context=32, rows=4, law=law), run)
    own = read_law(climbed)
    assert asked == [EPOCH if own.doubt else own.law, mine]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sizes": ("64x1", "64x2")}, "2 sizes and 3 lengths cannot be fitted"),
        ({"multiples": (1, 2)}, "4 sizes and 2 lengths"),
        ({"multiples": ()}, "4 sizes and 0 lengths"),
        ({"multiples": (0, 1, 2)}, "a length of 0 parts is none"),
        ({"sizes": ("64x1", "64x2", "big")}, '"big" is no size'),
        ({"sizes": ("64x1", "64x2", "100x2")}, '"100x2" is no size'),
        ({"steps": 5}, "either seconds or steps"),
    ],
)
def test_a_ladder_that_cannot_be_fitted_is_refused_before_it_begins(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ladder.Config(**settings)  # type: ignore[arg-type]


def test_too_little_time_is_told_with_the_time_that_is_needed(climbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "measure_step", lambda *a, **k: 0.1)
    monkeypatch.setattr(ladder, "choose_way", lambda *a: ("float32", False))
    with pytest.raises(ConfigError, match="10 seconds are too few for these 3 sizes on this machine, which need 47"):
        ladder._plan(ladder.Config(seconds=10.0, sizes=ladder.Config().sizes), 320, 1)
    seconds = {"64x2": 0.1, "128x2": 0.2, "128x4": 0.4, "192x5": 9.0}
    monkeypatch.setattr(
        ladder, "measure_step", lambda made, *a, **k: seconds[f"{made.hidden_size}x{made.num_hidden_layers}"]
    )
    made = ladder._plan(ladder.Config(seconds=300.0), 320, 1)
    assert made["sizes"] == ["64x2", "128x2", "128x4"]  # the largest would have fewer than 20
    looks = 0.7 * 2048 / 2048 * 3
    for size in made["sizes"]:  # each a third of the time
        assert seconds[size] * (7 * made["steps"][size] + looks) <= 100 * 0.92
        assert seconds[size] * (7 * (made["steps"][size] + 1) + looks) > 100 * 0.92


def test_the_verb_refuses_an_unknown_setting_a_missing_corpus_and_a_model_to_begin_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (["--ladder.rungs", "3"], "unknown setting"),
        (["--corpus", str(tmp_path / "nowhere")], "there is no corpus"),
        (["--from", "laptop:rl"], "begin from nothing; leave --from out"),
    ):
        assert main(["ladder", "--out", str(tmp_path / "ladder"), *words]) == 2
        assert says in capsys.readouterr().err
