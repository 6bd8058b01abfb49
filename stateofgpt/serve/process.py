"""The server as a process: its socket, its models, its signals, and how it ends.

Owns: where it may listen, how many connections the machine allows it, that SIGUSR1 reads the models' folders again,
that SIGTERM lets answers finish before it leaves, and that it leaves with an error where an engine cannot be kept
alive. Knows no route.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import uvicorn
from starlette.applications import Starlette

from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import ServeError, StateOfGptError
from stateofgpt.serve.access import Access
from stateofgpt.serve.app import create_app
from stateofgpt.serve.config import Config
from stateofgpt.serve.connection import KERNEL_BYTES, MAX_HEADER_BYTES, Patience, protocol_class
from stateofgpt.serve.guard import LOOPBACK
from stateofgpt.serve.keeper import EngineLost, Keeper
from stateofgpt.serve.keys import KeyRing
from stateofgpt.serve.metrics import Metrics
from stateofgpt.serve.shelf import Shelf
from stateofgpt.serve.streams import Running

SPARE_FILES = 128  # descriptors that are not connections
SWITCH_S = 0.0005  # after which a thread that computes in Python lets others on, the engine's among them


def serve(
    model_dirs: Sequence[Path] | Path, feedback: Path | str, config: Config | None = None, keys: Path | None = None
) -> None:
    """Serve model folders until Ctrl-C, the first one on the page. Raises ServeError when the address or the keys
    cannot be used, before loading anything, and EngineLost when an engine died and could not be brought back."""
    config = config or Config()
    sys.setswitchinterval(SWITCH_S)
    folders = [model_dirs] if isinstance(model_dirs, Path) else list(model_dirs)
    ring = None if keys is None else KeyRing(keys)
    listener = listen(config.host, config.port, anywhere=ring is not None)
    with listener, FeedbackStore(feedback, exclusive=True) as store:
        from stateofgpt.serve.loader import load_assistant

        load = functools.partial(
            load_assistant,
            max_batch=config.max_answers,
            weights=config.weights,
            cache=config.cache,
            device=config.device,
        )
        shelf = Shelf.open(folders, load)
        try:
            host = f"[{config.host}]" if ":" in config.host else config.host
            names = ", ".join(shelf.models)
            answer = "answer" if len(shelf.models) > 1 else "answers"
            address = f"http://{host}:{listener.getsockname()[1]}"
            print(f"{names} {answer} at {address} (Ctrl-C ends it)", flush=True)
            print(f"feedback is kept in {store.name}", flush=True)
            run_server(create_app(shelf, store, config, Access(ring)), listener, config)
        except EngineLost as lost:
            if not lost.hung:
                raise
        finally:
            shelf.close()
            if shelf.hung:
                store.close()
                _leave(f"an engine hangs ({shelf.hung}): the server ends, and its log has where")


def _leave(message: str) -> NoReturn:
    """End the process now: what Python and its libraries do at their end could wait for, or crash beside, a native call
    that still runs."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EngineLost.exit_code)


def listen(host: str, port: int, *, anywhere: bool = False) -> socket.socket:
    """A listening socket on loopback, or `anywhere`; a ServeError says why there is none."""
    if host not in LOOPBACK and not anywhere:
        raise ServeError(
            f"{host!r} is not this machine's loopback address, and the server asks for no keys: use 127.0.0.1 and a "
            "tunnel such as `ssh -L`, or give it keys with --keys"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)  # of the connections made from it
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ServeError(f"cannot listen on {host} port {port} ({reason}): choose another with --port") from error
    return listener


def run_server(app: Starlette, listener: socket.socket, config: Config) -> None:
    """Run `app` on a listening socket until a signal ends it, or EngineLost."""
    logging.getLogger("asyncio").addFilter(_worth_telling)
    running = server(app, config)
    try:
        running.run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    if running.lost is not None:
        raise running.lost


def _worth_telling(record: logging.LogRecord) -> bool:
    """asyncio warns when several frames go to a client that has just left, which is no news."""
    return record.getMessage() != "socket.send() raised exception."


def server(app: Starlette, config: Config) -> Server:
    """A server that has not begun."""
    metrics: Metrics = app.state.metrics
    patience = Patience(
        config.header_s, config.body_s, config.write_s, room_for(config.max_connections), config.max_per_address,
        refused=metrics.refused.inc, cut=lambda why: metrics.cut.labels(why).inc(), changed=metrics.connections.set,
    )  # fmt: skip
    settings = uvicorn.Config(
        app, http=protocol_class(patience), ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_keep_alive=config.keep_alive_s, timeout_graceful_shutdown=int(config.drain_s) + 3, backlog=1024,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )  # fmt: skip
    return Server(settings, app.state.running, app.state.shelf, config.drain_s, config.step_s)


def room_for(connections: int) -> int:
    """How many connections there may be: as asked, as far as the system gives descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        except (OSError, ValueError):
            pass
    room = connections if soft == resource.RLIM_INFINITY else min(connections, soft - SPARE_FILES)
    return max(8, room)


class Server(uvicorn.Server):
    """uvicorn's server, which lets answers finish for a while, exchanges models at SIGUSR1, and ends with `lost` where
    an engine cannot be kept alive."""

    def __init__(self, settings: uvicorn.Config, running: Running, shelf: Shelf, drain_s: float, step_s: float) -> None:
        super().__init__(settings)
        self._running, self._shelf, self._drain_s = running, shelf, drain_s
        self._keeper = Keeper(shelf, self._give_up, step_s=step_s)
        self.lost: EngineLost | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._keeper.start()
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR1"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._reload)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._running.draining = True
        self._keeper.stop()
        ending = asyncio.get_running_loop().call_later(self._drain_s, self._running.stop_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            self._running.stop_all()

    def _give_up(self, lost: EngineLost) -> None:
        self.lost, self.should_exit = lost, True

    def _reload(self) -> None:
        threading.Thread(target=self._reload_all, name="reload", daemon=True).start()

    def _reload_all(self) -> None:
        for name in self._shelf.models:
            try:
                told = self._shelf.reload(name)
                print(f"{name} was read again: checkpoint {told['now']}, before {told['before']}", flush=True)
            except StateOfGptError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
