"""The native path: against the model's own forward pass, and that nothing beside a request changes a bit of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import VOCAB, assert_same, going_round, make_model, naive_greedy, prompts_of

from stateofgpt.errors import ConfigError, ModelError
from stateofgpt.infer import forward
from stateofgpt.infer.engine import Engine, Event
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.model.gpt import GPT, GPTConfig

ARCHS = pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("llama", 1), ("gpt2", 4)])


def wide_model() -> GPT:
    """Sizes that fill no vector and no panel, heads wider than four vectors, and more outputs than one panel."""
    config = GPTConfig(
        vocab_size=101,
        hidden_size=72,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=84,
        intermediate_size=50,
        max_position_embeddings=128,
        rope_theta=5000.0,
    )
    torch.manual_seed(3)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand_like(p) + 0.5 if p.ndim == 1 else torch.randn_like(p) * 0.4)
    return model.eval()


def test_the_library_is_there_and_agrees_with_torch() -> None:
    assert forward.load() is not None, "a C compiler with OpenMP is among what the tests need"


@ARCHS
def test_its_logits_are_those_of_the_model(arch: str, kv_heads: int) -> None:
    for model in (make_model(arch, kv_heads), wide_model()):
        engine = Engine(model, native=True)
        ids = [random.Random(i).randrange(96) for i in range(50)]
        found = engine._decoder.verify([ids], [0], [[3, 0, 2, 5]])  # type: ignore[union-attr]
        with torch.no_grad():
            wanted = model(torch.tensor([ids]))[0]
        assert (found.log_softmax(-1) - wanted.log_softmax(-1)).abs().max() < 1e-4


@ARCHS
def test_greedy_decoding_with_refill_equals_running_the_whole_model_again(arch: str, kv_heads: int) -> None:
    model = make_model(arch, kv_heads)
    prompts = prompts_of(5, 1, 17, 9, 2, 30, 11)
    lengths = [7, 12, 3, 20, 1, 9, 15]
    params = [SamplingParams(max_tokens=n, temperature=0.0, stop_ids=(3, 4)) for n in lengths]
    engine = Engine(model, max_batch=3, native=True)
    assert engine.native
    for prompt, n, one in zip(prompts, lengths, engine.complete(prompts, params), strict=True):
        assert_same(one, naive_greedy(model, prompt, n, (3, 4)))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    model, threads = wide_model(), torch.get_num_threads()
    ids = [random.Random(i).randrange(96) for i in range(40)]
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(Engine(model, native=True)._decoder.verify([ids], [0], [[0, 1, 2]]))  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


Answer = list[tuple[int, float, str | None]]


def alone(model: GPT, prompt: list[int], params: SamplingParams, cache: forward.CachePrecision = "float32") -> Answer:
    engine = Engine(model, max_batch=1, native=True, cache=cache)
    return [(e.token, e.logprob, e.finish) for e in engine.generate([prompt], [params])]


MODEL = make_model()
SYSTEM = prompts_of(37, seed=9)[0]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    """A request: some share a beginning, some are alike, some repeat themselves."""
    shared = draw(st.sampled_from([0, 0, 16, 20, 37]))
    own = draw(st.lists(st.integers(0, 5), min_size=1, max_size=20))
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 20)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        seed=draw(st.integers(0, 3)),
        stop_ids=draw(st.sampled_from([(), (3, 4, 5)])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
    )
    return SYSTEM[:shared] + own, params


@pytest.mark.slow
@given(
    st.lists(st.tuples(jobs(), st.integers(0, 6), st.sampled_from(["", "a"])), min_size=1, max_size=9),
    st.integers(1, 5),
    st.sampled_from([4, 5, 7, 12, 40]),
    st.sampled_from([None, 1, 7, 24]),
    st.booleans(),
    st.sampled_from([0, 0, 3]),
    st.sampled_from(["float32", "float32", "bfloat16"]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_the_same_request_gives_the_same_bits_alone_batched_preempted_and_from_a_prefix(
    asked: list[tuple[tuple[list[int], SamplingParams], int, str]],
    rows: int,
    blocks: int,
    step_tokens: int | None,
    prefixes: bool,
    speculate: int,
    cache: forward.CachePrecision,
    rng: random.Random,
) -> None:
    size = Engine(MODEL, max_batch=1, native=True, cache=cache)._decoder.block_bytes
    engine = Engine(
        MODEL, max_batch=rows, native=True, cache_bytes=blocks * size, step_tokens=step_tokens, prefixes=prefixes,
        speculate=speculate, cache=cache,
    )  # fmt: skip
    found: dict[int, Answer] = {}
    wanted: dict[int, Answer] = {}
    for (prompt, params), steps, tenant in asked:
        request = engine.add(prompt, params, tenant=tenant)
        found[request], wanted[request] = [], alone(MODEL, prompt, params, cache)
        if rng.random() < 0.1:
            engine.cancel(engine.add(prompt, params))
        for _ in range(steps):
            collect(engine.step(), found)
            change = rng.choice([engine.pause, engine.go_on, lambda _: None])
            change(rng.choice(list(found)))
    for request in found:
        engine.go_on(request)
    for _ in range(2000):
        if engine.idle:
            break
        collect(engine.step(), found)
    assert found == wanted
    assert engine._blocks.available == engine._blocks.count  # nothing is held by nobody


def collect(events: list[Event], found: dict[int, Answer]) -> None:
    for e in events:
        found[e.request].append((e.token, e.logprob, e.finish))


def test_a_full_cache_preempts_the_last_and_loses_none() -> None:
    size = Engine(MODEL, native=True)._decoder.block_bytes
    engine = Engine(MODEL, max_batch=8, native=True, cache_bytes=6 * size)
    prompts = prompts_of(10, 11, 12, 13, 14, 15)
    params = [SamplingParams(max_tokens=40, seed=i) for i in range(6)]
    requests = [engine.add(p, one) for p, one in zip(prompts, params, strict=True)]
    ends: list[int] = []
    found: dict[int, Answer] = {r: [] for r in requests}
    while not engine.idle:
        events = engine.step()
        collect(events, found)
        ends += [e.request for e in events if e.finish]
    assert engine._schedule.preempted > 0
    assert ends == requests  # all ask for as much, so who came first is done first
    assert list(found.values()) == [alone(MODEL, p, one) for p, one in zip(prompts, params, strict=True)]


def test_a_long_prompt_is_read_in_pieces_while_others_draw() -> None:
    engine = Engine(MODEL, max_batch=2, native=True, step_tokens=8)
    short = engine.add([1, 2], SamplingParams(max_tokens=30))
    engine.step()
    long = engine.add(prompts_of(50)[0], SamplingParams(max_tokens=3))
    owners = [[e.request for e in engine.step()] for _ in range(8)]
    assert owners == [[short]] * 6 + [[short, long]] * 2  # 49 tokens to read, 8 at a time


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens every prefill reads, from now on."""
    read: list[int] = []
    prefill = engine._decoder.prefill
    monkeypatch.setattr(
        engine._decoder, "prefill", lambda ids, *rest: (read.append(sum(map(len, ids))), prefill(ids, *rest))[1]
    )
    return read


