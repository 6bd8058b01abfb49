"""Connections that are held to time: the guard in front of the application, below HTTP.

Owns the deadlines of a connection (its first request's headers, a body, what it does not read), how many there may be
in all and from one address, and what one too many is told. Built on uvicorn's h11 protocol, whose parser bounds the
size of headers. Knows nothing of routes.

uvicorn alone waits without end for headers and bodies, and for a reader that does not read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from stateofgpt.serve.protocol import error_body

HIGH_WATER = 64 * 1024  # bytes that may wait for a slow reader before an answer waits for it
KERNEL_BYTES = 64 * 1024  # that the kernel keeps for each reader; left alone it takes megabytes, and nobody seems slow
MAX_HEADER_BYTES = 32 * 1024
LINGER_S = 0.25  # after the last word, so that a client still sending can read it before its connection is reset
MOST_LINGERING = 64


@dataclass
class Patience:
    """How long is waited for a client, in seconds, and for how many. `per_address` does not count loopback."""

    header_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 30.0
    total: int = 1024
    per_address: int = 64
    open: int = 0
    lingering: int = 0
    addresses: Counter[str] = field(default_factory=Counter)
    refused: Callable[[], object] = lambda: None
    cut: Callable[[str], object] = lambda why: None
    changed: Callable[[int], object] = lambda count: None


def protocol_class(patience: Patience) -> type[asyncio.Protocol]:
    """The protocol of a server with this patience, for uvicorn's `http` setting."""

    class Held(Connection):
        pass

    Held.patience = patience
    return cast("type[asyncio.Protocol]", Held)


class Connection(H11Protocol):
    """One connection with its deadlines."""

    patience = Patience()

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._address = ""
        self._counted = False
        self._busy = False
        self._lingers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        patience = self.patience
        super().connection_made(transport)
        transport.set_write_buffer_limits(HIGH_WATER)
        address = self.client[0] if self.client else ""
        self._address = "" if not address or ipaddress.ip_address(address).is_loopback else address
        crowded = self._address and patience.addresses[self._address] >= patience.per_address
        if patience.open >= patience.total or crowded:
            self._turn_away()
            return
        self._counted = True
        patience.open += 1
        patience.changed(patience.open)
        if self._address:
            patience.addresses[self._address] += 1
        self._wait(patience.header_s, "header")

    def _turn_away(self) -> None:
        patience = self.patience
        self._busy = True
        patience.refused()
        self.transport.write(_said("503 Service Unavailable", "too many connections are open: try again in a moment"))
        if patience.lingering >= MOST_LINGERING or not self.transport.can_write_eof():
            self.transport.close()
            return
        patience.lingering += 1
        self._lingers = True
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        text = f"that is no HTTP request, or its headers have more than {MAX_HEADER_BYTES} bytes"
        self.transport.write(_said("400 Bad Request", text))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None, "")
        self._stop_waiting_for_reader()
        self.patience.lingering -= int(self._lingers)
        self._lingers = False
        if self._counted:
            self._counted = False
            self.patience.open -= 1
            self.patience.changed(self.patience.open)
            if self._address:
                self.patience.addresses[self._address] -= 1
                if not self.patience.addresses[self._address]:
                    del self.patience.addresses[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._busy:
            return
        before = self.conn.their_state
        waiting = before is h11.IDLE and self._deadline is None
        if waiting:  # the first bytes of another request on a connection that is kept
            self._wait(self.patience.header_s, "header")
        super().data_received(data)
        self._watch(before)

    def _watch(self, before: object) -> None:
        now = self.conn.their_state
        if now is h11.SEND_BODY:
            if before is not h11.SEND_BODY:
                self._wait(self.patience.body_s, "body")
        elif now is not h11.IDLE:  # the request is complete, or the client has gone wrong
            self._wait(None, "")

    def on_response_complete(self) -> None:
        if self.conn.their_state is not h11.SEND_BODY:
            self._wait(None, "")
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.patience.write_s, self._cut, "reader")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting_for_reader()

    def _stop_waiting_for_reader(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _wait(self, seconds: float | None, what: str) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._cut, what)

    def _cut(self, why: str) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.patience.cut(why)
            self.transport.abort()


def _said(status: str, message: str) -> bytes:
    """A whole response, and the last one of its connection."""
    body = json.dumps(error_body(message, int(status[:3]))).encode()
    retry = "Retry-After: 2\r\n" if status.startswith("503") else ""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{retry}Connection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
