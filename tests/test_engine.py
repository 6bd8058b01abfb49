"""The engine against a slow twin: one sequence at a time, the whole model run again for every token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from stateofgpt.errors import ModelError
from stateofgpt.infer.engine import Completion, Engine
from stateofgpt.infer.loop import EngineLoop
from stateofgpt.infer.sampling import SamplingParams, derive_seed
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.rotary import RopeScaling

VOCAB = 96


def make_model(arch: str = "qwen3", kv_heads: int = 2, seed: int = 0) -> GPT:
    """A small model whose logits are far apart, so that the last bit of a float decides nothing."""
    config = GPTConfig(
        arch=arch,  # type: ignore[arg-type]
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_bias=arch == "llama",
        mlp_bias=arch == "llama",
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16) if arch == "llama" else None,
    )
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.rand_like(p) + 0.5 if p.ndim == 1 else torch.randn_like(p) * (2.0 if "embed" in name else 0.3)
            )
    return model.eval()


def going_round() -> GPT:
    """A model whose most likely next token is always the one after, from 11 back to 6."""
    model = make_model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
        model.lm_head.weight[12] = 0.0
        model.lm_head.weight[6] = model.model.embed_tokens.weight[11]
        model.model.norm.weight.fill_(1.0)
    return model


def prompts_of(*lengths: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]


@torch.no_grad()
def naive_greedy(model: GPT, prompt: list[int], n: int, stop: tuple[int, ...] = ()) -> Completion:
    ids, logprobs = list(prompt), []
    while len(logprobs) < n and len(ids) < model.config.max_position_embeddings:
        row = model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
        ids.append(int(row.argmax()))
        logprobs.append(float(row[ids[-1]]))
        if ids[-1] in stop:
            return Completion(ids[len(prompt) :], logprobs, "stop")
    return Completion(ids[len(prompt) :], logprobs, "length")


def assert_same(found: Completion, wanted: Completion) -> None:
    assert found.ids == wanted.ids
    assert found.finish == wanted.finish
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("qwen3", 4), ("llama", 1), ("gpt2", 4)])
def test_greedy_decoding_with_refill_equals_running_the_whole_model_again_for_each_token(
    arch: str, kv_heads: int
) -> None:
    model = make_model(arch, kv_heads)
    prompts = prompts_of(5, 1, 17, 9, 2, 30, 11)
    lengths = [7, 12, 3, 20, 1, 9, 15]
    params = [SamplingParams(max_tokens=n, temperature=0.0, stop_ids=(3, 4)) for n in lengths]
    found = Engine(model, max_batch=3).complete(prompts, params)
    for prompt, n, one in zip(prompts, lengths, found, strict=True):
        assert_same(one, naive_greedy(model, prompt, n, (3, 4)))


def test_a_batch_is_at_work_at_once_and_a_free_row_is_refilled_at_the_next_step() -> None:
    engine = Engine(make_model(), max_batch=2)
    a, b, c = (engine.add(p, SamplingParams(max_tokens=n)) for p, n in zip(prompts_of(3, 4, 5), (1, 3, 2), strict=True))
    assert [e.request for e in engine.step()] == [a, b]
    assert sorted(e.request for e in engine.step()) == [b, c]
    last = engine.step()
    assert sorted((e.request, e.finish) for e in last) == [(b, "length"), (c, "length")]
    assert engine.idle and engine.step() == []


@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("llama", 1), ("gpt2", 4)])
def test_sampled_tokens_and_reported_logprobs_are_the_same_alone_in_a_batch_and_by_score(
    arch: str, kv_heads: int
) -> None:
    model = make_model(arch, kv_heads)
    prompts = prompts_of(4, 9, 4, 13, 1, 7)
    params = [SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=i) for i in range(len(prompts))]
    together = Engine(model, max_batch=4).complete(prompts, params)
    for prompt, one, found in zip(prompts, params, together, strict=True):
        alone = Engine(model, max_batch=1).complete([prompt], [one])[0]
        assert found.ids == alone.ids
        scored = Engine(model).score([prompt + found.ids])[0]
        assert len(scored) == len(prompt) + len(found.ids) - 1
        assert scored[len(prompt) - 1 :] == pytest.approx(found.logprobs, abs=1e-4)


def test_equal_prompts_draw_differently_under_one_params_and_alike_under_equal_seeds() -> None:
    engine = Engine(make_model(), max_batch=8)
    prompt = prompts_of(6)[0]
    params = SamplingParams(max_tokens=10, temperature=2.0, seed=5)
    spread = engine.complete([prompt] * 8, params)
    assert len({tuple(c.ids) for c in spread}) == 8
    assert [c.ids for c in engine.complete([prompt] * 8, params)] == [c.ids for c in spread]
    assert len({tuple(c.ids) for c in engine.complete([prompt] * 8, [params] * 8)}) == 1
    third = engine.complete([prompt], [replace(params, seed=derive_seed(5, 3))])[0]
    assert third.ids == spread[3].ids


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    engine = Engine(model, max_batch=6)
    read: list[int] = []
    prefill = engine._decoder.prefill
    monkeypatch.setattr(engine._decoder, "prefill", lambda ids, *rest: (read.append(len(ids)), prefill(ids, *rest))[1])
    a, b = prompts_of(8, 12)
    found = engine.complete([a, b, a, a, b, a, a, b], SamplingParams(max_tokens=5, temperature=0.0))
    assert sum(read) == 2 + 2  # the two that had to wait came when no other row was left to copy from
    for prompt, one in zip([a, b, a, a, b, a, a, b], found, strict=True):
        assert_same(one, naive_greedy(model, prompt, 5))


@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("gpt2", 4)])
def test_score_is_the_log_softmax_of_the_forward_pass_for_any_mixture_of_lengths(
    monkeypatch: pytest.MonkeyPatch, arch: str, kv_heads: int
) -> None:
    model = make_model(arch, kv_heads)
    monkeypatch.setattr("stateofgpt.infer.score._LOGITS", 40 * VOCAB)  # several chunks
    texts = [*prompts_of(12, 3, 20, 65, 2, 3), [], [7]]
    for ids, found in zip(texts, Engine(model).score(texts), strict=True):
        wanted = []
        if len(ids) > 1:
            with torch.no_grad():
                rows = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
            wanted = [float(rows[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        assert found == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ModelError, match="66 tokens does not fit"):
        Engine(model).score([[1] * 66])


def test_a_full_context_ends_with_length_and_a_prompt_without_room_is_refused() -> None:
    model = make_model()
    engine = Engine(model)
    prompt = prompts_of(60)[0]
    assert_same(engine.complete([prompt], SamplingParams(temperature=0.0))[0], naive_greedy(model, prompt, 99))
    assert len(engine.complete([prompts_of(63)[0]], SamplingParams())[0].ids) == 1
    with pytest.raises(ModelError, match="64 tokens and the context holds 64"):
        engine.add([1] * 64, SamplingParams())
    with pytest.raises(ModelError, match="empty"):
        engine.add([], SamplingParams())
    with pytest.raises(ModelError, match=r"outside 0\.\.95"):
        engine.add([1, 96], SamplingParams())


@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("gpt2", 4)])
def test_a_held_request_is_extended_as_if_its_whole_text_had_been_the_prompt(arch: str, kv_heads: int) -> None:
    model = make_model(arch, kv_heads)
    engine = Engine(model, max_batch=3)
    prompts, more = prompts_of(5, 11, 7), prompts_of(4, 1, 9, seed=2)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    held = [engine.add(p, replace(params, max_tokens=16), hold=True) for p in prompts[:2]]
    # a stop after 8 tokens is what makes a turn end here: the token that greedy decoding draws eighth
    first = [naive_greedy(model, p, 8).ids for p in prompts]
    for request, ids in zip(held, first, strict=False):
        engine._requests[request].params = replace(params, max_tokens=16, stop_ids=(ids[-1],))
    other = engine.add(prompts[2], replace(params, max_tokens=30))
    text = {r: list(p) for r, p in zip(held, prompts, strict=False)}
    extended: dict[int, int] = {}
    for event in engine.events(held):
        if event.request == other:
            continue
        text[event.request].append(event.token)
        if event.finish == "stop" and event.request not in extended:
            new = more[held.index(event.request)]
            extended[event.request] = len(text[event.request]) + len(new)
            text[event.request] += new
            engine.extend(event.request, new)
    for request in held:
        ids, cut = text[request], extended[request]
        twin = naive_greedy(model, ids[:cut], len(ids) - cut)
        assert ids[cut:] == twin.ids
        engine.release(request)
    assert {e.request for e in engine.step()} == {other}


def test_extending_what_is_not_held_is_refused_and_held_requests_hold_up_nobody() -> None:
    engine = Engine(make_model(), max_batch=1)
    loose = engine.add([1, 2], SamplingParams(max_tokens=1))
    engine.step()
    with pytest.raises(ModelError, match="not held"):
        engine.extend(loose, [3])
    held = engine.add([1, 2], SamplingParams(max_tokens=1), hold=True)
    engine.step()
    assert engine.idle
    with pytest.raises(ModelError, match="all its 1 tokens"):
        engine.extend(held, [3])
    assert len(engine.complete([[4]], SamplingParams(max_tokens=2))[0].ids) == 2
    engine.release(held)
    assert len(engine.complete([[4]], SamplingParams(max_tokens=2))[0].ids) == 2


@pytest.mark.parametrize("native", [False, True])
def test_a_held_request_that_lost_its_row_and_its_blocks_goes_on_as_if_it_had_not(native: bool) -> None:
    model = make_model()
    block = Engine(model, native=native)._decoder.block_bytes
    engine = Engine(model, max_batch=1, cache_bytes=4 * block, native=native)  # one full context
    prompt, other = prompts_of(20, 40)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    first = naive_greedy(model, prompt, 6).ids
    held = engine.add(prompt, replace(params, max_tokens=12, stop_ids=(first[-1],)), hold=True)
    drawn = [e.token for e in engine.events([held])]
    assert engine.complete([other], replace(params, max_tokens=20))[0].ids == naive_greedy(model, other, 20).ids
    engine.extend(held, [7, 8])
    text = [*prompt, *drawn, 7, 8]
    assert [e.token for e in engine.events([held])] == naive_greedy(model, text, 12 - len(drawn), (first[-1],)).ids


def test_cancelling_frees_the_row_for_the_next_step_and_disturbs_nobody() -> None:
    model = make_model()
    engine = Engine(model, max_batch=2)
    params = SamplingParams(max_tokens=10, temperature=0.0)
    prompts = prompts_of(4, 6, 8, 5)
    a, b, c, d = (engine.add(p, params) for p in prompts)
    seen: dict[int, list[int]] = {b: [], d: []}
    for step in range(40):
        if step == 2:
            engine.cancel(a)
            engine.cancel(c)  # it was waiting
            engine.cancel(12345)
        for event in engine.step():
            assert not (step >= 2 and event.request in (a, c))
            if event.request in seen:
                seen[event.request].append(event.token)
        if step == 2:
            assert len(seen[d]) == 1
    assert seen[b] == naive_greedy(model, prompts[1], 10).ids
    assert seen[d] == naive_greedy(model, prompts[3], 10).ids
    assert engine.idle


@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("llama", 1), ("gpt2", 4)])
def test_random_arrivals_cancellations_and_holds_leave_every_answer_as_the_twin_has_it(
    arch: str, kv_heads: int
) -> None:
    model = make_model(arch, kv_heads)
    engine = Engine(model, max_batch=5)
    rng = random.Random(3)
    prompts: dict[int, list[int]] = {}
    seen: dict[int, list[int]] = {}
    held: list[int] = []
    for _ in range(120):
        if rng.random() < 0.3:
            prompt = prompts_of(rng.choice([1, 3, 8, 20]), seed=rng.randrange(6))[0]
            hold = rng.random() < 0.3
            params = SamplingParams(max_tokens=rng.randrange(1, 15), temperature=0.0)
            request = engine.add(prompt, params, hold=hold)
            prompts[request], seen[request] = prompt, []
        if rng.random() < 0.05 and prompts:
            engine.cancel(rng.choice(list(prompts)))
        for event in engine.step():
            seen[event.request].append(event.token)
            if event.finish:
                held.append(event.request)
        if len(held) > 2:
            engine.release(held.pop(0))
    for request, prompt in prompts.items():
        assert seen[request] == naive_greedy(model, prompt, len(seen[request])).ids


@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("gpt2", 4)])
def test_refresh_takes_over_new_weights_and_is_refused_while_a_request_is_under_way(arch: str, kv_heads: int) -> None:
    model, other = make_model(arch, kv_heads, seed=0), make_model(arch, kv_heads, seed=1)
    engine = Engine(model)
    prompt = prompts_of(6)[0]
    params = SamplingParams(max_tokens=5, temperature=0.0)
    engine.complete([prompt], params)
    model.load_state_dict(other.state_dict())
    request = engine.add(prompt, params)
    with pytest.raises(ModelError, match="under way"):
        engine.refresh()
    engine.cancel(request)
    engine.refresh()
    assert_same(engine.complete([prompt], params)[0], naive_greedy(other, prompt, 5))


@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("gpt2", 4)])
def test_bfloat16_stays_close_to_float32(arch: str, kv_heads: int) -> None:
    model = make_model(arch, kv_heads)
    prompt = prompts_of(10)[0]
    exact = Engine(model).complete([prompt], SamplingParams(max_tokens=4, temperature=0.0))[0]
    rough = Engine(model, dtype=torch.bfloat16).complete([prompt], SamplingParams(max_tokens=4, temperature=0.0))[0]
    assert rough.logprobs[0] == pytest.approx(exact.logprobs[0], abs=0.2)


def test_a_loop_serves_threads_alike_and_cancels_within_a_step() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = make_model()
    prompts = prompts_of(*range(1, 13))
    params = SamplingParams(max_tokens=9, temperature=0.0)
    with EngineLoop(Engine(model, max_batch=4)) as loop:

        def ask(prompt: list[int]) -> list[int]:
            return [e.token for e in loop.events([loop.add(prompt, params)])]

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, prompts))
        long = loop.add(prompts[0], replace(params, max_tokens=60))
        stream = loop.events([long])
        next(stream)
        loop.cancel(long)
        assert len(list(stream)) < 60
        assert ask(prompts[3]) == answers[3]
        with pytest.raises(ModelError, match="empty"):
            loop.add([], params)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == naive_greedy(model, prompt, 9).ids


def test_nothing_is_drawn_for_a_reader_that_lags_behind_and_its_answer_is_the_same() -> None:
    model, prompts = make_model(), prompts_of(3, 5, 7)
    params = SamplingParams(max_tokens=40, temperature=0.0)
    with EngineLoop(Engine(model, max_batch=1), unread=6) as loop:
        unread = loop.add(prompts[0], params)
        for prompt in prompts[1:]:  # it has given its only row up
            assert [e.token for e in loop.events([loop.add(prompt, params)])] == naive_greedy(model, prompt, 40).ids
        assert len(loop._inbox[unread]) == 6 and loop.busy == 1 and loop.engine.idle
        assert [e.token for e in loop.events([unread])] == naive_greedy(model, prompts[0], 40).ids
        left = loop.add(prompts[0], params)
        list(loop.events([loop.add(prompts[1], params)]))
        loop.cancel(left)
        assert len(list(loop.events([loop.add(prompts[2], params)]))) == 40
        assert not loop.engine._requests and not loop._pausing


def test_a_request_that_pauses_is_not_extended() -> None:
    engine = Engine(make_model())
    request = engine.add([1, 2], SamplingParams(max_tokens=9))
    engine.step()
    engine.pause(request)
    assert engine.step() == [] and engine.idle and engine.unfinished(request)
    with pytest.raises(ModelError, match="not held"):
        engine.extend(request, [3])
    engine.go_on(request)
    engine.go_on(request)
    assert len(list(engine.events([request]))) == 8


def test_a_loop_whose_engine_fails_tells_those_affected_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(make_model())
    with EngineLoop(engine) as loop:
        step = engine.step

        def broken() -> None:
            monkeypatch.setattr(engine, "step", step)
            raise RuntimeError("out of luck")

        monkeypatch.setattr(engine, "step", broken)
        with pytest.raises(ModelError, match="out of luck"):
            list(loop.events([loop.add([1, 2], SamplingParams(max_tokens=3))]))
        assert len(list(loop.events([loop.add([1, 2], SamplingParams(max_tokens=3))]))) == 3
    with pytest.raises(ModelError, match="closed"):
        loop.add([1], SamplingParams())


def test_what_an_engine_did_before_changes_no_bit() -> None:
    model = make_model()
    prompts = prompts_of(5, 9, 20, 3)
    params = SamplingParams(max_tokens=8, seed=1)
    fresh, used = Engine(model, max_batch=3), Engine(model, max_batch=3)
    used.complete(prompts_of(50, 2, 40, 8, seed=9), SamplingParams(max_tokens=14))
    assert used.complete(prompts, params) == fresh.complete(prompts, params)
