"""The engine against `transformers`: one stream, and a ragged load. (`bench_llama_cpp.py` has the other peer.)

    python benchmarks/bench_engine.py single [--model FOLDER | --width 320 --layers 6 --vocab 8192] [--pairs 5]
    python benchmarks/bench_engine.py quality --model FOLDER --text FILE [--tokens 4096]
    python benchmarks/bench_engine.py load   [--model FOLDER | ...] [--requests 256] [--pairs 3]

`single`: one prompt continued greedily, tokens per second from the first drawn to the last. Gate first: in float32 both
sides draw the same ids. Then the engine in float32, bfloat16 and int8 weights, with and without guesses, against
`generate` in float32 and bfloat16 (static cache and compilation are not counted in its favour or against it: eager is
what a CPU user gets).

`load`: requests with a shared prefix of 128 tokens, prompts of 16 to 256 tokens behind it and 8 to 256 to draw, all
there at once; useful tokens per second until the last is done. The peers are `generate` in padded batches (sorted by
length, each batch as long as its longest answer) and transformers' own continuous batching. --sides says who runs: the
torch path and continuous batching take minutes. The side `http` is the same load sent by as many clients as there are
rows to `sog serve`, each asking again when it was answered (`http-cache`: with its cache in bfloat16, `http-int8`: its
weights in int8 as well), beside `served`: the engine with the server's settings, fed in the same way without a server.
They tell the milliseconds to the first token, and what the server adds per token.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import http_load
import pairs
import torch
from transformers import GenerationConfig, LlamaForCausalLM
from twins import llama_of, stir

from stateofgpt.infer.decoders import CachePrecision, Precision
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import load_model
from stateofgpt.model.form import Form
from stateofgpt.model.gpt import GPT
from stateofgpt.serve.loader import STEP_TOKENS

Side = Callable[[], dict[str, Any]]
PREFIX = 128
LOAD_SIDES = ("ours", "bfloat16", "static", "cache", "int8", "torch", "continuous", "served", "http", "http-cache")
FASTEST = ("http-int8", "static-bfloat16")  # each side's fastest precision


def models(options: argparse.Namespace) -> tuple[GPT, LlamaForCausalLM]:
    """The same weights on both sides: of a folder of the LLaMA family, or made up."""
    if options.model:
        peer = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        return load_model(Path(options.model)).eval(), peer.eval()
    model = GPT(Form(arch="llama").shape(options.width, options.layers, options.vocab, 1024))
    model.init_weights(torch.Generator().manual_seed(0))
    stir(model)
    peer = llama_of(model)
    return model.eval(), peer.eval()


# ---- one stream


def prompt_of(options: argparse.Namespace, model: GPT) -> list[int]:
    """The ids that one stream continues: words of a folder's tokenizer, or made up."""
    if options.text:
        from stateofgpt.text.tokenizer import Tokenizer

        return Tokenizer.load(options.model).encode(options.text)
    rng = random.Random(0)
    return [rng.randrange(3, model.config.vocab_size) for _ in range(options.prompt)]


def gate(ours: Side, theirs: Side) -> None:
    """Both sides must draw the same ids; SystemExit where they part before the middle."""
    pairs_of_ids = list(zip(ours()["ids"], theirs()["ids"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs_of_ids) if a != b), len(pairs_of_ids))
    print(f"gate: the first {same} of {len(pairs_of_ids)} ids are the same", flush=True)
    if same < len(pairs_of_ids) // 2:
        raise SystemExit("the two sides do not draw the same ids; nothing is compared")


def ours_single(engine: Engine, prompt: list[int], tokens: int) -> Side:
    """Greedy tokens of the engine."""

    def run() -> dict[str, Any]:
        request = engine.add(prompt, SamplingParams(max_tokens=tokens, temperature=0.0))
        ids: list[int] = []
        begun = 0.0
        while engine.unfinished(request):
            ids += [event.token for event in engine.step()]
            begun = begun or time.perf_counter()
        return {"ids": ids, "rate": (len(ids) - 1) / (time.perf_counter() - begun)}

    return run


class _First:
    """Takes the time of the first token, as `generate` calls a streamer."""

    def __init__(self) -> None:
        self.calls, self.begun = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1  # the prompt comes first
        self.begun = self.begun or (time.perf_counter() if self.calls == 2 else 0.0)

    def end(self) -> None: ...


