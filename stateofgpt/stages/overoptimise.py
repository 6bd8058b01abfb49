"""Over-optimisation, measured: best-of-n and PPO against reward models of several amounts of labels, and the truth.

Owns what is sampled, trained and stored, and `overoptimise.json`; estimators and fits are `rl/overoptimisation.py`'s.
The experiment is that of Gao et al. (arXiv 2210.10760) with one change: their gold reward is a larger reward model,
ours the simulated labeller's score without noise. It is the truth that the labels are noisy readings of, not another
model with faults of its own, and it costs nothing, so that every one of thousands of samples can be judged. It is a
program's taste, which docs/overoptimise.md says.

Everything is kept as it is made, so a killed experiment goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stateofgpt.assistant.session import Session
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.data.comparisons import Ranking, read_rankings, write_rankings
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.data.skills import problem_to_json
from stateofgpt.errors import ConfigError, RunError
from stateofgpt.eval.suites import conversation
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import load_model, load_reward, read_lineage
from stateofgpt.model.device import CPU, choose_device
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.rl.labeller import DEFAULT_NOISE, SimulatedLabeller
from stateofgpt.rl.optimization import UpdateConfig
from stateofgpt.rl.overoptimisation import best_of_n_kl
from stateofgpt.rl.reward_training import RewardTraining
from stateofgpt.run import Run, Stage, read_json, write_json
from stateofgpt.stages import rl
from stateofgpt.stages.overoptimised import Pool, Prompted, Trained, told
from stateofgpt.stages.proxies import LEAST_STEPS, of_a_share
from stateofgpt.stages.watch import FIRST, LOOKS
from stateofgpt.stages.way import way_of
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.dial import can_fuse
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig

RESULT = "overoptimise.json"
LABELS, POOL = "labels", "pool"
CHUNK = 24  # prompts sampled at once; a chunk is the unit in which sampling resumes
HELD_OUT = 16  # rankings at which reward models are looked at as they learn
LABELLING, POOLING = 0.12, 0.25  # shares of the seconds, at most
FEWEST_RANKED, FEWEST_PROMPTS = 120, 16


def _hasty() -> UpdateConfig:
    """PPO with next to no penalty and a somewhat higher rate. At twice the rate it leapt from 3 to 10 nats between two
    looks, and the fall was over before it was seen."""
    policy, value = (
        LoopConfig(optim=OptimConfig(lr=lr, eps=1e-5, weight_decay=0.0, use_muon=False)) for lr in (2.25e-4, 4.5e-4)
    )
    return UpdateConfig(kl_coefficient=0.002, policy=policy, value=value)


def _far() -> rl.Config:
    return rl.Config(iterations=80, max_kl=100.0, held_out_prompts=24, ppo=_hasty())


@dataclass(frozen=True)
class Config:
    """With `seconds` the numbers of rankings and held-out prompts are at most those given, and each policy is trained
    as long as the time allows; without, for `rl.iterations`. `shares` of the rankings are what the reward models learn,
    each amount `repeats` times from rankings drawn anew. `samples` answers to each of `prompts` held-out prompts are
    what best-of-n chooses from; every `every` iterations each policy is measured on the same prompts."""

    seconds: float | None = 1200.0
    rankings: int = 1600
    completions: int = 4
    noise: float = DEFAULT_NOISE
    shares: tuple[float, ...] = (0.01, 0.1, 1.0)
    repeats: int = 1
    least_steps: int = LEAST_STEPS
    prompts: int = 96
    samples: int = 128
    ns: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    every: int = 2
    temperature: float = 1.0
    max_tokens: int = 150
    mixture: PromptConfig = field(default_factory=PromptConfig)
    training: RewardTraining = field(default_factory=RewardTraining)
    rl: rl.Config = field(default_factory=_far)

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"overoptimise.shares is {self.shares}; each must be above 0 and at most 1")
        if not self.ns or min(self.ns) < 1 or max(self.ns) > self.samples:
            raise ConfigError(
                f"overoptimise.ns goes up to {max(self.ns, default=0)} and there are {self.samples} samples; give "
                "numbers from 1 up to the number of samples"
            )
        if self.repeats < 1 or self.every < 1 or self.completions < 2 or self.prompts < 2:
            raise ConfigError("overoptimise needs repeats and every from 1, and completions and prompts from 2")


def run(config: Config, run: Run, start: Path) -> dict[str, Any]:
    """The experiment on the model in `start`; writes `overoptimise.json` and returns what it holds."""
    lineage = read_lineage(start)
    known = run.inside(LABELS).decide("start", lambda: {"id": lineage.id, "name": lineage.name})
    if known["id"] != lineage.id:
        raise RunError(
            f"{start} holds another model than the one this experiment began with ({known['name']}); put that one "
            "back, or choose another --out"
        )
    if (run.root / RESULT).exists():
        done: dict[str, Any] = read_json(run.root / RESULT)
        return done
    result = _Experiment(config, run, start).work()
    write_json(run.root / RESULT, {**result, "start": known})
    return {**result, "start": known}


class _Experiment:
    def __init__(self, config: Config, run: Run, start: Path) -> None:
        self.config, self.run, self.start = config, run, start
        self.tokenizer = Tokenizer.load(start)
        self.chat = ChatFormat(self.tokenizer)
        self.labeller = SimulatedLabeller(run.seed, config.noise)
        self.labels = run.inside(LABELS)
        self.way = Way(**self.labels.decide("way", self._way))
        engine = Engine(load_model(start).to(self.way.device), max_batch=128, native=self.way.native)
        self.session = Session(engine, self.chat, Toolbox())

    def _way(self) -> dict[str, Any]:
        """How the model's own run trained, else in bfloat16 on a GPU, or in float32 through the kernels where they can
        be had."""
        try:
            return asdict(way_of(Run.read(self.start.resolve().parent.parent)))
        except (RunError, KeyError):
            device = choose_device()
            return asdict(Way("float32", can_fuse()) if device == CPU else Way("bfloat16", device=device))

    def work(self) -> dict[str, Any]:
        with self.labels.timed():
            plan = self.labels.decide("plan", self._plan)
            rankings = self._rankings(plan["rankings"])
        stage = self.run.inside(POOL)
        with stage.timed():
            pool = Pool(self._pool(stage, plan["prompts"]), self.config.samples)
        proxies = [
            self._proxy(share, repeat, rankings)
            for share in self.config.shares
            for repeat in range(self.config.repeats)
        ]
        rewards = {name: self._scores(stage, name, pool) for name in proxies}
        looks = {name: self._policy(name, len(proxies), plan["prompts"]) for name in proxies}
        about = {
            "format": 1,
            "unit": "standard deviations of the true score of one sample",
            "seed": self.run.seed,
            "prompts": plan["prompts"],
            "samples": self.config.samples,
            "kl_best_of_n": {str(n): best_of_n_kl(n) for n in self.config.ns},
        }
        trained = [
            Trained(name, self.run.inside(f"proxies/{name}").result() or {}, rewards[name], looks[name])
            for name in proxies
        ]
        return about | told(pool, trained, self.config.ns, self.run.seed)

    def _plan(self) -> dict[str, Any]:
        """How many rankings and held-out prompts there is time for, from one chunk that is kept."""
        config = self.config
        if config.seconds is None:
            return {"rankings": config.rankings, "prompts": config.prompts}
        began = time.perf_counter()
        self._chunk(0)
        an_answer = (time.perf_counter() - began) / (CHUNK * config.completions)
        ranked = int(LABELLING * config.seconds / an_answer / config.completions)
        asked = int(POOLING * config.seconds / an_answer / config.samples)
        return {
            "rankings": min(config.rankings, max(FEWEST_RANKED, ranked)),
            "prompts": min(config.prompts, max(FEWEST_PROMPTS, asked)),
        }

    # ---- labels ---------------------------------------------------------------------------------------------------

    def _rankings(self, n: int) -> list[Ranking]:
        """`n` rankings to learn from and HELD_OUT more."""
        return [ranking for at in range(0, n + HELD_OUT, CHUNK) for ranking in self._chunk(at)][: n + HELD_OUT]

    def _chunk(self, at: int) -> list[Ranking]:
        path = self.labels.dir / f"rankings_{at:06d}.jsonl"
        if not path.exists():
            config, seed = self.config, self.run.seed
            asked = prompts(seed, CHUNK, config.mixture, "train", at)
            k = config.completions
            params = SamplingParams(config.max_tokens, temperature=config.temperature, seed=seed * 1_000_003 + 2 * at)
            turns = self.session.converse([conversation(p) for p in asked for _ in range(k)], params)
            rows = []
            for i, problem in enumerate(asked):
                completions = tuple(turn.messages for turn in turns[i * k : (i + 1) * k])
                ranks = self.labeller.rank(problem, completions, at + i)
                rows.append(Ranking(conversation(problem), completions, ranks, problem_to_json(problem)))
            write_rankings(path, rows)
        return read_rankings(path)

    # ---- reward models --------------------------------------------------------------------------------------------

    def _proxy(self, share: float, repeat: int, rankings: Sequence[Ranking]) -> str:
        """Train a reward model on a share of the rankings; its name."""
        name = f"{100 * share:g}" + (f"-{repeat + 1}" if self.config.repeats > 1 else "")
        of_a_share(
            self.run,
            self.run.inside(f"proxies/{name}"),
            self.start,
            rankings[HELD_OUT:],
            rankings[:HELD_OUT],
            share,
            chat=self.chat,
            way=self.way,
            repeat=repeat,
            training=self.config.training,
            least_steps=self.config.least_steps,
        )
        return name

    # ---- best-of-n ------------------------------------------------------------------------------------------------

    def _pool(self, stage: Stage, n: int) -> list[Prompted]:
        """`samples` answers to each held-out prompt with their true scores, as many prompts at once as fill a batch."""
        asked = prompts(self.run.seed, n, self.config.mixture, "heldout", FIRST)
        at_once = max(1, 512 // self.config.samples)
        made: list[Prompted] = []
        for at in range(0, n, at_once):
            path = stage.dir / f"answers_{at:06d}.json"
            if not path.exists():
                some, k = asked[at : at + at_once], self.config.samples
                seed = self.run.seed * 1_000_003 + 500_000 + at
                params = SamplingParams(self.config.max_tokens, temperature=self.config.temperature, seed=seed)
                turns = self.session.converse([conversation(p) for p in some for _ in range(k)], params)
                rows = [
                    Prompted.of(problem, turns[i * k : (i + 1) * k], self.labeller, self.chat.end)
                    for i, problem in enumerate(some)
                ]
                write_json(path, [asdict(row) for row in rows])
            made += [Prompted(**row) for row in read_json(path)]
        return made

    def _scores(self, stage: Stage, name: str, pool: Pool) -> list[list[float]]:
        """The reward model's normalised scores of all answers in the pool, prompt by prompt."""
        path = stage.dir / f"rewards_{name}.json"
        if not path.exists():
            proxy = self.run.inside(f"proxies/{name}")
            usual, model = proxy.result() or {}, load_reward(proxy.checkpoint).to(self.way.device)
            with stage.timed():
                rewards = pool.rewards(
                    model, usual["mean"], usual["std"], self.tokenizer.pad, self.config.rl.ppo.no_end_score
                )
            write_json(path, rewards)
        scores: list[list[float]] = read_json(path)
        return scores

    # ---- PPO ------------------------------------------------------------------------------------------------------

    def _policy(self, name: str, n: int, asked: int) -> list[dict[str, Any]]:
        """Train a policy against a reward model, only watched by the guards; its looks."""
        stage, proxy = self.run.inside(f"ppo/{name}"), self.run.inside(f"proxies/{name}")
        usual = proxy.result() or {}
        with stage.timed():
            if not stage.done:
                seconds = stage.decide("budget", lambda: {"seconds": self._left(n)})["seconds"]
                config = replace(self.config.rl, prompts=self.config.mixture, max_tokens=self.config.max_tokens)
                if seconds is not None:
                    config = replace(config, seconds=seconds, iterations=None)
                config = replace(config, guards=GuardConfig(every=self.config.every, prompts=asked, stop=False))
                rl.PolicyTraining(
                    config, self.run, stage, self.start, proxy.checkpoint, self.way, usual["mean"], usual["std"]
                ).work()
        looks: list[dict[str, Any]] = read_json(stage.dir / LOOKS)["looks"]
        return looks

    def _left(self, n: int) -> float | None:
        """Seconds for one of the policies that are not trained yet."""
        if self.config.seconds is None:
            return None
        done = list(self.run.root.glob("ppo/*/result.json"))
        spent = sum(
            float(read_json(path)["seconds"])
            for path in self.run.root.glob("*/**/seconds.json")
            if "models" not in path.relative_to(self.run.root).parts
        )
        return max(20.0, (self.config.seconds - spent) / max(1, n - len(done)))
