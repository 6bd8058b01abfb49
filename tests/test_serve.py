"""The server streams, stops, stores and refuses as it should. The assistant is a script: nothing here is chance."""

from __future__ import annotations

import http.client
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from stateofgpt.assistant.session import Done, Streamed, TextDelta, ToolCalled, ToolReturned, Turn
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import FeedbackError, ModelError, ServeError
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve import process as server
from stateofgpt.serve.answering import Stopped
from stateofgpt.serve.app import create_app
from stateofgpt.serve.config import Config
from stateofgpt.serve.markdown import TAGS, render
from stateofgpt.text.chat import Conversation, Message, ToolCall

HERE = "http://127.0.0.1:8000"


class Script:
    """An assistant that says what it was told to, word by word; `seen` is what it was asked."""

    name = "run:rl"
    lineage = ("pretrain", "sft", "rl")

    def __init__(self, say: Callable[[Conversation, SamplingParams], str] | str = "It is four.") -> None:
        self.say = say if callable(say) else lambda *_: say  # type: ignore[return-value]
        self.seen: list[Conversation] = []
        self.steps = 0
        self.pause = 0.0
        self.limit = 10_000
        self.tool = False
        self.fail: Exception | None = None

    def fit(self, conversation: Conversation, max_tokens: int) -> tuple[Conversation, int]:
        kept = conversation
        while sum(len(m.content) for m in kept) > self.limit and len(kept) > 1:
            kept = kept[2:]
        if sum(len(m.content) for m in kept) > self.limit:
            raise ModelError("the message is too long for this model: shorten it")
        return kept, len(conversation) - len(kept)

    def stream(
        self, conversation: Conversation, params: SamplingParams, stopped: threading.Event, tenant: str = ""
    ) -> Iterator[Streamed]:
        self.seen.append(conversation)
        text = self.say(conversation, params)
        done: list[Message] = []
        if self.tool:
            call = ToolCall("calculator", {"expression": "2+2"})
            done += [Message("assistant", "", (call,)), Message("tool", "4")]
            yield ToolCalled(call)
            yield ToolReturned(call, "4")
        words = text.split(" ")
        for number, word in enumerate(words):
            if stopped.is_set():
                raise Stopped
            time.sleep(self.pause)
            self.steps += 1
            yield TextDelta(word if number == 0 else " " + word)
            if self.fail and number == 1:
                raise self.fail
        done.append(Message("assistant", text))
        yield Done(Turn(tuple(done), [1] * 5, [2] * len(words), [1] * len(words), [0.0] * len(words), "stop"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "feedback.sqlite", busy_timeout_s=0.1) as opened:
        yield opened


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def client(script: Script, store: FeedbackStore) -> Iterator[TestClient]:
    with TestClient(create_app(script, store, Config(max_answers=4)), base_url=HERE) as opened:
        yield opened


def events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [frame for frame in response.text.split("\n\n") if frame]
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame[6:]) if frame != "data: [DONE]" else {"type": "[DONE]"} for frame in frames]


def say(client: TestClient, content: str, **where: Any) -> dict[str, Any]:
    """The last event of a chat's stream, with the conversation's id added."""
    got = events(client.post("/api/chat", json={"content": content, **where}))
    return {**got[-1], "conversation": got[0]["conversation"], "asked": got[0]["parent"], "all": got}


# -- chatting --------------------------------------------------------------------------------------------------------


def test_an_answer_is_streamed_and_stored_with_the_name_of_the_model(client: TestClient, store: FeedbackStore) -> None:
    done = say(client, "What is 2 + 2?")
    assert "".join(e["text"] for e in done["all"] if e["type"] == "delta") == "It is four."
    assert done["type"] == "done" and done["stored"] and done["finish"] == "stop"
    stored = store.thread(done["conversation"]).messages
    assert [(m.role, m.text, m.partial, m.model) for m in stored] == [
        ("user", "What is 2 + 2?", False, None),
        ("assistant", "It is four.", False, "run:rl"),
    ]


