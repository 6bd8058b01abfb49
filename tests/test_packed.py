"""Packed prompts, frozen features and the trained upper blocks, each against the whole conversations one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from stateofgpt.data.comparisons import Ranking
from stateofgpt.model.gpt import GPT, Arch, GPTConfig
from stateofgpt.model.heads import RewardModel
from stateofgpt.model.lora import LoraConfig
from stateofgpt.rl.features import compute, depths_of
from stateofgpt.rl.linear import judged
from stateofgpt.rl.packed import batch, by_length, conversation_ids, pack
from stateofgpt.rl.upper import Cached, Upper, VoteLoss, scored
from stateofgpt.text.chat import ChatFormat, Message
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig

TOKENIZER = Tokenizer.train(iter(["What is 12 + 30? The answer is 42. user assistant tool yes no maybe"] * 20), 300)
CHAT = ChatFormat(TOKENIZER)
CONTEXT = 96


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(arch: Arch = "qwen3", layers: int = 4) -> GPT:
    kv = 2 if arch == "gpt2" else 1
    model = GPT(GPTConfig(
        arch=arch, vocab_size=320, hidden_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=kv, head_dim=12, intermediate_size=32, max_position_embeddings=CONTEXT,
    ))  # fmt: skip
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.2, generator=g)
    return model.requires_grad_(False)


def some(n: int = 7) -> list[Ranking]:
    rng = random.Random(5)
    out = []
    for i in range(n):
        k = rng.randint(2, 4)
        answers = [" ".join(rng.choices(["yes", "no", "maybe", "42"], k=rng.randint(1, 7))) + str(j) for j in range(k)]
        prompt = (Message("user", f"What is {i} + {rng.randint(0, 99)}?"),)
        ranks = tuple(rng.randint(1, 3) for _ in range(k))
        out.append(Ranking(prompt, tuple((Message("assistant", a),) for a in answers), ranks))
    return out


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_a_packed_prompt_gives_the_hidden_states_of_the_whole_conversations(arch: Arch) -> None:
    model, rankings = small(arch), some()
    rows = [pack(CHAT, r, CONTEXT) for r in rankings]
    depths = (2, 4)
    found = compute(model, rows, TOKENIZER.pad, depths, Way(), cut=3)
    flat = [(i, conversation_ids(CHAT, r.prompt, c, CONTEXT)) for i, r in enumerate(rankings) for c in r.completions]
    for place, (i, ids) in enumerate(flat):
        tail = len(ids) - len(rows[i].prompt)
        for d, depth in enumerate(depths):
            cut = small(arch)
            cut.model.layers = cut.model.layers[:depth]
            alone = cut.model(torch.tensor([ids]))[0]
            assert torch.allclose(found.last[place, d], alone[-1], atol=1e-4)
            assert torch.allclose(found.mean[place, d], alone[-tail:].mean(0), atol=1e-4)
    assert [len(s) for s in found.states] == [len(row) for row in rows]


def test_packing_reads_each_prompt_once_and_keeps_every_token() -> None:
    for ranking in some():
        row = pack(CHAT, ranking, CONTEXT)
        wholes = [conversation_ids(CHAT, ranking.prompt, c, CONTEXT) for c in ranking.completions]
        assert [[*row.prompt, *tail] for tail in row.completions] == wholes
        assert len(row) < row.unpacked == sum(map(len, wholes))


def test_a_conversation_too_long_loses_its_oldest_tokens_from_all_alike() -> None:
    ranking = Ranking(
        (Message("user", "no " * 80),), ((Message("assistant", "yes"),), (Message("assistant", "42 " * 9),)), (1, 2)
    )
    whole, row = pack(CHAT, ranking, 10_000), pack(CHAT, ranking, 40)
    assert row.completions == whole.completions
    assert len(row.prompt) + max(map(len, row.completions)) == 40
    assert whole.prompt[-len(row.prompt) :] == row.prompt
    tiny = pack(CHAT, ranking, 5)
    assert tiny.prompt == () and tiny.completions[1] == whole.completions[1][-5:]
    small().model(batch([tiny], 0).ids)


def test_no_completion_sees_another() -> None:
    packed = batch([pack(CHAT, r, CONTEXT) for r in some(3)], TOKENIZER.pad)
    for b, spans in enumerate(packed.spans):
        begin = spans[0][0]
        for start, end in spans:
            seen = packed.branches.mask[b, 0, start:end]
            assert seen[:, :begin].all()
            own = torch.zeros(seen.shape[1], dtype=torch.bool)
            own[:begin], own[start:end] = True, True
            assert not seen[:, ~own].any()
            assert packed.branches.positions[b, start:end].tolist() == list(range(begin, begin + end - start))


def test_batches_hold_every_row_once_within_the_limit() -> None:
    rows = [pack(CHAT, r, CONTEXT) for r in some(9)]
    parts = by_length(rows, 200)
    assert sorted(i for part in parts for i in part) == list(range(9))
    assert all(len(part) * max(len(rows[i]) for i in part) <= 200 or len(part) == 1 for part in parts)


@pytest.mark.parametrize(("layers", "depths"), [(30, (15, 20, 25, 30)), (1, (1,)), (2, (1, 2)), (4, (2, 3, 4))])
def test_depths_run_from_half_of_the_blocks_to_all(layers: int, depths: tuple[int, ...]) -> None:
    assert depths_of(layers) == depths


def cached_of(model: GPT, rankings: list[Ranking], cut: int) -> Cached:
    rows = [pack(CHAT, r, CONTEXT) for r in rankings]
    states = [s.float() for s in compute(model, rows, TOKENIZER.pad, (4,), Way(), cut=cut).states]
    return Cached(rows, states, judged(rankings), TOKENIZER.pad)


@pytest.mark.parametrize("rank", [None, 2])
def test_upper_blocks_on_kept_states_are_the_whole_reward_model_before_and_after_training(rank: int | None) -> None:
    model, rankings, cut = small(), some(), 2
    head = np.random.default_rng(0).normal(size=24)
    lora = None if rank is None else LoraConfig(r=rank, alpha=4.0)
    upper = Upper(model, cut, head, lora, 0)
    if rank is None:
        upper.requires_grad_(True)
    cached = cached_of(model, rankings, cut)
    loss = VoteLoss(Way())
    trainer = Trainer(upper, LoopConfig(optim=OptimConfig(lr=0.01, muon_lr=0.05, weight_decay=0.0)))
    chosen = list(range(len(rankings)))
    before = [p.detach().clone() for p in model.parameters()]
    first = trainer.step(cached.batches(chosen), loss, 1.0)["loss"]
    for _ in range(12):
        last = trainer.step(cached.batches(chosen), loss, 1.0)["loss"]
    assert last < first - 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))  # folds share it
    reward = RewardModel(small(), TOKENIZER.pad)
    upper.put_into(reward, cut)
    for part, made in cached.parts(chosen):
        got = iter(scored(upper, made, Way()).tolist())
        for i in part:
            for completion in rankings[i].completions:
                ids = torch.tensor([conversation_ids(CHAT, rankings[i].prompt, completion, CONTEXT)])
                assert next(got) == pytest.approx(reward(ids).item(), abs=0.02 * float(np.abs(head).sum()))


def test_the_loss_is_that_of_votes_one_pair_at_a_time() -> None:
    model = small()
    voted = replace(some(1)[0], votes=())
    rankings = [*some(4), replace(voted, ranks=tuple(range(1, len(voted.ranks) + 1)))]
    upper = Upper(model, 2, np.linspace(-1, 1, 24), None, 0)
    cached = cached_of(model, rankings, 2)
    batches = cached.batches(list(range(len(rankings))))
    total = sum(VoteLoss(Way())(upper, b).item() for b in batches)
    scores: dict[int, list[float]] = {}
    for part, made in cached.parts(list(range(len(rankings)))):
        numbers = iter(scored(upper, made, Way()).tolist())
        scores |= {i: [next(numbers) for _ in rankings[i].completions] for i in part}
    expected = 0.0
    for i, ranking in enumerate(rankings):
        k = len(ranking.ranks)
        losses = []
        for a in range(k):
            for b in range(a + 1, k):
                d = scores[i][a] - scores[i][b]
                p = 0.5 + 0.5 * np.sign(ranking.ranks[b] - ranking.ranks[a])
                losses.append(p * np.log1p(np.exp(-d)) + (1 - p) * np.log1p(np.exp(d)))
        expected += float(np.mean(losses))
    assert total == pytest.approx(expected, rel=1e-4)
    assert sum(b.weight for b in batches) == pytest.approx(len(rankings))
