"""Reward models and policies on a device of their own learn what they learn on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_ppo import END, PAD, SHAPE, answers, model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from twin_device import twin

from stateofgpt.assistant.session import Turn
from stateofgpt.model.heads import RewardModel, ValueModel
from stateofgpt.rl.group import GroupConfig, GroupOptimization
from stateofgpt.rl.optimization import Optimization, Told, UpdateConfig
from stateofgpt.rl.packed import PackedRow
from stateofgpt.rl.packed import batch as side_by_side
from stateofgpt.rl.ppo import PPO
from stateofgpt.rl.preference import Answer, OfflineConfig, Pair, PreferenceOptimization
from stateofgpt.rl.reward_training import RankedBatch, RankingLoss, score_ids
from stateofgpt.rl.scoring import LearnedScorer
from stateofgpt.stages.evaluate import mean_token_entropy
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, Way
from stateofgpt.train.optim import OptimConfig

pytestmark = pytest.mark.slow  # together they take long

__all__ = ["twin"]

ONLINE = ("ppo", "grpo", "reinforce", "best_of_n")  # the others differ in formulas alone
OFFLINE = ("dpo", "kto")
PAIRS = [
    Pair((0, 1, 7 + i), Answer((9 + i, 11, 2), (1, 1, 1)), Answer((12, 13 + i, 9, 9, 2), (1, 0, 1, 1, 1)))
    for i in range(6)
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def optimization(algorithm: str, device: str, part: int | None) -> Optimization:
    config, way = UpdateConfig(part_tokens=part, kl_target=1.0, value_lam=0.9), Way(device=device)
    scorer = LearnedScorer(
        RewardModel(model(1), PAD).to(device), mean=0.1, std=1.3, pad_id=PAD, end_id=END, no_end_score=-2.0,
        part_tokens=part,
    )  # fmt: skip
    both, given = (model().to(device), model(5).to(device)), {"pad_id": PAD, "way": way}
    if algorithm == "ppo":
        made: Optimization = PPO(*both, ValueModel(RewardModel(model(1), PAD)).to(device), scorer, config, **given)
    elif algorithm in OFFLINE:
        made = PreferenceOptimization(algorithm, *both, scorer, config, OfflineConfig(), PAIRS, **given)  # type: ignore[arg-type]
    else:
        own = GroupConfig(accept=-1.0)
        made = GroupOptimization(algorithm, *both, scorer, config, own, group=4, max_tokens=8, **given)  # type: ignore[arg-type]
    if algorithm == "grpo":
        texts = torch.randint(4, SHAPE.vocab_size, (3, 13), generator=torch.Generator().manual_seed(3)).numpy()
        made.config = replace(config, pretraining=0.5)
        made.pretraining = lambda order: Batch.of(texts[:, :-1].copy(), texts[:, 1:].copy())
    return made


def drawn(seed: int = 0) -> list[Turn]:
    """Answers of which every other one ended its turn, so that they score differently."""
    turns = answers(model(), 8, seed=seed)
    return [replace(t, ids=[*t.ids[:-1], END], finish="stop") if i % 2 else t for i, t in enumerate(turns)]


def weights(*models: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for m in models for p in m.parameters()])


def learners(made: Optimization) -> tuple[nn.Module, ...]:
    return tuple(trainer.model for trainer in made.trainers.values())


@pytest.mark.parametrize(("algorithm", "part"), [("ppo", None), *((name, 40) for name in (*ONLINE, *OFFLINE))])
def test_an_iteration_on_another_device_is_that_of_the_cpu(algorithm: str, part: int | None, twin: str) -> None:
    turns, ends = drawn(), []
    for device in ("cpu", twin):
        made = optimization(algorithm, device, part)
        before = weights(*learners(made))
        with sdpa_kernel(SDPBackend.MATH):
            experience, watched = made.experience(turns)
            told = made.update(experience, torch.Generator().manual_seed(3), 1.0, watched["kl"])
        assert {t.device.type for t in (experience.logprobs, experience.advantages, experience.rollouts.mask)} == {
            torch.device(device).type
        }
        ends.append((watched, told, weights(*learners(made)), before))
    (here, said, end, start), (there, told, elsewhere, _) = ends
    assert here == pytest.approx(there, rel=1e-4, abs=1e-5) and said == pytest.approx(told, rel=1e-3, abs=1e-5)
    moved = torch.linalg.vector_norm(end - start)
    assert moved > 0 and torch.linalg.vector_norm(end - elsewhere) < 0.02 * moved


def test_updates_ask_a_device_for_nothing_but_their_losses(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make a GPU wait within an update: numbers read one by one, and shapes that depend on a mask."""
    made = optimization("ppo", twin, 40)
    with sdpa_kernel(SDPBackend.MATH):
        experience, _ = made.experience(drawn())
        asked: list[str] = []
        plain = Told.means

        def means(self: Told, updates: int) -> dict[str, float]:
            asked.append("told")
            return plain(self, updates)

        monkeypatch.setattr(Told, "means", means)
        with _Asked(asked):
            made.update(experience, torch.Generator().manual_seed(3), 1.0, 0.0)
    updates = made.config.epochs * made.config.minibatches
    before_the_end = asked[: asked.index("told")]
    assert len(before_the_end) == 2 * updates, before_the_end  # of policy and value, once a step


