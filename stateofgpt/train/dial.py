"""The minutes dial: measures this machine, and picks precision, compilation and model size for a time budget.

Owns the trials and the choice. What it returns is decided once per run and stored by the caller. Knows no stage.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from shutil import which
from statistics import median

import torch

from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, Dtype, LanguageModelLoss
from stateofgpt.train.scaling import EPOCH, Law

SHAPES = ((128, 4), (192, 5), (256, 6), (320, 7), (384, 8), (512, 8), (640, 10), (768, 12))  # width, layers
COMPILE_GAIN = 2.0  # compiled against eager steps, measured at widths 128-192 on two AMX cores
COMPILE_SECONDS = 15.0
HEAD_DIM = 64
DTYPES: tuple[Dtype, Dtype] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Choice:
    """What to train: a shape, a precision, and whether to compile, with the rates (tokens per second) behind it."""

    config: GPTConfig
    dtype: Dtype
    compiled: bool
    rates: dict[str, float]


def shape(width: int, layers: int, vocab_size: int, context: int) -> GPTConfig:
    """The default architecture at one size."""
    heads = width // HEAD_DIM
    return GPTConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        intermediate_size=3 * width,
        max_position_embeddings=context,
    )


def measure_rate(config: GPTConfig, dtype: Dtype, *, rows: int, context: int, repeats: int = 2) -> float:
    """Training tokens per second of an eager forward and backward pass on rows x context random tokens."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(config)
    model.init_weights(generator)
    ids = torch.randint(0, config.vocab_size, (rows, context + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, context))
    seconds = timed_steps(lambda: LanguageModelLoss(dtype)(model, batch), model, repeats)
    return rows * context / seconds


def measure_step(config: GPTConfig, dtype: Dtype, *, rows: int, context: int, repeats: int = 3) -> float:
    """Median seconds of a whole eager training step, the optimizer's part included, on rows x context random tokens."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(config)
    model.init_weights(generator)
    trainer, loss = Trainer(model, LoopConfig()), LanguageModelLoss(dtype)
    ids = torch.randint(0, config.vocab_size, (rows, context + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, context))
    times = []
    for _ in range(repeats + 1):  # the first also allocates
        start = time.perf_counter()
        trainer.step([batch], loss, 0.0)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def timed_steps(loss: Callable[[], torch.Tensor], model: torch.nn.Module, repeats: int) -> float:
    """Median seconds of forward and backward, after one pass that is not counted; leaves no gradient behind."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss().backward()
        times.append(time.perf_counter() - start)
        for p in model.parameters():
            p.grad = None
    return median(times[1:])


def choose_dtype(vocab_size: int, context: int) -> Dtype:
    """bfloat16 where it is faster on this machine, else float32; a trial on a small model."""
    trial = shape(192, 2, vocab_size, context)
    slow, fast = (measure_rate(trial, dtype, rows=8, context=context) for dtype in DTYPES)
    return DTYPES[fast > slow]


def can_compile() -> bool:
    """Whether torch.compile has the C++ compiler that it needs on a CPU."""
    return sys.platform != "win32" and any(which(name) for name in ("g++", "clang++", "c++"))


def tokens_within(seconds: float, rate: float, compiled: bool) -> float:
    """Tokens that `seconds` of training are good for, from the rate of an eager trial; compiling costs and gains."""
    return max(1.0, rate * ((seconds - COMPILE_SECONDS) * COMPILE_GAIN if compiled else seconds))


def choose(vocab_size: int, context: int, seconds: float, *, rows: int, law: Law = EPOCH) -> Choice:
    """The shape with the lowest predicted loss after `seconds` of training here.

    Each shape's rate is measured by a short trial until one is clearly worse than the best so far; the loss is
    that of `law` (Chinchilla's with Epoch AI's constants, arXiv 2404.10102, where no other is measured) at the tokens
    that the rate allows.
    """
    dtype = choose_dtype(vocab_size, context)
    compiled = can_compile() and seconds > 3 * COMPILE_SECONDS
    rates: dict[str, float] = {}
    best: tuple[float, GPTConfig] | None = None
    for width, layers in SHAPES:
        config = shape(width, layers, vocab_size, context)
        rate = measure_rate(config, dtype, rows=min(rows, 8), context=context)
        rates[f"{width}x{layers}"] = round(rate, 1)
        loss = law.loss(GPT(config).n_params(), tokens_within(seconds, rate, compiled))
        if best is not None and loss > best[0] * 1.02:
            break
        if best is None or loss < best[0]:
            best = (loss, config)
    assert best is not None
    return Choice(best[1], dtype, compiled, rates)


def peak_memory_bytes() -> int:
    """The most memory this process, or the largest of its finished children, ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return unit * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
