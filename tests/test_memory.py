"""train/memory.py in a process of its own, by what the kernel counts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
from stateofgpt.train.memory import keep_memory

kept = keep_memory() if sys.argv[1] == "kept" else None

def faults_of_a_pass():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(12 << 20, dtype=torch.uint8).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(6):  # where the first blocks lie is chance, and a freed one may be too small, aligned, to be used again
    faults_of_a_pass()
print(json.dumps([kept, faults_of_a_pass()]))
"""


def faults(way: str) -> tuple[bool | None, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True)
    kept, count = json.loads(done.stdout)
    return kept, count


@pytest.mark.slow
def test_what_is_freed_is_used_again_without_asking_the_kernel() -> None:
    kept, count = faults("kept")
    if not kept:
        pytest.skip("the C library is not glibc")
    assert count < 500  # a pass touches 8 blocks of 3,072 pages
