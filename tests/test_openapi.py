"""Whatever fits the server's own description of itself, and much that does not, is answered without a 500."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scripted import ScriptedLoop, served, tokenizer
from starlette.testclient import TestClient

from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.serve.app import create_app
from stateofgpt.serve.config import Config
from stateofgpt.serve.fields import MAX_DEPTH, ApiError, shallow
from stateofgpt.serve.openai.document import document

pytestmark = pytest.mark.slow  # together they take long

HERE = "http://127.0.0.1:8000"
QUICK = settings(
    max_examples=60, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with FeedbackStore(tmp_path_factory.mktemp("fuzz") / "f.sqlite") as store:
        app = create_app(served(ScriptedLoop(tokenizer())), store)
        with TestClient(app, base_url=HERE, raise_server_exceptions=True) as opened:
            yield opened


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}


@QUICK
@given(data=st.data())
def test_no_value_of_any_field_is_a_500(client: TestClient, data: Any) -> None:
    path = data.draw(st.sampled_from(sorted(GOOD)))
    schema = document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = st.sampled_from(sorted(schema["properties"]))
    fields = data.draw(st.dictionaries(names, JSON, min_size=1, max_size=3))
    response = client.post(path, json={**GOOD[path], **fields})
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@QUICK
@given(raw=st.binary(max_size=200))
def test_no_body_is_a_500(client: TestClient, raw: bytes) -> None:
    for path in GOOD:
        response = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400)


@given(depth=st.integers(1, 3 * MAX_DEPTH), wide=st.booleans())
def test_depth_is_measured_as_one_would_by_hand(depth: int, wide: bool) -> None:
    value: Any = "leaf"
    for _ in range(depth):
        value = [value, {}] if wide else {"a": value}
    if depth + wide <= MAX_DEPTH:  # the empty object beside the leaf is one more level
        shallow(value, "x", limit=10**6)
    else:
        with pytest.raises(ApiError, match="deeper"):
            shallow(value, "x", limit=10**6)


@pytest.mark.slow
def test_schemathesis_finds_no_500(tmp_path: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error

    with FeedbackStore(tmp_path / "f.sqlite") as store:
        app = create_app(served(ScriptedLoop(tokenizer())), store, Config(names=("testserver",)))
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        random.seed(0)
        seen = set()
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path == "/admin/reload":
                continue

            @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def check(case: Any) -> None:
                case.call_and_validate(checks=[not_a_server_error])

            check()
            seen.add(operation.path)
    assert len(seen) > 10
