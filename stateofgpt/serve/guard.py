"""The door: which requests get in, and what every response says to the browser.

Owns the allow-list of hosts (against DNS rebinding), the origin check (against other sites' pages), the content type,
the size of bodies, the security headers, the id of a request, and that an error never shows more than a sentence. Who
a request comes from is `access`'s to say. Knows no route.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import re
import secrets
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stateofgpt.data.feedback import FeedbackConflict, FeedbackRefused, UnknownMessage
from stateofgpt.errors import FeedbackError, ServeError, StateOfGptError
from stateofgpt.infer.loop import EngineDied, EngineFailed
from stateofgpt.serve.access import Access
from stateofgpt.serve.fields import MAX_BODY_BYTES, ApiError
from stateofgpt.serve.protocol import error_body
from stateofgpt.serve.shelf import UnknownModel

log = logging.getLogger("stateofgpt.serve")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = "*"  # among the hosts: any address in digits, which no rebinding can be about
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types answer"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def hostname(host: str) -> str:
    """The name in a Host header or authority, without its port: `[::1]:8000` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def host_known(host: str, hosts: tuple[str, ...]) -> bool:
    """Whether a server that goes by `hosts` is the one that is meant."""
    name = hostname(host)
    if name in hosts:
        return True
    try:
        return ANY_ADDRESS in hosts and bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class Guard:
    """ASGI middleware: refuses foreign hosts and origins and unknown keys, and adds the security headers to every
    response. Who a request comes from is in its scope as "sog.who"; `seen` is told of its route and status."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: tuple[str, ...] = LOOPBACK,
        access: Access | None = None,
        seen: Callable[[Scope, int], None] | None = None,
    ) -> None:
        self.app, self.hosts, self.access, self.seen = app, hosts, access or Access(), seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        status = 0
        given = Headers(scope=scope)
        asked = given.get("x-request-id", "")
        id = asked if _ID.fullmatch(asked) else secrets.token_hex(8)

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            refusal = self._refusal(scope["method"], given)
            if refusal is not None:
                raise refusal
            address = (scope.get("client") or ("", 0))[0]
            scope["sog.who"] = self.access.admit(scope["path"], given.get("authorization", ""), address)
            await self.app(scope, receive, send_guarded)
        except ClientDisconnect:
            return
        except Exception as error:
            response = refuse(error)
            if not status:
                await response(scope, receive, send_guarded)
        finally:
            if self.seen is not None:
                self.seen(scope, status)

    def _refusal(self, method: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not host_known(host, self.hosts):
            here = "open http://127.0.0.1 and its port, or start it with --name"
            return ApiError(421, f"this server does not go by that name: {here}")
        if method in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")
        foreign = origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower())
        if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return ApiError(403, "requests from pages of other origins are refused")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return ApiError(415, "send the body as application/json")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return ApiError(400, "content-length must be a number")
        if int(length[:20]) > MAX_BODY_BYTES:
            return too_large()
        return None


def too_large() -> ApiError:
    return ApiError(413, f"the body is too large: {MAX_BODY_BYTES} bytes is the limit")


async def read_body(request: Request) -> bytes:
    """The body, given up on as soon as it passes the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large()
    return bytes(body)


def refuse(error: Exception) -> JSONResponse:
    """Any error as a response: one sentence, and for a bug of ours only the id under which the log has it."""
    headers: dict[str, str] = {}
    if isinstance(error, ApiError):
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        if error.retry_after_s is not None:
            headers["retry-after"] = str(math.ceil(error.retry_after_s))
            headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
        return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status, headers)
    if isinstance(error, HTTPException):
        words = {404: "there is nothing at this address", 405: "this address does not take this method"}
        message = words.get(error.status_code, str(error.detail))
        return JSONResponse(error_body(message, error.status_code), error.status_code, dict(error.headers or {}))
    if isinstance(error, StateOfGptError) and not isinstance(error, EngineFailed):
        kinds = ((UnknownMessage, 404), (FeedbackConflict, 409), (FeedbackRefused, 400), (FeedbackError, 503))
        status = next((status for kind, status in kinds if isinstance(error, kind)), 400)
        if isinstance(error, UnknownModel):
            status = 404
        elif isinstance(error, ServeError | EngineDied):
            status = 503
        if status == 503:
            headers["retry-after"] = "2"
        return JSONResponse(error_body(str(error), status), status, headers)
    return JSONResponse(error_body(report_bug(error), 500), 500, {"x-should-retry": "false"})


def sentence(error: Exception) -> str:
    """What may be said of an error to whoever asked."""
    known = isinstance(error, StateOfGptError) and not isinstance(error, EngineFailed)
    return str(error) if known else report_bug(error)


def report_bug(error: BaseException) -> str:
    """Log an unexpected error and return what may be said about it."""
    id = secrets.token_hex(4)
    log.error("request %s failed", id, exc_info=error)
    return f"something went wrong in the server; its log has the details under {id}"
