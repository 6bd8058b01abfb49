"""The engine: many requests, one batch, one token each per step.

Owns: requests and their life. A request waits, gets a row of the batch, draws one token per step and leaves when it
is done; its row is given to the next one at the next step (continuous batching). Rows that are live stand first, so
that a step touches nothing else. Knows nothing of text, threads or the reason somebody wants tokens.

A row always has exactly one token that was drawn (or given) but not read yet, so a step is the same for all rows:
read one token, draw one token. A prompt is read up to its last token when it joins; equal prompts are read once and
their cache copied.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from stateofgpt.errors import ModelError
from stateofgpt.infer.cache import KVCache
from stateofgpt.infer.decode import Decoder
from stateofgpt.infer.sampling import Sampler, SamplingParams, derive_seed
from stateofgpt.infer.score import score
from stateofgpt.model.gpt import GPT

Finish = Literal["stop", "length"]

_PREFILL_TOKENS = 4096  # read at once; bounds the memory of a prefill


class Event(NamedTuple):
    """One token of one request. `logprob` is that of the model itself: temperature 1, no filter."""

    request: int
    token: int
    logprob: float
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """All that was drawn for one prompt. `ids` ends with the stop id where `finish` is "stop"."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish


@dataclass(slots=True, eq=False)
class _Request:
    id: int
    ids: list[int]
    params: SamplingParams
    hold: bool
    prompt: tuple[int, ...]  # what is read when it joins: all of the prompt but its last token
    drawn: int = 0
    read: int = 0  # how many of `ids` are in the cache
    row: int | None = None
    live: bool = False


