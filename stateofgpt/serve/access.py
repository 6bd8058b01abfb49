"""Who may do what, and how much of it.

Owns: who a request comes from, the routes that anybody or only an admin may use, and the limits of each key, counted
before anything is computed. Knows nothing of models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from stateofgpt.serve.fields import ApiError
from stateofgpt.serve.keys import Key, KeyRing

LOCAL = Key("local", admin=True)  # whoever can reach a server without keys
OPEN = frozenset({"/health", "/", "/app.js", "/style.css", "/icon.svg"})  # say nothing and cost nothing
ADMIN = ("/metrics", "/admin/")
MINUTE = 60.0
WRONG_KEYS = 10  # from one address in a minute; then it has to wait
MOST_ADDRESSES = 4096


class Bucket:
    """So many units a minute: full at first, filled evenly, never above its limit."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._limit, self._clock = per_minute, clock
        self._left, self._at = float(per_minute), clock()

    @property
    def limit(self) -> int:
        return self._limit

    def take(self, amount: float) -> float:
        """0 when `amount` was taken, else how many seconds until it could be."""
        now = self._clock()
        self._left = min(self._limit, self._left + (now - self._at) * self._limit / MINUTE)
        self._at = now
        if amount <= self._left:
            self._left -= amount
            return 0.0
        return max(0.001, (amount - self._left) * MINUTE / self._limit)

    def give(self, amount: float) -> None:
        """Give back what was taken and not used."""
        self._left = min(self._limit, self._left + amount)


@dataclass
class _Account:
    """What one key has used."""

    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0


class Grant:
    """One request of a key under way. `take` asks for the most tokens it may use, `end` gives back the rest."""

    def __init__(self, access: Access, who: Key) -> None:
        self._access, self._who, self._tokens = access, who, 0
        self._ended = False

    def take(self, tokens: int) -> None:
        """ApiError 429 says how long to wait for so many tokens."""
        self._access._take(self._who, tokens)
        self._tokens += tokens

    def end(self, used: int = 0) -> None:
        """The request is over, and used so many tokens. Only the first time counts."""
        if not self._ended:
            self._ended = True
            self._access._ended(self._who, self._tokens - used)


class Access:
    """The door's book: with a key ring every route asks for a key unless it is in `OPEN`; without one, nobody's."""

    def __init__(self, ring: KeyRing | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.ring, self._clock = ring, clock
        self._lock = threading.Lock()
        self._accounts: dict[str, tuple[Key, _Account]] = {}
        self._wrong: dict[str, Bucket] = {}

    def admit(self, path: str, authorization: str, address: str) -> Key:
        """Who this is; ApiError 401, 403 or 429 where they may not do that."""
        if self.ring is None:
            return LOCAL
        if path in OPEN:
            return Key("anybody")
        kind, _, secret = authorization.partition(" ")
        who = None
        if kind.lower() == "bearer" and 0 < len(secret) <= 200:
            who = self._found(self.ring, secret.strip(), address)
        if who is None:
            raise ApiError(401, "send a valid API key as `Authorization: Bearer KEY`", code="invalid_api_key")
        if path.startswith(ADMIN) and not who.admin:
            raise ApiError(403, "this needs an admin's key", code="admin_only")
        return who

    def _found(self, ring: KeyRing, secret: str, address: str) -> Key | None:
        with self._lock:
            tries = self._wrong.get(address)
            wait = tries.take(1.0) if tries is not None else 0.0
        if wait:
            raise ApiError(429, "too many wrong keys: wait", code="rate_limit_exceeded", retry_after_s=wait)
        found = ring.find(secret)
        with self._lock:
            if found is None and tries is None:
                if len(self._wrong) >= MOST_ADDRESSES:
                    self._wrong.clear()
                self._wrong[address] = Bucket(WRONG_KEYS, self._clock)
                self._wrong[address].take(1.0)
            elif found is not None and tries is not None:
                tries.give(1.0)
        return found

    def begin(self, who: Key) -> Grant:
        """One request of `who`; ApiError 429 says how long to wait for it."""
        with self._lock:
            account = self._account(who)
            if who.concurrent and account.running >= who.concurrent:
                raise _exceeded(f"{who.concurrent} requests at once are the limit of this key", 1.0)
            if account.requests is not None and (wait := account.requests.take(1.0)):
                raise _exceeded(f"{account.requests.limit} requests a minute are the limit of this key", wait)
            account.running += 1
        return Grant(self, who)

    def _take(self, who: Key, tokens: int) -> None:
        with self._lock:
            bucket = self._account(who).tokens
            if bucket is None:
                return
            if tokens > bucket.limit:
                told = f"the request may take {tokens} tokens, and {bucket.limit} a minute are the limit of this key"
                raise ApiError(429, f"{told}: ask for fewer with max_tokens", code="rate_limit_exceeded")
            if wait := bucket.take(tokens):
                raise _exceeded(f"{bucket.limit} tokens a minute are the limit of this key", wait)

    def _account(self, who: Key) -> _Account:
        known = self._accounts.get(who.name)
        if known is None or known[0] != who:
            made = _Account(
                Bucket(who.requests_per_minute, self._clock) if who.requests_per_minute else None,
                Bucket(who.tokens_per_minute, self._clock) if who.tokens_per_minute else None,
                known[1].running if known else 0,
            )
            self._accounts[who.name] = (who, made)
            return made
        return known[1]

    def _ended(self, who: Key, unused: int) -> None:
        with self._lock:
            _, account = self._accounts[who.name]
            account.running -= 1
            if account.tokens is not None and unused > 0:
                account.tokens.give(unused)


def _exceeded(message: str, wait_s: float) -> ApiError:
    return ApiError(429, f"{message}: wait", code="rate_limit_exceeded", retry_after_s=wait_s)
