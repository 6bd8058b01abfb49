"""Algorithms without a value model: what they keep, what they charge, and that they find what is rewarded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_ppo import END, EOT, GOOD, PAD, equal, model, share_of_good, weights
from torch import Tensor

from stateofgpt.assistant.session import Turn
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.data.skills import Problem
from stateofgpt.errors import ConfigError
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.rl.advantage import answer_rewards, group_relative, leave_one_out
from stateofgpt.rl.group import GroupConfig, GroupOptimization
from stateofgpt.rl.optimization import Optimization, UpdateConfig
from stateofgpt.rl.ppo import PPO
from stateofgpt.rl.scoring import VerifiedScorer
from stateofgpt.text.chat import Message
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.loss import Batch, Way
from stateofgpt.train.optim import OptimConfig

ALGORITHMS = ("grpo", "dr_grpo", "rloo", "reinforce", "best_of_n", "rejection")
FAST = LoopConfig(optim=OptimConfig(lr=3e-3, eps=1e-5, weight_decay=0.0, use_muon=False))
GROUP = 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def answers(policy: GPT, n: int = 12, seed: int = 0) -> list[Turn]:
    """GROUP answers to each of n / GROUP prompts, side by side, with the engine's log-probabilities; every third has a
    given stretch, as after a tool's answer."""
    asked = [[EOT, 1, 7 + i % 5, 9][: 2 + i % 3] for i in range(n // GROUP) for _ in range(GROUP)]
    made = Engine(policy, max_batch=16).complete(asked, SamplingParams(max_tokens=8, seed=seed, stop_ids=(END, EOT)))
    turns = []
    for prompt, c in zip(asked, made, strict=True):
        finish = "stop" if c.finish == "stop" else "length"
        turns.append(Turn((Message("assistant", ""),), prompt, c.ids, [1] * len(c.ids), c.logprobs, finish))  # type: ignore[arg-type]
    return turns


def make(
    algorithm: str, *, own: GroupConfig | None = None, config: UpdateConfig | None = None, **more: object
) -> GroupOptimization:
    learner = GroupOptimization(
        algorithm, model(), model(), VerifiedScorer(lambda problem, messages: 0.0, end_id=END),  # type: ignore[arg-type]
        config or UpdateConfig(policy=FAST), own or GroupConfig(), group=GROUP, max_tokens=8, pad_id=PAD, way=Way(),
        **more,  # type: ignore[arg-type]
    )  # fmt: skip
    learner.scores = counted  # type: ignore[method-assign]
    return learner


def counted(turns: list[Turn], problems: object = ()) -> Tensor:
    return torch.tensor([float(t.ids.count(GOOD)) for t in turns])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_finds_what_is_rewarded(algorithm: str) -> None:
    learner = make(algorithm, own=GroupConfig(accept=1.0) if algorithm == "rejection" else None)
    learner.kl_coefficient = 0.0
    before = share_of_good(answers(learner.policy, n=48, seed=999))
    for i in range(15):
        experience, watched = learner.experience(answers(learner.policy, n=48, seed=i))
        learner.update(experience, torch.Generator().manual_seed(i), 1.0, watched["kl"])
    assert before < 0.1 and share_of_good(answers(learner.policy, n=48, seed=999)) > 2 * before + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "reinforce", "grpo"])
def test_the_penalty_holds_it_back(algorithm: str) -> None:
    found = []
    for strength in (0.0, 3.0):
        learner = make(algorithm, own=GroupConfig(kl_loss=strength))
        learner.kl_coefficient = strength
        for i in range(8):
            experience, watched = learner.experience(answers(learner.policy, n=48, seed=i))
            learner.update(experience, torch.Generator().manual_seed(i), 1.0, watched["kl"])
        found.append(learner.look(answers(learner.policy, n=48, seed=99), exact=True).watched["kl"])
    assert found[1] < found[0] / 2


