"""Pretraining: next-token prediction on the mixture, from random weights (or another model's) to a base model.

Owns what is particular to the stage: the dial's decision, learning rates, held-out bits per byte, live samples. The
loop, the optimizer and the order of data live elsewhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from stateofgpt.config import from_dict
from stateofgpt.data.batches import PretrainBatches
from stateofgpt.data.shards import Shards
from stateofgpt.errors import ConfigError
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import save_checkpoint
from stateofgpt.model.device import CPU, wait
from stateofgpt.model.form import Form
from stateofgpt.model.gpt import GPT, Arch, GPTConfig
from stateofgpt.model.lora import is_factor
from stateofgpt.run import Run, Stage
from stateofgpt.stages.decision import plan_for, plan_new, planned_device
from stateofgpt.stages.held_out import held_out
from stateofgpt.stages.parent import begin_from
from stateofgpt.stages.way import decide_engine
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train import repeats
from stateofgpt.train.dial import timed_steps
from stateofgpt.train.loop import LoopConfig, Trainer, fit
from stateofgpt.train.loss import Batch, LanguageModelLoss
from stateofgpt.train.ramp import Cuts, Ramp, seconds_per_batch
from stateofgpt.train.schedule import warmup_stable_decay
from stateofgpt.train.state import TrainState

MEASURING = 0.02  # share of the seconds that timing a step may take, if more than one repetition fits
PROMPTS = (  # one for each kind of text in the default mixture
    "Psalms 23\n\n1 The LORD is my",
    "Iris: Hi! How are you doing today?\nJack:",
    "forest:",
    "import os\nimport sys\n\n\ndef ",
    "Q: What is 127 + 58? Show your work.\nA:",
    "Names of creatures:",
)


@dataclass(frozen=True)
class Config:
    """Give `seconds`, or `steps` with a `width` and `layers`; what is left open the dial decides.

    With `parent`, the folder of a model, its weights are trained on: the shape is its own, and `context` is how much of
    its context a row uses."""

    seconds: float | None = None
    steps: int | None = None
    width: int | None = None
    layers: int | None = None
    context: int = 256
    rows: int = 8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compiled: bool | None = None
    fused: bool | None = None
    apart: bool = True  # documents of one row do not attend to each other
    warmup: int = 10
    decay_share: float = 0.6
    sample_at: tuple[float, ...] = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
    sample_tokens: int = 48
    eval_at: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    eval_tokens: int = 8192
    loop: LoopConfig = field(default_factory=LoopConfig)
    law: Path | None = None  # a ladder's; None: the one in the folder `ladder` beside the run, else Epoch's constants
    prompts: tuple[str, ...] | None = None  # to sample from; None: those for the default mixture
    sizes: int | None = None  # models in all: with 3 the two next smaller ones beside it (`stages.sizes`)
    parent: str | None = None
    lora: int | None = None  # the rank of adapters that are trained in place of all weights
    arch: Arch | None = None  # of a model from nothing; None: qwen3
    tied: bool | None = None  # embedding and head are one matrix; None: they are
    kv_heads: int | None = None  # None: as many as heads
    biases: bool | None = None  # None: as the architecture has them
    ramp: tuple[float, float] | None = None  # (share of a batch to begin with, share of the rows until it is whole)
    fewest_layers: int | None = None  # the dial takes no model with fewer
    repeat_decay: float | None = None  # most by which weight decay grows where text repeats; None: 300; 1: it stays
    device: str | None = None  # as torch names it; None: cuda where there is one, else cpu

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ConfigError("pretrain needs either seconds or steps, and not both")
        if self.sizes is not None and self.sizes < 1:
            raise ConfigError(f"sizes is {self.sizes}; it must be 1 or more")
        if self.parent is not None and (self.width, self.layers, self.sizes) != (None, None, None):
            raise ConfigError(
                "a run that begins from a model has that model's shape; leave out width, layers and sizes"
            )
        if self.lora is not None and (self.parent is None or self.lora < 1):
            raise ConfigError(f"lora is {self.lora}; it is a rank of at least 1, for a run that begins from a model")
        if self.parent is not None and (self.arch, self.tied, self.kv_heads, self.biases) != (None,) * 4:
            raise ConfigError(
                "a run that begins from a model has that model's architecture; leave out arch, tied, kv_heads "
                "and biases"
            )
        if self.repeat_decay is not None and self.repeat_decay < 1.0:
            raise ConfigError(f"repeat_decay is {self.repeat_decay:g}; it is a factor, and 1 leaves decay as it is")
        form = self.form()
        if self.width is not None and (problem := form.misfit(self.width)):
            raise ConfigError(problem)
        Cuts(1, self.rows, self.growing())

    def form(self) -> Form:
        """What a model from nothing looks like; ConfigError for what no model looks like."""
        return Form(self.arch or "qwen3", self.tied is not False, self.kv_heads, self.biases)

    def growing(self) -> Ramp | None:
        """How batches grow, if they do."""
        return None if self.ramp is None else Ramp(*self.ramp)


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train a base model on the shards of the tokenize stage; returns the stage's result."""
    stage = run.stage("pretrain")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        decide_engine(run)
        return train(config, run, stage)


