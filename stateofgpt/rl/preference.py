"""Preference optimisation: a policy learns from ranked answers without a reward model and without sampling.

Owns pairs of a chosen and a rejected answer as tokens, and the updates of DPO, IPO and KTO on them. An iteration still
looks at a few answers of the policy, so that its KL is guarded and its score is seen as with every other algorithm.
Knows no files, and nothing of who ranked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stateofgpt.data.comparisons import Ranking
from stateofgpt.errors import ConfigError, DataError
from stateofgpt.model.gpt import GPT
from stateofgpt.model.lora import switched_off
from stateofgpt.rl.offline import answer_logprobs, dpo_loss, ipo_loss, kto_loss, margins, mismatched_divergence
from stateofgpt.rl.optimization import AT_ONCE, Experience, Optimization, Seen, Told, UpdateConfig
from stateofgpt.rl.rollout import Rollouts, in_parts, laid_out, sampled_logprobs
from stateofgpt.rl.scoring import Scorer
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.train.loss import Way

OfflineAlgorithm = Literal["dpo", "ipo", "kto"]


@dataclass(frozen=True)
class OfflineConfig:
    """`beta` holds the policy near its reference: the larger, the nearer. `pairs` are learned from in one iteration.
    The weights are KTO's, of liked and of disliked answers."""

    beta: float = 0.1
    pairs: int = 64
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0.0 or self.pairs < 1:
            raise ConfigError(
                f"offline.beta is {self.beta} and offline.pairs {self.pairs}; beta must be above 0 and pairs at least 1"
            )
        if not min(self.desirable_weight, self.undesirable_weight) >= 0.0:
            raise ConfigError("offline.desirable_weight and offline.undesirable_weight must be at least 0")


@dataclass(frozen=True)
class Answer:
    """An answer as ids, and which of them the assistant wrote (what a tool said is not learned from)."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One prompt with two answers."""

    prompt: tuple[int, ...]
    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class PairBatch:
    """`answers` holds n chosen answers, then n rejected ones, then answers to other prompts (KTO's)."""

    answers: Rollouts
    reference: Tensor  # [rows], log-probabilities of whole answers
    n: int

    @property
    def weight(self) -> float:
        return float(self.n)


def pairs_of(rankings: Iterable[Ranking], chat: ChatFormat) -> list[Pair]:
    """Every pair that a ranking orders, as tokens. DataError where there is none."""
    out = []
    for ranking in rankings:
        prompt = tuple(chat.render(ranking.prompt, add_generation_prompt=True).ids)
        answers = [_answer(chat, ranking.prompt, completion, prompt) for completion in ranking.completions]
        out += [Pair(prompt, answers[better], answers[worse]) for better, worse in ranking.pairs()]
    if not out:
        raise DataError("no ranking prefers one answer to another, so there is nothing to learn from them")
    return out


def _answer(chat: ChatFormat, prompt: Conversation, completion: Conversation, begins: tuple[int, ...]) -> Answer:
    whole = chat.render((*prompt, *completion))
    if tuple(whole.ids[: len(begins)]) != begins:
        raise DataError("this model's chat template changes a prompt once it is answered; use an online algorithm")
    ids, mask = whole.ids[len(begins) :], whole.loss_mask[len(begins) :]
    while mask and not mask[-1]:  # what follows the end of the turn
        ids, mask = ids[:-1], mask[:-1]
    return Answer(tuple(ids), tuple(mask))


