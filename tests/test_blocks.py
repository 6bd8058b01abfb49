"""The blocks of the cache and the trees of prefixes, against what they are for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stateofgpt.infer.blocks import Blocks
from stateofgpt.infer.cache import BLOCK


def written(blocks: Blocks, tenant: str, ids: list[int], content: dict[int, tuple[int, ...]]) -> list[int]:
    """Play one request that reads `ids`: share what is there, take and fill the rest. Returns its blocks."""
    path, node, fits = blocks.find(tenant, ids)
    for start, one in enumerate(path):
        assert content[one.block] == tuple(ids[start * BLOCK : (start + 1) * BLOCK])
        blocks.share(one.block)
    if node is not None:
        assert content[node.block][:fits] == tuple(ids[len(path) * BLOCK :][:fits]) and fits > 0
    own = [one.block for one in path]
    parent = path[-1] if path else None
    for start in range(len(path) * BLOCK, len(ids), BLOCK):
        block = blocks.take()
        if block is None:
            break
        key = tuple(ids[start : start + BLOCK])
        content[block] = key
        parent = blocks.add(tenant, parent, key, block)
        own.append(parent.block)
    return own


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), max_size=4), st.booleans()),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_what_is_found_is_what_was_read_and_every_block_has_one_owner_at_most(
    asked: list[tuple[str, list[int], bool]], count: int
) -> None:
    blocks = Blocks(count, keep=True)
    content: dict[int, tuple[int, ...]] = {}
    at_work: list[list[int]] = []
    for tenant, kinds, stays in asked:
        own = written(blocks, tenant, [kind * 7 + i for kind in kinds for i in range(BLOCK)] + [3], content)
        at_work.append(own)
        if not stays:
            while at_work:
                for block in reversed(at_work.pop()):
                    blocks.drop(block)
        used = {block for own in at_work for block in own}
        assert blocks.available == count - len(used)
    for own in at_work:
        for block in reversed(own):
            blocks.drop(block)
    taken = [blocks.take() for _ in range(count)]
    assert sorted(taken) == list(range(count)) and blocks.take() is None  # type: ignore[type-var]


def test_tenants_do_not_find_each_other() -> None:
    blocks, ids = Blocks(4, keep=True), list(range(20))
    for block in written(blocks, "a", ids, {}):
        blocks.drop(block)
    assert len(blocks.find("a", ids)[0]) == 1 and blocks.find("a", ids)[2] == 4
    assert blocks.find("b", ids) == ([], None, 0)
    blocks.forget()
    assert blocks.find("a", ids) == ([], None, 0) and blocks.available == 4
