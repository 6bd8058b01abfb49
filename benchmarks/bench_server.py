"""Load over HTTP on a running server: `sog serve MODEL --port 8000 --max-connections 12000`, then

    python benchmarks/bench_server.py ttft --port 8000 --clients 1 8 32 --requests 200
    python benchmarks/bench_server.py slow --port 8000 --slow 500
    python benchmarks/bench_server.py idle --port 8000 --connections 10000 --pid PID
    python benchmarks/bench_server.py leave --port 8000 --count 1000
    python benchmarks/bench_server.py soak --port 8000 --minutes 10 --pid PID

Each prints one JSON object. `ttft`: seconds to the first text and between texts at several numbers of clients. `slow`:
the same for 8 clients, in pairs of phases: beside clients that hold half a header, half a body, nothing or an answer
that they do not read, and beside as many answers asked for at the same times and read. (`hold` is those clients, in a
process of their own.)
`idle`: connections that send nothing, how many the server held at once, refused, or had closed at the end, where its
time for a header is over, and its memory for each.
`leave`: clients that leave after three pieces, and what is left of them. `soak`: a mixed load, and the slopes of the
server's memory, descriptors and threads (last half of the time, least squares). `--pid` reads /proc and so needs Linux
and the same machine. `--key` or the environment's KEY is sent where the server asks for one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import resource
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

# None that an assistant would use a tool for: what is not shown would count as time to the first text.
TEXTS = ("Invent a name.", "Who are you?", "Hello.", "Tell me more.", "What is your name?")
AGAIN_S = 20.0  # between two answers that one and the same client asks for
Times = dict[str, list[float]]


class Target:
    """The server under load."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.host, self.port, self.key = options.host, options.port, options.key
        self.max_tokens: int = options.max_tokens

    def request(self, path: str, body: Any = None) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        head = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {self.host}", "Connection: close"]
        head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        head += [f"Authorization: Bearer {self.key}"] if self.key else []
        return ("\r\n".join(head) + "\r\n\r\n").encode() + data

    def chat(self, seed: int, tokens: int | None = None) -> bytes:
        said = [{"role": "user", "content": TEXTS[seed % len(TEXTS)]}]
        body = {"messages": said, "seed": seed, "max_tokens": tokens or self.max_tokens, "stream": True}
        return self.request("/v1/chat/completions", {**body, "temperature": 1.0})

    async def open(self, room: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection; `room` is how many bytes the kernel keeps for a reader, by default as many as it likes."""
        if room is None:
            return await asyncio.open_connection(self.host, self.port)
        made = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, (self.host, self.port))
        return await asyncio.open_connection(sock=made, limit=min(room, 1 << 16))

    async def once(self, path: str) -> str:
        reader, writer = await self.open()
        writer.write(self.request(path))
        data = await reader.read()
        writer.close()
        return data.partition(b"\r\n\r\n")[2].decode()


async def stream(target: Target, seed: int, times: Times) -> None:
    """One streamed answer, and when its pieces came."""
    began = time.perf_counter()
    reader, writer = await target.open()
    last: float | None = None
    try:
        writer.write(target.chat(seed))
        ended = False
        while line := await reader.readline():
            now = time.perf_counter()
            if b'"content": "' in line and b'"content": ""' not in line:
                times["first" if last is None else "between"].append(now - (last or began))
                last = now
            ended = ended or b"[DONE]" in line
        times["whole"].append(time.perf_counter() - began)
        if not ended:
            times["failed"].append(1.0)
    except OSError:
        times["failed"].append(1.0)
    finally:
        writer.close()


def empty() -> Times:
    return {"first": [], "between": [], "whole": [], "failed": []}


def shown(times: Times, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"answers": len(times["whole"]), "failed": len(times["failed"])}
    found["answers_per_s"] = round(len(times["whole"]) / seconds, 2)
    for name in ("first", "between", "whole"):
        values = sorted(times[name])
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=100)
            found[name] = {"p50_ms": round(cuts[49] * 1e3, 2), "p99_ms": round(cuts[98] * 1e3, 2)}
    return found


async def crowd(target: Target, clients: int, requests: int | None, seconds: float = math.inf) -> dict[str, Any]:
    """So many clients, each asking again as soon as it was answered, until all requests or seconds are used."""
    times, left = empty(), itertools.count() if requests is None else iter(range(requests))
    began = time.perf_counter()

    async def client() -> None:
        for number in left:
            if time.perf_counter() - began > seconds:
                return
            await stream(target, number, times)

    await asyncio.gather(*(client() for _ in range(clients)))
    return {"clients": clients, **shown(times, time.perf_counter() - began)}


async def ttft(target: Target, options: argparse.Namespace) -> Any:
    await crowd(target, 2, 8)  # the first requests of a process are slower
    return [await crowd(target, clients, options.requests) for clients in options.clients]


async def hold(target: Target, options: argparse.Namespace) -> Any:
    """Clients for so many seconds, a quarter of each kind: half a header, an answer that is not read, half a body,
    nothing at all. The first three kinds of waiting are ended by the server, and come back at once; who asks for an
    answer comes back every `AGAIN_S` seconds. With --ordinary only those who ask come, at the same times, and read."""
    end, tally = time.monotonic() + options.seconds, Counter[str]()
    half = target.request("/v1/chat/completions", {"messages": []})
    sent = {0: half[:60], 2: half[:-2], 3: b""}

    async def ask(number: int) -> None:
        reader, writer = await target.open(None if options.ordinary else 4096)
        writer.write(target.chat(number, 64))
        if options.ordinary:
            data = await reader.read()
            tally["answered" if b"[DONE]" in data else "refused"] += 1
        else:
            await asyncio.sleep(max(0.0, min(AGAIN_S - 1, end - time.monotonic())))
            tally["not read"] += 1
        writer.close()

    async def wait(number: int) -> None:
        reader, writer = await target.open()
        writer.write(sent[number % 4])
        try:
            await asyncio.wait_for(reader.read(), max(0.01, end - time.monotonic()))
            tally["cut"] += 1
        except TimeoutError:
            tally["still held"] += 1
        writer.close()

    async def client(number: int) -> None:
        await asyncio.sleep(options.arrive * number / options.slow)
        while (now := time.monotonic()) < end:
            asks = number % 4 == 1
            try:
                await (ask(number) if asks else wait(number))
            except OSError:
                tally["broken"] += 1
                await asyncio.sleep(0.1)
            if asks:
                await asyncio.sleep(max(0.0, min(now + AGAIN_S, end) - time.monotonic()))

    numbers = range(1, options.slow, 4) if options.ordinary else range(options.slow)
    await asyncio.gather(*(client(number) for number in numbers))
    return tally


async def slow(target: Target, options: argparse.Namespace) -> Any:
    """Pairs of phases: beside clients of whom a quarter ask and do not read and the others only wait, and beside as
    many who ask at the same times and read. The ratio is what slowness adds to the load. First, nobody beside."""

    async def phase(*beside: str) -> dict[str, Any]:
        holder = None
        if beside:
            given = ["hold", *beside, "--host", target.host, "--port", target.port, "--slow", options.slow]
            given += ["--seconds", options.seconds, "--arrive", options.arrive]
            command = [sys.executable, __file__, *map(str, given)]
            holder = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            await asyncio.sleep(1.0)
        found = await crowd(target, 8, None, seconds=options.seconds - 2)
        if holder is not None:
            said, _ = await holder.communicate()
            found["beside"] = json.loads(said)["found"]
        while json.loads(await target.once("/ready"))["answers_running"]:
            await asyncio.sleep(0.2)
        return found

    await crowd(target, 2, 8)
    alone, pairs = await phase(), []
    for number in range(options.pairs):
        order = ("slow", "ordinary") if number % 2 else ("ordinary", "slow")
        pairs.append(
            {
                name: await phase(*(["--key", target.key], ["--key", target.key, "--ordinary"])[name == "ordinary"])
                for name in order
            }
        )
        print(json.dumps(pairs[-1]), file=sys.stderr, flush=True)
    ratios = {
        cut: sorted(round(pair["slow"]["first"][cut] / pair["ordinary"]["first"][cut], 3) for pair in pairs)
        for cut in ("p50_ms", "p99_ms")
    }
    return {"slow": options.slow, "first_ratio": ratios, "alone": alone, "pairs": pairs}


async def idle(target: Target, options: argparse.Namespace) -> Any:
    before = process(options.pid)
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    began = time.perf_counter()
    failed = 0
    for _ in range(options.connections):
        try:
            opened.append(await target.open())
        except OSError:
            failed += 1
    await asyncio.sleep(2.0)  # until all are accepted
    during, held = process(options.pid), await gauge(target, "sog_connections")
    alive = await crowd(target, 4, 20)
    refused = closed = 0
    for reader, _ in opened:
        try:
            data = await asyncio.wait_for(reader.read(64), 0.001)
            refused, closed = refused + data.startswith(b"HTTP/1.1 503"), closed + (data == b"")
        except (TimeoutError, OSError):
            pass
    for _, writer in opened:
        writer.close()
    grown = (during.get("rss_kb", 0) - before.get("rss_kb", 0)) / max(1, len(opened) - refused)
    return {
        "opened": len(opened), "not_opened": failed, "held": held, "refused_503": refused, "closed_after": closed,
        "seconds": round(time.perf_counter() - began, 2), "kb_per_connection": round(grown, 1), "answers": alive,
    }  # fmt: skip


async def gauge(target: Target, name: str) -> float:
    """One number of the server's metrics."""
    text = await target.once("/metrics")
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))


