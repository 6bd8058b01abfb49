"""The engine on a GPU: one stream, many rows, prompts, and a ragged load, beside `transformers` on the same GPU.

    python benchmarks/bench_gpu_engine.py [--seconds 480] [--device cuda] [--only bandwidth gate stream load]
    python benchmarks/bench_gpu_engine.py --tiny --device cpu     # does it run at all

Needs no network and no files: models have the shapes of SmolLM2-135M and of a LLaMA of 1.2 billion, and made-up
weights. Prints a line of JSON after each part; a part that fails says so and the next one goes on; when the seconds are
over what is left is skipped, and a run that was cut short says `whole: false`.

`bandwidth`: bytes read and written in a second by a copy of 2 GiB: what a step is held against.
`gate`: in float32 the engine and `generate` draw the same 64 greedy ids, for each of four prompts.
`stream`: tokens per second of 1 and of 64 rows in bfloat16, with CUDA graphs and Triton's kernels, with torch's
operations in the graphs, and with neither; `share` is the bytes of
weights and cache that a step must read, over its time, over the bandwidth. Prompts: tokens read per second, 64 of 512.
`load`: requests with a shared prefix of 128 tokens, 16 to 256 of their own and 8 to 256 to draw. All at once: useful
tokens per second, against padded batches of `generate` (sorted by length) and transformers' continuous batching. As 64
clients who ask again: milliseconds to the first token, median and 99th percentile.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

import pairs
import torch
from twins import llama_of

from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.device import wait
from stateofgpt.model.gpt import GPT, GPTConfig

SMALL = GPTConfig(
    arch="llama", vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    head_dim=64, intermediate_size=1536, max_position_embeddings=1024, rms_norm_eps=1e-5,
)  # fmt: skip
LARGE = GPTConfig(
    arch="llama", vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, intermediate_size=8192, max_position_embeddings=1024, rms_norm_eps=1e-5,
)  # fmt: skip
ROWS, PREFIX, STEP_TOKENS = 64, 128, 4096
PARTS = ("bandwidth", "gate", "stream", "load")


@dataclass(frozen=True)
class Size:
    """How much of everything: all of it, or as little as shows that it runs."""

    shapes: dict[str, GPTConfig]
    rows: int = ROWS
    prompt: int = 128
    long_prompt: int = 512
    tokens: int = 256
    requests: int = 256
    copied: int = 1 << 31  # bytes


TINY = Size(
    {"tiny": replace(SMALL, vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=32, intermediate_size=96)},
    rows=3, prompt=9, long_prompt=20, tokens=6, requests=5, copied=1 << 20,
)  # fmt: skip


class Bench:
    """One run on one device, until its seconds are over."""

    def __init__(self, device: str, seconds: float, size: Size) -> None:
        self.device, self.size = torch.device(device), size
        self.ends = time.perf_counter() + seconds
        self.bandwidth: float | None = None

    @property
    def left(self) -> float:
        return self.ends - time.perf_counter()

    def model(self, config: GPTConfig) -> GPT:
        """Made-up weights, the same every time, made on the device."""
        torch.manual_seed(0)
        with self.device:
            made = GPT(config)
        with torch.no_grad():  # torch's own spread of 1 would make every logit a peak
            made.model.embed_tokens.weight.mul_(0.05)
        return made.eval()

    def peer(self, model: GPT, dtype: torch.dtype) -> Any:
        """The same weights in `transformers`."""
        with self.device:
            made = llama_of(model)
        return made.to(dtype).eval()

    def ids(self, count: int, vocab: int, seed: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(3, vocab) for _ in range(count)]

    # ---- parts ----------------------------------------------------------------------------------------------------

    def parts(self, only: list[str]) -> Iterator[tuple[str, float, Callable[[], dict[str, Any]]]]:
        """Name, the seconds it needs to be worth a beginning, and what does it; what is wanted most comes first."""
        small, *others = self.size.shapes
        if "bandwidth" in only:
            yield "bandwidth", 2, self.measure_bandwidth
        if "gate" in only:
            yield f"gate {small}", 10, lambda: self.gate(small)
        for name in (small, *others):
            if "stream" in only:
                yield f"stream {name}", 20, lambda name=name: self.streams(name)  # type: ignore[misc]
        for name in (small, *others):
            for side in ("ours", "clients", "ours without graphs", "continuous", "static"):
                if "load" in only:
                    yield f"load {name}: {side}", 20, lambda name=name, side=side: self.load(name, side)  # type: ignore[misc]

    def measure_bandwidth(self) -> dict[str, Any]:
        source = torch.zeros(self.size.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = []
        for _ in range(12):
            wait(self.device)
            begun = time.perf_counter()
            target.copy_(source)
            wait(self.device)
            times.append(time.perf_counter() - begun)
        self.bandwidth = 2 * self.size.copied / min(times[2:])
        return {"gb_per_second": round(self.bandwidth / 1e9, 1)}

    def gate(self, name: str) -> dict[str, Any]:
        """How many greedy ids are the same before the first that is not, for each prompt."""
        model = self.model(self.size.shapes[name])
        peer, tokens = self.peer(model, torch.float32), min(64, 4 * self.size.tokens)
        prompts = [self.ids(n, model.config.vocab_size, n) for n in (5, 17, 40, 90)]
        engine = Engine(model, max_batch=4, weights="float32", prefixes=True)
        ours = engine.complete(prompts, SamplingParams(max_tokens=tokens, temperature=0.0))
        same = []
        for prompt, found in zip(prompts, ours, strict=True):
            theirs = self.generate(peer, [prompt], tokens)[0]
            pairs_of_ids = enumerate(zip(found.ids, theirs, strict=True))
            same.append(next((i for i, (a, b) in pairs_of_ids if a != b), tokens))
        return {"tokens": tokens, "same": same, "passed": same == [tokens] * len(prompts)}

    @torch.inference_mode()
    def generate(self, peer: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Greedy ids by `generate` of a padded batch."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        found: list[list[int]] = peer.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        return found

    def streams(self, name: str) -> dict[str, Any]:
        model, found = self.model(self.size.shapes[name]), dict[str, Any]()
        found["parameters"] = model.n_params()
        for rows in (1, self.size.rows):
            for way in ("", " with torch's attention", " with neither"):
                engine = Engine(model, max_batch=rows, graphs=way != " with neither", weights="bfloat16")
                if way and hasattr(engine._decoder, "kernels"):
                    engine._decoder.kernels = None
                found[f"{rows} rows{way}"] = self.stream(engine, rows)
        found["kernels"] = getattr(Engine(model, max_batch=1)._decoder, "kernels", None) is not None
        found["prompts"] = self.prompts(Engine(model, max_batch=self.size.rows, weights="bfloat16"))
        if self.left > 30:
            peer, prompt = self.peer(model, torch.bfloat16), self.ids(self.size.prompt, model.config.vocab_size, 0)
            self.generate(peer, [prompt], 2)
            begun = time.perf_counter()
            self.generate(peer, [prompt], self.size.tokens)
            found["transformers 1 row"] = round(self.size.tokens / (time.perf_counter() - begun), 1)
        return found

    def stream(self, engine: Engine, rows: int) -> dict[str, Any]:
        """The second time that the same rows are drawn: what is recorded is recorded then."""
        config, size, found = engine.model.config, self.size, dict[str, Any]()
        for seed in range(2):
            for row in range(rows):
                prompt = self.ids(size.prompt, config.vocab_size, 1000 * seed + row)
                engine.add(prompt, SamplingParams(max_tokens=size.tokens, temperature=0.0))
            engine.step()
            times = []
            while not engine.idle and self.left > 0:
                begun = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - begun)
            whole, seconds = engine.idle, sum(times)
            for request in list(engine._requests):
                engine.cancel(request)
            if not times:
                return {"whole": False}
            place = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2  # bytes of one
            read = 2 * engine.model.n_params() + rows * (size.prompt + len(times) / 2) * place
            found = {"tokens_per_second": round(rows * len(times) / seconds, 1)}
            found |= {"ms_per_step": round(1e3 * median(times), 3), "whole": whole}
            if self.bandwidth is not None:
                found["share"] = round(read * len(times) / seconds / self.bandwidth, 3)
        return found

    def prompts(self, engine: Engine) -> dict[str, Any]:
        """Tokens of prompts read per second; each also draws one, in a step of all."""
        size, times = self.size, list[float]()
        for seed in range(3):
            for row in range(size.rows):
                prompt = self.ids(size.long_prompt, engine.model.config.vocab_size, 5000 + 1000 * seed + row)
                engine.add(prompt, SamplingParams(max_tokens=1, temperature=0.0))
            wait(self.device)
            begun = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - begun)
        return {"tokens_per_second": round(size.rows * size.long_prompt / min(times[1:]), 1)}

    # ---- the ragged load ------------------------------------------------------------------------------------------

    def asked(self, vocab: int) -> list[tuple[list[int], int]]:
        """Prompts with how many tokens each draws."""
        rng = random.Random(0)
        shared = self.ids(PREFIX, vocab, 1)
        sizes = [(rng.randrange(16, 257), rng.randrange(8, 257)) for _ in range(self.size.requests)]
        return [(shared + [rng.randrange(3, vocab) for _ in range(own)], tokens) for own, tokens in sizes]

    def load(self, name: str, side: str) -> dict[str, Any]:
        model = self.model(self.size.shapes[name])
        asked = self.asked(model.config.vocab_size)
        if side in ("static", "continuous"):
            peer = self.peer(model, torch.bfloat16)
            del model
            return self.static(peer, asked) if side == "static" else self.continuous(peer, asked)
        graphs = side != "ours without graphs"
        at_first = self.size.rows if side == "clients" else len(asked)
        settings = {"graphs": graphs, "weights": "bfloat16", "prefixes": True, "step_tokens": STEP_TOKENS}
        engine = Engine(model, max_batch=self.size.rows, **settings)
        self.ours(engine, asked, at_first)  # what is recorded is recorded here
        engine.refresh()  # and no prefix is known
        return self.ours(engine, asked, at_first)

    def ours(self, engine: Engine, asked: list[tuple[list[int], int]], at_first: int) -> dict[str, Any]:
        """`at_first` requests, and one more for each that is done."""
        left, since, firsts, drawn = iter(asked), dict[int, float](), list[float](), 0
        begun = time.perf_counter()

        def ask() -> None:
            if (one := next(left, None)) is not None:
                since[engine.add(one[0], SamplingParams(max_tokens=one[1], temperature=0.0))] = time.perf_counter()

        for _ in range(at_first):
            ask()
        while not engine.idle and self.left > 0:
            for event in engine.step():
                drawn += 1
                if event.request in since:
                    firsts.append(time.perf_counter() - since.pop(event.request))
                if event.finish:
                    ask()
        seconds, whole = time.perf_counter() - begun, engine.idle
        for request in list(engine._requests):
            engine.cancel(request)
        return {"tokens_per_second": round(drawn / seconds, 1), "first_ms": milliseconds(firsts), "whole": whole}

    def static(self, peer: Any, asked: list[tuple[list[int], int]]) -> dict[str, Any]:
        """Padded batches, the longest answers together; only wanted tokens count."""
        order, rows = sorted(asked, key=lambda one: one[1]), self.size.rows
        self.generate(peer, [prompt for prompt, _ in order[:rows]], 2)
        begun, drawn, whole = time.perf_counter(), 0, True
        for start in range(0, len(order), rows):
            if self.left < 0:
                whole = False
                break
            batch = order[start : start + rows]
            self.generate(peer, [prompt for prompt, _ in batch], max(tokens for _, tokens in batch))
            drawn += sum(tokens for _, tokens in batch)
        return {"tokens_per_second": round(drawn / (time.perf_counter() - begun), 1), "whole": whole}

    def continuous(self, peer: Any, asked: list[tuple[list[int], int]]) -> dict[str, Any]:
        """transformers' own continuous batching with its own settings, or, where those need what is not here, without
        its flash attention; the second time, when it has warmed up."""
        from transformers import ContinuousBatchingConfig

        small = {"page_size": 64, "num_blocks": 10 * self.size.rows, "max_batch_tokens": 512}
        ways: list[dict[str, Any]] = [{}, {"auto_switch_to_flash": False}] if self.device.type == "cuda" else [small]
        for number, way in enumerate(ways):
            try:
                return self.managed(peer, asked, ContinuousBatchingConfig(**way))
            except Exception as error:
                if number == len(ways) - 1:
                    raise
                tell({"part": "continuous", "again_without_flash": f"{type(error).__name__}: {error}"[:300]})
        raise AssertionError

    def managed(self, peer: Any, asked: list[tuple[list[int], int]], settings: Any) -> dict[str, Any]:
        from transformers import GenerationConfig

        found = dict[str, Any]()
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
        with peer.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=settings
        ) as manager:
            for _ in range(2):
                begun, since, firsts = time.perf_counter(), dict[str, float](), list[float]()
                for prompt, tokens in asked:
                    since[manager.add_request(prompt, max_new_tokens=tokens, streaming=True)] = time.perf_counter()
                drawn = done = 0
                while done < len(asked) and self.left > 0:
                    result = manager.get_result(timeout=5)
                    if result is None:
                        continue
                    if result.generated_tokens and result.request_id in since:
                        firsts.append(time.perf_counter() - since.pop(result.request_id))
                    if result.is_finished():
                        done, drawn = done + 1, drawn + len(result.generated_tokens)
                rate = round(drawn / (time.perf_counter() - begun), 1)
                found = {"tokens_per_second": rate, "first_ms": milliseconds(firsts), "whole": done == len(asked)}
        return found


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    if len(seconds) < 2:
        return {}
    return {"p50": round(1e3 * median(seconds), 2), "p99": round(1e3 * quantiles(seconds, n=100)[98], 2)}


def tell(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def about(device: torch.device) -> dict[str, Any]:
    """The machine, and the versions that matter."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"part": "machine", "device": name, "cuda": torch.version.cuda, **pairs.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    size = TINY if options.tiny else Size({"135M": SMALL, "1.2B": LARGE})
    bench = Bench(options.device, options.seconds, size)
    tell(about(bench.device))
    for name, needs, part in bench.parts(options.only):
        if bench.left < needs:
            tell({"part": name, "skipped": f"{bench.left:.0f} s are left"})
            continue
        begun = time.perf_counter()
        try:
            found = part()
        except Exception as error:  # the next part may be well
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        tell({"part": name, **found, "seconds": round(time.perf_counter() - begun, 1)})


if __name__ == "__main__":
    main()