def test_the_next_question_carries_the_branch_it_was_asked_in(client: TestClient, script: Script) -> None:
    first = say(client, "one")
    say(client, "two", conversation=first["conversation"], parent=first["message"]["id"])
    assert [m.content for m in script.seen[-1]] == ["one", "It is four.", "two"]


def test_tool_calls_are_shown_stored_and_read_back(client: TestClient, script: Script) -> None:
    script.tool = True
    done = say(client, "What is 2 + 2?")
    kinds = [event["type"] for event in done["all"]]
    assert kinds == ["start", "tool_call", "tool_result", "delta", "delta", "delta", "done"]
    assert done["all"][1] == {"type": "tool_call", "name": "calculator", "arguments": "2+2"}
    (_, answer) = client.get(f"/api/conversations/{done['conversation']}").json()["messages"]
    assert answer["parts"][0] == {"type": "tool", "name": "calculator", "arguments": "2+2", "result": "4"}
    say(client, "and?", conversation=done["conversation"], parent=answer["id"])
    assert [m.role for m in script.seen[-1]] == ["user", "assistant", "tool", "assistant", "user"]


def test_a_regenerated_answer_is_a_sibling_drawn_with_another_seed(client: TestClient, script: Script) -> None:
    script.say = lambda _, params: f"seed {params.seed}"
    first = say(client, "go")
    second = events(client.post("/api/regenerate", json={"message": first["message"]["id"]}))[-1]["message"]
    third = events(client.post("/api/regenerate", json={"message": second["id"]}))[-1]["message"]
    assert first["message"]["parent"] == second["parent"] == third["parent"]
    assert len({first["message"]["text"], second["text"], third["text"]}) == 3
    messages = client.get(f"/api/conversations/{first['conversation']}").json()["messages"]
    assert [m["text"] for m in messages[1:]] == [first["message"]["text"], second["text"], third["text"]]


def test_a_conversation_too_long_for_the_model_loses_its_oldest_turns_and_says_so(
    client: TestClient, script: Script
) -> None:
    first = say(client, "x" * 60)
    script.limit = 60
    second = say(client, "y" * 40, conversation=first["conversation"], parent=first["message"]["id"])
    assert [m.content for m in script.seen[-1]] == ["y" * 40]
    assert any(e["type"] == "note" and "oldest" in e["text"] for e in second["all"])
    refused = client.post("/api/chat", json={"content": "z" * 61})
    assert refused.status_code == 400 and "shorten" in refused.json()["error"]["message"]
    assert len(client.get("/api/conversations").json()["conversations"]) == 1  # the refused one was not begun


def test_a_failure_of_the_model_is_an_error_event_and_what_was_written_is_kept(
    client: TestClient, script: Script, store: FeedbackStore
) -> None:
    script.fail = RuntimeError("secret /home/someone/model.py")
    done = say(client, "go")
    (error,) = [e for e in done["all"] if e["type"] == "error"]
    assert "secret" not in json.dumps(done) and "log" in error["message"]
    assert store.thread(done["conversation"]).messages[1].partial
    script.fail = ModelError("the engine failed on this")
    assert any(e.get("message") == "the engine failed on this" for e in say(client, "go")["all"])


def test_stopping_something_that_is_over_says_so(client: TestClient) -> None:
    assert client.post("/api/stop", json={"generation": "x"}).json() == {"stopped": False}


def test_a_crowd_is_told_to_come_back(client: TestClient, store: FeedbackStore) -> None:
    with TestClient(create_app(Script(), store, Config(max_answers=0)), base_url=HERE) as full:
        response = full.post("/api/chat", json={"content": "go"})
    assert response.status_code == 503 and response.headers["retry-after"]


# -- feedback --------------------------------------------------------------------------------------------------------


