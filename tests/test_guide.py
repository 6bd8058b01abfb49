"""Constrained answers: always valid, or ended by length; and what a stranger's constraint may cost."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from made_elsewhere import TEXTS, llama
from torch.nn.attention import SDPBackend, sdpa_kernel
from twin_device import twin

from stateofgpt.errors import ConfigError
from stateofgpt.infer.engine import Engine
from stateofgpt.infer.grammar import Constraint
from stateofgpt.infer.guide import Guides
from stateofgpt.infer.loop import EngineLoop
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow  # together they take long

pytest.importorskip("llguidance")

__all__ = ["twin"]


@pytest.fixture(scope="module", params=["own", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "own":
        return Tokenizer.train(TEXTS * 20, 320)
    folder: Path = llama(tmp_path_factory.mktemp("llama"))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def guides(tokenizer: Tokenizer) -> Guides:
    return Guides(tokenizer)


def model_of(tokenizer: Tokenizer) -> GPT:
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size + 5,  # as padded vocabularies have it
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return GPT(config).eval()


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ä", "b\n"]},
        "n": {"type": "integer", "minimum": -9, "maximum": 120},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "n", "ok"],
    "additionalProperties": False,
}


def object_of_the_schema(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == ["name", "n", "ok"]
        and found["name"] in ("Ä", "b\n")
        and type(found["n"]) is int
        and type(found["ok"]) is bool
    )


CHOICES = ["yes", "no", 'a "quoted"\nline', "naïve"]
PAIR = "[a-c]{1,3}=[0-9]{1,2}"
GRAMMAR = 'start: pair ("," pair)?\npair: /[a-c]{1,3}/ "=" /[0-9]{1,2}/\n'
CASES = {
    "json_schema": (json.dumps(SCHEMA), object_of_the_schema),
    "regex": (r"[0-9]{3}-(ab|cd)+!", lambda text: re.fullmatch(r"[0-9]{3}-(ab|cd)+!", text) is not None),
    "choice": (json.dumps(CHOICES), CHOICES.__contains__),
    "grammar": (GRAMMAR, lambda text: re.fullmatch(PAIR + "(," + PAIR + ")?", text) is not None),
    "json": ("", lambda text: isinstance(json.loads(text), dict)),
}  # fmt: skip


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kind", list(CASES))
def test_an_answer_is_valid_or_ended_by_length(guides: Guides, tokenizer: Tokenizer, kind: str, native: bool) -> None:
    source, valid = CASES[kind]
    engine = Engine(model_of(tokenizer), native=native, guides=guides, max_batch=8)
    params = [
        SamplingParams(
            max_tokens=60,
            temperature=1.0,
            seed=i,
            constraint=Constraint(kind, source),
            stop_ids=tokenizer.stops,  # type: ignore[arg-type]
        )
        for i in range(12)
    ]
    ended = 0
    for one in engine.complete([[1, 2, 3]] * 12, params):
        if one.finish == "stop":
            ended += 1
            assert valid(tokenizer.decode_bytes(one.ids, inner=True).decode()), one
    assert ended >= (1 if kind == "json" else 6)


def test_a_guide_walks_a_valid_text_and_no_other(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides(Constraint("regex", "the (dog|fox)s?"))
    for token in tokenizer.encode_after("the fox", special=False):
        assert guide.mask()[token] and not guide.finished
        guide.accept(token)
    mask = guide.mask()
    assert all(mask[stop] for stop in tokenizer.stops)
    assert mask[tokenizer.encode_after("s", special=False)[0]]
    assert not mask[tokenizer.encode_after("x", special=False)[0]]
    assert not any(mask[number] for number in tokenizer.specials if number not in tokenizer.stops)


@pytest.mark.parametrize(
    "kind,source,why",
    [
        ("json_schema", "{", "EOF"),
        ("json_schema", "[" * 60_000, "recursion"),
        ("json_schema", '{"$ref": "#"}', "cannot be used"),
        (
            "json_schema",
            json.dumps({"type": "object", "properties": {"a": {"$ref": "https://a.b/c"}}}),
            "cannot be used",
        ),
        ("regex", "(a", "cannot be used"),
        ("choice", "[]", "JSON list of strings"),
        ("choice", "[" * 60_000, "no JSON"),
        ("choice", json.dumps(["a"] * 1001), "1,001 strings"),
        ("grammar", "start: nothing", "cannot be used"),
    ],
)
def test_a_wrong_source_is_refused_in_one_sentence(guides: Guides, kind: str, source: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        guides(Constraint(kind, source))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_too_long_a_source_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="characters"):
        Constraint("regex", "a" * 70_000)
    with pytest.raises(ConfigError, match="there are json_schema"):
        Constraint("yaml")  # type: ignore[arg-type]


BOMBS = [
    json.dumps({"allOf": [{"pattern": f"a{{{i},{i + 500}}}b"} for i in range(200)]}),
    json.dumps({"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": i} for i in range(800)]}),
    json.dumps({"enum": [f"e{i}" for i in range(6000)]}),
    json.dumps({"type": "string", "pattern": "((a+)+(b|c)*){1,500}" * 20}),
]


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:20])
def test_a_hostile_schema_costs_seconds_at_most_and_nobody_elses_time(
    guides: Guides, tokenizer: Tokenizer, bomb: str
) -> None:
    params = SamplingParams(max_tokens=20, constraint=Constraint("json_schema", bomb))
    with EngineLoop(Engine(model_of(tokenizer), guides=guides, native=True)) as loop:
        gaps: list[float] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                begun = time.perf_counter()
                list(loop.events([loop.add([1], SamplingParams(max_tokens=1))]))
                gaps.append(time.perf_counter() - begun)

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.perf_counter()
        try:
            list(loop.events([loop.add([1], params)]))
        except ConfigError as refused:
            assert "json_schema" in str(refused)
        taken = time.perf_counter() - begun
        stop.set()
        watcher.join()
    assert taken < 12  # 1 s of processor time, on a machine that is busy with other things
    assert sorted(gaps)[len(gaps) // 2] < 0.5


def test_draws_with_a_guide_are_the_same_in_any_batch(guides: Guides, tokenizer: Tokenizer) -> None:
    model, rng = model_of(tokenizer), random.Random(0)
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    prompts = [[rng.randrange(300 if tokenizer.own else 100) for _ in range(rng.randrange(1, 30))] for _ in range(6)]
    params = [SamplingParams(max_tokens=25, seed=i, constraint=constraint if i % 2 else None) for i in range(6)]
    together = Engine(model, native=True, guides=guides, max_batch=4, prefixes=True, step_tokens=5)
    for prompt, one, found in zip(prompts, params, together.complete(prompts, params), strict=True):
        assert Engine(model, native=True, guides=guides, max_batch=1).complete([prompt], [one])[0] == found


def test_an_engine_on_another_device_keeps_to_a_schema_with_the_same_tokens(
    guides: Guides, tokenizer: Tokenizer, twin: str
) -> None:
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    params = [SamplingParams(max_tokens=40, seed=i, constraint=constraint, stop_ids=tokenizer.stops) for i in range(6)]
    found = []
    with sdpa_kernel(SDPBackend.MATH):
        for device in ("cpu", twin):
            model = model_of(tokenizer).to(device)
            engine = Engine(model, weights="float32", guides=guides, max_batch=4, prefixes=True, speculate=3)
            found.append(engine.complete([[1, 2, 3]] * 6, params))
    assert [one.ids for one in found[0]] == [one.ids for one in found[1]]
    ended = [tokenizer.decode_bytes(one.ids, inner=True).decode() for one in found[1] if one.finish == "stop"]
    assert ended and all(map(object_of_the_schema, ended))
