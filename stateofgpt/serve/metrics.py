"""What the server counts, in Prometheus' text format.

Owns the names of the metrics and when each moves. One registry for each server, none for the process. Knows nothing of
routes or models beyond their names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from stateofgpt.assistant.session import CallDelta, TextDelta
from stateofgpt.serve.answering import Answer
from stateofgpt.serve.shelf import Shelf, device_of
from stateofgpt.serve.streams import Running

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
T = TypeVar("T")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one server."""

    def __init__(self, shelf: Shelf, running: Running) -> None:
        self.registry = CollectorRegistry()
        registry, by = self.registry, ["model"]
        self.requests = Counter(
            "sog_requests", "requests answered, by route and status", ["route", "status"], registry=self.registry
        )
        first, between = "sog_time_to_first_token_seconds", "sog_time_between_tokens_seconds"
        self.first = Histogram(first, "from request to first text", by, registry=registry, buckets=_SECONDS)
        self.between = Histogram(between, "between pieces of text", by, registry=registry, buckets=_SECONDS)
        self.prompt = Counter("sog_prompt_tokens", "tokens of prompts", by, registry=registry)
        self.written = Counter("sog_completion_tokens", "tokens drawn", by, registry=registry)
        self.ended = Counter("sog_answers", "answers, by how they ended", ["model", "finish"], registry=self.registry)
        self.connections = Gauge("sog_connections", "open connections", registry=self.registry)
        self.refused = Counter("sog_connections_refused", "connections beyond the cap", registry=self.registry)
        self.cut = Counter("sog_connections_cut", "connections that were too slow", ["why"], registry=self.registry)
        self.registry.register(_Now(shelf, running))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def timed(self, events: Iterator[T], model: str, began: float) -> Iterator[T]:
        """Pass the events of an answer on, and count what they show. `began`: `time.perf_counter` at the request."""
        first, between = self.first.labels(model), self.between.labels(model)
        last: float | None = None
        for event in events:
            if isinstance(event, CallDelta) or (isinstance(event, TextDelta) and event.text):
                now = time.perf_counter()
                if last is None:
                    first.observe(now - began)
                else:
                    between.observe(now - last)
                last = now
            elif isinstance(event, Answer):
                self.prompt.labels(model).inc(event.prompt_tokens)
                self.written.labels(model).inc(event.completion_tokens)
                self.ended.labels(model, event.finish).inc()
            yield event


class _Now(Collector):
    """What is read when it is asked for."""

    def __init__(self, shelf: Shelf, running: Running) -> None:
        self._shelf, self._running = shelf, running

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("sog_answers_running", "answers being written or waiting", value=len(self._running))
        info = GaugeMetricFamily("sog_model_info", "the models of this server", labels=["model", "id", "device"])
        engine = GaugeMetricFamily("sog_engine", "what the engine is doing", labels=["model", "what"])
        for name, held in self._shelf.models.items():
            info.add_metric([name, getattr(held.assistant, "id", ""), device_of(held)], 1.0)
            load = getattr(held.assistant, "load", None)
            for what, value in (load() if load is not None else {}).items():
                engine.add_metric([name, what], value)
        yield info
        yield engine
