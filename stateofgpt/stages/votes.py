"""A reward model from a file of people's votes, with nothing but a model to begin from: no run of stages before it.

Owns: the fast ways (a head on frozen features; the last blocks trained on cached states), cross-validation by prompt,
and the result with its health. How a file is read, features are kept and folds are told apart is others'.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch

from stateofgpt.data.vote_file import Comparisons, read_comparisons
from stateofgpt.errors import ConfigError, DataError, RunError
from stateofgpt.eval.health import health, pairs_of, right
from stateofgpt.model.checkpoint import load_model, read_lineage, save_checkpoint
from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import RewardModel
from stateofgpt.rl.linear import Choice, Floats, Ints, Judged, choose, fit_heads, folds_of, redrawn
from stateofgpt.run import Run, Stage, sha256_file
from stateofgpt.stages.place import begin_on
from stateofgpt.stages.upper_training import UpperConfig, train_upper
from stateofgpt.stages.vote_features import FEATURES, Material, material
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer

FEWEST_PROMPTS = 20
ENSEMBLE = 5
SHARES = (0.125, 0.25, 0.5, 1.0)
FEATURES_SHARE = {True: 0.4, False: 0.8}  # of the time, with upper blocks trained after and without


@dataclass(frozen=True)
class Config:
    """`data` is the file, `model` the folder begun from. With `lora` adapters of that rank learn on the last `layers`
    blocks; with `layers` alone these blocks learn whole; with neither only a head learns, at the depth that does best.
    `context` bounds the tokens of a prompt with its longest answer. `device`: None is a GPU where there is one."""

    data: str
    model: str
    seconds: float | None = None
    lora: int | None = None
    layers: int | None = None
    folds: int = 5
    context: int = 512
    upper: UpperConfig | None = None
    device: str | None = None
    stages: tuple[str, ...] = ("reward",)  # what a run of this kind has, for the report

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(f"--folds is {self.folds}, cross-validation needs at least 2")
        for name in ("lora", "layers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name} is {value}, must be at least 1")


def run(config: Config, run: Run, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train, cross-validate and save; returns the stage's result."""
    stage = run.stage("reward")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        return _Voting(config, run, stage, tell).work()


