"""Supervised finetuning: the base model learns to answer, from demonstrations in the chat format.

Owns what is particular to the stage: where demonstrations come from, its learning rate and its held-out loss. Packing,
loss and loop live elsewhere.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from stateofgpt.data.demonstrations import (
    DemonstrationConfig,
    chitchat_path,
    demonstration,
    read_demonstrations,
    read_dialogues,
)
from stateofgpt.data.packing import Packed, Packer
from stateofgpt.data.skills import demonstrate, problem
from stateofgpt.errors import ConfigError, DataError
from stateofgpt.model.checkpoint import load_model, save_checkpoint
from stateofgpt.model.device import wait
from stateofgpt.model.gpt import GPT
from stateofgpt.run import Run, Stage
from stateofgpt.stages.decision import planned_device
from stateofgpt.stages.parent import trained
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import LoopConfig, Trainer, fit
from stateofgpt.train.loss import Batch, LanguageModelLoss
from stateofgpt.train.optim import OptimConfig
from stateofgpt.train.schedule import warmup_stable_decay
from stateofgpt.train.state import TrainState

LOOKS = 8  # how often the held-out loss is measured after the first time


@dataclass(frozen=True)
class Config:
    """Give `seconds` or `steps`. `files` are JSONL of one's own demonstrations, drawn with `files_share`."""

    seconds: float | None = None
    steps: int | None = None
    rows: int = 8
    lora: int | None = None  # the rank of adapters that are trained in place of all weights
    apart: bool = True  # conversations of one row do not attend to each other
    warmup: int = 5
    decay_share: float = 0.6
    validation_rows: int = 16
    data: DemonstrationConfig = field(default_factory=DemonstrationConfig)
    files: tuple[str, ...] = ()
    files_share: float = 0.3
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(optim=OptimConfig(lr=1.5e-3, muon_lr=0.01)))

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ConfigError("sft needs either seconds or steps, and not both")
        if self.lora is not None and self.lora < 1:
            raise ConfigError(f"sft.lora is {self.lora}, a rank is at least 1")
        if not 0.0 < self.files_share <= 1.0:
            raise ConfigError(f"sft.files_share is {self.files_share}, must be above 0 and at most 1")


def run(config: Config, run: Run) -> dict[str, Any]:
    """Finetune the run's base model on demonstrations; returns the stage's result."""
    stage = run.stage("sft")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        return _Finetuning(config, run, stage).work()