@pytest.mark.parametrize("native", [False, True])
def test_a_prefix_is_read_once_for_a_tenant_and_again_for_another_and_after_a_change(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    engine = Engine(MODEL, native=native, prefixes=True)
    read = counted(engine, monkeypatch)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    first, second = [*SYSTEM, 1, 2, 3], [*SYSTEM, 4, 5]
    answer = engine.complete([first], params, tenant="a")[0]
    engine.complete([second], params, tenant="a")
    engine.complete([first + answer.ids + [9, 9]], params, tenant="a")  # the next turn
    engine.complete([first], params, tenant="b")
    engine.refresh()
    engine.complete([second], params, tenant="a")
    # 37 tokens are two blocks and five of the third, of which a copy is made; what was drawn last was never read
    assert read == [39, 1, 2, 39, 38]
    assert engine.complete([second], params, tenant="a")[0].ids == naive_greedy(MODEL, second, 4).ids


def test_prompts_that_share_a_beginning_and_come_together_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, native=True, prefixes=True, max_batch=8)
    read = counted(engine, monkeypatch)
    engine.complete([[*SYSTEM, i] for i in range(8)], SamplingParams(max_tokens=2))
    assert read[0] == 37 and sum(read) <= 37 + 7 * 5  # the block in the middle of which they part is read by each


def test_the_prefix_used_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Engine(MODEL, native=True)._decoder.block_bytes
    engine = Engine(MODEL, native=True, prefixes=True, max_batch=1, cache_bytes=8 * size)
    one, two, three = prompts_of(49, 49, 49)
    params = SamplingParams(max_tokens=1)
    engine.complete([one], params)
    engine.complete([two], params)
    engine.complete([one], params)
    read = counted(engine, monkeypatch)
    engine.complete([three], params)  # takes room from the second
    engine.complete([one], params)
    assert read == [48]


