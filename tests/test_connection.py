"""Clients that are slow, many, or gone: each is held to its time, and the others notice nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedLoop, served, tokenizer

from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.serve import process
from stateofgpt.serve.app import create_app
from stateofgpt.serve.config import Config

pytestmark = pytest.mark.slow  # together they take long

QUICK = Config(header_s=0.8, body_s=0.8, write_s=0.5, drain_s=0.5, keep_alive_s=3)
IN_TIME_S = 5.0  # what a machine that is busy with other tests may need on top


class Live:
    """A server in a thread."""

    def __init__(self, script: ScriptedLoop, store: FeedbackStore, config: Config) -> None:
        self.script = script
        self.app = create_app(served(script), store, config)
        self.listener = process.listen("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.server = process.server(self.app, config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(sent)
        return connection

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"content-type": "application/json"})
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    def counted(self, name: str) -> float:
        value = self.app.state.metrics.registry.get_sample_value(name)
        return float(value or 0.0)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server for all tests that leave it as it was."""
    with FeedbackStore(tmp_path_factory.mktemp("live") / "f.sqlite") as store:
        made = Live(ScriptedLoop(tokenizer()), store, QUICK)
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture
def live(running: Live) -> Live:
    busy = running.app.state.running
    wait_for(lambda: running.counted("sog_connections") == 0 and not running.script.open and len(busy) == 0)
    running.script.say, running.script.pause = (lambda _, __: "It is four."), 0.0
    running.script.asked.clear()
    running.script.steps = 0
    return running


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def seconds_until_closed(connection: socket.socket, began: float) -> float:
    connection.settimeout(10)
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return time.monotonic() - began


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
ASK = {"messages": [{"role": "user", "content": "go"}], "stream": True, "max_tokens": 4000}


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.",
        HEAD + b"Content-Length: 100\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["nothing", "half a header", "half a body", "half a chunk"],
)
def test_a_client_that_does_not_go_on_is_cut_at_its_deadline(live: Live, sent: bytes) -> None:
    began = time.monotonic()
    assert 0.7 < seconds_until_closed(live.connect(sent), began) < IN_TIME_S
    wait_for(lambda: live.counted("sog_connections") == 0)


def test_one_byte_at_a_time_does_not_move_the_deadline(live: Live) -> None:
    connection = live.connect(b"GET /health HTTP/1.1\r\nX: ")
    began = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - began < 2 * IN_TIME_S:
            connection.sendall(b"x")
            time.sleep(0.05)
    assert time.monotonic() - began < IN_TIME_S


@pytest.mark.slow
def test_a_second_request_on_a_kept_connection_has_its_own_deadline(live: Live) -> None:
    connection = live.connect()
    for _ in range(2):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok","devices":["cpu"]}'):
            answer += connection.recv(65536)
        time.sleep(1.0)  # longer than a header may take: an idle connection is kept for keep_alive_s
    began = time.monotonic()
    connection.sendall(b"GET /hea")
    assert seconds_until_closed(connection, began) < QUICK.keep_alive_s - 0.1


def test_a_stream_that_nobody_reads_is_cut_and_its_answer_ended(live: Live) -> None:
    live.script.say = lambda _, __: "x" * 3900
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", live.port))
    data = json.dumps({**ASK, "logprobs": True, "top_logprobs": 20}).encode()
    connection.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    wait_for(lambda: live.app.state.metrics.registry.get_sample_value(
        "sog_connections_cut_total", {"why": "reader"}), 10)  # fmt: skip
    wait_for(lambda: len(live.app.state.running) == 0)
    connection.close()


def test_slow_clients_do_not_hold_up_others(live: Live) -> None:
    slow = [live.connect(b"POST /v1/chat/completions HTTP/1.1\r\nX: ") for _ in range(30)]
    assert live.ask("POST", "/v1/chat/completions", {**ASK, "stream": False})[0] == 200
    for connection in slow:
        connection.close()


