"""The same numbers and gradients as trl's, whose losses live in trainer classes.

Their `_compute_loss` (for rewards `compute_loss`) is called on a stand-in that has only what the loss reads, with the
log-probabilities given; no trainer is made, and nothing is trained or generated.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stateofgpt.rl.objective import aggregate, answer_policy_loss, clipped_policy_loss, kl_to_reference, ranking_loss
from stateofgpt.rl.offline import answer_logprobs, dpo_loss, ipo_loss, kto_loss, margins, mismatched_divergence

pytest.importorskip("trl", reason="trl is not there for this Python")
pytestmark = pytest.mark.slow  # importing transformers' trainer takes seconds


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]])


class StandIn:
    """What a trainer is to its loss: settings, an accelerator of one process, and drawers for metrics."""

    def __init__(self, **settings: Any) -> None:
        same = lambda x, **_: x  # noqa: E731
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same, num_processes=1,
            sync_gradients=True,
        )  # fmt: skip
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.model = torch.nn.Identity()
        self.model.is_gradient_checkpointing = False  # type: ignore[assignment]
        self.aux_loss_enabled, self._total_train_tokens, self._tp_size = False, 0, 1
        self.__dict__.update(settings)


def same(mine: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    """Value and gradient."""
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
    ours, expected = (torch.autograd.grad(value, leaf)[0] for value in (mine, theirs))
    assert torch.allclose(ours, expected, atol=1e-6) and ours.any()


def policy_inputs(new: Tensor, old: Tensor, advantage: Tensor) -> dict[str, Tensor]:
    nothing = torch.zeros(4, 2, dtype=torch.int64)
    return {
        "prompt_ids": nothing, "prompt_mask": nothing + 1, "completion_ids": torch.zeros(4, 7, dtype=torch.int64),
        "completion_mask": MASK, "advantages": advantage, "old_per_token_logps": old,
        "old_logps": (old * MASK).sum(1), "num_items_in_batch": MASK.sum(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "how"), [("grpo", "sequence"), ("dr_grpo", "constant"), ("bnpo", "token"), ("dapo", "token")]
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo_in_its_normalisations(name: str, how: Any, beta: float) -> None:
    from trl import GRPOTrainer

    new, old, ref = (random_tensor(4, 7, seed=s, scale=0.3) for s in (1, 2, 3))
    new.requires_grad_()
    advantage = random_tensor(4, seed=4)
    trainer = StandIn(
        loss_type=name, beta=beta, epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, importance_sampling_level="token", max_completion_length=11,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, vllm_importance_sampling_correction=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros(4, 7), None),
    )  # fmt: skip
    inputs = {**policy_inputs(new, old, advantage), "ref_per_token_logps": ref}
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    mine = clipped_policy_loss(new, old, advantage[:, None], MASK, 0.2, how, 11).loss
    mine = mine + beta * aggregate(kl_to_reference(new, ref, MASK), MASK, how, 11)
    same(mine, theirs, new)


def test_rloo() -> None:
    from trl import RLOOTrainer

    new, old = random_tensor(4, 7, seed=1, scale=0.1).requires_grad_(), random_tensor(4, 7, seed=2, scale=0.1)
    advantage = random_tensor(4, seed=4)
    trainer = StandIn(
        epsilon_low=0.2, epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros(4, 7), None),
    )  # fmt: skip
    theirs = RLOOTrainer._compute_loss(trainer, None, policy_inputs(new, old, advantage))
    same(answer_policy_loss(new, old, advantage, MASK, 0.2).loss, theirs, new)


def model_of(logprobs: Tensor) -> Any:
    """A model that finds these log-probabilities."""

    def forward(**_: Any) -> Any:
        flat = torch.zeros_like(logprobs)
        return SimpleNamespace(log_probs=logprobs, entropy=flat, mean_logits=flat, is_top1=flat.bool())

    return forward


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_dpo_and_ipo(name: str) -> None:
    from trl import DPOTrainer

    new, ref = random_tensor(4, 7, seed=1).requires_grad_(), random_tensor(4, 7, seed=2)
    mask = torch.cat(
        [torch.zeros(4, 1, dtype=torch.int64), MASK], 1
    )  # theirs counts the first token, which is a prompt's
    trainer = StandIn(
        ld_alpha=None, precompute_ref_logps=False, ref_model=model_of(ref * MASK), f_divergence_type="reverse_kl",
        loss_types=[name], loss_weights=[1.0], beta=0.1, use_weighting=False, label_smoothing=0.0,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(4, 8, dtype=torch.int64),
        "attention_mask": torch.ones(4, 8),
        "completion_mask": mask,
    }
    theirs = DPOTrainer._compute_loss(trainer, model_of(new * MASK), inputs, False)
    per_token = name == "ipo"
    policy, reference = (answer_logprobs(x, MASK, per_token=per_token) for x in (new, ref))
    h = margins(policy[:2], policy[2:], reference[:2], reference[2:])
    same((ipo_loss if per_token else dpo_loss)(h, 0.1).mean(), theirs, new)


def test_kto() -> None:
    from trl import KTOTrainer

    new, ref, other, other_ref = (random_tensor(4, 7, seed=s) for s in (1, 2, 3, 5))
    new.requires_grad_()
    liked = torch.tensor([True, False, True, False])
    trainer = StandIn(
        calculate_KL=True, precompute_ref_logps=False, loss_type="kto", beta=0.1, desirable_weight=1.3,
        undesirable_weight=0.8, args=SimpleNamespace(gradient_checkpointing_kwargs=None), ref_model="reference",
    )  # fmt: skip
    found = {"policy": (other * MASK).sum(1), "reference": (other_ref * MASK).sum(1)}
    policy = model_of(new * MASK)
    trainer.ref_model = model_of(ref * MASK)  # type: ignore[attr-defined]
    trainer._compute_kl_logps = lambda m, batch: found["policy" if m is policy else "reference"]  # type: ignore[attr-defined]
    mask = torch.cat([torch.zeros(4, 1, dtype=torch.int64), MASK], 1)
    inputs = {
        "input_ids": torch.zeros(4, 8, dtype=torch.int64),
        "attention_mask": torch.ones(4, 8),
        "completion_mask": mask,
        "label": liked,
    }
    theirs = KTOTrainer._compute_loss(trainer, policy, inputs, False)
    z = mismatched_divergence(found["policy"], found["reference"])
    mine = kto_loss(answer_logprobs(new, MASK), answer_logprobs(ref, MASK), liked, z, 0.1, 1.3, 0.8).mean()
    same(mine, theirs, new)


def test_the_reward_models_loss_of_pairs() -> None:
    from trl import RewardTrainer

    scores = random_tensor(6, 1, seed=1, scale=2).requires_grad_()
    trainer = StandIn(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(6, 1)}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)
    pairs = torch.stack([scores[:3, 0], scores[3:, 0]], 1)
    same(ranking_loss(pairs, torch.tensor([[1, 2]] * 3)), theirs, scores)
