"""Steps that never change their shape: the same tokens as any other way, recorded or not, on one device or another."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import twin_device
from recorded import Recorder
from test_adjust import Countdown
from test_engine import VOCAB, assert_same, going_round, make_model, naive_greedy, prompts_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from twin_device import twin

from stateofgpt.errors import ModelError
from stateofgpt.infer import engine as engine_module
from stateofgpt.infer.capture import Capture, as_it_is
from stateofgpt.infer.engine import Engine, Event
from stateofgpt.infer.guide import Constraint
from stateofgpt.infer.sampling import Sampler, SamplingParams
from stateofgpt.infer.static import StaticDecoder, rounded
from stateofgpt.model.gpt import GPT

__all__ = ["twin"]

ARCHS = pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("llama", 1), ("gpt2", 4)])
Made = tuple[Engine, StaticDecoder]


def static_engine(model: GPT, capture: Capture, dtype: torch.dtype = torch.float32, **settings: Any) -> Made:
    """An engine that goes the static way on the CPU, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "make_decoder", lambda model, *rest: StaticDecoder(model, dtype, rest[4], capture))
        engine = Engine(model, **settings)
    assert isinstance(engine._decoder, StaticDecoder)
    return engine, engine._decoder


@pytest.fixture(autouse=True)
def one_kernel() -> Iterator[None]:
    """Of attention there are several, and only one of them on every device."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def test_sizes_are_never_too_small_nor_more_than_half_too_large() -> None:
    sizes = {rounded(n) for n in range(1, 2000)}
    assert sorted(sizes)[:11] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert all(n <= rounded(n) <= max(n, n * 1.5) and rounded(rounded(n)) == rounded(n) for n in range(1, 2000))


@ARCHS
@pytest.mark.parametrize("way", ["as it is", "recorded"])
def test_greedy_decoding_with_refill_equals_running_the_whole_model_again(arch: str, kv_heads: int, way: str) -> None:
    model = make_model(arch, kv_heads)
    prompts = prompts_of(5, 1, 17, 9, 2, 30, 11)
    lengths = [7, 12, 3, 20, 1, 9, 15]
    params = [SamplingParams(max_tokens=n, temperature=0.0, stop_ids=(3, 4)) for n in lengths]
    capture = Recorder() if way == "recorded" else as_it_is
    engine, _ = static_engine(model, capture, max_batch=3)
    for prompt, n, one in zip(prompts, lengths, engine.complete(prompts, params), strict=True):
        assert_same(one, naive_greedy(model, prompt, n, (3, 4)))
    assert capture is as_it_is or capture.recorded == 3  # for one, two and three rows


def test_each_size_is_recorded_once_and_played_for_every_step_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateofgpt.infer.static._LEAST_BLOCKS", 1)
    capture = Recorder()
    engine, decoder = static_engine(make_model(), capture, max_batch=8)
    params = SamplingParams(max_tokens=30, temperature=0.0)
    engine.complete(prompts_of(4, 5, 6, 7, 8), params)  # five rows are six, 38 positions three blocks
    assert sorted(decoder._steps) == [(6, 1), (6, 2), (6, 3)] and capture.played == 30
    engine.complete(prompts_of(9, 5, 6, 7, 8, 9), params)
    assert capture.recorded == 3 and capture.played == 60
    engine.complete(prompts_of(60), params)
    assert sorted(decoder._steps)[:1] == [(1, 4)] and decoder._logits.keys() == {1, 6}


@ARCHS
def test_new_weights_are_copied_into_what_is_recorded(arch: str, kv_heads: int) -> None:
    model, other = make_model(arch, kv_heads, seed=0), make_model(arch, kv_heads, seed=1)
    capture = Recorder()
    engine, decoder = static_engine(model, capture)
    (prompt,), params = prompts_of(6), SamplingParams(max_tokens=5, temperature=0.0)
    assert_same(engine.complete([prompt], params)[0], naive_greedy(model, prompt, 5))
    addresses = [w.data_ptr() for w in decoder._weights]
    model.load_state_dict(other.state_dict(), assign=True)  # in other memory than before
    engine.refresh()
    assert_same(engine.complete([prompt], params)[0], naive_greedy(other, prompt, 5))
    assert capture.recorded == 1 and [w.data_ptr() for w in decoder._weights] == addresses
    assert not {p.data_ptr() for p in model.parameters()} & set(addresses)


def test_weights_of_another_shape_and_another_cache_throw_recordings_away() -> None:
    model = make_model()
    capture = Recorder()
    engine, decoder = static_engine(model, capture)
    (prompt,), params = prompts_of(6), SamplingParams(max_tokens=5, temperature=0.0)
    engine.complete([prompt], params)
    decoder.make_room(8)
    assert not decoder._steps
    engine.complete([prompt], params)
    assert capture.recorded == 2
    model.lm_head.weight = torch.nn.Parameter(torch.cat((model.lm_head.weight, torch.zeros(4, 32))))
    engine.refresh()
    assert not decoder._steps


def test_a_weight_that_is_used_twice_is_copied_once() -> None:
    model = make_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    _, decoder = static_engine(model, as_it_is)
    assert decoder._head.data_ptr() == decoder._embed.data_ptr()


def test_rows_that_are_nobodys_touch_no_block_of_anybody() -> None:
    engine, decoder = static_engine(make_model(), as_it_is, max_batch=8)
    blocks = engine._blocks.count
    before = decoder._pool.clone()
    for prompt in prompts_of(3, 4, 5, 6, 7):  # five rows of six
        engine.add(prompt, SamplingParams(max_tokens=4))
    taken: set[int] = set()
    for _ in range(3):
        engine.step()
        taken |= {block for r in engine._requests.values() for block in r.blocks}
    changed = (decoder._pool != before).flatten(3).any(-1).any(0).any(0).nonzero()[:, 0].tolist()
    assert set(changed) == taken | {blocks} and decoder.nowhere == blocks not in taken


Answer = list[tuple[int, str | None]]


def load_of(seed: int) -> list[tuple[list[int], SamplingParams, int, str]]:
    """Requests of all kinds, with the steps until the next one comes: shared beginnings, repetitions, penalties,
    filters, alternatives, several answers to one prompt, and answers that are held to something."""
    rng = random.Random(seed)
    shared = prompts_of(37, seed=9)[0]
    made = []
    for i in range(9):
        prompt = [*shared[: rng.choice([0, 16, 20, 37])], *(rng.randrange(6) for _ in range(rng.randrange(1, 12)))]
        constraint = Constraint("regex", "x" * rng.randrange(5, 40)) if i == 4 else None
        params = SamplingParams(
            max_tokens=rng.randrange(2, 16), temperature=rng.choice([0.0, 0.5, 1.0]), top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.8]), min_p=rng.choice([0.0, 0.05]), seed=rng.randrange(4), constraint=constraint,
            repetition_penalty=rng.choice([1.0, 1.3]), frequency_penalty=rng.choice([0.0, 0.5]),
            logit_bias=rng.choice([(), ((5, 2.0),)]), top_logprobs=rng.choice([0, 0, 2, 3]),
        )  # fmt: skip
        made += [(prompt, params, rng.randrange(4), rng.choice(["", "a"]))] * rng.choice([1, 1, 3])
    return made


def ran(engine: Engine, load: list[tuple[list[int], SamplingParams, int, str]]) -> tuple[list[list[Event]], int]:
    found: dict[int, list[Event]] = {}
    for prompt, params, steps, tenant in load:
        found[engine.add(prompt, params, tenant=tenant)] = []
        for _ in range(steps):
            for event in engine.step():
                found[event.request].append(event)
    while not engine.idle:
        for event in engine.step():
            found[event.request].append(event)
    assert engine._blocks.available == engine._blocks.count
    return list(found.values()), engine._schedule.preempted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("gpt2", 4)])
def test_an_engine_on_another_device_draws_what_it_draws_on_the_cpu(
    arch: str, kv_heads: int, seed: int, twin: str
) -> None:
    load, preempted = load_of(seed), Counter[str]()
    model = make_model(arch, kv_heads)
    rng = random.Random(seed)
    size = Engine(model)._decoder.block_bytes
    settings = {
        "max_batch": rng.randrange(2, 6), "prefixes": True, "step_tokens": rng.choice([None, 7, 24]),
        "cache_bytes": rng.choice([4, 6, 9]) * size, "weights": "float32",
        "guides": lambda constraint: Countdown(len(constraint.source), 3, False),
    }  # fmt: skip
    wanted, preempted["cpu"] = ran(Engine(model, **settings), load)
    engine = Engine(make_model(arch, kv_heads).to(twin), **settings, speculate=3)
    assert engine.device.type == twin and isinstance(engine._decoder, StaticDecoder)
    found, preempted[twin] = ran(engine, load)
    for (_, params, _, _), here, there in zip(load, wanted, found, strict=True):
        assert {len(e.top) for e in there} == {params.top_logprobs}
        assert [(e.token, e.finish) for e in here] == [(e.token, e.finish) for e in there]
        assert [e.logprob for e in here] == pytest.approx([e.logprob for e in there], abs=1e-4)
        for one, other in zip(here, there, strict=True):
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert preempted["cpu"] or settings["cache_bytes"] > 4 * size


@pytest.mark.parametrize("way", ["as it is", "recorded"])
def test_guesses_that_are_right_are_drawn_in_one_step_and_change_nothing(way: str) -> None:
    model = going_round()
    plain, _ = static_engine(model, as_it_is)
    guessing, _ = static_engine(model, Recorder() if way == "recorded" else as_it_is, speculate=4)
    for temperature, seed in ((0.0, 0), (8.0, 1), (8.0, 2), (8.0, 3)):
        params = SamplingParams(max_tokens=40, temperature=temperature, seed=seed, top_logprobs=1)
        drawn = []
        for engine in (plain, guessing):
            request = engine.add([5, 6, 7, 8, 9, 10, 11, 6, 7], params)
            steps, events = 0, list[Event]()
            while engine.unfinished(request):
                events += engine.step()
                steps += 1
            drawn.append([(e.token, e.finish, e.top[0][0]) for e in events])
        assert drawn[0] == drawn[1] and steps < 40
        assert (temperature == 0.0) == all(token == best for token, _, best in drawn[0])  # not all guesses are right


@pytest.mark.parametrize("top_p,waits", [(1.0, 1), (0.9, 2)])
def test_a_step_waits_for_the_device_once_and_for_a_nucleus_twice(
    top_p: float, waits: int, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stateofgpt.infer.sampling._HEAD", 64)  # less than the vocabulary
    engine = Engine(make_model().to(twin), weights="float32", max_batch=8, prefixes=True)
    waited: list[str] = []
    run = twin_device._run

    def counting(func: Any, args: Any, kwargs: Any) -> Any:
        leaves, name = tree_leaves((args, kwargs)), func._schema.name
        back = any(isinstance(x, torch.device) and x.type == "cpu" for x in leaves)
        if back or any(word in name for word in ("local_scalar", "item", "nonzero", "equal", "unique")):
            waited.append(name)
        return run(func, args, kwargs)

    ways = [
        SamplingParams(max_tokens=9, temperature=0.0, top_logprobs=2),
        SamplingParams(max_tokens=9, seed=1, repetition_penalty=1.2, presence_penalty=0.5),
        SamplingParams(max_tokens=9, seed=2, top_k=5, min_p=0.1, top_p=top_p, logit_bias=((3, 1.0),)),
    ]
    for prompt, params in zip(prompts_of(5, 20, 9), ways, strict=True):
        engine.add(prompt, params)
    monkeypatch.setattr(twin_device, "_run", counting)
    monkeypatch.setattr(twin_device.TwinTensor, "tolist", None)  # a wait of its own, each
    for step in range(1, 6):  # the first reads the prompts, too
        assert len(engine.step()) == 3
        assert len(waited) == waits * step, waited


def test_scores_and_embeddings_on_another_device_are_those_of_the_cpu(twin: str) -> None:
    texts = prompts_of(12, 3, 20, 2)
    here, there = Engine(make_model()), Engine(make_model().to(twin))
    assert there._decoder.dtype == torch.bfloat16 and here._decoder.dtype == torch.float32
    for one, other in zip(here.score(texts), there.score(texts), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    for row, other_row in zip(here.score(texts, 2), there.score(texts, 2), strict=True):
        assert [a.top[0][0] for a in row] == [b.top[0][0] for b in other_row]
    for one, other in zip(here.embed(texts), there.embed(texts), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_what_the_device_cannot_do_is_refused_in_one_sentence(twin: str) -> None:
    with pytest.raises(ModelError, match=r"the model is on twin:0; take bfloat16 or float32, or the CPU"):
        Engine(make_model().to(twin), native=True, weights="int8")
    with pytest.raises(ModelError, match=r"on twin:0 the cache has the precision of the weights, float32: leave"):
        Engine(make_model().to(twin), weights="float32", cache="bfloat16")
    assert Engine(make_model().to(twin), cache="bfloat16")._decoder.dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"without the native path, .* the cache has the precision of the weights"):
        Engine(make_model(), cache="bfloat16")
    assert Engine(make_model(), weights="bfloat16", cache="bfloat16")._decoder.dtype == torch.bfloat16


def test_a_sum_that_wavers_never_draws_what_must_not_be_drawn(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU adds up: in parts, so that the sum may grow by a rounding where nothing is added."""
    from stateofgpt.infer import sampling

    weights = torch.zeros(1, 8)
    weights[0, [1, 5]] = 1.0
    wavering = torch.tensor([[0.0, 0.9, 1.0, 1.1, 1.0, 1.9, 2.0, 2.0]])

    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: wavering.to(twin))
    there = weights.to(twin)
    for share in (0.0, 0.2, 0.47, 0.52, 0.8, 0.97, 0.999):
        token = int(sampling._first_above(there, torch.tensor([[share]]).to(twin)).cpu())
        assert token in (1, 5), share


def test_a_sampler_on_another_device_draws_the_tokens_of_the_cpu(twin: str) -> None:
    logits = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    ways = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 0.9, 0.1), (2.0, 0, 0.5, 0.0)] * 3
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=i) for i, (t, k, p, m) in enumerate(ways)]
    here, there = Sampler(params), Sampler(params, torch.device(twin))
    for step in range(20):
        wanted, found = here(logits, [step] * 12), there(logits.to(twin), [step] * 12)
        assert torch.equal(wanted[0], found[0].cpu()) and torch.equal(wanted[1], found[1].cpu())
