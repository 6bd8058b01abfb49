"""Which tokens a constraint allows next.

Owns: `Guide` (what the engine asks: a mask, then the token that was drawn), and `Guides`, which makes guides with the
llguidance package out of a vocabulary. Constraints are `infer.grammar`'s. Knows nothing of models or requests.

Constraints come from strangers: each new one is first tried in a process of its own, under limits, in the thread of
the one who asks. Only what passes is made here, in a thread that gives up its hold on Python meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from stateofgpt.errors import ConfigError
from stateofgpt.infer.grammar import SECONDS, Constraint, check, library, matcher_of, short, too_much

__all__ = ["Constraint", "Guide", "Guides"]

AT_WORK = 2  # constraints that are tried at once
_KEPT = 64  # that were made


class Guide(Protocol):
    """The state of one constrained answer."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing may follow."""

    def mask(self) -> np.ndarray:
        """Which ids may come next, bool [V]. None may where the constraint has become too hard to follow."""

    def accept(self, token: int) -> None:
        """This token was drawn."""


class Tokens(Protocol):
    """What is needed of a tokenizer."""

    vocab_size: int
    stops: Collection[int]

    @property
    def specials(self) -> Mapping[int, str]: ...
    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True, *, inner: bool = False) -> bytes: ...
    def encode_after(self, text: str, *, special: bool) -> list[int]: ...


class Guides:
    """Makes guides for one vocabulary; from any thread. ModelError at the first where llguidance is not installed."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._vocabulary: Any = None
        self._made: OrderedDict[Constraint, Any] = OrderedDict()
        self._lock, self._slots = threading.Lock(), threading.BoundedSemaphore(AT_WORK)

    def __call__(self, constraint: Constraint) -> Guide:
        """A guide at its beginning. ConfigError where the source is wrong, or too much. A new one takes a tenth of a
        second and more."""
        with self._lock:
            made = self._made.get(constraint)
        if made is None:
            made = self._in_time(constraint)
            with self._lock:
                self._made[constraint] = made
                while len(self._made) > _KEPT:
                    self._made.popitem(last=False)
        return _Matched(made.deep_copy(), self._tokens.vocab_size)

    def _in_time(self, constraint: Constraint) -> Any:
        """A matcher that was tried elsewhere first, then made in a thread of its own, which is waited for a second."""
        vocabulary = self._prepared()
        if not self._slots.acquire(timeout=10 * SECONDS):
            raise ConfigError(f"the {constraint.kind} has to wait: others are being read that take long; try again")
        answer: list[Any] = []

        def work() -> None:
            try:
                answer.append(matcher_of(constraint, vocabulary))
            except Exception as error:  # of a library: whatever it is, the source was the reason
                answer.append(error)

        try:
            check(constraint)
            thread = threading.Thread(target=work, name="grammar", daemon=True)
            thread.start()
            thread.join(SECONDS)
        finally:
            self._slots.release()
        if not answer:
            raise too_much(constraint)
        if isinstance(answer[0], Exception):
            raise ConfigError(f"the {constraint.kind} cannot be used: {short(str(answer[0]))}") from answer[0]
        return answer[0]

    def _prepared(self) -> Any:
        """The vocabulary as llguidance wants it; made once, a fraction of a second."""
        found = library()
        with self._lock:
            if self._vocabulary is None:
                wrapped = found.TokenizerWrapper(_Wrapped(self._tokens))
                self._vocabulary = found.LLTokenizer(wrapped, eos_token=sorted(self._tokens.stops), slices=None)
            return self._vocabulary


class _Wrapped:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self.eos_token_id, self.bos_token_id = min(tokens.stops), None
        self.special_token_ids = sorted(tokens.specials)
        self.tokens = [tokens.decode_bytes([i], skip_special=False, inner=True) for i in range(tokens.vocab_size)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", errors="surrogateescape") if isinstance(text, bytes) else text
        return self._tokens.encode_after(text, special=False)


class _Matched:
    """A guide over llguidance's matcher."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._size = matcher, vocab_size

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def mask(self) -> np.ndarray:
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return np.zeros(self._size, dtype=bool)
        return np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=self._size, bitorder="little").astype(bool)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
