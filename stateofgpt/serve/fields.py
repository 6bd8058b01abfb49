"""What a request's fields may hold: one declaration each, from which a value is read and its JSON schema is written.

Owns every limit on input, and the error that names the field. Pure functions of data: knows nothing of routes, threads
or models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_BODY_BYTES = 1_000_000
MAX_MESSAGE_CHARS = 16_000
MAX_MESSAGES = 1_000
MAX_TOKENS = 4_096
MAX_STOPS = 4
MAX_STOP_CHARS = 200
MAX_CHOICES = 8  # answers to one request
MAX_BIASED = 1_024  # tokens of one logit_bias
MAX_TOP_LOGPROBS = 20
MAX_DEPTH = 64  # of nested JSON in a schema or a tool


class ApiError(Exception):
    """A request that cannot be answered: HTTP status, one sentence for whoever sent it, and how long to wait."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s


def parse_body(raw: bytes) -> dict[str, Any]:
    """A JSON object; ApiError 400 for anything else."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON: send a UTF-8 JSON object") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(name)


def text(body: Mapping[str, Any], name: str, *, limit: int = MAX_MESSAGE_CHARS, default: str | None = None) -> str:
    """A string field of at most `limit` characters; without `default` it must be there and not blank."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ApiError(400, f"{name} must be a string", param=name)
    if default is None and not value.strip():
        raise ApiError(400, f"{name} is empty: write something", param=name)
    if len(value) > limit:
        raise ApiError(413, f"{name} has {len(value)} characters: {limit} is the limit, so shorten it", param=name)
    return value.encode("utf-8", "replace").decode("utf-8").replace("\x00", "")


def identifier(body: Mapping[str, Any], name: str, *, optional: bool = False) -> str | None:
    """The id of something stored."""
    value = body.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= 80 or not value.isprintable():
        raise ApiError(400, f"{name} must be an id of 1 to 80 characters", param=name)
    return value


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return value


def number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}", param=name)
    if not math.isfinite(value):
        raise ApiError(400, f"{name} must be finite", param=name)
    return value


def integer(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a whole number from {low} to {high}", param=name)
    return value


def mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object, empty where there is none."""
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, f"{name} must be an object", param=name)
    return value or {}


def strings(body: Mapping[str, Any], name: str = "stop", *, most: int = MAX_STOPS) -> tuple[str, ...]:
    """A string or a few of them, none empty."""
    value = body.get(name)
    found = [] if value is None else [value] if isinstance(value, str) else value
    usable = isinstance(found, list) and len(found) <= most
    if not usable or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARS for one in found):
        raise ApiError(400, f"{name} must be a string or a list of at most {most} strings", param=name)
    return tuple(found)


def biases(body: Mapping[str, Any], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """`logit_bias`: what is added to the logits of some tokens."""
    name = "logit_bias"
    given = mapping(body, name)
    if len(given) > MAX_BIASED:
        raise ApiError(400, f"{name} has {len(given)} tokens: {MAX_BIASED} is the limit", param=name)
    found: dict[int, float] = {}
    for key, value in given.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token < vocab_size:
            raise ApiError(400, f"{name} names token {str(key)[:20]!r}: ids are 0 to {vocab_size - 1}", param=name)
        found[token] = number({name: value}, name, 0.0, -100.0, 100.0)
    return tuple(sorted(found.items()))


def shallow(value: object, name: str, *, limit: int, depth: int = MAX_DEPTH) -> None:
    """ApiError where JSON is larger than `limit` characters or nested deeper than `depth`; never recursive itself."""
    level: list[object] = [value]
    for _ in range(depth):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            break
    else:
        raise ApiError(400, f"{name} is nested deeper than {depth} levels: make it flatter", param=name)
    size = len(json.dumps(value))
    if size > limit:
        raise ApiError(400, f"{name} has {size} characters as JSON: {limit} is the limit", param=name)


@dataclass(frozen=True)
class Number:
    """A field that holds a number within bounds."""

    name: str
    low: float
    high: float
    about: str = ""

    def read(self, body: Mapping[str, Any], default: float) -> float:
        return number(body, self.name, default, self.low, self.high)

    def schema(self) -> dict[str, Any]:
        bounds = {"minimum": self.low, "maximum": self.high}
        return {"type": ["number", "null"], **bounds, "description": self.about}


@dataclass(frozen=True)
class Integer:
    """A field that holds a whole number within bounds."""

    name: str
    low: int
    high: int
    about: str = ""

    def read(self, body: Mapping[str, Any], default: int) -> int:
        return integer(body, self.name, default, self.low, self.high)

    def schema(self) -> dict[str, Any]:
        bounds = {"minimum": self.low, "maximum": self.high}
        return {"type": ["integer", "null"], **bounds, "description": self.about}


TEMPERATURE = Number("temperature", 0.0, 2.0, "0 is greedy")
TOP_P = Number("top_p", 1e-6, 1.0, "share of the probability that is drawn from")
TOP_K = Integer("top_k", 0, 1_000_000, "how many tokens are drawn from; 0 is all")
MIN_P = Number("min_p", 0.0, 1.0, "least probability, relative to the likeliest token's")
REPETITION = Number("repetition_penalty", 0.01, 10.0, "above 1 makes tokens that were there less likely")
PRESENCE = Number("presence_penalty", -2.0, 2.0, "taken from the logit of a token that was drawn")
FREQUENCY = Number("frequency_penalty", -2.0, 2.0, "taken from a logit for every time its token was drawn")
SEED = Integer("seed", -(2**63), 2**63 - 1, "the same seed gives the same answer; by chance where there is none")
CHOICES = Integer("n", 1, MAX_CHOICES, "how many answers")
LENGTH = Integer("max_tokens", 1, MAX_TOKENS, "the most tokens of an answer")
SAMPLING: tuple[Number | Integer, ...] = (TEMPERATURE, TOP_P, TOP_K, MIN_P, REPETITION, PRESENCE, FREQUENCY, SEED)
