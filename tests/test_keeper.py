"""An engine that dies: nobody is left waiting, the server says so, and comes back or leaves with a clear error."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedLoop, served, tokenizer
from test_connection import wait_for
from test_engine import make_model
from test_loader import folder  # noqa: F401 a fixture: runs/tiny with its checkpoints

from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import CheckpointError
from stateofgpt.infer.engine import Engine
from stateofgpt.infer.loop import FRUITLESS, EngineDied, EngineFailed, EngineHung, EngineLoop
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve import process
from stateofgpt.serve.app import create_app
from stateofgpt.serve.config import Config
from stateofgpt.serve.keeper import EngineLost, Keeper
from stateofgpt.serve.loader import load_assistant
from stateofgpt.serve.shelf import Shelf

pytestmark = pytest.mark.slow  # together they take long

LONG = SamplingParams(max_tokens=40)


def dies_at(engine: Engine, step: int, error: BaseException) -> None:
    """Let a step of the engine, and all after it, raise."""
    real, left = engine.step, [step]

    def broken() -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real()

    engine.step = broken  # type: ignore[method-assign]


# -- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engines_thread_ends_everybody_is_told_and_nobody_waits() -> None:
    engine = Engine(make_model(), max_batch=2)
    dies_at(engine, 5, SystemExit("something called exit"))
    loop = EngineLoop(engine)
    drawn: list[int] = []
    ends: list[BaseException] = []

    def listen(prompt: list[int]) -> None:
        try:
            drawn.extend(event.token for event in loop.events([loop.add(prompt, LONG)]))
        except EngineDied as error:
            ends.append(error)

    readers = [threading.Thread(target=listen, args=([1, 2, number],)) for number in range(4)]  # two wait for a row
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()
    assert len(ends) == 4 and 0 < len(drawn) <= 10
    assert not loop.alive and isinstance(loop.died, SystemExit) and loop.busy == 0
    assert "exit" not in str(ends[0])  # what went wrong is the log's
    for more in (lambda: loop.add([1], LONG), lambda: loop.score([[1, 2]]), lambda: loop.embed([[1]])):
        with pytest.raises(EngineDied):
            more()
    loop.close()


def test_a_job_that_ends_the_thread_is_answered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(make_model())
    hook: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", hook.append)

    def leave(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(engine, "score", leave)
    with EngineLoop(engine) as loop:
        with pytest.raises(EngineFailed):
            loop.score([[1, 2]])
        wait_for(lambda: not loop.alive)
    assert not hook  # it was dealt with


def test_an_engine_that_fails_with_no_request_left_to_blame_is_dead() -> None:
    engine = Engine(make_model())
    with EngineLoop(engine) as loop:
        request = loop.add([1, 2], LONG)
        next(loop.events([request]))
        engine.cancel = lambda _: None  # type: ignore[method-assign]  # what is broken stays in the engine
        engine.release = engine.cancel  # type: ignore[method-assign]
        dies_at(engine, 0, RuntimeError("broken for good"))
        with pytest.raises(EngineFailed):
            list(loop.events([request]))
        loop.cancel(request)
        wait_for(lambda: not loop.alive)
        assert isinstance(loop.died, RuntimeError) and FRUITLESS > 1


# -- steps that do not come back -------------------------------------------------------------------------------------


@pytest.fixture
def wall() -> Iterator[threading.Event]:
    """A step that hangs goes on when this is set: after the test."""
    found = threading.Event()
    yield found
    found.set()


def hangs_at(engine: Engine, step: int, wall: threading.Event) -> None:
    """Let a step of the engine take until `wall` is set."""
    real, left = engine.step, [step]

    def stuck() -> Any:
        left[0] -= 1
        if left[0] < 0:
            wall.wait(60)
        return real()

    engine.step = stuck  # type: ignore[method-assign]


def test_an_engine_that_is_given_up_tells_all_who_wait_and_nothing_it_does_later_is_heard(
    wall: threading.Event,
) -> None:
    engine = Engine(make_model(), max_batch=2)
    loop = EngineLoop(engine)
    list(loop.events([loop.add([1, 2], LONG)]))
    wait_for(lambda: loop.turn is None)
    hangs_at(engine, 3, wall)
    ends: list[BaseException] = []

    def told(work: Callable[[], object]) -> None:
        try:
            work()
        except EngineDied as error:
            ends.append(error)

    works: list[Callable[[], object]] = [lambda: list(loop.events([loop.add([1, 2], LONG)]))] * 3
    works.append(lambda: loop.score([[1, 2, 3]] * 9))  # more than there are turns
    readers = [threading.Thread(target=told, args=(work,)) for work in works]
    for reader in readers:
        reader.start()
    wait_for(lambda: "wall.wait" in loop.where())
    turn = loop.turn
    time.sleep(0.05)
    assert turn is not None and loop.turn == turn and turn.tokens >= 64  # prompts are read whole here
    loop.give_up(EngineHung("it was too long"))
    for reader in readers:
        reader.join(5)
    assert len(ends) == 4 and not loop.alive and loop.hung and loop.busy == 0
    loop.close()  # does not wait
    wall.set()
    loop._thread.join(5)
    assert not loop._thread.is_alive() and isinstance(loop.died, EngineHung) and loop.busy == 0
    with pytest.raises(EngineDied):
        loop.add([1], LONG)


def test_closing_a_loop_does_not_wait_for_ever(wall: threading.Event) -> None:
    engine = Engine(make_model())
    hangs_at(engine, 0, wall)
    loop = EngineLoop(engine)
    loop.add([1, 2], LONG)
    wait_for(lambda: loop.turn is not None)
    loop.close(0.05)
    assert loop.hung


class Sleeper:
    """A model whose engine is in a turn that may take `slow_s` seconds."""

    def __init__(self, slow_s: float) -> None:
        self.name, self.alive, self.number, self.slow_s = "it", True, 1, slow_s
        self.given_up = 0.0

    @property
    def turn(self) -> tuple[int, float]:
        return self.number, self.slow_s

    def give_up(self, seconds: float) -> str:
        self.given_up, self.alive = seconds, False
        return "somewhere"


def test_a_turn_may_take_the_limit_or_what_a_slow_machine_needs_and_a_new_turn_counts_from_nothing() -> None:
    quick, large, busy = Sleeper(0.0), Sleeper(5.0), Sleeper(0.0)
    lost: list[EngineLost] = []
    keepers = [
        Keeper(Shelf.of(one), lost.append, every_s=0.02, step_s=0.3, grace_s=0.0) for one in (quick, large, busy)
    ]
    for keeper in keepers:
        keeper.start()
    for ticks in range(2000):
        time.sleep(0.01)
        busy.number += 1
        if lost and ticks > 80:
            break
    assert 0.3 < quick.given_up < 0.7 and not large.given_up and not busy.given_up
    assert len(lost) == 1 and lost[0].hung and lost[0].exit_code == 70 and "does not" not in str(lost[0])
    for keeper in keepers:
        keeper.stop()


# -- the server ------------------------------------------------------------------------------------------------------


class Served:
    """A server over a folder, in a thread."""

    def __init__(self, path: Path, store: FeedbackStore, load: Callable[[Path], Any], step_s: float = 60.0) -> None:
        self.shelf = Shelf.open([path], load)
        self.listener = process.listen("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        config = Config(drain_s=1, step_s=step_s)
        self.server = process.server(create_app(self.shelf, store, config), config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)

    @property
    def engine(self) -> Engine:
        return self.shelf.peek()._loop.engine  # type: ignore[no-any-return]

    def ask(self, path: str, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"content-type": "application/json"})
        response = connection.getresponse()
        found = response.status, response.read().decode()
        connection.close()
        return found


@pytest.fixture
def gate() -> threading.Event:
    """Folders are loaded while this is set."""
    found = threading.Event()
    found.set()
    return found


@pytest.fixture
def made(folder: Path, tmp_path: Path, gate: threading.Event) -> Iterator[Served]:  # noqa: F811
    def load(path: Path) -> Any:
        gate.wait(10)
        return load_assistant(path, max_batch=4)

    with FeedbackStore(tmp_path / "f.sqlite") as store:
        running = Served(folder, store, load)
        yield running
        running.server.should_exit = True
        running.thread.join(10)
        running.listener.close()
        running.shelf.close()


def test_a_server_whose_engine_died_says_so_and_comes_back(
    made: Served, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"prompt": [70, 71, 72], "max_tokens": 60, "seed": 1, "logit_bias": {"1": -100}}
    before = made.ask("/v1/completions", body)
    assert before[0] == 200 and made.ask("/health") == (200, '{"status":"ok","devices":["cpu"]}')
    gate.clear()
    dies_at(made.engine, 6, SystemExit("secret"))
    found: list[tuple[int, str]] = []
    asked = [{**body, "stream": stream} for stream in (False, True)]
    readers = [threading.Thread(target=lambda one=one: found.append(made.ask("/v1/completions", one))) for one in asked]
    with caplog.at_level(logging.ERROR):
        for reader in readers:
            reader.start()
        sick = wait_for(lambda: (got := made.ask("/health"))[0] == 503 and got)
        assert json.loads(sick[1]) == {"status": "failed", "failed": ["tiny:rl"]}
        for reader in readers:
            reader.join(10)
        assert len(found) == 2 and all("stopped working" in text and "secret" not in text for _, text in found)
        assert sorted(status for status, _ in found) == [200, 503]  # the stream had begun
        assert "[DONE]" not in found[0][1] + found[1][1]
        assert made.ask("/v1/completions", body)[0] == 503
        gate.set()
        wait_for(lambda: made.ask("/health")[0] == made.ask("/ready")[0] == made.ask("/api/health")[0] == 200)
    again = made.ask("/v1/completions", body)
    assert json.loads(again[1])["choices"] == json.loads(before[1])["choices"]
    assert "secret" in caplog.text and "works again" in caplog.text
    assert not made.server.should_exit


class Undertaker:
    """Loads scripted models, some of which are dead on arrival."""

    def __init__(self) -> None:
        self.made: list[ScriptedLoop] = []
        self.broken = False

    def __call__(self, path: Path) -> Any:
        if self.broken:
            raise CheckpointError(f"{path.name} is damaged")
        self.made.append(ScriptedLoop(tokenizer()))
        return served(self.made[-1])


def test_a_folder_that_cannot_be_read_any_more_ends_the_server_with_an_error(tmp_path: Path) -> None:
    load = Undertaker()
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        running = Served(tmp_path, store, load)
        load.broken = True
        load.made[0].alive = False
        running.thread.join(10)
        assert not running.thread.is_alive()
        lost = running.server.lost
        assert isinstance(lost, EngineLost) and lost.exit_code == 70 and "\n" not in str(lost)
        assert "is damaged" in str(lost) and "run:rl" in str(lost)
        running.listener.close()


def test_an_engine_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    load = Undertaker()
    told: list[EngineLost] = []
    keeper = Keeper(Shelf.open([tmp_path], load), told.append, every_s=0.01, most=2)
    keeper.start()
    for number in range(3):
        wait_for(lambda number=number: len(load.made) == number + 1)
        time.sleep(0.03)
        load.made[-1].alive = False
    wait_for(lambda: told)
    time.sleep(0.05)
    assert len(told) == 1 and "3 times" in str(told[0]) and len(load.made) == 3
    keeper.stop()


HANGING = """
import ctypes, sys
from pathlib import Path
from stateofgpt.infer.engine import Engine
from stateofgpt.serve import process
Engine.step = lambda self: ctypes.CDLL(None).pause()  # a native call that never returns
process.serve(Path(sys.argv[1]), sys.argv[2], process.Config(port=0, step_s=0.5))
"""


@pytest.mark.slow
def test_a_server_whose_engine_hangs_says_so_to_all_who_wait_and_leaves_with_an_error(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", HANGING, str(folder), str(tmp_path / "f.sqlite")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    port = int(running.stdout.readline().split("127.0.0.1:")[1].split()[0])

    def ask(path: str, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()

    wait_for(lambda: connects(port))
    assert ask("/health")[0] == 200
    status, text = ask("/v1/completions", {"prompt": [70, 71, 72], "max_tokens": 60})
    assert status == 503 and "stopped working" in text
    status, text = ask("/health")
    assert status == 503 and "has not come back" in json.loads(text)["reason"]
    assert ask("/v1/completions", {"prompt": [70], "max_tokens": 60})[0] == ask("/ready")[0] == 503
    _, told = running.communicate(timeout=20)
    assert running.returncode == 70 and "has not come back" in told
    assert "in <lambda>" in told  # the log says where
    assert told.splitlines()[-1].startswith("error: ")


def connects(port: int) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(("127.0.0.1", port), 1)):
        return True
    return False


LIVE = """
import sys
sys.path.insert(0, sys.argv[1])
from scripted import ScriptedLoop, served, tokenizer
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.serve import keeper, process
from stateofgpt.serve.app import create_app
listener = process.listen("127.0.0.1", int(sys.argv[3]))
print(listener.getsockname()[1], flush=True)
script = ScriptedLoop(tokenizer(), "word " * 700)
script.pause = 0.01
process.run_server(create_app(served(script), FeedbackStore(sys.argv[2], exclusive=True)), listener, process.Config())
"""


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_reader_waiting_and_its_successor_takes_its_place(tmp_path: Path) -> None:
    def start(port: int) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", LIVE, str(Path(__file__).parent), str(tmp_path / "f.sqlite"), str(port)]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        return running, int(running.stdout.readline())

    def stream(port: int) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        body = json.dumps({"messages": [{"role": "user", "content": "go"}], "stream": True, "max_tokens": 4000})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        return connection.getresponse()

    first, port = start(0)
    readers = [stream(port) for _ in range(4)]
    for reader in readers:
        assert reader.read(40)
    first.kill()
    assert first.wait() == -9
    began = time.monotonic()
    for reader in readers:
        rest = b""
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
            rest = reader.read()
        assert b"[DONE]" not in rest
    assert time.monotonic() - began < 5  # of the 10 s that they would wait
    second, same = start(port)
    try:
        assert same == port and stream(port).read(40)
    finally:
        second.kill()
        second.wait()
