"""Packed rows hold whole conversations, and only the assistant's words are learned."""

from __future__ import annotations

import random
from pathlib import Path

import made_elsewhere
import numpy as np
import pytest

from stateofgpt.data.packing import Packed, Packer
from stateofgpt.data.skills import SKILLS, demonstrate, problem
from stateofgpt.text.chat import ChatFormat, Conversation, Message
from stateofgpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(iter(["What is 12 + 30? The answer is 42. user assistant tool calculator name"] * 20), 320)
CHAT = ChatFormat(TOKENIZER)


def draw(step: int, i: int) -> Conversation:
    rng = random.Random(f"{step} {i}")
    return demonstrate(problem(rng.choice(SKILLS), rng, "train"), rng)


def pack(context: int = 384, rows: int = 4, step: int = 0, source=draw) -> Packed:  # type: ignore[no-untyped-def]
    return Packer(CHAT, source, rows=rows, context=context, pad=TOKENIZER.pad).step(step)


def conversations_of(packed: Packed) -> list[tuple[list[int], list[float]]]:
    """(ids, weights of these ids) of every conversation, cut where documents begin and without padding."""
    out = []
    for ids, targets, weights in zip(packed.ids, packed.targets, packed.weights, strict=True):
        row, weight = [int(ids[0]), *targets.tolist()], [0.0, *weights.tolist()]
        starts = [at for at, number in enumerate(row) if number == TOKENIZER.eot]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            length = end - start
            while length and row[start + length - 1] == TOKENIZER.pad:
                length -= 1
            out.append((row[start : start + length], weight[start : start + length]))
    return out


@pytest.mark.parametrize("step", [0, 1, 7])
def test_every_conversation_lies_whole_in_one_row_with_its_own_mask(step: int) -> None:
    packed = pack(step=step)
    found = conversations_of(packed)
    assert len(found) == packed.conversations > 4 and packed.truncated == 0
    rendered = [CHAT.render(draw(step, i)) for i in range(200)]
    expected = {tuple(r.ids): [float(m) for m in r.loss_mask] for r in rendered}
    for ids, weights in found:
        assert weights == expected[tuple(ids)]
    assert len({tuple(ids) for ids, _ in found}) == len(found)  # none twice


def test_targets_are_the_next_ids_and_padding_weighs_nothing() -> None:
    packed = pack(rows=3)
    assert np.array_equal(packed.ids[:, 1:], packed.targets[:, :-1])
    assert packed.ids.shape == packed.targets.shape == packed.weights.shape == (3, 384)
    assert packed.ids.dtype == packed.targets.dtype == np.int64 and packed.weights.dtype == np.float32
    assert set(np.unique(packed.weights)) == {0.0, 1.0}
    assert not packed.weights[packed.targets == TOKENIZER.pad].any()
    for special in (TOKENIZER.eot, TOKENIZER.im_start):
        assert not packed.weights[packed.targets == special].any()


def test_only_assistants_are_learned_from() -> None:
    def silent(step: int, i: int) -> Conversation:
        return (Message("system", "Be brief."), Message("user", f"What is {i} + 1?"), Message("tool", "42"))

    packed = pack(source=silent)
    assert packed.conversations and not packed.weights.any()

    def spoken(step: int, i: int) -> Conversation:
        return (Message("user", "What is 1 + 1?"), Message("assistant", "two"), Message("user", "thanks"))

    packed = pack(source=spoken)
    learned = packed.targets[packed.weights > 0].tolist()
    answer = [*TOKENIZER.encode("two"), TOKENIZER.im_end]
    assert learned == answer * packed.conversations


def test_rows_are_a_function_of_the_step() -> None:
    packer = Packer(CHAT, draw, rows=2, context=256, pad=TOKENIZER.pad)
    first, second = packer.step(5), packer.step(6)
    again = packer.step(5)
    assert np.array_equal(first.ids, again.ids) and np.array_equal(first.weights, again.weights)
    assert not np.array_equal(first.ids, second.ids)


def test_a_conversation_longer_than_a_row_is_cut_and_counted() -> None:
    def long(step: int, i: int) -> Conversation:
        return (Message("user", "short"), Message("assistant", "word " * 500))

    packed = pack(context=64, rows=3, source=long)
    assert packed.conversations == packed.truncated == 3  # those that lie in a row, not those that found none
    whole = CHAT.render(long(0, 0))
    for ids, targets, weights in zip(packed.ids, packed.targets, packed.weights, strict=True):
        assert [int(ids[0]), *targets.tolist()] == whole.ids[:65]
        assert weights.tolist() == [float(m) for m in whole.loss_mask[1:65]]


def test_a_conversation_cut_before_its_answer_teaches_nothing() -> None:
    def late(step: int, i: int) -> Conversation:
        return (Message("user", "word " * 500), Message("assistant", "yes"))

    packed = pack(context=32, rows=2, source=late)
    assert packed.truncated == 2 and not packed.weights.any()


def test_a_row_that_is_filled_to_its_last_place_loses_nothing() -> None:
    talk = (Message("user", "a"), Message("assistant", "b"))
    length = len(CHAT.render(talk).ids)
    packed = pack(context=3 * length - 1, rows=2, source=lambda step, i: talk)
    assert packed.conversations == 6
    assert not (packed.targets == TOKENIZER.pad).any()
    assert packed.weights.sum() == 6 * sum(CHAT.render(talk).loss_mask)


def test_little_of_a_row_is_padding() -> None:
    packed = pack(rows=8)
    assert (packed.targets == TOKENIZER.pad).mean() < 0.15


def test_every_position_knows_where_its_conversation_begins_in_ours_by_the_token_between_documents() -> None:
    packed = pack()
    starts = np.where(packed.ids == TOKENIZER.eot, np.arange(384), 0)
    assert (packed.firsts == np.maximum.accumulate(starts, axis=1)).all() and packed.firsts.max() > 0


def test_a_conversation_is_not_cut_where_its_turns_end_with_the_token_between_documents(tmp_path: Path) -> None:
    folder = made_elsewhere.write(tmp_path, made_elsewhere.byte_level("<|endoftext|>"), eos_token="<|endoftext|>")
    tokenizer = Tokenizer.load(folder)
    talk = (Message("user", "Hi"), Message("assistant", "Hello."))
    length = len(ChatFormat(tokenizer).render(talk).ids)
    packed = Packer(ChatFormat(tokenizer), lambda step, i: talk, rows=1, context=2 * length, pad=tokenizer.pad).step(0)
    assert (packed.ids[0, :length] == tokenizer.eot).sum() == 2
    assert packed.firsts[0].tolist() == [0] * length + [length] * length
