"""Several models in one server: found by name, exchanged only for one that works, without dropping an answer."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedLoop, served, tokenizer
from starlette.testclient import TestClient
from test_loader import folder  # noqa: F401 a fixture: runs/tiny with its checkpoints

from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import CheckpointError, ServeError
from stateofgpt.serve.app import create_app
from stateofgpt.serve.loader import About, load_assistant
from stateofgpt.serve.shelf import Held, Shelf, UnknownModel

pytestmark = pytest.mark.slow  # together they take long

HERE = "http://127.0.0.1:8000"
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "who?"}]}
TOKENS = tokenizer()


class Folders:
    """What loading a folder gives, as a script; `broken` folders cannot be loaded, `mute` ones do not write."""

    def __init__(self) -> None:
        self.made: list[ScriptedLoop] = []
        self.broken = self.mute = False
        self.names = {"a": "run:a", "b": "run:b"}

    def __call__(self, path: Path) -> Any:
        if self.broken:
            raise CheckpointError(f"{path.name} is damaged")
        loop = ScriptedLoop(TOKENS, f"I am {path.name} {len(self.made)}")
        if self.mute:
            loop.say = lambda _, __: []
        self.made.append(loop)
        assistant = served(loop)
        about = About(self.names[path.name], ("rl",), f"id-{len(self.made)}")
        assistant.name, assistant.lineage, assistant.id = about.name, about.lineage, about.id
        return assistant


class Circle:
    """A model that refers to itself, which only a look for garbage can free."""

    name, id = "it", "0"

    def __init__(self, path: Path) -> None:
        self.me = self

    def smoke_test(self) -> None: ...


def test_a_model_that_was_exchanged_is_freed_and_what_stays_is_not_looked_at_again(tmp_path: Path) -> None:
    shelf = Shelf.open([tmp_path], Circle)
    assert not any(isinstance(one, Circle) for one in gc.get_objects())  # for good, as far as the collector knows
    first = weakref.ref(shelf.peek())
    shelf.reload("it")
    assert first() is None and shelf.peek() is not None


@pytest.fixture
def folders() -> Folders:
    return Folders()


@pytest.fixture
def shelf(folders: Folders) -> Shelf:
    return Shelf.open([Path("a"), Path("b"), Path("a")], folders)


@pytest.fixture
def client(shelf: Shelf, tmp_path: Path) -> Iterator[TestClient]:
    with FeedbackStore(tmp_path / "f.sqlite") as store, TestClient(create_app(shelf, store), base_url=HERE) as opened:
        yield opened


def said(client: TestClient, **more: Any) -> tuple[str, str]:
    body = client.post(CHAT, json={**ASK, **more}).json()
    return body["choices"][0]["message"]["content"], body["system_fingerprint"]


def test_each_model_is_loaded_once_and_answers_to_its_name(client: TestClient, folders: Folders) -> None:
    assert len(folders.made) == 2
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["run:a", "run:b"]
    assert said(client) == said(client, model="run:a") == ("I am a 0", "id-1")
    assert said(client, model="run:b") == ("I am b 1", "id-2")
    assert client.get("/v1/models/run:b").json()["checkpoint"] == "id-2"
    assert client.get("/api/model").json()["name"] == "run:a"


def test_two_models_of_one_name_are_refused(folders: Folders) -> None:
    folders.names["b"] = "run:a"
    with pytest.raises(ServeError, match="two models are called 'run:a'"):
        Shelf.open([Path("a"), Path("b")], folders)
    assert all(loop.closed for loop in folders.made)


def test_a_model_is_exchanged_and_answers_say_which_it_was(client: TestClient, folders: Folders) -> None:
    done = client.post("/admin/reload", json={"model": "run:a"}).json()
    assert done == {"reloaded": [{"model": "run:a", "before": "id-1", "now": "id-3"}]}
    assert said(client) == ("I am a 2", "id-3") and folders.made[0].closed
    assert len(client.post("/admin/reload", json={}).json()["reloaded"]) == 2
    assert client.post("/admin/reload", json={"model": "run:x"}).status_code == 404


@pytest.mark.parametrize("fault", ["broken", "mute"])
def test_a_new_one_that_does_not_work_changes_nothing(client: TestClient, folders: Folders, fault: str) -> None:
    setattr(folders, fault, True)
    refused = client.post("/admin/reload", json={"model": "run:a"})
    assert refused.status_code == 503 and "stays as it is" in refused.json()["error"]["message"]
    assert said(client) == ("I am a 0", "id-1") and not folders.made[0].closed
    assert all(loop.closed for loop in folders.made[2:])


def test_a_folder_that_became_another_model_is_refused(client: TestClient, folders: Folders) -> None:
    folders.names["a"] = "other:a"
    assert client.post("/admin/reload", json={"model": "run:a"}).status_code == 503
    assert said(client)[0] == "I am a 0"


@pytest.mark.slow
def test_a_stream_goes_on_with_the_old_model_which_is_closed_after_it(client: TestClient, folders: Folders) -> None:
    old = folders.made[0]
    old.say, old.pause = (lambda _, __: "word " * 60), 0.1  # until the new model has answered
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(client.post(CHAT, json={**ASK, "stream": True}).text))
    thread.start()
    while not old.open:
        time.sleep(0.005)
    assert client.post("/admin/reload", json={"model": "run:a"}).status_code == 200
    assert said(client)[0] == "I am a 2" and not old.closed
    old.pause = 0.0
    thread.join()
    chunks = [json.loads(line[6:]) for line in found[0].splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == "word " * 60 and {chunk["system_fingerprint"] for chunk in chunks} == {"id-1"}
    assert "[DONE]" in found[0]
    assert old.closed


def test_a_dead_engine_is_neither_well_nor_ready(client: TestClient, folders: Folders) -> None:
    assert client.get("/ready").status_code == 200
    folders.made[1].alive = False
    response = client.get("/ready")
    assert response.status_code == 503 and response.json()["failed"] == ["run:b"]
    response = client.get("/health")
    assert response.status_code == 503 and response.json() == {"status": "failed", "failed": ["run:b"]}


def test_leases_end_once_and_unknown_names_have_none(shelf: Shelf) -> None:
    lease = shelf.lease("run:b")
    lease.end()
    lease.end()
    assert shelf.models["run:b"].users == 0
    with pytest.raises(UnknownModel, match="run:a, run:b"):
        shelf.lease("run:c")
    with pytest.raises(ServeError, match="not loaded from a folder"):
        Shelf([Held(served(ScriptedLoop(TOKENS)), None)]).reload("run:rl")


def test_real_folders_are_exchanged_unless_damaged(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    shelf = Shelf.open([copy], lambda path: load_assistant(path, max_batch=2))
    try:
        first = shelf.peek()
        assert shelf.reload("tiny:rl")["now"] == first.id and shelf.peek() is not first
        weights = copy / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
        with pytest.raises(ServeError, match="stays as it is"):
            shelf.reload("tiny:rl")
        shelf.peek().smoke_test()
    finally:
        shelf.close()


def test_the_document_describes_every_address_of_the_api(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    served_here = {
        (method, route.path.replace(":path", ""))
        for route in client.app.routes  # type: ignore[attr-defined]
        for method in route.methods
        if method != "HEAD" and not route.path.startswith("/api/") and "." not in route.path.replace(".json", "")
    }
    assert described == served_here - {("GET", "/")}
    json.dumps(document)