async def leave(target: Target, options: argparse.Namespace) -> Any:
    async def one(seed: int) -> None:
        reader, writer = await target.open()
        writer.write(target.chat(seed, 512))
        seen = 0
        while seen < 3 and (line := await reader.readline()):
            seen += b"data: " in line
        writer.transport.abort()

    before = process(options.pid)
    for start in range(0, options.count, 16):
        await asyncio.gather(*(one(seed) for seed in range(start, min(start + 16, options.count))))
    await asyncio.sleep(1.0)
    ready = json.loads(await target.once("/ready"))
    return {"left": options.count, "running": ready["answers_running"], "before": before, "after": process(options.pid)}


async def soak(target: Target, options: argparse.Namespace) -> Any:
    """A mixed load: answers, clients that leave, refused requests, texts to tokens."""
    times, end = empty(), time.monotonic() + 60 * options.minutes
    rng = random.Random(0)
    samples: list[dict[str, float]] = []

    async def client(number: int) -> None:
        while time.monotonic() < end:
            kind = rng.random()
            if kind < 0.7:
                await stream(target, rng.randrange(10_000), times)
            elif kind < 0.8:
                reader, writer = await target.open()
                writer.write(target.chat(number))
                await reader.readline()
                writer.close()
            elif kind < 0.9:
                await target.once("/v1/models/nothing")
            else:
                await target.once("/v1/models")

    async def watch() -> None:
        while time.monotonic() < end:
            samples.append({"t": time.monotonic(), **process(options.pid)})
            await asyncio.sleep(max(1.0, options.minutes * 60 / 200))

    began = time.perf_counter()
    await asyncio.gather(watch(), *(client(number) for number in range(8)))
    half = samples[len(samples) // 2 :]
    slopes = {name: slope(half, name) for name in ("rss_kb", "files", "threads") if half and name in half[0]}
    seconds = time.perf_counter() - began
    ten = samples[:: max(1, len(samples) // 10)]
    memory = [(round(sample["t"] - samples[0]["t"]), sample.get("rss_kb", 0)) for sample in ten]
    ends = {"start": samples[0], "end": samples[-1], "memory": memory}
    return {**shown(times, seconds), "per_minute": slopes, **ends}


def slope(samples: list[dict[str, float]], name: str) -> float:
    """Least squares, a minute."""
    xs, ys = [s["t"] / 60 for s in samples], [s[name] for s in samples]
    if len(xs) < 3:
        return 0.0
    return round(statistics.linear_regression(xs, ys).slope, 3)


def process(pid: int | None) -> dict[str, float]:
    """Memory, descriptors and threads of the server."""
    if pid is None:
        return {}
    text = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"rss_kb": float(lines["VmRSS"].split()[0]), "files": float(files), "threads": float(lines["Threads"])}


MODES: dict[str, Callable[[Target, argparse.Namespace], Awaitable[Any]]] = {
    "ttft": ttft, "slow": slow, "hold": hold, "idle": idle, "leave": leave, "soak": soak,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--key", default=os.environ.get("KEY", ""))
    parser.add_argument("--pid", type=int)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--slow", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=40.0, help="of a phase of `slow`")
    parser.add_argument("--arrive", type=float, default=5.0, help="the slow clients come within so many seconds")
    parser.add_argument("--ordinary", action="store_true", help="of `hold`: only those who ask, and they read")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = asyncio.run(MODES[options.mode](Target(options), options))
    print(json.dumps({"mode": options.mode, "max_tokens": options.max_tokens, "found": found}, indent=2))


if __name__ == "__main__":
    main()