class Demonstrations:
    """Conversation i of step s, drawn from the skills, the dialogues and the user's own files."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed
        path = chitchat_path()
        self.dialogues: Sequence[Conversation] = read_dialogues(path) if path and config.data.dialogue_share else ()
        own = [c for name in config.files for c in read_demonstrations(Path(name))]
        held_out = len(own) // 20
        self.own, self.own_held_out = own[held_out:], own[:held_out]

    def __call__(self, step: int, i: int) -> Conversation:
        index = step * 100_000 + i
        if self.own:
            period = max(1, round(1.0 / self.config.files_share))
            if index % period == 0:
                return self.own[(step * 997 + i // period) % len(self.own)]
        return demonstration(self.seed, index, self.config.data, self.dialogues)

    def held_out(self, step: int, i: int) -> Conversation:
        """A demonstration that no training step sees."""
        rng = random.Random(f"held out {self.seed} {step} {i}")
        if self.own_held_out and i % 2:
            return rng.choice(self.own_held_out)
        skills = ("arithmetic", "arithmetic_steps", "compare", "reverse")
        return demonstrate(problem(rng.choice(skills), rng, "heldout"), rng)


class _Finetuning:
    def __init__(self, config: Config, run: Run, stage: Stage) -> None:
        self.config, self.run, self.stage = config, run, stage
        self.base = run.stage("pretrain").checkpoint
        self.tokenizer = Tokenizer.load(self.base)
        self.chat = ChatFormat(self.tokenizer)
        self.draws = Demonstrations(config, run.seed)

    def work(self) -> dict[str, Any]:
        plan = self.run.stage("pretrain").decide("plan", dict)
        device = planned_device(plan)
        model = trained(load_model(self.base), self.config.lora, self.run.seed).to(device)
        context = plan.get("context", model.config.max_position_embeddings)
        packer = self._packer(self.draws, self.config.rows, context)
        held_out = self._packer(self.draws.held_out, self.config.validation_rows, context).step(0)
        loss = LanguageModelLoss(plan["dtype"], plan["compiled"], plan["fused"], device)
        steps = self.stage.decide("steps", lambda: {"steps": self._steps(model, loss, packer, held_out)})["steps"]
        trainer = Trainer(model, self.config.loop, loss.kernels)
        counts = {"conversations": 0, "truncated": 0}
        packed_at: dict[int, Packed] = {}  # batches may be made before their step

        def batches(step: int) -> list[Batch]:
            packed_at[step] = packer.step(step)
            return [self._batch(packed_at[step])]

        def resume(step: int) -> None:
            self.stage.truncate_metrics(step)
            before = self.stage.metrics()  # the last line says what the steps before had packed
            counts.update({name: int(before[-1][name]) if before else 0 for name in counts})

        def log(step: int, metrics: dict[str, float]) -> None:
            if step:
                packed = packed_at.pop(step - 1)
                counts["conversations"] += packed.conversations
                counts["truncated"] += packed.truncated
            at = {round(x * steps / LOOKS) for x in range(LOOKS + 1)}
            extra = {"val_loss": self._validate(model, held_out)} if step in at else {}
            if metrics or extra:
                self.stage.log(step, **metrics, **extra, **counts)

        fit(
            trainer,
            batches,
            loss,
            steps=steps,
            factor=lambda step: warmup_stable_decay(
                step, steps, warmup=self.config.warmup, decay_share=self.config.decay_share
            ),
            state=TrainState(self.stage.resume_dir),
            on_resume=resume,
            callbacks=(log,),
        )
        return self._finish(model, steps)

    def _batch(self, packed: Packed) -> Batch:
        batch = Batch.of(packed.ids, packed.targets, packed.weights)
        return replace(batch, firsts=torch.from_numpy(packed.firsts)) if self.config.apart else batch

    def _packer(self, draw: Any, rows: int, context: int) -> Packer:
        return Packer(self.chat, draw, rows=rows, context=context, pad=self.tokenizer.pad)

    def _steps(self, model: GPT, loss: LanguageModelLoss, packer: Packer, held_out: Packed) -> int:
        """Steps that fit what is left of the budget, from measured steps on a copy of the model."""
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.seconds is not None
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer = Trainer(model, self.config.loop, loss.kernels)
        trainer.step([self._batch(packer.step(0))], loss, 0.0)
        start = time.perf_counter()
        for step in (1, 2, 3):
            trainer.step([self._batch(packer.step(step))], loss, 0.0)
        wait(model.lm_head.weight.device)
        seconds = (time.perf_counter() - start) / 3
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
        start = time.perf_counter()
        self._validate(model, held_out)
        looks = (LOOKS + 1) * (time.perf_counter() - start)
        return max(10, int((self.config.seconds - self.stage.seconds() - looks - 3.0) / seconds))

    @torch.no_grad()
    def _validate(self, model: GPT, packed: Packed) -> float:
        batch = self._batch(packed)
        return LanguageModelLoss("float32")(model, batch).item() / max(1.0, batch.weight)

    def _finish(self, model: GPT, steps: int) -> dict[str, Any]:
        last = self.stage.metrics()[-1]
        if not last["conversations"]:
            raise DataError("no demonstration fits the context; raise pretrain.context")
        result = {
            "steps": steps,
            "conversations": last["conversations"],
            "truncated": last["truncated"],
            "loss": last["loss"],
            "val_loss": last["val_loss"],
            "examples": [self._example(i) for i in range(4)],
        }
        save_checkpoint(
            self.stage.checkpoint,
            model,
            tokenizer=self.tokenizer,
            stage="sft",
            run=self.run.root.name,
            parents=[self.base],
            metrics={"val_loss": last["val_loss"]},
        )
        TrainState(self.stage.resume_dir).clear()
        self.stage.finish(result)
        return result

    def _example(self, i: int) -> str:
        return self.tokenizer.decode(self.chat.render(self.draws(0, i)).ids, skip_special=False)
