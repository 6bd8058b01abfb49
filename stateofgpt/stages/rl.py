"""Reinforcement learning: from the SFT policy, by PPO against the reward model or as the configuration says.

Owns what is particular to the stage and the same for every algorithm: which prompts, how many iterations the budget
allows, the guard on KL, and the comparison with SFT on held-out prompts. The algorithms live in `rl/`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stateofgpt.assistant.session import Session, Turn
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.data.comparisons import Ranking
from stateofgpt.data.prompts import PromptConfig, repeated
from stateofgpt.data.skills import Problem
from stateofgpt.data.tasks import Tasks, tasks_of
from stateofgpt.errors import ConfigError
from stateofgpt.eval.diversity import sign_flip_test
from stateofgpt.eval.suites import conversation
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import save_checkpoint
from stateofgpt.model.device import wait
from stateofgpt.rl.group import GroupConfig
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.rl.labeller import SimulatedLabeller
from stateofgpt.rl.optimization import Logprobs, UpdateConfig
from stateofgpt.rl.preference import OfflineConfig
from stateofgpt.run import Run, Stage
from stateofgpt.stages.algorithms import (
    OFFLINE,
    Algorithm,
    Reward,
    group_of,
    optimization_of,
    pretraining_of,
    rankings_of,
    scorer_of,
)
from stateofgpt.stages.judge import rankings_apart
from stateofgpt.stages.learners import kept, learned
from stateofgpt.stages.manners import shares
from stateofgpt.stages.transcript import written
from stateofgpt.stages.watch import STOPPED, Watch, restore, watch_of
from stateofgpt.stages.way import way_of
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loss import Way
from stateofgpt.train.schedule import warmup_stable_decay
from stateofgpt.train.state import TrainState

FIRST = 50_000  # the index of the first prompt asked: the reward stage asks those from 0
LOOKED_AT = 16  # prompts of an iteration that learns from rankings
SHOWN = 2  # rollouts of every iteration that are kept to read


@dataclass(frozen=True)
class Config:
    """Give `seconds` or `iterations`. `max_kl` is a budget in nats per answer: where a batch shows the policy beyond
    it, the run ends with the policy as it was before the update that led there.

    `batch` answers are drawn in an iteration, `group` of them to every prompt. `reward` is "learned" (the reward
    stage's model) or "verified" (the problems' own right answers); `tasks` a file of word problems or
    "reasoning_gym:NAME", None for the skills. dpo, ipo and kto learn from `rankings`, by default the reward stage's.
    Settings of None: ppo, a group of 1, or of 4 where the algorithm compares, and learned rewards.
    """

    seconds: float | None = None
    iterations: int | None = None
    batch: int = 64
    temperature: float = 1.0
    max_tokens: int = 150
    max_kl: float = 12.0
    held_out_prompts: int = 192
    save_every_s: float = 20.0
    prompts: PromptConfig = field(default_factory=PromptConfig)
    ppo: UpdateConfig = field(default_factory=UpdateConfig)
    algorithm: Algorithm | None = None
    group: int | None = None
    reward: Reward | None = None
    tasks: str | None = None
    rankings: str | None = None
    logprobs: Logprobs | None = None
    groups: GroupConfig | None = None
    offline: OfflineConfig | None = None
    lora: int | None = None  # the rank of adapters that are trained in place of all weights
    guards: GuardConfig | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.iterations is None):
            raise ConfigError("rl needs either seconds or iterations, and not both")
        if self.batch < self.ppo.minibatches:
            raise ConfigError(f"rl.batch ({self.batch}) is smaller than rl.ppo.minibatches ({self.ppo.minibatches})")
        if self.batch % (group := group_of(self.chosen, self.group)):
            raise ConfigError(f"rl.batch ({self.batch}) is no multiple of rl.group ({group})")
        if self.ppo.pretraining is not None and self.chosen in OFFLINE:
            raise ConfigError(f"rl.ppo.pretraining goes with algorithms that sample, and {self.chosen} does not")
        if self.lora is not None and self.lora < 1:
            raise ConfigError(f"rl.lora is {self.lora}, a rank is at least 1")

    @property
    def chosen(self) -> Algorithm:
        """The algorithm."""
        return self.algorithm or "ppo"


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train a policy on the run's SFT model; returns the stage's result."""
    stage = run.stage("rl")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        way = way_of(run)
        rewarding = run.stage("reward")
        normal = rewarding.result()
        reward = None if normal is None else rewarding.checkpoint
        mean, std = (0.0, 1.0) if normal is None else (normal["mean"], normal["std"])
        rankings = rankings_of(run, config.rankings) if config.chosen in OFFLINE else ()
        apart = None if config.reward == "verified" else rankings_apart(run, (config.guards or GuardConfig()).rankings)
        return PolicyTraining(
            config, run, stage, run.stage("sft").checkpoint, reward, way, mean, std, rankings=rankings, apart=apart
        ).work()


