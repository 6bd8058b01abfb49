"""`sog reward DATA`: a reward model from a file alone, killed and continued, refused, measured, and used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stateofgpt.cli import main
from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.model.checkpoint import load_reward, save_checkpoint
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.rl.reward_training import score_rankings
from stateofgpt.rl.upper import VoteLoss
from stateofgpt.run import Run, read_json
from stateofgpt.stages import upper_training, vote_features, votes
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer

WORDS = ["red", "blue", "green", "tall", "short", "round", "open", "quiet", "early", "late"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model, and votes of people who dislike one word, wherever it stands."""
    folder = tmp_path_factory.mktemp("votes")
    rng = random.Random(0)
    tokenizer = Tokenizer.train(iter([" ".join(WORDS) + " awful user assistant"] * 20), 300)
    model = GPT(GPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, intermediate_size=64, max_position_embeddings=128,
    ))  # fmt: skip
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.25, generator=g)
    save_checkpoint(folder / "model", model, tokenizer=tokenizer, stage="sft", run="small")

    def answer(bad: bool) -> str:
        words = rng.choices(WORDS, k=rng.randint(2, 5))
        return " ".join([*words, *(["awful"] if bad else [])])

    rows: list[dict[str, Any]] = []
    for i in range(150):
        good, bad = answer(False), answer(True)
        first = rng.random() < 0.5
        votes_ = [1 if first else 2] * 3 if rng.random() < 0.9 else [0, 2 if first else 1, 1 if first else 2]
        rows.append({
            "instruction": f"Describe {WORDS[i % 10]} {i // 2}", "input": "", "response1": good if first else bad,
            "response2": bad if first else good, **{f"annotator{a + 1}": v for a, v in enumerate(votes_)},
        })  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    lines.insert(7, '{"instruction": "broken"}')
    (folder / "people.jsonl").write_text("\n".join(lines))
    return folder


def learn(place: Path, out: Path, *more: object) -> int:
    words = ["reward", place / "people.jsonl", "--from", place / "model", "--out", out, "--folds", 3, *more]
    return main([str(word) for word in words])


@pytest.mark.slow
def test_a_file_and_a_model_are_enough(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn(place, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "annotators, 151 rows" in " ".join(said.split()) and "1 bad rows left out" in " ".join(said.split())
    assert "always the longer" in said and "verdict: " in said
    result = read_json(tmp_path / "run" / "reward" / "result.json")
    found = result["health"]
    assert found["accuracy"]["low"] > found["baselines"]["longer"]["accuracy"]
    assert found["accuracy"]["value"] > 0.85 and found["ceiling"] > 0.8
    assert result["votes"]["bad_rows"] == 1 and result["packing"] > 1.2
    assert [row["rankings"] for row in result["by_data"]] == sorted(row["rankings"] for row in result["by_data"])
    # the checkpoint alone gives what was learned: on its own votes at least as right as across folds
    model = load_reward(tmp_path / "run" / "reward" / "checkpoint")
    assert model.config.num_hidden_layers == result["depth"]
    chat = ChatFormat(Tokenizer.load(tmp_path / "run" / "reward" / "checkpoint"))
    rankings = read_comparisons(place / "people.jsonl").rankings
    scores = score_rankings(model, chat, rankings)
    hits = [row[i] > row[j] for row, r in zip(scores, rankings, strict=True) for i, j in r.pairs()]
    assert sum(hits) / len(hits) >= found["accuracy"]["value"] - 0.02
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Can the reward model be trusted?" in page and "Annotator 3" in page

    # its health on the votes it learned from is told to be worth nothing; and the same command again is done
    assert (
        main(["reward", "--health", str(tmp_path / "run/reward/checkpoint"), str(place / "people.jsonl"), "--json"])
        == 0
    )
    again = json.loads(capsys.readouterr().out)
    assert again["seen"] and again["verdict"]["word"] == "not trusted"
    assert learn(place, tmp_path / "run") == 0
    assert main(["reward", "--out", str(tmp_path / "run")]) == 2
    assert "made from a file of votes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--lora", 2, "--layers", 2), ("--layers", 1)])
