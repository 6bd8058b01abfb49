"""Who reads and who draws in a step.

Owns: the queue, the rows of the batch, and the blocks that each request holds. Requests join in the order in which they
came. A prompt is read in pieces of a step's budget, so that the others keep drawing. When the cache is full, what goes
first are prefixes nobody uses, then the blocks of requests that are held, then those of the request that came last: it
waits again, and reads again what it had. The oldest request therefore always goes on, and none is lost. Knows nothing
of sampling; models are something that reads ids into blocks.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from typing import Protocol

from stateofgpt.infer.blocks import Blocks
from stateofgpt.infer.cache import BLOCK, blocks_of
from stateofgpt.infer.request import Request


class Reader(Protocol):
    """What is needed of a decoder."""

    def prefill(self, ids: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]) -> None: ...
    def copy(self, source: int, target: int) -> None: ...


class Schedule:
    """`max_batch` rows over `blocks`; at most `step_tokens` tokens of prompts are read in a step (None: all)."""

    def __init__(self, reader: Reader, blocks: Blocks, max_batch: int, step_tokens: int | None) -> None:
        self._reader, self._blocks, self.step_tokens = reader, blocks, step_tokens
        self._rows: list[Request | None] = [None] * max_batch
        self._n_live = 0
        self.waiting: list[Request] = []  # in the order of arrival
        self._held: dict[int, Request] = {}
        self._changed = False  # whether rows have to be looked at again
        self.preempted = 0  # how often a request had to give its blocks back

    # ---- the life of a request ------------------------------------------------------------------------------------

    def add(self, r: Request) -> None:
        """Queue a request: a new one, or a held one that has no row."""
        r.state = "waiting"
        insort(self.waiting, r, key=lambda r: r.arrival)

    def hold(self, r: Request) -> None:
        """A request has finished, or pauses, and may go on later; it keeps its row and blocks as long as nobody needs
        them."""
        if r.state == "waiting":
            self.waiting.remove(r)
        r.state = "held"
        self._held[r.id] = r
        self._changed = True

    def go_on(self, r: Request) -> None:
        """A held request has got more ids, or pauses no longer."""
        del self._held[r.id]
        if r.row is None:
            self.add(r)
        else:
            r.state = "live"
            self._changed = True

    def remove(self, r: Request) -> None:
        """A request is over."""
        if r.state == "waiting":
            self.waiting.remove(r)
        self._held.pop(r.id, None)
        self._leave_row(r)
        self._give_back(r)

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting) or any(r is not None and r.state == "live" for r in self._rows)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def prepare(self, most_new: int = 1) -> list[Request]:
        """Let requests join and read; then those that draw in this step, in the order of their rows. Each has blocks
        for the `most_new` tokens it may read with it, or for one where there is no room for more."""
        if self.waiting or self._changed:
            self._join()
            self._compact()
            self._changed = False
            self._read()
        ready = [r for r in self._rows if r is not None and r.state == "live" and r.read == r.target]
        for r in sorted(ready, key=lambda r: r.arrival):
            if r.state == "live" and not self._ensure(r, len(r.ids)):
                continue
            if most_new > 1 and r.state == "live":
                self._stretch(r, len(r.ids) + most_new - 1)
        return [r for r in ready if r.state == "live"]

    def room(self, r: Request) -> int:
        """How many tokens from its next position on fit into the blocks of a request."""
        return len(r.blocks) * BLOCK - r.target

    def has_read(self, r: Request, count: int) -> None:
        """`count` more ids of this request are in its blocks: whole blocks become prefixes."""
        r.read += count
        if not self._blocks.keep:
            return
        while (len(r.path) + 1) * BLOCK <= r.read:
            i = len(r.path)
            key = tuple(r.ids[i * BLOCK : (i + 1) * BLOCK])
            node = self._blocks.add(r.tenant, r.path[-1] if r.path else None, key, r.blocks[i])
            r.blocks[i] = node.block
            r.path.append(node)

    # ---- joining --------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Give free rows to waiting requests, first come first served; held ones give theirs up when there are no
        others."""
        if not self.waiting:
            return
        held = [row for row, r in enumerate(self._rows) if r is not None and r.state == "held"]
        free = [row for row, r in enumerate(self._rows) if r is None]
        promised = sum(self._missing(r) for r in self._rows if r is not None and r.state == "live")
        held_blocks = sum(len(r.blocks) for r in self._held.values())
        for row in (*free, *held):
            if not self.waiting:
                break
            first = self.waiting[0]
            need = self._missing(first) - self._blocks.known(first.tenant, first.prompt)
            alone = not any(r is not None and r.state == "live" for r in self._rows)
            if promised + need > self._blocks.available + held_blocks and not alone:
                break
            promised += max(0, need)
            if (other := self._rows[row]) is not None:
                other.row = None
            self.waiting.pop(0)
            first.row, first.state = row, "live"
            self._rows[row] = first

    def _missing(self, r: Request) -> int:
        return blocks_of(len(r.ids)) - len(r.blocks)

    def _compact(self) -> None:
        """Move live rows to the front."""
        alive = [r is not None and r.state == "live" for r in self._rows]
        self._n_live = sum(alive)
        gaps = (row for row in range(self._n_live) if not alive[row])
        for source in range(self._n_live, len(self._rows)):
            if not alive[source]:
                continue
            target = next(gaps)
            moved, other = self._rows[source], self._rows[target]
            assert moved is not None
            moved.row = target
            if other is not None:
                other.row = source
            self._rows[source], self._rows[target] = other, moved

    def _leave_row(self, r: Request) -> None:
        if r.row is not None:
            self._rows[r.row], r.row = None, None
            self._changed = True

    # ---- reading --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Bring the cache of live requests up to all their ids but the last, as far as the budget goes."""
        pending = sorted(
            (r for r in self._rows if r is not None and r.state == "live" and r.read < r.target),
            key=lambda r: r.arrival,
        )
        budget = sum(r.target for r in pending) if self.step_tokens is None else self.step_tokens
        while pending and budget > 0:
            twins = self._twins() if pending else {}
            planned: list[tuple[Request, int]] = []
            later: list[Request] = []
            for r in pending:
                if r.state != "live":
                    continue
                if not r.blocks:
                    self._find(r, twins.get((r.tenant, r.prompt)))
                rest = min(r.target - r.read, budget)
                if r.read == r.target:
                    continue
                if rest <= 0 or any(self._repeats(r, other) for other, _ in planned):
                    later.append(r)
                elif self._ensure(r, r.read + rest):
                    planned.append((r, rest))
                    budget -= rest
            planned = [(r, count) for r, count in planned if r.state == "live"]
            if not planned:
                break
            self._prefill(sorted(planned, key=lambda one: one[0].row or 0))
            pending = later
        self._changed = self._changed or any(
            r is not None and r.state == "live" and r.read < r.target for r in self._rows
        )

    def _prefill(self, planned: list[tuple[Request, int]]) -> None:
        self._reader.prefill(
            [r.ids[r.read : r.read + count] for r, count in planned],
            [r.read for r, _ in planned],
            [r.blocks for r, _ in planned],
        )
        for r, count in planned:
            self.has_read(r, count)

    def _twins(self) -> dict[tuple[str, tuple[int, ...]], Request]:
        """Requests in the batch whose prompts are in the cache."""
        return {(r.tenant, r.prompt): r for r in self._rows if r is not None and r.blocks and r.read >= len(r.prompt)}

    def _repeats(self, r: Request, other: Request) -> bool:
        """Whether `other`, which is read now, will leave something of which `r` then need not read at least a block, or
        all of its prompt."""
        if r.tenant != other.tenant or r.read >= len(r.prompt):
            return False
        if r.prompt == other.prompt:
            return True
        end = (r.read // BLOCK + 1) * BLOCK
        return self._blocks.keep and end <= min(r.target, other.target) and r.ids[:end] == other.ids[:end]

    def _find(self, r: Request, twin: Request | None) -> None:
        """Share what is in the cache already: all that a request with the same prompt has read of it, or else a prefix
        that was kept."""
        if twin is not None and twin is not r and r.prompt:
            whole, rest = divmod(len(r.prompt), BLOCK)
            shared, path = twin.blocks[:whole], twin.path[:whole]
            tail, fits = (twin.blocks[whole] if rest else None), rest
        elif self._blocks.keep:
            path, node, fits = self._blocks.find(r.tenant, r.ids[:-1])
            shared, tail = [one.block for one in path], None if node is None else node.block
        else:
            return
        for block in shared:
            self._blocks.share(block)
        r.blocks, r.path, r.read = list(shared), list(path), len(shared) * BLOCK
        if tail is None:
            return
        self._blocks.share(tail)  # or it could be what `take` finds
        if (own := self._blocks.take()) is not None:
            self._reader.copy(tail, own)
            r.blocks.append(own)
            r.read += fits
        self._blocks.drop(tail)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _ensure(self, r: Request, length: int) -> bool:
        """Blocks for `length` positions; False where `r` itself had to go."""
        while len(r.blocks) < blocks_of(length):
            block = self._blocks.take()
            while block is None:
                victim = self._victim()
                if victim.state == "live":
                    self._preempt(victim)
                else:
                    self._give_back(victim)
                if victim is r:
                    return False
                block = self._blocks.take()
            r.blocks.append(block)
        return True

    def _stretch(self, r: Request, length: int) -> None:
        """Blocks for up to `length` positions, as far as there are free ones."""
        while len(r.blocks) < blocks_of(length) and (block := self._blocks.take()) is not None:
            r.blocks.append(block)

    def _victim(self) -> Request:
        """Who gives blocks back: somebody who is held or waits, else the one that came last."""
        idle = (r for r in (*self._held.values(), *reversed(self.waiting)) if r.blocks)
        live = (r for r in self._rows if r is not None and r.state == "live")
        return next(idle, None) or max(live, key=lambda r: r.arrival)

    def _preempt(self, r: Request) -> None:
        """Back into the queue; what it had is read again."""
        self.preempted += 1
        self._leave_row(r)
        self._give_back(r)
        self.add(r)

    def _give_back(self, r: Request) -> None:
        """Let go of all blocks. The tree keeps what was read, until somebody needs the room."""
        whole, rest = divmod(r.read, BLOCK)
        if self._blocks.keep and rest and len(r.path) == whole < len(r.blocks):
            key = tuple(r.ids[whole * BLOCK : r.read])
            r.blocks[whole] = self._blocks.add(r.tenant, r.path[-1] if r.path else None, key, r.blocks[whole]).block
        for block in reversed(r.blocks):
            self._blocks.drop(block)
        r.blocks, r.path, r.read = [], [], 0

    def held(self) -> Iterator[Request]:
        """Requests that have finished and may go on."""
        return iter(self._held.values())