@torch.inference_mode()
def theirs_single(peer: LlamaForCausalLM, prompt: list[int], tokens: int) -> Side:
    """Greedy tokens of `generate`."""
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    def run() -> dict[str, Any]:
        first = _First()
        found = peer.generate(torch.tensor([prompt]), generation_config=config, streamer=first)  # type: ignore[arg-type]
        ids = found[0, len(prompt) :].tolist()
        return {"ids": ids, "rate": (len(ids) - 1) / (time.perf_counter() - first.begun)}

    return run


def single(options: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, the first ratio to `generate` in float32, the second to its faster precision."""
    model, peer = models(options)
    prompt = prompt_of(options, model)
    sides: dict[str, Side] = {
        "ours float32": ours_single(Engine(model, max_batch=1, native=True), prompt, options.tokens),
        "transformers float32": theirs_single(peer, prompt, options.tokens),
    }
    gate(*sides.values())
    sides["ours torch float32"] = ours_single(Engine(model, max_batch=1), prompt, options.tokens)
    for weights in ("bfloat16", "int8"):
        engine = Engine(model, max_batch=1, native=True, weights=weights)
        sides[f"ours {weights}"] = ours_single(engine, prompt, options.tokens)
    guessing = Engine(model, max_batch=1, native=True, speculate=6)
    sides["ours float32 with guesses"] = ours_single(guessing, prompt, options.tokens)
    if options.bfloat16:
        half = type(peer)(peer.config)
        half.load_state_dict(peer.state_dict())
        sides["transformers bfloat16"] = theirs_single(half.to(torch.bfloat16).eval(), prompt, options.tokens)
    return compared(sides, options.pairs, ["transformers float32"])


# ---- what rounded weights cost


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Nats per token of a text, and how often the most likely token is another one, for each precision of weights."""
    from stateofgpt.text.tokenizer import Tokenizer

    model = load_model(Path(options.model)).eval()
    ids = Tokenizer.load(options.model).encode(Path(options.text).read_text())[: options.tokens]
    rows = rows_of(ids)
    exact = list(logits_of(model, rows, "float32"))
    found = {
        weights: differing(rows, exact, logits_of(model, rows, weights)) for weights in ("float32", "bfloat16", "int8")
    }
    found["float32, cache bfloat16"] = differing(rows, exact, logits_of(model, rows, "float32", "bfloat16"))
    return {"tokens": len(ids), "weights": found}


def rows_of(ids: list[int]) -> list[list[int]]:
    """A text in parts, each read from its beginning."""
    return [ids[i : i + 512] for i in range(0, len(ids) - 1, 512)]


def logits_of(
    model: GPT, rows: list[list[int]], weights: Precision, cache: CachePrecision = "float32"
) -> Iterator[torch.Tensor]:
    """The logits after each token of each row, by the engine's own pass."""
    decoder = Engine(model, max_batch=1, max_context=512, native=True, weights=weights, cache=cache)._decoder
    for row in rows:
        yield decoder.verify([row], [0], [list(range(32))])  # type: ignore[union-attr]


def differing(rows: list[list[int]], exact: Iterable[torch.Tensor], found: Iterable[torch.Tensor]) -> dict[str, float]:
    """Nats per token of the text, how far the distributions are from the exact ones (Kullback and Leibler, nats per
    token), and how often the most likely token is another one."""
    nats = apart = changed = 0.0
    for row, one, other in zip(rows, exact, found, strict=True):
        p, q = one[:-1].double().log_softmax(-1), other[:-1].double().log_softmax(-1)
        nats -= float(q.gather(1, torch.tensor(row[1:])[:, None]).sum())
        apart += float((p.exp() * (p - q)).sum())
        changed += float((p.argmax(-1) != q.argmax(-1)).sum())
    count = sum(len(row) - 1 for row in rows)
    return {"nats_per_token": nats / count, "apart": apart / count, "other_argmax": changed / count}


# ---- ragged load


def requests(count: int, vocab: int) -> list[tuple[list[int], int]]:
    """Prompts with how many tokens each draws."""
    rng = random.Random(0)
    shared = [rng.randrange(3, vocab) for _ in range(PREFIX)]
    asked = [(rng.randrange(16, 257), rng.randrange(8, 257)) for _ in range(count)]
    return [(shared + [rng.randrange(3, vocab) for _ in range(own)], tokens) for own, tokens in asked]


def ours_load(model: GPT, asked: list[tuple[list[int], int]], rows: int, **settings: Any) -> Side:
    """All requests through one engine; a new one each time, so that no prefix is found from the run before."""

    def run() -> dict[str, Any]:
        engine = Engine(model, max_batch=rows, **settings)
        begun = time.perf_counter()
        for prompt, tokens in asked:
            engine.add(prompt, SamplingParams(max_tokens=tokens, temperature=0.0))
        drawn = 0
        while not engine.idle:
            drawn += len(engine.step())
        assert drawn == sum(tokens for _, tokens in asked)
        return {"rate": drawn / (time.perf_counter() - begun)}

    return run


def served_load(model: GPT, asked: list[tuple[list[int], int]], rows: int, firsts: list[Any]) -> Side:
    """As a server's clients come: `rows` at first, and one more for each that is done."""

    def run() -> dict[str, Any]:
        engine = Engine(model, max_batch=rows, native=True, prefixes=True, step_tokens=STEP_TOKENS)
        begun, left, since, taken = time.perf_counter(), iter(asked), {}, []

        def ask() -> None:
            if (one := next(left, None)) is not None:
                since[engine.add(one[0], SamplingParams(max_tokens=one[1], temperature=0.0))] = time.perf_counter()

        for _ in range(rows):
            ask()
        drawn = 0
        while not engine.idle:
            for event in engine.step():
                drawn += 1
                if event.request in since:
                    taken.append(time.perf_counter() - since.pop(event.request))
                if event.finish:
                    ask()
        firsts.append(http_load.milliseconds(taken))
        return {"rate": drawn / (time.perf_counter() - begun)}

    return run


def http_side(port: int, asked: list[tuple[list[int], int]], rows: int, firsts: list[Any]) -> Side:
    """The same by way of a server."""

    def run() -> dict[str, Any]:
        found = asyncio.run(http_load.load(port, asked, rows))
        firsts.append(found["first_ms"])
        if found["drawn"] != sum(tokens for _, tokens in asked):
            print(f"http drew {found['drawn']} tokens: some answers ended early", flush=True)
        return found

    return run


def static_load(peer: LlamaForCausalLM, asked: list[tuple[list[int], int]], rows: int) -> Side:
    """Padded batches, the longest answers together; only wanted tokens count."""

    @torch.inference_mode()
    def run() -> dict[str, Any]:
        begun = time.perf_counter()
        order = sorted(asked, key=lambda one: one[1])
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            width, longest = max(len(p) for p, _ in batch), max(n for _, n in batch)
            ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch])
            config = GenerationConfig(
                max_new_tokens=longest, min_new_tokens=longest, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            peer.generate(ids, attention_mask=mask, generation_config=config)
        return {"rate": sum(n for _, n in asked) / (time.perf_counter() - begun)}

    return run


def narrow(peer: LlamaForCausalLM, sides: Sequence[str]) -> LlamaForCausalLM:
    """The peer in bfloat16, where that is asked for."""
    return copy.deepcopy(peer).bfloat16() if "static-bfloat16" in sides else peer


def continuous_load(peer: LlamaForCausalLM, asked: list[tuple[list[int], int]], rows: int) -> Side:
    """transformers' own continuous batching; each request has its own length."""
    from transformers import ContinuousBatchingConfig

    def run() -> dict[str, Any]:
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
        # room for `rows` of the longest requests, in pages of which the shared prefix fills two
        cache = ContinuousBatchingConfig(page_size=64, num_blocks=10 * rows, max_batch_tokens=512)
        begun = time.perf_counter()
        with peer.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=cache, warmup=False
        ) as manager:
            for prompt, tokens in asked:
                manager.add_request(prompt, max_new_tokens=tokens)
            drawn, done = 0, 0
            while done < len(asked):
                result = manager.get_result(timeout=120)
                if result is None:
                    raise RuntimeError("no result for two minutes")
                if result.is_finished():
                    done, drawn = done + 1, drawn + len(result.generated_tokens)
        if drawn != sum(tokens for _, tokens in asked):
            raise RuntimeError(f"it drew {drawn} tokens")
        return {"rate": drawn / (time.perf_counter() - begun)}

    return run


