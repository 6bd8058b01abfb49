"""Reward model training: what it reads, how it is batched, and that it learns what it is told."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from stateofgpt.data.comparisons import Ranking
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.objective import pair_accuracy
from stateofgpt.rl.packed import conversation_ids, pad, sizes_of
from stateofgpt.rl.reward_training import (
    RankedBatch,
    RankingLoss,
    held_out_accuracy,
    ranked_batch,
    score_ids,
    score_rankings,
    step_order,
)
from stateofgpt.text.chat import ChatFormat, Message
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig

TOKENIZER = Tokenizer.train(iter(["What is 12 + 30? The answer is 42. user assistant tool yes no maybe"] * 20), 300)
CHAT = ChatFormat(TOKENIZER)
CONTEXT = 44  # no multiple of 16


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small_model(seed: int = 0) -> RewardModel:
    gpt = GPT(GPTConfig(
        vocab_size=320, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=12, intermediate_size=32, max_position_embeddings=CONTEXT,
    ))  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.2, generator=g)
    return RewardModel(gpt, TOKENIZER.pad)


def ranking(question: str, answers: Sequence[str], ranks: Sequence[int]) -> Ranking:
    return Ranking((Message("user", question),), tuple((Message("assistant", text),) for text in answers), tuple(ranks))


def some_rankings(n: int = 6) -> list[Ranking]:
    rng = random.Random(3)
    out = []
    for i in range(n):
        k = rng.randint(2, 4)
        answers = [" ".join(rng.choices(["yes", "no", "maybe", "42"], k=rng.randint(1, 6))) for _ in range(k)]
        out.append(ranking(f"{i} + 1?", answers, [rng.randint(1, 3) for _ in range(k)]))
    return [*out, ranking("all the same?", ["yes", "no", "42"], [2, 2, 2])]


def test_what_is_read_ends_with_the_end_of_the_last_turn() -> None:
    prompt, completion = (Message("user", "What is 12 + 30?"),), (Message("assistant", "42"),)
    ids = conversation_ids(CHAT, prompt, completion, 1000)
    whole = CHAT.render((*prompt, *completion)).ids
    assert ids == whole[: len(ids)] and ids[-1] == TOKENIZER.im_end and TOKENIZER.im_end not in whole[len(ids) :]
    # the same ids a rollout has: the prompt as it is sampled from, the answer, its end
    asked = CHAT.render(prompt, add_generation_prompt=True).ids
    assert ids == [*asked, *TOKENIZER.encode("42"), TOKENIZER.im_end]
    assert conversation_ids(CHAT, prompt, completion, 7) == ids[-7:]


def test_padding_stands_on_the_right_and_never_exceeds_the_context() -> None:
    made = pad([[5, 6, 7], [8]], 3)
    assert made.shape == (2, 16) and made[0].tolist() == [5, 6, 7] + [3] * 13 and made[1].tolist() == [8] + [3] * 15
    assert pad([[5] * 16], 3).shape == (1, 16) and pad([[5] * 17], 3).shape == (1, 32)
    assert pad([[5] * 40], 3, limit=44).shape == (1, 44) and pad([[5] * 4], 3, limit=44).shape == (1, 16)
    assert pad([[5] * 50], 3, limit=44).shape == (1, 50)


def test_rows_as_long_as_an_odd_context_are_scored_and_learned_from() -> None:
    model = small_model()
    long = ranking("word " * 60, ["yes " * 8, "no " * 30], [1, 2])
    batch = ranked_batch(CHAT, [long], CONTEXT)
    assert batch.packed.branches.longest == CONTEXT < batch.packed.ids.shape[1]
    assert RankingLoss(Way())(model, batch).isfinite()
    assert all(math.isfinite(s) for row in score_rankings(model, CHAT, [long]) for s in row)


def test_a_batch_has_each_prompt_s_completions_side_by_side() -> None:
    rankings = [ranking("a?", ["yes", "no"], [2, 1]), ranking("b?", ["42", "maybe", "no no"], [1, 2, 2])]
    batch = ranked_batch(CHAT, rankings, CONTEXT)
    assert batch.ranks.tolist() == [[2, 1, 0], [1, 2, 2]]  # 0: there is no third completion
    width = batch.packed.ids.shape[1]
    for i, r in enumerate(rankings):
        for k, completion in enumerate(r.completions):
            ids = conversation_ids(CHAT, r.prompt, completion, CONTEXT)
            begin, end = batch.packed.spans[i][k]
            assert batch.packed.ids[i, begin:end].tolist() == ids[begin - end :]
            assert batch.ends[i, k] == i * width + end - 1
    assert batch.ends[0, 2] == batch.ends[0, 1]  # what has no rank is read twice


def loss_twin(model: RewardModel, rankings: Sequence[Ranking]) -> tuple[float, int]:
    """(summed loss, prompts with a pair), one completion at a time and one pair at a time."""
    total, n = 0.0, 0
    for r in rankings:
        scores = [model(torch.tensor([conversation_ids(CHAT, r.prompt, c, CONTEXT)])).item() for c in r.completions]
        pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if r.ranks[i] < r.ranks[j]]
        if pairs:
            total += sum(math.log1p(math.exp(scores[j] - scores[i])) for i, j in pairs) / len(pairs)
            n += 1
    return total, n


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_is_that_of_the_pairs_one_by_one(fused: bool) -> None:
    model, rankings = small_model(), some_rankings()
    total, n = loss_twin(model, rankings)
    batch = ranked_batch(CHAT, rankings, CONTEXT)
    assert batch.weight == n < len(rankings)  # some rank all alike
    assert RankingLoss(Way(fused=fused))(model, batch).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 1, 5, 6, 7)])
def test_the_mean_is_over_prompts_whatever_the_micro_batches(cuts: tuple[int, ...]) -> None:
    rankings = some_rankings()
    total, n = loss_twin(small_model(), rankings)
    trainer = Trainer(small_model(), LoopConfig(clip=1e9))
    parts = [ranked_batch(CHAT, rankings[a:b], CONTEXT) for a, b in pairwise(cuts)]
    assert trainer.step(parts, RankingLoss(Way()), 1.0)["loss"] == pytest.approx(total / n, rel=1e-4)


def test_rankings_without_a_pair_teach_nothing() -> None:
    trainer = Trainer(small_model(), LoopConfig())
    batch = ranked_batch(CHAT, [some_rankings()[-1]], CONTEXT)
    assert batch.weight == 0.0
    loss = RankingLoss(Way())
    metrics = trainer.step([batch], loss, 1.0)
    assert metrics["loss"] == metrics["grad_norm"] == 0.0
    assert loss.accuracy() == 0.0


def test_scores_come_in_the_order_asked_whatever_is_batched_together() -> None:
    model = small_model()
    rng = random.Random(0)
    rows = [[rng.randrange(6, 300) for _ in range(rng.randint(1, CONTEXT))] for _ in range(11)]
    alone = [model(torch.tensor([row])).item() for row in rows]
    for at_once in (1, 3, 64):
        assert score_ids(model, rows, TOKENIZER.pad, at_once) == pytest.approx(alone, abs=1e-4)
    for tokens in (1, 50, 10**6):
        assert score_ids(model, rows, TOKENIZER.pad, tokens=tokens) == pytest.approx(alone, abs=1e-4)
    assert score_ids(model, [], TOKENIZER.pad) == []


@pytest.mark.parametrize("way", [Way(), Way(fused=True), Way("bfloat16", fused=True)])
def test_texts_that_begin_with_the_same_prompt_score_as_alone(way: Way) -> None:
    """Also where a row is cut so short that nothing of its prompt is left; in float32 whatever the way trains in."""
    model = small_model()
    rng = random.Random(0)
    begins = [[rng.randrange(6, 300) for _ in range(n)] for n in (20, 3, 0)]
    rows = [[*rng.choice(begins), *(rng.randrange(6, 300) for _ in range(rng.randint(1, 24)))] for _ in range(30)]
    prompts = [max((len(b) for b in begins if row[: len(b)] == b), default=0) for row in rows]
    alone = [model(torch.tensor([row])).item() for row in rows]
    for tokens in (None, 1, 50, 10**6):
        found = score_ids(model, rows, TOKENIZER.pad, 7, tokens=tokens, prompts=prompts, way=way)
        assert found == pytest.approx(alone, abs=1e-4)


def test_a_part_holds_no_more_tokens_than_asked_unless_one_row_does() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lengths = sorted((rng.randint(1, 90) for _ in range(rng.randint(0, 40))), reverse=rng.random() < 0.5)
        tokens = rng.randint(1, 400)
        sizes, at = sizes_of(lengths, tokens), 0
        assert sum(sizes) == len(lengths)
        for size in sizes:
            part = lengths[at : at + size]
            assert size == 1 or size * max(part) <= tokens
            more = lengths[at : at + size + 1]
            assert len(more) == size or len(more) * max(more) > tokens  # none could have been larger
            at += size


def test_held_out_accuracy_is_that_of_training() -> None:
    model, rankings = small_model(), some_rankings()
    scores = score_rankings(model, CHAT, rankings)
    assert [len(row) for row in scores] == [len(r.ranks) for r in rankings]
    counted = [pair_accuracy(torch.tensor([row]), torch.tensor([r.ranks]))
               for row, r in zip(scores, rankings, strict=True)]  # fmt: skip
    assert held_out_accuracy(scores, rankings) == tuple(map(sum, zip(*counted, strict=True)))
    loss = RankingLoss(Way())
    loss(model, ranked_batch(CHAT, rankings, CONTEXT))
    right, pairs = held_out_accuracy(scores, rankings)
    assert loss.accuracy() == pytest.approx(right / pairs)
    assert loss.accuracy() == 0.0  # asked: begins anew


@pytest.mark.parametrize(("n", "per_step"), [(24, 8), (29, 8), (5, 8), (8, 1)])
def test_an_epoch_takes_each_ranking_at_most_once_in_whole_steps(n: int, per_step: int) -> None:
    order = step_order(n, 3, per_step)
    flat = [i for step in order for i in step]
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(n))
    assert len(order) == max(1, n // per_step)
    assert all(len(step) == min(n, per_step) for step in order)
    assert order == step_order(n, 3, per_step)
    assert n < 20 or order != step_order(n, 4, per_step)


def test_it_learns_to_rank() -> None:
    rng = random.Random(1)
    good, bad, middle = "42", "no no no", "maybe"

    def asked(i: int) -> Ranking:
        order = rng.sample([(good, 1), (middle, 2), (bad, 3)], 3)
        return ranking(f"{i}?", [text for text, _ in order], [rank for _, rank in order])

    train, held_out = [asked(i) for i in range(48)], [asked(100 + i) for i in range(8)]
    model = small_model()
    config = LoopConfig(optim=replace(OptimConfig(), lr=3e-3, muon_lr=0.01, weight_decay=0.0))
    trainer, loss = Trainer(model, config), RankingLoss(Way())
    for step in step_order(len(train), 0, 4):
        trainer.step([ranked_batch(CHAT, [train[i] for i in step], CONTEXT)], loss, 1.0)
    right, pairs = held_out_accuracy(score_rankings(model, CHAT, held_out), held_out)
    assert pairs == 24 and right >= 22


def test_bfloat16_is_near() -> None:
    model, batch = small_model(), ranked_batch(CHAT, some_rankings(), CONTEXT)
    whole = RankingLoss(Way())(model, batch).item()
    assert RankingLoss(Way("bfloat16"))(model, batch).item() == pytest.approx(whole, rel=0.05)
    assert isinstance(batch, RankedBatch)