def test_feedback_is_on_the_disk_when_it_is_acknowledged(client: TestClient, store: FeedbackStore) -> None:
    answer = say(client, "2+2?")["message"]["id"]
    sent = {"message": answer, "key": "k1", "rating": "down", "reason": "wrong", "correction": "4"}
    assert client.post("/api/feedback", json=sent).json()["rating"] == "down"
    assert client.post("/api/feedback", json=sent).status_code == 200
    with sqlite3.connect(store.name) as other:
        assert other.execute("SELECT rating, correction FROM feedback").fetchall() == [("down", "4")]
    assert client.post("/api/feedback", json={**sent, "rating": "up"}).status_code == 409
    undone = client.post("/api/feedback", json={"message": answer, "key": "k2", "retracted": True}).json()
    assert (undone["rating"], undone["correction"]) == (None, "")
    counts = client.get("/api/model").json()["feedback"]
    assert (counts["answers"], counts["down"], counts["comparisons"]) == (1, 0, 0)


def test_when_the_database_is_locked_chat_goes_on_and_feedback_asks_for_a_retry(
    client: TestClient, store: FeedbackStore
) -> None:
    answer = say(client, "go")
    blocker = sqlite3.connect(store.name, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    event = {"message": answer["message"]["id"], "key": "k", "rating": "up"}
    refused = client.post("/api/feedback", json=event)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    done = say(client, "more")
    assert done["message"]["text"] == "It is four." and not done["stored"] and done["message"]["id"] is None
    assert any(e["type"] == "note" and "locked" in e["text"] for e in done["all"])
    blocker.execute("ROLLBACK")
    blocker.close()
    assert client.post("/api/feedback", json=event).status_code == 200
    assert store.counts().up == 1


# -- bad requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, body, status",
    [
        ("/api/chat", b"{", 400),
        ("/api/chat", b"[1]", 400),
        ("/api/chat", b'{"content": "\xff"}', 400),
        ("/api/chat", b"[" * 100_000, 400),
        ("/api/chat", b'{"content": ""}', 400),
        ("/api/chat", b'{"content": 7}', 400),
        ("/api/chat", json.dumps({"content": "x" * 16_001}).encode(), 413),
        ("/api/chat", b'{"content": "x", "conversation": "../../etc/passwd"}', 404),
        ("/api/chat", b'{"content": "x", "conversation": "\\u0000"}', 400),
        ("/api/chat", b'{"content": "x", "parent": "p"}', 400),
        ("/api/chat", b'{"content": "x", "conversation": "c", "parent": "p"}', 404),
        ("/api/chat", b" " * 1_000_001, 413),
        ("/api/regenerate", b'{"message": "nothing"}', 404),
        ("/api/feedback", b'{"message": "nothing", "key": "k", "rating": "up"}', 404),
        ("/api/feedback", b'{"message": "m", "key": "k", "rating": "sideways"}', 400),
        ("/api/feedback", b'{"message": "m", "key": "", "rating": "up"}', 400),
        ("/api/feedback", b'{"message": "m", "key": "k", "retracted": "yes"}', 400),
        ("/api/nowhere", b"{}", 404),
        ("/api/health", b"{}", 405),
    ],
)
def test_bad_requests_get_one_sentence_and_no_trace(client: TestClient, address: str, body: bytes, status: int) -> None:
    response = client.post(address, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 300 and "Traceback" not in error["message"] and "\n" not in error["message"]


def test_a_body_without_a_length_is_given_up_at_the_limit(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 50_000

    response = client.post("/api/chat", content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::2]:8000", "192.168.0.7:8000"])
def test_foreign_host_names_are_refused_against_dns_rebinding(client: TestClient, host: str) -> None:
    assert client.get("/api/model", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_loopback_names_are_served(client: TestClient, host: str) -> None:
    assert client.get("/api/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"origin": HERE}, 200),
        ({}, 200),
    ],
)
def test_other_sites_cannot_post_here(client: TestClient, headers: dict[str, str], status: int) -> None:
    response = client.post(
        "/api/stop", content=b'{"generation": "x"}', headers={"content-type": "application/json", **headers}
    )
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def test_an_unexpected_error_shows_an_id_and_nothing_else(client: TestClient, store: FeedbackStore) -> None:
    class Broken(FeedbackStore):
        def counts(self) -> Any:
            raise RuntimeError("secret in /home/someone/code.py")

    with Broken(store.name) as broken, TestClient(create_app(Script(), broken), base_url=HERE) as opened:
        response = opened.get("/api/model")
    assert response.status_code == 500 and "secret" not in response.text and "Traceback" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert "content-security-policy" in response.headers


# -- what the page may do --------------------------------------------------------------------------------------------


def test_the_page_is_small_makes_no_outside_request_and_is_held_to_that(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    total = 0
    for address in ("/", "/app.js", "/style.css", "/icon.svg"):
        text = client.get(address).text
        total += len(text)
        assert "//" not in text.replace("http://www.w3.org/", "").replace("// ", ""), address
    assert total < 40_000
    assert "<script>" not in page.text and "style=" not in page.text and "onclick" not in page.text


@pytest.mark.parametrize("path", ["/../app.py", "/%2e%2e/app.py", "/ui/app.js", "/app.js/", "/style.css%00"])
def test_only_the_files_of_the_page_are_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    '<math><mi//xlink:href="data:x,<script>alert(1)</script>">',
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&colon;alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](https://evil.example/?q=secret)",
    "![x](https://evil.example/?q=secret)",
    "![x][1]\n\n[1]: https://evil.example/?q=secret",
    "<https://evil.example/>",
    "<a href=//evil.example onmouseover=alert(1)>x</a>",
    "`<script>alert(1)</script>`",
    '```html"onload=alert(1)\n<script>alert(1)</script>\n```',
    "| a | b |\n|---|---|\n| <img src=x onerror=alert(1)> | [y](javascript:1) |",
    "<style>@import 'https://evil.example'</style>",
    "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\x00<\x00script>alert(1)</script>",
]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, attrs))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_models_words_become_html_without_any_attribute_or_active_tag(attack: str, client: TestClient) -> None:
    parser = Tags()
    parser.feed(render(attack))
    assert all(tag in TAGS and attrs == [] for tag, attrs in parser.seen)


