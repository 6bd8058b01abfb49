"""`sog rl PROMPTS`: a policy from a model, a reward model and a file of prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from stateofgpt.cli import main
from stateofgpt.data.questions import Questions, read_questions
from stateofgpt.errors import DataError
from stateofgpt.model.checkpoint import load_model, save_checkpoint
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel
from stateofgpt.run import read_json
from stateofgpt.stages.rl import PolicyTraining
from stateofgpt.text.chat import Message
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.state import TrainState

WORDS = ["red", "blue", "green", "tall", "short", "round", "open", "quiet", "early", "late"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(seed: int, context: int = 128) -> GPT:
    model, g = GPT(GPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=48, max_position_embeddings=context,
    )), torch.Generator().manual_seed(seed)  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.2, generator=g)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two reward models, and prompts."""
    folder, rng = tmp_path_factory.mktemp("prompted"), random.Random(0)
    tokenizer = Tokenizer.train(iter([" ".join(WORDS) + " user assistant"] * 20), 300)
    save_checkpoint(folder / "model", small(0), tokenizer=tokenizer, stage="sft", run="small")
    for name, seed in (("reward", 1), ("judge", 2)):
        made = RewardModel(small(seed), tokenizer.pad)
        save_checkpoint(folder / name, made, tokenizer=tokenizer, stage="reward", run=name, parents=[folder / "model"])
    rows = [{"prompt": f"{i} {' '.join(rng.choices(WORDS, k=2))}"} for i in range(60)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def climb(place: Path, out: Path, *more: object) -> int:
    words = ["rl", place / "prompts.jsonl", "--from", place / "model", "--reward", place / "reward", "--out", out,
             "--rl.batch", 8, "--rl.max_tokens", 8, "--rl.iterations", 3, "--rl.held_out_prompts", 6,
             "--rl.guards.prompts", 4, "--rl.guards.every", 1, "--rl.guards.stop", "false", *more]  # fmt: skip
    return main([str(word) for word in words])


def policy(out: Path) -> list[torch.Tensor]:
    return [p.detach() for p in load_model(out / "rl" / "checkpoint").parameters()]


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "rl" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "seconds")} for line in lines]


def test_a_file_of_prompts_and_two_models_are_enough_and_a_kill_changes_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert climb(place, tmp_path / "whole", "--judge", place / "judge") == 0
    said = capsys.readouterr().out
    assert "judge:small" not in said and "judge: judge:reward, which the policy never learns from" in said
    result = read_json(tmp_path / "whole" / "rl" / "result.json")
    assert result["iterations"] == 3 and result["n"] == 6 and {"score_before", "score_after", "kl"} <= result.keys()
    assert "true_sft" not in result and (tmp_path / "whole" / "report.html").exists()
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "the score of a judge, which it never saw, goes from" in page and "KL to the model it began with" in page
    assert "SFT" not in page and "True score" not in page and "from text to" not in page
    curve = [row for row in metrics(tmp_path / "whole") if "proxy_reward" in row]
    assert [row["step"] for row in curve] == [1, 2, 3] and curve[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert not any(torch.equal(a, b.detach()) for a, b in zip(policy(tmp_path / "whole"), small(0).parameters(),
                                                              strict=True) if a.ndim == 2)  # fmt: skip

    plain, calls = PolicyTraining._iterate, []

    def dies(self: PolicyTraining, i: int, iterations: int) -> float:
        calls.append(i)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, i, iterations)

    monkeypatch.setattr(PolicyTraining, "_iterate", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        raise SystemExit(climb(place, tmp_path / "killed", "--judge", place / "judge", "--rl.save_every_s", 0))
    assert TrainState(tmp_path / "killed" / "rl" / "resume").latest() is not None
    monkeypatch.undo()
    assert climb(place, tmp_path / "killed", "--judge", place / "judge", "--rl.save_every_s", 0) == 0
    assert all(map(torch.equal, policy(tmp_path / "whole"), policy(tmp_path / "killed")))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert main(["rl", "--out", str(tmp_path / "whole")]) == 2
    assert "made from a file of prompts; `sog rl PROMPTS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--rl.algorithm", "dpo"), "dpo learns from rankings"),
        (("--rl.reward", "verified"), "no right answer"),
        (("--context", 8), "no room"),
        (("--context", 9), "leave room for an answer"),
        (("--context", 999, "--rl.max_tokens", 128), "reads 128 tokens at once, which leaves no room"),
        (("--rl.held_out_prompts", 0), "rl.held_out_prompts is 0, must be at least 1"),
        (("--device", "cuda:7"), "'cuda:7' is not on this machine"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    more: tuple[object, ...], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert climb(place, tmp_path / "run", *more) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()  # so that the mended command can have its name


def test_the_reward_model_is_no_judge_of_its_own_policy(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert climb(place, tmp_path / "run", "--judge", place / "reward") == 2
    assert "--judge is the reward model itself" in capsys.readouterr().err


def test_prompts_are_read_in_every_form_and_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [{"prompt": "Hello"}, {"prompt": chat}, {"messages": [*chat, {"role": "assistant", "content": "d"}]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    whole = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert read_questions(path) == [(Message("user", "Hello"),), whole]
    path.write_text("\n".join(json.dumps({"prompt": f"{i % 3}?", "chosen": "x", "rejected": "y"}) for i in range(9)))
    assert read_questions(path) == [(Message("user", f"{i}?"),) for i in range(3)]
    vote = '{"prompt": "a", "chosen": "x", "rejected": "y"}'
    for wrong, said in (
        ('{"text": "x"}', "neither prompt nor messages"), ('{"prompt": ""}', "empty"), ("{", ":1: "),
        ('[{"prompt": "a"}, 7]', r"\[1\]: the row is a JSON number, it must be an object"),
        ('{"prompt": "a"}\n' + vote, ":2: this row is a vote"),
        (vote + '\n{"prompt": "a"}\n{"prompt": "b"}', "more than half .* are no votes"),
    ):  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(DataError, match=said):
            read_questions(path)


def test_a_tenth_of_the_prompts_is_held_out_and_never_asked() -> None:
    asked = Questions([(Message("user", f"Is {i} odd?"),) for i in range(40)], seed=1)
    train, held_out = ({p.key for p in asked.problems(500, split, 0)} for split in ("train", "heldout"))  # type: ignore[arg-type]
    assert len(train) == 36 and len(held_out) == 4 and not train & held_out
    problem = asked.problems(1, "train", 0)[0]
    assert asked.conversation(problem) == (Message("user", problem.question),)
