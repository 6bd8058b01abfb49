"""The command line: verbs, overrides, errors in one line, and signals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from stateofgpt.cli import STAGE_VERBS, main
from stateofgpt.config import apply_overrides, to_dict
from stateofgpt.errors import DataError, InterruptedRun
from stateofgpt.run import STAGES, Run
from stateofgpt.serve.config import Config

VERBS = ("run", *STAGE_VERBS, "report", "sample", "logprobs", "chat", "serve", "keys", "improve", "import", "runs")


@dataclass(frozen=True)
class Pretrain:
    lr: float = 0.01


@dataclass(frozen=True)
class Recipe:
    name: str
    minutes: float = 10.0
    pretrain: Pretrain = field(default_factory=Pretrain)


@dataclass
class Fakes:
    """What the verbs call, replaced by recorders of their arguments."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    execute: Callable[..., None] = lambda *_: None


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    fakes = Fakes()

    def module(name: str, **content: Any) -> None:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for key, value in content.items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)

    def load(
        name: str,
        *,
        minutes: float | None,
        seed: int,
        corpus: tuple[Path, ...],
        overrides: Mapping[str, str],
        model: Path | None = None,
    ) -> Recipe:
        fakes.calls.append(("load", name, minutes, seed, corpus))
        return apply_overrides(Recipe(name, minutes or 10.0), overrides)

    def execute(recipe: Recipe, out: Path, only: str | None = None) -> None:
        fakes.calls.append(("execute", recipe, out, only))
        fakes.execute()

    def record(name: str, result: object = None) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            fakes.calls.append((name, *arguments, *named.values()))
            return result

        return call

    module("stateofgpt.recipes", load=load, names=lambda: ("debug", "laptop"), runner=lambda name: execute)
    module("stateofgpt.recipes.pipeline", execute=execute)
    module("stateofgpt.report.build", build=record("build", Path("report.html")))
    module("stateofgpt.report.tree", print_tree=record("tree"))
    module("stateofgpt.serve.process", serve=record("serve"))
    module("stateofgpt.serve.terminal", chat=record("chat"))
    module("stateofgpt.stages.improve", improve=record("improve"))
    monkeypatch.chdir(tmp_path)
    return fakes


def checkpoint(run: Path, *stages: str) -> None:
    Run.open(run, "debug", {}, 0).close()
    for stage in stages:
        (run / stage / "checkpoint").mkdir(parents=True)
        (run / stage / "checkpoint" / "config.json").write_text("{}")


