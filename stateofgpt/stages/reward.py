"""Reward modelling: several completions of each prompt are ranked, and a model learns to predict the ranking.

Owns what is particular to the stage: sampling K completions from the SFT model, having the simulated labeller rank them
(or taking people's rankings from a file), and measuring the reward model beside the labeller's own noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev
from typing import Any

import numpy as np

from stateofgpt.assistant.session import Session
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.data.comparisons import Ranking, read_rankings, write_rankings
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.data.skills import Problem, Split, problem_from_json, problem_to_json
from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.errors import ConfigError, DataError
from stateofgpt.eval.health import health, length, order_agreement
from stateofgpt.eval.statistics import spearman
from stateofgpt.eval.suites import conversation
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import load_model, save_checkpoint
from stateofgpt.model.device import wait
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.labeller import DEFAULT_NOISE, SimulatedLabeller, noise_ceiling, pairs_of
from stateofgpt.rl.reward_training import (
    RankingLoss,
    RewardTraining,
    held_out_accuracy,
    ranked_batch,
    score_rankings,
    step_order,
)
from stateofgpt.run import Run, Stage
from stateofgpt.stages.parent import trained
from stateofgpt.stages.transcript import written
from stateofgpt.stages.way import way_of
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import Trainer, fit
from stateofgpt.train.loss import Way
from stateofgpt.train.schedule import warmup_stable_decay
from stateofgpt.train.state import TrainState

USUAL = 64  # rankings from whose scores the usual score is taken
CHUNK = 24  # prompts sampled at once; a chunk is the unit in which sampling resumes


@dataclass(frozen=True)
class Config:
    """Give `seconds` or `n_prompts`. With `rankings` (a file of people's votes) nothing is sampled or simulated."""

    seconds: float | None = None
    n_prompts: int | None = None
    held_out_prompts: int = 240
    completions: int = 4
    noise: float = DEFAULT_NOISE
    temperature: float = 0.8
    max_tokens: int = 150
    rankings: str | None = None
    lora: int | None = None  # the rank of adapters that are trained, and the head, in place of all weights
    prompts: PromptConfig = field(default_factory=PromptConfig)
    training: RewardTraining = field(default_factory=RewardTraining)

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.n_prompts is None):
            raise ConfigError("reward needs either seconds or n_prompts, and not both")
        if self.completions < 2:
            raise ConfigError(f"reward.completions is {self.completions}, a ranking needs at least 2")
        if self.lora is not None and self.lora < 1:
            raise ConfigError(f"reward.lora is {self.lora}, a rank is at least 1")


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train a reward model on the run's SFT model; returns the stage's result."""
    stage = run.stage("reward")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        return _RewardModelling(config, run, stage).work()


def learn(
    model: RewardModel,
    chat: ChatFormat,
    train: Sequence[Ranking],
    held_out: Sequence[Ranking],
    order: Sequence[Sequence[int]],
    stage: Stage,
    training: RewardTraining,
    way: Way,
) -> None:
    """Train `model` on the rankings in steps of `order`, resumably in the stage's folder, with looks at `held_out`."""
    context = model.config.max_position_embeddings
    loss = RankingLoss(way)
    looks = {round(x * len(order) / training.looks) for x in range(training.looks + 1)}

    def log(step: int, metrics: dict[str, float]) -> None:
        extra = {}
        if step in looks:
            right, pairs = held_out_accuracy(score_rankings(model, chat, held_out, way), held_out)
            extra = {"val_accuracy": right / max(1, pairs)}
        if metrics:
            metrics = {**metrics, "accuracy": loss.accuracy()}
        if metrics or extra:
            stage.log(step, **metrics, **extra)

    fit(
        Trainer(model, training.loop, way.kernels),
        lambda step: [ranked_batch(chat, [train[i] for i in order[step]], context, training.margin)],
        loss,
        steps=len(order),
        factor=lambda step: warmup_stable_decay(
            step, len(order), warmup=training.warmup, decay_share=training.decay_share
        ),
        state=TrainState(stage.resume_dir),
        on_resume=stage.truncate_metrics,
        callbacks=(log,),
    )


