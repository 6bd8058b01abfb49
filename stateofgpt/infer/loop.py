"""The engine for many threads.

Owns: the one thread that steps an engine, and the hand-over of requests to it and of events from it. Others never
touch the engine: they leave commands, which the thread carries out before its next step, so a cancelled request is
gone within one step. A step that fails ends the requests in it and no others. Where the thread itself ends, or is given
up because a step does not come back, everybody who waits is told, and so is whoever asks for more. A request whose
reader lags behind pauses. Knows nothing of text or HTTP.
"""

from __future__ import annotations

import functools
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self, overload

from stateofgpt.errors import ModelError
from stateofgpt.infer.engine import Engine, Event
from stateofgpt.infer.job import EngineDied, EngineFailed, EngineHung, Job, Turn
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.infer.score import Scored

__all__ = ["EngineDied", "EngineFailed", "EngineHung", "EngineLoop"]

FRUITLESS = 8  # steps that fail one after the other although no request is left to blame


class EngineLoop:
    """Has the methods of `Engine` that others need (add, extend, release, cancel, events, score, embed), safe from any
    thread.

    `unread` is how many events of a request may wait for its reader until nothing more is drawn for it (None: any
    number); then every request wants a reader of its own.
    """

    def __init__(self, engine: Engine, *, unread: int | None = None) -> None:
        self.engine, self._unread = engine, unread
        self.max_context = engine.max_context
        self._commands: deque[Callable[[], object]] = deque()
        self._jobs: deque[Job] = deque()
        self._job: Job | None = None  # that is being done
        self._turns = 0
        self.turn: Turn | None = None  # None while the thread waits for work
        self._pausing: set[int] = set()  # requests whose readers lag behind
        self._inbox: dict[int, deque[Event | ModelError]] = {}  # of each request that is not over for its owner
        self._open: set[int] = set()  # requests with events to come
        self._bells: dict[int, threading.Condition] = {}  # of each request somebody waits for: rung for nobody else
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # for the engine's thread: there is something to do
        self._closed = False
        self.died: BaseException | None = None  # what ended the thread, unless it was closed
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, wait_s: float | None = None) -> None:
        """Stop the thread; requests under way fail with ModelError. A thread that was given up is not waited for, and
        one whose step takes longer than `wait_s` seconds is given up now."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self.hung:
            self._thread.join(wait_s)
            if self._thread.is_alive():
                self.give_up(EngineHung(f"a step has not come back for {wait_s:g} s"))

    def give_up(self, cause: EngineHung) -> None:
        """The thread will not come back from its turn, as another thread has found out: tell everybody who waits, as if
        it had ended. If it comes back all the same, nothing that it does reaches anybody."""
        with self._changed:
            if self.died is not None:
                return
            self.died, self._closed = cause, True
        over = EngineDied()
        over.__cause__ = cause
        self._tell_all(over)

    @property
    def hung(self) -> bool:
        """Whether the thread was given up."""
        return isinstance(self.died, EngineHung)

    def where(self) -> str:
        """Where in the program the thread is, for the log."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else ""

    # ---- for other threads ----------------------------------------------------------------------------------------

    def add(self, prompt: Sequence[int], params: SamplingParams, *, hold: bool = False, tenant: str = "") -> int:
        """As Engine.add; a prompt that does not fit is refused here, in the caller's thread, and a constraint is read
        in it."""
        self.engine.check(prompt, params)
        guide = self.engine.guide(params)
        request = self.engine.new_id()
        self._open_for(
            request,
            lambda: self.engine.add(prompt, params, hold=hold, request=request, tenant=tenant, guide=guide),
        )
        return request

    def extend(self, request: int, ids: Sequence[int]) -> None:
        """As Engine.extend, after the request's finish has been seen; a refusal comes out of `events`."""
        self._open_for(request, lambda: self.engine.extend(request, ids))

    def cancel(self, request: int) -> None:
        """As Engine.cancel: at once for `events`, within one step for the engine. Unknown ids are ignored."""
        with self._changed:
            self._inbox.pop(request, None)
            self._open.discard(request)
            self._pausing.discard(request)
            self._ring([request])
            self._bells.pop(request, None)
            self._commands.append(lambda: self.engine.cancel(request))
            self._changed.notify_all()

    release = cancel

    def events(self, requests: Iterable[int]) -> Iterator[Event]:
        """Events of `requests` as they come, until all are finished or cancelled. One may be extended when its finish
        is seen. Raises ModelError if the engine failed on one of them (EngineFailed, EngineDied) or was closed."""
        wanted = list(requests)
        bell = threading.Condition(self._lock)
        while True:
            with self._lock:
                while not any(self._inbox.get(r) for r in wanted):
                    if not any(r in self._open for r in wanted):
                        for r in wanted:
                            self._inbox.pop(r, None)
                            self._bells.pop(r, None)
                        return
                    self._bells.update(dict.fromkeys(wanted, bell))
                    bell.wait()
                boxes = [box for r in wanted if (box := self._inbox.get(r))]
                found = [box.popleft() for box in boxes for _ in range(len(box))]
                for r in self._pausing.intersection(wanted):
                    self._pausing.discard(r)
                    self._commands.append(functools.partial(self.engine.go_on, r))
                    self._changed.notify_all()
            for event in found:
                if isinstance(event, ModelError):
                    raise event
                yield event

    @overload
    def score(  # type: ignore[overload-overlap]  # 0 is an int, too
        self, sequences: Sequence[Sequence[int]], top: Literal[0] = 0
    ) -> list[list[float]]: ...
    @overload
    def score(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[Scored]]: ...

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0) -> list[list[float]] | list[list[Scored]]:
        """As Engine.score. One sequence goes between two steps, so that long ones hold nobody up for long."""
        parts = [self._do_later(functools.partial(self.engine.score, [one], top), len(one)) for one in sequences]
        return [part.result()[0] for part in parts]

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As Engine.embed, one sequence between two steps."""
        parts = [self._do_later(functools.partial(self.engine.embed, [one]), len(one)) for one in sequences]
        return [part.result()[0] for part in parts]

    def _do_later(self, work: Callable[[], Any], tokens: int) -> Future[Any]:
        """Have something computed between two steps."""
        job = Job(work, tokens, Future())
        with self._changed:
            self._refuse_if_over()
            self._jobs.append(job)
            self._changed.notify_all()
        return job.future

    @property
    def busy(self) -> int:
        """How many requests have tokens to come."""
        return len(self._open)

    @property
    def load(self) -> dict[str, int]:
        """How much there is to do and how full the cache is, for whoever watches."""
        schedule, blocks = self.engine._schedule, self.engine._blocks
        full = {"blocks": blocks.count, "blocks_free": blocks.available}
        return {"open": self.busy, "waiting": len(schedule.waiting), "preempted": schedule.preempted, **full}

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self.died is None and self._thread.is_alive()

    def _open_for(self, request: int, command: Callable[[], object]) -> None:
        with self._changed:
            self._refuse_if_over()
            self._inbox.setdefault(request, deque())
            self._open.add(request)
            self._commands.append(lambda: self._try(request, command))
            self._changed.notify_all()

    def _refuse_if_over(self) -> None:
        if self.died is not None:
            raise EngineDied from self.died
        if self._closed:
            raise ModelError("the engine is closed, nothing more can be computed")

    # ---- the engine's own thread ----------------------------------------------------------------------------------

    def _try(self, request: int, command: Callable[[], object]) -> None:
        try:
            command()
        except ModelError as error:
            self._fail([request], error)

    def _run(self) -> None:
        """The thread: however it ends, nobody is left waiting."""
        over = ModelError("the engine was closed before this was complete")
        try:
            self._work()
        except BaseException as error:  # not even SystemExit may leave others waiting
            self.died, over = error, EngineDied()
            over.__cause__ = error
        self._tell_all(over)

    def _tell_all(self, over: ModelError) -> None:
        """There will be no more answers: end all requests and jobs with `over`."""
        with self._changed:
            waiting, jobs = list(self._open), [*([self._job] if self._job else []), *self._jobs]
            self._jobs.clear()
            self._commands.clear()
        self._fail(waiting, over)
        for job in jobs:
            job.ends(over)

    def _work(self) -> None:
        fruitless = 0
        while True:
            with self._changed:
                self._job = self.turn = None
                while not (self._commands or self._jobs or self._closed) and self.engine.idle:
                    self._changed.wait()
                if self._closed:
                    break
                commands = list(self._commands)
                self._commands.clear()
                job = self._job = self._jobs.popleft() if self._jobs else None
                self._turns += 1
                self.turn = Turn(self._turns, self.engine.most_tokens + (job.tokens if job else 0))
            if job is not None:
                job.do()
            try:
                for command in commands:
                    command()
                self._deliver(self.engine.step())
                fruitless = 0
            except Exception as error:  # the thread must outlive any failure of a step: the next request may be well
                fruitless = 0 if self._abandon(error) else fruitless + 1
                if fruitless == FRUITLESS:
                    raise
        for request in list(self._inbox):
            self.engine.cancel(request)

    def _deliver(self, events: list[Event]) -> None:
        with self._changed:
            if self.died is not None:  # given up: all have been told
                return
            for event in events:
                if event.finish:
                    self._open.discard(event.request)
                if event.request in self._inbox:
                    self._inbox[event.request].append(event)
                    if self._unread and len(self._inbox[event.request]) >= self._unread and not event.finish:
                        self._pausing.add(event.request)
                        self.engine.pause(event.request)
            self._ring([event.request for event in events])

    def _abandon(self, cause: Exception) -> bool:
        """A step failed: end all requests there are. False where there was none."""
        with self._changed:
            affected = list(self._inbox)
        error = EngineFailed(f"the engine failed: {cause}")
        error.__cause__ = cause
        for request in affected:
            self.engine.cancel(request)
        self._fail([r for r in affected if r in self._open], error)
        return bool(affected)

    def _fail(self, requests: Sequence[int], error: ModelError) -> None:
        with self._changed:
            for request in requests:
                self._open.discard(request)
                if request in self._inbox:
                    self._inbox[request].append(error)
            self._ring(requests)

    def _ring(self, requests: Iterable[int]) -> None:
        """Wake whoever waits for one of these; a crowd that is woken for every token of each costs more than a step."""
        for bell in {id(found): found for r in requests if (found := self._bells.get(r)) is not None}.values():
            bell.notify_all()
