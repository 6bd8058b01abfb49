"""Improving: the thumbs of a run's users train the next reward model and the next policy, which meets the old one.

Owns one round: the folder beside the old run, what the new models start from, and the battles before and after. What is
learned from is `feedback_set.py`'s; how is the reward and the rl stages'.

    runs/laptop + its feedback.sqlite  ->  runs/laptop-improved-1 + its feedback.sqlite  ->  runs/laptop-improved-2
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from stateofgpt.assistant.session import Session
from stateofgpt.config import from_dict, to_dict
from stateofgpt.data.comparisons import Ranking
from stateofgpt.data.preferences import Comparison
from stateofgpt.data.prompts import prompts
from stateofgpt.errors import ConfigError, RunError
from stateofgpt.eval.suites import conversation
from stateofgpt.infer.engine import Engine
from stateofgpt.model.checkpoint import load_model, load_reward, read_lineage, save_checkpoint
from stateofgpt.model.device import wait
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.labeller import SimulatedLabeller
from stateofgpt.rl.reward_training import (
    RankingLoss,
    RewardTraining,
    held_out_accuracy,
    ranked_batch,
    score_rankings,
    step_order,
)
from stateofgpt.run import Run, write_json
from stateofgpt.stages import arena, compared, feedback_set, rl
from stateofgpt.stages.reward import learn, usual_score
from stateofgpt.stages.way import as_config, is_native, way_of
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.optim import OptimConfig
from stateofgpt.train.state import TrainState

RECIPE = "improve"
SUFFIX = re.compile(r"-improved-\d+$")
SHORTEST_S = 10.0
REWARD_SHARE, BATTLES_SHARE = 0.25, 0.1  # of the time, at most; the rest is the policy's
MEASURED_WHOLE_S = 300.0  # a shorter round asks fewer held-out prompts, in proportion, at least FEWEST_ASKED
FEWEST_ASKED = 24
LOOKED_AT = 16  # rankings that a look at the reward model in training takes: 100 of them took as long as 4 steps
T = TypeVar("T")


def _gentle() -> RewardTraining:
    """Half the learning rates of the first reward model: this one has something to lose."""
    return RewardTraining(warmup=2, loop=LoopConfig(optim=OptimConfig(lr=2.5e-4, muon_lr=0.002, weight_decay=0.0)))


@dataclass(frozen=True)
class Config:
    """One round. Without `minutes` it takes as long as the old run's reward and rl stages, or their fixed steps.

    Each new comparison is seen `epochs` times and beside it `replay` older rankings; `own_share` of the prompts of
    reinforcement learning are people's. `rl` and `arena` are by default what the old run was made with.
    """

    minutes: float | None = None
    fewest: int = 8
    epochs: int = 3
    replay: float = 1.0
    own_share: float = 0.25
    training: RewardTraining = field(default_factory=_gentle)
    rl: rl.Config | None = None
    arena: arena.Config | None = None

    def __post_init__(self) -> None:
        if self.fewest < 1 or self.epochs < 1 or self.replay < 0:
            raise ConfigError("improving needs fewest and epochs of at least 1, and a replay of at least 0")
        if not 0.0 <= self.own_share <= 0.9:
            raise ConfigError(f"improve.own_share is {self.own_share}, it must be between 0 and 0.9")


def improve(run_dir: Path, *, minutes: float | None, seed: int, config: Config | None = None) -> Path:
    """Train the next models on the feedback given to those of `run_dir`; returns the new run's folder.

    A round of the same feedback that was begun before is continued. FeedbackError when there is too little feedback.
    """
    config = config or Config()
    console = Console(highlight=False)
    old = Run.read(Path(run_dir) if Path(run_dir).name else Path(run_dir).resolve())
    policy, reward = _models(old)
    comparisons = feedback_set.gather(old, config.fewest)
    settled = replace(
        config,
        minutes=config.minutes if minutes is None else minutes,
        rl=config.rl or _inherited(rl.Config, old, "rl", rl.Config(seconds=60.0)),
        arena=config.arena or _inherited(arena.Config, old, "arena", arena.Config()),
    )
    asked = {
        **to_dict(settled),
        "parent": {"policy": read_lineage(policy).id, "reward": read_lineage(reward).id},
        "feedback": feedback_set.fingerprint(comparisons),
        "way": as_config(way_of(old)),
    }
    root = _folder(old.root, asked, seed)
    with Run.open(root, RECIPE, asked, seed) as run:
        _Round(settled, run, old, (policy, reward), comparisons, console).work()
    return root


def _models(old: Run) -> tuple[Path, Path]:
    """The old run's last policy and its reward model."""
    policy = next((s.checkpoint for s in (old.stage("rl"), old.stage("sft")) if s.done), None)
    if policy is None or not old.stage("reward").done:
        lacking = "assistant (sft)" if policy is None else "reward model (reward)"
        raise RunError(f"{old.root} has no finished {lacking} to improve; let the command that began it finish")
    return policy, old.stage("reward").checkpoint


