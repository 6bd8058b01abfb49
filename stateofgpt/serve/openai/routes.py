"""The addresses of OpenAI's API, and of what belongs to a server of models: health, metrics, reloading.

Owns which handler answers where. `DOCUMENT` at `/openapi.json` describes the same addresses.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stateofgpt import __version__
from stateofgpt.serve.fields import ApiError
from stateofgpt.serve.metrics import CONTENT_TYPE
from stateofgpt.serve.openai.chat import chat
from stateofgpt.serve.openai.document import document
from stateofgpt.serve.openai.responses import responses
from stateofgpt.serve.openai.text import completions
from stateofgpt.serve.openai.tokens import detokenize, embeddings, tokenize, tokenizer_info
from stateofgpt.serve.service import Service, apart
from stateofgpt.serve.shelf import Held

Handler = Callable[[Service, Request], Awaitable[Response]]
POSTS: dict[str, Handler] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/embeddings": embeddings,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}


def openai_routes(service: Service) -> list[Route]:
    """All of them."""
    gets: dict[str, Handler] = {
        "/v1/models": models,
        "/v1/models/{id:path}": one_model,
        "/tokenizer_info": tokenizer_info,
        "/health": health,
        "/ready": ready,
        "/version": version,
        "/metrics": metrics,
        "/openapi.json": described,
    }
    found = [Route(path, _with(handler, service)) for path, handler in gets.items()]
    found += [Route(path, _with(handler, service), methods=["POST"]) for path, handler in POSTS.items()]
    return [*found, Route("/admin/reload", _with(reload, service), methods=["POST"])]


def _with(handler: Handler, service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await handler(service, request)

    return functools.wraps(handler)(answer)


async def models(service: Service, _: Request) -> Response:
    """What is served here, the default first."""
    data = [_shown(name, held) for name, held in service.shelf.models.items()]
    return JSONResponse({"object": "list", "data": data})


async def one_model(service: Service, request: Request) -> Response:
    name = request.path_params["id"]
    held = service.shelf.models.get(name)
    if held is None:
        raise ApiError(404, f"there is no model {name[:80]!r} here", param="model", code="model_not_found")
    return JSONResponse(_shown(name, held))


def _shown(name: str, held: Held) -> dict[str, Any]:
    known = {"id": name, "object": "model", "created": held.loaded, "owned_by": "stateofgpt"}
    model = held.assistant
    about = {"checkpoint": getattr(model, "id", None), "max_model_len": getattr(model, "max_context", None)}
    return {**known, **about, "lineage": list(model.lineage)}


async def health(service: Service, _: Request) -> Response:
    """Alive: the process answers, and every model's engine runs."""
    failed, hung = service.shelf.failed, service.shelf.hung
    if not failed:
        return JSONResponse({"status": "ok", "devices": service.shelf.devices})
    return JSONResponse({"status": "failed", "failed": failed, **({"reason": hung} if hung else {})}, 503)


async def ready(service: Service, _: Request) -> Response:
    """Ready for work: every model's engine runs, and the server is not about to stop."""
    dead = service.shelf.failed
    stopping = service.running.draining
    status = "stopping" if stopping else "failed" if dead else "ready"
    known = {"status": status, "models": list(service.shelf.models), "failed": dead}
    return JSONResponse({**known, "answers_running": len(service.running)}, 503 if dead or stopping else 200)


async def version(service: Service, _: Request) -> Response:
    return JSONResponse({"version": __version__})


async def metrics(service: Service, _: Request) -> Response:
    """Prometheus' text format."""
    return Response(await apart(service.metrics.text), media_type=CONTENT_TYPE)


async def described(service: Service, _: Request) -> Response:
    return JSONResponse(document())


async def reload(service: Service, request: Request) -> Response:
    """Read a model's folder again; with no `model`, those of all."""
    body = await service.body(request)
    name = body.get("model")
    if name is not None and not isinstance(name, str):
        raise ApiError(400, "model must be a string", param="model")
    names = list(service.shelf.models) if name is None else [name]
    return JSONResponse({"reloaded": [await apart(service.shelf.reload, name) for name in names]})
