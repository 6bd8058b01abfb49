"""The training loop: steps, accumulation, clipping, saving and exact resumption.

Owns what happens between two optimizer steps. Knows no stage: batches, losses and what to do along the way come as
functions. The order of data is a function of the step alone, so that a resumed run repeats an undisturbed one bit for
bit.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stateofgpt.errors import ConfigError, ModelError
from stateofgpt.model.device import in_order
from stateofgpt.train.average import TailAverage
from stateofgpt.train.guard import SpikeConfig, SpikeGuard
from stateofgpt.train.kernels import Kernels
from stateofgpt.train.memory import keep_memory
from stateofgpt.train.optim import MuonAdamW, OptimConfig
from stateofgpt.train.state import TrainState


class Weighted(Protocol):
    """Anything with a weight: the number of targets by which a summed loss is divided."""

    @property
    def weight(self) -> float: ...


@runtime_checkable
class Movable(Weighted, Protocol):
    """A batch that can go to a device."""

    def to(self, device: torch.device) -> Weighted: ...


Loss = Callable[[Any, Any], Tensor]  # (model, batch) -> loss summed over the batch's targets


Backward = Callable[[Any, float], Tensor]  # (batch, divisor) -> loss / divisor, its gradients added to `.grad`


@runtime_checkable
class Bindable(Protocol):
    """A loss that has a way of its own to its gradients, for a model that keeps its parameters."""

    def bound(self, model: Any) -> Backward: ...


def bound(loss: object, model: Any) -> Backward:
    """A `Loss` over a divisor, detached, for one model; its gradients are added to the parameters' `.grad`."""
    if isinstance(loss, Bindable):
        return loss.bound(model)
    assert callable(loss)

    def backward(batch: Any, divisor: float) -> Tensor:
        value: Tensor = loss(model, batch) / divisor
        value.backward()
        return value.detach()

    return backward


