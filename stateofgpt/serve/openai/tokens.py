"""Texts as vectors and as tokens: `/v1/embeddings`, `/tokenize`, `/detokenize`, `/tokenizer_info`."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stateofgpt.errors import ModelError, StateOfGptError
from stateofgpt.serve.fields import ApiError, flag, integer
from stateofgpt.serve.loader import ContextTooLong, LoadedAssistant
from stateofgpt.serve.openai.requests import messages, prompt_list
from stateofgpt.serve.service import Service, apart

MAX_TOKENS_SHOWN = 100_000


async def embeddings(service: Service, request: Request) -> Response:
    """Vectors of length 1: the mean of the model's last hidden states."""
    body = await service.body(request)
    visit = service.enter(request, body)
    tokens = 0
    try:
        model: LoadedAssistant = visit.model
        coding = body.get("encoding_format", "float")
        if coding not in ("float", "base64", None):
            raise ApiError(400, "encoding_format must be float or base64", param="encoding_format")
        size = integer(body, "dimensions", 0, 1, 1_000_000)
        sequences = await apart(_sequences, model, body)
        tokens = sum(map(len, sequences))
        visit.grant.take(tokens)
        async with service.forwards:
            vectors = await apart(model.embedded, sequences)
    finally:
        visit.end(tokens)
    if size > len(vectors[0]):
        raise ApiError(400, f"dimensions is {size}: the vectors have {len(vectors[0])}", param="dimensions")
    shown = [_shortened(vector, size) if size else vector for vector in vectors]
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if coding == "base64" else vector}
        for index, vector in enumerate(shown)
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": used})


def _sequences(model: LoadedAssistant, body: Mapping[str, Any]) -> list[list[int]]:
    found = []
    for given in prompt_list(body.get("input"), "input"):
        ids = [model.tokenizer.eot, *model.tokenizer.encode(given)] if isinstance(given, str) else list(given)
        try:
            found.append(model.check(ids, room=0))
        except ContextTooLong as error:
            raise ApiError(400, str(error), param="input", code="context_length_exceeded") from error
        except ModelError as error:
            raise ApiError(400, str(error), param="input") from error
    return found


def _shortened(vector: list[float], size: int) -> list[float]:
    """The first numbers, of length 1 again."""
    kept = vector[:size]
    length = math.sqrt(sum(one * one for one in kept)) or 1.0
    return [one / length for one in kept]


def _packed(vector: list[float]) -> str:
    """Little-endian float32 in base64, as OpenAI's clients read it."""
    import numpy as np

    return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()


async def tokenize(service: Service, request: Request) -> Response:
    """The ids of a `prompt`, or of `messages` as the model reads them."""
    body = await service.body(request)
    visit = service.enter(request, body)
    try:
        model: LoadedAssistant = visit.model
        ids = await apart(_ids, model, body)
        shown = [model.tokenizer.token_str(token) for token in ids] if flag(body, "return_token_strs") else None
    finally:
        visit.end()
    known = {"count": len(ids), "max_model_len": model.max_context, "tokens": ids}
    return JSONResponse({**known, "token_strs": shown})


def _ids(model: LoadedAssistant, body: Mapping[str, Any]) -> list[int]:
    if body.get("messages") is not None:
        add = flag(body, "add_generation_prompt", True)
        try:
            return model.chat.render(messages(body["messages"]), add_generation_prompt=add).ids
        except StateOfGptError as error:
            raise ApiError(400, str(error), param="messages") from error
    (given, *rest) = prompt_list(body.get("prompt"), "prompt")
    if rest or not isinstance(given, str):
        raise ApiError(400, "prompt must be one string", param="prompt")
    begins = [model.tokenizer.eot] if flag(body, "add_special_tokens", True) else []
    return [*begins, *model.tokenizer.encode(given)]


async def detokenize(service: Service, request: Request) -> Response:
    """The text of `tokens`, special tokens by their names."""
    body = await service.body(request)
    visit = service.enter(request, body)
    try:
        model: LoadedAssistant = visit.model
        found = body.get("tokens")
        if found != []:
            (ids, *rest) = prompt_list(found, "tokens")
            if rest or isinstance(ids, str) or len(ids) > MAX_TOKENS_SHOWN:
                raise ApiError(400, f"tokens must be a list of at most {MAX_TOKENS_SHOWN} ids", param="tokens")
            if not 0 <= min(ids) <= max(ids) < model.vocab_size:
                raise ApiError(400, f"tokens must be ids from 0 to {model.vocab_size - 1}", param="tokens")
            found = list(ids)
        text = model.tokenizer.decode(found, skip_special=False)
    finally:
        visit.end()
    return JSONResponse({"prompt": text})


async def tokenizer_info(service: Service, request: Request) -> Response:
    """What a harness asks of a tokenizer."""
    visit = service.enter(request, request.query_params)
    try:
        model: LoadedAssistant = visit.model
        names = model.tokenizer.specials
        end, begin = names.get(model.chat.end), names.get(model.tokenizer.eot)
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": begin,
                "eos_token": end,
                "pad_token": names.get(model.tokenizer.pad),
                "vocab_size": model.vocab_size,
                "model_max_length": model.max_context,
                "chat_template": model.chat.template,
            }
        )
    finally:
        visit.end()
