"""Runs and models by their name: what a RUN or a MODEL argument of the command line means.

Owns: `RUN:stage`, the newest of each, and where the feedback on a model belongs. Knows nothing of what a checkpoint
holds beyond that `config.json` marks one.
"""

from __future__ import annotations

from pathlib import Path

from stateofgpt.config import suggestion
from stateofgpt.errors import RunError
from stateofgpt.run.stage import STAGES

RUNS = Path("runs")


def resolve_run(spec: str | None, runs_dir: Path = RUNS) -> Path:
    """The run folder of a RUN argument, a path or a name under `runs_dir`; the newest run when it is None."""
    found = _newest_runs(runs_dir)[0:1] if spec is None else _find_run(spec, runs_dir)
    if found:
        return found[0]
    if spec is None:
        raise RunError(f"there is no run under {runs_dir}; `sog run laptop` makes one")
    names = [run.name for run in _newest_runs(runs_dir)]
    known = suggestion(spec, names) or (f"; there are {', '.join(names)}" if names else "")
    raise RunError(f'there is no run "{spec}"{known}')


def resolve_model(spec: str, runs_dir: Path = RUNS) -> Path:
    """The checkpoint folder of a MODEL argument: a checkpoint's folder, or `RUN:stage` (RUN a path or a name)."""
    if (Path(spec) / "config.json").is_file():
        return Path(spec)
    name, colon, stage = spec.rpartition(":")
    if not colon:
        for run in _find_run(spec, runs_dir):
            if models := _models_of(run):
                raise RunError(f'"{spec}" is a run; say which of its models: {models}')
            raise RunError(f'"{spec}" is a run that has no model yet; the command that began it goes on with it')
        where = "no config.json in that folder" if Path(spec).is_dir() else "no such folder"
        raise RunError(f'there is no model "{spec}" ({where}){_known_models(spec, runs_dir)}')
    for run in _find_run(name, runs_dir):
        if stage in STAGES and (run / stage / "checkpoint" / "config.json").is_file():
            return run / stage / "checkpoint"
        raise RunError(f'{run} has no model "{stage}"; it has {_models_of(run) or "none yet"}')
    raise RunError(f'there is no run "{name}"{_known_models(spec, runs_dir)}')


def newest_model(runs_dir: Path = RUNS) -> Path:
    """The model to talk to when none is named: of the newest run that has one, the RLHF policy, else the SFT model."""
    for run in _newest_runs(runs_dir):
        for stage in ("rl", "sft"):
            if (run / stage / "checkpoint" / "config.json").is_file():
                return run / stage / "checkpoint"
    raise RunError(f"there is no trained assistant under {runs_dir}; `sog run laptop` raises one, or name a MODEL")


def feedback_of(model: Path) -> Path | None:
    """Where the thumbs on a model are kept: its run's feedback file, or None for a checkpoint outside a run."""
    run = model.resolve().parent.parent
    return run / "feedback.sqlite" if (run / "run.json").is_file() else None


def _newest_runs(runs_dir: Path) -> list[Path]:
    files = sorted(runs_dir.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in files]


def _find_run(name: str, runs_dir: Path) -> list[Path]:
    return [path for path in (Path(name), runs_dir / name) if name and (path / "run.json").is_file()]


def _models_of(run: Path) -> str:
    names = [f"{run}:{stage}" for stage in STAGES if (run / stage / "checkpoint" / "config.json").is_file()]
    return ", ".join(names)


def _known_models(spec: str, runs_dir: Path) -> str:
    files = sorted(runs_dir.glob("*/*/checkpoint/config.json"))
    names = [f"{path.parents[2].name}:{path.parents[1].name}" for path in files]
    return suggestion(spec, names) or (f"; there are {', '.join(names)}" if names else "; `sog run laptop` raises one")
