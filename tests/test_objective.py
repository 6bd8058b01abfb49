"""The mathematics of RLHF against scalar twins written from the papers, worked numbers, and torchrl where it is."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
import torch
from torch import Tensor

from stateofgpt.rl.advantage import advantages, shaped_rewards, whiten
from stateofgpt.rl.objective import (
    adapt_kl_coefficient,
    clipped_policy_loss,
    clipped_value_loss,
    masked_mean,
    pair_accuracy,
    ranking_loss,
    token_logprobs,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def tool_mask() -> Tensor:
    """Prompt, sampled, tool output, sampled, padding, in several proportions; and rows of one token and of none."""
    rows = ["000111100111000", "011111111111111", "000000000000001", "010101010101010", "000000000000000",
            "000010000000000"]  # fmt: skip
    return torch.tensor([[float(c) for c in row] for row in rows])


# ---------------------------------------------------------------------------------------------------------- ranking


def ranking_twin(scores: list[list[float]], ranks: list[list[int]]) -> float:
    """InstructGPT equation 1, pair by pair."""
    per_prompt = []
    for s, r in zip(scores, ranks, strict=True):
        losses = []
        for i, j in combinations([k for k in range(len(r)) if r[k] > 0], 2):
            if r[i] != r[j]:
                margin = s[i] - s[j] if r[i] < r[j] else s[j] - s[i]
                losses.append(math.log1p(math.exp(-margin)))
        if losses:
            per_prompt.append(sum(losses) / len(losses))
    return sum(per_prompt) / len(per_prompt) if per_prompt else 0.0


def test_the_ranking_loss_is_that_of_its_pairs_one_by_one() -> None:
    rng = random.Random(1)
    for _ in range(40):
        n, k = rng.randint(1, 5), rng.randint(2, 6)
        scores = [[rng.gauss(0, 2) for _ in range(k)] for _ in range(n)]
        ranks = [[rng.randint(0, 3) for _ in range(k)] for _ in range(n)]
        mine = ranking_loss(torch.tensor(scores, dtype=torch.float64), torch.tensor(ranks))
        assert mine.item() == pytest.approx(ranking_twin(scores, ranks), abs=1e-9)


def test_equal_scores_cost_log_two_and_two_completions_are_bradley_terry() -> None:
    assert ranking_loss(torch.zeros(3, 4), torch.tensor([[1, 2, 3, 4]] * 3)).item() == pytest.approx(math.log(2))
    chance = 1 / (1 + math.exp(-(1.7 - 0.4)))
    assert ranking_loss(torch.tensor([[0.4, 1.7]]), torch.tensor([[2, 1]])).item() == pytest.approx(-math.log(chance))


def test_a_prompt_counts_once_however_many_pairs_it_has() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, -5.0, 9.0, 9.0]])
    ranks = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0]])
    expected = (math.log(2) + math.log1p(math.exp(-10.0))) / 2
    assert ranking_loss(scores, ranks).item() == pytest.approx(expected)


def test_what_is_missing_or_tied_gets_no_gradient() -> None:
    scores = random_tensor(3, 4).requires_grad_()
    ranks = torch.tensor([[1, 2, 0, 0], [2, 2, 2, 2], [1, 1, 2, 0]])
    ranking_loss(scores, ranks).backward()
    assert scores.grad is not None
    assert (scores.grad != 0).tolist() == [[True, True, False, False], [False] * 4, [True, True, True, False]]
    empty = random_tensor(2, 3).requires_grad_()
    loss = ranking_loss(empty, torch.tensor([[1, 1, 1], [0, 0, 3]]))
    loss.backward()
    assert loss.item() == 0.0 and empty.grad is not None and not empty.grad.any()


def test_huge_margins_stay_finite_and_gradients_are_right() -> None:
    scores = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[1, 2, 3]]))
    loss.backward()
    assert loss.isfinite() and scores.grad is not None and scores.grad.isfinite().all()
    ranks = torch.tensor([[1, 2, 3, 3], [0, 1, 1, 2]])
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, ranks), (random_tensor(2, 4).double().requires_grad_(),))


def test_accuracy_counts_pairs_and_a_tie_of_scores_is_wrong() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [9.0, 8.0, 7.0]])
    ranks = torch.tensor([[1, 2, 3], [1, 2, 3], [0, 2, 1]])
    assert pair_accuracy(scores, ranks) == (3 + 2 + 0, 3 + 3 + 1)


# ----------------------------------------------------------------------------------------------------------- rewards


def shaped_twin(score: float, new: list[float], ref: list[float], mask: list[float], beta: float) -> list[float]:
    out = [-beta * (n - r) if m else 0.0 for n, r, m in zip(new, ref, mask, strict=True)]
    sampled = [t for t, m in enumerate(mask) if m]
    if sampled:
        out[sampled[-1]] += score
    return out


def test_every_sampled_token_pays_kl_and_the_last_one_gets_the_score() -> None:
    mask = tool_mask()
    scores, new, ref = random_tensor(6, seed=1), random_tensor(6, 15, seed=2), random_tensor(6, 15, seed=3)
    mine = shaped_rewards(scores, new, ref, mask, 0.3)
    for b in range(6):
        twin = shaped_twin(scores[b].item(), new[b].tolist(), ref[b].tolist(), mask[b].tolist(), 0.3)
        assert mine[b].tolist() == pytest.approx(twin, abs=1e-6)
    expected = (scores * mask.any(1)).sum() - 0.3 * ((new - ref) * mask).sum()
    assert mine.sum().item() == pytest.approx(expected.item(), abs=1e-4)


# -------------------------------------------------------------------------------------------------------- advantages


def gae_twin(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE equation 16 as it is printed: a sum of (gamma lambda)^l times the TD residuals to come; O(T^2)."""
    after = [*values, 0.0][1:]
    deltas = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (0.0, 0.5)])
