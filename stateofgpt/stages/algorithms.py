"""Which algorithm a name means, and what it needs of a run: models, a scorer, pairs, texts of pretraining.

Owns the choice; the algorithms live in `rl/`, and the loop around them is `stages/rl.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from stateofgpt.data.batches import PretrainBatches
from stateofgpt.data.comparisons import Ranking, read_rankings
from stateofgpt.data.prompts import PromptConfig
from stateofgpt.data.shards import Shards
from stateofgpt.data.tasks import Tasks, tasks_of
from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.errors import ConfigError, RunError
from stateofgpt.model.checkpoint import load_reward
from stateofgpt.model.device import CPU
from stateofgpt.rl.group import COMPARED, GroupAlgorithm, GroupConfig, GroupOptimization
from stateofgpt.rl.optimization import Logprobs, Optimization, UpdateConfig
from stateofgpt.rl.ppo import PPO
from stateofgpt.rl.preference import OfflineAlgorithm, OfflineConfig, PreferenceOptimization, pairs_of
from stateofgpt.rl.scoring import LearnedScorer, Scorer, VerifiedScorer
from stateofgpt.run import Run
from stateofgpt.stages.learners import policy_of, value_of
from stateofgpt.text.chat import ChatFormat
from stateofgpt.train.loss import Batch, Way

Algorithm = Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce", "best_of_n", "rejection", "dpo", "ipo", "kto"]
Reward = Literal["learned", "verified"]
OFFLINE: tuple[str, ...] = get_args(OfflineAlgorithm)
RIGHT = 0.5  # a verified reward, or a normalised learned one, from which an answer is worth learning
GROUP = 4


def group_of(algorithm: Algorithm, group: int | None) -> int:
    """Answers to every prompt."""
    if group is not None:
        if group < 1 or (algorithm in COMPARED and group < 2):
            raise ConfigError(f"rl.group is {group}; {algorithm} needs at least {2 if algorithm in COMPARED else 1}")
        return group
    return GROUP if algorithm in COMPARED or algorithm == "rejection" else 1


def check_files(tasks: str | None, rankings: str | None, prompts: PromptConfig) -> None:
    """Read the user's files before anything is trained."""
    tasks_of(tasks, 0, prompts)
    if rankings is not None:
        read_comparisons(rankings).strict()


def check_unrewarded(algorithm: Algorithm, reward: Reward | None, rankings: str | None) -> None:
    """ConfigError where these settings need a reward stage, for recipes that have none."""
    if algorithm in OFFLINE:
        if rankings is None:
            raise ConfigError(f"{algorithm} learns from rankings: add the reward stage, or give --rl.rankings FILE")
    elif reward != "verified":
        raise ConfigError("a recipe with an rl stage and no reward stage needs --rl.reward verified")


def scorer_of(
    kind: Reward,
    reward: Path | None,
    update: UpdateConfig,
    chat: ChatFormat,
    tasks: Tasks,
    mean: float,
    std: float,
    way: Way,
) -> Scorer:
    """The reward model in a folder with its usual scores, or the tasks' own check."""
    if kind == "verified":
        return VerifiedScorer(tasks.check, end_id=chat.end)
    if reward is None:
        raise RunError("this run has no finished reward stage; run `sog reward`, or give --rl.reward verified")
    return LearnedScorer(
        load_reward(reward).to(way.device),
        mean=mean,
        std=std,
        pad_id=chat.tokenizer.pad,
        end_id=chat.end,
        no_end_score=update.no_end_score,
        part_tokens=update.part_tokens,
        way=way,
    )


def optimization_of(
    algorithm: Algorithm,
    start: Path,
    reward: Path | None,
    scorer: Scorer,
    update: UpdateConfig,
    chat: ChatFormat,
    way: Way,
    *,
    group: int,
    max_tokens: int,
    temperature: float,
    of_groups: GroupConfig,
    offline: OfflineConfig,
    logprobs: Logprobs | None,
    rankings: Sequence[Ranking],
    lora: int | None,
    seed: int,
) -> Optimization:
    """The algorithm, with the policy in `start` as what learns and as its reference."""
    (policy, reference), pad_id = policy_of(start, lora, seed, way.device), chat.tokenizer.pad
    if algorithm in OFFLINE:
        return PreferenceOptimization(
            cast(OfflineAlgorithm, algorithm), policy, reference, scorer, update, offline, pairs_of(rankings, chat),
            pad_id=pad_id, way=way,
        )  # fmt: skip
    kept = logprobs or _logprobs(way, temperature)
    if algorithm == "ppo":
        learned = scorer.model if isinstance(scorer, LearnedScorer) else None
        value = value_of(start, learned, reward, lora, seed + 1, way.device)
        return PPO(policy, reference, value, scorer, update, pad_id=pad_id, way=way, logprobs=kept)
    if of_groups.accept is None and (algorithm == "rejection" or isinstance(scorer, VerifiedScorer)):
        of_groups = GroupConfig(of_groups.kl_loss, of_groups.normalise, RIGHT)
    return GroupOptimization(
        cast(GroupAlgorithm, algorithm), policy, reference, scorer, update, of_groups,
        group=group, max_tokens=max_tokens, pad_id=pad_id, way=way, logprobs=kept,
    )  # fmt: skip


def _logprobs(way: Way, temperature: float) -> Logprobs:
    """The engine's where the updates are in float32 on the CPU and so compute the same numbers (elsewhere the engine is
    in bfloat16), and where the entropy that is told can be estimated from them."""
    return "engine" if way.dtype == "float32" and way.device == CPU and temperature == 1.0 else "training"


def rankings_of(run: Run, file: str | None) -> list[Ranking]:
    """The rankings of a file in any form that is known, else those that the run's reward stage learned from."""
    if file is not None:
        return read_comparisons(file).strict()
    path = run.stage("reward").dir / "rankings.jsonl"
    if not path.exists():
        raise RunError("this run has no rankings; run `sog reward`, or give a file with --rl.rankings")
    return read_rankings(path)


def pretraining_of(run: Run, update: UpdateConfig, begins: int) -> Callable[[torch.Generator], Batch]:
    """Batches of rows of the run's own mixture, at a place that a generator draws. `begins` begins a document."""
    collected, plan = run.stage("collect").result(), run.stage("pretrain").decide("plan", dict)
    if collected is None or not run.stage("tokenize").done:
        raise RunError("rl.ppo.pretraining needs the texts that the model was pretrained on, and this run has none")
    weights = {source["name"]: source["weight"] for source in collected["sources"]}
    context = plan.get("context") or plan["model"]["max_position_embeddings"]
    rows, all_rows = update.pretraining_rows or 4, 1 << 20
    batches = PretrainBatches(Shards.open(run.stage("tokenize").dir), weights, rows, context, run.seed + 1, all_rows)

    def draw(order: torch.Generator) -> Batch:
        start = int(torch.randint(all_rows - rows, (1,), generator=order))
        return Batch.of(*batches.rows(start, rows), begins=begins)

    return draw
