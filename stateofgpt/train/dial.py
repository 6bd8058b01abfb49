"""The minutes dial: measures this machine, and picks precision, compilation and model size for a time budget.

Owns the trials and the choice. What it returns is decided once per run and stored by the caller. Knows no stage.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from shutil import which
from statistics import median

import torch

from stateofgpt.errors import ConfigError
from stateofgpt.model.device import CPU, in_order, wait
from stateofgpt.model.form import USUAL, Form
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train import kernels
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, Dtype, LanguageModelLoss
from stateofgpt.train.scaling import EPOCH, Law

SHAPES = (  # width, layers
    (64, 2), (128, 2), (128, 4), (192, 5), (256, 6), (320, 7), (384, 8), (512, 8), (640, 10), (768, 12),
)  # fmt: skip
COMPILE_GAIN = 2.0  # compiled against eager steps, measured at widths 128-192 on two AMX cores
COMPILE_SECONDS = 15.0
DTYPES: tuple[Dtype, Dtype] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Choice:
    """What to train: a shape, a precision, and a way (fused, compiled or plain), with the rates (tokens per second)
    behind it."""

    config: GPTConfig
    dtype: Dtype
    compiled: bool
    fused: bool
    rates: dict[str, float]


def shape(width: int, layers: int, vocab_size: int, context: int) -> GPTConfig:
    """The default architecture at one size."""
    return USUAL.shape(width, layers, vocab_size, context)


def measure_rate(
    config: GPTConfig, dtype: Dtype, *, rows: int, context: int, repeats: int = 2, fused: bool = False
) -> float:
    """Training tokens per second of a forward and backward pass, not compiled, on rows x context random tokens."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(config)
    model.init_weights(generator)
    ids = torch.randint(0, config.vocab_size, (rows, context + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, context))
    loss = LanguageModelLoss(dtype, fused=fused)
    seconds = timed_steps(lambda: loss(model, batch), model, repeats)
    return rows * context / seconds


def measure_step(
    config: GPTConfig,
    dtype: Dtype,
    *,
    rows: int,
    context: int,
    repeats: int = 3,
    fused: bool = False,
    device: str = CPU,
) -> float:
    """Median seconds of a whole training step, the optimizer's part included, not compiled, on random tokens."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(config)
    model.init_weights(generator)
    model.to(device)
    loss = LanguageModelLoss(dtype, fused=fused, device=device)
    trainer = Trainer(model, LoopConfig(), loss.kernels)
    ids = torch.randint(0, config.vocab_size, (rows, context + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, context))
    times = []
    for _ in range(repeats + 1):  # the first also allocates
        start = time.perf_counter()
        trainer.step([batch], loss, 0.0)
        wait(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def timed_steps(
    loss: Callable[[], torch.Tensor],
    model: torch.nn.Module,
    repeats: int,
    within: float = math.inf,
    exact: bool = True,
) -> float:
    """Median seconds of forward and backward, after one pass that is not counted; leaves no gradient behind.

    No repetition begins after `within` seconds, but one is always made.
    """
    times: list[float] = []
    device = next(model.parameters()).device
    while len(times) < 2 or (len(times) <= repeats and sum(times) < within):
        start = time.perf_counter()
        with in_order(device, exact):  # as a step does
            loss().backward()
        wait(device)
        times.append(time.perf_counter() - start)
        for p in model.parameters():
            p.grad = None
    return median(times[1:])


def choose_way(vocab_size: int, context: int, form: Form = USUAL) -> tuple[Dtype, bool]:
    """The fastest precision on this machine, and whether the fused kernels are; trials on a small model."""
    width = next((width for width in (192, *(w for w, _ in SHAPES)) if not form.misfit(width)), 192)
    trial = form.shape(width, 2, vocab_size, context)
    fusible = can_fuse() and not form.has_biases
    ways = [(dtype, fused) for dtype in DTYPES for fused in (False, True) if not fused or fusible]
    rates = {way: measure_rate(trial, way[0], rows=8, context=context, fused=way[1]) for way in ways}
    return max(ways, key=lambda way: rates[way])


def fastest_dtype(vocab_size: int, context: int, *, fused: bool) -> Dtype:
    """The fastest precision on this machine for one way of training; trials on a small model."""
    trial = shape(192, 2, vocab_size, context)
    rates = {dtype: measure_rate(trial, dtype, rows=8, context=context, fused=fused) for dtype in DTYPES}
    return max(DTYPES, key=lambda dtype: rates[dtype])


def can_fuse() -> bool:
    """Whether the fused kernels run on this machine."""
    return kernels.load() is not None


def can_compile() -> bool:
    """Whether torch.compile has the C++ compiler that it needs on a CPU."""
    return sys.platform != "win32" and any(which(name) for name in ("g++", "clang++", "c++"))


def tokens_within(seconds: float, rate: float, compiled: bool) -> float:
    """Tokens that `seconds` of training are good for, from the rate of an eager trial; compiling costs and gains."""
    return max(1.0, rate * ((seconds - COMPILE_SECONDS) * COMPILE_GAIN if compiled else seconds))


def shapes_of(shapes: Sequence[tuple[int, int]], form: Form, fewest_layers: int) -> list[tuple[int, int]]:
    """Those (width, layers) that this form has and that are deep enough. ConfigError where there are none."""
    fitting = [(width, layers) for width, layers in shapes if not form.misfit(width)]
    if not fitting:
        raise ConfigError(f"{form.misfit(shapes[0][0])}; so it is with every width the dial knows")
    deep = [(width, layers) for width, layers in fitting if layers >= fewest_layers]
    if not deep:
        raise ConfigError(f"fewest_layers is {fewest_layers}, and the dial knows none deeper than {fitting[-1][1]}")
    return deep


def choose(
    vocab_size: int,
    context: int,
    seconds: float,
    *,
    rows: int,
    law: Law = EPOCH,
    form: Form = USUAL,
    fewest_layers: int = 1,
) -> Choice:
    """The shape of this form, of no fewer layers, with the lowest predicted loss after `seconds` of training here.

    Each shape's rate is measured by a short trial until one is clearly worse than the best so far; the loss is
    that of `law` (Chinchilla's with Epoch AI's constants, arXiv 2404.10102, where no other is measured) at the tokens
    that the rate allows. Where the fused pass does not know the form, its kernels still serve the optimizer.
    """
    deep = shapes_of(SHAPES, form, fewest_layers)
    dtype, fused = choose_way(vocab_size, context, form)
    compiled = not fused and can_compile() and seconds > 3 * COMPILE_SECONDS
    rates: dict[str, float] = {}
    best: tuple[float, GPTConfig] | None = None
    for width, layers in deep:
        config = form.shape(width, layers, vocab_size, context)
        rate = measure_rate(config, dtype, rows=min(rows, 8), context=context, fused=fused)
        rates[f"{width}x{layers}"] = round(rate, 1)
        loss = law.loss(GPT(config).n_params(), tokens_within(seconds, rate, compiled))
        if best is not None and loss > best[0] * 1.02:
            break
        if best is None or loss < best[0]:
            best = (loss, config)
    assert best is not None
    kernels_left = form.has_biases and can_fuse() and not compiled
    return Choice(best[1], dtype, compiled, fused or kernels_left, rates)


def peak_memory_bytes() -> int:
    """The most memory this process, or the largest of its finished children, ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return unit * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