def test_guesses_are_kept_where_they_are_right_and_change_nothing() -> None:
    prompt = [5, 6, 7, 8, 9, 10] * 5
    params = [SamplingParams(max_tokens=30, temperature=t, seed=1) for t in (0.0, 0.2, 1.0)]
    for one in params:
        engine = Engine(MODEL, native=True, speculate=4)
        found: Answer = []
        request, steps = engine.add(prompt, one), 0
        while engine.unfinished(request):
            found += [(e.token, e.logprob, e.finish) for e in engine.step()]
            steps += 1
        assert found == alone(MODEL, prompt, one)
        assert steps <= len(found)
    greedy = alone(MODEL, prompt, replace(params[0], max_tokens=30))
    text = prompt + [token for token, _, _ in greedy]
    engine = Engine(MODEL, native=True, speculate=4)
    again = (
        engine.add(text[:40] + text[:-20], SamplingParams(max_tokens=10, temperature=0.0)) if len(text) < 30 else None
    )
    assert again is None or engine.unfinished(again)


def test_a_text_that_repeats_itself_takes_fewer_steps_with_guesses() -> None:
    model = going_round()
    params = SamplingParams(max_tokens=40, temperature=0.0)
    prompt = [5, 6, 7, 8, 9, 10, 11, 6, 7]
    engine = Engine(model, native=True, speculate=4)
    request, steps, found = engine.add(prompt, params), 0, []
    while engine.unfinished(request):
        found += [e.token for e in engine.step()]
        steps += 1
    assert found == naive_greedy(model, prompt, 40).ids
    assert steps <= 14


@ARCHS
@pytest.mark.parametrize("weights,tolerance", [("bfloat16", 0.1), ("int8", 0.3)])
def test_rounded_weights_stay_close(arch: str, kv_heads: int, weights: forward.Precision, tolerance: float) -> None:
    model = make_model(arch, kv_heads)
    ids = prompts_of(30)[0]
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0].log_softmax(-1)
    found = Engine(model, native=True, weights=weights)._decoder.verify([ids], [0], [[0, 1]])  # type: ignore[union-attr]
    error = (found.log_softmax(-1) - wanted).abs()
    assert 1e-4 < error.mean() < tolerance


@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("llama", 1), ("gpt2", 4)])
def test_a_rounded_cache_holds_what_torch_rounds_and_stays_close(arch: str, kv_heads: int) -> None:
    model, ids = make_model(arch, kv_heads), prompts_of(40)[0]
    pools, logits = [], []
    for cache in ("float32", "bfloat16"):
        decoder = Engine(model, max_batch=1, native=True, cache=cache)._decoder
        assert isinstance(decoder, forward.NativeDecoder)
        logits.append(decoder.verify([ids], [0], [[2, 0, 1]]))
        pools.append(decoder._pool[:3])
    whole, small = pools[0], pools[1].view(torch.bfloat16)
    assert whole.shape == small.shape
    first = whole.shape[1] // model.config.num_hidden_layers  # what later layers keep comes of rounded numbers
    assert whole[:, :first].any() and torch.equal(whole[:, :first].bfloat16(), small[:, :first])
    assert torch.allclose(*(each.log_softmax(-1) for each in logits), atol=0.2)
    assert not torch.equal(*logits)


def test_packed_weights_unpack_to_what_was_rounded() -> None:
    weight = torch.randn(45, 7)
    for precision, step in (("float32", 0.0), ("bfloat16", 2.0**-8), ("int8", 1 / 127)):
        packed, scale = forward.pack(weight, precision)  # type: ignore[arg-type]
        assert packed.shape == ((2, 4, 32, 2) if precision == "int8" else (2, 7, 32, 1))
        rows = packed.float().transpose(1, 2).reshape(64, -1)[:, :7]
        rows = rows if scale is None else rows * scale[:, None]
        assert not rows[45:].any()
        assert (rows[:45] - weight).abs().max() <= step * weight.abs().max()


def test_what_cannot_be_given_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache_bytes"):
        Engine(MODEL, cache_bytes=1000)
    with pytest.raises(ConfigError, match="step_tokens"):
        Engine(MODEL, step_tokens=0)
    with pytest.raises(ModelError, match="logit_bias"):
        Engine(MODEL).add([1], SamplingParams(logit_bias=((VOCAB, 1.0),)))


def test_without_a_compiler_torch_answers_and_int8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "load", lambda: None)
    engine = Engine(MODEL, native=True, prefixes=True)
    assert not engine.native
    prompt = prompts_of(9)[0]
    assert_same(
        engine.complete([prompt], SamplingParams(max_tokens=5, temperature=0.0))[0], naive_greedy(MODEL, prompt, 5)
    )
    with pytest.raises(ModelError, match="int8"):
        Engine(MODEL, native=True, weights="int8")
