"""The training loop: steps, accumulation, clipping, saving and exact resumption.

Owns what happens between two optimizer steps. Knows no stage: batches, losses and what to do along the way come as
functions. The order of data is a function of the step alone, so that a resumed run repeats an undisturbed one bit for
bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stateofgpt.errors import ModelError
from stateofgpt.train.kernels import Kernels
from stateofgpt.train.optim import MuonAdamW, OptimConfig
from stateofgpt.train.state import TrainState


class Weighted(Protocol):
    """Anything with a weight: the number of targets by which a summed loss is divided."""

    @property
    def weight(self) -> float: ...


Loss = Callable[[Any, Any], Tensor]  # (model, batch) -> loss summed over the batch's targets


@dataclass(frozen=True)
class LoopConfig:
    """What the loop itself needs to know."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    clip: float = 1.0
    save_every_s: float = 30.0


class Trainer:
    """A model with its optimizer; with `kernels` the optimizer's passes are fused.

    What takes no gradient (`requires_grad` is False) is neither trained nor saved.
    """

    def __init__(self, model: nn.Module, config: LoopConfig, kernels: Kernels | None = None) -> None:
        self.model = model
        self.config = config
        self.optimizer = MuonAdamW(model.named_parameters(), config.optim, kernels)
        if not self.optimizer.params:
            raise ModelError("the model has no parameter that takes a gradient, so there is nothing to train")
        self._dropout = any(isinstance(m, nn.Dropout) and m.p > 0.0 for m in model.modules())

    def step(self, batches: Sequence[Weighted], loss: Loss, factor: float) -> dict[str, float]:
        """One optimizer step on the mean loss over all targets of `batches`; learning rates times `factor`.

        Raises ModelError before any weight has changed when the loss or the gradient is not finite.
        """
        self.optimizer.zero_grad()
        total_weight = max(1.0, sum(batch.weight for batch in batches))
        total = 0.0
        with self._own_randomness():
            for batch in batches:
                value = loss(self.model, batch) / total_weight
                value.backward()
                total += value.item()
        norm = self.gradient_norm()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise ModelError(
                f"the loss is {total} and the gradient norm {norm} at optimizer step {self.optimizer.step_count}; "
                "nothing was changed: lower the learning rate, or look at this step's batch"
            )
        self.optimizer.step(factor, min(1.0, self.config.clip / (norm + 1e-6)))
        return {"loss": total, "grad_norm": norm, "lr": self.config.optim.lr * factor}

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Dropout's masks are a function of the step, so that a resumed run draws those an undisturbed one drew."""
        if not self._dropout:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.optimizer.step_count)
            yield

    def gradient_norm(self) -> float:
        """The joint norm of all gradients; a step scales them so that it is at most `clip`."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def tensors(self) -> dict[str, Tensor]:
        """Weights that are trained and optimizer state, under one set of names."""
        weights = {f"model.{n}": p.detach() for n, p in self.optimizer.params.items()}
        return weights | {f"optimizer.{n}": t for n, t in self.optimizer.state().items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        for name, p in self.optimizer.params.items():
            p.copy_(tensors[f"model.{name}"])
        prefix = "optimizer."
        self.optimizer.load({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})


def fit(
    trainer: Trainer,
    batches: Callable[[int], Sequence[Weighted]],
    loss: Loss,
    *,
    steps: int,
    factor: Callable[[int], float],
    state: TrainState,
    on_resume: Callable[[int], None] = lambda step: None,
    callbacks: Iterable[Callable[[int, dict[str, float]], None]] = (),
) -> None:
    """Train from the newest saved state up to `steps`; save every `save_every_s` seconds and at the end.

    `on_resume(step)` is told the number of finished steps of that state, or -1 when there is none: what an earlier
    attempt logged beyond it will be logged again. Each of `callbacks` gets (finished steps, metrics of the last one)
    after every step, and (0, {}) before the first.
    """
    start = 0
    if (saved := state.latest()) is not None:
        start = saved[0]
        trainer.load(saved[1])
    on_resume(start if start else -1)
    callbacks = tuple(callbacks)
    if start == 0:
        for callback in callbacks:
            callback(0, {})
    last_save = time.monotonic()
    for step in range(start, steps):
        metrics = trainer.step(batches(step), loss, factor(step))
        for callback in callbacks:
            callback(step + 1, metrics)
        if time.monotonic() - last_save > trainer.config.save_every_s or step + 1 == steps:
            state.save(step + 1, trainer.tensors(), {})
            last_save = time.monotonic()
