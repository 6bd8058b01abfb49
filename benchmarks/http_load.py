"""The ragged load of `bench_engine.py` over HTTP: a server of its own, and clients that count when tokens come.

Owns: the folder that is served, the server's process, and the clients. Knows nothing of the other sides.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from stateofgpt.model.checkpoint import save_checkpoint
from stateofgpt.model.gpt import GPT
from stateofgpt.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
Asked = Sequence[tuple[list[int], int]]


def write_folder(path: Path, model: GPT) -> None:
    """The model with a tokenizer of as many tokens, of made-up words."""
    rng = random.Random(0)
    words = ("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(2, 9))) for _ in range(9000))
    text = " ".join(words)
    tokenizer = Tokenizer.train(iter([text] * 2), model.config.vocab_size)
    save_checkpoint(path, model, tokenizer=tokenizer, stage="sft", run="load")


@contextmanager
def server(folder: Path, rows: int, *options: str) -> Iterator[int]:
    """`sog serve` of one folder with `options`, and its port; it ends with the block."""
    command = [sys.executable, "-m", "stateofgpt", "serve", str(folder), "--port", "0", "--max-answers", str(rows)]
    command += ["--feedback", str(folder.parent / f"feedback{'-'.join(options)}.sqlite"), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert running.stdout is not None
        said = running.stdout.readline()
        if "http://" not in said:
            raise RuntimeError(f"the server did not start: {said!r}")
        yield int(said.split("127.0.0.1:")[1].split()[0])
    finally:
        running.terminate()
        running.wait(40)


async def _ask(port: int, path: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for _ in range(100):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            break
        except OSError:  # it has only just said its address
            await asyncio.sleep(0.1)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


async def _client(port: int, left: Iterator[tuple[list[int], int]], firsts: list[float], drawn: list[int]) -> None:
    """Ask for one answer after the other, as long as there are any to ask for."""
    for prompt, tokens in left:
        began, first, last = time.perf_counter(), 0.0, b""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        reader, writer = await _ask(port, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                last = line
        writer.close()
        usage = json.loads(last[6:]).get("usage")
        if not usage:
            raise RuntimeError(f"an answer broke off: {last[:200]!r}")
        firsts.append(first)
        drawn.append(usage["completion_tokens"])


async def load(port: int, asked: Asked, clients: int) -> dict[str, Any]:
    """So many clients until all is answered, with an engine that has not seen any of it."""
    reader, writer = await _ask(port, "/admin/reload", {})
    if b" 200 " not in await reader.readline():
        raise RuntimeError("the server did not read its model again")
    writer.close()
    firsts: list[float] = []
    drawn: list[int] = []
    left = iter(asked)
    begun = time.perf_counter()
    await asyncio.gather(*(_client(port, left, firsts, drawn) for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return {"rate": sum(drawn) / seconds, "drawn": sum(drawn), "first_ms": milliseconds(firsts)}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Two percentiles."""
    cuts = quantiles(seconds, n=100)
    return {"p50": round(cuts[49] * 1e3, 1), "p99": round(cuts[98] * 1e3, 1)}
