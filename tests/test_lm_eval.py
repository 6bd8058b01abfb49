"""A harness that others judge models with, against the server: it must find what our own scoring finds.

Runs where `lm_eval` is installed with its extra `api`; nothing here needs it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_keeper import Served, gate, made  # noqa: F401 fixtures: a server over it
from test_loader import folder  # noqa: F401 a fixture: runs/tiny with its checkpoints

from stateofgpt.model.checkpoint import load_model
from stateofgpt.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("lm_eval", "aiohttp", "tenacity")),
        reason="lm_eval[api] is not installed",
    ),
]

WORDS = ("what", "is", "four", "five", "thousand", "user", "tool", "and", "it", "the", "4729", "386", "?", "Ω")
CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def questions(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    return [
        {"question": text(rng.randrange(1, 12)), "choices": [text(rng.randrange(1, 5)) for _ in range(4)], "answer": 0}
        for _ in range(count)
    ]


def evaluated(arguments: str, work: Path) -> dict[str, list[dict[str, Any]]]:
    """What `lm_eval` logged of every sample, by task."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "own_choice,own_text", "--include_path", str(work), "--output_path", str(work / "out")]
    offline = {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command += ["--log_samples", "--batch_size", "1"]
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for task in ("own_choice", "own_text"):
        (path,) = (work / "out").rglob(f"samples_{task}_*.jsonl")
        found[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


@torch.inference_mode()
def scored(model: Any, before: list[int], after: list[int]) -> float:
    """The log-probability of `after` behind `before`, in double precision."""
    logprobs = model(torch.tensor([before + after]))[0].double().log_softmax(-1)
    return float(sum(logprobs[len(before) + i - 1, token] for i, token in enumerate(after)))


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_lm_eval_finds_our_own_log_probabilities(
    made: Served,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    backend: str,
) -> None:
    asked = questions(12)
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps(one) for one in asked))
    for name, task in (("choice", CHOICE), ("text", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(task.format(file=tmp_path / "asked.jsonl"))
    where = (
        f"model=tiny:rl,base_url=http://127.0.0.1:{made.port}/v1/completions,tokenizer_backend={backend},max_length=127"
    )
    found = evaluated(f"{where},tokenizer={folder}", tmp_path)
    model, tokenizer = load_model(folder).eval(), Tokenizer.load(folder)
    begin = tokenizer.eot if backend == "huggingface" else tokenizer.im_end  # the other backend takes id 0 for none
    differences = []
    for sample in found["own_choice"]:
        ids = tokenizer.encode(sample["doc"]["question"])
        for choice, (response,) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            whole = tokenizer.encode(f"{sample['doc']['question']} {choice}")
            wanted = scored(model, whole[: len(ids)], whole[len(ids) :])
            differences.append(abs(float(response[0]) - wanted))
    for sample in found["own_text"]:
        wanted = scored(model, [begin], tokenizer.encode(sample["doc"]["question"]))
        (response,) = sample["resps"]
        value = response[0] if isinstance(response, list) else response
        differences.append(abs(float(value) - wanted))
    assert len(differences) == 12 * 5
    print(f"the greatest difference is {max(differences):.2e}")
    assert max(differences) < 1e-4
