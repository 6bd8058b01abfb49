"""A run folder: its configuration, and per stage the metrics, samples, decisions, result and checkpoint.

Owns: every path inside a run, the atomic writing of files, and the lock that keeps two processes out of one folder.
Knows nothing of what a stage computes. `kill -9` at any moment leaves each file as it was before, or as it is after:

    runs/laptop/
      run.json           recipe, seed, configuration; written when the run is made
      .lock              who works in here (empty: nobody)
      summary.json  report.html  feedback.sqlite
      pretrain/          one folder per stage
        metrics.jsonl    one line per logged step        samples.jsonl   texts kept at some steps
        decisions.json   what was measured, once         seconds.json    wall time over all attempts
        checkpoint/      the finished model              resume/         the state to continue from
        result.json      written last: the stage is done
"""

from __future__ import annotations

from stateofgpt.run.files import read_json, sha256_file, write_atomic, write_json
from stateofgpt.run.folder import Run
from stateofgpt.run.models import feedback_of, newest_model, resolve_model, resolve_run
from stateofgpt.run.stage import STAGES, Stage

__all__ = [
    "STAGES",
    "Run",
    "Stage",
    "feedback_of",
    "newest_model",
    "read_json",
    "resolve_model",
    "resolve_run",
    "sha256_file",
    "write_atomic",
    "write_json",
]