def sog(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stateofgpt", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})


# ---------------------------------------------------------------------------------------------------------------- verbs


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"usage: sog {verb}" in capsys.readouterr().out


def test_help_lists_every_verb_in_the_order_of_the_story() -> None:
    out = sog("--help").stdout
    places = [out.index(f"\n    {verb} ") for verb in VERBS]
    assert places == sorted(places)
    assert tuple(STAGE_VERBS) == STAGES
    assert sog().stdout == out
    assert sog("--version").stdout.startswith("stateofgpt ")


def test_run_loads_the_recipe_and_executes_it(fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    words = [
        "run",
        "debug",
        "--minutes",
        "2.5",
        "--seed",
        "7",
        "--corpus",
        "mine.txt",
        "--corpus",
        ".",
        "--pretrain.lr",
        "0.02",
    ]
    assert main(words) == 0
    assert fakes.calls == [
        ("load", "debug", 2.5, 7, (Path("mine.txt"), Path("."))),
        ("execute", Recipe("debug", 2.5, Pretrain(0.02)), Path("runs/debug"), None),
    ]


@pytest.mark.parametrize("words", ["--pretrain.lr=0.02 run", "run --pretrain.lr=0.02", "run --pretrain.lr 2e-2"])
def test_an_override_may_stand_before_the_recipe_but_not_before_the_verb(fakes: Fakes, words: str) -> None:
    code = main([*words.split(), "debug", "--out=there"])
    if words.startswith("run"):
        assert code == 0
        assert fakes.calls[-1] == ("execute", Recipe("debug", pretrain=Pretrain(0.02)), Path("there"), None)
    else:
        assert code == 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_verb_runs_only_that_stage(fakes: Fakes, stage: str) -> None:
    assert main([stage, "--recipe", "debug", "--seed", "3"]) == 0
    assert fakes.calls == [
        ("load", "debug", None, 3, ()),
        ("execute", Recipe("debug"), Path("runs/debug"), stage),
    ]


def test_a_stage_verb_takes_the_recipe_the_seed_and_the_settings_of_the_run_it_continues(fakes: Fakes) -> None:
    stored = Recipe("debug", 3.0, Pretrain(0.5))
    Run.open("there", "debug", to_dict(stored), 9).close()
    assert main(["sft", "--out", "there"]) == 0
    assert fakes.calls == [("load", "debug", None, 9, ()), ("execute", stored, Path("there"), "sft")]
    assert main(["sft", "--out", "there", "--pretrain.lr", "0.1"]) == 0
    assert fakes.calls[-1] == ("execute", Recipe("debug", 3.0, Pretrain(0.1)), Path("there"), "sft")
    assert main(["sft", "--out", "there", "--minutes", "4"]) == 0
    assert fakes.calls[-1] == ("execute", Recipe("debug", 4.0), Path("there"), "sft")


def test_chat_and_serve_take_the_newest_assistant_and_keep_feedback_in_its_run(fakes: Fakes, tmp_path: Path) -> None:
    checkpoint(tmp_path / "runs/old", "pretrain", "sft", "rl")
    os.utime(tmp_path / "runs/old/run.json", (1, 1))
    checkpoint(tmp_path / "runs/new", "pretrain", "sft")
    assert main(["chat", "--temperature", "0", "--device", "cuda:1"]) == 0
    assert (
        main(["serve", "old:rl", "--device", "cpu", "--port", "8080", "--weights", "int8", "--cache", "bfloat16"]) == 0
    )
    assert main(["serve", "runs/old/rl/checkpoint", "--feedback", "f.sqlite"]) == 0
    old, new = Path("runs/old/rl/checkpoint"), Path("runs/new/sft/checkpoint")
    config = Config(port=8080, device="cpu", weights="int8", cache="bfloat16")
    assert fakes.calls == [
        ("chat", new, (tmp_path / "runs/new/feedback.sqlite"), 0.0, 0, None, "cuda:1"),
        ("serve", [old], tmp_path / "runs/old/feedback.sqlite", config, None),
        ("serve", [old], Path("f.sqlite"), Config(), None),
    ]


def test_report_improve_and_runs_find_their_run(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs/debug")
    checkpoint(run, "rl")
    assert main(["report"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert main(["improve", "debug", "--minutes", "3"]) == 0
    assert main(["runs"]) == 0
    assert fakes.calls == [
        ("build", run),
        ("improve", run, 3.0, 0),
        ("tree", Path("runs")),
    ]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("rnu debug", 'there is no verb "rnu"; did you mean "run"?'),
        ("wibble", "`sog --help` lists them"),
        ("--wibble", "--wibble"),
        ("run", "RECIPE"),
        ("run laptpo", 'there is no recipe "laptpo"; did you mean "laptop"?'),
        ("run zzz", "there are debug, laptop"),
        ("run debug extra", "unrecognized arguments: extra"),
        ("run debug --minuts 5", 'unknown option "--minuts"; did you mean "--minutes"?'),
        ("run debug --minutes soon", 'must be a number of minutes, not "soon"'),
        ("run debug --minutes nan", "must be a number of minutes"),
        ("run debug --minutes inf", "must be a number of minutes"),
        ("run debug --minutes 0", "must be a number of minutes"),
        ("run debug --seed -1", "whole number from 0"),
        ("run debug --corpus nowhere", "--corpus nowhere: there is no such file or folder"),
        ("run debug --pretrain.lr", "--pretrain.lr needs a value"),
        ("run debug --pretrain.lr --seed 1", "--pretrain.lr needs a value"),
        ("run debug --pretrain.rl 1", 'unknown setting "pretrain.rl"; did you mean "pretrain.lr"?'),
        ("run debug --lr 1", 'unknown setting "lr"; did you mean "pretrain.lr"?'),
        ("run debug --pretrain.lr high", 'pretrain.lr must be a number, not "high"'),
        ("serve --prot 1", 'unknown option "--prot"; did you mean "--port"?'),
        ("serve --port 70000", "must be a port"),
        ("serve --pretrain.lr 1", 'unknown option "--pretrain.lr"'),
        ("chat", "there is no trained assistant under runs"),
        ("chat nobody", 'there is no model "nobody" (no such folder)'),
        ("report nothing", 'there is no run "nothing"'),
        ("sample nobody:rl", 'there is no run "nobody"'),
        ("sample m --n 0", "whole number from 1"),
        ("reward --health m data --lora 4", "--lora is for training, and --health only measures"),
        ("reward --health m data --minutes 4", "--minutes is for training"),
        ("plan --talk --params 7B", "--talk is a table of its own and takes no --params"),
        ("runs nowhere", "nowhere is no folder of runs"),
        ("sample begun", '"begun" is a run that has no model yet'),
        ("logprobs m", "--text"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    fakes: Fakes, capsys: pytest.CaptureFixture[str], words: str, says: str
) -> None:
    Path("data").touch()
    Run.open("begun", "debug", {}, 0).close()
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert says in err
    assert not any(call[0] == "execute" for call in fakes.calls)


def test_an_unknown_model_is_answered_with_the_known_ones(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(Path("runs/laptop"), "pretrain", "sft")
    for words, says in {
        "laptop:rl": 'runs/laptop has no model "rl"; it has runs/laptop:pretrain, runs/laptop:sft',
        "laptop": "is a run; say which of its models: runs/laptop:pretrain, runs/laptop:sft",
        "latpop:sft": 'there is no run "latpop"; did you mean "laptop:sft"?',
        "runs": "no config.json in that folder",
        "laptop:../sft": "has no model",
    }.items():
        assert main(["sample", words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problem", "code", "says"),
    [
        (DataError("a.jsonl:3: no\nmessages"), 2, "error: a.jsonl:3: no messages\n"),
        (KeyboardInterrupt(), 130, "stopped; the same command continues\n"),
        (InterruptedRun(exit_code=143), 143, "stopped; the same command continues\n"),
        (
            OSError(28, "No space left on device"),
            2,
            "error: disk full; free some space, and the same command continues\n",
        ),
        (PermissionError(13, "Permission denied", "x"), 2, "error: x: permission denied\n"),
        (
            MemoryError(),
            2,
            "error: there is not enough memory (Python could get no more); free some, or ask for less: a smaller "
            "model, fewer rows, a shorter context\n",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            2,
            "error: there is not enough memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried "
            "to allocate 9 bytes.); free some, or ask for less: a smaller model, fewer rows, a shorter context\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..."),
            2,
            "error: the GPU's memory is full (CUDA out of memory); free some, or ask for less: a smaller model, fewer "
            "rows, a shorter context\n",
        ),
    ],
)
def test_what_ends_a_verb_becomes_its_exit_code(
    fakes: Fakes, capsys: pytest.CaptureFixture[str], problem: BaseException, code: int, says: str
) -> None:
    def end() -> None:
        raise problem

    fakes.execute = end
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["run", "debug"]) == code
    assert capsys.readouterr().err == says
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_stop_inside_a_library_that_forgives_every_exception_still_stops(
    fakes: Fakes, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old states are removed with `ignore_errors` after every save: a signal may come just there."""
    (tmp_path / "old").mkdir()

    def open_slowly(*words: object, **settings: object) -> NoReturn:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal's handler did not raise")

    def tidy_up() -> None:
        with monkeypatch.context() as slow:
            slow.setattr(os, "open", open_slowly)
            shutil.rmtree(tmp_path / "old", ignore_errors=True)
        raise AssertionError("the stop was swallowed")

    fakes.execute = tidy_up
    assert main(["run", "debug"]) == 143
    assert capsys.readouterr().err == "stopped; the same command continues\n"


def test_a_bug_of_ours_keeps_its_traceback(fakes: Fakes) -> None:
    def end() -> None:
        raise ZeroDivisionError

    fakes.execute = end
    with pytest.raises(ZeroDivisionError):
        main(["run", "debug"])


# -------------------------------------------------------------------------------------------------------------- signals

WORK = """
import sys, time, types
recipes, pipeline = types.ModuleType("stateofgpt.recipes"), types.ModuleType("stateofgpt.recipes.pipeline")
recipes.names, recipes.load = (lambda: ("debug",)), (lambda name, **_: name)
def execute(recipe, out, only=None):
    try:
        print("ready", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        print("tidied", flush=True)
        if "slowly" in sys.argv:
            time.sleep(30)
        raise
pipeline.execute, recipes.runner = execute, lambda name: execute
sys.modules["stateofgpt.recipes"], sys.modules["stateofgpt.recipes.pipeline"] = recipes, pipeline
from stateofgpt.cli import main
sys.exit(main(["run", "debug"]))
"""


def work(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORK, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_stage_tidy_up_and_says_how_to_go_on(number: signal.Signals, code: int) -> None:
    process = work()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("tidied\n", "stopped; the same command continues\n", code)


def test_a_second_signal_ends_it_at_once() -> None:
    process = work("slowly")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "tidied\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "stateofgpt", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b"" and done.returncode in (0, 128 + signal.SIGPIPE)


def test_no_color_and_a_pipe_are_respected() -> None:
    assert "\x1b" not in sog("rnu").stderr


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint folder, and stand-ins for the tokenizer (bytes) and the engine behind it."""

    class Tokenizer:
        eot, stops = 256, (258, 256)

        @classmethod
        def load(cls, folder: Path) -> Tokenizer:
            assert (folder / "config.json").exists()
            return cls()

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

        def decode(self, ids: list[int], *, inner: bool = False) -> str:
            return bytes(ids).decode()

        def token_str(self, token: int) -> str:
            return chr(token)

    class Engine:
        max_context = 2

        def __init__(self, model: types.SimpleNamespace, **_: object) -> None:
            assert model.moved == ["cpu"]

        def complete(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
            assert all(prompt[0] == 256 for prompt in prompts)
            assert all(one.stop_ids == (258, 256) and one.temperature == 0.0 for one in params)
            return [types.SimpleNamespace(ids=list(f" {one.seed}/{one.max_tokens}".encode())) for one in params]

        def score(self, sequences: list[list[int]]) -> list[list[float]]:
            return [[-float(token) for token in ids[1:]] for ids in sequences]

    def load_model(folder: Path) -> types.SimpleNamespace:
        loaded = types.SimpleNamespace(moved=[])
        loaded.to = lambda device: (loaded.moved.append(device), loaded)[1]
        return loaded

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, content in {
        "stateofgpt.text.tokenizer": {"Tokenizer": Tokenizer},
        "stateofgpt.infer.engine": {"Engine": Engine, "SamplingParams": types.SimpleNamespace},
        "stateofgpt.model.checkpoint": {"load_model": load_model},
    }.items():
        fake = types.ModuleType(name)
        fake.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, fake)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_logprobs_prints_one_number_for_each_token_after_the_first(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logprobs", str(model), "--text", "-ab"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ids": [45, 97, 98],
        "tokens": ["-", "a", "b"],
        "logprobs": [-97.0, -98.0],
    }
    assert main(["logprobs", str(model), "--text", ""]) == 0
    assert json.loads(capsys.readouterr().out) == {"ids": [], "tokens": [], "logprobs": []}


def test_logprobs_of_a_file_are_its_bits_per_byte_read_in_parts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abc\ufffd", encoding="utf-8")
    assert main(["logprobs", str(model), "--file", str(file)]) == 0
    told = json.loads(capsys.readouterr().out)
    nats = sum("abc\ufffd".encode())  # the engine above: a token costs its id; every token is scored once
    assert told == {
        "file": str(file),
        "bytes": 6,
        "tokens": 6,
        "context": 2,
        "nats": nats,
        "bits_per_byte": pytest.approx(nats / math.log(2) / 6),
    }


def test_logprobs_of_a_file_that_cannot_be_scored_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    for name, says in (
        ("empty.txt", "is empty"),
        ("none.txt", "cannot be read"),
        ("latin.txt", "no UTF-8 text (byte 1)"),
    ):
        assert main(["logprobs", str(model), "--file", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("words", [["sample"], ["logprobs", "--text", "ab"]])
def test_a_device_that_is_not_there_is_one_sentence(
    model: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], str(model), *words[1:], "--device", "cuda:99"]) == 2
    assert "'cuda:99' is not on this machine" in capsys.readouterr().err
    assert main([words[0], str(model), *words[1:], "--device", "gpu"]) == 2
    assert "there is no device 'gpu'" in capsys.readouterr().err


def test_sample_gives_every_continuation_its_own_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(model), "--prompt", "--n", "--max-tokens", "5", "--temperature", "0", "--seed", "3"]
    assert main(words) == 0
    assert capsys.readouterr().out == "--n 3/5\n"
    assert main([*words, "--n", "2"]) == 0
    assert capsys.readouterr().out == "--- 1 of 2\n--n 3/5\n\n--- 2 of 2\n--n 4/5\n"