class Engine:
    """Batched sampling and scoring with one model, in one thread (see `infer.loop` for many).

    `max_batch` rows run at once, further requests wait. `max_context` (the model's own by default) bounds prompt and
    answer together. Call `refresh()` after the model's weights have changed. `dtype` is that of the weights, the
    cache and the products; log-probabilities are computed in float32 from the logits.
    """

    def __init__(
        self, model: GPT, *, max_batch: int = 64, max_context: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        config = model.config
        self.model, self.max_batch = model, max_batch
        self.max_context = min(max_context or config.max_position_embeddings, config.max_position_embeddings)
        self._decoder = Decoder(model, dtype, self.max_context)
        self._cache = KVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            max_rows=max_batch,
            max_length=self.max_context,
            dtype=dtype,
            device=self._decoder.device,
        )
        self._numbers = itertools.count()
        self._requests: dict[int, _Request] = {}  # all that are not forgotten: waiting, live or held
        self._waiting: deque[_Request] = deque()
        self._rows: list[_Request | None] = [None] * max_batch
        self._n_live = 0
        self._sampler: Sampler | None = None  # None: the set of live rows has changed

    # ---- requests -------------------------------------------------------------------------------------------------

    def new_id(self) -> int:
        """A number no request has had."""
        return next(self._numbers)

    def check(self, prompt: Sequence[int]) -> None:
        """Raise ModelError if `prompt` cannot be continued by this engine."""
        if not prompt:
            raise ModelError("the prompt is empty; give at least one token, for example <|endoftext|>")
        if len(prompt) > self.max_context - 1:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.max_context}, which leaves no room "
                "for an answer; shorten the prompt"
            )
        vocab = self.model.config.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ModelError(f"the prompt has a token id outside 0..{vocab - 1}; was it made by another tokenizer?")

    def add(
        self, prompt: Sequence[int], params: SamplingParams, *, hold: bool = False, request: int | None = None
    ) -> int:
        """Queue a prompt; returns the request's id (a new one, or `request` from `new_id`).

        With `hold` the request keeps its row and cache when it finishes, until `extend` or `release`.
        """
        self.check(prompt)
        number = self.new_id() if request is None else request
        new = _Request(number, list(prompt), params, hold, tuple(prompt[:-1]))
        self._requests[number] = new
        self._waiting.append(new)
        return number

    def extend(self, request: int, ids: Sequence[int]) -> None:
        """Append given `ids` to a finished request that was held, and let it draw on. Only the new ids are read.

        Its seed continues, and `max_tokens` counts all tokens it has drawn.
        """
        held = self._requests.get(request)
        if held is None or held.live or held.row is None:
            raise ModelError(f"request {request} is not held, only a finished request with hold=True can be extended")
        self.check(held.ids + list(ids))
        if held.drawn >= held.params.max_tokens:
            raise ModelError(f"request {request} has drawn all its {held.params.max_tokens} tokens")
        held.ids.extend(ids)
        held.live = True
        self._sampler = None

    def cancel(self, request: int) -> None:
        """Forget a request, whatever its state; its row is free for the next step. Unknown ids are ignored."""
        found = self._requests.pop(request, None)
        if found is None:
            return
        if found.row is None:
            self._waiting.remove(found)
        else:
            self._rows[found.row] = None
            self._sampler = None
        found.live = False

    release = cancel  # of a held request: give its row back

    @property
    def idle(self) -> bool:
        """True when no request waits for a token. (Held requests wait for nothing.)"""
        return not self._waiting and not any(r is not None and r.live for r in self._rows)

    @property
    def stuck(self) -> bool:
        """True when a step could do nothing: idle, or all rows are held while others wait."""
        return not any(r is not None and r.live for r in self._rows) and not (self._waiting and None in self._rows)

    def unfinished(self, request: int) -> bool:
        """True while `request` has tokens to come."""
        found = self._requests.get(request)
        return found is not None and (found.live or found.row is None)

    def refresh(self) -> None:
        """Take over changed weights. Caches made with the old ones would be wrong, so nothing may be under way."""
        if self._requests:
            raise ModelError(f"{len(self._requests)} requests are under way, weights can only change between requests")
        self._decoder.refresh()

    # ---- a step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let every live request draw one token; requests that wait join first. [] when there is nothing to do."""
        self._join()
        live = [r for r in self._rows[: self._n_live] if r is not None]
        if not live:
            return []
        positions = [len(r.ids) - 1 for r in live]
        longest = max(positions) + 1
        self._cache.reserve(len(live), longest)
        ids = torch.tensor([r.ids[-1] for r in live], device=self._decoder.device)
        logits = self._decoder.decode(ids, torch.tensor(positions, device=ids.device), self._cache, longest)
        if self._sampler is None:
            self._sampler = Sampler([r.params for r in live], ids.device)
        tokens, logprobs = self._sampler(logits, [r.drawn for r in live])
        return [self._drew(*drawn) for drawn in zip(live, tokens.tolist(), logprobs.tolist(), strict=True)]

    def _drew(self, r: _Request, token: int, logprob: float) -> Event:
        r.read = len(r.ids)
        r.ids.append(token)
        r.drawn += 1
        finish: Finish | None = None
        if token in r.params.stop_ids:
            finish = "stop"
        elif r.drawn >= r.params.max_tokens or len(r.ids) >= self.max_context:
            finish = "length"
        if finish:
            r.live = False
            self._sampler = None
            if not r.hold:
                self.cancel(r.id)
        return Event(r.id, token, logprob, finish)

    def _join(self) -> None:
        """Give free rows to waiting requests, close the gaps, read what is new."""
        if self._sampler is not None and not self._waiting:
            return
        for row in range(self.max_batch):
            if not self._waiting:
                break
            if self._rows[row] is None:
                joining = self._waiting.popleft()
                joining.row, joining.live = row, True
                self._rows[row] = joining
                self._sampler = None
        self._cache.reserve(1 + max((row for row, r in enumerate(self._rows) if r is not None), default=-1), 1)
        self._compact()
        self._read_prompts([r for r in self._rows[: self._n_live] if r is not None and r.read < len(r.ids) - 1])

    def _compact(self) -> None:
        """Move live rows to the front."""
        alive = [r is not None and r.live for r in self._rows]
        self._n_live = sum(alive)
        gaps = (row for row in range(self._n_live) if not alive[row])
        for source in range(self._n_live, self.max_batch):
            if not alive[source]:
                continue
            target = next(gaps)
            moved, other = self._rows[source], self._rows[target]
            assert moved is not None
            if other is not None:
                self._cache.swap(source, target, max(moved.read, other.read))
                other.row = source
            elif moved.read:
                self._cache.copy(source, target, moved.read)
            moved.row = target
            self._rows[source], self._rows[target] = other, moved

    def _read_prompts(self, behind: list[_Request]) -> None:
        """Bring the cache of these requests up to all their ids but the last."""
        if not behind:
            return
        self._cache.reserve(len(behind), max(len(r.ids) for r in behind))
        known = {r.prompt: r for r in self._rows if r is not None and r.read >= len(r.prompt)}
        first: list[_Request] = []
        same: list[tuple[_Request, _Request]] = []
        for r in behind:
            twin = known.get(r.prompt) if r.read == 0 else None
            if twin is None:
                first.append(r)
                known.setdefault(r.prompt, r)
            else:
                same.append((r, twin))
        for batch in _batches(first):
            self._decoder.prefill(
                [r.ids[r.read : -1] for r in batch], [r.read for r in batch], [_row(r) for r in batch], self._cache
            )
            for r in batch:
                r.read = len(r.ids) - 1
        for r, twin in same:
            self._cache.copy(_row(twin), _row(r), len(r.prompt))
            r.read = len(r.prompt)

    # ---- whole jobs -----------------------------------------------------------------------------------------------

    def events(self, requests: Iterable[int]) -> Iterator[Event]:
        """Step until all `requests` are finished, yielding their events. One may be extended when its finish is
        seen."""
        wanted = set(requests)
        while any(self.unfinished(r) for r in wanted):
            events = self.step()
            if not events:
                raise ModelError(f"all {self.max_batch} rows of the engine are held by finished requests; release some")
            yield from (e for e in events if e.request in wanted)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[Event]:
        """Continue all prompts; `Event.request` is the index of the prompt. One `params` for all: row i draws with
        the seed derive_seed(params.seed, i), so that equal prompts differ; a list: each draws with its own seed as it
        is."""
        if isinstance(params, SamplingParams):
            params = [replace(params, seed=derive_seed(params.seed, i)) for i in range(len(prompts))]
        for prompt in prompts:
            self.check(prompt)
        index = {self.add(p, one): i for i, (p, one) in enumerate(zip(prompts, params, strict=True))}
        try:
            for event in self.events(index):
                yield event._replace(request=index[event.request])
        finally:
            for request in index:
                self.cancel(request)

    def complete(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Continue all prompts to their ends (see `generate` for seeds)."""
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        ends: list[Finish] = ["length"] * len(prompts)
        for event in self.generate(prompts, params):
            ids[event.request].append(event.token)
            logprobs[event.request].append(event.logprob)
            ends[event.request] = event.finish or "length"
        return [Completion(*each) for each in zip(ids, logprobs, ends, strict=True)]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token after the first, by the model's own forward pass (see `infer.score`)."""
        return score(self.model, sequences)


def _row(r: _Request) -> int:
    assert r.row is not None
    return r.row


def _batches(requests: list[_Request]) -> Iterator[list[_Request]]:
    """Split into prefills of similar length, those that start at 0 apart from those that continue."""
    batch: list[_Request] = []
    for r in sorted(requests, key=lambda r: (r.read > 0, len(r.ids) - r.read)):
        widest = len(r.ids) - r.read
        if batch and ((r.read > 0) != (batch[0].read > 0) or widest * (len(batch) + 1) > _PREFILL_TOKENS):
            yield batch
            batch = []
        batch.append(r)
    if batch:
        yield batch