class _Voting:
    def __init__(self, config: Config, run: Run, stage: Stage, tell: Callable[[str], None]) -> None:
        self.config, self.run, self.stage, self.tell = config, run, stage, tell
        self.folder = Path(config.model)
        self.tokenizer = Tokenizer.load(self.folder)
        self.chat = ChatFormat(self.tokenizer)
        device = begin_on(stage, config.device, begun=bool(stage.decided("inputs")))
        self.model: GPT = load_model(self.folder).to(device)
        self.model.requires_grad_(False)
        self.cut = _cut(config, self.model.config.num_hidden_layers)

    def work(self) -> dict[str, Any]:
        config, found = self.config, self._votes()
        seconds = config.seconds and config.seconds * FEATURES_SHARE[self.cut is not None]
        context = min(config.context, self.model.config.max_position_embeddings)
        made = material(
            self.model, self.chat, found.rankings, self.stage, context=context, cut=self.cut, seconds=seconds,
            seed=self.run.seed, tell=self.tell,
        )  # fmt: skip
        folds = folds_of(made.rankings, config.folds, self.run.seed)
        if sum(map(len, folds)) < FEWEST_PROMPTS or len(folds) < 2:
            raise DataError(f"{config.data} asks too few different prompts to be told apart in folds; add some")
        everything = np.arange(len(made.rankings))
        told = [self._fold(made, number, np.setdiff1d(everything, fold), fold) for number, fold in enumerate(folds)]
        return self._finish(found, made, folds, told)

    def _votes(self) -> Comparisons:
        found = read_comparisons(self.config.data)
        self.tell(found.told())
        if len(found.rankings) < FEWEST_PROMPTS:
            raise DataError(
                f"{found.path} holds {len(found.rankings)} comparisons; at least {FEWEST_PROMPTS} are needed"
            )
        if 2 * found.n_faults > found.n_rows:
            raise DataError(f"more than half of the rows of {found.path} are bad; the first: {found.faults[0]}")
        here = {"data": sha256_file(found.path), "model": read_lineage(self.folder).id}
        if (known := self.stage.decide("inputs", lambda: here)) != here:
            what = found.path if known["data"] != here["data"] else self.folder
            raise RunError(f"{what} is not what this run began with; put that back, or choose another --out")
        return found

    # ---- one fold -------------------------------------------------------------------------------------------------

    def _fold(self, made: Material, number: int, learn: Ints, test: Ints) -> dict[str, Any]:
        """Scores of a fold's rankings by what was learned from the others; kept, so that a killed run has them."""
        own = self.run.inside(f"reward/fold_{number}")
        if (done := own.result()) is not None:
            return done
        seed = self.run.seed * 1000 + number
        choice, head, x = self._head(made, learn, seed)
        result: dict[str, Any] = {
            "depth": made.depths[choice.column],
            "strength": choice.strength,
            "scores": _rows(made.scores(x @ head), test),
            "ensemble": [
                _fitted(made, x, redrawn(made.pairs, learn, seed * 100 + i), choice.strength, test)
                for i in range(ENSEMBLE)
            ],
            "by_data": [
                {"rankings": n, "scores": _fitted(made, x, made.pairs.of(part), choice.strength, test)}
                for n, part in _shares(learn, seed)
            ],
            "by_depth": [
                self._at_depth(made, column, choice.strength, learn, test) for column in range(len(made.depths))
            ],
        }
        if self.cut is not None:
            upper = train_upper(
                self.model,
                self.cut,
                head,
                made,
                learn,
                own,
                self._upper(),
                seed,
                folds=self.config.folds,
                parent=self.stage,
            )
            result["head_scores"] = result["scores"]
            result["scores"] = upper.scores(made, test)
        accuracy = _accuracy(result["scores"], made, test)
        self.tell(
            f"fold {number + 1}: depth {result['depth']}, L2 {choice.strength:g}, {accuracy:.1%} of held-out pairs"
        )
        own.finish(result)
        return result

    def _head(self, made: Material, among: Ints, seed: int) -> tuple[Choice, Floats, Floats]:
        """The choice for the rankings `among`, its head, and the features it is for."""
        columns = range(len(made.depths)) if self.cut is None else [len(made.depths) - 1]
        sets = [made.last[:, column].astype(np.float64) for column in columns]
        choice = choose(sets, made.rankings, among, made.pairs, seed)
        x = sets[choice.column]
        choice = replace(choice, column=columns[choice.column])
        return choice, fit_heads(x, made.pairs.of(among), (choice.strength,))[0], x

    def _at_depth(self, made: Material, column: int, strength: float, learn: Ints, test: Ints) -> dict[str, Any]:
        """Scores at one depth by the last token and by the mean over tokens, at one strength."""
        out: dict[str, Any] = {"depth": made.depths[column]}
        for name, features in (("last", made.last), ("mean", made.mean)):
            x = features[:, column].astype(np.float64)
            out[name] = _fitted(made, x, made.pairs.of(learn), strength, test)
        return out

    def _upper(self) -> UpperConfig:
        return replace(self.config.upper or UpperConfig(), rank=self.config.lora, seconds=self.config.seconds)

    # ---- all of it ------------------------------------------------------------------------------------------------

    def _finish(
        self, found: Comparisons, made: Material, folds: Sequence[Ints], told: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        def pooled(pick: Callable[[dict[str, Any]], Any]) -> list[list[float]]:
            rows: list[list[float]] = [[] for _ in made.rankings]
            for fold, result in zip(folds, told, strict=True):
                for i, row in zip(fold, pick(result), strict=True):
                    rows[i] = row
            return rows

        def accuracy(pick: Callable[[dict[str, Any]], Any]) -> float:
            return float(right(pairs_of(pooled(pick), made.rankings).difference).mean())

        scores = pooled(lambda r: r["scores"])
        ensemble = [pooled(lambda r, i=i: r["ensemble"][i]) for i in range(ENSEMBLE)] if self.cut is None else []  # type: ignore[misc]
        measured = health(scores, made.rankings, ensemble=ensemble, seed=self.run.seed)
        model, final = self._final(made)
        spread = [score for row in final for score in row]
        result: dict[str, Any] = {
            "votes": _about(found, made.n_left_out),
            "n_prompts": measured["n_prompts"],
            "n_pairs": measured["n_pairs"],
            "n": measured["n_pairs"],
            "pair_accuracy": measured["accuracy"]["value"],
            "n_params": sum(p.numel() for p in model.parameters()),
            "depth": model.config.num_hidden_layers,
            "packing": sum(row.unpacked for row in made.rows) / sum(map(len, made.rows)),
            "by_data": [
                {"rankings": fmean(r["by_data"][i]["rankings"] for r in told),
                 "accuracy": accuracy(lambda r, i=i: r["by_data"][i]["scores"])}  # type: ignore[misc]
                for i in range(len(told[0]["by_data"]))
            ],
            "by_depth": [
                {"depth": depth,
                 "last": accuracy(lambda r, c=c: r["by_depth"][c]["last"]),  # type: ignore[misc]
                 "mean": accuracy(lambda r, c=c: r["by_depth"][c]["mean"])}  # type: ignore[misc]
                for c, depth in enumerate(made.depths)
            ],
            "mean": fmean(spread),
            "std": pstdev(spread) or 1.0,
            "simulated": False,
            "health": measured,
        }  # fmt: skip
        if self.cut is not None:
            result["head_accuracy"] = accuracy(lambda r: r["head_scores"])
        save_checkpoint(
            self.stage.checkpoint, model, tokenizer=self.tokenizer, stage="reward", run=self.run.root.name,
            parents=[self.folder],
            metrics={"pair_accuracy": result["pair_accuracy"], "trained_on": self.stage.decide("inputs", dict)["data"]},
        )  # fmt: skip
        self.stage.finish(result)
        shutil.rmtree(self.stage.dir / FEATURES, ignore_errors=True)
        return result

    def _final(self, made: Material) -> tuple[RewardModel, list[list[float]]]:
        """The reward model that learned from all votes, and its scores of them."""
        everything = np.arange(len(made.rankings))
        seed = self.run.seed * 1000 + 999
        choice, head, x = self._head(made, everything, seed)
        gpt = self.model
        depth = made.depths[choice.column]
        gpt.model.layers = gpt.model.layers[:depth]
        gpt.config = replace(gpt.config, num_hidden_layers=depth)
        model = RewardModel(gpt, self.tokenizer.pad)
        with torch.no_grad():
            model.score.weight.copy_(torch.from_numpy(head)[None])
        if self.cut is None:
            return model, made.scores(x @ head)
        own = self.run.inside("reward/all")
        upper = train_upper(
            gpt,
            self.cut,
            head,
            made,
            everything,
            own,
            self._upper(),
            seed,
            folds=self.config.folds,
            parent=self.stage,
        )
        upper.module.put_into(model, self.cut)
        return model, upper.scores(made, everything)


def _about(found: Comparisons, n_left_out: int) -> dict[str, Any]:
    """What the file held, and what of it was not learned from."""
    return {
        "file": found.path.name,
        "form": found.form,
        "rows": found.n_rows,
        "bad_rows": found.n_faults,
        "faults": list(found.faults),
        "ties": found.n_ties,
        "unpaired": found.n_unpaired,
        "left_out": n_left_out,
    }


def _cut(config: Config, n_layers: int) -> int | None:
    """The first block that learns, or None where only a head does."""
    if config.lora is None and config.layers is None:
        return None
    layers = config.layers or min(4, n_layers)
    if layers > n_layers:
        raise ConfigError(f"--layers is {layers}, and the model has {n_layers}")
    return n_layers - layers


def _rows(scores: list[list[float]], chosen: Ints) -> list[list[float]]:
    return [scores[i] for i in chosen]


def _fitted(made: Material, x: Floats, pairs: Judged, strength: float, test: Ints) -> list[list[float]]:
    """Scores of the rankings `test` by a head fitted to `pairs`."""
    return _rows(made.scores(x @ fit_heads(x, pairs, (strength,))[0]), test)


def _accuracy(scores: Sequence[Sequence[float]], made: Material, chosen: Ints) -> float:
    found = pairs_of(scores, [made.rankings[i] for i in chosen])
    return float(right(found.difference).mean()) if len(found) else 0.5


def _shares(learn: Ints, seed: int) -> list[tuple[int, Ints]]:
    """Growing parts of the rankings learned from, each within the next."""
    order = np.random.default_rng(seed).permutation(learn)
    return [(n, np.sort(order[:n])) for n in (max(4, round(share * len(learn))) for share in SHARES)]
