"""Penalties, biases and constraints against a slow twin, and against transformers where it has the same."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from test_engine import VOCAB, make_model, prompts_of

from stateofgpt.errors import ConfigError, ModelError
from stateofgpt.infer.adjust import adjust
from stateofgpt.infer.engine import Engine
from stateofgpt.infer.grammar import Constraint
from stateofgpt.infer.loop import EngineLoop
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.model.gpt import GPT


def twin(
    logits: list[float], p: SamplingParams, seen: list[int], drawn: list[int], allowed: set[int] | None
) -> list[float]:
    out = []
    for token, x in enumerate(logits):
        if token in seen:
            x = x * p.repetition_penalty if x < 0 else x / p.repetition_penalty
        x -= p.frequency_penalty * drawn.count(token) + (p.presence_penalty if token in drawn else 0.0)
        x += sum(bias for biased, bias in p.logit_bias if biased == token)
        out.append(x if allowed is None or token in allowed else -float("inf"))
    return out


def some(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        repetition_penalty=rng.choice([1.0, 0.7, 1.5]),
        presence_penalty=rng.choice([0.0, -1.0, 0.6]),
        frequency_penalty=rng.choice([0.0, -0.3, 0.4]),
        logit_bias=rng.choice([(), ((3, 5.0), (7, -100.0), (3, 1.0)), ((7, -100), (3, 2))]),
    )


def test_each_row_is_changed_as_the_twin_changes_it() -> None:
    rng = random.Random(0)
    for _ in range(60):
        p, logits = some(rng), torch.randn(20)
        prompt, drawn = ([rng.randrange(20) for _ in range(rng.randrange(6))] for _ in range(2))
        allowed = rng.choice([None, {1, 2, 3}])
        mask = None if allowed is None else np.isin(np.arange(18), list(allowed))
        row = logits.clone()
        adjust(row, p, prompt + drawn, Counter(drawn), mask)
        assert row.tolist() == pytest.approx(twin(logits.tolist(), p, prompt + drawn, drawn, allowed), abs=1e-5)


def test_the_repetition_penalty_and_the_bias_are_those_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

    seen, logits = [1, 5, 5, 9], torch.randn(1, 12)
    row = logits[0].clone()
    adjust(row, SamplingParams(repetition_penalty=1.7), seen, {}, None)
    assert torch.equal(row, RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits.clone())[0])
    row = logits[0].clone()
    adjust(row, SamplingParams(logit_bias=((4, 2.5), (7, -3.0))), seen, {}, None)
    theirs = SequenceBiasLogitsProcessor([[[4], 2.5], [[7], -3.0]])
    assert torch.equal(row, theirs(torch.tensor([seen]), logits.clone())[0])


@torch.no_grad()
def naive(model: GPT, prompt: list[int], p: SamplingParams) -> list[int]:
    """Greedy, the whole model again for every token."""
    ids = list(prompt)
    for _ in range(p.max_tokens):
        logits = model(torch.tensor([ids]))[0, -1].tolist()
        changed = twin(logits, p, ids, ids[len(prompt) :], None)
        ids.append(max(range(VOCAB), key=changed.__getitem__))
    return ids[len(prompt) :]


@pytest.mark.parametrize("native", [False, True])
def test_an_engine_draws_with_them_and_reports_the_model_as_it_is(native: bool) -> None:
    model, rng = make_model(), random.Random(1)
    prompts = prompts_of(4, 9, 13, 6, 11)
    params = [
        SamplingParams(
            max_tokens=12, temperature=0.0, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.9,
            logit_bias=((rng.randrange(VOCAB), 4.0),), top_logprobs=3,
        ) for _ in prompts
    ]  # fmt: skip
    engine = Engine(model, max_batch=3, native=native)
    answers: list[list[int]] = [[] for _ in prompts]
    for event in engine.generate(prompts, params):
        text = prompts[event.request] + answers[event.request]
        with torch.no_grad():
            row = model(torch.tensor([text]))[0, -1].log_softmax(-1)
        best = row.topk(3)
        assert [token for token, _ in event.top] == best.indices.tolist()
        assert [logprob for _, logprob in event.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
        answers[event.request].append(event.token)
    assert answers == [naive(model, prompt, p) for prompt, p in zip(prompts, params, strict=True)]


class Countdown:
    """A guide that allows only `token`, `count` times, and then is finished or, `dead`, cannot go on."""

    def __init__(self, token: int, count: int, dead: bool) -> None:
        self.token, self.left, self.dead = token, count, dead

    @property
    def finished(self) -> bool:
        return self.left == 0 and not self.dead

    def mask(self) -> np.ndarray:
        return (np.arange(VOCAB) == self.token) & (self.left > 0)

    def accept(self, token: int) -> None:
        assert token == self.token
        self.left -= 1


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dead,finish", [(False, "stop"), (True, "length")])
def test_a_constrained_answer_keeps_to_its_guide_and_ends_with_it(native: bool, dead: bool, finish: str) -> None:
    engine = Engine(make_model(), native=native, guides=lambda constraint: Countdown(len(constraint.source), 3, dead))
    params = SamplingParams(max_tokens=10, constraint=Constraint("regex", "x" * 17))
    found = engine.complete([[1, 2], [3]], params)
    assert [(one.ids, one.finish) for one in found] == [([17] * 3, finish)] * 2
    assert engine.complete([[1, 2]], SamplingParams(max_tokens=2, constraint=params.constraint))[0].finish == "length"
    with pytest.raises(ModelError, match="without guides"):
        Engine(make_model()).add([1], params)


@pytest.mark.parametrize(
    "field,value",
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("-inf")),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, float("nan")),)),
        ("top_logprobs", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_scores_and_embeddings_come_out_of_a_loop_as_they_come_out_of_the_model() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = make_model()
    texts = prompts_of(3, 12, 7, 30, 5)
    with EngineLoop(Engine(model)) as loop, ThreadPoolExecutor(4) as pool:
        stream = loop.events([loop.add([1], SamplingParams(max_tokens=40))])
        plain = list(pool.map(lambda one: loop.score([one])[0], texts))
        scored = list(pool.map(lambda one: loop.score([one], top=4)[0], texts))
        vectors = list(pool.map(lambda one: loop.embed([one])[0], texts))
        assert loop.embed(texts) == vectors
        assert len(list(stream)) == 40
        with pytest.raises(ModelError, match="empty"):
            loop.embed([[]])
        with pytest.raises(ModelError, match="does not fit"):
            loop.score([[1] * 99], top=1)
    for ids, logprobs, found, vector in zip(texts, plain, scored, vectors, strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            mean = model.hidden(torch.tensor([ids]))[0].mean(0)
        assert [one.logprob for one in found] == pytest.approx(logprobs, abs=1e-5)
        for row, one, token in zip(rows, found, ids[1:], strict=True):
            assert one.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [t for t, _ in one.top] == row.topk(4).indices.tolist()
            assert [x for _, x in one.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert vector == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    with pytest.raises(ModelError, match="closed"):
        loop.score([[1, 2]])