def load(options: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn."""
    model, peer = models(options)
    asked = requests(options.requests, model.config.vocab_size)
    settings = {"native": True, "prefixes": True, "step_tokens": 512}
    sides: dict[str, Side] = {
        "ours": ours_load(model, asked, options.rows, **settings),
        "bfloat16": ours_load(model, asked, options.rows, weights="bfloat16", **settings),
        "int8": ours_load(model, asked, options.rows, weights="int8", **settings),
        "cache": ours_load(model, asked, options.rows, cache="bfloat16", **settings),
        "torch": ours_load(model, asked, options.rows),
        "static": static_load(peer, asked, options.rows),
        "static-bfloat16": static_load(narrow(peer, options.sides), asked, options.rows),
        "continuous": continuous_load(peer, asked, options.rows),
    }
    firsts: dict[str, list[Any]] = {name: [] for name in ("served", "http", "http-cache", "http-int8")}
    sides["served"] = served_load(model, asked, options.rows, firsts["served"])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        cache = ("--cache", "bfloat16")
        for name, extra in (("http", ()), ("http-cache", cache), ("http-int8", (*cache, "--weights", "int8"))):
            if name in options.sides:
                if not folder.exists():
                    http_load.write_folder(folder, model)
                port = stack.enter_context(http_load.server(folder, options.rows, *extra))
                sides[name] = http_side(port, asked, options.rows, firsts[name])
        sides = {name: sides[name] for name in options.sides}
        found = compared(sides, options.pairs, ["static", "static-bfloat16", "continuous", "served"])
    rates = found["tokens_per_second"]
    if "http" in rates and "served" in rates:
        found["server_us_per_token"] = round(1e6 / rates["http"] - 1e6 / rates["served"], 1)
    return {"requests": len(asked), **found, "first_ms": {name: each for name, each in firsts.items() if each}}


def measured(sides: dict[str, Side], rounds: int, key: str) -> dict[str, list[float]]:
    """Every side once in each round; what each gave, without those that failed. Ours must not fail."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            try:
                found[name].append(float(side()[key]))
                print(f"{name}: {found[name][-1]:.1f} tokens/s", flush=True)
            except Exception as error:  # a peer that cannot do it here must not hide the others
                if name not in ("static", "static-bfloat16", "continuous") and not name.startswith(
                    ("transformers", "llama.cpp")
                ):
                    raise
                print(f"{name} failed: {error!r}"[:300], flush=True)
        print(f"round {number + 1} of {rounds} is done", flush=True)
    return {name: values for name, values in found.items() if len(values) == rounds}


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median of the ratios round by round, with the least and the most."""
    return pairs.spread([a / b for a, b in zip(ours, theirs, strict=True)])


def compared(sides: dict[str, Side], rounds: int, peers: Sequence[str]) -> dict[str, Any]:
    """Every side in each round; medians of tokens per second, and the ratios to each of the `peers` that ran."""
    done = measured(sides, rounds, "rate")
    found: dict[str, Any] = {"tokens_per_second": {name: median(values) for name, values in done.items()}}
    for peer in (name for name in peers if name in done):
        found[f"ratio_to_{peer}"] = {name: ratio(values, done[peer]) for name, values in done.items() if name != peer}
    return found


def shape_options(parser: argparse.ArgumentParser) -> None:
    """What `models` and `prompt_of` read."""
    parser.add_argument("--model", help="a folder of the LLaMA family")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt of one stream")
    parser.add_argument("--text", help="a prompt in words, for a folder's tokenizer; for `quality` a file")
    parser.add_argument("--tokens", type=int, default=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("single", "load", "quality"))
    shape_options(parser)
    parser.add_argument("--bfloat16", action="store_true", help="transformers in bfloat16, too")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32, help="requests at once")
    parser.add_argument("--sides", nargs="+", choices=(*LOAD_SIDES, *FASTEST), default=LOAD_SIDES[:3], help="of a load")
    options = parser.parse_args()
    result = {"single": single, "load": load, "quality": quality}[options.what](options)
    print(json.dumps({"what": options.what, **result, **pairs.machine()}))


if __name__ == "__main__":
    main()
