"""OpenAI's own clients, unchanged, against a server in a process of its own, and a real, tiny model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stateofgpt.model.checkpoint import save_checkpoint
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.text.tokenizer import Tokenizer

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SAY = [{"role": "user", "content": "What is 4729 + 386?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bo"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Bern", "Oslo"]}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint named tiny:rl, of random weights."""
    path = tmp_path_factory.mktemp("runs") / "tiny" / "rl" / "checkpoint"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    shape = GPTConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    tokenizer = Tokenizer.train(iter(["What is 4729 + 386? It is five thousand. assistant user tool"] * 20), 320)
    save_checkpoint(path, GPT(shape), tokenizer=tokenizer, stage="rl", run="tiny")
    return path


class Process:
    """`sog serve` with a key, on a free port."""

    def __init__(self, model: Path, where: Path) -> None:
        keys = where / "keys.json"
        sog = [sys.executable, "-m", "stateofgpt"]
        self.key = subprocess.run(
            [*sog, "keys", "add", "me", "--keys", str(keys), "--admin"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        self.process = subprocess.Popen(
            [*sog, "serve", str(model), "--port", "0", "--keys", str(keys), "--feedback", str(where / "f.sqlite")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline()]
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.lines[0])
        assert found, self.lines[0] + self.process.stdout.read()
        self.url = found[0]


@pytest.fixture(scope="module")
def live(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    running = Process(folder, tmp_path_factory.mktemp("live"))
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) in (0, 143)


@pytest.fixture(scope="module")
def client(live: Process) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, timeout=60) as made:
        yield made


def test_an_answer_whole_and_streamed(client: Any) -> None:
    asked: Any = {"model": "tiny:rl", "messages": SAY, "max_tokens": 12, "seed": 3, "temperature": 1.0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant" and whole.usage.completion_tokens <= 12
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[0].system_fingerprint == whole.system_fingerprint
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and reasons[:-1] == [None] * (len(reasons) - 1)


def test_many_at_once_from_an_asynchronous_client(live: Process) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=live.key) as made:

            async def one(seed: int) -> str:
                stream = await made.chat.completions.create(
                    model="tiny:rl", messages=SAY, max_tokens=10, seed=seed, temperature=1.0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            together = list(await asyncio.gather(*(one(seed % 4) for seed in range(12))))
            return [*together, await one(0)]

    found = asyncio.run(ask())
    assert found[0] == found[4] == found[8] == found[12] and len(set(found)) > 1


def test_a_stream_that_is_left_early_is_closed(client: Any) -> None:
    with client.chat.completions.create(model="tiny:rl", messages=SAY, max_tokens=60, stream=True) as stream:
        next(iter(stream))
    assert client.models.list().data[0].id == "tiny:rl"


def test_log_probabilities(client: Any) -> None:
    asked: Any = {"model": "tiny:rl", "messages": SAY, "max_tokens": 6, "temperature": 0}
    (choice,) = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_completions_echo_scores_that_a_forward_pass_gives(client: Any, folder: Path) -> None:
    from stateofgpt.infer.score import score
    from stateofgpt.model.checkpoint import load_model

    ids = [70, 80, 90, 100, 110]
    sent: Any = {"prompt": [ids], "max_tokens": 1, "echo": True, "logprobs": 2, "temperature": 0}
    (choice,) = client.completions.create(model="tiny:rl", **sent).choices
    found = choice.logprobs.token_logprobs
    (expected,) = score(load_model(folder).eval(), [ids])
    assert found[0] is None and found[1:5] == pytest.approx(expected, abs=1e-4) and len(found) == 6
    assert max(choice.logprobs.top_logprobs[5].values()) == pytest.approx(found[5])


def test_json_schemas_are_kept_whatever_the_model_would_say(client: Any) -> None:
    fmt: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        asked: Any = {"model": "tiny:rl", "messages": SAY, "seed": seed, "max_tokens": 90, "temperature": 1.0}
        (choice,) = client.chat.completions.create(**asked, response_format=fmt).choices
        person = json.loads(choice.message.content)
        assert set(person) == {"name", "old"} and person["name"] in ("Ada", "Bo") and choice.finish_reason == "stop"


def test_required_calls_can_always_be_parsed(client: Any) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        asked: Any = {"model": "tiny:rl", "messages": SAY, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 80}
        (answer,) = client.chat.completions.create(**asked).choices
        (call,) = answer.message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Bern", "Oslo")
        assert answer.finish_reason == "tool_calls"
        parts = [c.choices[0].delta.tool_calls for c in client.chat.completions.create(**asked, seed=1, stream=True)]
        text = "".join(part[0].function.arguments for part in parts if part)
        assert json.loads(text)["city"] in ("Bern", "Oslo")


def test_responses_whole_and_streamed(client: Any) -> None:
    asked: Any = {"model": "tiny:rl", "input": "What is 4729?", "max_output_tokens": 8, "extra_body": {"seed": 5}}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        seen = list(stream)
    assert seen[-1].response.output_text == whole.output_text and whole.usage.output_tokens <= 8
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == whole.output_text
    assert seen[0].type == "response.created" and seen[-1].type == f"response.{whole.status}"


def test_embeddings(client: Any) -> None:
    found = client.embeddings.create(model="tiny:rl", input=["It is", "It is", "tool"])  # asks for base64 by itself
    one, two, three = (item.embedding for item in found.data)
    assert one == two != three and sum(x * x for x in one) == pytest.approx(1.0, abs=1e-4)
    plain = client.embeddings.create(model="tiny:rl", input="It is", encoding_format="float").data[0].embedding
    assert plain == pytest.approx(one, abs=1e-6)


def test_errors_are_the_exceptions_that_clients_catch(client: Any, live: Process) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-9", messages=SAY)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(model="tiny:rl", messages=SAY, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        ask(model="tiny:rl", messages=[{"role": "user", "content": "x" * 3000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="sog-wrong").models.list()


def test_a_client_retries_what_may_succeed_and_nothing_else(live: Process) -> None:
    import httpx2

    seen: list[int] = []

    class Counting(httpx2.HTTPTransport):
        def handle_request(self, request: Any) -> Any:
            response = super().handle_request(request)
            seen.append(response.status_code)
            return response

    http = httpx2.Client(transport=Counting())
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, http_client=http) as made:
        with pytest.raises(openai.BadRequestError):
            made.chat.completions.create(model="tiny:rl", messages=SAY, n=100)
        assert seen == [400]
        made.chat.completions.create(model="tiny:rl", messages=SAY, max_tokens=2)
        assert seen == [400, 200]


def test_the_examples_of_the_page_on_the_api_run(live: Process) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = [block for block in blocks if "curl " in block]
    assert len(commands) >= 4 and shutil.which("curl")
    for command in commands:
        here = command.replace("http://127.0.0.1:8000", live.url).replace("laptop:rl", "tiny:rl")
        done = subprocess.run(
            ["bash", "-c", here], capture_output=True, text=True, timeout=60, env={**os.environ, "KEY": live.key}
        )
        assert done.returncode == 0 and '"error": {' not in done.stdout and done.stdout, command + done.stdout


def test_sigusr1_reads_the_models_again(live: Process, client: Any) -> None:
    live.process.send_signal(signal.SIGUSR1)
    assert live.process.stdout is not None
    line = live.process.stdout.readline()
    while "read again" not in line:
        line = live.process.stdout.readline()
        assert line
    assert client.chat.completions.create(model="tiny:rl", messages=SAY, max_tokens=2).choices


JAVASCRIPT = Path(__file__).parent / "js"


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="node is not installed")
def test_the_javascript_client(live: Process, tmp_path: Path) -> None:
    for name in ("package.json", "package-lock.json", "client.mjs"):
        shutil.copy(JAVASCRIPT / name, tmp_path)
    fetch = ["npm", "ci", "--silent", "--no-audit", "--fetch-retries=1", "--fetch-timeout=30000"]
    made = subprocess.run(fetch, cwd=tmp_path, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"npm could not fetch the client: {made.stderr[-200:]}")
    done = subprocess.run(
        ["node", "client.mjs", f"{live.url}/v1", live.key], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("well"), done.stdout + done.stderr
