"""What an engine's thread does in one of its turns, and how it can fail.

Owns: the errors that those who wait are told, and work that is done between two steps. Knows nothing of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple

from stateofgpt.errors import ModelError


class EngineFailed(ModelError):
    """A step failed, and this request was in it. The cause is `__cause__`, and is nobody's business but the log's."""


class EngineDied(ModelError):
    """The engine's thread has ended: there will be no more answers from this engine."""

    def __init__(self) -> None:
        super().__init__("the engine has stopped working; try again in a moment")


class EngineHung(ModelError):
    """A step has not come back. It cannot be broken off: what is left is to end the process."""


class Turn(NamedTuple):
    """What the engine's thread is doing: which of its turns, and at most how many tokens are computed in it."""

    number: int
    tokens: int


class Job(NamedTuple):
    """Something to compute between two steps."""

    work: Callable[[], Any]
    tokens: int
    future: Future[Any]

    def do(self) -> None:
        try:
            found = self.work()
        except ModelError as error:
            self.ends(error)
        except BaseException as error:
            failed = EngineFailed(f"the engine failed: {error}")
            failed.__cause__ = error
            self.ends(failed)
            if not isinstance(error, Exception):
                raise
        else:
            with contextlib.suppress(InvalidStateError):  # it was given up meanwhile
                self.future.set_result(found)

    def ends(self, error: ModelError) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