class PolicyTraining:
    """Policy optimisation from the policy in `start`, within one stage's folder; `reward` is the reward model's folder.

    `own` are prompts of people's, which get `own_share` of every batch; they have no right answer, so the true score
    is that of the others, and with verified rewards they are not asked. `rankings` are what dpo, ipo and kto learn.
    """

    names = ("true_sft", "true_rl", "true_score")  # of scores: before and after in the result, and in a model card
    context: int | None = None  # tokens of a prompt and its answer, where they are fewer than the model's

    def __init__(
        self,
        config: Config,
        run: Run,
        stage: Stage,
        start: Path,
        reward: Path | None,
        way: Way,
        mean: float,
        std: float,
        own: Sequence[Conversation] = (),
        own_share: float = 0.0,
        rankings: Sequence[Ranking] = (),
        apart: Sequence[Ranking] | None = None,
        tasks: Tasks | None = None,
    ) -> None:
        self.config, self.run, self.stage, self.start, self.reward = config, run, stage, start, reward
        algorithm, self.group = config.chosen, group_of(config.chosen, config.group)
        kind = config.reward or ("verified" if algorithm in OFFLINE and reward is None else "learned")
        self.rewarded = kind
        self.n_prompts = config.batch // self.group
        if algorithm in OFFLINE:  # answers are only looked at
            self.n_prompts = min(self.n_prompts, LOOKED_AT)
        self.own, self.n_own = own, round(own_share * self.n_prompts) if own and kind == "learned" else 0
        self.tokenizer = Tokenizer.load(start)
        self.chat = ChatFormat(self.tokenizer)
        self.labeller = SimulatedLabeller(run.seed)
        self.way = way
        self.tasks = tasks or tasks_of(config.tasks, run.seed, config.prompts)
        scorer = scorer_of(kind, reward, config.ppo, self.chat, self.tasks, mean, std, way)
        self.optimization = optimization_of(
            algorithm, start, reward, scorer, config.ppo, self.chat, way,
            group=self.group, max_tokens=config.max_tokens, temperature=config.temperature,
            of_groups=config.groups or GroupConfig(), offline=config.offline or OfflineConfig(),
            logprobs=config.logprobs, rankings=rankings, lora=config.lora, seed=run.seed,
        )  # fmt: skip
        if config.ppo.pretraining is not None:
            self.optimization.pretraining = pretraining_of(run, config.ppo, self.tokenizer.eot)
        self.policy = self.optimization.policy
        self.engine = Engine(self.policy, max_batch=config.batch, max_context=self.context, native=way.native)
        self.session = Session(self.engine, self.chat, Toolbox())
        # the policy before the last update: what remains when that update leads past the KL budget
        self.within_budget = kept(self.policy)
        self.watch = self._watch(apart)

    def _watch(self, apart: Sequence[Ranking] | None) -> Watch:
        return watch_of(
            self.config.guards or GuardConfig(), self.run, self.stage, self.start, self.optimization, self.tasks,
            self.chat, self.way, self._looked_at, self._true_scores, apart,
        )  # fmt: skip

    def _looked_at(self, asked: Sequence[Problem]) -> list[Turn]:
        return self._answer(asked, self.run.seed * 1_000_003 - 2)

    def work(self) -> dict[str, Any]:
        held_out = self.tasks.problems(self.config.held_out_prompts, "heldout", 10_000)
        before = self.stage.decide("before", lambda: self._measure(held_out))
        iterations = self.stage.decide("iterations", lambda: {"n": self._affordable()})["n"]
        state = TrainState(self.stage.resume_dir)
        first = 0
        if (saved := state.latest()) is not None:
            first = saved[0]
            self._load(saved[1], saved[2])
        self.stage.truncate_metrics(first if first else -1)
        self.watch.begin()
        last_save = time.monotonic()
        stopped = given_up = ""
        for i in range(first, iterations):
            kl, why = self._iterate(i, iterations), ""
            if kl > self.config.max_kl:
                stopped = f"KL {kl:.1f} passed the budget of {self.config.max_kl:g} nats at iteration {i + 1}"
                restore(self.policy, self.within_budget)
            else:
                stopped = why = self.watch.after(i + 1)
            if not why and (stopped or i + 1 == iterations):
                why = given_up = self.watch.close(i + 1)
            if why:
                self._save(self.stage.dir / STOPPED, {"kl": kl})
                restore(self.policy, self.watch.best)
            if stopped or given_up:
                break
            if time.monotonic() - last_save > self.config.save_every_s or i + 1 == iterations:
                state.save(i + 1, self._tensors(), self.optimization.numbers() | self.watch.numbers())
                last_save = time.monotonic()
        return self._finish(before, held_out, iterations, stopped, given_up)

    def _iterate(self, i: int, iterations: int) -> float:
        """One batch of rollouts and its updates; returns the KL before them."""
        asked, own = self._drawn(i)
        turns = self._answer(asked, self.run.seed * 1_000_003 + 7 * i, own)
        experience, watched = self.optimization.experience(turns, [*asked, *[None] * len(own)])
        if watched["kl"] <= self.config.max_kl:
            self.within_budget = kept(self.policy)
            factor = warmup_stable_decay(i, iterations, warmup=2, decay_share=0.5, floor=0.1)
            order = torch.Generator().manual_seed(self.run.seed * 1_000_003 + i)
            watched |= self.optimization.update(experience, order, factor, watched["kl"])
        self._note(i + 1, asked, turns[: len(asked)], watched)
        return watched["kl"]

    def _note(self, step: int, asked: Sequence[Problem], turns: Sequence[Turn], watched: dict[str, float]) -> None:
        """Log an iteration."""
        scores = self._true_scores(asked, turns)
        self.stage.log(step, **watched, true_score=fmean(scores), **shares(asked, turns))
        for problem, turn, score in list(zip(asked, turns, scores, strict=True))[:SHOWN]:
            self.stage.sample(step, prompt=problem.question, text=written(turn.messages), true_score=score)

    def _drawn(self, i: int) -> tuple[list[Problem], list[Conversation]]:
        """What is asked in batch `i`, each as often as it is answered: problems, and prompts of people's."""
        start = FIRST + (i * self.n_prompts if i >= 0 else -1000)
        asked = self.tasks.problems(self.n_prompts - self.n_own, "train", start)
        chosen = random.Random(f"own prompts {self.run.seed} {i}").choices(self.own, k=self.n_own) if self.n_own else []
        return repeated(asked, self.group), repeated(chosen, self.group)

    def _answer(self, asked: Sequence[Problem], seed: int, own: Sequence[Conversation] = ()) -> list[Turn]:
        self.engine.refresh()
        params = SamplingParams(max_tokens=self.config.max_tokens, temperature=self.config.temperature, seed=seed)
        return self.session.converse([*map(self._conversation, asked), *own], params)

    def _conversation(self, problem: Problem) -> Conversation:
        return conversation(problem)

    def _true_scores(self, asked: Sequence[Problem], turns: Sequence[Turn]) -> list[float]:
        """By the simulated labeller without noise; of tasks that it does not know, what their check says."""
        score = self.labeller.score if self.config.tasks is None else self.tasks.check
        return [score(p, t.messages) for p, t in zip(asked, turns, strict=True)]

    def _measure(self, held_out: Sequence[Problem]) -> dict[str, Any]:
        """The current policy on held-out prompts: true scores, KL, entropy, manners."""
        turns = self._answer(held_out, self.run.seed * 1_000_003 - 1)
        watched = self.optimization.look(turns, held_out, exact=True).watched
        scores = self._true_scores(held_out, turns)
        return {
            "scores": scores,
            "kl": watched["kl"],
            "entropy": watched["entropy"],
            "length": watched["length"],
            "proxy_reward": watched["proxy_reward"],
            **shares(held_out, turns),
        }

    def _affordable(self) -> int:
        """Iterations that the budget allows, from one measured iteration whose learning rates are zero."""
        if self.config.iterations is not None:
            return self.config.iterations
        assert self.config.seconds is not None
        tensors, numbers = {n: t.clone() for n, t in self._tensors().items()}, self.optimization.numbers()
        start = time.perf_counter()
        asked, own = self._drawn(-1)
        turns = self._answer(asked, 0, own)
        experience, watched = self.optimization.experience(turns, [*asked, *[None] * len(own)])
        self.optimization.update(experience, torch.Generator().manual_seed(0), 0.0, watched["kl"])
        wait(self.way.device)
        seconds = time.perf_counter() - start
        self._load(tensors, numbers)
        measuring = self.stage.seconds() - seconds
        room = self.config.seconds - self.stage.seconds() - measuring
        return max(4, self.watch.affordable(room, seconds, measuring / self.config.held_out_prompts))

    def _tensors(self) -> dict[str, Tensor]:
        before = {f"within_budget.{n}": t for n, t in learned(self.policy, self.within_budget).items()}
        return self.optimization.tensors() | before | self.watch.tensors()

    def _load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        self.optimization.load(tensors, numbers)
        self.watch.load(tensors, numbers)
        prefix = "within_budget."
        self.within_budget |= {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    def _finish(
        self, before: dict[str, Any], held_out: Sequence[Problem], iterations: int, stopped: str, given_up: str
    ) -> dict[str, Any]:
        after = self._measure(held_out)
        result = {
            "algorithm": self.config.chosen,
            "reward": self.rewarded,
            "iterations": iterations,
            "stopped": stopped,
            "given_up": given_up,
            self.names[0]: fmean(before["scores"]),
            self.names[1]: fmean(after["scores"]),
            "p_value": sign_flip_test(after["scores"], before["scores"], seed=self.run.seed),
            "n": len(held_out),
            "kl": after["kl"],
            "entropy_sft": before["entropy"],
            "entropy_rl": after["entropy"],
            "before": {k: v for k, v in before.items() if k != "scores"},
            "after": {k: v for k, v in after.items() if k != "scores"},
            "guards": self.watch.told(),
        }
        self._save(self.stage.checkpoint, {self.names[2]: fmean(after["scores"]), "kl": result["kl"]})
        TrainState(self.stage.resume_dir).clear()
        self.stage.finish(result)
        return result

    def _save(self, folder: Path, metrics: dict[str, float]) -> None:
        save_checkpoint(
            folder,
            self.policy,
            tokenizer=self.tokenizer,
            stage="rl",
            run=self.run.root.name,
            parents=[self.start] if self.reward is None else [self.start, self.reward],
            metrics=metrics,
        )
