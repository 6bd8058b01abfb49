"""Reinforcement learning on people's prompts, with nothing but a model and a reward model to begin from.

Owns what is different where no right answer is known: what is asked and held out, that a usual score is that of the
model's own answers, and a judge whom the policy never learns from, if one is given. The loop, the algorithms and the
guards are `stages/rl.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from stateofgpt.assistant.session import Session, Turn
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.config import from_dict
from stateofgpt.data.comparisons import Ranking
from stateofgpt.data.questions import Questions, read_questions
from stateofgpt.data.skills import Problem
from stateofgpt.errors import ConfigError, DataError, RunError
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.infer.forward import load as native
from stateofgpt.model.checkpoint import load_model, load_reward, read_lineage
from stateofgpt.model.device import CPU, choose_device
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.rl.reward_training import score_ids
from stateofgpt.rl.scoring import LearnedScorer
from stateofgpt.run import Run, Stage, sha256_file
from stateofgpt.stages import rl
from stateofgpt.stages.algorithms import OFFLINE
from stateofgpt.stages.judge import Judged
from stateofgpt.stages.place import begin_on
from stateofgpt.stages.transcript import written
from stateofgpt.stages.watch import FIRST, Watch
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.dial import can_fuse
from stateofgpt.train.loss import Way

FEWEST = 20  # prompts
USUAL = 64  # answers from whose scores the usual score is taken
NOBODY = "nobody: no judge was given"


@dataclass(frozen=True)
class Config:
    """`prompts` is the file, `model` the folder begun from, `reward` the reward model's, and `judge` that of another
    one, which has other votes behind it. Prompts that leave no room in `context` tokens for an answer are not asked.
    `device`: None is a GPU where there is one."""

    prompts: str
    model: str
    reward: str
    judge: str | None = None
    context: int = 512
    device: str | None = None
    rl: rl.Config = field(default_factory=lambda: rl.Config(iterations=50))
    stages: tuple[str, ...] = ("rl",)  # what a run of this kind has, for the report

    def __post_init__(self) -> None:
        if self.rl.chosen in OFFLINE:
            raise ConfigError(f"{self.rl.chosen} learns from rankings and asks no prompts; choose another algorithm")
        if self.rl.reward == "verified":
            raise ConfigError("people's prompts have no right answer that is known; leave --rl.reward verified out")
        if self.rl.tasks is not None or self.rl.ppo.pretraining is not None:
            raise ConfigError(
                "--rl.tasks and --rl.ppo.pretraining are for a run's own stage, not for a file of prompts"
            )

    def check(self) -> None:
        """Raise ConfigError where settings do not go together, or the machine lacks the device."""
        if self.context <= self.rl.max_tokens:
            raise ConfigError(f"--context {self.context} leaves no room for --rl.max_tokens {self.rl.max_tokens}")
        choose_device(self.device)


def run(config: Config, run: Run, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train a policy; returns the stage's result."""
    stage = run.stage("rl")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        _check_inputs(config, stage)
        way = _way(config, stage)
        start = Path(config.model)
        chat = ChatFormat(Tokenizer.load(start))
        for folder in (config.reward, config.judge):
            if folder is not None:
                _check_vocabulary(start, Path(folder))
        found = read_questions(config.prompts)
        most = _room(config, load_model(start).config.max_position_embeddings)
        fitting = [p for p in found if len(chat.render(p, add_generation_prompt=True).ids) <= most]
        told = f"{len(found):,} different prompts, {len(fitting):,} of at most {most} tokens"
        tell(f"{config.prompts}: {told}; on {way.device}")
        if len(fitting) < FEWEST:
            raise DataError(
                f"{len(fitting)} prompts of {config.prompts} leave room for an answer, and at least {FEWEST} are "
                "needed; add some, raise --context, or lower --rl.max_tokens"
            )
        asked = Questions(fitting, run.seed)
        usual = stage.decide("usual", lambda: _usual(config, run.seed, asked, chat, way))
        return _Prompted(config, run, stage, way, asked, usual).work()


def _room(config: Config, context: int) -> int:
    """Tokens that a prompt may have beside its answer, in a model of `context` tokens."""
    if context <= config.rl.max_tokens:
        raise ConfigError(
            f"{config.model} reads {context} tokens at once, which leaves no room for a prompt beside --rl.max_tokens "
            f"{config.rl.max_tokens}; lower that"
        )
    return min(config.context, context) - config.rl.max_tokens


def _check_inputs(config: Config, stage: Stage) -> None:
    here = {"prompts": sha256_file(Path(config.prompts)), "model": read_lineage(config.model).id}
    here |= {name: read_lineage(f).id for name in ("reward", "judge") if (f := getattr(config, name)) is not None}
    if here.get("judge") == here["reward"]:
        raise ConfigError("--judge is the reward model itself; a judge is one that the policy never learns from")
    if (known := stage.decide("inputs", lambda: here)) != here:
        other = next(name for name in here | known if here.get(name) != known.get(name))
        raise RunError(f"the {other} given is not what this run began with; put that back, or choose another --out")