def test_upper_blocks_learn_and_a_kill_changes_nothing(
    more: tuple[object, ...], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vote_features, "_fastest", lambda *_: "float32")
    loop = upper_training.LoopConfig
    monkeypatch.setattr(upper_training, "LoopConfig", lambda optim: loop(optim=optim, save_every_s=0.0))
    assert learn(place, tmp_path / "whole", *more) == 0
    result = read_json(tmp_path / "whole" / "reward" / "result.json")
    assert result["pair_accuracy"] > 0.85 and 0.5 < result["head_accuracy"] <= 1.0

    # killed after some features, in the middle of the first fold, between folds and in the middle of the last training
    kills: list[tuple[Any, str, int]] = [
        (vote_features, "compute", 2), (VoteLoss, "__call__", 4), (votes, "train_upper", 2), (VoteLoss, "__call__", 20),
    ]  # fmt: skip
    for module, name, calls in kills:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, dies_after(getattr(module, name), calls))
            with pytest.raises(Killed):
                learn(place, tmp_path / "killed", *more)
    assert learn(place, tmp_path / "killed", *more) == 0
    whole, killed = (load_reward(tmp_path / run / "reward" / "checkpoint").state_dict() for run in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    left = {path.name for path in (tmp_path / "killed").rglob("*")}
    assert not {name for name in left if name.startswith(("step_", "features"))}


class Killed(BaseException):
    pass


def dies_after(act: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = [calls]

    def dying(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        return act(*args, **more)

    return dying


def test_a_budget_takes_fewer_votes_or_steps_and_is_decided_once(place: Path, tmp_path: Path) -> None:
    config = votes.Config(str(place / "people.jsonl"), str(place / "model"), seconds=0.5, lora=2, layers=1, folds=2)
    with Run.open(tmp_path / "run", "votes", {}, 0) as run:
        result = votes.run(config, run)
        assert 64 <= result["votes"]["left_out"] + 64 <= 150
        steps = run.stage("reward").decide("upper_steps", dict)["steps"]
        assert 1 <= steps <= 9


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora", "4"], "needs a file of votes"),
        (["DATA"], "give --from MODEL"),
        (["nowhere.jsonl", "--from", "MODEL"], "no such file"),
        (["DATA", "--from", "MODEL", "--corpus", "x"], "means nothing beside a file"),
        (["DATA", "--from", "MODEL", "--reward.lr", "1"], "--reward.lr is for a run's own stage"),
        (["DATA", "--from", "MODEL", "--folds", "1"], "at least 2"),
        (["DATA", "--from", "MODEL", "--layers", "9"], "the model has 4"),
        (["FEW", "--from", "MODEL"], "at least 20 are needed"),
        (["--health", "MODEL", "DATA"], "is a language model"),
        (["--health", "nothing", "DATA"], "there is no model"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    words: list[str], says: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}')
    known = {"DATA": str(place / "people.jsonl"), "MODEL": str(place / "model"), "FEW": str(few)}
    out = [] if "--health" in words else ["--out", str(tmp_path / "run")]
    assert main(["reward", *(known.get(word, word) for word in words), *out]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_other_votes_in_the_place_of_those_a_run_began_with_are_refused(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "people.jsonl"
    data.write_bytes((place / "people.jsonl").read_bytes())
    config = votes.Config(str(data), str(place / "model"), folds=2)
    with Run.open(tmp_path / "run", "votes", {}, 0) as run:
        asked = votes._Voting(config, run, run.stage("reward"), lambda line: None)
        asked._votes()
        data.write_text(data.read_text() + "\n" + json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
        with pytest.raises(votes.RunError, match=r"people\.jsonl is not what this run began with"):
            asked._votes()
