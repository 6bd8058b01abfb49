"""The server's application: one page, its API, and OpenAI's, behind one door.

Owns which address belongs to what, and what is shared by all of them. Knows nothing of sockets or signals.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.errors import StateOfGptError
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve.access import Access
from stateofgpt.serve.answering import Assistant
from stateofgpt.serve.config import Config
from stateofgpt.serve.desk import Desk
from stateofgpt.serve.fields import ApiError
from stateofgpt.serve.guard import ANY_ADDRESS, LOOPBACK, Guard, refuse
from stateofgpt.serve.metrics import Metrics
from stateofgpt.serve.openai.routes import openai_routes
from stateofgpt.serve.service import Service
from stateofgpt.serve.shelf import Shelf
from stateofgpt.serve.streams import Running

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def create_app(
    models: Shelf | Assistant, store: FeedbackStore, config: Config | None = None, access: Access | None = None
) -> Starlette:
    """The application over models and one store. The page talks to the first model."""
    config = config or Config()
    shelf = models if isinstance(models, Shelf) else Shelf.of(models)
    access = access or Access()
    running = Running(config.max_answers)
    metrics = Metrics(shelf, running)
    defaults = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed)
    service = Service(shelf, running, metrics, access, defaults)
    desk = Desk(service, store)
    routes = [
        *(Route(address, functools.partial(_file, *file)) for address, file in PAGE.items()),
        Route("/api/health", desk.health),
        Route("/api/model", desk.model),
        Route("/api/chat", desk.chat, methods=["POST"]),
        Route("/api/regenerate", desk.regenerate, methods=["POST"]),
        Route("/api/stop", desk.stop, methods=["POST"]),
        Route("/api/feedback", desk.feedback, methods=["POST"]),
        Route("/api/conversations", desk.conversations),
        Route("/api/conversations/{id}", desk.conversation),
        *openai_routes(service),
    ]
    known = {getattr(route, "path", "") for route in routes}

    def seen(scope: Scope, status: int) -> None:
        path = scope["path"] if scope["path"] in known else "/v1/models/" if "/v1/models/" in scope["path"] else "other"
        metrics.requests.labels(path, str(status) if status else "left").inc()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        running.stop_all()

    async def on_error(_: Request, error: Exception) -> Response:
        return refuse(error)

    hosts = (*LOOPBACK, *config.names)
    if config.host not in hosts:
        hosts = (*hosts, ANY_ADDRESS if config.host in ("0.0.0.0", "::") else config.host)
    application = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts, access=access, seen=seen)],
        exception_handlers={kind: on_error for kind in (ApiError, StateOfGptError, HTTPException)},
        lifespan=lifespan,
    )
    application.state.running, application.state.shelf, application.state.metrics = running, shelf, metrics
    application.router.redirect_slashes = False  # an address is right or it is not
    return application


async def _file(name: str, kind: str, _: Request) -> Response:
    return Response(resources.files("stateofgpt.serve").joinpath("ui", name).read_bytes(), media_type=kind)
