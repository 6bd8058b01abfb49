"""Objectives without a value model, against scalar twins written from the papers, and at their edges."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from stateofgpt.errors import ConfigError
from stateofgpt.rl.advantage import answer_rewards, best_of, group_relative, leave_one_out
from stateofgpt.rl.objective import (
    aggregate,
    answer_policy_loss,
    clipped_policy_loss,
    kl_to_reference,
    likelihood_loss,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def ragged() -> Tensor:
    """Answers of 9, 1, 0, 4 (in two stretches), 12 and 2 tokens."""
    rows = ["000111111111", "000000000001", "000000000000", "001100110000", "111111111111", "010000000010"]
    return torch.tensor([[float(c) for c in row] for row in rows], dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("group", [2, 3, 5])
def test_leave_one_out_subtracts_the_mean_of_the_others(group: int) -> None:
    rewards = random_tensor(4 * group, seed=group, scale=3)
    mine = leave_one_out(rewards, group).tolist()
    for start in range(0, len(mine), group):
        own = rewards[start : start + group].tolist()
        for i, r in enumerate(own):
            others = own[:i] + own[i + 1 :]
            assert mine[start + i] == pytest.approx(r - fmean(others), abs=1e-12)


@pytest.mark.parametrize("group", [2, 4, 7])
@pytest.mark.parametrize("scaled", [True, False])
def test_group_relative_is_the_distance_from_the_mean_in_deviations_or_in_rewards(group: int, scaled: bool) -> None:
    rewards = random_tensor(3 * group, seed=group, scale=2) + 5
    mine = group_relative(rewards, group, scaled=scaled).tolist()
    for start in range(0, len(mine), group):
        own = rewards[start : start + group].tolist()
        scale = stdev(own) + 1e-4 if scaled else 1.0
        assert mine[start : start + group] == pytest.approx([(r - fmean(own)) / scale for r in own], abs=1e-9)


@pytest.mark.parametrize("value", [0.1, 1.0, -7.3, 1e8])
def test_equal_rewards_and_groups_of_one_teach_nothing(value: float) -> None:
    same = torch.full((6,), value)
    for advantage in (
        leave_one_out(same, 3),
        group_relative(same, 3, scaled=True),
        group_relative(same, 3, scaled=False),
    ):
        assert advantage.abs().max() <= 1e-6 * max(1.0, abs(value))
    assert not group_relative(same, 3, scaled=True).any()  # exactly: nothing small is divided by something small
    alone = random_tensor(5)
    for advantage in (leave_one_out(alone, 1), group_relative(alone, 1, scaled=True)):
        assert advantage.tolist() == [0.0] * 5


def test_one_group_knows_nothing_of_another_and_a_rest_is_refused() -> None:
    rewards = torch.tensor([1.0, 0.0, 5.0, 5.0])
    changed = torch.tensor([1.0, 0.0, 9.0, -3.0])
    for f in (leave_one_out, lambda r, g: group_relative(r, g, scaled=True)):
        assert torch.equal(f(rewards, 2)[:2], f(changed, 2)[:2])
    with pytest.raises(ConfigError, match="groups of 3"):
        leave_one_out(rewards, 3)


def test_the_baseline_does_not_move_the_gradient_but_makes_it_steadier() -> None:
    """REINFORCE with a leave-one-out baseline has the expectation of plain REINFORCE, and less variance (exact: all
    outcomes of three draws from a coin are summed)."""
    p = torch.tensor(0.3, dtype=torch.float64)
    score = {1: 1 / p, 0: -1 / (1 - p)}  # d log pi / d p
    pay = {1: 4.0, 0: 3.0}
    plain = mean = squares = plain_squares = 0.0
    for a in (0, 1):
        for b in (0, 1):
            for c in (0, 1):
                drawn = [a, b, c]
                chance = math.prod(float(p if d else 1 - p) for d in drawn)
                rewards = torch.tensor([pay[d] for d in drawn], dtype=torch.float64)
                with_baseline = (
                    sum(float(x) * float(score[d]) for x, d in zip(leave_one_out(rewards, 3), drawn, strict=True)) / 3
                )
                without = sum(pay[d] * float(score[d]) for d in drawn) / 3
                mean, plain = mean + chance * with_baseline, plain + chance * without
                squares, plain_squares = squares + chance * with_baseline**2, plain_squares + chance * without**2
    assert mean == pytest.approx(plain, abs=1e-9) and mean == pytest.approx(1.0, abs=1e-9)  # d/dp of 3 + p
    assert squares - mean**2 < (plain_squares - plain**2) / 10


def test_the_reward_of_an_answer_is_its_score_less_its_divergence() -> None:
    mask, new, ref, scores = (
        ragged(),
        random_tensor(6, 12, seed=1),
        random_tensor(6, 12, seed=2),
        random_tensor(6, seed=3),
    )
    mine = answer_rewards(scores, new, ref, mask, 0.2)
    for b in range(6):
        apart = sum(float(new[b, t] - ref[b, t]) for t in range(12) if mask[b, t])
        assert mine[b].item() == pytest.approx(scores[b].item() - 0.2 * apart, abs=1e-9)


def test_the_best_of_a_group_is_one_the_first_of_equals() -> None:
    scores = torch.tensor([0.1, 0.9, 0.9, -1.0, -3.0, -2.0])
    assert best_of(scores, 3).tolist() == [False, True, False, True, False, False]
    assert best_of(scores, 1).all()


# ------------------------------------------------------------------------------------------------------------- losses


def grpo_twin(
    new: Tensor, old: Tensor, ref: Tensor, advantage: list[float], mask: Tensor, clip: float, beta: float, how: str,
    length: int,
) -> float:  # fmt: skip
    """GRPO equations 3 and 4 token by token; Dr. GRPO's constant; the mean over tokens."""
    per_answer = []
    for b in range(mask.shape[0]):
        terms = []
        for t in range(mask.shape[1]):
            if mask[b, t]:
                ratio = math.exp((new[b, t] - old[b, t]).item())
                held = min(max(ratio, 1 - clip), 1 + clip)
                r = math.exp((ref[b, t] - new[b, t]).item())
                terms.append(min(ratio * advantage[b], held * advantage[b]) - beta * (r - math.log(r) - 1))
        per_answer.append(terms)
    if how == "sequence":
        return -fmean(sum(terms) / max(1, len(terms)) for terms in per_answer)
    total = sum(map(sum, per_answer))
    return -total / (len(per_answer) * length if how == "constant" else max(1, sum(map(len, per_answer))))


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_the_loss_of_grpo_is_that_of_its_tokens_one_by_one(how: str, beta: float) -> None:
    mask, old, ref = ragged(), random_tensor(6, 12, seed=2, scale=0.4), random_tensor(6, 12, seed=5, scale=0.4)
    new = random_tensor(6, 12, seed=1, scale=0.4).requires_grad_()
    advantage = random_tensor(6, seed=3)

    def loss(new: Tensor) -> Tensor:
        out = clipped_policy_loss(new, old, advantage[:, None], mask, 0.2, how, 20)  # type: ignore[arg-type]
        return out.loss + beta * aggregate(kl_to_reference(new, ref, mask), mask, how, 20)  # type: ignore[arg-type]

    assert loss(new).item() == pytest.approx(
        grpo_twin(new, old, ref, advantage.tolist(), mask, 0.2, beta, how, 20), abs=1e-9
    )
    loss(new).backward()
    assert new.grad is not None and not new.grad[mask == 0].any()
    for b, t in ((0, 4), (1, 11), (3, 2), (4, 7)):  # numbers beside the gradient
        step = torch.zeros_like(new)
        step[b, t] = 1e-6
        twin = [grpo_twin(new + s * step, old, ref, advantage.tolist(), mask, 0.2, beta, how, 20) for s in (1, -1)]
        assert new.grad[b, t].item() == pytest.approx((twin[0] - twin[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("clip", [0.05, 0.3])
def test_the_loss_of_an_answer_has_one_ratio(clip: float) -> None:
    mask, old = ragged(), random_tensor(6, 12, seed=2, scale=0.1)
    new, advantage = random_tensor(6, 12, seed=1, scale=0.1).requires_grad_(), random_tensor(6, seed=3)

    def twin(new: Tensor) -> float:
        terms = []
        for b in range(6):
            ratio = math.exp(sum((new[b, t] - old[b, t]).item() for t in range(12) if mask[b, t]))
            terms.append(min(ratio * float(advantage[b]), min(max(ratio, 1 - clip), 1 + clip) * float(advantage[b])))
        return -fmean(terms)

    out = answer_policy_loss(new, old, advantage, mask, clip)
    assert out.loss.item() == pytest.approx(twin(new), abs=1e-9) and 0 < out.clip_fraction < 1
    assert torch.equal(out.loss, answer_policy_loss(new, old, advantage[:, None], mask, clip).loss)
    out.loss.backward()
    assert new.grad is not None
    for b, t in ((0, 5), (3, 6), (4, 0), (5, 1)):
        step = torch.zeros_like(new)
        step[b, t] = 1e-6
        assert new.grad[b, t].item() == pytest.approx((twin(new + step) - twin(new - step)) / 2e-6, abs=1e-6)


def test_at_a_ratio_of_one_the_gradient_is_reinforce() -> None:
    mask, advantage = ragged(), random_tensor(6, seed=3)
    new = random_tensor(6, 12, seed=1).requires_grad_()
    (mine,) = torch.autograd.grad(answer_policy_loss(new, new.detach(), advantage, mask, 0.2).loss, new)
    assert torch.allclose(mine, -advantage[:, None] * mask / 6)


def test_the_divergence_is_never_negative_and_its_mean_is_the_kl() -> None:
    logits, other = random_tensor(5, seed=1), random_tensor(5, seed=2)
    p, q = logits.log_softmax(0), other.log_softmax(0)
    term = kl_to_reference(p[None], q[None], torch.ones(1, 5, dtype=torch.float64))[0]
    assert (term >= 0).all() and not kl_to_reference(p[None], p[None], torch.ones(1, 5)).any()
    assert (p.exp() * term).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-12)


HUGE = torch.tensor([[900.0, -900.0, 40.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_ratios_and_empty_masks_stay_finite_with_their_gradients(sign: float) -> None:
    for mask in (torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 1.0, 0.0]])):
        for f in (
            lambda x, m: clipped_policy_loss(x, torch.zeros(1, 4), torch.tensor([[sign]]), m, 0.2, "sequence", 4).loss,
            lambda x, m: answer_policy_loss(x, torch.zeros(1, 4), torch.tensor([sign]), m, 0.2).loss,
            lambda x, m: aggregate(kl_to_reference(x, torch.zeros(1, 4), m), m, "constant", 4),
            likelihood_loss,
        ):
            x = HUGE.clone().requires_grad_()
            value = f(x, mask)
            value.backward()
            assert value.isfinite() and x.grad is not None and x.grad.isfinite().all()
            assert mask.any() or not x.grad.any()


def test_what_was_not_sampled_changes_nothing() -> None:
    mask, old, advantage = ragged(), random_tensor(6, 12, seed=2), random_tensor(6, seed=3)
    new = random_tensor(6, 12, seed=1)
    spoiled = torch.where(mask > 0, new, torch.tensor(55.0, dtype=torch.float64))
    for f in (
        lambda x: clipped_policy_loss(x, old, advantage[:, None], mask, 0.2, "sequence").loss,
        lambda x: answer_policy_loss(x, old, advantage, mask, 0.2).loss,
        lambda x: aggregate(kl_to_reference(x, old, mask), mask, "token"),
        lambda x: likelihood_loss(x, mask),
    ):
        assert torch.equal(f(new), f(spoiled))
