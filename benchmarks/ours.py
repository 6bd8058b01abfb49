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


@dataclass(frozen=True)
class Task:
    """One training run of a Qwen3-shaped decoder for a number of tokens."""

    corpus: str
    layers: int
    heads: int
    width: int
    intermediate: int
    context: int
    tokens: int
    batches: tuple[tuple[float, int], ...]  # (share of the tokens from which it holds, rows of a step)
    lr: float
    muon_lr: float
    beta2: float
    weight_decay: float
    warmup: int
    decay_share: float
    seed: int
    dtype: str = "bfloat16"
    momentum: float = 0.95


def rows_at(task: Task) -> list[int]:
    """The rows of every step: a ramp by shares of all tokens."""
    out: list[int] = []
    used = 0
    while used < task.tokens:
        rows = next(n for share, n in reversed(task.batches) if used >= share * task.tokens)
        out.append(rows)
        used += rows * task.context
    return out


def main() -> None:
    """Run the task named on the command line."""
    raw = json.loads(Path(sys.argv[1]).read_text())
    task = Task(**{**raw, "batches": tuple(tuple(x) for x in raw["batches"])})
    corpus = Corpus.open(Path(task.corpus))

    import torch

    from stateofgpt.model.gpt import GPT, GPTConfig
    from stateofgpt.train.loop import LoopConfig, Trainer
    from stateofgpt.train.loss import Batch, LanguageModelLoss
    from stateofgpt.train.optim import OptimConfig
    from stateofgpt.train.schedule import warmup_stable_decay

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
    schedule = rows_at(task)
    windows = (len(corpus.train) - 1) // task.context
    rng = np.random.default_rng(task.seed)
    span = np.arange(task.context + 1)
    order: list[int] = []
    start = time.perf_counter()
    for step, rows in enumerate(schedule):
        while len(order) < rows:  # each epoch shuffles windows anew, and cuts them at another place
            shift = int(rng.integers(0, task.context))
            fresh = rng.permutation(windows - 1) * task.context + shift
            order += fresh.tolist()
        chosen, order = np.array(order[:rows]), order[rows:]
        ids = corpus.train[chosen[:, None] + span].astype(np.int64)
        batch = Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy())
        factor = warmup_stable_decay(step, len(schedule), warmup=task.warmup, decay_share=task.decay_share)
        trainer.step([batch], loss, factor)
    trained = time.perf_counter() - start
    total = n = 0.0
    score = LanguageModelLoss("float32", fused=True)
    with torch.no_grad():
        for ids, targets in validation_windows(corpus, task.context):
            total += float(score(model, Batch.of(ids, targets)))
            n += targets.size
    result = {
        "n_params": model.n_params(),
        "steps": len(schedule),
        "tokens": sum(schedule) * task.context,
        "train_seconds": trained,
        "eval_seconds": time.perf_counter() - start - trained,
        "val_loss": total / n,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
