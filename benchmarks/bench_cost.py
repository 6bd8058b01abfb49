"""What a token costs: time of a training step against parameters, context and batch, beside the measured matrix peak.

    python benchmarks/bench_cost.py [--repeats 5] [--dtype bfloat16] [--sizes 1 5 20 100]

The ceiling is measured, not looked up: the fastest of a few large square products in the same precision, in turn with
the steps. A step is everything between two batches: forward, backward, clipping and the optimizer. Its arithmetic is
counted as 6 operations per weight of a matrix product and token, plus causal attention's own products (the half that is
above the diagonal counts as nothing, though part of it is computed); norms, softmaxes and the optimizer count as
nothing, and neither do Muon's iterations, so the fraction says how much of the machine goes into learning.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import get_args

import pairs
import torch

from stateofgpt.model.form import USUAL
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, Dtype, LanguageModelLoss
from stateofgpt.train.optim import OptimConfig

# Millions of parameters -> (width, layers, vocabulary); heads of 64, a feed-forward of three times the width.
SHAPES = {1: (128, 4, 2048), 5: (256, 5, 4096), 20: (384, 8, 8192), 100: (768, 10, 16384)}


@dataclass(frozen=True)
class Point:
    """One measured step."""

    millions: int
    context: int
    rows: int
    muon: bool


def shape(point: Point) -> GPTConfig:
    """The decoder of a point."""
    width, layers, vocab = SHAPES[point.millions]
    return USUAL.shape(width, layers, vocab, point.context)


def operations(config: GPTConfig, rows: int, context: int) -> float:
    """Floating-point operations of a step that learning needs."""
    width, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * width * width + 3 * width * config.intermediate_size) + config.vocab_size * width
    attention = layers * 2 * width * context / 2  # multiply-adds of a token: queries with keys, weights with values
    return 6.0 * rows * context * (weights + attention)


def peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations per second of a large product, the best of a few."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def stepper(point: Point, dtype: Dtype) -> Callable[[], None]:
    """A training step of a point, warmed up."""
    config = shape(point)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, config.vocab_size, (point.rows, point.context + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(point.rows, point.context))
    loss = LanguageModelLoss(dtype, fused=True)
    trainer = Trainer(model, LoopConfig(optim=OptimConfig(use_muon=point.muon)), loss.kernels)

    def step() -> None:
        trainer.step([batch], loss, 1e-3)

    step()
    return step


def main() -> None:
    """Measure all points and print a table in Markdown, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--sizes", type=int, nargs="+", default=sorted(SHAPES), choices=sorted(SHAPES))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    points = [Point(millions, 256, 8, muon) for millions in options.sizes for muon in (False, True)]
    small = min(options.sizes)
    points += [Point(small, context, 2048 // context, True) for context in (64, 1024)]
    points += [Point(small, 256, rows, True) for rows in (1, 2, 32)]
    print("| parameters | context | rows | optimizer | ms a step | us a token | of the peak |\n" + "|---" * 7 + "|")
    rows, peaks = [], []
    for point in points:
        config, step, times = shape(point), stepper(point, options.dtype), []
        for _ in range(options.repeats):
            peaks.append(peak(dtype))
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        seconds, tokens = median(times), point.rows * point.context
        share = operations(config, point.rows, point.context) / seconds / max(peaks)
        n_params = GPT(config).n_params()
        optimizer = "Muon and AdamW" if point.muon else "AdamW"
        print(
            f"| {n_params / 1e6:.1f}M | {point.context} | {point.rows} | {optimizer} | {1e3 * seconds:.0f} | "
            f"{1e6 * seconds / tokens:.0f} | {share:.0%} |",
            flush=True,
        )
        rows.append({**vars(point), "n_params": n_params, "seconds": seconds, "of_peak": share})
    print(f"\nthe peak: {max(peaks) / 1e9:.0f} billion operations a second in {options.dtype}")
    print(json.dumps({"machine": pairs.machine(), "peak": max(peaks), "dtype": options.dtype, "points": rows}))


if __name__ == "__main__":
    main()
