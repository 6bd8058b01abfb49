"""Killed in the middle of any stage, the same command ends with the same weights, bit for bit, and the same results.

One undisturbed debug run, made small and saving after every step, is what all the others are compared with. A test that
is about one stage begins from a copy of it in which that stage and the later ones have not happened yet.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from command import TRAINED, files, one_sentence, records, result, sog, start, weights

from stateofgpt.run import STAGES

pytestmark = pytest.mark.slow

SMALL = {
    "pretrain.steps": 12,
    "pretrain.sample_tokens": 8,
    "sft.steps": 10,
    "reward.n_prompts": 24,
    "reward.held_out_prompts": 8,
    "reward.max_tokens": 24,
    "rl.batch": 8,
    "rl.held_out_prompts": 8,
    "rl.max_tokens": 24,
    "eval.key": 4,
    "eval.max_tokens": 24,
    "arena.prompts": 8,
    "arena.max_tokens": 24,
    "pretrain.loop.save_every_s": 0,
    "sft.loop.save_every_s": 0,
    "reward.training.loop.save_every_s": 0,
    "rl.save_every_s": 0,
}
PATIENCE_S = 120.0


def command(run: Path) -> list[object]:
    return ["run", "debug", "--out", run, *(f"--{setting}={value}" for setting, value in SMALL.items())]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "debug"
    made = sog(*command(run))
    assert made.returncode == 0, made.stderr
    return run


def before(stage: str, undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was when `stage` began."""
    run = tmp_path / "debug"
    shutil.copytree(undisturbed, run)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(run / later)
    for made_last in ("summary.json", "report.html"):
        (run / made_last).unlink()
    return run


def assert_the_same(run: Path, undisturbed: Path, stages: Sequence[str] = STAGES) -> None:
    """Texts, shards, metrics, samples, results and weights are those of the undisturbed run, in the stages' order."""
    for stage in stages:
        for made in sorted(path.name for path in (undisturbed / stage).iterdir()):
            here, there = run / stage / made, undisturbed / stage / made
            if made.endswith(".jsonl"):
                assert records(here) == records(there), f"{stage}/{made}"
            elif stage in ("collect", "tokenize") and made not in ("seconds.json", "result.json"):
                assert here.read_bytes() == there.read_bytes(), f"{stage}/{made}"
        assert result(run, stage) == result(undisturbed, stage), stage
        if stage in TRAINED:
            assert weights(run, stage) == weights(undisturbed, stage), stage
    if (run / "report.html").exists():
        assert set(files(run)) == set(files(undisturbed)), "a kill left something behind"


# ------------------------------------------------------------------------------------------------- kills at some moment


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def first_line(run: Path, stage: str) -> bytes:
    return (run / stage / "metrics.jsonl").read_bytes().splitlines()[0]


def steps(n: int) -> Callable[[Path], bool]:
    """In the middle of training: `n` lines of metrics are there."""
    return lambda folder: lines(folder / "metrics.jsonl") >= n


def there(name: str, *, after_s: float = 0.0) -> Callable[[Path], bool]:
    """A file of the stage exists, since `after_s` seconds."""

    def look(folder: Path) -> bool:
        found = (folder / name).exists()
        if found:
            time.sleep(after_s)
        return found

    return look


MOMENTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], bool]]] = {  # two in each stage, the later one second
    "collect": (there("skills.train.jsonl"), there("dictionary.json")),
    "tokenize": (there("tokenizer.json"), there("dialogues.train.json")),
    "pretrain": (steps(3), steps(8)),
    "sft": (steps(3), steps(7)),
    "reward": (there("sampled/heldout_000000.jsonl"), steps(3)),
    "rl": (there("decisions.json"), steps(3)),  # the first line is a look of the guards, before any state
    "eval": (there("."), there("decisions.json", after_s=0.2)),
    "arena": (there("."), there(".", after_s=0.1)),
}


def kill(run: Path, stage: str, moment: Callable[[Path], bool], number: signal.Signals) -> subprocess.Popen[str]:
    """Begin or continue the run, and send it a signal at a moment in the middle of a stage."""
    process = start(*command(run))
    deadline = time.monotonic() + PATIENCE_S
    while not moment(run / stage):
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        assert time.monotonic() < deadline, f"the moment in {stage} never came"
        time.sleep(0.002)
    process.send_signal(number)
    return process


