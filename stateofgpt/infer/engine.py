"""The engine: many requests, one batch, one token each per step.

Owns: the steps, and what is drawn in them. Who takes part in a step is `infer.schedule`'s, what is computed a decoder's
(`infer.forward`, or `infer.decode` where that is not possible). Knows nothing of text, threads or the reason somebody
wants tokens.

A request always has exactly one token that was drawn (or given) but not read yet, so a step is the same for all: read
one token, draw one token. A prompt is read up to its last token before the first draw.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, overload

import torch

from stateofgpt.errors import ConfigError, ModelError
from stateofgpt.infer import score
from stateofgpt.infer.blocks import Blocks
from stateofgpt.infer.cache import how_many
from stateofgpt.infer.decoders import CachePrecision, Precision, make_decoder
from stateofgpt.infer.draw import Drawn, Draws
from stateofgpt.infer.grammar import Constraint
from stateofgpt.infer.guide import Guide
from stateofgpt.infer.request import Completion, Event, Finish, Request, check
from stateofgpt.infer.sampling import SamplingParams, derive_seed
from stateofgpt.infer.schedule import Schedule
from stateofgpt.infer.speculate import Lookup
from stateofgpt.model.gpt import GPT

__all__ = ["Completion", "Engine", "Event", "SamplingParams"]

SPECULATIVE_ROWS = 4  # in larger batches the products are busy enough without guesses


class Engine:
    """Batched sampling and scoring with one model, in one thread (see `infer.loop` for many).

    `max_batch` requests draw at once, further ones wait. `max_context` (the model's own by default) bounds prompt and
    answer together. Call `refresh()` after the model's weights have changed.

    Computed is where the model is. On the CPU `native` goes through `infer.forward` where the machine can, with weights
    in the precision `weights` and keys and values in that of `cache`; else torch computes in `dtype`, or in that of
    `weights`. By default all are float32 on the CPU and bfloat16 elsewhere. On a GPU steps are recorded (see
    `infer.capture`) unless `graphs` is false.

    With `prefixes` what was read is found again by later requests of the same tenant. `cache_bytes` bounds the cache
    (see `infer.cache`), `step_tokens` how many tokens of prompts are read in a step (by default all). `speculate` is
    how many tokens are guessed per step while the batch is small, on the native path and on other devices than the CPU.
    On the native path none of these four changes a bit of an answer. `guides` makes the guides of constrained requests.
    """

    def __init__(
        self,
        model: GPT,
        *,
        max_batch: int = 64,
        max_context: int | None = None,
        dtype: torch.dtype | None = None,
        native: bool = False,
        weights: Precision | None = None,
        cache: CachePrecision | None = None,
        prefixes: bool = False,
        cache_bytes: int | None = None,
        step_tokens: int | None = None,
        speculate: int = 0,
        guides: Callable[[Constraint], Guide] | None = None,
        graphs: bool = True,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("step_tokens", step_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, must be at least 1")
        config = model.config
        self.model, self.max_batch, self.guides, self.speculate = model, max_batch, guides, speculate
        self.max_context = min(max_context or config.max_position_embeddings, config.max_position_embeddings)
        self._decoder = make_decoder(model, dtype, native, weights, cache, self.max_context, graphs)
        decoder = self._decoder
        count = how_many(cache_bytes, decoder.block_bytes, max_batch, self.max_context, decoder.device)
        self._decoder.make_room(count)
        self._blocks = Blocks(count, keep=prefixes)
        self._schedule = Schedule(self._decoder, self._blocks, max_batch, step_tokens)
        self._numbers, self._arrivals = itertools.count(), itertools.count()
        self._requests: dict[int, Request] = {}  # all that are not forgotten: waiting, live or held
        self._draws = Draws()

    @property
    def native(self) -> bool:
        """Whether the native path is taken."""
        return self._decoder.exact

    @property
    def device(self) -> torch.device:
        """Where it computes: where its model was when it was made."""
        return self._decoder.device

    @property
    def most_tokens(self) -> int:
        """At most so many tokens are computed in a step."""
        prompts = self._schedule.step_tokens or self.max_batch * self.max_context
        return prompts + self.max_batch * (1 + self.speculate)

    # ---- requests -------------------------------------------------------------------------------------------------

    def new_id(self) -> int:
        """A number no request has had."""
        return next(self._numbers)

    def check(self, prompt: Sequence[int], params: SamplingParams | None = None) -> None:
        """Raise ModelError if `prompt` cannot be continued by this engine, or not with these `params`."""
        check(prompt, params, self.max_context, self.model.config.vocab_size)

    def guide(self, params: SamplingParams) -> Guide | None:
        """The guide of a constrained request; may take a second, and may be made in any thread."""
        if params.constraint is None:
            return None
        if self.guides is None:
            raise ModelError("this engine was made without guides, so it cannot keep an answer to a constraint")
        return self.guides(params.constraint)

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        hold: bool = False,
        request: int | None = None,
        tenant: str = "",
        guide: Guide | None = None,
    ) -> int:
        """Queue a prompt; returns the request's id (a new one, or `request` from `new_id`).

        With `hold` the request is kept when it finishes, until `extend` or `release`. What a request has read is found
        again only by requests of the same `tenant`. `guide` is what `guide(params)` returned, made now if it was not.
        """
        self.check(prompt, params)
        guide = guide or self.guide(params)
        number = self.new_id() if request is None else request
        new = Request(number, next(self._arrivals), list(prompt), params, hold, tenant, tuple(prompt[:-1]), guide)
        if params.presence_penalty or params.frequency_penalty:
            new.counts = Counter()
        if self.speculate and self._decoder.guesses and not params.adjusting:
            new.lookup = Lookup()
        self._requests[number] = new
        self._schedule.add(new)
        return number

    def extend(self, request: int, ids: Sequence[int]) -> None:
        """Append given `ids` to a finished request that was held, and let it draw on. Only the new ids are read.

        Its seed continues, and `max_tokens` counts all tokens it has drawn.
        """
        held = self._requests.get(request)
        if held is None or held.state != "held" or held.paused:
            raise ModelError(f"request {request} is not held, only a finished request with hold=True can be extended")
        self.check(held.ids + list(ids))
        if held.drawn >= held.params.max_tokens:
            raise ModelError(f"request {request} has drawn all its {held.params.max_tokens} tokens")
        held.ids.extend(ids)
        self._schedule.go_on(held)

    def cancel(self, request: int) -> None:
        """Forget a request, whatever its state; its room is free for the next step. Unknown ids are ignored."""
        if (found := self._requests.pop(request, None)) is not None:
            self._schedule.remove(found)

    release = cancel  # of a held request: give its room back

    def pause(self, request: int) -> None:
        """Draw nothing more for a request until `go_on`; others may take its room. The answer stays the same."""
        found = self._requests.get(request)
        if found is not None and found.state != "held":
            found.paused = True
            self._schedule.hold(found)

    def go_on(self, request: int) -> None:
        """End a pause. Requests that do not pause, or are unknown, are left as they are."""
        found = self._requests.get(request)
        if found is not None and found.paused:
            found.paused = False
            self._schedule.go_on(found)

    @property
    def idle(self) -> bool:
        """True when no request waits for a token. (Held requests wait for nothing.)"""
        return not self._schedule.busy

    def unfinished(self, request: int) -> bool:
        """True while `request` has tokens to come."""
        found = self._requests.get(request)
        return found is not None and (found.state != "held" or found.paused)

    def refresh(self) -> None:
        """Take over changed weights. Caches made with the old ones would be wrong, so nothing may be under way, and no
        prefix is kept."""
        if self._requests:
            raise ModelError(f"{len(self._requests)} requests are under way, weights can only change between requests")
        self._decoder.refresh()
        self._blocks.forget()

    # ---- a step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let every request that has read its prompt draw one token, or more where guesses were right; requests that
        wait join first. [] when there is nothing to do, or prompts are still being read."""
        live = self._schedule.prepare(1 + self.speculate)
        if not live:
            return []
        guesses = self._guesses(live) if self.speculate and len(live) <= SPECULATIVE_ROWS else None
        if guesses is not None and any(guesses):
            return self._draw_guessed(live, guesses)
        ids, places, tables = [r.ids[-1] for r in live], [r.target for r in live], [r.blocks for r in live]
        logits = self._decoder.decode(ids, places, tables)
        return [self._drew(r, drawn) for r, drawn in zip(live, self._draws(live, logits), strict=True)]

    def _guesses(self, live: Sequence[Request]) -> list[list[int]]:
        """For each request tokens that may follow, as many as there is room for."""
        found = []
        for r in live:
            room = min(self._schedule.room(r) - 1, self.max_context - len(r.ids))
            most = min(self.speculate, room, r.params.max_tokens - r.drawn - 1)
            found.append(r.lookup.guess(r.ids, most) if r.lookup is not None and most > 0 else [])
        return found

    def _draw_guessed(self, live: Sequence[Request], guesses: list[list[int]]) -> list[Event]:
        """Read the guesses too, and draw after each of them as if it had been drawn: what comes after the first that
        was not is thrown away. Every draw is the one that would have been made without guesses."""
        logits = self._decoder.verify(  # type: ignore[union-attr]  # only decoders that can are given guesses
            [r.last(guess) for r, guess in zip(live, guesses, strict=True)],
            [r.target for r in live],
            [r.blocks for r in live],
        )
        owners = [(r, i) for r, guess in zip(live, guesses, strict=True) for i in range(len(guess) + 1)]
        drawn = iter(self._draws([r for r, _ in owners], logits, [i for _, i in owners]))
        events: list[Event] = []
        for r, guess in zip(live, guesses, strict=True):
            going = True
            for wanted in (*guess, None):
                one = next(drawn)
                if going:
                    events.append(self._drew(r, one))
                    going = events[-1].finish is None and one.token == wanted
        return events

    def _drew(self, r: Request, drawn: Drawn) -> Event:
        """A token was drawn after the last one of `r`, which has been read."""
        token = drawn.token
        self._schedule.has_read(r, 1)
        r.ids.append(token)
        r.drawn += 1
        finish: Finish | None = None
        if token in r.params.stop_ids:
            finish = "stop"
        elif r.drawn >= r.params.max_tokens or len(r.ids) >= self.max_context:
            finish = "length"
        if r.counts is not None:
            r.counts[token] += 1
        if r.guide is not None and finish != "stop":
            r.guide.accept(token)
            r.mask = r.guide.mask()
            if r.guide.finished:
                finish = "stop"
            elif not r.mask.any():  # it has become too much for its limits
                finish = "length"
        if finish and r.hold:
            self._schedule.hold(r)
        elif finish:
            self.cancel(r.id)
        return Event(r.id, token, drawn.logprob, finish, drawn.top)

    # ---- whole jobs -----------------------------------------------------------------------------------------------

    def events(self, requests: Iterable[int]) -> Iterator[Event]:
        """Step until all `requests` are finished, yielding their events. One may be extended when its finish is
        seen."""
        wanted = set(requests)
        while any(self.unfinished(r) for r in wanted):
            yield from (e for e in self.step() if e.request in wanted)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *, tenant: str = ""
    ) -> Iterator[Event]:
        """Continue all prompts; `Event.request` is the index of the prompt. One `params` for all: row i draws with
        the seed derive_seed(params.seed, i), so that equal prompts differ; a list: each draws with its own seed as it
        is."""
        if isinstance(params, SamplingParams):
            params = [replace(params, seed=derive_seed(params.seed, i)) for i in range(len(prompts))]
        for prompt, one in zip(prompts, params, strict=True):
            self.check(prompt, one)
        index: dict[int, int] = {}
        try:
            for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                index[self.add(prompt, one, tenant=tenant)] = i
            for event in self.events(index):
                yield event._replace(request=index[event.request])
        finally:
            for request in index:
                self.cancel(request)

    def complete(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *, tenant: str = ""
    ) -> list[Completion]:
        """Continue all prompts to their ends (see `generate` for seeds)."""
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        ends: list[Finish] = ["length"] * len(prompts)
        for event in self.generate(prompts, params, tenant=tenant):
            ids[event.request].append(event.token)
            logprobs[event.request].append(event.logprob)
            ends[event.request] = event.finish or "length"
        return [Completion(*each) for each in zip(ids, logprobs, ends, strict=True)]

    @overload
    def score(  # type: ignore[overload-overlap]  # 0 is an int, too
        self, sequences: Sequence[Sequence[int]], top: Literal[0] = 0
    ) -> list[list[float]]: ...
    @overload
    def score(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[score.Scored]]: ...

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0) -> list[list[float]] | list[list[score.Scored]]:
        """Log-probability of each token after the first, by the model's own forward pass (see `infer.score`); with the
        `top` most likely tokens in its place where that is above 0."""
        return score.score(self.model, sequences) if top == 0 else score.score_with_top(self.model, sequences, top)

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each sequence the mean of its final hidden states, of length 1 (see `infer.score`)."""
        return score.embed(self.model, sequences)
