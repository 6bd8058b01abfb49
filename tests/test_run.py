"""Run folders under kills, full disks, second processes and torn lines."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stateofgpt.errors import RunError
from stateofgpt.run import STAGES, Run, read_json, sha256_file, write_atomic, write_json

CONFIG = {"minutes": 10, "pretrain": {"lr": 0.01, "steps": 3}}


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def opened(root: Path, **changes: Any) -> Run:
    return Run.open(root, "debug", {**CONFIG, **changes}, 0)


# ---------------------------------------------------------------------------------------------------------------- files


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "né\n")
    write_atomic(tmp_path / "a", b"\x00new")
    assert (tmp_path / "a").read_bytes() == b"\x00new"
    assert os.listdir(tmp_path) == ["a"]
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"\x00new").hexdigest()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="cannot write" if number == errno.EACCES else "disk full"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_real_limit_of_the_system_is_told_as_a_full_disk_and_leaves_no_part(tmp_path: Path) -> None:
    code = """
import os, resource, sys
from collections.abc import Callable
from pathlib import Path
from stateofgpt.errors import RunError
from stateofgpt.run import Run, write_atomic
root = Path(sys.argv[1])
run = Run.open(root, "debug", {}, 0)
stage = run.stage("sft")
write_atomic(root / "a", "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    write_atomic(root / "a", "x" * 100_000)
except RunError as error:
    print(error)
try:
    for step in range(100_000):
        stage.sample(step, text="y" * 1000)
except RunError as error:
    print(error)
print(step, len(stage.samples()), (stage.dir / "samples.jsonl").read_bytes()[-1:])
"""
    out, err = python(code, tmp_path).communicate(timeout=60)
    assert err == ""
    first, second, last = out.splitlines()
    assert first.startswith("disk full: could not write") and second.startswith("disk full: could not write")
    step, lines, ending = last.split(maxsplit=2)
    assert step == lines and int(step) > 0 and ending == r"b'\n'"
    assert (tmp_path / "a").read_text() == "old"
    assert not list(tmp_path.rglob("*.tmp"))


def test_kill_9_during_writes_leaves_a_whole_file_and_the_next_run_sweeps_the_rest(tmp_path: Path) -> None:
    code = """
import sys
from stateofgpt.run import Run, write_atomic
run = Run.open(sys.argv[1], "debug", {}, 0)
path = run.stage("sft").dir / "weights"
write_atomic(path, b"0" * 3_000_000)
print("ready", flush=True)
while True:
    for digit in b"123456789":
        write_atomic(path, bytes([digit]) * 3_000_000)
"""
    for attempt in range(4):
        process = python(code, tmp_path)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.01 + 0.013 * attempt)
        process.kill()
        process.communicate()
        content = (tmp_path / "sft" / "weights").read_bytes()
        assert len(content) == 3_000_000 and len(set(content)) == 1
    (tmp_path / "sft" / ".weights.1-1.tmp").write_bytes(b"half")
    Run.open(tmp_path, "debug", {}, 0).close()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("last_call", ["fsync", "replace"])
def test_kill_9_just_before_the_end_of_a_write_leaves_the_old_file(tmp_path: Path, last_call: str) -> None:
    code = """
import os, signal, sys
from stateofgpt.run import write_atomic
write_atomic(sys.argv[1], "old")
setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
write_atomic(sys.argv[1], "new")
"""
    process = python(code, tmp_path / "a", last_call)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.slow
def test_a_reader_never_meets_a_part_of_a_file(tmp_path: Path) -> None:
    path, size = tmp_path / "a", 4_000_000
    write_atomic(path, b"0" * size)
    stop = threading.Event()
    seen: list[tuple[int, int]] = []

    def read() -> None:
        while not stop.is_set():
            content = path.read_bytes()
            seen.append((len(content), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    for digit in b"123456789" * 2:
        write_atomic(path, bytes([digit]) * size)
    stop.set()
    reader.join()
    assert set(seen) == {(size, 1)}


def test_a_line_that_fits_only_in_part_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NearlyFull(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:5])

    with opened(tmp_path) as run:
        stage = run.stage("sft")
        stage.log(1, loss=1.0)
        before = (stage.dir / "metrics.jsonl").read_bytes()
        opener = lambda path, mode, buffering: NearlyFull(path, mode.replace("b", ""))  # noqa: E731
        monkeypatch.setattr("stateofgpt.run.files.open", opener, raising=False)
        with pytest.raises(RunError, match="disk full"):
            stage.log(2, loss=2.0)
        assert (stage.dir / "metrics.jsonl").read_bytes() == before


def test_json_is_whole_and_valid_whatever_it_is_given(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    value = {"path": Path("a/b"), "t": (1, np.float32(0.5)), "bad": math.nan, 3: np.int64(4), "text": "é\u2028"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == {"path": "a/b", "t": [1, 0.5], "bad": None, "3": 4, "text": "é\u2028"}
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json")["text"] == "é\u2028"


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_json_that_cannot_be_read_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RunError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_writing_where_there_is_no_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*no such file"):
        write_atomic(tmp_path / "no" / "a", "x")


# -------------------------------------------------------------------------------------------------------------- the run


def test_a_run_is_made_continued_and_read(tmp_path: Path) -> None:
    with opened(tmp_path / "r") as run:
        run.stage("sft").finish({"loss": 1.5})
        assert run.stage("sft") is run.stage("sft")
    with opened(tmp_path / "r") as run:
        assert run.stage("sft").done and run.stage("sft").result() == {"loss": 1.5}
        assert not run.stage("rl").done and run.stage("rl").result() is None
        run.stage("collect").log(0, loss=1)
        assert [stage.name for stage in run.stages()] == ["collect", "sft"]
        assert Run.read(tmp_path / "r").config == CONFIG
    assert (tmp_path / "r" / ".lock").read_bytes() == b""


def test_a_run_of_another_configuration_is_refused_and_the_differences_are_named(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(RunError, match=r"another configuration: pretrain\.lr is 0\.01 there, 0\.02 here; choose"):
        opened(tmp_path, pretrain={"lr": 0.02, "steps": 3})
    with pytest.raises(RunError, match="seed is 0 there, 1 here"):
        Run.open(tmp_path, "debug", CONFIG, 1)
    with pytest.raises(RunError, match='recipe is "debug" there, "laptop" here'):
        Run.open(tmp_path, "laptop", CONFIG, 0)
    with pytest.raises(RunError, match=r"new is null there, \{\} here"):
        opened(tmp_path, new={})
    with pytest.raises(RunError, match="and 2 more"):
        opened(tmp_path, a=1, b=2, c=3, d=4, e=5, f=6)
    opened(tmp_path).close()  # a refusal leaves no lock behind


def test_keys_that_do_not_matter_may_differ(tmp_path: Path) -> None:
    opened(tmp_path).close()
    changed = {"minutes": 5, "pretrain": {"lr": 9, "steps": 9}}
    Run.open(tmp_path, "debug", changed, 0, ignore_keys=("minutes", "pretrain")).close()
    with pytest.raises(RunError, match=r"pretrain\.steps"):
        Run.open(tmp_path, "debug", changed, 0, ignore_keys=("minutes", "pretrain.lr"))


def test_tuples_and_paths_in_a_configuration_do_not_count_as_a_change(tmp_path: Path) -> None:
    for _ in range(2):
        opened(tmp_path, corpus=(Path("a"),)).close()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds files but no run"):
        opened(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(RunError, match="cannot write"):
        opened(tmp_path / "thesis.tex")
    with pytest.raises(RunError, match=r"is no run: there is no run\.json"):
        Run.read(tmp_path)
    with pytest.raises(RunError, match="is no run: there is no such folder"):
        Run.read(tmp_path / "nowhere")


def test_a_damaged_run_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        opened(tmp_path)


def test_a_run_opened_for_reading_writes_nothing(tmp_path: Path) -> None:
    opened(tmp_path).close()
    stage = Run.read(tmp_path).stage("sft")
    writes: list[Callable[[], object]] = [
        lambda: stage.log(1),
        lambda: stage.sample(1),
        lambda: stage.finish({}),
        lambda: stage.decide("a", dict),
        lambda: stage.truncate_metrics(0),
        lambda: stage.timed().__enter__(),
    ]
    for write in writes:
        with pytest.raises(RunError, match="reading only"):
            write()
    assert not stage.dir.exists()
    assert stage.metrics() == stage.samples() == []
    assert stage.seconds() == 0 and not stage.done


def test_an_unknown_stage_gets_a_suggestion(tmp_path: Path) -> None:
    with opened(tmp_path) as run, pytest.raises(RunError, match='did you mean "pretrain"'):
        run.stage("pretrian")


# ----------------------------------------------------------------------------------------------------------------- lock

HOLD = """
import sys, time
from stateofgpt.run import Run
run = Run.open(sys.argv[1], "debug", {}, 0)
print("ready", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_work_in_one_run_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    process = python(HOLD, tmp_path)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with pytest.raises(RunError, match=f"in use by process {process.pid}"):
            Run.open(tmp_path, "debug", {}, 0)
        assert Run.read(tmp_path).recipe == "debug"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert str(process.pid) in (tmp_path / ".lock").read_text()
    Run.open(tmp_path, "debug", {}, 0).close()


def test_a_child_that_outlives_a_killed_run_does_not_keep_it_locked(tmp_path: Path) -> None:
    code = HOLD.replace('print("ready"', "import os; child = os.fork(); child and print(child")
    process = python(code, tmp_path)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        Run.open(tmp_path, "debug", {}, 0).close()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    "left",
    ['{"pid": 1, "ho', "", '{"pid": 1, "host": "%HOST", "boot": "before"}', '{"pid": 1, "host": "x", "boot": "%BOOT"}'],
)
def test_what_a_dead_process_left_in_the_lock_does_not_matter(tmp_path: Path, left: str) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id")
    if "%BOOT" in left and not boot.exists():
        pytest.skip("this system has no boot id")
    text = left.replace("%HOST", os.uname().nodename).replace(
        "%BOOT", boot.read_text().strip() if boot.exists() else ""
    )
    (tmp_path / ".lock").write_text(text)
    opened(tmp_path).close()


def test_a_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    text = json.dumps({"pid": os.getpid(), "host": "elsewhere", "boot": "another"})
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(RunError, match=r"in use on elsewhere; .* delete .*\.lock"):
        opened(tmp_path)
    assert (tmp_path / ".lock").read_text() == text


def test_without_kernel_locks_the_process_itself_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    opened(tmp_path).close()
    holder = {"pid": os.getppid(), "host": os.uname().nodename, "boot": ""}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    with pytest.raises(RunError, match=f"in use by process {os.getppid()}"):
        opened(tmp_path)
    process = python("")
    process.communicate()
    (tmp_path / ".lock").write_text(json.dumps({**holder, "pid": process.pid}))
    opened(tmp_path).close()


# ------------------------------------------------------------------------------------------------------------ the stage


def test_metrics_and_samples_come_back_as_they_were_logged(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    with opened(tmp_path) as run:
        stage = run.stage("sft")
        stage.log(0, loss=np.float32(2.5), tokens=10)
        stage.log(5, loss=math.nan)
        stage.sample(5, prompt="Q:\n", text="a\u2028b\x85")
        first, second = stage.metrics()
        assert (first["step"], first["loss"], first["tokens"], first["time"]) == (0, 2.5, 10, 0)
        assert isinstance(first["tokens"], int) and math.isnan(second["loss"])
        assert stage.samples() == [{"step": 5, "prompt": "Q:\n", "text": "a\u2028b\x85"}]
    for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\x00\x00\x00", b"{", b'{"step": 2, "loss": 1}\x00', b"17"])
def test_a_torn_last_line_is_left_out_and_healed(tmp_path: Path, torn: bytes) -> None:
    with opened(tmp_path) as run:
        stage = run.stage("sft")
        path = stage.dir / "metrics.jsonl"
        stage.log(1, loss=1.0)
        with path.open("ab") as file:
            file.write(torn)
        assert [line["step"] for line in stage.metrics()] == [1]
        stage.log(2, loss=2.0)
        assert [line["loss"] for line in stage.metrics()] == [1.0, 2.0]
        assert path.read_bytes().count(b"\n") == 2


def test_a_file_that_is_one_torn_line_is_healed(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        stage = run.stage("sft")
        (stage.dir / "samples.jsonl").write_bytes(b'{"st')
        stage.truncate_metrics(3)
        assert (stage.dir / "samples.jsonl").read_bytes() == b""
        stage.sample(1, text="x")
        assert stage.samples() == [{"step": 1, "text": "x"}]


def test_damage_in_the_middle_is_named_by_its_line(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        stage = run.stage("sft")
        (stage.dir / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
        with pytest.raises(RunError, match=r"metrics\.jsonl:2 is damaged"):
            stage.metrics()


def test_kill_9_while_logging_loses_no_line_and_the_next_attempt_goes_on(tmp_path: Path) -> None:
    code = """
import sys
from stateofgpt.run import Run
stage = Run.open(sys.argv[1], "debug", {}, 0).stage("rl")
print("ready", flush=True)
with stage.timed():
    for step in range(10**9):
        stage.log(step, loss=0.5)
"""
    process = python(code, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.kill()
    process.communicate()
    with Run.open(tmp_path, "debug", {}, 0) as run:
        stage = run.stage("rl")
        steps = [line["step"] for line in stage.metrics()]
        assert steps == list(range(len(steps))) and len(steps) > 10
        stage.truncate_metrics(5)
        stage.log(6, loss=1.0)
        assert [line["step"] for line in stage.metrics()] == list(range(7))


def test_truncation_drops_what_came_after_the_resumed_step_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        stage = run.stage("sft")
        stage.truncate_metrics(0)  # nothing there yet
        for step in (0, 10, 20):
            stage.log(step, loss=step / 3)
            stage.sample(step, text="é")
        path = stage.dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        stage.truncate_metrics(10)
        assert path.read_bytes() == b"".join(lines[:2])
        assert [sample["step"] for sample in stage.samples()] == [0, 10]
        before = path.stat().st_mtime_ns
        stage.truncate_metrics(10)
        assert path.stat().st_mtime_ns == before
        stage.truncate_metrics(-1)
        assert stage.metrics() == stage.samples() == []


def test_a_decision_is_made_once_for_all_attempts(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        first = run.stage("pretrain").decide("size", lambda: {"shape": (1, 2), "rate": 3.5})
        run.stage("pretrain").decide("dtype", lambda: {"dtype": "bf16"})
    with opened(tmp_path) as run:
        again = run.stage("pretrain").decide("size", lambda: pytest.fail("measured twice"))
        assert first == again == {"shape": [1, 2], "rate": 3.5}
    assert Run.read(tmp_path).stage("pretrain").decide("dtype", dict) == {"dtype": "bf16"}


def test_a_decision_that_takes_another_keeps_both(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        stage = run.stage("pretrain")
        stage.decide("outer", lambda: {"inner": stage.decide("inner", lambda: {"x": 1})["x"]})
        assert read_json(stage.dir / "decisions.json") == {"inner": {"x": 1}, "outer": {"inner": 1}}


def test_seconds_add_up_over_attempts_that_ended_in_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("stateofgpt.run.stage.time.monotonic", lambda: clock[0])
    with opened(tmp_path) as run:
        stage = run.stage("sft")
        with pytest.raises(KeyboardInterrupt), stage.timed(), stage.timed():
            clock[0] += 7
            assert stage.seconds() == 7
            stage.log(1, loss=1.0)  # saves the clock: a kill here would lose nothing
            assert read_json(stage.dir / "seconds.json") == {"seconds": 7}
            clock[0] += 1
            raise KeyboardInterrupt
        clock[0] += 1000
        assert stage.seconds() == 8
    with opened(tmp_path) as run:
        stage = run.stage("sft")
        with stage.timed():
            clock[0] += 2
            assert stage.seconds() == 10
            stage.finish({})
            assert read_json(stage.dir / "seconds.json") == {"seconds": 10}
        assert stage.metrics()[0]["time"] == 7
    assert Run.read(tmp_path).stage("sft").seconds() == 10


def test_the_stages_are_the_pipeline_in_order() -> None:
    assert STAGES == ("collect", "tokenize", "pretrain", "sft", "reward", "rl", "eval", "arena")


# ------------------------------------------------------------------------------------------------------ first mistakes


def test_a_mistake_before_anything_is_done_leaves_no_run_and_the_mended_command_begins_one(tmp_path: Path) -> None:
    def fails(root: Path, error: BaseException, *done: str) -> None:
        with pytest.raises(type(error)), opened(root, wrong=True) as run, run.stage("rl").timed():
            run.stage("rl").decide("device", lambda: {"device": "cpu"})
            for name in done:
                run.stage("rl").log(1, loss=1.0) if name == "step" else (run.root / name).touch()
            raise error

    fails(tmp_path / "a", RunError("a file is missing"))
    assert not (tmp_path / "a").exists()
    opened(tmp_path / "a").close()
    (tmp_path / "theirs").mkdir()
    fails(tmp_path / "theirs", RunError("again"))
    assert os.listdir(tmp_path / "theirs") == []
    for number, (error, done) in enumerate([
        (RunError("late"), ["step"]), (RunError("late"), ["notes"]), (KeyboardInterrupt(), []), (ValueError("bug"), []),
    ]):  # fmt: skip
        fails(tmp_path / f"kept{number}", error, *done)
        assert (tmp_path / f"kept{number}" / "run.json").exists()
    with pytest.raises(RunError), opened(tmp_path / "kept2", wrong=True):
        raise RunError("of a run that was there before")
    assert (tmp_path / "kept2" / "run.json").exists()
