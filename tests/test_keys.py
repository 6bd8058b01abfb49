"""API keys and limits: who gets in, how much they get, and that nobody sees what is another's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedLoop, served, tokenizer
from starlette.testclient import TestClient

from stateofgpt.cli import main
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import ServeError
from stateofgpt.serve import process
from stateofgpt.serve.access import OPEN, WRONG_KEYS, Access, Bucket
from stateofgpt.serve.app import create_app
from stateofgpt.serve.config import Config
from stateofgpt.serve.fields import ApiError
from stateofgpt.serve.keys import Key, KeyRing, new_key, read_keys, remove_key

HERE = "http://127.0.0.1:8000"
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "2+2?"}], "max_tokens": 20}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def keys(path: Path) -> dict[str, str]:
    """Secrets by name: two users, one of them with limits, and an admin."""
    return {
        "anna": new_key(path, Key("anna")),
        "bert": new_key(path, Key("bert", requests_per_minute=2, tokens_per_minute=500, concurrent=1)),
        "root": new_key(path, Key("root", admin=True)),
    }


@pytest.fixture
def script() -> ScriptedLoop:
    return ScriptedLoop(tokenizer())


@pytest.fixture
def client(
    path: Path, keys: dict[str, str], script: ScriptedLoop, clock: Clock, tmp_path: Path
) -> Iterator[TestClient]:
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        app = create_app(served(script), store, Config(), Access(KeyRing(path), clock))
        with TestClient(app, base_url=HERE) as opened:
            yield opened


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_only_its_hash_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", "anna", "--keys", str(path), "--requests-per-minute", "60", "--admin"]) == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("sog-") and len(secret) > 40
    assert secret not in path.read_text() and secret[4:] not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    found = KeyRing(path).find(secret)
    assert found is not None and (found.name, found.requests_per_minute, found.admin) == ("anna", 60, True)
    assert main(["keys", "list", "--keys", str(path)]) == 0
    assert capsys.readouterr().out == "anna: 60 requests a minute, admin\n"
    assert main(["keys", "remove", "anna", "--keys", str(path)]) == 0
    assert KeyRing(path).find(secret) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"keys": [1]}', '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "sha256": "x"}]}', "{" * 9],
)
def test_a_file_that_holds_no_keys_is_one_sentence(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ServeError, match=r"keys\.json"):
        read_keys(path)


def test_names_are_plain_and_there_once(path: Path) -> None:
    new_key(path, Key("anna"))
    for name in ("anna", "", "a b", "../x", "local", "anybody"):
        with pytest.raises(ServeError):
            new_key(path, Key(name))
    with pytest.raises(ServeError, match="anna"):
        remove_key(path, "ana")


def test_every_key_is_compared_whether_or_not_one_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the time of a look-up says nothing about which key was nearly right."""
    secrets = [new_key(path, Key(name)) for name in "abc"]
    ring, compared = KeyRing(path), []
    import hmac

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for secret in (*secrets, "sog-wrong"):
        compared.clear()
        ring.find(secret)
        assert len(compared) == 3


# -- getting in ------------------------------------------------------------------------------------------------------


def addresses(client: TestClient) -> list[tuple[str, str]]:
    found = []
    for route in client.app.routes:  # type: ignore[attr-defined]
        found += [(method, route.path.replace("{id:path}", "x").replace("{id}", "x")) for method in route.methods]
    return [(method, path) for method, path in found if method in ("GET", "POST")]


def test_every_route_asks_for_a_key_but_those_that_say_nothing(client: TestClient) -> None:
    for method, path in [*addresses(client), ("GET", "/nowhere"), ("POST", "/v2/anything")]:
        response = client.request(method, path, json={} if method == "POST" else None)
        if path in OPEN:
            assert response.status_code == 200, path
        else:
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key" and response.headers["www-authenticate"]


def test_a_key_opens_the_api_and_only_an_admins_the_rest(client: TestClient, keys: dict[str, str]) -> None:
    assert client.post(CHAT, json=ASK, headers=bearer(keys["anna"])).status_code == 200
    for method, path in addresses(client):
        if path.startswith(("/metrics", "/admin")):
            body = {} if method == "POST" else None
            assert client.request(method, path, headers=bearer(keys["anna"]), json=body).status_code == 403, path
    assert client.get("/metrics", headers=bearer(keys["root"])).status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic abc", "Bearer sog-nothing", "Bearer " + "x" * 5000])
def test_what_is_no_key_is_refused(client: TestClient, header: str) -> None:
    assert client.get("/v1/models", headers={"authorization": header}).status_code == 401


def test_guessing_has_to_wait_and_the_right_key_does_not(
    client: TestClient, keys: dict[str, str], clock: Clock
) -> None:
    for _ in range(WRONG_KEYS):
        assert client.get("/v1/models", headers=bearer("sog-wrong")).status_code == 401
    late = client.get("/v1/models", headers=bearer("sog-wrong"))
    assert late.status_code == 429 and int(late.headers["retry-after"]) >= 1
    clock.now += 60
    for _ in range(30):
        assert client.get("/v1/models", headers=bearer(keys["anna"])).status_code == 200


def test_a_key_that_was_removed_is_refused_at_its_next_request(
    client: TestClient, keys: dict[str, str], path: Path
) -> None:
    assert client.get("/v1/models", headers=bearer(keys["anna"])).status_code == 200
    remove_key(path, "anna")
    assert client.get("/v1/models", headers=bearer(keys["anna"])).status_code == 401
    assert client.get("/v1/models", headers=bearer(keys["root"])).status_code == 200


