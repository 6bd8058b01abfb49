"""What OpenAI's requests ask for, read into what the engine understands.

Owns the reading of chat completions and completions, tools and response formats among them; unknown fields are
ignored, as OpenAI does, and known ones that this server cannot obey are refused by name. Pure functions of data.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from stateofgpt.assistant.offer import Offer, Tool
from stateofgpt.errors import StateOfGptError
from stateofgpt.infer.guide import Constraint
from stateofgpt.infer.sampling import SamplingParams, derive_seed
from stateofgpt.serve import fields
from stateofgpt.serve.fields import ApiError, flag, integer, mapping, strings
from stateofgpt.text.chat import Conversation, message_from_json

MAX_TOOLS = 128
MAX_SCHEMA_CHARS = 65_536
MAX_PROMPTS = 64
MAX_PROMPT_CHARS = 400_000
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
REFUSED = {  # what would change the answer, and is not done here
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "there is no sound here",
    "suffix": "there is no filling in here",
    "prediction": "leave it out",
    "web_search_options": "there is no web here",
}


@dataclass(frozen=True)
class Asked:
    """What every request for text has. `offer` None: the assistant may use its own tools."""

    params: SamplingParams
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    offer: Offer | None = None

    def choices(self) -> list[SamplingParams]:
        """The parameters of each answer; the first has the seed as it is."""
        seed = self.params.seed
        return [replace(self.params, seed=derive_seed(seed, i) if i else seed) for i in range(self.n)]


@dataclass(frozen=True)
class ChatRequest:
    """A `POST /v1/chat/completions`."""

    conversation: Conversation
    asked: Asked


@dataclass(frozen=True)
class CompletionRequest:
    """A `POST /v1/completions`: texts, or token ids. `only_echo`: with `max_tokens` 0 nothing is written."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    only_echo: bool
    asked: Asked


def parse_chat(body: Mapping[str, Any], vocab_size: int, defaults: SamplingParams) -> ChatRequest:
    """Read a chat completion. ApiError names the field that cannot be used."""
    refuse_unsupported(body)
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    logprobs = flag(body, "logprobs")
    top = integer(body, "top_logprobs", 0, 0, fields.MAX_TOP_LOGPROBS)
    if top and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    params = sampling(body, vocab_size, defaults, length=limit)
    offer = offered(body.get("tools"), body.get("tool_choice"), flag(body, "parallel_tool_calls", True))
    constraint = response_format(body.get("response_format"), "response_format")
    asked = Asked(
        params=replace(params, top_logprobs=top, constraint=constraint),
        n=fields.CHOICES.read(body, 1),
        stop=strings(body),
        stream=flag(body, "stream"),
        include_usage=flag(mapping(body, "stream_options"), "include_usage"),
        logprobs=logprobs,
        offer=without_calls(offer, "response_format") if constraint else offer,
    )
    return ChatRequest(messages(body.get("messages")), asked)


def without_calls(offer: Offer | None, name: str) -> Offer:
    """What is left of an offer where the whole answer must have a format."""
    if offer is not None and offer.choice == "required":
        raise ApiError(400, f"a call is required, so {name} cannot be kept: leave one out", param=name)
    return replace(offer, choice="none") if offer else Offer(choice="none")


def parse_text(body: Mapping[str, Any], vocab_size: int, defaults: SamplingParams) -> CompletionRequest:
    """Read a completion. ApiError names the field that cannot be used."""
    refuse_unsupported(body)
    prompts = prompt_list(body.get("prompt"), "prompt")
    n = fields.CHOICES.read(body, 1)
    if integer(body, "best_of", n, 1, fields.MAX_CHOICES) != n:
        raise ApiError(400, "best_of must be n: all answers are returned here", param="best_of")
    if n * len(prompts) > MAX_PROMPTS:
        raise ApiError(400, f"n times the prompts is {n * len(prompts)}: {MAX_PROMPTS} is the limit", param="n")
    top = integer(body, "logprobs", -1, 0, fields.MAX_TOP_LOGPROBS)
    echo = flag(body, "echo")
    params = sampling(body, vocab_size, defaults, least=0 if echo else 1)
    asked = Asked(
        params=replace(params, top_logprobs=max(top, 0)),
        n=n,
        stop=strings(body),
        stream=flag(body, "stream"),
        include_usage=flag(mapping(body, "stream_options"), "include_usage"),
        logprobs=top >= 0,
    )
    return CompletionRequest(prompts, echo, body.get("max_tokens") == 0, asked)


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    for name, instead in REFUSED.items():
        if body.get(name):
            raise ApiError(400, f"{name} is not supported by this server: {instead}", param=name)