def test_advantages_are_those_of_the_algorithm() -> None:
    turns = answers(model())
    for algorithm in ("grpo", "dr_grpo", "rloo", "reinforce"):
        learner = make(algorithm)
        learner.reference = model(5)
        experience, _ = learner.experience(turns)
        charged = answer_rewards(
            counted(turns), experience.logprobs, experience.reference, experience.rollouts.mask, learner.kl_coefficient
        )
        expected = {
            "grpo": group_relative(counted(turns), GROUP, scaled=True),
            "dr_grpo": group_relative(counted(turns), GROUP, scaled=False),
            "rloo": leave_one_out(charged, GROUP),
            "reinforce": leave_one_out(charged, len(turns)),
        }[algorithm]
        assert torch.equal(experience.advantages[:, 0], expected), algorithm


def test_best_of_n_keeps_one_answer_of_each_group_and_rejection_what_is_good_enough() -> None:
    turns, scores = answers(model()), torch.tensor([0.0, 3.0, 1.0, 3.0, 0.4, 0.2, 0.1, 0.3, 5.0, 0.0, 0.0, 6.0])
    for algorithm, accept, kept in (
        ("best_of_n", None, [1, 4, 11]),
        ("best_of_n", 0.5, [1, 11]),
        ("rejection", 0.5, [1, 2, 3, 8, 11]),
        ("rejection", 99.0, []),
    ):
        learner = make(algorithm, own=GroupConfig(accept=accept))
        learner.scores = lambda turns, problems=(): scores  # type: ignore[method-assign, assignment]
        experience, watched = learner.experience(turns)
        assert experience.rollouts.ids.shape[0] == len(kept) == round(watched["kept"] * 12)
        for row, i in enumerate(kept):
            whole = [*turns[i].prompt_ids, *turns[i].ids]
            assert experience.rollouts.ids[row, : len(whole)].tolist() == whole
        before = weights(learner.policy)
        told = learner.update(experience, torch.Generator().manual_seed(0), 1.0, 0.0)
        assert equal(before, weights(learner.policy)) == (not kept) and set(told) >= {"policy_loss"}


def test_finetuning_on_kept_answers_lowers_their_loss_only_by_what_was_sampled() -> None:
    learner = make("best_of_n", config=UpdateConfig(policy=FAST, epochs=1, minibatches=1))
    experience, _ = learner.experience(answers(learner.policy))
    told = learner.update(experience, torch.Generator().manual_seed(0), 1.0, 0.0)
    mask = experience.rollouts.mask
    assert told["policy_loss"] == pytest.approx(
        -(experience.logprobs * mask).sum().item() / mask.sum().item(), abs=1e-4
    )


# --------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "reinforce"])
def test_the_engines_log_probabilities_stand_for_those_of_the_training_pass(algorithm: str) -> None:
    """The same experience within 1e-4, and one forward pass of the policy less."""
    found = []
    for logprobs in ("training", "engine"):
        learner: Optimization
        if algorithm == "ppo":
            learner = PPO(
                model(), model(2), ValueModel(RewardModel(model(1), PAD)), make("grpo").scorer, UpdateConfig(),
                pad_id=PAD, way=Way(), logprobs=logprobs,  # type: ignore[arg-type]
            )  # fmt: skip
            learner.scores = counted  # type: ignore[method-assign]
        else:
            learner = make(algorithm, logprobs=logprobs)
            learner.reference = model(2)
        passes: list[int] = []
        learner.policy.model.register_forward_hook(lambda *a, passes=passes: passes.append(1) or None)
        turns = answers(model())
        experience, watched = learner.experience(turns)
        found.append((experience, watched, len(passes)))
        assert learner.look(turns, exact=True).watched["entropy"] == pytest.approx(found[0][1]["entropy"], abs=1e-5)
    (a, told_a, n_a), (b, told_b, n_b) = found
    assert n_a == 1 and n_b == 0
    for name in ("logprobs", "reference", "advantages"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-4 if name != "advantages" else 1e-3)
    assert told_a["kl"] == pytest.approx(told_b["kl"], abs=1e-3)
    assert told_b["entropy"] == pytest.approx(told_a["entropy"], rel=0.25)  # an estimate from what was drawn