class _Asked(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operation that has to wait for its device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal")

    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self.asked = asked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.removeprefix("aten::")
        first = next((x for x in args if isinstance(x, torch.Tensor)), None)
        if name in self.NAMES and first is not None and first.device.type != "cpu":
            self.asked.append(name)
        to = (kwargs or {}).get("device") or "meta"
        if name == "_to_copy" and first is not None and first.device.type != "cpu" and torch.device(to).type == "cpu":
            self.asked.append("copied")
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_resumed_on_another_device_it_goes_on_to_the_same_bits(twin: str) -> None:
    algorithm = "ppo"

    def iterate(made: Optimization, i: int) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            experience, watched = made.experience(drawn(i))
            made.update(experience, torch.Generator().manual_seed(i), 1.0, watched["kl"])

    whole = optimization(algorithm, twin, None)
    for i in range(2):
        iterate(whole, i)
    first = optimization(algorithm, twin, None)
    iterate(first, 0)
    kept = {name: t.detach().cpu().clone() for name, t in first.tensors().items()}, first.numbers()
    again = optimization(algorithm, twin, None)
    again.load(*kept)
    iterate(again, 1)
    assert torch.equal(weights(*learners(whole)), weights(*learners(again)))


def test_a_reward_model_on_another_device_learns_and_scores_as_on_the_cpu(twin: str) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(4, 32, (5 + i,), generator=generator).tolist() for i in range(12)]
    packed = side_by_side([PackedRow((5, 6), tuple(map(tuple, rows[i : i + 4]))) for i in (0, 4, 8)], PAD)
    batch = RankedBatch(packed, torch.tensor([[1, 2, 3, 4], [1, 1, 2, 0], [2, 2, 1, 3]]), torch.ones(3) / 5)
    ends = []
    for device in ("cpu", twin):
        made = RewardModel(model(1), PAD).to(device)
        adam = LoopConfig(optim=OptimConfig(use_muon=False))
        trainer, loss = Trainer(made, adam), RankingLoss(Way(device=device))
        with sdpa_kernel(SDPBackend.MATH):
            told = [trainer.step([batch], loss, 1.0)["loss"] for _ in range(3)]
            ends.append((told, loss.accuracy(), score_ids(made, rows, PAD, 5)))
    (told, accuracy, scores), there = ends
    assert told == pytest.approx(there[0], rel=0.02) and accuracy == there[1]
    assert scores == pytest.approx(there[2], rel=0.02, abs=1e-3)


def test_the_entropy_of_answers_is_measured_where_the_model_is(twin: str) -> None:
    rows = [([0, 1, 7 + i, 9, 11, 20 + i], 3) for i in range(4)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        here, there = (mean_token_entropy(model().to(device), rows) for device in ("cpu", twin))
    assert here == pytest.approx(there, rel=1e-5) and here > 0.0
    assert mean_token_entropy(model(), []) == 0.0