def test_everything_a_model_or_tool_says_goes_through_that(script: Script, store: FeedbackStore) -> None:
    script.say, script.tool = lambda *_: " ".join(ATTACKS), True
    with TestClient(create_app(script, store), base_url=HERE) as client:
        message = say(client, "<script>alert(1)</script>")["message"]
    parser = Tags()
    for part in message["parts"]:
        parser.feed(part.get("html", ""))
    assert parser.seen and all(tag in TAGS and attrs == [] for tag, attrs in parser.seen)


def test_markdown_is_rendered_and_arithmetic_left_alone() -> None:
    assert render("**yes** 3*4*5 and `x`") == "<p><strong>yes</strong> 3*4*5 and <code>x</code></p>\n"
    assert render("9 + 6 = 15\ncarry 1") == "<p>9 + 6 = 15<br>\ncarry 1</p>\n"
    assert "<table>" in render("| a |\n|---|\n| 1 |")
    assert render("<" * 70_000).startswith("<pre>&lt;")


# -- over a real socket ----------------------------------------------------------------------------------------------


@pytest.fixture
def live(script: Script, store: FeedbackStore) -> Iterator[int]:
    import uvicorn

    listener = server.listen("127.0.0.1", 0)
    settings = uvicorn.Config(create_app(script, store), log_level="warning", http="h11", ws="none")
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=lambda: running.run(sockets=[listener]), daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    running.should_exit = True
    thread.join(10)
    listener.close()