@dataclass(frozen=True)
class LoopConfig:
    """What the loop itself needs to know."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    clip: float = 1.0
    save_every_s: float = 30.0
    average_share: float = 0.0  # the last share of the steps whose weights are averaged; 0 keeps the last ones
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    exact: bool | None = None  # on a GPU: add in one order, so that a resumed run has the same bits; None: yes

    def __post_init__(self) -> None:
        if not 0.0 <= self.average_share <= 1.0:
            raise ConfigError(f"average_share is {self.average_share}, must be from 0 to 1")


class Trainer:
    """A model with its optimizer; with `kernels` the optimizer's passes are fused.

    What takes no gradient (`requires_grad` is False) is neither trained nor saved.
    """

    def __init__(self, model: nn.Module, config: LoopConfig, kernels: Kernels | None = None) -> None:
        keep_memory()
        self.model = model
        self.config = config
        self.optimizer = MuonAdamW(model.named_parameters(), config.optim, kernels)
        if not self.optimizer.params:
            raise ModelError("the model has no parameter that takes a gradient, so there is nothing to train")
        self._dropout = any(isinstance(m, nn.Dropout) and m.p > 0.0 for m in model.modules())
        self.device = next(iter(self.optimizer.params.values())).device
        self.exact = config.exact is not False
        self._plain = self.device.type == "cpu" and all(
            p.dtype == torch.float32 for p in self.optimizer.params.values()
        )
        self._bound: tuple[Loss, Backward] | None = None

    def step(
        self,
        batches: Sequence[Weighted],
        loss: Loss,
        factor: float,
        refuse: Callable[[float, float], bool] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """One optimizer step on the mean loss over all targets of `batches`; learning rates times `factor`.

        Nothing is changed where `refuse(loss, gradient norm)` says so; the metrics then have `refused`. Raises
        ModelError before any weight has changed when the loss or the gradient is not finite. `meanwhile` is called when
        all is asked of the device and nothing was waited for: what it does costs no time there.
        """
        summed, gradient = self._in_order(batches, loss)
        meanwhile()
        total, norm = torch.stack((summed, gradient)).cpu().tolist()  # the one time that a step waits for its device
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise ModelError(
                f"the loss is {total} and the gradient norm {norm} at optimizer step {self.optimizer.step_count}; "
                "nothing was changed: lower the learning rate, or look at this step's batch"
            )
        metrics = {"loss": total, "grad_norm": norm, "lr": self.config.optim.lr * factor}
        if refuse is not None and refuse(total, norm):
            return {**metrics, "refused": 1.0}
        self.optimizer.step(factor, min(1.0, self.config.clip / (norm + 1e-6)))
        return metrics

    def _in_order(self, batches: Sequence[Weighted], loss: Loss) -> tuple[Tensor, Tensor]:
        """`_gradients`, added up in one order where the device can do all that the loss needs in one."""
        try:
            with in_order(self.device, self.exact):
                return self._gradients(batches, loss)
        except RuntimeError as failure:
            if "deterministic" not in str(failure) or not self.exact:
                raise
            self.exact = False
            told = str(failure).splitlines()[0]
            print(f"note: training goes on without a fixed order of sums on {self.device}: {told}", file=sys.stderr)
        return self._gradients(batches, loss)

    def _gradients(self, batches: Sequence[Weighted], loss: Loss) -> tuple[Tensor, Tensor]:
        """The mean loss and the joint norm of its gradients, which are in `.grad`: two numbers on the device."""
        self.optimizer.zero_grad()
        if self._bound is None or self._bound[0] is not loss:
            self._bound = loss, bound(loss, self.model)
        total_weight = max(1.0, sum(batch.weight for batch in batches))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._own_randomness():
            for batch in batches:
                total += self._bound[1](batch, total_weight)
        grads = [p.grad for p in self.optimizer.params.values() if p.grad is not None]
        kernels = self.optimizer.kernels
        if kernels is not None and self._plain:
            return total, total.new_tensor(kernels.norm([g.contiguous() for g in grads]))
        return total, torch.nn.utils.get_total_norm(grads).to(total)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Dropout's masks are a function of the step, so that a resumed run draws those an undisturbed one drew."""
        if not self._dropout:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.optimizer.step_count)
            yield

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
    after every step, and (0, {}) before the first. What the configuration says of spikes and of averaging the tail is
    done here, and is part of the state.
    """
    _Fit(trainer, batches, loss, steps, factor, state, on_resume, tuple(callbacks)).work()


@dataclass
class _Fit:
    trainer: Trainer
    batches: Callable[[int], Sequence[Weighted]]
    loss: Loss
    steps: int
    factor: Callable[[int], float]
    state: TrainState
    on_resume: Callable[[int], None]
    callbacks: tuple[Callable[[int, dict[str, float]], None], ...]

    def __post_init__(self) -> None:
        self.config = self.trainer.config
        self.guard = SpikeGuard(self.config.spikes)
        self.average = TailAverage(self.trainer.optimizer.params)
        self.anchor: tuple[int, dict[str, Tensor]] | None = None  # where a roll-back goes
        self.tail = self.steps - round(self.steps * self.config.average_share)
        self.ahead: tuple[int, Sequence[Weighted]] | None = None  # a step, and its batches

    def work(self) -> None:
        step = self._resume()
        last_save = time.monotonic()
        while step < self.steps:
            step = self._step(step)
            if time.monotonic() - last_save > self.config.save_every_s or step == self.steps:
                self._save(step)
                last_save = time.monotonic()
        self.average.apply()

    def _step(self, step: int) -> int:
        """Train one step, or go back; the number of finished steps after it."""
        spikes = self.config.spikes
        if spikes.policy == "roll_back" and step % spikes.window == 0:
            self.anchor = step, {name: tensor.clone() for name, tensor in self.trainer.tensors().items()}
        if step in self.guard.left_out:
            return step + 1
        spike: list[bool] = []

        def refuse(loss: float, norm: float) -> bool:
            spike.append(self.guard.is_spike(loss, norm))
            return spike[0] and spikes.policy != "note"

        rate = self.factor(step) * self.guard.rate(step)
        metrics = self.trainer.step(self._batches(step), self.loss, rate, refuse, lambda: self._look_ahead(step + 1))
        if spike[0]:
            metrics["spike"] = 1.0
            if spikes.policy == "lower":
                self.guard.lower_from(step)
            if spikes.policy == "roll_back" and self.anchor is not None:
                self.guard.left_out.append(step)
                self.trainer.load(self.anchor[1])
                self.on_resume(self.anchor[0] if self.anchor[0] else -1)
                return self.anchor[0]
        if step >= self.tail:
            self.average.add()
        for callback in self.callbacks:
            callback(step + 1, metrics)
        return step + 1

    def _batches(self, step: int) -> Sequence[Weighted]:
        """The batches of a step, made before or now."""
        if self.ahead is not None and self.ahead[0] == step:
            return self.ahead[1]
        return self.batches(step)

    def _look_ahead(self, step: int) -> None:
        """Make the batches of a step while the device is at work on the one before, and send them there."""
        if self.trainer.device.type == "cpu" or step >= self.steps:
            return
        made = self.batches(step)
        self.ahead = step, [b.to(self.trainer.device) if isinstance(b, Movable) else b for b in made]

    def _save(self, step: int) -> None:
        tensors = {**self.trainer.tensors(), **self.average.tensors()}
        if self.anchor is not None:
            tensors |= {f"anchor.{name}": tensor for name, tensor in self.anchor[1].items()}
        about = {"guard": self.guard.state(), "averaged": self.average.count}
        self.state.save(step, tensors, {**about, "anchor": self.anchor[0] if self.anchor else None})

    def _resume(self) -> int:
        """Take over the newest state; the number of finished steps."""
        step = 0
        if (saved := self.state.latest()) is not None:
            step, tensors, about = saved
            self.trainer.load(tensors)
            if "guard" in about:
                self.guard.load(about["guard"])
                self.average.load(tensors, about["averaged"])
            if about.get("anchor") is not None:
                prefix = "anchor."
                kept = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                self.anchor = about["anchor"], kept
        self.on_resume(step if step else -1)
        if step == 0:
            for callback in self.callbacks:
                callback(0, {})
        return step
