"""Watching a policy in training: looks at held-out prompts, the best policy so far, and the word to stop.

Owns what a look asks, what is logged of it, and the weights that remain when a run is stopped. The rule is
`rl/guards.py`'s, the judge `stages/judge.py`'s; how a policy is trained is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stateofgpt.assistant.session import Turn
from stateofgpt.data.comparisons import Ranking
from stateofgpt.data.skills import Problem
from stateofgpt.data.tasks import SkillTasks, Tasks
from stateofgpt.model.gpt import GPT
from stateofgpt.rl.guards import GuardConfig, Look, Watcher
from stateofgpt.rl.optimization import Optimization
from stateofgpt.run import Run, Stage, write_json
from stateofgpt.stages.judge import LABELLER, TASKS, Judge, Judged, second_judge
from stateofgpt.stages.learners import kept, learned
from stateofgpt.text.chat import ChatFormat
from stateofgpt.train.loss import Way

FIRST = 12_000  # the index of the first held-out prompt of a look; those before and after training begin at 10,000
PREFIX = "best."
STOPPED = "stopped"  # beside the checkpoint: the policy that a guard gave up
LOOKS = "looks.json"
SMALL_BATCH = 1.3  # an answer of a small batch takes this much longer than one of a large one


class Watch:
    """The looks of one training. `answer` asks the present policy; `problems` are what every look asks."""

    def __init__(
        self,
        config: GuardConfig,
        stage: Stage,
        optimization: Optimization,
        answer: Callable[[Sequence[Problem]], list[Turn]],
        problems: Sequence[Problem],
        judged: Judged,
        scores: Judge,
    ) -> None:
        if judged.judge is None:  # what is told is the labeller's score, and no judgement
            config = replace(config, fall=None)
        self.config, self.stage, self.optimization, self.answer = config, stage, optimization, answer
        self.problems, self.name = problems, judged.name
        self.judge = judged.judge or scores
        self.watcher = Watcher(config)
        self.best = kept(self.policy) if config.every else {}
        begun = bool(stage.decided("before"))  # before there was a look at the end: it goes on without one
        self.closes: bool = stage.decide("closes", lambda: {"closes": not begun})["closes"] if config.every else False

    @property
    def policy(self) -> GPT:
        return self.optimization.policy

    def begin(self) -> None:
        """The look at the policy before training, unless it has been taken."""
        if self.config.every and not self.watcher.looks:
            self._see(0)

    def after(self, step: int) -> str:
        """Called after every iteration; why to stop, or nothing."""
        return self._see(step) if self.config.every and step % self.config.every == 0 else ""

    def close(self, step: int) -> str:
        """Called at the end of a training of `step` iterations, which no guard stopped: looks at the policy unless that
        was done; why it is given up for the best, or nothing."""
        if not self.closes:
            return ""
        why = self._see(step) if self.watcher.looks[-1].step != step else ""
        return why or self.watcher.close()

    def affordable(self, seconds: float, iteration: float, per_answer: float) -> int:
        """How many iterations of `iteration` seconds fit into `seconds` with their looks, the first and the last among
        them, where an answer and its scores take `per_answer` seconds."""
        every, look = self.config.every, SMALL_BATCH * per_answer * len(self.problems)
        if not every:
            return int(seconds / iteration)
        n = max(0, int(seconds / (iteration + look / every)))
        while n and n * iteration + (1 + -(-n // every)) * look > seconds:
            n -= 1
        return n

    # ---- state ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {PREFIX + name: tensor for name, tensor in learned(self.policy, self.best).items()} if self.best else {}

    def numbers(self) -> dict[str, Any]:
        return {"looks": [look.as_json() for look in self.watcher.looks]}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over what both gave."""
        self.watcher = Watcher.resumed(self.config, numbers.get("looks", []))
        saved = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        if saved:
            self.best = kept(self.policy) | saved

    def told(self) -> dict[str, Any]:
        """What the stage's result says of the looks; every look with its answers' scores goes to `looks.json`."""
        looks = self.watcher.looks
        if not looks or self.watcher.best is None:
            return {"looks": 0}
        asked = [problem.question for problem in self.problems]
        write_json(self.stage.dir / LOOKS, {"prompts": asked, "looks": [look.as_json() for look in looks]})
        best, last = self.watcher.best, looks[-1]
        return {
            "judge": self.name,
            "looks": len(looks),
            "prompts": len(asked),
            "best_step": best.step,
            "won_best": self.watcher.won(best),
            "won_last": self.watcher.won(last),
            "score_first": looks[0].score,
            "score_best": best.score,
            "score_last": last.score,
            "reward_first": looks[0].reward,
            "reward_best": best.reward,
            "reward_last": last.reward,
        }

    # ---- looking --------------------------------------------------------------------------------------------------

    def _see(self, step: int) -> str:
        turns = self.answer(self.problems)
        seen = self.optimization.look(turns, self.problems, exact=True)
        found = seen.watched
        look = Look(
            step,
            found["kl"],
            found["entropy"],
            found["length"],
            tuple(self.judge(self.problems, turns)),
            tuple(float(score) for score in seen.scores),
        )
        why = self.watcher.see(look)
        if self.watcher.best is look:
            self.best = kept(self.policy)
        self.stage.log(
            step,
            held_out_score=look.score,
            held_out_reward=look.reward,
            held_out_won=self.watcher.won(look),
            held_out_kl=look.kl,
            held_out_entropy=look.entropy,
            held_out_length=look.length,
        )
        return why


def watch_of(
    config: GuardConfig,
    run: Run,
    stage: Stage,
    start: Path,
    optimization: Optimization,
    tasks: Tasks,
    chat: ChatFormat,
    way: Way,
    answer: Callable[[Sequence[Problem]], list[Turn]],
    scores: Judge,
    apart: Sequence[Ranking] | None,
) -> Watch:
    """The looks at the policy of `optimization` from the model in `start`: judged by the true `scores`, or where
    `apart` is given by a reward model that learns from those rankings."""
    if apart is not None and config.every:
        judged = second_judge(run, start, apart, chat, way)
    else:
        judged = Judged(LABELLER if isinstance(tasks, SkillTasks) else TASKS, scores)
    problems = tasks.problems(config.prompts, "heldout", FIRST) if config.every else []
    return Watch(config, stage, optimization, answer, problems, judged, scores)


@torch.no_grad()
def restore(policy: GPT, weights: Mapping[str, Tensor]) -> None:
    """Give a policy the weights that were kept of it."""
    for name, p in policy.named_parameters():
        p.copy_(weights[name])