def test_killed_twice_in_every_stage_the_same_command_ends_with_the_same_weights(
    undisturbed: Path, tmp_path: Path
) -> None:
    run, begun = tmp_path / "debug", {}
    for stage, (first, second) in MOMENTS.items():
        process = kill(run, stage, first, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (run / stage / "result.json").exists(), stage

        gentle = signal.SIGTERM if STAGES.index(stage) % 2 else signal.SIGINT
        process = kill(run, stage, second, gentle)
        _, err = process.communicate()
        assert process.returncode == 128 + gentle, f"{stage}: {err}"
        assert err.splitlines()[-1] == "stopped; the same command continues" and "Traceback" not in err
        assert not (run / stage / "result.json").exists(), stage
        if stage in TRAINED:
            begun[stage] = first_line(run, stage)

    made = sog(*command(run))
    assert made.returncode == 0, made.stderr
    assert set(MOMENTS) == set(STAGES) and set(begun) == set(TRAINED)
    for stage, line in begun.items():  # continued and not begun anew: it still has the time at which it was written
        assert first_line(run, stage) == line, stage
    assert_the_same(run, undisturbed)


# ------------------------------------------------------------------------------------------- kills at a point of a save

POINTS = (  # several saves of one run, one after the other
    "save:begin@pretrain/resume/step_2",
    "save:before_manifest@pretrain/resume/step_6",
    "save:before_rename@pretrain/resume/step_12",
    "save:renamed@pretrain/checkpoint",
    "save:between_renames@pretrain/checkpoint",
    "save:before_manifest@sft/checkpoint",
    "save:files@reward/resume/step_1",
    "save:before_rename@reward/checkpoint",
    "save:renamed@rl/resume/step_1",
    "save:between_renames@rl/checkpoint",
)
EARLIER = {"save:between_renames@rl/checkpoint": "save:renamed@rl/checkpoint"}  # it needs a checkpoint to replace


def test_killed_inside_one_save_after_another_it_still_ends_the_same(undisturbed: Path, tmp_path: Path) -> None:
    run = before("pretrain", undisturbed, tmp_path)
    for point in (p for last in POINTS for p in (EARLIER.get(last), last) if p):
        made = sog(*command(run), SOG_CRASH_AT=point)
        assert made.returncode == 137, f"{point}: {made.stdout[-300:]} {made.stderr}"
    made = sog(*command(run))
    assert made.returncode == 0, made.stderr
    assert_the_same(run, undisturbed)


# ----------------------------------------------------------------------------------------------------- damage and disks


def finish(stage: str, run: Path, undisturbed: Path) -> str:
    """Finish the stage; what was said on stderr."""
    made = sog(stage, "--out", run)
    assert made.returncode == 0, made.stderr
    assert_the_same(run, undisturbed, STAGES[: STAGES.index(stage) + 1])
    return made.stderr


def test_a_damaged_state_is_set_aside_and_the_one_before_it_gives_the_same_weights(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = before("sft", undisturbed, tmp_path)
    kill(run, "sft", steps(5), signal.SIGKILL).communicate()
    newest = max((run / "sft" / "resume").glob("step_*[0-9]"), key=lambda path: int(path.name.removeprefix("step_")))
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    said = finish("sft", run, undisturbed)
    assert f"warning: {newest.name.replace('_', ' ')} cannot be resumed from" in said


def test_a_checkpoint_that_was_tampered_with_stops_the_run_and_restored_it_goes_on(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = before("arena", undisturbed, tmp_path)
    file = run / "sft" / "checkpoint" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    made = sog(*command(run))
    assert made.returncode == 2 and f"{file} is not the file that was saved" in one_sentence(made.stderr)
    file.write_bytes(content)
    finish("arena", run, undisturbed)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # stands in for a disk: writing more fails
from stateofgpt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_stops_the_run_in_one_sentence_and_with_space_it_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    run = before("pretrain", undisturbed, tmp_path)
    earlier = {name: content for name, content in files(run).items() if not name.startswith("pretrain")}
    made = sog(*command(run), code=LIMITED)
    assert made.returncode == 2
    assert re.match(r"disk full: .*pretrain.*the same command", one_sentence(made.stderr))
    left = files(run)
    assert {name: content for name, content in left.items() if not name.startswith("pretrain")} == earlier
    assert not [name for name in left if ".incomplete" in name or name.endswith(".tmp")]
    finish("pretrain", run, undisturbed)
