"""Reinforcement learning from the reward model: PPO from the SFT policy.

Owns what is particular to the stage: which prompts, how many iterations the budget allows, the guard on KL, and the
comparison with SFT on held-out prompts. The algorithm lives in `rl/`.
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
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.data.skills import Problem, manner_of
from stateofgpt.data.skills.problems import ARITHMETIC
from stateofgpt.errors import ConfigError
from stateofgpt.eval.diversity import sign_flip_test
from stateofgpt.eval.suites import conversation
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import load_model, load_reward, save_checkpoint
from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import ValueModel
from stateofgpt.rl.labeller import SimulatedLabeller
from stateofgpt.rl.ppo import PPO, PPOConfig
from stateofgpt.run import Run, Stage
from stateofgpt.stages.transcript import written
from stateofgpt.stages.way import way_of
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loss import Way
from stateofgpt.train.schedule import warmup_stable_decay
from stateofgpt.train.state import TrainState

MANNERS = ("direct", "steps", "tool")
SHOWN = 2  # rollouts of every iteration that are kept to read


@dataclass(frozen=True)
class Config:
    """Give `seconds` or `iterations`. `max_kl` is a budget in nats per answer: where a batch shows the policy beyond
    it, the run ends with the policy as it was before the update that led there."""

    seconds: float | None = None
    iterations: int | None = None
    batch: int = 64
    temperature: float = 1.0
    max_tokens: int = 150
    max_kl: float = 12.0
    held_out_prompts: int = 192
    save_every_s: float = 20.0
    prompts: PromptConfig = field(default_factory=PromptConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.iterations is None):
            raise ConfigError("rl needs either seconds or iterations, and not both")
        if self.batch < self.ppo.minibatches:
            raise ConfigError(f"rl.batch ({self.batch}) is smaller than rl.ppo.minibatches ({self.ppo.minibatches})")


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train a policy with PPO on the run's SFT and reward models; returns the stage's result."""
    stage = run.stage("rl")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        sft, reward = run.stage("sft").checkpoint, run.stage("reward").checkpoint
        way = way_of(run)
        normal = run.stage("reward").result() or {}
        return PolicyTraining(config, run, stage, sft, reward, way, normal["mean"], normal["std"]).work()


