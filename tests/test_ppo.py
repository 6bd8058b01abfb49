"""PPO: what it holds fixed, what it changes, and that it finds what is rewarded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stateofgpt.assistant.session import Turn
from stateofgpt.errors import ConfigError, ModelError
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.rl.advantage import shaped_rewards
from stateofgpt.rl.ppo import PPO, PPOConfig
from stateofgpt.rl.rollout import policy_logprobs
from stateofgpt.rl.scoring import LearnedScorer
from stateofgpt.text.chat import Message
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig

EOT, END, PAD, GOOD = 0, 2, 3, 20
SHAPE = GPTConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    head_dim=8, intermediate_size=24, max_position_embeddings=30,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model(seed: int = 0) -> GPT:
    made, g = GPT(SHAPE), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.2, generator=g)
    return made


def make_ppo(config: PPOConfig | None = None, **kwargs: float) -> PPO:
    settings = {"mean": 0.0, "std": 1.0, **kwargs}
    config = config or PPOConfig()
    scorer = LearnedScorer(
        RewardModel(model(1), PAD), pad_id=PAD, end_id=END, no_end_score=config.no_end_score, **settings
    )
    return PPO(model(), model(), ValueModel(RewardModel(model(1), PAD)), scorer, config, pad_id=PAD, way=Way())


def reward_of(ppo: PPO) -> RewardModel:
    assert isinstance(ppo.scorer, LearnedScorer)
    return ppo.scorer.model


def answers(policy: GPT, n: int = 12, seed: int = 0) -> list[Turn]:
    """Turns sampled from a policy; every third has a given stretch in it, as after a tool's answer."""
    prompts = [[EOT, 1, 7 + i % 5, 9][: 2 + i % 3] for i in range(n)]
    made = Engine(policy, max_batch=16).complete(prompts, SamplingParams(max_tokens=8, seed=seed, stop_ids=(END, EOT)))
    turns = []
    for i, (prompt, c) in enumerate(zip(prompts, made, strict=True)):
        ids, mask = list(c.ids), [1] * len(c.ids)
        if i % 3 == 0 and len(ids) > 2:
            ids[1:1], mask[1:1] = [11, 12, 13], [0, 0, 0]
        finish = "stop" if c.finish == "stop" else "length"
        turns.append(Turn((Message("assistant", ""),), prompt, ids, mask, [0.0] * len(ids), finish))  # type: ignore[arg-type]
    return turns


def weights(*models: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in models for p in m.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -------------------------------------------------------------------------------------------------------- experience


def test_at_the_start_there_is_no_kl_and_the_score_is_the_only_reward() -> None:
    ppo = make_ppo()
    turns = answers(ppo.policy)
    experience, watched = ppo.experience(turns)
    assert watched["kl"] == 0.0 and watched["kl_coefficient"] == ppo.config.kl_coefficient
    scores = ppo.scores(turns)
    assert watched["proxy_reward"] == pytest.approx(scores.mean().item())
    assert watched["length"] == pytest.approx(sum(sum(t.mask) for t in turns) / len(turns))
    mask = experience.rollouts.mask
    for row in range(len(turns)):  # with gamma 1 and lambda 0.95, by hand from the last sampled token back
        value, running, after = experience.values[row], 0.0, 0.0
        last = True
        for t in reversed(mask[row].nonzero().flatten().tolist()):
            reward = scores[row].item() if last else 0.0
            running = reward + after - value[t].item() + 0.95 * running
            after, last = value[t].item(), False
            assert experience.returns[row, t].item() == pytest.approx(running + value[t].item(), abs=1e-4)
    drawn = experience.advantages[mask > 0]
    assert abs(drawn.mean().item()) < 1e-5 and drawn.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)


def test_kl_is_summed_over_sampled_tokens_and_taken_from_the_reward() -> None:
    ppo = make_ppo(replace(PPOConfig(), kl_coefficient=0.5))
    ppo.reference = model(5)
    turns = answers(ppo.policy)
    experience, watched = ppo.experience(turns)
    rollouts = experience.rollouts.rows(torch.arange(len(turns)))
    with torch.no_grad():
        ours, _ = policy_logprobs(ppo.policy, rollouts, Way())
        theirs, _ = policy_logprobs(ppo.reference, rollouts, Way())
    apart = ((ours - theirs) * rollouts.mask).sum(1)
    assert watched["kl"] == pytest.approx(apart.mean().item(), abs=1e-4) and watched["kl"] > 0.1
    # with gamma = lambda = 1 the return of the first sampled token is score - coefficient * KL of the whole answer
    ppo.config = replace(ppo.config, lam=1.0)
    experience, _ = ppo.experience(turns)
    first = experience.rollouts.mask.argmax(1)
    returns = experience.returns[torch.arange(len(turns)), first]
    assert torch.allclose(returns, ppo.scores(turns) - 0.5 * apart, atol=1e-4)


