"""Both sides of the time to loss on a GPU, each a program of its own, so that start-up and compiling are counted:

    python benchmarks/gpu_time_to_loss.py TASK.json RESULT.json

The peer is GPT-2 of transformers, compiled whole, under autocast in bfloat16, with torch's fused AdamW and a cosine.
Ours is this project's trainer. Both read windows of the same ids in the same order, and have the task's `seconds` from
the beginning of their process; what compiling leaves of them is the length of their schedule. The held-out loss is
taken in float32 at the end, uncompiled.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import json  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from texts import Corpus, validation_windows  # noqa: E402

STARTING = 0.5  # seconds of a process before its first line and after its last


@dataclass(frozen=True)
class Task:
    """One side's run. `seconds` are of its process; `lr` is AdamW's, `muon_lr` only ours."""

    side: str
    corpus: str
    seconds: float
    width: int
    layers: int
    heads: int
    context: int
    vocab_size: int
    rows: int
    lr: float
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    warmup: int = 50
    decay_share: float = 0.6
    compiled: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Side:
    """What the loop needs of a side. `ready` sends ids and targets [B, T] to the device; `step` takes them, a progress
    in [0, 1], the step's number (-1: to compile), and what is to be done while the device works; `validate` is a mean
    in nats."""

    n_params: int
    ready: Callable[[np.ndarray, np.ndarray], Any]
    step: Callable[[Any, float, int, Callable[[], None]], None]
    validate: Callable[[np.ndarray, np.ndarray], float]


def ours(task: Task, device: str) -> Side:
    """Qwen3-shaped, Muon and AdamW, compiled blocks."""
    import torch

    from stateofgpt.model.gpt import GPT, GPTConfig
    from stateofgpt.train.loop import LoopConfig, Trainer
    from stateofgpt.train.loss import Batch, LanguageModelLoss
    from stateofgpt.train.optim import OptimConfig

    size = task.width // task.heads
    model = GPT(GPTConfig(vocab_size=task.vocab_size, hidden_size=task.width, num_hidden_layers=task.layers,
                          num_attention_heads=task.heads, num_key_value_heads=task.heads, head_dim=size,
                          intermediate_size=3 * task.width, max_position_embeddings=task.context))  # fmt: skip
    model.init_weights(torch.Generator().manual_seed(task.seed))
    model.to(device)
    optim = OptimConfig(lr=task.lr, muon_lr=task.muon_lr, weight_decay=task.weight_decay)
    trainer = Trainer(model, LoopConfig(optim=optim))
    loss, score = LanguageModelLoss("bfloat16", task.compiled, device=device), LanguageModelLoss(device=device)

    def step(batch: Any, progress: float, number: int, meanwhile: Callable[[], None]) -> None:
        factor = min((number + 1) / task.warmup, 1.0, max(0.0, 1.0 - progress) / task.decay_share)
        trainer.step([batch], loss, factor if number >= 0 else 0.0, meanwhile=meanwhile)

    @torch.no_grad()
    def validate(ids: np.ndarray, targets: np.ndarray) -> float:
        return score(model, Batch.of(ids, targets)).item() / targets.size

    return Side(model.n_params(), lambda ids, targets: Batch.of(ids, targets).to(device), step, validate)


def peer(task: Task, device: str) -> Side:
    """GPT-2 of transformers."""
    import torch
    import torch.nn.functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(task.seed)
    torch.set_float32_matmul_precision("high")
    made = GPT2LMHeadModel(GPT2Config(
        vocab_size=task.vocab_size, n_positions=task.context, n_embd=task.width, n_layer=task.layers,
        n_head=task.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0,
        eos_token_id=0,
    ))  # fmt: skip
    model = made.to(device)  # type: ignore[arg-type]
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": task.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=task.lr, betas=(0.9, 0.95), fused=device != "cpu")

    def plain(ids: Any, targets: Any) -> Any:
        return F.cross_entropy(model(ids).logits.flatten(0, 1).float(), targets.flatten())

    forward = torch.compile(plain, dynamic=False) if task.compiled else plain

    def sent(x: np.ndarray) -> Any:
        tensor = torch.from_numpy(x)
        return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    def step(batch: Any, progress: float, number: int, meanwhile: Callable[[], None]) -> None:
        fall = 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        for group in optimizer.param_groups:
            group["lr"] = task.lr * min((number + 1) / task.warmup, fall) if number >= 0 else 0.0
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = forward(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        meanwhile()
        if number % 20 == 0:
            float(loss.detach())  # the clock of the schedule must not run ahead of the device

    @torch.no_grad()
    def validate(ids: np.ndarray, targets: np.ndarray) -> float:
        torch.set_float32_matmul_precision("highest")
        return float(plain(sent(ids), sent(targets)))

    return Side(sum(p.numel() for p in parameters), lambda ids, targets: (sent(ids), sent(targets)), step, validate)


def main() -> None:
    """Run the task named on the command line."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    corpus = Corpus.open(Path(task.corpus))

    from stateofgpt.model.device import choose_device, wait

    device = choose_device()
    side = (ours if task.side == "ours" else peer)(task, device)
    rng, span = np.random.default_rng(task.seed), np.arange(task.context + 1)

    ahead: list[Any] = []

    def draw() -> None:
        first = rng.integers(0, len(corpus.train) - task.context - 1, task.rows)
        rows = corpus.train[first[:, None] + span].astype(np.int64)
        ahead.append(side.ready(rows[:, :-1].copy(), rows[:, 1:].copy()))

    made = time.perf_counter()
    draw()
    for _ in range(2):
        side.step(ahead.pop(), 0.0, -1, draw)  # compiles; a rate of 0 changes nothing
    wait(device)
    start, step = time.perf_counter(), 0
    length = max(1.0, task.seconds - STARTING - (start - BEGAN))
    while (progress := (time.perf_counter() - start) / length) < 1.0:
        side.step(ahead.pop(), progress, step, draw)
        step += 1
    wait(device)
    trained = time.perf_counter()
    losses = [
        (side.validate(ids, targets), targets.size) for ids, targets in validation_windows(corpus, task.context, 8)
    ]
    result = {
        "side": task.side,
        "device": device,
        "n_params": side.n_params,
        "steps": step,
        "tokens": step * task.rows * task.context,
        "compile_seconds": start - made,
        "train_seconds": trained - start,
        "validate_seconds": time.perf_counter() - trained,
        "val_loss": sum(loss * n for loss, n in losses) / sum(n for _, n in losses),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
