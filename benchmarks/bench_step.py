"""Steps per second at equal mathematics: one LLaMA shape, one batch, one optimizer family, ours against transformers.

    python benchmarks/bench_step.py [--pairs 5] [--shapes small medium wide] [--only float32]

Gate first: with the same weights in float32 both losses and all gradients agree to 1e-4. Then whole training steps
(forward, backward, clipping, AdamW) in turn: both in float32; and each side's best, which for transformers is the
fastest of float32 and bfloat16, plain and compiled, with torch's fused AdamW. Compiling is not counted here. Each way
runs in a process of its own, as it would alone, so that nothing one side sets (how it keeps memory, say) helps the
other; only one of them computes at a time. Told too is the greatest ratio that there could be: that of a step which is
nothing but its matrix products at the measured speed of large ones (`bench_cost.py` says what is counted).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import pairs
import torch
from bench_cost import operations, peak
from transformers import LlamaForCausalLM
from twins import llama_of, stir

from stateofgpt.model.form import Form
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, Dtype, LanguageModelLoss
from stateofgpt.train.optim import OptimConfig


@dataclass(frozen=True)
class Shape:
    """One model and one batch; heads of 64, a feed-forward of three times the width."""

    width: int
    layers: int
    vocab: int
    context: int
    rows: int


SHAPES = {
    "least": Shape(64, 2, 2048, 256, 8),
    "small": Shape(128, 4, 512, 64, 12),
    "medium": Shape(256, 6, 4096, 256, 8),
    "wide": Shape(384, 6, 8192, 256, 8),
    "open": Shape(256, 6, 49152, 256, 8),
}


@dataclass(frozen=True)
class Way:
    """One side in one precision."""

    side: str
    dtype: Dtype
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.side} {self.dtype}{' compiled' if self.compiled else ''}"


OURS = (Way("ours", "float32"), Way("ours", "bfloat16"))
PEERS = tuple(Way("transformers", dtype, compiled) for dtype in ("float32", "bfloat16") for compiled in (False, True))


def config_of(shape: Shape) -> GPTConfig:
    """The LLaMA shape that both sides have."""
    return Form(arch="llama").shape(shape.width, shape.layers, shape.vocab, shape.context)


def batch_of(shape: Shape) -> Batch:
    """Random tokens: the time does not depend on them."""
    ids = torch.randint(0, shape.vocab, (shape.rows, shape.context + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(shape.rows, shape.context))


def peer_loss(model: Any, batch: Batch, dtype: str) -> torch.Tensor:
    """Mean cross-entropy by transformers."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(batch.ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def peer_step(model: LlamaForCausalLM, batch: Batch, dtype: str, compiled: bool) -> Callable[[], None]:
    """One training step of the peer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    forward = torch.compile(peer_loss, dynamic=False) if compiled else peer_loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(model, batch, dtype).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def our_step(model: GPT, batch: Batch, dtype: Dtype) -> Callable[[], None]:
    """One training step of ours, with AdamW for everything, as the peer has it."""
    loss = LanguageModelLoss(dtype, fused=True)
    trainer = Trainer(model, LoopConfig(optim=OptimConfig(lr=1e-4, weight_decay=0.1, use_muon=False)), loss.kernels)
    return lambda: trainer.step([batch], loss, 1.0) and None


def gate(config: GPTConfig, batch: Batch) -> None:
    """Same weights, same numbers: loss and every gradient."""
    mine = GPT(config)
    mine.init_weights(torch.Generator().manual_seed(0))
    stir(mine, 0.02)
    theirs = llama_of(mine, use_cache=False)
    loss = LanguageModelLoss(fused=True)(mine, batch) / batch.weight
    expected = peer_loss(theirs, batch, "float32")
    loss.backward()
    expected.backward()
    wanted = dict(theirs.named_parameters())
    worst = max(
        float((p.grad - wanted[n].grad).norm() / wanted[n].grad.norm())  # type: ignore[operator,union-attr]
        for n, p in mine.named_parameters()
    )
    print(f"gate: loss {loss.item():.6f} and {expected.item():.6f}, gradients at most {worst:.1e} apart", flush=True)
    if abs(loss.item() - expected.item()) > 1e-4 or worst > 1e-4:
        raise SystemExit("the two sides do not compute the same")


def step_of(shape: Shape, way: Way) -> Callable[[], None]:
    """A training step of one way, on the weights that all ways start from."""
    start = GPT(config_of(shape))
    start.init_weights(torch.Generator().manual_seed(0))
    batch = batch_of(shape)
    if way.side == "ours":
        return our_step(start, batch, way.dtype)
    return peer_step(llama_of(start, use_cache=False), batch, way.dtype, way.compiled)


def serve(shape: Shape, way: Way) -> None:
    """Time steps whenever a line asks for it: `n` -> seconds of each of n steps, on average."""
    step = step_of(shape, way)
    step()
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print((time.perf_counter() - start) / int(line), flush=True)


class Process:
    """A way in a process of its own, silent until it is asked."""

    def __init__(self, shape: str, way: Way) -> None:
        asked = [sys.executable, __file__, "--serve", shape, way.side, way.dtype, str(int(way.compiled))]
        self.process = subprocess.Popen(asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            raise SystemExit(f"{way} did not start")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def seconds(self, n: int) -> float:
        """Mean seconds of n steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return float(self._line())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def compare(mine: Process, theirs: Process, n_pairs: int) -> list[float]:
    """Ratios of the peer's seconds to ours, pair by pair; each measures for about two seconds."""
    n_mine, n_theirs = (max(3, round(2.0 / side.seconds(3))) for side in (mine, theirs))
    return [theirs.seconds(n_theirs) / mine.seconds(n_mine) for _ in range(n_pairs)]