def train(config: Config, run: Run, stage: Stage) -> dict[str, Any]:
    """The same in a folder of any name: several models can be trained on one run's shards."""
    return _Pretraining(config, run, stage).work()


def plan(config: Config, run: Run) -> dict[str, Any]:
    """What the dial decides: shape, precision, compilation."""
    return _Pretraining(config, run, run.stage("pretrain"))._plan()


class _Pretraining:
    def __init__(self, config: Config, run: Run, stage: Stage) -> None:
        self.config, self.run, self.stage = config, run, stage
        self.parent = None if config.parent is None else Path(config.parent)
        self.rows, self.context = config.rows, config.context
        folder = run.stage("tokenize").dir
        self.tokenizer = Tokenizer.load(folder)
        self.shards = Shards.open(folder)
        self.weights = {s["name"]: s["weight"] for s in (run.stage("collect").result() or {})["sources"]}
        self.begins = self.tokenizer.eot if config.apart else None

    def work(self) -> dict[str, Any]:
        if self.parent is None:
            plan = self.stage.decide("plan", self._plan)
            model = GPT(from_dict(GPTConfig, plan["model"]))
            model.init_weights(torch.Generator().manual_seed(self.run.seed))
        else:
            model = begin_from(self.parent, self.stage, self.config.lora, self.run.seed)
            plan = self.stage.decide("plan", lambda: plan_for(self.config, model))
        device = planned_device(plan)
        model.to(device)
        loss = LanguageModelLoss(plan["dtype"], plan["compiled"], plan["fused"], device)
        rows, context = plan.get("rows", self.config.rows), plan.get("context", self.config.context)
        self.rows, self.context = rows, context
        whole = self.stage.decide("steps", lambda: {"steps": self._steps(model, loss)})["steps"]
        cuts = Cuts(whole, rows, self.config.growing())
        batches = PretrainBatches(self.shards, self.weights, rows, context, self.run.seed, whole * rows)
        trainer = Trainer(model, self._loop(batches, cuts.steps), loss.kernels)
        watch = _Watch(self, model, cuts)
        fit(
            trainer,
            lambda step: [Batch.of(*batches.rows(*cuts.of(step)), begins=self.begins)],
            loss,
            steps=cuts.steps,
            factor=lambda step: warmup_stable_decay(
                cuts.progress(step), whole, warmup=self.config.warmup, decay_share=self.config.decay_share
            ),
            state=TrainState(self.stage.resume_dir),
            on_resume=self.stage.truncate_metrics,
            callbacks=(watch,),
        )
        return self._finish(model, cuts, batches)

    def _loop(self, batches: PretrainBatches, steps: int) -> LoopConfig:
        """The loop's settings, with more weight decay where a model from nothing reads its text many times. A run that
        an earlier version of the program began has its usual decay until it is done."""
        epochs = sum(share * batches.epochs()[name] for name, share in batches.share().items())
        most = repeats.MOST if self.config.repeat_decay is None else self.config.repeat_decay
        optim = self.config.loop.optim
        shrinking = (optim.muon_lr if optim.use_muon else optim.lr) * optim.weight_decay
        usual = self.parent is not None or bool(self.stage.metrics())
        times = 1.0 if usual else repeats.decay_times(epochs, steps, shrinking, most)
        times = self.stage.decide("repeats", lambda: {"epochs": epochs, "decay_times": times})["decay_times"]
        return replace(self.config.loop, optim=replace(optim, weight_decay=optim.weight_decay * times))

    def _plan(self) -> dict[str, Any]:
        return plan_new(self.config, self.tokenizer.vocab_size, self.run.root)

    def _steps(self, model: GPT, loss: LanguageModelLoss) -> int:
        """Whole batches that fit what is left of the budget, from the measured time of steps on this machine."""
        c = self.config
        if c.steps is not None:
            return c.steps
        assert c.seconds is not None
        seconds, device = c.seconds, model.lm_head.weight.device

        def forward_backward(rows: int) -> float:
            ids = torch.zeros(rows, self.context, dtype=torch.int64)
            apart = device.type != CPU and self.begins is not None  # what is compiled must be what training needs
            firsts = torch.zeros(rows, self.context, dtype=torch.int32) if apart else None
            batch = Batch(ids, ids, torch.ones(rows, self.context), firsts).to(device)
            return timed_steps(lambda: loss(model, batch), model, 9, MEASURING * seconds, c.loop.exact is not False)

        # elsewhere there may be no room for another one; a rate of 0 changes nothing
        copy = GPT(model.config) if device.type == CPU else model
        trainer = Trainer(copy, c.loop, loss.kernels)
        for p in trainer.optimizer.params.values():
            p.grad = torch.zeros_like(p)
        trainer.optimizer.step(0.0)  # the first also allocates
        start, n = time.perf_counter(), 0
        while n == 0 or (n < 3 and time.perf_counter() - start < MEASURING * c.seconds):
            trainer.optimizer.step(0.0)
            wait(device)
            n += 1
        optimizing = (time.perf_counter() - start) / n
        batch_seconds = seconds_per_batch(lambda rows: forward_backward(rows) + optimizing, self.rows, c.growing())
        start = time.perf_counter()
        self.evaluate(copy, c.eval_tokens // 4)
        looks = (time.perf_counter() - start) * (6 + len(c.eval_at)) + 0.5 * len(c.sample_at)
        left = c.seconds - self.stage.seconds() - looks
        return max(20, int(left / batch_seconds))

    def evaluate(self, model: GPT, max_tokens: int) -> dict[str, float]:
        """Held-out bits per byte per source, and their mean by mixture weight."""
        return held_out(model, self.shards, self.weights, self.context, max_tokens, self.begins)

    def _finish(self, model: GPT, cuts: Cuts, batches: PretrainBatches) -> dict[str, Any]:
        lines = self.stage.metrics()
        with_loss = [line for line in lines if "tokens_per_second" in line]
        bpb = [line for line in lines if "val_bpb" in line]
        result = {
            "n_params": sum(p.numel() for name, p in model.named_parameters() if not is_factor(name)),
            "steps": cuts.steps,
            "tokens": cuts.read(cuts.steps) * self.context,
            "tokens_per_second": sorted(x["tokens_per_second"] for x in with_loss)[len(with_loss) // 2],
            "val_bpb_start": bpb[0]["val_bpb"],
            "val_bpb": bpb[-1]["val_bpb"],
            "val_bpb_by_source": {
                k.removeprefix("val_bpb_"): v for k, v in bpb[-1].items() if k.startswith("val_bpb_")
            },
            "realised": {"share": batches.share(), "epochs": batches.epochs()},
            "plan": self.stage.decide("plan", dict),
        }
        save_checkpoint(
            self.stage.checkpoint,
            model,
            tokenizer=self.tokenizer,
            stage="pretrain",
            run=self.run.root.name if self.stage.name == "pretrain" else f"{self.run.root.name}/{self.stage.name}",
            parents=[] if self.parent is None else [self.parent],
            metrics={"val_bpb": result["val_bpb"], "tokens": result["tokens"]},
        )
        TrainState(self.stage.resume_dir).clear()
        self.stage.finish(result)
        return result


class _Watch:
    """The loop's callback: metrics after every step, held-out loss and samples at the chosen points."""

    def __init__(self, work: _Pretraining, model: GPT, cuts: Cuts) -> None:
        self.work, self.model, self.cuts = work, model, cuts
        self.sample_steps = {cuts.step_at(x) for x in work.config.sample_at}
        self.eval_steps = {cuts.step_at(x) for x in work.config.eval_at}
        self.since = time.perf_counter()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        config, stage, context = self.work.config, self.work.stage, self.work.context
        tokens = self.cuts.read(step) * context
        if step > 0:
            seconds = time.perf_counter() - self.since
            per_step = self.cuts.of(step - 1)[1] * context
            stage.log(step, **metrics, tokens=tokens, tokens_per_second=per_step / seconds)
        if step in self.eval_steps:
            budget = config.eval_tokens if step in (0, self.cuts.steps) else config.eval_tokens // 4
            stage.log(step, tokens=tokens, **self.work.evaluate(self.model, budget))
        if step in self.sample_steps:
            self.sample(step, tokens)
        self.since = time.perf_counter()

    def sample(self, step: int, tokens: int) -> None:
        """Keep what the model makes of the fixed prompts now."""
        work = self.work
        texts = PROMPTS if work.config.prompts is None else work.config.prompts
        engine = Engine(self.model, max_batch=len(texts))
        prompts = [[work.tokenizer.eot, *work.tokenizer.encode(text)] for text in texts]
        params = SamplingParams(
            max_tokens=work.config.sample_tokens, temperature=0.8, seed=work.run.seed, stop_ids=(work.tokenizer.eot,)
        )
        for text, completion in zip(texts, engine.complete(prompts, params), strict=True):
            work.stage.sample(step, tokens=tokens, prompt=text, text=work.tokenizer.decode(completion.ids, inner=True))
