"""The models of one server: loaded once, found by name, exchanged while they are being used.

Owns: which models there are, who is using which, and that a new one takes the place of an old one only after it has
written something; the old one is closed when its last answer has ended. Knows nothing of HTTP.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stateofgpt.errors import ServeError, StateOfGptError
from stateofgpt.infer.job import EngineHung

SETTLE_S = 5.0
Load = Callable[[Path], Any]


class UnknownModel(ServeError):
    """There is no model of that name here."""


@dataclass(eq=False)
class Held:
    """One loaded model. `users` are the leases that have not ended; a retired one takes no new ones."""

    assistant: Any
    folder: Path | None
    loaded: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    retired: bool = False


class Lease:
    """The right to use a model until `end`, whatever happens to its name meanwhile."""

    def __init__(self, shelf: Shelf, held: Held) -> None:
        self._shelf, self._held = shelf, held
        self._ended = False
        self.assistant = held.assistant

    def end(self) -> None:
        """Give the model back; again and again does no harm."""
        if not self._ended:
            self._ended = True
            self._shelf._returned(self._held)


class Shelf:
    """Models by name, the first one the default."""

    def __init__(self, models: Sequence[Held], load: Load | None = None) -> None:
        self._lock = threading.Lock()
        self._reloading = threading.Lock()
        self._load = load
        self._models: dict[str, Held] = {}
        for held in models:
            name = held.assistant.name
            if name in self._models:
                raise ServeError(f"two models are called {name!r}: serve one of them, or rename the folder of its run")
            self._models[name] = held
        self.default = next(iter(self._models))

    @classmethod
    def open(cls, folders: Sequence[Path], load: Load) -> Shelf:
        """Load every folder once. What was loaded is closed again where one cannot be."""
        models: list[Held] = []
        try:
            for folder in dict.fromkeys(path.resolve() for path in folders):
                models.append(Held(load(folder), folder))
            settle()
            return cls(models, load)
        except BaseException:
            for held in models:
                _close(held.assistant)
            raise

    @classmethod
    def of(cls, assistant: Any) -> Shelf:
        """A shelf with one model that was loaded elsewhere."""
        return cls([Held(assistant, None)])

    def __contains__(self, name: object) -> bool:
        return name in self._models

    @property
    def models(self) -> dict[str, Held]:
        """What there is now."""
        with self._lock:
            return dict(self._models)

    @property
    def devices(self) -> list[str]:
        """What the models' engines compute on."""
        return sorted({device_of(held) for held in self.models.values()})

    @property
    def failed(self) -> list[str]:
        """The names of models whose engines do not run any more."""
        return [name for name, held in self.models.items() if not getattr(held.assistant, "alive", True)]

    @property
    def hung(self) -> str | None:
        """Why the server is about to end, where an engine hangs."""
        reasons = [getattr(held.assistant, "died", None) for held in self.models.values()]
        return next((str(reason) for reason in reasons if isinstance(reason, EngineHung)), None)

    def lease(self, name: str | None = None) -> Lease:
        """The model of that name, or the default one, to be used until the lease ends."""
        with self._lock:
            held = self._models.get(self.default if name is None else name)
            if held is None:
                known = ", ".join(self._models)
                raise UnknownModel(f"there is no model {str(name)[:80]!r} here: there are {known}")
            held.users += 1
            return Lease(self, held)

    def peek(self, name: str | None = None) -> Any:
        """The model, to ask it for its name and limits."""
        lease = self.lease(name)
        lease.end()
        return lease.assistant

    def reload(self, name: str) -> dict[str, Any]:
        """Read a model's folder again and exchange it, after the new one has written a few tokens.

        What is under way goes on with the old one. ServeError where the new one cannot be used: the old one stays.
        """
        with self._reloading:
            with self._lock:
                old = self._models.get(name)
            if old is None:
                raise UnknownModel(f"there is no model {name[:80]!r} here")
            if old.folder is None or self._load is None:
                raise ServeError(f"{name} was not loaded from a folder, so there is nothing to read again")
            fresh, before = None, old.assistant.id
            try:
                fresh = self._load(old.folder)
                if fresh.name != name:
                    raise ServeError(f"the folder now holds {fresh.name!r}, another model: start the server anew")
                fresh.smoke_test()
            except StateOfGptError as error:
                _close(fresh)
                raise ServeError(f"{name} stays as it is, for the new one cannot be used: {error}") from error
            except BaseException:
                _close(fresh)
                raise
            with self._lock:
                self._models[name] = Held(fresh, old.folder)
                old.retired = True
                unused = old.users == 0
            if unused:
                _close(old.assistant)
            del old
            settle()
            return {"model": name, "before": before, "now": fresh.id}

    def close(self) -> None:
        for held in self.models.values():
            _close(held.assistant)

    def _returned(self, held: Held) -> None:
        with self._lock:
            held.users -= 1
            done = held.retired and held.users == 0
        if done:
            _close(held.assistant)
            later = threading.Timer(SETTLE_S, settle)  # when whoever used it last has let go of it
            later.daemon = True
            later.start()


def device_of(held: Held) -> str:
    """What a model's engine computes on; "cpu" of one that has none."""
    return str(getattr(held.assistant, "device", "cpu"))


def settle() -> None:
    """What is there now stays: the collector of garbage is told not to look through it again and again. A look through
    all that was imported takes a tenth of a second in which nobody gets a token, and open connections bring looks
    about."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _close(assistant: Any) -> None:
    close = getattr(assistant, "close", None)
    if close is not None:
        close()
