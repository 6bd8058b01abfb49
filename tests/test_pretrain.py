"""The pretraining stage on a tiny text, in this process: its families, its growing batches, and where it may stop."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stateofgpt.cli import main
from stateofgpt.data.batches import Int64, PretrainBatches
from stateofgpt.errors import ConfigError
from stateofgpt.infer.engine import Engine
from stateofgpt.model.checkpoint import load_model
from stateofgpt.run import Run
from stateofgpt.stages import collect, pretrain, tokenize
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.optim import OptimConfig
from stateofgpt.train.ramp import Cuts

STEPS, ROWS, CONTEXT = 9, 4, 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose text is about two thirds of what nine steps of four rows read."""
    folder = tmp_path_factory.mktemp("tokenized")
    rng, words = random.Random(0), ["lamp", "door", "river", "stone", "cloud", "seven", "walks", "sings"]
    text = "\n\n".join(" ".join(rng.choices(words, k=12)) + "." for _ in range(20))
    (folder / "text.txt").write_text(text)
    with Run.open(folder / "run", "tiny", {}, 0) as run:
        own = collect.Config(sources=(), corpus=(str(folder / "text.txt"),), corpus_weight=1.0, most_characters=256,
                             fewest_corpus_bytes=1, validation_share=0.2)  # fmt: skip
        collect.run(own, run)
        tokenize.run(tokenize.Config(vocab_size=300), run)
    return folder / "run"


@pytest.fixture
def run(tokenized: Path, tmp_path: Path) -> Iterator[Run]:
    shutil.copytree(tokenized, tmp_path / "run")
    with Run.open(tmp_path / "run", "tiny", {}, 0) as opened:
        yield opened


def config(save_every_s: float = -1.0, weight_decay: float | None = None, **changes: Any) -> pretrain.Config:
    optim = OptimConfig() if weight_decay is None else OptimConfig(weight_decay=weight_decay)
    small: dict[str, Any] = {
        "steps": STEPS, "width": 64, "layers": 1, "context": CONTEXT, "rows": ROWS, "sample_at": (), "eval_at": (0, 1),
        "eval_tokens": 64, "dtype": "float32", "fused": False, "compiled": False,
        "loop": LoopConfig(optim=optim, save_every_s=save_every_s),
    }  # fmt: skip
    return pretrain.Config(**{**small, **changes})


class Stopped(Exception):
    """Stands for a kill."""


def train(run: Run, name: str, made: pretrain.Config, monkeypatch: pytest.MonkeyPatch, die: int = -1) -> list[Int64]:
    """Train in the run's folder `name`; the inputs of every step it read, up to a kill before step `die` is done."""
    stage, seen = run.inside(f"pretrain/{name}"), []
    with monkeypatch.context() as patched:
        plain: Callable[..., tuple[Int64, Int64]] = PretrainBatches.rows

        def rows(self: PretrainBatches, first: int, n: int) -> tuple[Int64, Int64]:
            if len(seen) == die:
                raise Stopped
            out = plain(self, first, n)
            seen.append(out[0])
            return out

        patched.setattr(PretrainBatches, "rows", rows)
        with stage.timed():
            try:
                pretrain.train(made, run, stage)
                assert die < 0
            except Stopped:
                pass
    return seen


def weights(run: Run, name: str) -> bytes:
    return (run.root / "pretrain" / name / "checkpoint" / "model.safetensors").read_bytes()


def logged(run: Run, name: str) -> list[dict[str, Any]]:
    clocks = ("time", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in clocks} for line in run.inside(f"pretrain/{name}").metrics()]


# ------------------------------------------------------------------------------------------------------------- families

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"arch": "qwen3"},
    "qwen3, grouped, untied, biased": {"arch": "qwen3", "width": 128, "kv_heads": 1, "tied": False, "biases": True},
    "llama": {"arch": "llama"},
    "llama, grouped, untied, biased": {"arch": "llama", "width": 128, "kv_heads": 1, "tied": False, "biases": True},
    "gpt2": {"arch": "gpt2"},
    "gpt2, untied": {"arch": "gpt2", "tied": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_each_family_is_raised_from_nothing_and_transformers_computes_the_same(
    family: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    asked = FAMILIES[family]
    read = train(run, "new", config(**asked), monkeypatch)
    folder = run.root / "pretrain" / "new" / "checkpoint"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    assert theirs.config.model_type == asked["arch"]
    assert theirs.config.tie_word_embeddings == asked.get("tied", True)
    if "kv_heads" in asked:
        assert theirs.config.num_key_value_heads == asked["kv_heads"] and theirs.config.attention_bias
        assert getattr(theirs.config, "mlp_bias", False) == (asked["arch"] == "llama")
    ids = read[0][0].tolist()
    (ours,) = Engine(load_model(folder)).score([ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(theirs(torch.tensor([ids])).logits[0, :-1], -1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(ours), expected, atol=1e-4)
    losses = [line["loss"] for line in logged(run, "new") if "loss" in line]
    assert losses[-1] < losses[0] - 0.3  # and it learned something


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("pretrain.arch=gpt2", "pretrain.kv_heads=2"), "kv_heads is 2, and in gpt2 every head has its own"),
        (("pretrain.arch=gpt2", "pretrain.biases=false"), "gpt2 always has them"),
        (("pretrain.arch=gpt2", "pretrain.width=100"), "a width of 100 is no multiple of 64"),
        (("pretrain.arch=llama", "pretrain.width=100"), "which llama needs"),
        (("pretrain.kv_heads=2", "pretrain.width=192"), "a width of 192 has 3 heads, which is no multiple of it"),
        (("pretrain.kv_heads=0",), "at least 1 key-value head"),
        (("pretrain.arch=gpt3",), 'must be one of qwen3, llama, gpt2, not "gpt3"'),
        (("pretrain.ramp=0.25",), "must be 2 values"),
        (("pretrain.ramp=0.01,0.5",), "8 rows cannot be cut into 100"),
    ],
)
def test_what_no_model_looks_like_is_refused_in_one_sentence_before_anything_is_made(
    settings: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "debug", "--out", str(tmp_path / "run"), *(f"--{text}" for text in settings)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and error.startswith("error: ") and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"arch": "llama"}, {"tied": False}, {"kv_heads": 1}, {"biases": True}])