def test_a_key_is_in_no_log_no_metric_and_no_answer(
    client: TestClient, keys: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    for secret in (keys["anna"], "sog-wrong-key"):
        shown = client.get("/v1/models", headers=bearer(secret)).text
        assert secret not in shown
    text = client.get("/metrics", headers=bearer(keys["root"])).text
    assert not any(secret in text or secret in caplog.text for secret in keys.values())


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_bucket_fills_evenly_and_never_overflows(clock: Clock) -> None:
    bucket = Bucket(60, clock)
    assert [bucket.take(1) for _ in range(60)] == [0.0] * 60
    assert bucket.take(1) == pytest.approx(1.0)
    clock.now += 2.5
    assert [bucket.take(1), bucket.take(1)] == [0.0, 0.0] and bucket.take(1) == pytest.approx(0.5)
    clock.now += 1e6
    assert [bucket.take(1) for _ in range(60)] == [0.0] * 60 and bucket.take(1) > 0


def test_requests_and_tokens_a_minute_are_counted_for_each_key(
    client: TestClient, keys: dict[str, str], clock: Clock, script: ScriptedLoop
) -> None:
    for _ in range(2):
        assert client.post(CHAT, json=ASK, headers=bearer(keys["bert"])).status_code == 200
    before = len(script.asked)
    late = client.post(CHAT, json=ASK, headers=bearer(keys["bert"]))
    assert late.status_code == 429 and late.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(late.headers["retry-after-ms"]) <= 30_000 and len(script.asked) == before
    assert client.post(CHAT, json=ASK, headers=bearer(keys["anna"])).status_code == 200
    clock.now += 60
    greedy = client.post(CHAT, json={**ASK, "max_tokens": 600}, headers=bearer(keys["bert"]))
    assert greedy.status_code == 429 and "max_tokens" in greedy.json()["error"]["message"]
    assert client.post(CHAT, json=ASK, headers=bearer(keys["bert"])).status_code == 200


def test_tokens_that_were_not_used_come_back(clock: Clock) -> None:
    access, who = Access(clock=clock), Key("anna", tokens_per_minute=100)

    def ask(tokens: int) -> Any:
        grant = access.begin(who)
        grant.take(tokens)
        return grant

    for _ in range(10):
        ask(90).end(5)
        clock.now += 3  # five tokens
    first = ask(90)
    with pytest.raises(ApiError, match="wait"):
        ask(90)
    first.end(90)
    first.end(0)  # only the first time counts
    with pytest.raises(ApiError, match="wait"):
        ask(90)


@pytest.mark.slow
def test_only_so_many_requests_of_a_key_run_at_once(
    client: TestClient, keys: dict[str, str], script: ScriptedLoop
) -> None:
    script.say, script.pause = (lambda _, __: "word " * 40), 0.01
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(client.post(CHAT, json={**ASK, "max_tokens": 100}, headers=bearer(keys["bert"])).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 429]


# -- one's own -------------------------------------------------------------------------------------------------------


def test_a_cache_is_kept_apart_by_key(client: TestClient, keys: dict[str, str], script: ScriptedLoop) -> None:
    for name in ("anna", "root"):
        client.post(CHAT, json=ASK, headers=bearer(keys[name]))
        client.post("/v1/completions", json={"prompt": "a"}, headers=bearer(keys[name]))
        client.post("/api/chat", json={"content": "a"}, headers=bearer(keys[name]))
    assert [tenant for _, _, tenant in script.asked] == ["anna"] * 3 + ["root"] * 3


def test_what_one_said_is_not_there_for_another(client: TestClient, keys: dict[str, str]) -> None:
    anna, root = bearer(keys["anna"]), bearer(keys["root"])
    text = client.post("/api/chat", json={"content": "canary-4729"}, headers=anna).text
    start, *_, done = [json.loads(frame[6:]) for frame in text.strip().split("\n\n")]
    conversation, message = start["conversation"], done["message"]["id"]
    theirs: list[tuple[str, str, Any]] = [
        ("GET", f"/api/conversations/{conversation}", None),
        ("POST", "/api/chat", {"content": "x", "conversation": conversation}),
        ("POST", "/api/chat", {"content": "x", "conversation": conversation, "parent": message}),
        ("POST", "/api/regenerate", {"message": message}),
        ("POST", "/api/feedback", {"message": message, "key": "k", "rating": "up"}),
    ]
    for method, path, body in theirs:
        assert client.request(method, path, json=body, headers=root).status_code == 404, path
        assert client.request(method, path, json=body, headers=anna).status_code == 200, path
    assert client.get("/api/conversations", headers=root).json()["conversations"] == []
    assert "canary-4729" in client.get("/api/conversations", headers=anna).text
    assert "canary" not in client.get("/metrics", headers=root).text


# -- beyond this machine ---------------------------------------------------------------------------------------------


def test_a_server_with_keys_may_listen_beyond_this_machine_and_one_without_may_not() -> None:
    with pytest.raises(ServeError, match="--keys"):
        process.listen("0.0.0.0", 0)
    process.listen("0.0.0.0", 0, anywhere=True).close()


@pytest.mark.parametrize(
    "host, status", [("192.168.1.5:8000", 200), ("[fd00::1]", 200), ("box.example.com", 200), ("evil.example.com", 421)]
)
def test_beyond_this_machine_it_goes_by_its_names_and_by_addresses(
    host: str, status: int, path: Path, keys: dict[str, str], script: ScriptedLoop, tmp_path: Path
) -> None:
    with FeedbackStore(tmp_path / "g.sqlite") as store:
        config = Config(host="0.0.0.0", names=("box.example.com",))
        with TestClient(create_app(served(script), store, config, Access(KeyRing(path))), base_url=HERE) as client:
            assert client.get("/health", headers={"host": host}).status_code == status


def test_missing_keys_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="cannot read the keys"):
        process.serve(tmp_path / "no model", tmp_path / "f.sqlite", Config(port=0), tmp_path / "none.json")
