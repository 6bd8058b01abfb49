"""Adapters in the stages after finetuning: what learns is of low rank, what is saved is whole, a kill costs nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stateofgpt.assistant.session import Turn
from stateofgpt.errors import ConfigError
from stateofgpt.model.checkpoint import load_model, load_reward, save_checkpoint
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import ValueModel
from stateofgpt.model.lora import switched_off
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.rl.ppo import PPO
from stateofgpt.rl.reward_training import score_ids
from stateofgpt.rl.scoring import LearnedScorer
from stateofgpt.run import Run
from stateofgpt.stages import reward, rl
from stateofgpt.stages.algorithms import OFFLINE, rankings_of
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import Trainer
from stateofgpt.train.loss import Way

pytestmark = pytest.mark.slow  # together they take long

TEXT = "What is 12 + 30? Show your work. The answer is 42. user assistant tool yes no maybe"
RANK = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter([TEXT] * 20), 300)


def begin(folder: Path, tokenizer: Tokenizer) -> Run:
    """A run with a finetuned model, of random weights, and nothing after it."""
    config = GPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=48, max_position_embeddings=192,
    )  # fmt: skip
    gpt, g = GPT(config), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.15, generator=g)
    run = Run.open(folder, "tiny", {}, 0)
    run.stage("pretrain").decide("plan", lambda: {"dtype": "float32", "compiled": False, "fused": False})
    save_checkpoint(run.stage("sft").checkpoint, gpt, tokenizer=tokenizer, stage="sft", run="tiny")
    return run


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Run]:
    with begin(tmp_path / "run", tokenizer) as opened:
        yield opened


class Stopped(Exception):
    """Stands for a kill."""


def killed_after(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the n-th optimizer step is not finished."""
    plain, taken = Trainer.step, [0]

    def step(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        taken[0] += 1
        if taken[0] == n:
            raise Stopped
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "step", step)


def ranks_of_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, int]:
    """By the name of a tensor that changed: the rank of the difference (1 for a vector)."""
    found = {}
    for name, tensor in before.items():
        change = (after[name] - tensor).double()
        if change.abs().max() > 0:
            found[name] = int(torch.linalg.matrix_rank(change, rtol=1e-4)) if change.ndim == 2 else 1
    return found


def weights(run: Run, stage: str) -> bytes:
    return (run.stage(stage).checkpoint / "model.safetensors").read_bytes()


def trunk(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.")}


# -------------------------------------------------------------------------------------------------------------- reward


@pytest.fixture
def rankings(tmp_path: Path) -> Path:
    rng = random.Random(0)
    rows = []
    for i in range(40):
        answers = [" ".join(rng.choices(["yes", "no", "maybe", "42"], k=4)) for _ in range(3)]
        ranks = [1 + sum(other.count("yes") > a.count("yes") for other in answers) for a in answers]
        rows.append({"prompt": f"What is {i}?", "completions": answers, "ranks": ranks})
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward_config(rankings: Path, rank: int | None) -> reward.Config:
    made = reward.Config(n_prompts=1, rankings=str(rankings), lora=rank)
    loop = replace(
        made.training.loop, save_every_s=-1.0, optim=replace(made.training.loop.optim, lr=0.01, muon_lr=0.02)
    )
    return replace(made, training=replace(made.training, prompts_per_step=6, loop=loop))


def test_a_reward_model_with_adapters_differs_from_sft_by_a_low_rank_and_a_head(run: Run, rankings: Path) -> None:
    result = reward.run(reward_config(rankings, RANK), run)
    folder = run.stage("reward").checkpoint
    changed = ranks_of_change(trunk(load_model(run.stage("sft").checkpoint)), trunk(load_reward(folder)))
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-2] for name in changed} == set(layers) and len(changed) == 2 * len(layers)
    assert set(changed.values()) == {RANK}
    assert result["n_prompts"] == 36 and "lora" not in (folder / "config.json").read_text()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder))
    ids = torch.arange(20, 50)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[:, 0], load_reward(folder)(ids), rtol=1e-4, atol=1e-4)


def test_a_reward_model_with_adapters_resumes_from_them_alone_with_the_same_weights(
    run: Run, rankings: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = reward_config(rankings, RANK)
    with monkeypatch.context() as patched:
        killed_after(4, patched)
        with pytest.raises(Stopped):
            reward.run(config, run)
    stage = run.stage("reward")
    state = (stage.resume_dir / "step_3" / "tensors.safetensors").stat().st_size
    assert state < 0.8 * len(weights(run, "sft"))  # adapters, their momenta, and the head
    reward.run(config, run)
    with begin(tmp_path / "straight", tokenizer) as straight:
        reward.run(config, straight)
        assert weights(straight, "reward") == weights(run, "reward")
        assert [line["loss"] for line in straight.stage("reward").metrics() if "loss" in line] == [
            line["loss"] for line in stage.metrics() if "loss" in line
        ]


def test_without_adapters_all_of_it_learns(run: Run, rankings: Path) -> None:
    reward.run(reward_config(rankings, None), run)
    before, after = trunk(load_model(run.stage("sft").checkpoint)), trunk(load_reward(run.stage("reward").checkpoint))
    changed = ranks_of_change(before, after)
    assert changed.keys() == before.keys() and max(changed.values()) > RANK


def test_a_rank_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match=r"reward\.lora is 0, a rank is at least 1"):
        reward.Config(n_prompts=1, lora=0)


