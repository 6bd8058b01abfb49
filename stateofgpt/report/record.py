"""What a run left behind, read for the report.

Owns the tolerant reading: a stage that has not run, a file cut short or a number that is none leaves a gap in the
record and, where something was there but unreadable, a line in `problems`. Knows nothing about how any of it looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stateofgpt.errors import StateOfGptError
from stateofgpt.report.tree import Node, read_nodes
from stateofgpt.run import STAGES, Run, read_json
from stateofgpt.text.tokenizer import Tokenizer

T = TypeVar("T")
MODELS = ("base", "sft", "rl")
FALLBACKS = {  # where a part of summary.json comes from while the run has not written it: (stage, key or None)
    "data": ("tokenize", None),
    "tokenizer": ("tokenize", None),
    "pretrain": ("pretrain", None),
    "skills": ("eval", "skills"),
    "reward": ("reward", None),
    "rl": ("rl", None),
    "diversity": ("eval", "diversity"),
    "variety": ("eval", "variety"),
}


@dataclass(frozen=True)
class Size:
    """A model that was pretrained beside the run's own."""

    name: str  # width x layers
    n_params: float
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def read_sizes(run: Run) -> list[Size]:
    """The finished ones."""
    found = []
    for path in sorted(run.root.glob("pretrain/*x*/result.json")):
        stage = run.inside(f"pretrain/{path.parent.name}")
        n_params = number(mapping(read_json(path)).get("n_params")) or 0.0
        found.append(Size(stage.name, n_params, records(stage.metrics()), records(stage.samples())))
    return found


@dataclass(frozen=True)
class Record:
    """One run, as far as it can be read."""

    name: str  # what a command calls the run
    recipe: str
    seed: int
    summary: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    tokenizer: Tokenizer | None = None
    problems: tuple[str, ...] = ()
    order: tuple[str, ...] = STAGES  # the stages that the run's recipe has
    sizes: tuple[Size, ...] = ()  # pretrained beside the run's own, the smallest first

    @classmethod
    def read(cls, root: Path) -> Record:
        """Read the run in `root`; RunError if there is none."""
        run = Run.read(root)
        problems: list[str] = []

        def attempt(read: Callable[[], T], otherwise: T | None) -> T | None:
            try:
                return read()
            except (StateOfGptError, OSError, ValueError, KeyError, TypeError) as error:
                problems.append(str(error) or type(error).__name__)
                return otherwise

        stages = run.stages()
        summary = attempt(lambda: read_json(run.summary_path), None) if run.summary_path.exists() else None
        folders = [folder for stage in stages for folder in (stage.dir, stage.checkpoint)]
        tokenizers = [folder for folder in folders if (folder / "tokenizer.json").is_file()]
        return cls(
            name=root.name if root.parent.name == "runs" else str(root),
            recipe=run.recipe,
            seed=run.seed,
            summary=mapping(summary),
            results={stage.name: mapping(attempt(stage.result, None)) for stage in stages if stage.done},
            metrics={stage.name: records(attempt(stage.metrics, None)) for stage in stages},
            samples={stage.name: records(attempt(stage.samples, None)) for stage in stages},
            seconds={stage.name: attempt(stage.seconds, None) or 0.0 for stage in stages},
            nodes=tuple(attempt(lambda: read_nodes(root), None) or ()),
            tokenizer=attempt(lambda: Tokenizer.load(tokenizers[0]), None) if tokenizers else None,
            problems=tuple(problems),
            order=tuple(name for name in STAGES if name in (sequence(run.config.get("stages")) or STAGES)),
            sizes=tuple(sorted(attempt(lambda: read_sizes(run), None) or (), key=lambda size: size.n_params)),
        )

    def part(self, name: str) -> dict[str, Any]:
        """A part of summary.json, completed from the result of the stage that measured it."""
        stage, key = FALLBACKS[name]
        result = self.results.get(stage, {})
        measured = mapping(result.get(key)) if key else result
        return {**measured, **mapping(self.summary.get(name))}

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage returned; empty when it is not done."""
        return self.results.get(stage, {})

    def sources(self) -> list[dict[str, Any]]:
        """The rows of the mixture table."""
        for holder in (mapping(self.summary.get("data")), self.result("tokenize"), self.result("collect")):
            if rows := records(holder.get("sources")):
                return rows
        return []

    def leaderboard(self) -> list[dict[str, Any]]:
        """The arena's rows, best first."""
        rows = records(self.summary.get("arena")) or records(self.result("arena").get("leaderboard"))
        return [row for row in rows if number(row.get("rating")) is not None]

    def curve(self, stage: str, key: str, x: str = "step") -> list[tuple[float, float]]:
        """The points of a metric of a stage that are numbers."""
        return points(self.metrics.get(stage, []), key, x)

    def wall_seconds(self) -> dict[str, float]:
        """Stage -> seconds, in pipeline order, from summary.json or else from the stages' own clocks."""
        told = mapping(self.summary.get("wall_seconds"))
        told = {**told, **mapping(told.get("stages")), **mapping(told.get("per_stage"))}
        found = {stage: number(told.get(stage, self.seconds.get(stage))) for stage in STAGES}
        return {stage: value for stage, value in found.items() if value is not None}


def points(lines: Sequence[Mapping[str, Any]], key: str, x: str = "step") -> list[tuple[float, float]]:
    """The points of a metric that are numbers."""
    pairs = [(number(line.get(x)), number(line.get(key))) for line in lines]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a mapping with string keys, else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def records(value: object) -> list[dict[str, Any]]:
    """The mappings in a list; anything else in it, or anything else altogether, is left out."""
    return [mapping(item) for item in sequence(value) if isinstance(item, Mapping)]


def sequence(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []


def number(value: object) -> float | None:
    """The value as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def share_right(value: object) -> float | None:
    """right / n of {"right": .., "n": ..}, or None."""
    counts = mapping(value)
    right, n = number(counts.get("right")), number(counts.get("n"))
    return right / n if right is not None and n else None