def test_parts_of_like_length_give_what_one_pass_gives() -> None:
    ppo = make_ppo()
    experience, watched = ppo.experience(answers(ppo.policy, n=37))
    with torch.no_grad():
        whole, entropy = policy_logprobs(ppo.policy, experience.rollouts.rows(torch.arange(37)), Way())
    mask = experience.rollouts.mask[:, : whole.shape[1]]
    assert torch.allclose(experience.logprobs[:, : whole.shape[1]] * mask, whole * mask, atol=1e-5)
    assert watched["entropy"] == pytest.approx((entropy * mask).sum().item() / mask.sum().item(), abs=1e-4)


def test_an_answer_without_its_end_gets_the_fixed_penalty() -> None:
    ppo = make_ppo(mean=0.4, std=2.0)
    whole = Turn((), [EOT, 5], [7, 8, END], [1, 1, 1], [0.0] * 3, "stop")
    cases = [
        whole,
        replace(whole, ids=[7, 8, 9], finish="length"),
        replace(whole, ids=[7, 8, EOT], finish="stop"),  # ended the document, not its turn
        replace(whole, finish="tool_limit"),
    ]
    raw = reward_of(ppo)(torch.tensor([[EOT, 5, 7, 8, END]])).item()
    scores = ppo.scores(cases).tolist()
    assert scores[0] == pytest.approx((raw - 0.4) / 2.0, abs=1e-5)
    assert scores[1:] == [ppo.config.no_end_score] * 3


# ------------------------------------------------------------------------------------------------------------- update


def test_only_policy_and_value_model_learn() -> None:
    ppo = make_ppo()
    experience, watched = ppo.experience(answers(ppo.policy))
    fixed, policy, value = weights(ppo.reference, reward_of(ppo)), weights(ppo.policy), weights(ppo.value)
    ppo.update(experience, torch.Generator().manual_seed(0), 1.0, watched["kl"])
    assert equal(fixed, weights(ppo.reference, reward_of(ppo)))
    assert not equal(policy, weights(ppo.policy)) and not equal(value, weights(ppo.value))


def test_a_value_model_with_lambda_one_learns_whole_returns_and_advantages_stay() -> None:
    usual, whole = make_ppo(), make_ppo(replace(PPOConfig(), value_lam=1.0))
    turns = answers(usual.policy)
    one, other = usual.experience(turns)[0], whole.experience(turns)[0]
    assert torch.equal(one.advantages, other.advantages)
    mask = other.rollouts.mask
    rewards = shaped_rewards(whole.scores(turns), other.logprobs, other.reference, mask, whole.kl_coefficient)
    to_come = rewards.flip(1).cumsum(1).flip(1) * mask  # gamma is 1, and nothing is rewarded outside of the mask
    assert other.returns is not None and one.returns is not None
    torch.testing.assert_close(other.returns, to_come, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one.returns, to_come, rtol=1e-2, atol=1e-2)


def test_the_first_minibatch_has_ratio_one() -> None:
    ppo = make_ppo(replace(PPOConfig(), epochs=1, minibatches=1))
    experience, _ = ppo.experience(answers(ppo.policy))
    found = ppo.update(experience, torch.Generator().manual_seed(0), 1.0, 0.0)
    assert found["clip_fraction"] == 0.0 and abs(found["approx_kl"]) < 1e-6
    assert abs(found["policy_loss"]) < 1e-4  # the mean of whitened advantages
    assert found["value_loss"] > 0


def test_updates_are_a_function_of_experience_and_order() -> None:
    ends = []
    for order in (1, 1, 2):
        ppo = make_ppo()
        experience, _ = ppo.experience(answers(ppo.policy))
        found = ppo.update(experience, torch.Generator().manual_seed(order), 1.0, 3.0)
        ends.append((found, weights(ppo.policy, ppo.value)))
    assert ends[0][0] == ends[1][0] and equal(ends[0][1], ends[1][1])
    assert not equal(ends[0][1], ends[2][1])


def test_minibatches_cut_padding_and_nothing_else() -> None:
    ppo = make_ppo()
    experience, _ = ppo.experience(answers(ppo.policy))
    index = torch.tensor([5, 2, 8])
    part = experience.rows(index)
    assert part.weight == experience.rollouts.mask[index].sum().item()
    used = part.rollouts.mask.shape[1]
    for name in ("logprobs", "values", "advantages", "returns"):
        assert torch.equal(getattr(part, name), getattr(experience, name)[index, :used])
    assert not experience.rollouts.mask[index, used:].any()


