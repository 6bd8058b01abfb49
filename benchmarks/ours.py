"""Our side of the benchmarks of training: the trainer of this project on the data of `texts.py`.

A program of its own, so that start-up, and compiling what has to be compiled, are counted:

    python benchmarks/ours.py TASK.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from texts import Corpus, validation_windows

from stateofgpt.train.threads import wait_briefly


@dataclass(frozen=True)
class Task:
    """One training run of a Qwen3-shaped decoder for a number of tokens, or of seconds from its first step."""

    corpus: str
    layers: int
    heads: int
    width: int
    intermediate: int
    context: int
    batches: tuple[tuple[float, int], ...]  # (share of the whole from which it holds, rows of a step)
    lr: float
    muon_lr: float
    beta2: float
    weight_decay: float
    warmup: int
    decay_share: float
    seed: int
    tokens: int | None = None
    seconds: float | None = None
    dtype: str = "bfloat16"
    momentum: float = 0.95


def rate_at(task: Task, step: int, progress: float) -> float:
    """The factor of the learning rates: warm-up over steps, then whole, then falling over the last share of the run."""
    return min((step + 1) / task.warmup, 1.0, max(0.0, 1.0 - progress) / task.decay_share)


def main() -> None:
    """Run the task named on the command line."""
    raw = json.loads(Path(sys.argv[1]).read_text())
    task = Task(**{**raw, "batches": tuple(tuple(x) for x in raw["batches"])})
    corpus = Corpus.open(Path(task.corpus))
    wait_briefly()

    import torch

    from stateofgpt.model.gpt import GPT, GPTConfig
    from stateofgpt.train.loop import LoopConfig, Trainer
    from stateofgpt.train.loss import Batch, LanguageModelLoss
    from stateofgpt.train.optim import OptimConfig

    config = GPTConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=task.width,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        num_key_value_heads=task.heads,
        head_dim=task.width // task.heads,
        intermediate_size=task.intermediate,
        max_position_embeddings=task.context,
    )
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(task.seed))
    optim = OptimConfig(
        lr=task.lr, muon_lr=task.muon_lr, beta2=task.beta2, weight_decay=task.weight_decay, momentum=task.momentum
    )
    loss = LanguageModelLoss(task.dtype, fused=True)
    trainer = Trainer(model, LoopConfig(optim=optim), loss.kernels)
    windows = (len(corpus.train) - 1) // task.context
    rng = np.random.default_rng(task.seed)
    span = np.arange(task.context + 1)
    order: list[int] = []
    start, step, tokens = time.perf_counter(), 0, 0
    while True:
        progress = tokens / task.tokens if task.tokens else (time.perf_counter() - start) / (task.seconds or 1.0)
        if progress >= 1.0:
            break
        rows = next(n for share, n in reversed(task.batches) if progress >= share)
        while len(order) < rows:  # each epoch shuffles windows anew, and cuts them at another place
            shift = int(rng.integers(0, task.context))
            fresh = rng.permutation(windows - 1) * task.context + shift
            order += fresh.tolist()
        chosen, order = np.array(order[:rows]), order[rows:]
        ids = corpus.train[chosen[:, None] + span].astype(np.int64)
        batch = Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy())
        trainer.step([batch], loss, rate_at(task, step, progress))
        step, tokens = step + 1, tokens + rows * task.context
    trained = time.perf_counter() - start
    total = n = 0.0
    score = LanguageModelLoss("float32", fused=True)
    with torch.no_grad():
        for ids, targets in validation_windows(corpus, task.context):
            total += float(score(model, Batch.of(ids, targets)))
            n += targets.size
    result = {
        "n_params": model.n_params(),
        "steps": step,
        "tokens": tokens,
        "train_seconds": trained,
        "eval_seconds": time.perf_counter() - start - trained,
        "val_loss": total / n,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