def rates_of(processes: dict[Way, Process]) -> dict[Way, float]:
    """Median seconds of a step of each way, over five rounds in which each works for a second in turn."""
    steps = {way: max(3, round(1.0 / process.seconds(3))) for way, process in processes.items()}
    rounds = [{way: process.seconds(steps[way]) for way, process in processes.items()} for _ in range(5)]
    return {way: median(found[way] for found in rounds) for way in processes}


def measure(name: str, n_pairs: int, alone: bool) -> dict[str, Any]:
    """Gate, pairs in float32, pairs of each side's best; `alone`: the first two."""
    gate(config_of(SHAPES[name]), batch_of(SHAPES[name]))
    with ExitStack() as stack:
        ways = (OURS[0], PEERS[0]) if alone else (*OURS, *PEERS)
        processes = {way: stack.enter_context(Process(name, way)) for way in ways}
        equal = compare(processes[OURS[0]], processes[PEERS[0]], n_pairs)
        print(f"{name}, float32: {pairs.spread(equal)} times the steps per second", flush=True)
        if alone:
            return {"float32": median(equal)}
        rates = rates_of(processes)
        mine, best = (min(ways, key=lambda way: rates[way]) for ways in (OURS, PEERS))
        each_best = compare(processes[mine], processes[best], n_pairs)
    print(f"{name}, best: {pairs.spread(each_best)} times the steps per second ({mine}; {best})", flush=True)
    work = operations(config_of(SHAPES[name]), SHAPES[name].rows, SHAPES[name].context)
    products = {way: work / peak(getattr(torch, way.dtype)) for way in OURS}
    most = {"float32": rates[PEERS[0]] / products[OURS[0]], "best": rates[best] / min(products.values())}
    print(f"{name}, possible at most: {most['float32']:.2f} and {most['best']:.2f} times", flush=True)
    milliseconds = {str(way): round(1e3 * value, 1) for way, value in rates.items()}
    return {"float32": median(equal), "best": median(each_best), "most": most, "milliseconds": milliseconds}


def main() -> None:
    """Every shape asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--only", choices=["float32"], help="leave out each side's best")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, side, dtype, compiled = options.serve
        serve(SHAPES[name], Way(side, dtype, compiled == "1"))
        return
    for name in options.shapes:
        result = measure(name, options.pairs, options.only is not None)
        print(json.dumps({"machine": pairs.machine(), "name": name, "shape": vars(SHAPES[name]), **result}), flush=True)


if __name__ == "__main__":
    main()