# ----------------------------------------------------------------------------------------------- reinforcement learning


def rl_config(rank: int | None, algorithm: Any = None) -> rl.Config:
    made = rl.Config(iterations=3, batch=4, max_tokens=6, held_out_prompts=2, save_every_s=-1.0, lora=rank,
                     algorithm=algorithm, max_kl=1e9, guards=GuardConfig(stop=False))  # fmt: skip
    faster = replace(made.ppo.policy, optim=replace(made.ppo.policy.optim, lr=0.01))
    return replace(made, ppo=replace(made.ppo, policy=faster, value=faster, no_end_score=-1.0))


@pytest.fixture
def rewarded(run: Run, rankings: Path) -> Run:
    reward.run(reward_config(rankings, None), run)
    return run


def training(run: Run, config: rl.Config) -> rl.PolicyTraining:
    normal = run.stage("reward").result() or {}
    at = run.stage("rl"), run.stage("sft").checkpoint, run.stage("reward").checkpoint
    given = rankings_of(run, None) if config.chosen in OFFLINE else ()
    return rl.PolicyTraining(config, run, *at, Way(), normal["mean"], normal["std"], rankings=given)


def test_a_policy_with_adapters_differs_from_sft_by_a_low_rank_and_its_reference_not_at_all(rewarded: Run) -> None:
    made = training(rewarded, rl_config(RANK))
    ppo = made.optimization
    assert isinstance(ppo, PPO) and isinstance(ppo.scorer, LearnedScorer)
    assert ppo.reference is ppo.policy and ppo.scorer.model.model is ppo.value.model
    with rewarded.stage("rl").timed():
        result = made.work()
    assert result["before"]["kl"] == 0.0 and result["kl"] != 0.0
    folder = rewarded.stage("rl").checkpoint
    start, reward_folder = rewarded.stage("sft").checkpoint, rewarded.stage("reward").checkpoint
    before, after = trunk(load_model(start)), trunk(load_model(folder))
    changed = ranks_of_change(before, after)
    assert len(changed) == 14 and max(changed.values()) <= RANK
    ids = torch.arange(20, 50)[None]
    with torch.no_grad():
        fresh, judge = load_model(start)(ids), load_reward(reward_folder)(ids)
        apart = ValueModel(load_reward(reward_folder))(ids)
        assert not torch.equal(ppo.policy(ids), fresh) and not torch.equal(ppo.value(ids), apart)
        with switched_off(ppo.reference), switched_off(ppo.scorer.model):
            assert torch.equal(ppo.reference(ids), fresh) and torch.equal(ppo.scorer.model(ids), judge)
        torch.testing.assert_close(ppo.policy(ids), load_model(folder)(ids), rtol=1e-4, atol=1e-4)
    turn = Turn((), [20, 21], [22, ppo.scorer.end_id], [1, 1], [0.0, 0.0], "stop")
    expected = (score_ids(load_reward(reward_folder), [[20, 21, 22, ppo.scorer.end_id]], made.tokenizer.pad)[0]
                - ppo.scorer.mean) / ppo.scorer.std  # fmt: skip
    assert ppo.scores([turn]).item() == pytest.approx(
        expected, abs=1e-6
    )  # of the reward model, not of the value's trunk


def test_with_adapters_there_are_two_models_in_memory_and_not_four(rewarded: Run) -> None:
    def numbers(rank: int | None) -> int:
        ppo = training(rewarded, rl_config(rank)).optimization
        assert isinstance(ppo, PPO) and isinstance(ppo.scorer, LearnedScorer)
        models: list[torch.nn.Module] = [ppo.policy, ppo.reference, ppo.value, ppo.scorer.model]
        return sum({p.data_ptr(): p.numel() for model in models for p in model.parameters()}.values())

    whole, adapted = numbers(None), numbers(RANK)
    factors = 2 * RANK * sum(sum(m.shape) for m in trunk(load_model(rewarded.stage("sft").checkpoint)).values()
                             if m.ndim == 2 and m.shape[0] != 320)  # fmt: skip
    head = 32  # the value model's own
    assert adapted == whole // 2 + factors + head


def kls(run: Run) -> list[float]:
    """The KL of every iteration; lines of looks have none."""
    return [line["kl"] for line in run.stage("rl").metrics() if "kl" in line]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
def test_a_policy_with_adapters_resumes_with_the_same_weights(
    algorithm: str, rewarded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(rewarded.root, tmp_path / "torn", ignore=shutil.ignore_patterns(".lock"))
    config = rl_config(RANK, algorithm)
    with Run.open(tmp_path / "torn", "tiny", {}, 0) as torn:
        with monkeypatch.context() as patched:
            killed_after(10 if algorithm == "ppo" else 6, patched)
            with pytest.raises(Stopped):
                rl.run(config, torn)
        newest = max(torn.stage("rl").resume_dir.glob("step_?"))
        # of the policy: what learns, its momenta, and two copies of it; all weights alone would be four times the model
        assert (newest / "tensors.safetensors").stat().st_size < 1.5 * len(weights(torn, "sft"))
        rl.run(config, torn)
        again = weights(torn, "rl")
        told = kls(torn)
    rl.run(config, rewarded)
    assert weights(rewarded, "rl") == again != weights(rewarded, "sft")
    assert kls(rewarded) == told


def test_an_rl_rank_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match=r"rl\.lora is 0, a rank is at least 1"):
        rl.Config(iterations=1, lora=0)