def test_one_connection_too_many_is_told_so_at_once(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        live = Live(ScriptedLoop(tokenizer()), store, Config(max_connections=40))
        try:
            one_too_many(live, 40)
        finally:
            live.stop()


def one_too_many(live: Live, most: int) -> None:
    held = [live.connect() for _ in range(most)]
    wait_for(lambda: live.counted("sog_connections") == most)
    extra = live.connect(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    answer = extra.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 2" in answer and b'"error"' in answer
    for connection in (*held, extra):
        connection.close()
    wait_for(lambda: live.counted("sog_connections") == 0)
    assert live.ask("GET", "/health")[0] == 200 and live.counted("sog_connections_refused_total") == 1


@pytest.mark.parametrize("size", [40_000, 5_000_000])
def test_headers_too_large_are_refused(live: Live, size: int) -> None:
    connection = live.connect()
    with contextlib.suppress(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * size)
    with contextlib.suppress(OSError):
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")
    assert live.ask("GET", "/health")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\r\n" * 50, b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_ends_only_its_own_connection(live: Live, sent: bytes) -> None:
    began = time.monotonic()
    assert seconds_until_closed(live.connect(sent), began) < IN_TIME_S
    assert live.ask("GET", "/health")[0] == 200


def leave(live: Live, count: int, stream: bool) -> None:
    data = json.dumps({**ASK, "stream": stream}).encode()
    for number in range(count):
        connection = live.connect(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if stream:
            seen = b""
            while seen.count(b"data: ") < 4:
                seen += connection.recv(65536)
        else:
            wait_for(lambda number=number: len(live.script.asked) > number)
        connection.close()


@pytest.mark.parametrize("stream, count", [(True, 40), (False, 5)])
def test_clients_that_leave_free_everything_within_a_step(live: Live, stream: bool, count: int) -> None:
    live.script.say, live.script.pause = (lambda _, __: "word " * 700), 0.002
    leave(live, count, stream)
    wait_for(lambda: not live.script.open and len(live.app.state.running) == 0)
    wait_for(lambda: live.counted("sog_connections") == 0)
    steps = live.script.steps
    time.sleep(0.05)
    assert live.script.steps == steps < 700 * count
    assert all(held.users == 0 for held in live.app.state.shelf.models.values())
    wait_for(lambda: sum(thread.name == "answer" for thread in threading.enumerate()) == 0)


def test_an_answer_waits_for_a_reader_that_does_not_read_and_is_whole_when_it_does(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        script = ScriptedLoop(tokenizer(), "word " * 1000)
        live = Live(script, store, Config(write_s=20))
        data = json.dumps(ASK).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", live.port))
        connection.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        steps = -1
        while steps != script.steps or not steps:
            steps = script.steps
            time.sleep(0.2)
        assert steps < 1500 < ASK["max_tokens"]  # type: ignore[operator]
        assert len(live.app.state.running) == 1
        seen = b""
        while b"[DONE]" not in seen[-200:]:
            seen += connection.recv(65536)
        assert script.steps > 2000 and seen.count(b'"content": ') == script.steps + 1
        connection.close()
        live.stop()


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_lets_answers_finish(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        script = ScriptedLoop(tokenizer(), "word " * 20)
        script.pause = 0.01
        live = Live(script, store, Config(drain_s=5))
        data = json.dumps(ASK).encode()
        connection = live.connect(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        seen = connection.recv(65536)
        live.server.should_exit = True
        wait_for(lambda: live.app.state.running.draining)
        while piece := connection.recv(65536):
            seen += piece
        assert b"data: [DONE]" in seen and b'"finish_reason": "stop"' in seen
        with pytest.raises(OSError):
            live.ask("GET", "/health")
        live.stop()


def test_an_answer_that_takes_too_long_to_finish_ends_with_an_error_event(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        live = Live(ScriptedLoop(tokenizer(), "word " * 700), store, QUICK)
        live.script.pause = 0.01
        data = json.dumps(ASK).encode()
        connection = live.connect(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        seen = connection.recv(65536)
        live.server.should_exit = True
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                seen += piece
        live.stop()
    assert b'"error"' in seen and b"stopping" in seen and b"[DONE]" not in seen