def usual_score(model: RewardModel, chat: ChatFormat, rankings: Sequence[Ranking], way: Way) -> dict[str, float]:
    """Mean and standard deviation of the scores of some completions: what reinforcement learning normalises by."""
    scores = [score for row in score_rankings(model, chat, rankings, way) for score in row]
    return {"mean": fmean(scores), "std": pstdev(scores) or 1.0}


class _RewardModelling:
    def __init__(self, config: Config, run: Run, stage: Stage) -> None:
        self.config, self.run, self.stage = config, run, stage
        self.sft = run.stage("sft").checkpoint
        self.tokenizer = Tokenizer.load(self.sft)
        self.chat = ChatFormat(self.tokenizer)
        self.labeller = SimulatedLabeller(run.seed, config.noise)
        self.way = way_of(run)

    def work(self) -> dict[str, Any]:
        train, held_out = self._rankings()
        model = self._fresh()
        order = step_order(len(train), self.run.seed, self.config.training.prompts_per_step)
        learn(model, self.chat, train, held_out, order, self.stage, self.config.training, self.way)
        return self._finish(model, train, held_out)

    def _fresh(self) -> RewardModel:
        start = load_model(self.sft).to(self.way.device)
        return trained(RewardModel(start, self.tokenizer.pad), self.config.lora, self.run.seed)

    # ---- rankings -------------------------------------------------------------------------------------------------

    def _rankings(self) -> tuple[list[Ranking], list[Ranking]]:
        if self.config.rankings is not None:
            own = read_comparisons(self.config.rankings).strict()
            if len(own) < 20:
                raise DataError(f"{self.config.rankings} holds {len(own)} rankings; at least 20 are needed")
            held_out = max(2, len(own) // 10)
            return self._kept(own[held_out:], own[:held_out])
        engine = Engine(load_model(self.sft).to(self.way.device), max_batch=96, native=self.way.native)
        session = Session(engine, self.chat, Toolbox())
        held_out_rankings = self._sampled(session, "heldout", self.config.held_out_prompts)
        n = self.stage.decide("prompts", lambda: {"n": self._affordable(session)})["n"]
        train = self._sampled(session, "train", n)
        return self._kept(train, held_out_rankings)

    def _kept(self, train: list[Ranking], held_out: list[Ranking]) -> tuple[list[Ranking], list[Ranking]]:
        """Both, after they have been written down: `sog improve` goes back to them."""
        write_rankings(self.stage.dir / "rankings.jsonl", train)
        write_rankings(self.stage.dir / "rankings_held_out.jsonl", held_out)
        return train, held_out

    def _affordable(self, session: Session) -> int:
        """How many prompts the budget allows: what one chunk takes to sample and to learn from, measured. Steps are
        counted as their median, for the first one of all warms up.

        Scoring is the forward third of learning; the held-out rankings are scored in every look and at the end."""
        if self.config.n_prompts is not None:
            return self.config.n_prompts
        assert self.config.seconds is not None
        start = time.perf_counter()
        chunk = self._chunk(session, "train", 0)
        sampling = time.perf_counter() - start
        model = self._fresh()
        context = model.config.max_position_embeddings
        per_step = self.config.training.prompts_per_step
        trainer = Trainer(model, self.config.training.loop, self.way.kernels)
        took = []
        for i in range(0, len(chunk), per_step):
            begun = time.perf_counter()
            trainer.step([ranked_batch(self.chat, chunk[i : i + per_step], context)], RankingLoss(self.way), 0.0)
            wait(self.way.device)
            took.append(time.perf_counter() - begun)
        learning = median(took) * len(took)
        seconds, scoring = sampling + learning, learning / 3 / CHUNK
        scored = self.config.held_out_prompts * (self.config.training.looks + 2) + USUAL
        left = self.config.seconds - self.stage.seconds() - scored * scoring - 3.0
        return max(2, 1 + int(left / seconds)) * CHUNK

    def _sampled(self, session: Session, split: Split, n: int) -> list[Ranking]:
        out: list[Ranking] = []
        for start in range(0, n, CHUNK):
            out += self._chunk(session, split, start)
        return out[:n]

    def _chunk(self, session: Session, split: Split, start: int) -> list[Ranking]:
        """Rankings of the prompts from `start`, from the stage's folder where they have been made before."""
        path = self.stage.dir / "sampled" / f"{split}_{start:06d}.jsonl"
        if not path.exists():
            asked = prompts(self.run.seed, CHUNK, self.config.prompts, split, start)
            path.parent.mkdir(exist_ok=True)
            write_rankings(path, self._rank(session, asked, split, start))
        return read_rankings(path)

    def _rank(self, session: Session, asked: Sequence[Problem], split: Split, start: int) -> list[Ranking]:
        k = self.config.completions
        seed = self.run.seed * 1_000_003 + start * 2 + (split == "heldout")
        params = SamplingParams(max_tokens=self.config.max_tokens, temperature=self.config.temperature, seed=seed)
        turns = session.converse([conversation(p) for p in asked for _ in range(k)], params)
        out = []
        for i, problem in enumerate(asked):
            completions = tuple(turn.messages for turn in turns[i * k : (i + 1) * k])
            ranks = self.labeller.rank(problem, completions, start + i + 1_000_000 * (split == "heldout"))
            out.append(Ranking(conversation(problem), completions, ranks, problem_to_json(problem)))
        return out

    # ---- results --------------------------------------------------------------------------------------------------

    def _finish(self, model: RewardModel, train: list[Ranking], held_out: list[Ranking]) -> dict[str, Any]:
        scores = score_rankings(model, self.chat, held_out, self.way)
        right, pairs = held_out_accuracy(scores, held_out)
        result: dict[str, Any] = {
            "n_prompts": len(train),
            "n_pairs": sum(len(r.pairs()) for r in train),
            "pair_accuracy": right / max(1, pairs),
            "n": pairs,
            **usual_score(model, self.chat, train[: min(USUAL, self.config.held_out_prompts)], self.way),
            "simulated": self.config.rankings is None,
        }
        if self.config.rankings is None:
            result |= self._beside_the_truth(scores, held_out)
        if pairs:
            result["health"] = health(scores, held_out, ceiling=result.get("ceiling"), seed=self.run.seed)
        save_checkpoint(
            self.stage.checkpoint,
            model,
            tokenizer=self.tokenizer,
            stage="reward",
            run=self.run.root.name,
            parents=[self.sft],
            metrics={"pair_accuracy": result["pair_accuracy"]},
        )
        TrainState(self.stage.resume_dir).clear()
        self.stage.finish(result)
        return result

    def _beside_the_truth(self, scores: list[list[float]], held_out: list[Ranking]) -> dict[str, Any]:
        truths, correlations, pairs = [], [], []
        examples: list[dict[str, Any]] = []
        for row, ranking in zip(scores, held_out, strict=True):
            problem = problem_from_json(ranking.problem or {})
            truth = [self.labeller.score(problem, c) for c in ranking.completions]
            truths.append(truth)
            pairs += pairs_of(truth, ranking.ranks)
            if len(set(truth)) > 1:
                correlations.append(spearman(row, truth))
            if len(examples) < 6 and len(set(truth)) > 2:
                examples.append(
                    {
                        "prompt": problem.question,
                        "completions": [
                            {"text": written(c), "score": s, "true_score": t, "rank": r}
                            for c, s, t, r in zip(ranking.completions, row, truth, ranking.ranks, strict=True)
                        ],
                    }
                )
        true = np.array(truths)
        lengths = np.array([[length(c) for c in ranking.completions] for ranking in held_out], np.float64)
        share, apart = order_agreement(np.array(scores), true)
        return {
            "apart": {"accuracy": share, "longer": order_agreement(lengths, true)[0], "n": apart},
            "ceiling": noise_ceiling(pairs),
            "rank_correlation": fmean(correlations) if correlations else 0.0,
            "examples": examples,
        }