@pytest.mark.parametrize("algorithm", ["ppo", *ALGORITHMS])
def test_an_update_in_parts_of_like_length_has_the_gradients_of_the_whole(algorithm: str) -> None:
    found = []
    for tokens in (None, 12):
        config = UpdateConfig(epochs=1, minibatches=1, part_tokens=tokens, policy=FAST, value=FAST)
        learner: Optimization
        if algorithm == "ppo":
            learner = PPO(
                model(), model(2), ValueModel(RewardModel(model(1), PAD)), make("grpo").scorer, config,
                pad_id=PAD, way=Way(),
            )  # fmt: skip
            learner.scores = counted  # type: ignore[method-assign]
        else:
            learner = make(algorithm, config=config)
            learner.reference = model(2)
        experience, watched = learner.experience(answers(model()))
        passes: list[int] = []
        learner.policy.model.register_forward_hook(lambda *a, passes=passes: passes.append(1) or None)
        told = learner.update(experience, torch.Generator().manual_seed(0), 0.0, watched["kl"])
        grads = [p.grad for t in learner.trainers.values() for p in t.model.parameters() if p.grad is not None]
        found.append((told, grads, len(passes), len(experience.rollouts.ids)))
    (told_a, a, n_a, _), (told_b, b, n_b, n) = found
    assert n_a == 1 and 1 < n_b <= n
    assert told_a == pytest.approx(told_b, abs=1e-6) and len(a) == len(b) > 5
    assert all(torch.allclose(x, y, atol=1e-6, rtol=1e-4) for x, y in zip(a, b, strict=True))
    assert max(float(x.abs().max()) for x in a) > 1e-3


# --------------------------------------------------------------------------------------------------- scores, settings


def test_verified_rewards_are_the_check_and_nothing_for_what_did_not_end() -> None:
    asked = prompts(0, 3, PromptConfig())
    scorer = VerifiedScorer(lambda problem, messages: float(problem is asked[1]), end_id=END)
    right = Turn((), [EOT, 5], [7, END], [1, 1], [0.0] * 2, "stop")
    turns = [right, right, right]
    assert scorer(turns, asked).tolist() == [0.0, 1.0, 0.0]
    cut = replace(right, ids=[7, 8], finish="length")
    assert scorer([right, cut, replace(right, ids=[])], asked).tolist() == [0.0, 0.0, 0.0]
    unknown: list[Problem | None] = [asked[0], None, asked[2]]
    for problems in (unknown, asked[:2]):
        with pytest.raises(ConfigError, match="known answers"):
            scorer(turns, problems)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo", "best_of_n"])
def test_one_answer_cannot_be_compared(algorithm: str) -> None:
    with pytest.raises(ConfigError, match=r"rl\.group"):
        GroupOptimization(
            algorithm, model(), model(), VerifiedScorer(lambda p, m: 0.0, end_id=END), UpdateConfig(), GroupConfig(),  # type: ignore[arg-type]
            group=1, max_tokens=8, pad_id=PAD, way=Way(),
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.slow
def test_pretraining_beside_it_keeps_the_loss_on_its_texts_lower() -> None:
    """PPO-ptx: the same updates with and without the loss on texts, whose rows the order draws."""
    texts = torch.randint(4, 32, (8, 12), generator=torch.Generator().manual_seed(3))
    rows: list[int] = []

    def draw(order: torch.Generator) -> Batch:
        first = int(torch.randint(4, (1,), generator=order))
        rows.append(first)
        part = texts[first : first + 4]
        return Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), torch.ones(4, 11))

    found = []
    for weight in (None, 1.0, 1.0):
        learner = make("rloo", config=UpdateConfig(policy=FAST, pretraining=weight))
        learner.pretraining = None if weight is None else draw
        for i in range(10):
            experience, _ = learner.experience(answers(learner.policy, n=24, seed=i))
            learner.update(experience, torch.Generator().manual_seed(i), 1.0, 0.0)
        with torch.no_grad():
            logits = learner.policy(texts[:, :-1]).flatten(0, 1)
        found.append(
            (float(torch.nn.functional.cross_entropy(logits, texts[:, 1:].flatten())), weights(learner.policy))
        )
    assert found[1][0] < found[0][0] - 0.2 and equal(found[1][1], found[2][1])
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :] and len(set(rows)) > 1