def sampling(
    body: Mapping[str, Any], vocab_size: int, defaults: SamplingParams, *, length: str = "max_tokens", least: int = 1
) -> SamplingParams:
    """The parameters of sampling. Where no seed is given one is drawn, so that two answers differ."""
    return replace(
        defaults,
        max_tokens=max(1, integer(body, length, defaults.max_tokens, least, fields.MAX_TOKENS)),
        temperature=fields.TEMPERATURE.read(body, defaults.temperature),
        top_k=int(fields.TOP_K.read(body, defaults.top_k)),
        top_p=fields.TOP_P.read(body, defaults.top_p),
        min_p=fields.MIN_P.read(body, defaults.min_p),
        repetition_penalty=fields.REPETITION.read(body, 1.0),
        presence_penalty=fields.PRESENCE.read(body, 0.0),
        frequency_penalty=fields.FREQUENCY.read(body, 0.0),
        logit_bias=fields.biases(body, vocab_size),
        seed=fields.SEED.read(body, secrets.randbits(63)) & (2**63 - 1),
    )


# -- messages and prompts --------------------------------------------------------------------------------------------


def messages(given: Any, name: str = "messages") -> Conversation:
    """A conversation that an answer can follow."""
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"{name} must be a list with at least one message", param=name)
    if len(given) > fields.MAX_MESSAGES:
        raise ApiError(413, f"{name} has {len(given)} entries: {fields.MAX_MESSAGES} is the limit", param=name)
    conversation = []
    for position, given_message in enumerate(given):
        where = f"{name}[{position}]"
        try:
            message = message_from_json(given_message)
        except StateOfGptError as error:
            raise ApiError(400, f"{where} cannot be used: {error}", param=where) from error
        conversation.append(replace(message, content=fields.text({where: message.content}, where, default="")))
    if conversation[-1].role not in ("user", "tool"):
        raise ApiError(400, "the last message must be the user's or a tool's", param=name)
    return tuple(conversation)


def prompt_list(given: Any, name: str) -> tuple[str | tuple[int, ...], ...]:
    """A text, token ids, or a list of either."""
    wrong = f"{name} must be a string, a list of strings, a list of token ids, or a list of such lists"
    if isinstance(given, str):
        return (_clean(given, name),)
    if not isinstance(given, list) or not given:
        raise ApiError(400, wrong, param=name)
    if all(_is_id(one) for one in given):
        return (tuple(given),)
    if len(given) > MAX_PROMPTS:
        raise ApiError(400, f"{name} has {len(given)} entries: {MAX_PROMPTS} is the limit", param=name)
    found: list[str | tuple[int, ...]] = []
    for one in given:
        if isinstance(one, str):
            found.append(_clean(one, name))
        elif isinstance(one, list) and one and all(_is_id(token) for token in one):
            found.append(tuple(one))
        else:
            raise ApiError(400, wrong, param=name)
    return tuple(found)


def _clean(text: str, name: str) -> str:
    return fields.text({name: text}, name, limit=MAX_PROMPT_CHARS, default="")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# -- tools and formats -----------------------------------------------------------------------------------------------


def offered(tools: Any, choice: Any, parallel: bool) -> Offer | None:
    """The client's tools, each `{"type": "function", "function": {...}}` or, as the Responses API writes it, flat."""
    if tools is None or tools == []:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return Offer(choice="none") if choice == "none" else None
    if not isinstance(tools, list):
        raise ApiError(400, "tools must be a list", param="tools")
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"tools has {len(tools)} entries: {MAX_TOOLS} is the limit", param="tools")
    fields.shallow(tools, "tools", limit=MAX_SCHEMA_CHARS)
    known = tuple(_tool(tool, f"tools[{position}]") for position, tool in enumerate(tools))
    if len({tool.name for tool in known}) < len(known):
        raise ApiError(400, "two tools have the same name", param="tools")
    kinds: tuple[Literal["auto", "none", "required"], ...] = ("auto", "none", "required")
    for kind in kinds:
        if (choice or "auto") == kind:
            return Offer(known, kind, parallel)
    return Offer((_named(choice, known),), "required", parallel)


def _tool(given: Any, where: str) -> Tool:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind != "function":
        raise ApiError(400, f'{where} must be an object of type "function"', param=where)
    function = given.get("function", given)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ApiError(400, f"{where} needs a name of 1 to 64 letters, digits, _ and -", param=where)
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise ApiError(400, f"{where}: description must be a string", param=where)
    return Tool(name, description.replace("\x00", ""), mapping({where: function.get("parameters")}, where))


def _named(choice: Any, tools: tuple[Tool, ...]) -> Tool:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    for tool in tools:
        if tool.name == name:
            return tool
    raise ApiError(
        400, "tool_choice must be none, auto, required, or name a function of the request's tools", param="tool_choice"
    )


def response_format(given: Any, name: str) -> Constraint | None:
    """`text`, `json_object`, or `json_schema` with the schema beside its name (Responses) or within (chat)."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json", "")
    if kind != "json_schema":
        raise ApiError(400, f"{name} must be of type text, json_object or json_schema", param=name)
    described = given.get("json_schema", given)
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(400, f"{name} of type json_schema needs a schema, a JSON object", param=name)
    fields.shallow(schema, name, limit=MAX_SCHEMA_CHARS)
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))