def test_a_run_from_a_model_has_that_models_architecture(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave out arch, tied, kv_heads and biases"):
        pretrain.Config(steps=3, parent="somewhere", **wrong)


# ------------------------------------------------------------------------------------------------------ growing batches


def test_a_growing_batch_reads_the_rows_of_a_run_without_one_and_its_loss_is_the_mean_over_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(run, "plain", config(), monkeypatch)
    grown = train(run, "grown", config(ramp=(0.25, 0.7)), monkeypatch)
    assert [len(ids) for ids in plain] == [4] * 9
    assert [len(ids) for ids in grown] == [1] * 12 + [2] * 6 + [4] * 3
    assert (np.concatenate(plain) == np.concatenate(grown)).all()
    results = [run.inside(f"pretrain/{name}").result() or {} for name in ("plain", "grown")]
    assert [made["steps"] for made in results] == [9, 21]
    assert results[0]["tokens"] == results[1]["tokens"] == 9 * 4 * 16
    assert results[0]["realised"] == results[1]["realised"]
    lines = [line for line in logged(run, "grown") if "loss" in line]
    assert [line["tokens"] for line in lines] == (16 * np.cumsum([1] * 12 + [2] * 6 + [4] * 3)).tolist()
    assert lines[0]["loss"] == pytest.approx(np.log(320), abs=0.2)  # per token, however few rows


# -------------------------------------------------------------------------------------------------------- text repeated


def decay_of(run: Run, name: str) -> float:
    decided: dict[str, float] = run.inside(f"pretrain/{name}").decide("repeats", dict)
    return decided["decay_times"]


@pytest.mark.slow
def test_weight_decay_grows_where_a_small_text_is_read_many_times(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usual: dict[str, Any] = {"steps": 25, "weight_decay": 0.2, "save_every_s": 1e9}
    train(run, "once", config(), monkeypatch)
    train(run, "often", config(**usual), monkeypatch)
    epochs = (run.inside("pretrain/often").result() or {})["realised"]["epochs"]["corpus"]
    times = decay_of(run, "often")
    assert decay_of(run, "once") == 1.0 and 8 < epochs < 16
    assert 1 / (0.02 * 0.2 * times) == pytest.approx(0.5 * 25 / (epochs - 4))  # steps of memory, by Muon's rate
    train(run, "by hand", config(**{**usual, "repeat_decay": 1.0, "weight_decay": 0.2 * times}), monkeypatch)
    assert weights(run, "by hand") == weights(run, "often")
    train(run, "off", config(**usual, repeat_decay=1.0), monkeypatch)
    assert decay_of(run, "off") == 1.0 and weights(run, "off") != weights(run, "often")
    train(run, "a little", config(**usual, repeat_decay=2.5), monkeypatch)
    assert decay_of(run, "a little") == 2.5


def test_a_run_that_began_before_there_was_the_rule_ends_without_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(steps=25)
    train(run, "old", made, monkeypatch, 3)
    decisions = run.root / "pretrain" / "old" / "decisions.json"
    there = json.loads(decisions.read_text())
    assert there.pop("repeats")["decay_times"] > 1.0
    decisions.write_text(json.dumps(there))  # as an earlier version left it
    train(run, "old", replace(made, loop=replace(made.loop, save_every_s=1e9)), monkeypatch)
    assert decay_of(run, "old") == 1.0


# ------------------------------------------------------------------------------------------------ where a run may stop


@pytest.mark.parametrize(
    ("changes", "dies"),
    [
        ({"ramp": (0.25, 0.7)}, (5, 10, 3)),  # within the first part, in the second, in the whole batches
        ({"warmup": 4, "decay_share": 0.5}, (2, 5)),  # while the rate rises, while it falls; in two epochs
        ({"loop": LoopConfig(save_every_s=-1.0, average_share=0.5)}, (6,)),
    ],
)
def test_stopped_in_the_middle_it_ends_with_the_same_weights(
    changes: dict[str, Any], dies: tuple[int, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(**changes)
    straight = train(run, "straight", made, monkeypatch)
    torn = []
    for die in (*dies, -1):
        torn += train(run, "torn", made, monkeypatch, die)
    assert len(torn) == len(straight) and all((a == b).all() for a, b in zip(torn, straight, strict=True))
    assert weights(run, "torn") == weights(run, "straight") and logged(run, "torn") == logged(run, "straight")
    result = run.inside("pretrain/torn").result() or {}
    assert result["realised"]["epochs"]["corpus"] > 1.2  # so that it also stopped inside an epoch


@pytest.mark.slow
def test_on_another_number_of_threads_it_reads_the_same_rows_in_the_same_order(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(ramp=(0.5, 0.4))
    straight = train(run, "one", made, monkeypatch)
    moved = train(run, "moved", made, monkeypatch, 10)
    torch.set_num_threads(2)
    moved += train(run, "moved", made, monkeypatch)
    assert len(moved) == len(straight) == Cuts(9, 4, made.growing()).steps
    assert all((a == b).all() for a, b in zip(moved, straight, strict=True))
    one, two = (run.inside(f"pretrain/{name}").result() or {} for name in ("one", "moved"))
    assert one["val_bpb"] == pytest.approx(two["val_bpb"], rel=1e-3)