def begin(port: int, address: str, body: dict[str, Any]) -> tuple[socket.socket, dict[str, Any]]:
    """Start a stream by hand; the connection and its first event."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    data = json.dumps(body).encode()
    head = f"POST {address} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    seen = b""
    while b'"delta"' not in seen:
        seen += connection.recv(4096)
    first = next(line for line in seen.decode().splitlines() if line.startswith("data: "))
    return connection, json.loads(first[6:])


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def test_when_the_reader_leaves_the_answer_ends_and_is_stored_as_partial(
    live: int, script: Script, store: FeedbackStore
) -> None:
    script.say, script.pause = lambda *_: "word " * 2000, 0.005
    connection, start = begin(live, "/api/chat", {"content": "go"})
    connection.close()
    wait_for(store.conversations)
    stored = wait_for(lambda: store.thread(start["conversation"]).messages[1:])
    assert stored[0].partial and stored[0].text.startswith("word")
    steps = script.steps
    assert steps < 1000
    time.sleep(0.1)
    assert script.steps == steps


def test_stop_ends_the_answer_at_the_next_token(live: int, script: Script, store: FeedbackStore) -> None:
    script.say, script.pause = lambda *_: "word " * 2000, 0.005
    connection, start = begin(live, "/api/chat", {"content": "go"})
    other, _ = begin(live, "/api/chat", {"content": "somebody else"})
    stopper = http.client.HTTPConnection("127.0.0.1", live, timeout=10)
    body = json.dumps({"generation": start["generation"]})
    stopper.request("POST", "/api/stop", body, {"content-type": "application/json"})
    assert json.load(stopper.getresponse()) == {"stopped": True}
    rest = b""
    while b'"done"' not in rest:
        rest += connection.recv(65536)
    assert b'"cancelled"' in rest
    assert store.thread(start["conversation"]).messages[1].partial
    assert other.recv(10)  # goes on
    for each in (connection, other, stopper):
        each.close()


# -- starting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", "::"])
def test_the_server_refuses_to_listen_beyond_this_machine(host: str) -> None:
    with pytest.raises(ServeError, match="loopback"):
        server.listen(host, 0)


def test_a_taken_port_is_one_sentence_before_anything_is_loaded(tmp_path: Path) -> None:
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port}.*--port") as caught:
            server.serve(tmp_path / "no such model", tmp_path / "f.sqlite", Config(port=port))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    with pytest.raises(ServeError):
        server.listen("127.0.0.1", 99_999)


def test_two_servers_on_one_database_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.sqlite"
    with FeedbackStore(path, exclusive=True), pytest.raises(FeedbackError, match="another server"):
        server.serve(tmp_path / "no such model", path, Config(port=0))


LIVE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_serve import Script
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.serve import process
from stateofgpt.serve.app import create_app
listener = process.listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
store = FeedbackStore(sys.argv[2], exclusive=True)
process.run_server(create_app(Script(), store), listener, process.Config())
"""


@pytest.mark.slow
def test_every_acknowledged_thumb_survives_kill_9_of_the_server(tmp_path: Path) -> None:
    import urllib.request

    path = tmp_path / "feedback.sqlite"
    with FeedbackStore(path) as store:
        question = store.add_message(store.new_conversation(), None, (Message("user", "q"),))
        answer = store.add_message(question.conversation, question.id, (Message("assistant", "a"),)).id
    acknowledged: list[str] = []

    def vote(port: int, life: int, voter: int) -> None:
        for number in range(1000):
            key = f"{life}-{voter}-{number}"
            body = json.dumps({"message": answer, "key": key, "rating": "up"}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/api/feedback", body, {"content-type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=5) as response:
                    assert response.status == 200
            except OSError:
                return
            acknowledged.append(key)

    for life in range(2):
        command = [sys.executable, "-c", LIVE, str(Path(__file__).parent), str(path)]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        port = int(running.stdout.readline())
        voters = [threading.Thread(target=vote, args=(port, life, voter)) for voter in range(8)]
        for voter in voters:
            voter.start()
        wait_for(lambda: len(acknowledged) > 20 * (life + 1), 60)  # noqa: B023 read at once
        running.kill()
        running.wait()
        for voter in voters:
            voter.join()
    with sqlite3.connect(path) as raw:
        stored = [key for (key,) in raw.execute("SELECT key FROM feedback")]
    assert set(acknowledged) <= set(stored) and len(stored) == len(set(stored))
