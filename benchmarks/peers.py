"""The other side of the benchmarks of training: GPT-2 of Hugging Face transformers with torch's AdamW.

A program of its own, so that a benchmark counts its start-up as it counts ours:

    python benchmarks/peers.py TASK.json RESULT.json

TASK.json is a `Task`. The shape of the model, the data and the recipe are in it; RESULT.json says what came out, as
`bench_time_to_loss_*.py` read it. Knows nothing of this project's code but how the data lie (`texts.py`).
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from texts import Corpus, validation_windows


@dataclass(frozen=True)
class Task:
    """One training run. Lengths in tokens, `seconds` from the first step; the schedule follows steps, or seconds."""

    corpus: str
    layers: int
    heads: int
    width: int
    context: int
    batch: int
    lr: float
    min_lr: float
    warmup: int
    beta2: float
    weight_decay: float
    seed: int
    steps: int | None = None
    seconds: float | None = None
    dtype: str = "float32"
    compiled: bool = False
    eval_every_s: float | None = None


class Peer:
    """The model, the optimizer and one training step."""

    def __init__(self, task: Task, vocab_size: int) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        self.torch, self.task = torch, task
        torch.manual_seed(task.seed)
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=task.context,
            n_embd=task.width,
            n_layer=task.layers,
            n_head=task.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model = GPT2LMHeadModel(config)
        self.n_params = sum(p.numel() for p in self.model.parameters())
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": task.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=task.lr, betas=(0.9, task.beta2))
        self.forward = torch.compile(self._loss, dynamic=False) if task.compiled else self._loss

    def _loss(self, ids: Any, targets: Any) -> Any:
        logits = self.model(ids).logits
        return self.torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def loss(self, ids: np.ndarray, targets: np.ndarray) -> Any:
        """Mean loss in nats of [B, T] ids."""
        torch = self.torch
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.task.dtype == "bfloat16"):
            return self.forward(torch.from_numpy(ids), torch.from_numpy(targets))

    def step(self, ids: np.ndarray, targets: np.ndarray, progress: float, step: int) -> float:
        """One optimizer step: warm-up, then a cosine over `progress` in [0, 1]."""
        task = self.task
        fall = task.min_lr + 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))) * (task.lr - task.min_lr)
        rate = min(task.lr * (step + 1) / (task.warmup + 1), fall)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(ids, targets)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def validate(self, corpus: Corpus) -> float:
        """Mean loss in nats over all held-out windows, in float32, uncompiled."""
        torch, total, n = self.torch, 0.0, 0
        with torch.no_grad():
            for ids, targets in validation_windows(corpus, self.task.context):
                total += float(self._loss(torch.from_numpy(ids), torch.from_numpy(targets))) * targets.size
                n += targets.size
        return total / n


def late_rate(ends: list[float]) -> float:
    """Steps per second over the second half of the steps: what compiling took is past."""
    half = len(ends) // 2
    return (len(ends) - 1 - half) / (ends[-1] - ends[half]) if len(ends) > half + 1 else 0.0


def main() -> None:
    """Run the task named on the command line."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    corpus = Corpus.open(Path(task.corpus))
    peer = Peer(task, corpus.vocab_size)
    rng = np.random.default_rng(task.seed)
    span = np.arange(task.context + 1)
    trace: list[dict[str, float]] = []
    start, step, last_loss, looked = time.perf_counter(), 0, math.nan, 0.0  # `looked`: seconds in evaluations
    ends: list[float] = []  # when each step ended
    next_look = task.eval_every_s
    while True:
        spent = time.perf_counter() - start - looked
        progress = (step / task.steps) if task.steps else spent / (task.seconds or 1.0)
        if next_look is not None and spent >= next_look:
            began = time.perf_counter()
            trace.append({"seconds": spent, "step": step, "loss": peer.validate(corpus)})
            looked += time.perf_counter() - began
            next_look += task.eval_every_s or 0.0
        if progress >= 1.0:
            break
        rows = corpus.train[rng.integers(0, len(corpus.train) - task.context - 1, task.batch)[:, None] + span]
        rows = rows.astype(np.int64)
        last_loss = peer.step(rows[:, :-1].copy(), rows[:, 1:].copy(), progress, step)
        step += 1
        ends.append(time.perf_counter() - start)
    trained = time.perf_counter() - start - looked
    result = {
        "n_params": peer.n_params,
        "steps": step,
        "tokens": step * task.batch * task.context,
        "train_seconds": trained,
        "late_steps_per_second": late_rate(ends),
        "train_loss": last_loss,
        "val_loss": peer.validate(corpus),
        "trace": trace,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
