"""The OpenAPI document of the server, made from the same declarations that requests are read with.

Owns the description of addresses and bodies. Knows nothing of how they are answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stateofgpt import __version__
from stateofgpt.serve import fields
from stateofgpt.text.messages import ROLES

_TEXT = {"type": "string"}
_BOOLEAN = {"type": ["boolean", "null"]}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_INPUT = {
    "oneOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        _IDS,
        {"type": "array", "minItems": 1, "items": _IDS},
    ]
}
_STOP = {
    "oneOf": [
        {"type": "null"},
        {"type": "string", "minLength": 1, "maxLength": fields.MAX_STOP_CHARS},
        {"type": "array", "maxItems": fields.MAX_STOPS, "items": {"type": "string", "minLength": 1}},
    ]
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": [*ROLES, "developer"]},
        "content": {"type": ["string", "null"], "maxLength": fields.MAX_MESSAGE_CHARS},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": _TEXT,
    },
}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": _TEXT, "description": _TEXT, "parameters": {"type": "object"}},
}
_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
}
_CHOICE = {"oneOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]}
_FORMAT = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": {"type": "object"}},
}
_STREAMED = {
    "stream": _BOOLEAN,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _BOOLEAN}},
}


def _sampled(length: str) -> dict[str, Any]:
    found = {one.name: one.schema() for one in (*fields.SAMPLING, fields.CHOICES)}
    bias = {"type": "number", "minimum": -100, "maximum": 100}
    return {
        "model": {"type": ["string", "null"]},
        **found,
        length: fields.LENGTH.schema(),
        "stop": _STOP,
        "logit_bias": {"type": ["object", "null"], "additionalProperties": bias},
        **_STREAMED,
    }


def _bodies() -> dict[str, dict[str, Any]]:
    """The request of each POST: required fields, and all."""
    top = {"type": ["integer", "null"], "minimum": 0, "maximum": fields.MAX_TOP_LOGPROBS}
    chat = {
        "messages": {"type": "array", "minItems": 1, "maxItems": fields.MAX_MESSAGES, "items": _MESSAGE},
        **_sampled("max_tokens"),
        "max_completion_tokens": fields.LENGTH.schema(),
        "logprobs": _BOOLEAN,
        "top_logprobs": top,
        "tools": {"type": "array", "items": _TOOL},
        "tool_choice": _CHOICE,
        "parallel_tool_calls": _BOOLEAN,
        "response_format": _FORMAT,
    }
    text = {"prompt": _INPUT, **_sampled("max_tokens"), "logprobs": top, "echo": _BOOLEAN}
    response = {
        "input": {"oneOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "object"}}]},
        "instructions": {"type": ["string", "null"]},
        "max_output_tokens": fields.LENGTH.schema(),
        **{one.name: one.schema() for one in fields.SAMPLING},
        "model": {"type": ["string", "null"]},
        "tools": {"type": "array", "items": _FUNCTION},
        "tool_choice": _CHOICE,
        "text": {"type": "object", "properties": {"format": _FORMAT}},
        "stream": _BOOLEAN,
    }
    vectors = {
        "input": _INPUT,
        "model": {"type": ["string", "null"]},
        "encoding_format": {"enum": ["float", "base64"]},
        "dimensions": {"type": ["integer", "null"], "minimum": 1},
    }
    shown = {"prompt": _TEXT, "messages": {"type": "array", "items": _MESSAGE}, "add_special_tokens": _BOOLEAN}
    return {
        "/v1/chat/completions": _object(chat, "messages"),
        "/v1/completions": _object(text, "prompt"),
        "/v1/responses": _object(response, "input"),
        "/v1/embeddings": _object(vectors, "input"),
        "/tokenize": _object(shown),
        "/detokenize": _object({"tokens": _IDS}, "tokens"),
        "/admin/reload": _object({"model": {"type": ["string", "null"]}}),
    }


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), **({"required": list(required)} if required else {})}


ABOUT = {
    "/v1/chat/completions": "Answer a conversation.",
    "/v1/completions": "Continue texts or token ids; with echo, score them.",
    "/v1/responses": "Answer an input, without keeping it.",
    "/v1/embeddings": "Texts as vectors.",
    "/tokenize": "A text or a conversation as token ids.",
    "/detokenize": "Token ids as text.",
    "/admin/reload": "Exchange a model for what its folder holds now.",
    "/v1/models": "The models of this server.",
    "/v1/models/{id}": "One of them.",
    "/tokenizer_info": "Special tokens and chat template.",
    "/health": "Alive: the process answers, and every engine runs.",
    "/ready": "Ready for work.",
    "/version": "The version of the program.",
    "/metrics": "Counters, in Prometheus' text format.",
    "/openapi.json": "This document.",
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    bodies = _bodies()
    error = {"description": "What is wrong, in one sentence.", "content": {"application/json": {"schema": _ERROR}}}
    answers = {"200": {"description": "The answer."}, "default": error}
    paths: dict[str, Any] = {}
    for path, about in ABOUT.items():
        operation: dict[str, Any] = {"summary": about, "responses": answers}
        if "{id}" in path:
            operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": _TEXT}]
        if path in bodies:
            content = {"application/json": {"schema": bodies[path]}}
            operation["requestBody"] = {"required": True, "content": content}
        paths[path] = {"post" if path in bodies else "get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "stateofgpt", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
