"""Whose the blocks of the cache are, and which prefixes they hold.

Owns: the free blocks, how many requests use each of the others, and for every tenant a tree of the blocks that have
been read: a node is a block with the tokens in it, its children go on from there. A request walks down the tree with
its own tokens and shares what it finds. Blocks that nobody uses stay in the tree until somebody needs the room; then
the one goes that was used longest ago. Knows nothing of models, and of requests only their tokens.

A block in the tree is never written again: whoever goes on from the middle of one takes a copy.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from stateofgpt.infer.cache import BLOCK

_LOOKED_AT = 64  # children that are compared for the longest common part of a block


@dataclass(slots=True, eq=False)
class Node:
    """One block of a prefix: `key` are its tokens, BLOCK of them or, at the end of a text, fewer."""

    parent: Node | None
    key: tuple[int, ...]
    block: int  # -1: gone
    tenant: str
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    used: int = 0


class Blocks:
    """`count` blocks, numbered from 0. With `keep` blocks that were read outlive their requests."""

    def __init__(self, count: int, *, keep: bool) -> None:
        self.count, self.keep = count, keep
        self._free = list(range(count - 1, -1, -1))
        self._uses = [0] * count
        self._nodes: dict[int, Node] = {}  # of a block that is in a tree
        self._roots: dict[str, Node] = {}
        self._idle = 0  # blocks in trees that no request uses
        self._old: list[tuple[int, int, Node]] = []  # a heap of what could go; entries may be out of date
        self._clock = 0

    @property
    def available(self) -> int:
        """How many blocks `take` could give."""
        return len(self._free) + self._idle

    def take(self) -> int | None:
        """A block for one request, or None when all are in use."""
        block = self._free.pop() if self._free else self._evict()
        if block is not None:
            self._uses[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more request uses this block."""
        if self._uses[block] == 0:
            self._idle -= 1
        self._uses[block] += 1

    def drop(self, block: int) -> None:
        """One request less uses this block."""
        self._uses[block] -= 1
        if self._uses[block] == 0:
            if (node := self._nodes.get(block)) is None:
                self._free.append(block)
            else:
                self._idle += 1
                self._offer(node)

    # ---- prefixes -------------------------------------------------------------------------------------------------

    def find(self, tenant: str, ids: Sequence[int]) -> tuple[list[Node], Node | None, int]:
        """The whole blocks of this tenant that hold the beginning of `ids`; the node that goes on best from there, and
        how many tokens of it fit."""
        self._clock += 1
        here = self._roots.get(tenant)
        path: list[Node] = []
        while here is not None:
            here.used = self._clock
            start = len(path) * BLOCK
            following = here.children.get(tuple(ids[start : start + BLOCK])) if start + BLOCK <= len(ids) else None
            if following is None:
                return path, *self._best(here, tuple(ids[start : start + BLOCK]))
            path.append(following)
            here = following
        return path, None, 0

    def _best(self, node: Node, ids: tuple[int, ...]) -> tuple[Node | None, int]:
        best, most = None, 0
        for key, child in islice(node.children.items(), _LOOKED_AT if ids else 0):
            same = next((i for i, (a, b) in enumerate(zip(key, ids, strict=False)) if a != b), min(len(key), len(ids)))
            if same > most:
                best, most = child, same
        if best is not None:
            best.used = self._clock
        return best, most

    def known(self, tenant: str, ids: Sequence[int]) -> int:
        """How many blocks at the beginning of `ids` are in use by others, so that sharing them takes no room."""
        here, found = self._roots.get(tenant), 0
        while here is not None and (found + 1) * BLOCK <= len(ids):
            here = here.children.get(tuple(ids[found * BLOCK : (found + 1) * BLOCK]))
            if here is None or not self._uses[here.block]:
                break
            found += 1
        return found

    def add(self, tenant: str, parent: Node | None, key: tuple[int, ...], block: int) -> Node:
        """Put a block that was read below `parent` (None: at the beginning). Where the same tokens are there already,
        the caller, who uses `block`, uses that node's block from now on."""
        if parent is None:
            parent = self._roots.setdefault(tenant, Node(None, (), -1, tenant))
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = self._nodes[block] = Node(parent, key, block, tenant)
        elif node.block != block:
            self.share(node.block)
            self.drop(block)
        node.used = self._clock
        return node

    def forget(self) -> None:
        """Empty all trees: the weights have changed. No request may use a block."""
        for block in self._nodes:
            self._free.append(block)
        self._nodes, self._roots, self._old, self._idle = {}, {}, [], 0

    def _offer(self, node: Node) -> None:
        """This node can go, if it is the end of a prefix."""
        if not node.children:
            self._clock += 1
            heapq.heappush(self._old, (node.used, self._clock, node))

    def _evict(self) -> int | None:
        while self._old:
            used, _, node = heapq.heappop(self._old)
            if node.block < 0 or self._uses[node.block] or node.children:
                continue  # gone, in use, or no end any more: it is offered again when that changes
            if node.used != used:
                self._offer(node)
                continue
            block, node.block, parent = node.block, -1, node.parent
            del self._nodes[block]
            self._idle -= 1
            if parent is not None:
                del parent.children[node.key]
                if parent.parent is None and not parent.children:
                    del self._roots[node.tenant]
                elif parent.block >= 0 and not self._uses[parent.block]:
                    self._offer(parent)
            return block
        return None
