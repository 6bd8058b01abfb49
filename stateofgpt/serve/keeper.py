"""Looks after the engines of a server: one that has died is loaded anew from its folder, one that hangs ends it all.

Owns: noticing it, how often that is done, and when it is given up. Knows nothing of HTTP, or of what an engine does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from stateofgpt.errors import ServeError, StateOfGptError
from stateofgpt.serve.shelf import Held, Shelf

log = logging.getLogger("stateofgpt.serve")


class EngineLost(ServeError):
    """An engine died and could not be brought back, or `hung`: the process should end, and whoever watches it start it
    again."""

    exit_code = 70  # as sysexits.h has it: a fault within the program

    def __init__(self, message: str, *, hung: bool = False) -> None:
        super().__init__(message)
        self.hung = hung


class Keeper:
    """Looks every `every_s` seconds, in a thread of its own, from `start` to `stop`.

    More than `most` deaths within `within_s` seconds, or a folder that cannot be read any more, and it calls `give_up`
    once with what to tell, and looks no more. So it does `grace_s` seconds after it has found an engine that has been
    in one and the same turn for `step_s` seconds, or for as long as the turn may take on a slow machine if that is
    more: time for those who look at the server's health to see why it ends.
    """

    def __init__(
        self,
        shelf: Shelf,
        give_up: Callable[[EngineLost], object],
        *,
        every_s: float = 0.5,
        most: int = 3,
        within_s: float = 600.0,
        step_s: float = 120.0,
        grace_s: float = 3.0,
    ) -> None:
        self._shelf, self._give_up = shelf, give_up
        self._every_s, self._most, self._within_s = every_s, most, within_s
        self._step_s, self._grace_s = step_s, grace_s
        self._deaths: deque[float] = deque()
        self._turns: dict[Held, tuple[int, float]] = {}  # the turn of each engine, and how long it has been seen in it
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Look no more; a folder that is being read is read to its end."""
        self._stopped.set()

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(self._every_s):
            now = time.monotonic()
            passed = min(now - looked, 4 * self._every_s)  # a process that was itself stopped has not waited
            looked = now
            try:
                self._watch(passed)
                for name in self._shelf.failed:
                    self._revive(name)
            except EngineLost as lost:
                if lost.hung:
                    self._stopped.wait(self._grace_s)
                self._give_up(lost)
                return

    def _watch(self, passed: float) -> None:
        """EngineLost where an engine has been in one turn for too long; everybody who waits for it has been told."""
        before, self._turns = self._turns, {}
        for name, held in self._shelf.models.items():
            turn = getattr(held.assistant, "turn", None)
            if turn is None or not held.assistant.alive:
                continue
            number, slow_s = turn
            seen, seconds = before.get(held, (number, 0.0))
            seconds = seconds + passed if seen == number else 0.0
            self._turns[held] = number, seconds
            if seconds > max(self._step_s, slow_s):
                log.error("a step of %s has not come back for %.0f s; it is in\n%s", name, seconds,
                          held.assistant.give_up(seconds))  # fmt: skip
                raise EngineLost(
                    f"a step of the engine of {name} has not come back for {seconds:.0f} s and cannot be broken off: "
                    "the server ends, and its log has where it hangs",
                    hung=True,
                )

    def _revive(self, name: str) -> None:
        cause = getattr(self._shelf.peek(name), "died", None)
        log.error("the engine of %s has died; its folder is read again", name, exc_info=cause)
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._within_s:
            self._deaths.popleft()
        if len(self._deaths) > self._most:
            raise EngineLost(
                f"the engine of {name} died again, {len(self._deaths)} times within {self._within_s:g} s: the server "
                "ends, and its log has what happened"
            )
        try:
            self._shelf.reload(name)
        except StateOfGptError as error:
            raise EngineLost(f"the engine of {name} died and could not be loaded again ({error})") from error
        except Exception as error:
            log.exception("%s could not be loaded again", name)
            raise EngineLost(f"the engine of {name} died and could not be loaded again ({error!r})") from error
        log.error("the engine of %s works again after %.1f s", name, time.monotonic() - now)