def test_advantages_are_gae_over_the_sampled_tokens_alone(gamma: float, lam: float) -> None:
    """The twin has never heard of masks: it gets each row's sampled tokens, squeezed together."""
    mask = tool_mask()
    rewards, values = random_tensor(6, 15, seed=4) * mask, random_tensor(6, 15, seed=5)
    advantage, returns = advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for b in range(6):
        at = mask[b].nonzero().flatten()
        twin = gae_twin(rewards[b, at].tolist(), values[b, at].tolist(), gamma, lam)
        assert advantage[b, at].tolist() == pytest.approx(twin, abs=1e-5)
        sums = [a + v for a, v in zip(twin, values[b, at].tolist(), strict=True)]
        assert returns[b, at].tolist() == pytest.approx(sums, abs=1e-5)
    assert not (advantage * (1 - mask)).any() and not (returns * (1 - mask)).any()


def test_values_outside_the_mask_cannot_matter_even_when_they_are_nan() -> None:
    mask, rewards, values = tool_mask(), random_tensor(6, 15, seed=4) * tool_mask(), random_tensor(6, 15, seed=5)
    expected, _ = advantages(rewards, values, mask)
    spoiled = torch.where(mask > 0, values, torch.tensor(float("nan")))
    assert torch.equal(advantages(rewards, spoiled, mask)[0], expected)


def test_with_lambda_one_advantages_are_returns_minus_values() -> None:
    mask = torch.ones(1, 4)
    advantage, returns = advantages(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), torch.tensor([[5.0, 6.0, 7.0, 8.0]]), mask,
                                    lam=1.0)  # fmt: skip
    assert returns.tolist() == [[3.0, 2.0, 2.0, 2.0]]
    assert advantage.tolist() == [[-2.0, -4.0, -5.0, -6.0]]


def test_whitening_gives_mean_zero_and_variance_one_over_the_mask() -> None:
    mask, x = tool_mask(), random_tensor(6, 15, seed=6, scale=30) + 100
    white = whiten(x, mask)
    inside = white[mask > 0]
    assert inside.mean().item() == pytest.approx(0, abs=1e-5)
    assert inside.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert not white[mask == 0].any()
    order = x[mask > 0].argsort()
    assert torch.equal(order, inside.argsort())
    one = torch.zeros(2, 3)
    one[1, 1] = 1
    assert not whiten(x[:2, :3], one).any()  # one token has nothing to be better than
    assert not whiten(x, torch.zeros_like(x)).any()


# --------------------------------------------------------------------------------------------------------------- PPO