@pytest.mark.parametrize(("rows", "minibatches"), [(12, 1), (5, 4), (7, 3)])
def test_what_is_told_is_the_mean_over_the_updates_made(rows: int, minibatches: int) -> None:
    config = replace(PPOConfig(), epochs=2, minibatches=minibatches)
    ppo = make_ppo(config)
    experience, _ = ppo.experience(answers(ppo.policy, n=rows))
    losses: list[float] = []
    step = ppo.trainers["value"].step

    def watched(*args):  # type: ignore[no-untyped-def]
        losses.append(step(*args)["loss"])
        return {"loss": losses[-1]}

    ppo.trainers["value"].step = watched  # type: ignore[method-assign]
    found = ppo.update(experience, torch.Generator().manual_seed(0), 1.0, 0.0)
    assert found["value_loss"] == pytest.approx(sum(losses) / len(losses))


def test_the_coefficient_follows_the_kl_when_there_is_a_target() -> None:
    for target, gain, expected in ((6.0, 0.1, 0.1 * 1.02), (6.0, 1.0, 0.1 * 1.2), (None, 1.0, 0.1)):
        ppo = make_ppo(replace(PPOConfig(), epochs=1, kl_coefficient=0.1, kl_target=target, kl_gain=gain))
        experience, _ = ppo.experience(answers(ppo.policy, n=4))
        ppo.update(experience, torch.Generator().manual_seed(0), 0.0, 60.0)
        assert ppo.kl_coefficient == pytest.approx(expected)


def test_a_bad_number_stops_before_the_policy_changed() -> None:
    ppo = make_ppo()
    experience, _ = ppo.experience(answers(ppo.policy))
    before = weights(ppo.policy, ppo.value)
    poisoned = replace(experience, advantages=experience.advantages * float("nan"))
    with pytest.raises(ModelError, match="nothing was changed"):
        ppo.update(poisoned, torch.Generator().manual_seed(0), 1.0, 0.0)
    assert equal(before, weights(ppo.policy, ppo.value))


def test_answers_in_which_nothing_was_sampled_do_no_harm() -> None:
    ppo = make_ppo()
    turns = [replace(t, mask=[0] * len(t.ids)) for t in answers(ppo.policy, n=4)]
    experience, watched = ppo.experience(turns)
    assert watched["kl"] == watched["length"] == watched["entropy"] == 0.0
    found = ppo.update(experience, torch.Generator().manual_seed(0), 1.0, 0.0)
    assert found["policy_loss"] == found["value_loss"] == 0.0
    assert all(w.isfinite().all() for w in weights(ppo.policy, ppo.value))


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"minibatches": 0}, {"clip": 0.0}, {"value_clip": -1.0}, {"kl_target": 0.0}, {"gamma": 1.5},
     {"lam": -0.1}, {"value_lam": 1.1}, {"clip": float("nan")}],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PPOConfig(**wrong)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- it works


def share_of_good(turns: list[Turn]) -> float:
    drawn = [i for t in turns for i, m in zip(t.ids, t.mask, strict=True) if m]
    return drawn.count(GOOD) / len(drawn)


def trained(kl_coefficient: float) -> tuple[float, float, float]:
    """(share of GOOD tokens before, after, KL after) where every GOOD token of an answer is rewarded."""
    fast = LoopConfig(optim=OptimConfig(lr=3e-3, eps=1e-5, weight_decay=0.0, use_muon=False))
    ppo = make_ppo(replace(PPOConfig(), policy=fast, value=fast, kl_coefficient=kl_coefficient, kl_target=None))
    ppo.scores = lambda turns, problems=(): torch.tensor([float(t.ids.count(GOOD)) for t in turns])  # type: ignore[method-assign, assignment]
    before = share_of_good(answers(ppo.policy, n=48, seed=999))
    for i in range(25):
        experience, watched = ppo.experience(answers(ppo.policy, n=48, seed=i))
        ppo.update(experience, torch.Generator().manual_seed(i), 1.0, watched["kl"])
    turns = answers(ppo.policy, n=48, seed=999)
    return before, share_of_good(turns), ppo.experience(turns)[1]["kl"]


@pytest.mark.slow
def test_it_finds_what_is_rewarded_and_the_penalty_holds_it_back() -> None:
    before, after, kl = trained(kl_coefficient=0.0)
    assert before < 0.1 and after > 0.5
    _, held, held_kl = trained(kl_coefficient=2.0)
    assert held < after / 2 and held_kl < kl / 4