def _inherited(kind: type[T], old: Run, key: str, otherwise: T) -> T:
    try:
        return from_dict(kind, old.config[key])
    except (KeyError, ConfigError):  # a run of another version of the program
        return otherwise


def _folder(old: Path, asked: dict[str, Any], seed: int) -> Path:
    """The folder of the round that was begun like this, else the next free one beside the old run."""
    stem = SUFFIX.sub("", old.name)
    number = 1
    while (root := old.with_name(f"{stem}-improved-{number}")).exists():
        if not any(not path.name.startswith(".") for path in root.iterdir()):
            break  # made and left before anything was written
        try:
            there = Run.read(root)
            if (there.recipe, there.seed, there.config) == (RECIPE, seed, asked):
                break
        except RunError:
            pass
        number += 1
    return root


class _Round:
    def __init__(
        self,
        config: Config,
        run: Run,
        old: Run,
        models: tuple[Path, Path],
        comparisons: Sequence[Comparison],
        console: Console,
    ) -> None:
        self.config, self.run, self.old, self.console = config, run, old, console
        self.policy, self.old_reward = models
        self.tokenizer = Tokenizer.load(self.policy)
        self.chat = ChatFormat(self.tokenizer)
        self.way = way_of(run)
        stage = run.stage("reward")
        self.counts = stage.decide("feedback", lambda: feedback_set.keep(stage, comparisons, old.stage("reward")))
        self.set = feedback_set.read(stage)
        self.seconds = stage.decide("budget", lambda: {"seconds": self._budget()})["seconds"]

    def work(self) -> None:
        counts = self.counts
        names = read_lineage(self.policy).name, f"{self.run.root.name}:rl"
        self._say("improve", f"{names[0]} -> {names[1]} in {self.run.root}, from {feedback_set.told(counts)}")
        reward = self._reward()
        self._say("reward", f"{reward['n_prompts']} rankings in {reward['steps']} steps")
        policy = self._policy(reward)
        told = f"KL {policy['kl']:.1f} nats from the old policy", policy["stopped"], policy.get("given_up")
        self._say("rl", ", ".join(filter(None, told)))
        battles = self._battles()
        result = compared.measured(len(self.set.held_out), reward, policy, battles)
        result |= {"models": {"before": names[0], "after": names[1]}, **counts}
        seconds = {stage.name: round(stage.seconds(), 2) for stage in self.run.stages()}
        about = {"recipe": RECIPE, "seed": self.run.seed, "minutes_asked": self.config.minutes}
        stored = compared.summary(seconds, reward, policy, battles)
        write_json(self.run.summary_path, {**about, **stored, "improve": result})
        root = self.run.root
        end = f"chat      sog chat {root}:rl\npage      sog serve {root}:rl\ntree      sog runs {root.parent}"
        self.console.print(f"\n{compared.table(result)}\n\n{end}", markup=False, soft_wrap=True)

    # ---- the time -------------------------------------------------------------------------------------------------

    def _budget(self) -> float | None:
        """Seconds for the round; None where the old run had fixed steps and no minutes are asked for."""
        assert self.config.rl is not None
        if self.config.minutes is not None:
            return self.config.minutes * 60.0
        if self.config.rl.iterations is not None:
            return None
        return max(SHORTEST_S, self.old.stage("reward").seconds() + self.old.stage("rl").seconds())

    def _shortened(self, n: int) -> int:
        """How many of `n` held-out prompts there is time for."""
        share = 1.0 if self.seconds is None else min(1.0, self.seconds / MEASURED_WHOLE_S)
        return min(n, max(FEWEST_ASKED, round(n * share)))

    # ---- the reward model -----------------------------------------------------------------------------------------

    def _reward(self) -> dict[str, Any]:
        stage, training = self.run.stage("reward"), self.config.training
        with stage.timed():
            if (done := stage.result()) is not None:
                return done
            model = load_reward(self.old_reward).to(self.way.device)
            before = stage.decide("before", lambda: self._accuracies(model))
            train = self.set.mixed(self.run.seed, self.config.epochs, self.config.replay)
            order = step_order(len(train), self.run.seed, training.prompts_per_step)
            steps = stage.decide("steps", lambda: {"n": self._affordable(train, order)})["n"]
            watched = (self.set.held_out or self.set.replay_held_out or self.set.train)[:LOOKED_AT]
            learn(model, self.chat, train, watched, order[:steps], stage, training, self.way)
            after = self._accuracies(model)
            right, n = after["replay_held_out" if self.set.replay_held_out else "comparisons"]
            result = {
                "n_prompts": sum(map(len, order[:steps])),
                "n_pairs": sum(len(train[i].pairs()) for step in order[:steps] for i in step),
                "steps": steps,
                "pair_accuracy": right / max(1, n),
                "n": n,
                **usual_score(model, self.chat, [*train[:32], *train[-32:]], self.way),
                "simulated": False,
                "before": before,
                "after": after,
            }
            save_checkpoint(
                stage.checkpoint,
                model,
                tokenizer=self.tokenizer,
                stage="reward",
                run=self.run.root.name,
                parents=[self.old_reward],
                metrics={"pair_accuracy": result["pair_accuracy"]},
            )
            TrainState(stage.resume_dir).clear()
            stage.finish(result)
            return result

    def _accuracies(self, model: RewardModel) -> dict[str, list[int]]:
        """[pairs right, pairs] on people's comparisons (held out where some are) and on the old held-out rankings."""
        measured = {"comparisons": self.set.held_out or self.set.train, "replay_held_out": self.set.replay_held_out}
        return {
            name: list(held_out_accuracy(score_rankings(model, self.chat, rankings, self.way), rankings))
            for name, rankings in measured.items()
        }

    def _affordable(self, train: Sequence[Ranking], order: Sequence[Sequence[int]]) -> int:
        """All steps, or as many as the reward model's share of the time allows, by a measured one."""
        if self.seconds is None:
            return len(order)
        model = load_reward(self.old_reward).to(self.way.device)
        trainer = Trainer(model, self.config.training.loop, self.way.kernels)
        context = model.config.max_position_embeddings
        took = []
        for step in (order[0], order[-1]):
            start = time.perf_counter()
            trainer.step([ranked_batch(self.chat, [train[i] for i in step], context)], RankingLoss(self.way), 0.0)
            wait(self.way.device)
            took.append(time.perf_counter() - start)
        return min(len(order), max(4, int(self.seconds * REWARD_SHARE / min(took))))

    # ---- the policy -----------------------------------------------------------------------------------------------

    def _policy(self, reward: dict[str, Any]) -> dict[str, Any]:
        stage = self.run.stage("rl")
        config = self.config.rl
        assert config is not None
        with stage.timed():
            if (done := stage.result()) is not None:
                return done
            if (total := self.seconds) is not None:
                spent = self.run.stage("reward").seconds()
                left = stage.decide("budget", lambda: {"seconds": max(5.0, total * (1 - BATTLES_SHARE) - spent)})
                n = self._shortened(config.held_out_prompts)
                config = replace(config, iterations=None, seconds=left["seconds"], held_out_prompts=n)
            config = replace(config, ppo=replace(config.ppo, pretraining=None))  # a round has no texts of its own
            own = self._askable([*self.set.train, *self.set.earlier])
            return rl.PolicyTraining(
                config,
                self.run,
                stage,
                self.policy,
                self.run.stage("reward").checkpoint,
                self.way,
                reward["mean"],
                reward["std"],
                own,
                self.config.own_share,
                self.set.mixed(self.run.seed, 1, self.config.replay),
                self.set.held_out,
            ).work()

    def _askable(self, rankings: Sequence[Ranking]) -> list[Conversation]:
        """The prompts that fit the context with room for an answer; long ones lose their oldest exchanges."""
        engine = Engine(load_model(self.policy))
        session = Session(engine, self.chat)
        fitted = [session.fit(prompt) for prompt in feedback_set.prompts_of(rankings)]
        most = engine.max_context * 3 // 4
        return [p for p in fitted if len(self.chat.render(p, add_generation_prompt=True).ids) <= most]

    # ---- before and after -----------------------------------------------------------------------------------------

    def _battles(self) -> dict[str, Any]:
        """The old policy against the new one, on skills and on people's own prompts, each with its judge."""
        stage, config, seed = self.run.stage("arena"), self.config.arena, self.run.seed
        assert config is not None
        with stage.timed():
            if (done := stage.result()) is not None:
                return done
            asked = prompts(seed, self._shortened(config.prompts), config.mixture, "heldout", 20_000)
            own = self._askable(self.set.held_out or self.set.train)
            answers: dict[str, list[Conversation]] = {}
            for name, folder in (("before", self.policy), ("after", self.run.stage("rl").checkpoint)):
                both = [*map(conversation, asked), *own]
                answers[name] = arena.answers_of(
                    load_model(folder).to(self.way.device), self.tokenizer, both, config, seed, is_native(self.run)
                )
            n = len(asked)
            result = arena.hold(asked, {m: a[:n] for m, a in answers.items()}, SimulatedLabeller(seed), seed)
            result["judge"] = "the simulated labeller, without noise"
            result["own"] = self._own_battles(own, {m: a[n:] for m, a in answers.items()})
            stage.finish(result)
            return result

    def _own_battles(self, own: Sequence[Conversation], answers: dict[str, list[Conversation]]) -> dict[str, Any]:
        rows = [Ranking(p, (b, a), (1, 2)) for p, b, a in zip(own, answers["before"], answers["after"], strict=True)]
        judge = load_reward(self.run.stage("reward").checkpoint).to(self.way.device)
        scores = score_rankings(judge, self.chat, rows, self.way)

        def prefer(i: int, a: Conversation, b: Conversation) -> float:
            before, after = scores[i]
            points = 0.5 if a == b or before == after else float(before > after)
            return points if a == answers["before"][i] else 1.0 - points

        texts = [prompt[-1].content for prompt in own]
        about = {"judge": "the new reward model", "held_out": bool(self.set.held_out)}
        return {**about, **(arena.battle(texts, answers, prefer, self.run.seed) if own else {"battles": 0})}

    # ---- telling --------------------------------------------------------------------------------------------------

    def _say(self, what: str, text: str) -> None:
        self.console.print(f"[bold]{what:9}[/bold]", end=" ")
        self.console.print(text, markup=False)
