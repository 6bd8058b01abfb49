"""`POST /v1/completions`: texts or token ids continued, echoed and scored. Stores nothing."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stateofgpt.errors import ModelError
from stateofgpt.infer.engine import Event
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.serve import protocol
from stateofgpt.serve.fields import ApiError
from stateofgpt.serve.loader import ContextTooLong, LoadedAssistant
from stateofgpt.serve.openai.chat import BrokenAnswer, deltas, heard_out
from stateofgpt.serve.openai.requests import CompletionRequest, parse_text
from stateofgpt.serve.openai.shapes import Choice, TextShapes, usage
from stateofgpt.serve.service import Job, Service, Source, apart, tenant_of
from stateofgpt.serve.streams import EventStream


@dataclass(frozen=True)
class Prompt:
    """One prompt: the ids that are continued, how many of the first are not the client's, its text, and its events
    where they are to be shown."""

    ids: tuple[int, ...]
    added: int
    text: str
    events: tuple[Event, ...] = ()


async def completions(service: Service, request: Request) -> Response:
    """The route."""
    body = await service.body(request)
    visit = service.enter(request, body)
    try:
        model: LoadedAssistant = visit.model
        asked = await apart(parse_text, body, model.vocab_size, service.defaults)
        prompts = await apart(_read, model, asked)
        if asked.echo and asked.asked.logprobs:
            async with service.forwards:
                prompts = await apart(_scored, model, asked, prompts)
        shapes = _shapes(model, asked)
        sources = [] if asked.only_echo else _sources(model, asked, prompts, tenant_of(request))
        most = sum(len(one.ids) + asked.asked.n * asked.asked.params.max_tokens for one in prompts)
        if not sources:
            visit.end()
            return _whole(shapes, asked, prompts, [])
        job = service.begin(request, visit, sources, most)
    except BaseException:
        visit.end()
        raise
    choices = [Choice(asked.asked.stop) for _ in sources]
    if asked.asked.stream:
        frames = _streamed(job, choices, shapes, asked, prompts)
        return EventStream(frames, job.stop)
    failed = await heard_out(job, choices, request)
    return failed or _whole(shapes, asked, prompts, choices)


def _shapes(model: LoadedAssistant, asked: CompletionRequest) -> TextShapes:
    known = uuid.uuid4().hex, model.name, model.id, model.tokenizer
    return TextShapes(*known, asked.asked.logprobs, asked.asked.include_usage)


def _read(model: LoadedAssistant, asked: CompletionRequest) -> list[Prompt]:
    """Every prompt as ids that the model can go on from."""
    found = []
    for given in asked.prompts:
        text = given if isinstance(given, str) else model.tokenizer.decode(given, skip_special=False)
        ids = [model.tokenizer.eot, *model.tokenizer.encode(given)] if isinstance(given, str) else list(given)
        try:
            model.check(ids, room=0 if asked.only_echo else 1)
        except ContextTooLong as error:
            raise ApiError(400, str(error), param="prompt", code="context_length_exceeded") from error
        except ModelError as error:
            raise ApiError(400, str(error), param="prompt") from error
        found.append(Prompt(tuple(ids), int(isinstance(given, str)), text))
    return found


def _scored(model: LoadedAssistant, asked: CompletionRequest, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with the probabilities of their tokens."""
    found = []
    for prompt in prompts:
        scored = model.scored(prompt.ids, asked.asked.params.top_logprobs)
        first = [] if prompt.added else [Event(0, prompt.ids[0], math.nan, None)]
        found.append(replace(prompt, events=(*first, *scored)))
    return found


def _sources(model: LoadedAssistant, asked: CompletionRequest, prompts: Sequence[Prompt], tenant: str) -> list[Source]:
    def source(prompt: Prompt, params: SamplingParams) -> Source:
        return lambda stop: model.continued(prompt.ids, params, stop, tenant)

    return [source(prompt, params) for prompt in prompts for params in asked.asked.choices()]


def _counted(prompts: Sequence[Prompt], choices: Sequence[Choice]) -> dict[str, int]:
    return usage(sum(len(prompt.ids) for prompt in prompts), choices)


def _whole(
    shapes: TextShapes, asked: CompletionRequest, prompts: Sequence[Prompt], choices: Sequence[Choice]
) -> Response:
    found = []
    for index in range(len(prompts) * asked.asked.n):
        prompt = prompts[index // asked.asked.n]
        before, events = (prompt.text, prompt.events) if asked.echo else ("", ())
        if not choices:
            found.append(shapes.choice(index, before, events, 0, "length"))
            continue
        choice = choices[index]
        found.append(shapes.choice(index, before + choice.text, (*events, *choice.events), 0, choice.finish))
    return JSONResponse(shapes.whole(found, _counted(prompts, choices)))


async def _streamed(
    job: Job, choices: list[Choice], shapes: TextShapes, asked: CompletionRequest, prompts: Sequence[Prompt]
) -> AsyncIterator[bytes]:
    written = [0] * len(choices)
    if asked.echo:
        for index in range(len(choices)):
            prompt = prompts[index // asked.asked.n]
            written[index] = len(prompt.text)
            yield protocol.frame(shapes.chunk(shapes.choice(index, prompt.text, prompt.events)))
    try:
        async for index, delta in deltas(job, choices):
            choice = shapes.choice(index, delta.text, delta.drawn, written[index], delta.finish)
            written[index] += len(delta.text)
            yield protocol.frame(shapes.chunk(choice))
    except BrokenAnswer as error:
        yield protocol.frame(protocol.error_body(str(error), 500))
        return
    if shapes.include_usage:
        yield protocol.frame({**shapes.head(), "choices": [], "usage": _counted(prompts, choices)})
    yield protocol.frame("[DONE]")