class PreferenceOptimization(Optimization):
    """Policy and reference, with pairs to learn from; scores are only looked at."""

    told = ("policy_loss", "pair_accuracy")

    def __init__(
        self,
        algorithm: OfflineAlgorithm,
        policy: GPT,
        reference: GPT,
        scorer: Scorer,
        config: UpdateConfig,
        own: OfflineConfig,
        pairs: Sequence[Pair],
        *,
        pad_id: int,
        way: Way,
    ) -> None:
        super().__init__(policy, reference, scorer, config, pad_id=pad_id, way=way)
        self.algorithm, self.own, self.pairs = algorithm, own, pairs
        self.apart = algorithm == "kto"  # answers to other prompts go through the model apart, without gradients

    def _experience(self, seen: Seen) -> Experience:
        return Experience(seen.there, seen.logprobs, seen.reference, torch.zeros(len(seen.scores), 1))

    def update(self, experience: Experience, order: torch.Generator, factor: float, kl: float) -> dict[str, float]:
        """One pass over pairs drawn with `order`, in minibatches; the answers that were looked at are not used."""
        told = Told(self.told)
        drawn = torch.randperm(len(self.pairs), generator=order)[: self.own.pairs]
        parts = drawn.chunk(self.config.minibatches)
        for index in parts:
            batch = self._batch([self.pairs[i] for i in index.tolist()])

            def loss(model: GPT, batch: PairBatch) -> Tensor:
                return self._loss(model, batch, told) * batch.weight

            told.add("policy_loss", self.trainers["policy"].step([batch], loss, factor)["loss"])
        self._adapt(kl)
        return told.means(len(parts))

    @torch.no_grad()
    def _batch(self, pairs: Sequence[Pair]) -> PairBatch:
        rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        if self.algorithm == "kto":
            rows += mismatched(pairs)
        context = self.policy.config.max_position_embeddings
        texts = [((*prompt, *answer.ids), (*[0] * len(prompt), *answer.mask)) for prompt, answer in rows]
        answers = laid_out(texts, self.pad_id, context, self.together).to(self.device)
        with switched_off(self.reference):  # where it is the policy without its adapters
            (reference,) = in_parts(lambda part: (sampled_logprobs(self.reference, part, self.way),), answers, AT_ONCE)
        return PairBatch(answers, self._of_answers(reference, answers.mask), len(pairs))

    def _of_answers(self, logprobs: Tensor, mask: Tensor) -> Tensor:
        return answer_logprobs(logprobs, mask, per_token=self.algorithm == "ipo")

    def _loss(self, model: GPT, batch: PairBatch, told: Told) -> Tensor:
        n, beta, rows = batch.n, self.own.beta, torch.arange(len(batch.reference))
        policy = self._of_rows(model, batch, rows[: 2 * n] if self.apart else rows)
        margin = margins(policy[:n], policy[n : 2 * n], batch.reference[:n], batch.reference[n : 2 * n])
        told.add("pair_accuracy", (margin > 0).float().mean().detach())
        if self.algorithm == "kto":
            others = policy[2 * n :]
            if self.apart:
                with torch.no_grad():
                    others = self._of_rows(model, batch, rows[2 * n :])
            z = mismatched_divergence(others, batch.reference[2 * n :])
            liked = torch.arange(2 * n, device=margin.device) < n
            weights = self.own.desirable_weight, self.own.undesirable_weight
            return kto_loss(policy[: 2 * n], batch.reference[: 2 * n], liked, z, beta, *weights).mean()
        return (dpo_loss if self.algorithm == "dpo" else ipo_loss)(margin, beta).mean()

    def _of_rows(self, model: GPT, batch: PairBatch, index: Tensor) -> Tensor:
        """Log-probabilities of some of the answers."""
        if not len(index):
            return torch.zeros(0, device=batch.reference.device)
        answers = batch.answers if len(index) == len(batch.reference) else batch.answers.rows(index)
        return self._of_answers(self._new_logprobs(model, answers), answers.mask)

    def numbers(self) -> dict[str, float]:
        return super().numbers() | ({"apart": 1.0} if self.apart else {})

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """A run whose state knows nothing of `apart` goes on as it began, to the same bits."""
        super().load(tensors, numbers)
        self.apart = "apart" in numbers

    def _policy_loss(self, model: GPT, batch: Experience, told: Told) -> Tensor:
        raise NotImplementedError("pairs are learned from, and not answers")  # `update` is its own


def mismatched(pairs: Sequence[Pair]) -> list[tuple[tuple[int, ...], Answer]]:
    """Each prompt with the chosen answer of the next pair that has another prompt; nothing where all are the same."""
    out = []
    for i, pair in enumerate(pairs):
        others = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
        other = next((p for p in others if p.prompt != pair.prompt), None)
        if other is not None:
            out.append((pair.prompt, other.chosen))
    return out
