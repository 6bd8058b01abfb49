"""DPO, IPO and KTO against their papers' formulas, one pair at a time, and what a policy learns from pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_ppo import END, EOT, GOOD, PAD, answers, equal, model, weights
from torch import Tensor

from stateofgpt.data.comparisons import Ranking
from stateofgpt.errors import ConfigError, DataError
from stateofgpt.model.gpt import GPT
from stateofgpt.rl.offline import answer_logprobs, dpo_loss, ipo_loss, kto_loss, margins, mismatched_divergence
from stateofgpt.rl.optimization import UpdateConfig
from stateofgpt.rl.preference import Answer, OfflineConfig, Pair, PreferenceOptimization, mismatched, pairs_of
from stateofgpt.rl.rollout import Rollouts, laid_out, policy_logprobs, sampled_logprobs
from stateofgpt.rl.scoring import VerifiedScorer
from stateofgpt.text.chat import ChatFormat, Message, ToolCall
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_dpo_and_ipo_are_their_equations_pair_by_pair(beta: float) -> None:
    pc, pr, rc, rr = (random_tensor(8, seed=s, scale=4) for s in range(4))
    h = margins(pc, pr, rc, rr)
    for i in range(8):
        apart = math.log(math.exp(pc[i]) / math.exp(rc[i])) - math.log(math.exp(pr[i]) / math.exp(rr[i]))
        assert dpo_loss(h, beta)[i].item() == pytest.approx(-math.log(sigmoid(beta * apart)), abs=1e-9)
        assert ipo_loss(h, beta)[i].item() == pytest.approx((apart - 1 / (2 * beta)) ** 2, abs=1e-9)
    assert dpo_loss(torch.zeros(1), beta).item() == pytest.approx(math.log(2))


def test_the_gradient_of_dpo_weighs_pairs_by_how_wrong_the_implied_reward_is() -> None:
    """DPO, section 4: -beta sigmoid(rejected's reward - chosen's) (grad log pi(chosen) - grad log pi(rejected))."""
    pc, pr = (random_tensor(8, seed=s, scale=4).requires_grad_() for s in (1, 2))
    rc, rr = (random_tensor(8, seed=s, scale=4) for s in (3, 4))
    dpo_loss(margins(pc, pr, rc, rr), 0.3).sum().backward()
    expected = -0.3 * torch.sigmoid(0.3 * ((pr - rr) - (pc - rc)))
    assert torch.allclose(pc.grad, expected) and torch.allclose(pr.grad, -expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("z", [0.0, 0.7])
def test_kto_is_its_equations_example_by_example(z: float) -> None:
    policy, reference = random_tensor(9, seed=1, scale=3), random_tensor(9, seed=2, scale=3)
    liked = torch.tensor([True, False, True, True, False, False, True, False, True])
    mine = kto_loss(policy, reference, liked, torch.tensor(z), 0.2, 1.5, 0.5)
    for i in range(9):
        r = float(policy[i] - reference[i])
        value = sigmoid(0.2 * (r - z)) if liked[i] else sigmoid(0.2 * (z - r))
        assert mine[i].item() == pytest.approx((1.5 if liked[i] else 0.5) * (1 - value), abs=1e-9)


def test_the_divergence_of_kto_has_no_gradient_and_is_not_negative() -> None:
    policy = torch.tensor([1.0, 3.0], requires_grad=True)
    z = mismatched_divergence(policy, torch.zeros(2))
    assert z.item() == 2.0 and not z.requires_grad
    assert mismatched_divergence(-policy, torch.zeros(2)).item() == 0.0
    assert mismatched_divergence(torch.zeros(0), torch.zeros(0)).item() == 0.0


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_margins_stay_finite_with_their_gradients(size: float) -> None:
    for f in (
        lambda x: dpo_loss(x, 0.5),
        lambda x: ipo_loss(x, 0.5),
        lambda x: kto_loss(x, torch.zeros(1), torch.tensor([True]), torch.zeros(()), 0.5),
        lambda x: kto_loss(x, torch.zeros(1), torch.tensor([False]), torch.zeros(()), 0.5),
    ):
        x = torch.tensor([size], requires_grad=True)
        f(x).sum().backward()
        assert f(x).isfinite() and x.grad is not None and x.grad.isfinite()


def test_an_answer_without_tokens_has_probability_one() -> None:
    logprobs, mask = random_tensor(2, 3), torch.tensor([[0.0, 0, 0], [0, 1, 1]])
    assert answer_logprobs(logprobs, mask).tolist() == [0.0, pytest.approx(float(logprobs[1, 1:].sum()))]
    assert answer_logprobs(logprobs, mask, per_token=True)[1].item() == pytest.approx(float(logprobs[1, 1:].mean()))
    assert answer_logprobs(logprobs, mask, per_token=True)[0] == 0


# -------------------------------------------------------------------------------------------------------------- pairs


TOKENIZER = Tokenizer.train(iter(["What is 12 + 30? calculator expression arguments name tool user"] * 20), 300)


def test_pairs_hold_what_the_assistant_wrote_and_not_what_a_tool_said() -> None:
    chat = ChatFormat(TOKENIZER)
    asked = (Message("user", "What is 12 + 30?"), Message("assistant", "Why?"), Message("user", "So."))
    with_tool = (
        Message("assistant", "", (ToolCall("calculator", {"expression": "12 + 30"}),)),
        Message("tool", "42"),
        Message("assistant", "42."),
    )
    rows = [Ranking(asked, (with_tool, (Message("assistant", "41"),), (Message("assistant", "43"),)), (1, 2, 2))]
    pairs = pairs_of(rows, chat)
    assert len(pairs) == 2 and pairs[0].chosen == pairs[1].chosen
    for pair, messages in ((pairs[0].chosen, with_tool), (pairs[0].rejected, rows[0].completions[1])):
        rendered = chat.render((*asked, *messages))
        assert [*pairs[0].prompt, *pair.ids] == rendered.ids[: len(pairs[0].prompt) + len(pair.ids)]
        learned = [i for i, m in zip(pair.ids, pair.mask, strict=True) if m]
        after = rendered.loss_mask[len(pairs[0].prompt) :]
        assert learned == [i for i, m in zip(rendered.ids[len(pairs[0].prompt) :], after, strict=True) if m]
        assert pair.mask[-1] == 1 and pair.ids[-1] == chat.end
    with pytest.raises(DataError, match="prefers"):
        pairs_of([replace(rows[0], ranks=(1, 1, 1))], chat)


def test_texts_that_were_not_sampled_are_laid_out_like_those_that_were() -> None:
    rows = [((1, 2, 3, 4, 5), (0, 0, 1, 0, 1)), ((9, 8, 7), (0, 1, 1))]
    found = laid_out(rows, PAD, 30)
    for number, (ids, learned) in enumerate(rows):
        at = found.mask[number] > 0
        assert found.targets[number][at].tolist() == [i for i, m in zip(ids, learned, strict=True) if m]
    assert laid_out(rows, PAD, 4).ids[0, :4].tolist() == [2, 3, 4, 5]
    assert laid_out(rows, PAD, 4).mask[0, :3].tolist() == [1.0, 0.0, 1.0]


def made_pairs(n: int = 24) -> list[Pair]:
    """Answers with GOOD in them are preferred."""
    out = []
    for i in range(n):
        prompt = (EOT, 1, 7 + i % 5)
        out.append(Pair(prompt, Answer((GOOD, 9 + i % 3, END), (1, 1, 1)), Answer((11 + i % 4, 9, END), (1, 1, 1))))
    return out


def make(algorithm: str, **own: float) -> PreferenceOptimization:
    fast = LoopConfig(optim=OptimConfig(lr=3e-3, eps=1e-5, weight_decay=0.0, use_muon=False))
    scorer = VerifiedScorer(lambda problem, messages: 0.0, end_id=END)
    return PreferenceOptimization(
        algorithm, model(), model(), scorer, UpdateConfig(policy=fast), OfflineConfig(**own), made_pairs(),  # type: ignore[arg-type]
        pad_id=PAD, way=Way(),
    )  # fmt: skip


def test_answers_to_other_prompts_are_answers_to_other_prompts() -> None:
    pairs = made_pairs(7)
    for (prompt, answer), pair in zip(mismatched(pairs), pairs, strict=True):
        assert prompt == pair.prompt
        assert answer in [p.chosen for p in pairs if p.prompt != prompt]
    assert mismatched(pairs[:1]) == [] and mismatched([pairs[0], pairs[0]]) == []


@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "kto"])
def test_a_policy_comes_to_prefer_what_was_chosen_and_its_reference_stays(algorithm: str) -> None:
    learner = make(algorithm, beta=0.1 if algorithm != "ipo" else 0.5)
    before = weights(learner.reference)

    def preferred() -> float:
        both = [(p.prompt, p.chosen) for p in learner.pairs] + [(p.prompt, p.rejected) for p in learner.pairs]
        rows = [((*prompt, *answer.ids), (*[0] * len(prompt), *answer.mask)) for prompt, answer in both]
        laid = laid_out(rows, PAD, 30)
        with torch.no_grad():
            found = answer_logprobs(policy_logprobs(learner.policy, laid, Way())[0], laid.mask)
        return float((found[:24] - found[24:]).mean())

    start = preferred()
    losses = []
    for i in range(12):
        told = learner.update(None, torch.Generator().manual_seed(i), 1.0, 0.0)  # type: ignore[arg-type]
        losses.append(told["policy_loss"])
    assert preferred() > start + 0.5 and losses[-1] < losses[0] and told["pair_accuracy"] == 1.0
    assert equal(before, weights(learner.reference))


def test_the_first_loss_is_that_of_indifference_and_updates_are_a_function_of_the_order() -> None:
    for algorithm, expected in (("dpo", math.log(2)), ("ipo", 25.0), ("kto", 0.5)):
        ends = []
        for seed in (1, 1, 2):
            learner = make(algorithm)
            learner.config = replace(learner.config, minibatches=1)
            told = learner.update(None, torch.Generator().manual_seed(seed), 1.0, 0.0)  # type: ignore[arg-type]
            assert told["policy_loss"] == pytest.approx(expected, rel=1e-4)
            learner.update(None, torch.Generator().manual_seed(seed), 1.0, 0.0)  # type: ignore[arg-type]
            ends.append(weights(learner.policy))
        assert equal(ends[0], ends[1])


@pytest.mark.parametrize("tokens", [None, 40])
def test_kto_asks_for_no_gradient_of_the_answers_to_other_prompts_and_none_of_the_others_changes(
    tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make("kto", pairs=12, beta=0.3)
    learner.config = replace(learner.config, minibatches=1, part_tokens=tokens)
    learner.reference = model(2)
    drawn = torch.randperm(24, generator=torch.Generator().manual_seed(4))[:12].tolist()
    batch = learner._batch([learner.pairs[i] for i in drawn])
    assert len(batch.reference) == 36
    policy = answer_logprobs(policy_logprobs(learner.policy, batch.answers, Way())[0], batch.answers.mask)
    z = (policy - batch.reference)[24:].mean().clamp(min=0.0)
    liked = torch.arange(24) < 12
    kto_loss(policy[:24], batch.reference[:24], liked, z, 0.3).mean().backward()
    wanted = [p.grad.clone() for p in learner.policy.parameters() if p.grad is not None]

    seen = {True: 0, False: 0}
    passed = sampled_logprobs

    def counted(policy: GPT, rollouts: Rollouts, way: Way) -> Tensor:
        seen[torch.is_grad_enabled()] += len(rollouts.ids)
        return passed(policy, rollouts, way)

    monkeypatch.setattr("stateofgpt.rl.optimization.sampled_logprobs", counted)
    learner.update(None, torch.Generator().manual_seed(4), 0.0, 0.0)  # type: ignore[arg-type]
    assert seen == {True: 24, False: 12}
    found = [p.grad for p in learner.policy.parameters() if p.grad is not None]
    assert len(found) == len(wanted) and max(float(g.abs().max()) for g in wanted) > 1e-4
    assert all(torch.allclose(x, y, atol=1e-6, rtol=1e-4) for x, y in zip(found, wanted, strict=True))


def test_a_kto_state_from_before_goes_on_as_it_began() -> None:
    learner, fresh = make("kto"), make("kto")
    numbers = learner.numbers()
    assert numbers.pop("apart") and "apart" not in make("dpo").numbers()
    fresh.load(learner.tensors(), learner.numbers())
    assert fresh.apart
    fresh.load(learner.tensors(), numbers)
    assert not fresh.apart and "apart" not in fresh.numbers()
    told = [one.update(None, torch.Generator().manual_seed(1), 1.0, 0.0) for one in (learner, fresh)]  # type: ignore[arg-type]
    # margins of a policy that is still its reference are rounding, so how many are above zero says nothing
    assert told[0]["policy_loss"] == pytest.approx(told[1]["policy_loss"], abs=1e-5)


def test_the_answers_looked_at_are_told_of_and_not_learned_from() -> None:
    learner = make("dpo")
    turns = answers(learner.policy)
    _, watched = learner.experience(turns, _problems(len(turns)))
    assert watched["kl"] == 0.0 and watched["length"] > 0


def _problems(n: int) -> list:  # type: ignore[type-arg]
    from stateofgpt.data.prompts import PromptConfig, prompts

    return prompts(0, n, PromptConfig())


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"pairs": 0}, {"beta": float("nan")}, {"desirable_weight": -1.0}])
def test_a_configuration_that_cannot_be_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OfflineConfig(**wrong)  # type: ignore[arg-type]