def policy_twin(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: float) -> tuple[float, float]:
    """PPO equation 7 token by token: (loss, share of tokens whose clipped term is the lower one)."""
    terms, clipped = [], 0
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                ratio = math.exp(float(new[b, t]) - float(old[b, t]))
                a = float(advantage[b, t])
                free, held = ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a
                terms.append(min(free, held))
                clipped += held < free
    return -sum(terms) / max(1, len(terms)), clipped / max(1, len(terms))


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.5])
def test_the_policy_loss_is_the_clipped_surrogate(clip: float) -> None:
    new, old = random_tensor(6, 15, seed=1, scale=0.3), random_tensor(6, 15, seed=2, scale=0.3)
    advantage, mask = random_tensor(6, 15, seed=3), tool_mask()
    out = clipped_policy_loss(new, old, advantage, mask, clip)
    loss, share = policy_twin(new, old, advantage, mask, clip)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert out.clip_fraction.item() == pytest.approx(share, abs=1e-6) and 0 < share < 1
    log_ratio = (new - old)[mask > 0].double()
    assert out.approx_kl.item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), abs=1e-6)


def test_clipped_tokens_and_masked_tokens_get_no_gradient() -> None:
    old = torch.zeros(1, 6)
    new = torch.tensor([[0.5, 0.5, -0.5, -0.5, 0.1, 0.5]], requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    clipped_policy_loss(new, old, advantage, mask, 0.2).loss.backward()
    assert new.grad is not None
    # too likely already, too unlikely already: nothing more to gain; the other way about the gradient is whole
    assert (new.grad != 0).tolist() == [[False, True, True, False, True, False]]
    assert new.grad[0, 1].item() == pytest.approx(math.exp(0.5) / 5)


def test_the_first_update_is_the_policy_gradient() -> None:
    logprobs = random_tensor(6, 15, seed=1).requires_grad_()
    advantage, mask = random_tensor(6, 15, seed=3), tool_mask()
    out = clipped_policy_loss(logprobs, logprobs.detach(), advantage, mask, 0.2)
    out.loss.backward()
    assert logprobs.grad is not None and torch.allclose(logprobs.grad, -advantage * mask / mask.sum(), atol=1e-7)
    assert out.clip_fraction.item() == 0 and out.approx_kl.item() == 0


@pytest.mark.parametrize("gap", [30.0, 100.0, 1e4, -100.0, -1e4])
def test_huge_ratios_stay_finite(gap: float) -> None:
    for sign in (1.0, -1.0, 0.0):
        new = torch.tensor([[gap, 0.1]], requires_grad=True)
        out = clipped_policy_loss(new, torch.zeros(1, 2), torch.tensor([[sign, 1.0]]), torch.ones(1, 2), 0.2)
        out.loss.backward()
        assert out.loss.isfinite() and out.approx_kl.isfinite()
        assert new.grad is not None and new.grad.isfinite().all()


def test_nothing_sampled_means_no_loss_and_no_gradient() -> None:
    x = random_tensor(2, 5).requires_grad_()
    none = torch.zeros(2, 5)
    out = clipped_policy_loss(x, x.detach() - 3, random_tensor(2, 5, seed=1), none, 0.2)
    value = clipped_value_loss(x, x.detach() + 1, random_tensor(2, 5, seed=1), none, 0.2)
    (out.loss + value).backward()
    assert out.loss.item() == value.item() == out.clip_fraction.item() == 0
    assert x.grad is not None and not x.grad.any()
    assert masked_mean(torch.ones(2), torch.zeros(2)).item() == 0


def test_the_value_loss_is_half_the_worse_of_two_squares() -> None:
    new, old = random_tensor(6, 15, seed=1), random_tensor(6, 15, seed=2)
    returns, mask = random_tensor(6, 15, seed=3), tool_mask()
    total, n = 0.0, 0
    for b in range(6):
        for t in range(15):
            if mask[b, t]:
                v, o, r = (float(x[b, t]) for x in (new, old, returns))
                near = min(max(v, o - 0.2), o + 0.2)
                total, n = total + 0.5 * max((v - r) ** 2, (near - r) ** 2), n + 1
    assert clipped_value_loss(new, old, returns, mask, 0.2).item() == pytest.approx(total / n, abs=1e-6)
    free = clipped_value_loss(new, old, returns, mask, 1e9).item()
    assert free == pytest.approx(0.5 * ((new - returns) ** 2)[mask > 0].mean().item(), abs=1e-6)


def test_losses_have_the_gradients_of_finite_differences() -> None:
    mask = tool_mask().double()
    old, advantage = (random_tensor(6, 15, seed=s).double() for s in (2, 3))
    new = random_tensor(6, 15, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, old, advantage, mask, 0.2).loss, (new,))
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, advantage, mask, 0.2), (new,))