class PolicyTraining:
    """PPO from the policy in `start` against the reward model in `reward`, within one stage's folder.

    `own` are prompts of people's, which get `own_share` of every batch; they have no right answer, so the true score
    is that of the others.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        stage: Stage,
        start: Path,
        reward: Path,
        way: Way,
        mean: float,
        std: float,
        own: Sequence[Conversation] = (),
        own_share: float = 0.0,
    ) -> None:
        self.own, self.n_own = own, round(own_share * config.batch) if own else 0
        self.config, self.run, self.stage, self.start, self.reward = config, run, stage, start, reward
        self.tokenizer = Tokenizer.load(start)
        self.chat = ChatFormat(self.tokenizer)
        self.labeller = SimulatedLabeller(run.seed)
        self.ppo = PPO(
            load_model(start),
            load_model(start),
            load_reward(reward),
            ValueModel(load_reward(reward)),
            config.ppo,
            pad_id=self.tokenizer.pad,
            end_id=self.chat.end,
            reward_mean=mean,
            reward_std=std,
            way=way,
        )
        self.engine = Engine(self.ppo.policy, max_batch=config.batch, native=way.native)
        self.session = Session(self.engine, self.chat, Toolbox())
        # the policy before the last update: what remains when that update leads past the KL budget
        self.within_budget = {n: p.detach().clone() for n, p in self.ppo.policy.named_parameters()}

    def work(self) -> dict[str, Any]:
        held_out = prompts(self.run.seed, self.config.held_out_prompts, self.config.prompts, "heldout", 10_000)
        before = self.stage.decide("before", lambda: self._measure(held_out))
        iterations = self.stage.decide("iterations", lambda: {"n": self._affordable()})["n"]
        state = TrainState(self.stage.resume_dir)
        first = 0
        if (saved := state.latest()) is not None:
            first = saved[0]
            self._load(saved[1])
            self.ppo.kl_coefficient = saved[2]["kl_coefficient"]
        self.stage.truncate_metrics(first if first else -1)
        last_save = time.monotonic()
        stopped = ""
        for i in range(first, iterations):
            kl = self._iterate(i, iterations)
            if kl > self.config.max_kl:
                stopped = f"KL {kl:.1f} passed the budget of {self.config.max_kl:g} nats at iteration {i + 1}"
                self._restore(self.within_budget)
                break
            if time.monotonic() - last_save > self.config.save_every_s or i + 1 == iterations:
                state.save(i + 1, self._tensors(), {"kl_coefficient": self.ppo.kl_coefficient})
                last_save = time.monotonic()
        return self._finish(before, held_out, iterations, stopped)

    def _iterate(self, i: int, iterations: int) -> float:
        """One batch of rollouts and its updates; returns the KL before them."""
        start = 50_000 + i * self.config.batch
        asked = prompts(self.run.seed, self.config.batch - self.n_own, self.config.prompts, "train", start)
        turns = self._answer(asked, self.run.seed * 1_000_003 + 7 * i, self._drawn(i))
        experience, watched = self.ppo.experience(turns)
        if watched["kl"] <= self.config.max_kl:
            self.within_budget = {n: p.detach().clone() for n, p in self.ppo.policy.named_parameters()}
            factor = warmup_stable_decay(i, iterations, warmup=2, decay_share=0.5, floor=0.1)
            order = torch.Generator().manual_seed(self.run.seed * 1_000_003 + i)
            watched |= self.ppo.update(experience, order, factor, watched["kl"])
        turns = turns[: len(asked)]
        scores = self._true_scores(asked, turns)
        self.stage.log(i + 1, **watched, true_score=fmean(scores), **_shares(asked, turns))
        for problem, turn, score in list(zip(asked, turns, scores, strict=True))[:SHOWN]:
            self.stage.sample(i + 1, prompt=problem.question, text=written(turn.messages), true_score=score)
        return watched["kl"]

    def _drawn(self, i: int) -> list[Conversation]:
        """The prompts of people's in batch `i`."""
        return random.Random(f"own prompts {self.run.seed} {i}").choices(self.own, k=self.n_own) if self.n_own else []

    def _answer(self, asked: Sequence[Problem], seed: int, own: Sequence[Conversation] = ()) -> list[Turn]:
        self.engine.refresh()
        params = SamplingParams(max_tokens=self.config.max_tokens, temperature=self.config.temperature, seed=seed)
        return self.session.converse([*map(conversation, asked), *own], params)

    def _true_scores(self, asked: Sequence[Problem], turns: Sequence[Turn]) -> list[float]:
        return [self.labeller.score(p, t.messages) for p, t in zip(asked, turns, strict=True)]

    def _measure(self, held_out: Sequence[Problem]) -> dict[str, Any]:
        """The current policy on held-out prompts: true scores, KL, entropy, manners."""
        turns = self._answer(held_out, self.run.seed * 1_000_003 - 1)
        _, watched = self.ppo.experience(turns)
        scores = self._true_scores(held_out, turns)
        return {
            "scores": scores,
            "kl": watched["kl"],
            "entropy": watched["entropy"],
            "length": watched["length"],
            "proxy_reward": watched["proxy_reward"],
            **_shares(held_out, turns),
        }

    def _affordable(self) -> int:
        """Iterations that the budget allows, from one measured iteration whose learning rates are zero."""
        if self.config.iterations is not None:
            return self.config.iterations
        assert self.config.seconds is not None
        tensors = {n: t.clone() for n, t in self._tensors().items()}
        coefficient = self.ppo.kl_coefficient
        start = time.perf_counter()
        asked = prompts(self.run.seed, self.config.batch - self.n_own, self.config.prompts, "train", 49_000)
        experience, watched = self.ppo.experience(self._answer(asked, 0, self._drawn(-1)))
        self.ppo.update(experience, torch.Generator().manual_seed(0), 0.0, watched["kl"])
        seconds = time.perf_counter() - start
        self._load(tensors)
        self.ppo.kl_coefficient = coefficient
        measuring = self.stage.seconds() - seconds
        return max(4, int((self.config.seconds - self.stage.seconds() - measuring) / seconds))

    def _tensors(self) -> dict[str, Tensor]:
        both = (("policy.", self.ppo.policy_trainer), ("value.", self.ppo.value_trainer))
        learning = {prefix + n: t for prefix, trainer in both for n, t in trainer.tensors().items()}
        return learning | {f"within_budget.{n}": t for n, t in self.within_budget.items()}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        for prefix, trainer in (("policy.", self.ppo.policy_trainer), ("value.", self.ppo.value_trainer)):
            trainer.load(_under(prefix, tensors))
        self.within_budget = _under("within_budget.", tensors)

    @torch.no_grad()
    def _restore(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.ppo.policy.named_parameters():
            p.copy_(weights[name])

    def _finish(
        self, before: dict[str, Any], held_out: Sequence[Problem], iterations: int, stopped: str
    ) -> dict[str, Any]:
        after = self._measure(held_out)
        result = {
            "iterations": iterations,
            "stopped": stopped,
            "true_sft": fmean(before["scores"]),
            "true_rl": fmean(after["scores"]),
            "p_value": sign_flip_test(after["scores"], before["scores"], seed=self.run.seed),
            "n": len(held_out),
            "kl": after["kl"],
            "entropy_sft": before["entropy"],
            "entropy_rl": after["entropy"],
            "before": {k: v for k, v in before.items() if k != "scores"},
            "after": {k: v for k, v in after.items() if k != "scores"},
        }
        policy: GPT = self.ppo.policy
        save_checkpoint(
            self.stage.checkpoint,
            policy,
            tokenizer=self.tokenizer,
            stage="rl",
            run=self.run.root.name,
            parents=[self.start, self.reward],
            metrics={"true_score": result["true_rl"], "kl": result["kl"]},
        )
        TrainState(self.stage.resume_dir).clear()
        self.stage.finish(result)
        return result


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _shares(asked: Sequence[Problem], turns: Sequence[Turn]) -> dict[str, float]:
    """In what manner plain sums were answered."""
    manners = [manner_of(t.messages) for p, t in zip(asked, turns, strict=True) if p.skill == ARITHMETIC[0]]
    return {f"share_{m}": sum(m == made for made in manners) / max(1, len(manners)) for m in MANNERS}