def _check_vocabulary(start: Path, reward: Path) -> None:
    if (a := Tokenizer.load(start)).vocab_size != (b := Tokenizer.load(reward)).vocab_size:
        raise ConfigError(
            f"{start} has {a.vocab_size:,} tokens and {reward} {b.vocab_size:,}: a reward model reads a policy's "
            "tokens, so both must come from one model"
        )


def _way(config: Config, stage: Stage) -> Way:
    device = begin_on(stage, config.device, begun=False)

    def chosen() -> dict[str, Any]:
        if device != CPU:
            return asdict(Way("bfloat16", device=device))
        return asdict(Way("float32", can_fuse(), native() is not None))

    return from_dict(Way, stage.decide("way", chosen))


def _usual(config: Config, seed: int, asked: Questions, chat: ChatFormat, way: Way) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of the reward model's, and the judge's, scores of the model's own answers."""
    model = load_model(config.model).to(way.device)
    engine = Engine(model, max_batch=USUAL, max_context=config.context, native=way.native)
    session = Session(engine, chat, Toolbox())
    prompts = [asked.conversation(p) for p in asked.problems(USUAL, "train", 0)]
    params = SamplingParams(config.rl.max_tokens, temperature=config.rl.temperature, seed=seed * 1_000_003 - 3)
    rows = [[*turn.prompt_ids, *turn.ids] for turn in session.converse(prompts, params)]
    del engine, session, model
    found = {}
    for name, folder in (("reward", config.reward), ("judge", config.judge)):
        if folder is not None:
            reward = load_reward(folder).to(way.device)
            context, part = reward.config.max_position_embeddings, config.rl.ppo.part_tokens
            scores = score_ids(reward, [row[-context:] for row in rows], chat.tokenizer.pad, tokens=part, way=way)
            found[name] = {"mean": fmean(scores), "std": pstdev(scores) or 1.0}
    return found


class _Prompted(rl.PolicyTraining):
    """Policy optimisation on `asked`; the scores that are told are the judge's, or the reward model's without one."""

    names = ("score_before", "score_after", "score")

    def __init__(
        self, config: Config, run: Run, stage: Stage, way: Way, asked: Questions, usual: dict[str, dict[str, float]]
    ) -> None:
        self.asked, self.whole, self.usual, self.context = asked, config, usual, config.context
        start, reward, of_reward = Path(config.model), Path(config.reward), usual["reward"]
        super().__init__(config.rl, run, stage, start, reward, way, of_reward["mean"], of_reward["std"], tasks=asked)

    def _watch(self, apart: Sequence[Ranking] | None) -> Watch:
        config = self.config.guards or GuardConfig()
        self.judged = self._judge()
        problems = self.asked.problems(config.prompts, "heldout", FIRST) if config.every else []
        return Watch(config, self.stage, self.optimization, self._looked_at, problems, self.judged, self._rewards)

    def _judge(self) -> Judged:
        if (folder := self.whole.judge) is None:
            return Judged(NOBODY, None)
        scorer = LearnedScorer(
            load_reward(folder).to(self.way.device),
            mean=self.usual["judge"]["mean"],
            std=self.usual["judge"]["std"],
            pad_id=self.tokenizer.pad,
            end_id=self.chat.end,
            no_end_score=self.config.ppo.no_end_score,
            part_tokens=self.config.ppo.part_tokens,
            way=self.way,
        )

        def judge(problems: Sequence[Problem], turns: Sequence[Turn]) -> list[float]:
            return [float(score) for score in scorer(turns)]

        return Judged(f"{read_lineage(folder).name}, which the policy never learns from", judge)

    def _rewards(self, asked: Sequence[Problem], turns: Sequence[Turn]) -> list[float]:
        return [float(score) for score in self.optimization.scores(turns)]

    def _conversation(self, problem: Problem) -> Conversation:
        return self.asked.conversation(problem)

    def _note(self, step: int, asked: Sequence[Problem], turns: Sequence[Turn], watched: dict[str, float]) -> None:
        self.stage.log(step, **watched)
        for problem, turn in list(zip(asked, turns, strict=True))[: rl.SHOWN]:
            self.stage.sample(step, prompt=problem.question, text=written(turn.messages))

    def _measure(self, held_out: Sequence[Problem]) -> dict[str, Any]:
        turns = self._answer(held_out, self.run.seed * 1_000_003 - 1)
        seen = self.optimization.look(turns, held_out, exact=True)
        told = {name: seen.watched[name] for name in ("kl", "entropy", "length", "proxy_reward")}
        scores = self.judged.judge(held_out, turns) if self.judged.judge else [float(s) for s in seen.scores]
        return {"scores": scores, **told}