def test_log_probabilities_and_entropies_are_those_of_the_distribution() -> None:
    logits, targets = random_tensor(2, 3, 11, scale=3), torch.tensor([[0, 10, 5], [3, 3, 7]])
    logprobs, entropy = token_logprobs(logits, targets)
    made = torch.distributions.Categorical(logits=logits.double())
    assert torch.allclose(logprobs.double(), made.log_prob(targets), atol=1e-5)
    assert torch.allclose(entropy.double(), made.entropy(), atol=1e-5)
    assert token_logprobs(torch.zeros(1, 1, 64), torch.zeros(1, 1, dtype=torch.int64))[1].item() == pytest.approx(
        math.log(64)
    )
    sure = torch.full((1, 1, 5), -1e4)
    sure[..., 2] = 1e4
    logprobs, entropy = token_logprobs(sure.bfloat16(), torch.tensor([[0]]))
    assert logprobs.isfinite().all() and entropy.item() == 0


# --------------------------------------------------------------------------------------------------- KL coefficient


def test_the_coefficient_follows_ziegler_s_controller() -> None:
    assert adapt_kl_coefficient(0.2, 6.6, 6.0) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapt_kl_coefficient(0.2, 600.0, 6.0) == pytest.approx(0.2 * 1.02)
    assert adapt_kl_coefficient(0.2, -3.0, 6.0) == pytest.approx(0.2 * 0.98)
    assert adapt_kl_coefficient(0.2, 6.0, 6.0) == 0.2
    assert adapt_kl_coefficient(0.2, 5.4, 6.0, gain=1.0) == pytest.approx(0.2 * 0.9)


def test_the_controller_holds_a_kl_that_gives_way_to_it_at_its_target() -> None:
    coefficient = 0.01
    for _ in range(3000):
        coefficient = adapt_kl_coefficient(coefficient, 1.0 / coefficient, 8.0)
    assert 1.0 / coefficient == pytest.approx(8.0, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- torchrl


def test_torchrl_computes_the_same_advantages() -> None:
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, values = random_tensor(3, 9, seed=1), random_tensor(3, 9, seed=2)
    mine, returns = advantages(rewards, values, torch.ones(3, 9), gamma=0.9, lam=0.8)
    done = torch.zeros(3, 9, 1, dtype=torch.bool)
    done[:, -1] = True
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    theirs, targets = functional.generalized_advantage_estimate(
        0.9, 0.8, values[..., None], following[..., None], rewards[..., None], done, done
    )
    assert torch.allclose(mine, theirs[..., 0], atol=1e-5)
    assert torch.allclose(returns, targets[..., 0], atol=1e-5)


def test_torchrl_computes_the_same_clipped_loss() -> None:
    """Its ClipPPOLoss over a policy of one Gaussian action, with the advantages given and no bonus for entropy."""
    objectives = pytest.importorskip("torchrl.objectives")
    tensordict, nn = pytest.importorskip("tensordict"), pytest.importorskip("tensordict.nn")
    observed, actions = random_tensor(7, 3, seed=1), random_tensor(7, 1, seed=2)
    old, advantage = random_tensor(7, seed=3, scale=0.4) - 1.2, random_tensor(7, seed=4)
    layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(random_tensor(1, 3, seed=5))
    scale = torch.ones(7, 1)

    def normal(loc: Tensor, scale: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)

    network = nn.TensorDictModule(lambda x: (layer(x), scale), in_keys=["observation"], out_keys=["loc", "scale"])
    actor = nn.ProbabilisticTensorDictModule(
        in_keys=["loc", "scale"], out_keys=["action"], return_log_prob=True,
        distribution_class=normal,
    )  # fmt: skip
    loss = objectives.ClipPPOLoss(
        nn.ProbabilisticTensorDictSequential(network, actor), None, clip_epsilon=0.2, entropy_bonus=False,
        normalize_advantage=False,
    )  # fmt: skip
    data = tensordict.TensorDict(
        {"observation": observed, "action": actions, "action_log_prob": old, "advantage": advantage[:, None]}, [7]
    )
    theirs = loss(data)["loss_objective"]
    new = torch.distributions.Normal(layer(observed), scale).log_prob(actions)[:, 0]
    mine = clipped_policy_loss(new[None], old[None], advantage[None], torch.ones(1, 7), 0.2)
    assert mine.loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert 0 < mine.clip_fraction.item() < 1
