"""Pretraining alone, in three sizes, on a synthetic text: a tiny run, its picture, and recipes with fewer stages."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from command import one_sentence, sog, without_clocks

from stateofgpt.cli import main
from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import GPTConfig
from stateofgpt.recipes import load, names
from stateofgpt.recipes.recipe import Recipe
from stateofgpt.run import STAGES
from stateofgpt.stages import pretrain, sizes
from stateofgpt.train import dial
from stateofgpt.train.planner import count

SMALL = (
    "--pretrain.seconds=none", "--pretrain.steps=20", "--pretrain.width=128", "--pretrain.layers=2",
    "--pretrain.context=32", "--pretrain.rows=4", "--pretrain.sample_tokens=12", "--pretrain.eval_tokens=256",
    "--tokenize.vocab_size=320",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    speakers, words = ("ROMEO", "JULIET", "NURSE"), ("thou", "art", "love", "night", "my", "sweet", "the", "sword")
    speech = [f"{rng.choice(speakers)}:\n{' '.join(rng.choices(words, k=12))}.\n" for _ in range(600)]
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text("\n".join(speech))
    return path


@pytest.fixture(scope="module")
def played(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "runs" / "shakespeare"
    done = sog("run", "shakespeare", "--corpus", text, "--out", root, *SMALL)
    assert done.returncode == 0, done.stderr
    assert f"sog sample {root}:pretrain" in done.stdout and "sog chat" not in done.stdout
    return root


pytestmark = pytest.mark.slow


def test_only_the_recipes_stages_are_there(played: Path) -> None:
    assert {path.name for path in played.iterdir() if path.is_dir()} == {"collect", "tokenize", "pretrain"}
    summary = json.loads((played / "summary.json").read_text())
    assert set(summary["wall_seconds"]) == {"total", "collect", "tokenize", "pretrain"}
    assert [source["name"] for source in summary["data"]["sources"]] == ["corpus"]
    assert summary["data"]["sources"][0]["weight"] == 1
    assert not {"rl", "reward", "skills", "arena", "diversity"} & set(summary)


def test_three_sizes_read_the_same_tokens_and_sample_at_the_same_moments(played: Path) -> None:
    folders = [played / "pretrain" / name for name in ("64x1", "64x2")] + [played / "pretrain"]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert [r["tokens"] for r in results] == [20 * 4 * 32] * 3
    params = [r["n_params"] for r in results]
    assert params == sorted(set(params))
    for folder in folders:
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert sorted({s["step"] for s in samples}) == [0, 1, 4, 20]  # 0, 1 % (rounded to 0), 5 %, 20 %, 100 % of 20
        prompts = {s["prompt"] for s in samples}
        assert "" in prompts and len(prompts) == 3
    summary = json.loads((played / "summary.json").read_text())
    assert [row["n_params"] for row in summary["sizes"]] == params[:2]
    assert {row["size"] for row in summary["sizes"]} == {"64x1", "64x2"}


def test_the_report_shows_what_there_is_and_only_that(played: Path) -> None:
    page = (played / "report.html").read_text()
    for there in (
        'id="sizes"',
        "Three sizes, one text",
        'id="pretraining"',
        'id="mixture"',
        "A base model, trained in",
    ):
        assert there in page, there
    for not_there in (
        'id="pipeline"',
        'id="sft"',
        "sog sft",
        "sog arena",
        "sog chat",
        "reward model",
        'id="leaderboard"',
    ):
        assert not_there not in page, not_there
    assert 'href="#mixture"' in page and "before training" in page
    at = page.index('id="sizes"')
    chart = page[page.index("<svg", at) : page.index("</svg>", at)]
    assert chart.count("<polyline") >= 3


def test_every_size_is_a_model_that_can_be_sampled(played: Path) -> None:
    for model in (f"{played}:pretrain", played / "pretrain" / "64x1" / "checkpoint"):
        done = sog("sample", model, "--max-tokens", 5)
        assert done.returncode == 0, done.stderr


def test_the_same_command_continues_after_a_size_was_lost_with_the_same_numbers(
    played: Path, text: Path, tmp_path: Path
) -> None:
    root = tmp_path / "shakespeare"
    shutil.copytree(played, root)
    shutil.rmtree(root / "pretrain" / "64x2")  # killed before it, and so before the largest too
    for name in ("result.json", "metrics.jsonl", "samples.jsonl"):
        (root / "pretrain" / name).unlink()
    done = sog("run", "shakespeare", "--corpus", text, "--out", root, *SMALL)
    assert done.returncode == 0, done.stderr
    for place in ("pretrain", "pretrain/64x2"):
        here, there = (json.loads((run / place / "result.json").read_text()) for run in (root, played))
        assert without_clocks(here) == without_clocks(there)
        weights = [(run / place / "checkpoint" / "model.safetensors").read_bytes() for run in (root, played)]
        assert weights[0] == weights[1]


def test_a_stage_that_the_recipe_does_not_have_is_refused(played: Path) -> None:
    done = sog("sft", "--out", played)
    assert done.returncode == 2
    assert one_sentence(done.stderr) == ("the recipe shakespeare has no sft stage; it has collect, tokenize, pretrain")


def test_it_asks_for_a_text_and_makes_no_folder_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "shakespeare", "--out", str(tmp_path / "run")]) == 2
    assert "give it one with --corpus FILE" in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- the parts, untrained


def test_a_recipe_has_all_stages_or_those_it_names_in_the_pipelines_order() -> None:
    assert Recipe("x").order() == STAGES
    assert Recipe("x", stages=("pretrain", "collect", "tokenize")).order() == ("collect", "tokenize", "pretrain")
    with pytest.raises(ConfigError, match='did you mean "pretrain"'):
        Recipe("x", stages=("pretrian",))
    with pytest.raises(ConfigError, match="at least one"):
        Recipe("x", stages=())
    assert "shakespeare" in names()
    made = load("shakespeare", minutes=None, seed=0, corpus=(), overrides={})
    assert made.minutes == 5.0 and made.pretrain.sizes == 3 and made.pretrain.sample_at == (0.0, 0.01, 0.05, 0.2, 1.0)
    with pytest.raises(ConfigError, match="at least 1"):
        load("shakespeare", minutes=0.5, seed=0, corpus=(), overrides={})


@pytest.mark.parametrize(("width", "layers", "beside"), [(128, 4, ["64x2", "128x2"]), (256, 6, ["128x4", "192x5"])])
def test_the_sizes_beside_are_the_next_smaller_ones(width: int, layers: int, beside: list[str]) -> None:
    model = dial.shape(width, layers, 1024, 128)
    found = sizes._smaller(model, 2)
    assert [f"{m.hidden_size}x{m.num_hidden_layers}" for m in found] == beside
    assert all(count(m)[0] < count(model)[0] for m in found)
    assert len(sizes._smaller(dial.shape(64, 1, 1024, 128), 2)) == 0


def test_the_steps_of_all_sizes_together_fit_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(model: GPTConfig, dtype: str, *, rows: int, context: int, fused: bool, device: str) -> float:
        return model.num_hidden_layers / 100

    class Clock:
        def seconds(self) -> float:
            return 20.0

    monkeypatch.setattr(sizes, "measure_step", seconds)
    config = pretrain.Config(seconds=200.0, sizes=3, eval_tokens=8192, sample_at=(0.0, 1.0))
    models = [dial.shape(64, layers, 1024, 128) for layers in (1, 2, 5)]
    steps = sizes._steps(config, {"dtype": "float32", "compiled": False, "fused": False}, models, Clock())  # type: ignore[arg-type]
    assert 20 + steps * 0.08 + 10 * 0.08 + 6 == pytest.approx(200 * 0.94, abs=0.1)
    compiled = sizes._steps(config, {"dtype": "float32", "compiled": True, "fused": False}, models, Clock())  # type: ignore[arg-type]
    assert compiled > steps
    assert torch.get_num_threads() >= 1
