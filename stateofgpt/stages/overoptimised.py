"""What the samples and looks of an over-optimisation experiment say: curves, fits, peaks, and what a guard would do.

Owns the answers of a pool and how they become numbers. Knows nothing of how they were sampled or of any folder.

Units: true and proxy rewards are in standard deviations of one sample of the model it began with, and zero is that
model's mean on the same prompt, so that prompts which are easy or hard for it add no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stateofgpt.assistant.session import Turn
from stateofgpt.data.skills import Problem
from stateofgpt.eval.health import order_agreement
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.guards import GuardConfig, Look, Watcher
from stateofgpt.rl.labeller import SimulatedLabeller
from stateofgpt.rl.overoptimisation import Fit, Floats, Form, answers_kl, best_of_n, best_of_n_kl, fit
from stateofgpt.rl.reward_training import score_ids
from stateofgpt.rl.scoring import ended

NORMAL = 1.96  # half a 95 % interval of a mean, in standard errors


@dataclass(frozen=True)
class Prompted:
    """Many samples of one prompt: the different answers as ids of the whole conversation, whether each ended its turn,
    its true score, and which of them each sample was."""

    question: str
    ids: list[list[int]]
    ended: list[bool]
    true: list[float]
    samples: list[int]

    @classmethod
    def of(cls, problem: Problem, turns: Sequence[Turn], labeller: SimulatedLabeller, end_id: int) -> Prompted:
        """The answers in `turns` to one problem."""
        place: dict[tuple[int, ...], int] = {}
        first: list[Turn] = []
        samples = []
        for turn in turns:
            key = tuple(turn.ids)
            if key not in place:
                place[key] = len(first)
                first.append(turn)
            samples.append(place[key])
        return cls(
            problem.question,
            [[*t.prompt_ids, *t.ids] for t in first],
            [ended(t, end_id) for t in first],
            [labeller.score(problem, t.messages) for t in first],
            samples,
        )


class Pool:
    """All prompts with as many samples each."""

    def __init__(self, prompts: Sequence[Prompted], n: int) -> None:
        self.prompts = list(prompts)
        self.true = self.spread([prompt.true for prompt in self.prompts])  # [prompts, n]
        assert self.true.shape == (len(self.prompts), n)

    def spread(self, of_answers: Sequence[Sequence[float]]) -> Floats:
        """[prompts, n] from one number for each different answer."""
        rows = zip(of_answers, self.prompts, strict=True)
        return np.array([[row[i] for i in prompt.samples] for row, prompt in rows], dtype=np.float64)

    def rewards(self, model: RewardModel, mean: float, std: float, pad_id: int, no_end: float) -> list[list[float]]:
        """A reward model's normalised score of every different answer; `no_end` for one that did not end its turn."""
        context = model.config.max_position_embeddings
        flat = [ids[-context:] for prompt in self.prompts for ids in prompt.ids]
        scores = iter(score_ids(model, flat, pad_id))
        return [
            [(score - mean) / std if end else no_end for end, score in zip(prompt.ended, scores, strict=False)]
            for prompt in self.prompts
        ]


@dataclass(frozen=True)
class Trained:
    """A reward model with what was measured against it: `rewards` of every different answer of the pool, and the
    `looks` of the policy that climbed it."""

    name: str
    about: dict[str, Any]
    rewards: list[list[float]]
    looks: list[dict[str, Any]]


def told(pool: Pool, trained: Sequence[Trained], ns: Sequence[int], seed: int) -> dict[str, Any]:
    """Everything that `overoptimise.json` says of the results."""
    return {
        "true": {"mean": float(pool.true.mean()), "std": _spread(pool.true)},
        "proxies": [_of_proxy(pool, one, ns, seed) for one in trained],
    }


def _of_proxy(pool: Pool, one: Trained, ns: Sequence[int], seed: int) -> dict[str, Any]:
    proxy = pool.spread(one.rewards)
    keys = ("share", "repeat", "rankings", "steps")
    chosen, chosen_fit = _best_of_n(pool, proxy, ns, seed)
    learned, learned_fit = _rl(pool, proxy, one.looks, seed)
    return {
        "name": one.name,
        **{key: one.about[key] for key in keys if key in one.about},
        "accuracy": order_agreement(proxy, pool.true)[0],
        "best_of_n": chosen,
        "rl": learned,
        "fits": {"best_of_n": chosen_fit, "rl": learned_fit},
        "guard": guarded(one.looks),
    }


def _best_of_n(pool: Pool, proxy: Floats, ns: Sequence[int], seed: int) -> tuple[list[dict[str, Any]], Any]:
    distances = [math.sqrt(best_of_n_kl(n)) for n in ns]
    points, columns = [], []
    for n, d in zip(ns, distances, strict=True):
        true = np.array([best_of_n(q, g, n) - g.mean() for q, g in zip(proxy, pool.true, strict=True)])
        climbed = np.array([best_of_n(q, q, n) - q.mean() for q in proxy])
        columns.append(true / _spread(pool.true))
        kl = float(np.mean([answers_kl(list(q), n) for q in proxy]))
        point = {"n": n, "kl": best_of_n_kl(n), "kl_of_answers": kl, "d": d}
        points.append(point | _means(columns[-1], climbed / _spread(proxy)))
    return points, _fitted("best_of_n", distances, np.stack(columns, 1), seed)


def _rl(pool: Pool, proxy: Floats, looks: Sequence[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], Any]:
    points, columns, distances = [], [], []
    for look in looks:
        d = math.sqrt(max(0.0, look["kl"]))
        true = (np.asarray(look["scores"]) - pool.true.mean(1)) / _spread(pool.true)
        climbed = (np.asarray(look["rewards"]) - proxy.mean(1)) / _spread(proxy)
        columns.append(true)
        distances.append(d)
        about = {key: look[key] for key in ("step", "kl", "entropy", "length")}
        points.append({**about, "d": d, **_means(true, climbed)})
    return points, _fitted("rl", distances, np.stack(columns, 1), seed)


def _means(true: Floats, proxy: Floats) -> dict[str, float]:
    error = float(true.std(ddof=1)) / math.sqrt(len(true)) if len(true) > 1 else 0.0
    return {"true": float(true.mean()), "true_error": NORMAL * error, "proxy": float(proxy.mean())}


def _fitted(form: Form, distances: Sequence[float], rewards: Floats, seed: int) -> dict[str, Any] | None:
    """The fit as JSON, or nothing where there are too few points away from the start."""
    try:
        found: Fit = fit(form, distances, rewards, seed=seed)
    except ValueError:
        return None
    return asdict(found)


def _spread(values: Floats) -> float:
    return float(values.std()) or 1.0


def guarded(looks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the guards of an ordinary run would have done with these looks: when it would have stopped and what kept."""
    watcher = Watcher(GuardConfig(every=1))
    for look in looks:
        why = watcher.see(Look.from_json(look))
        if why and watcher.best is not None:
            return {"stopped_at": look["step"], "kept": watcher.best.step, "why": why}
    return {"stopped_at": None, "kept": None, "why": ""}
