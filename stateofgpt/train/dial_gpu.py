"""The dial on a GPU: precision, size, and the rows of a step that fill it, by trials of whole steps on the device.

Owns the trials and the choice there; `train.dial` is the CPU's. A GPU is idle until a step has thousands of tokens, so
a size's rate is that of the rows from which it no longer rises. Trials are not compiled: compiling each size would take
longer than the trials. The two constants about compiling are guesses until they are measured. Knows no stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from statistics import median

import torch

from stateofgpt.errors import ConfigError
from stateofgpt.model.device import wait
from stateofgpt.model.form import USUAL, Form
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train import dial
from stateofgpt.train.dial import DTYPES, Choice, shapes_of
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, Dtype, LanguageModelLoss
from stateofgpt.train.scaling import EPOCH, Law

SHAPES = (*dial.SHAPES, (1024, 16), (1280, 18), (1536, 24), (1792, 24), (2048, 26))  # up to 1.5B parameters
COMPILE_GAIN = 1.5  # compiled against eager steps; not measured
COMPILE_SECONDS = 60.0  # of a block and a part of the head, both ways; not measured
TRIALS = 0.06  # share of the seconds that all trials together may take
MEMORY = 0.85  # share of the device's memory that trials may fill
RISING = 1.05  # twice the rows are worth it where they give this much more
FEWEST_STEPS = 300  # rows are not raised past what leaves a run so many


@dataclass(frozen=True)
class Filled:
    """Rows of a step, their tokens per second, and the rates of all rows that were tried."""

    rows: int
    rate: float
    rates: dict[str, float]


def blank(config: GPTConfig, device: str | torch.device) -> GPT:
    """A model to measure time with, made where it is used: drawing a billion weights on the CPU takes long."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor, std=0.02)
    return model


class Trial:
    """A model of one shape with its optimizer on a device, and the time its steps take. Its weights are of no use."""

    def __init__(self, config: GPTConfig, dtype: Dtype, context: int, device: str) -> None:
        model = blank(config, device)
        self.device, self.context, self.vocab_size = device, context, config.vocab_size
        self.loss, self.trainer = LanguageModelLoss(dtype, device=device), Trainer(model, LoopConfig())

    def seconds(self, rows: int, within: float) -> float:
        """Median seconds of two steps after one that is not counted; of that one if it alone took `within`."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (rows, self.context + 1), generator=generator)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, self.context))
        times: list[float] = []
        while len(times) < 3 and (not times or times[0] < within):
            start = time.perf_counter()
            self.trainer.step([batch], self.loss, 0.0)
            wait(self.device)
            times.append(time.perf_counter() - start)
        return median(times[1:] or times)


def fill(
    seconds_of: Callable[[int], float], context: int, rows: int, *, run_seconds: float, within: float
) -> Filled | None:
    """The rows of a step from which more give no more tokens per second; None where not even one row fits.

    Begins with `rows`, and with fewer where those do not fit into the device's memory; doubles them until the rate
    stops rising, memory ends, or `within` seconds have passed. A run of `run_seconds` keeps FEWEST_STEPS.
    """
    rates: dict[int, float] = {}
    began = time.perf_counter()
    while rows >= 1:
        try:
            rates[rows] = rows * context / seconds_of(rows)
        except torch.OutOfMemoryError:  # what of it is free after all is used again by the next trial
            if rates:
                break
            rows //= 2
            continue
        rate = rates[rows]
        rising = rows // 2 not in rates or rate > RISING * rates[rows // 2]
        steps = rate * run_seconds / (2 * rows * context)
        if not rising or steps < FEWEST_STEPS or time.perf_counter() - began > within:
            break
        rows *= 2
    if not rates:
        return None
    best = max(rates.values())
    chosen = min(rows for rows, rate in rates.items() if rate * RISING >= best)
    return Filled(chosen, rates[chosen], {str(rows): round(rate, 1) for rows, rate in rates.items()})


def fill_shape(
    config: GPTConfig, dtype: Dtype, context: int, rows: int, device: str, *, run_seconds: float, within: float
) -> Filled | None:
    """`fill` for a model of this shape on a device, with a part of its memory kept for what a run has besides."""
    try:
        with _most_memory(device):
            trial = Trial(config, dtype, context, device)
            return fill(lambda n: trial.seconds(n, within / 4), context, rows, run_seconds=run_seconds, within=within)
    except torch.OutOfMemoryError:
        return None


@contextmanager
def _most_memory(device: str) -> Iterator[None]:
    if torch.device(device).type != "cuda":
        yield
        return
    index = torch.device(device).index or 0
    torch.cuda.set_per_process_memory_fraction(MEMORY, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def fastest_dtype(vocab_size: int, context: int, device: str, rows: int, form: Form = USUAL) -> Dtype:
    """The fastest precision on this device; trials on a model of two layers."""
    width = next((width for width in (768, 640, 512) if not form.misfit(width)), 64)
    config = form.shape(width, 2, vocab_size, context)
    times = {dtype: Trial(config, dtype, context, device).seconds(rows, 10.0) for dtype in DTYPES}
    return min(DTYPES, key=lambda dtype: times[dtype])


def can_compile() -> bool:
    """Whether torch.compile has what it needs for a GPU: triton, and the C compiler with which that starts kernels."""
    return find_spec("triton") is not None and any(which(name) for name in ("cc", "gcc", "clang"))


def tokens_within(seconds: float, rate: float, compiled: bool) -> float:
    """As `dial.tokens_within`, on a GPU."""
    return max(1.0, rate * ((seconds - COMPILE_SECONDS) * COMPILE_GAIN if compiled else seconds))


def choose(
    device: str,
    vocab_size: int,
    context: int,
    seconds: float,
    *,
    rows: int,
    law: Law = EPOCH,
    form: Form = USUAL,
    fewest_layers: int = 1,
) -> tuple[Choice, Filled]:
    """As `dial.choose`, on a device: the shape of the lowest predicted loss, and the rows that fill the device with it.

    `rows` are the fewest. The trials take about `TRIALS` of `seconds`.
    """
    began = time.perf_counter()
    shapes = shapes_of(SHAPES, form, fewest_layers)
    dtype = fastest_dtype(vocab_size, context, device, rows, form)
    compiled = can_compile() and seconds > 3 * COMPILE_SECONDS
    rates: dict[str, float] = {}
    best: tuple[float, GPTConfig, Filled] | None = None
    for width, layers in shapes:
        if best is not None and time.perf_counter() - began > TRIALS * seconds:
            break
        config = form.shape(width, layers, vocab_size, context)
        share = TRIALS * seconds / len(shapes)
        filled = fill_shape(config, dtype, context, rows, device, run_seconds=seconds, within=share)
        if filled is None:
            break
        rates[f"{width}x{layers}"] = round(filled.rate, 1)
        with torch.device("meta"):
            n_params = GPT(config).n_params()
        loss = law.loss(n_params, tokens_within(seconds, filled.rate, compiled))
        if best is not None and loss > best[0] * 1.02:
            break
        if best is None or loss < best[0]:
            best = (loss, config, filled)
    if best is None:
        raise ConfigError(f"no model fits into the memory of {device} with a context of {context}; lower it")
    return Choice(best[1], dtype, compiled, False, rates), best[2]
