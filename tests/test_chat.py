"""The chat format: structure that no text can change, masks, and agreement with its Jinja twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stateofgpt.errors import DataError
from stateofgpt.text.chat import (
    CHAT_TEMPLATE,
    INVALID,
    ROLES,
    ChatFormat,
    Conversation,
    Message,
    ToolCall,
    message_from_json,
    message_to_json,
)
from stateofgpt.text.tokenizer import SPECIALS, Tokenizer

TOKENIZER = Tokenizer.train(
    ["What is the capital of user assistant system tool? Hello, there.\n1 2 3 + - {}"] * 50, 400
)
CHAT = ChatFormat(TOKENIZER)
CALCULATOR = ToolCall("calculator", {"expression": "4729 + 386"})
TALK: Conversation = (
    Message("system", "You are brief."),
    Message("user", "What is 4729 + 386?"),
    Message("assistant", "Let me see.", (CALCULATOR, ToolCall("lookup", {"name": "Köln", "field": "population"}))),
    Message("tool", "5115"),
    Message("tool", "1073096"),
    Message("assistant", "5115"),
    Message("user", "Thanks\nMany"),
)
AS_TEXT = """<|endoftext|><|im_start|>system
You are brief.<|im_end|>
<|im_start|>user
What is 4729 + 386?<|im_end|>
<|im_start|>assistant
Let me see.<tool_call>{"name": "calculator", "arguments": {"expression": "4729 + 386"}}</tool_call>\
<tool_call>{"name": "lookup", "arguments": {"name": "Köln", "field": "population"}}</tool_call><|im_end|>
<|im_start|>tool
5115<|im_end|>
<|im_start|>tool
1073096<|im_end|>
<|im_start|>assistant
5115<|im_end|>
<|im_start|>user
Thanks
Many<|im_end|>
<|im_start|>assistant
"""

hostile_text = st.lists(
    st.sampled_from([*SPECIALS, "<|im_start|>system\n", "<|im_", "end|>", "\n", " ", "assistant\n"])
    | st.text(max_size=8),
    max_size=6,
).map("".join)
calls = st.builds(ToolCall, hostile_text, st.dictionaries(hostile_text, hostile_text | st.integers(), max_size=2))
messages = st.builds(Message, st.sampled_from(ROLES), hostile_text) | st.builds(
    Message, st.just("assistant"), hostile_text, st.lists(calls, max_size=2).map(tuple)
)
conversations = st.lists(messages, max_size=5).map(tuple)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment `transformers` renders templates in."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return made


def test_a_conversation_reads_as_documented() -> None:
    rendered = CHAT.render(TALK, add_generation_prompt=True)
    assert TOKENIZER.decode(rendered.ids, skip_special=False) == AS_TEXT
    assert len(rendered.ids) == len(rendered.loss_mask)


def test_only_what_the_assistant_says_and_its_end_is_learned() -> None:
    rendered = CHAT.render(TALK)
    learned = [number for number, on in zip(rendered.ids, rendered.loss_mask, strict=True) if on]
    text = TOKENIZER.decode(learned, skip_special=False)
    assert text == AS_TEXT.split("assistant\n")[1].split("\n")[0] + "5115<|im_end|>"
    assert sum(CHAT.render((Message("user", "hi"),), add_generation_prompt=True).loss_mask) == 0


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(conversations)
def test_no_text_changes_the_structure_of_roles(conversation: Conversation) -> None:
    ids = CHAT.render(conversation).ids
    calls_in = [call for message in conversation for call in message.tool_calls]
    assert ids.count(TOKENIZER.eot) == 1 and ids[0] == TOKENIZER.eot
    assert ids.count(TOKENIZER.im_start) == ids.count(TOKENIZER.im_end) == len(conversation)
    assert ids.count(TOKENIZER.tool_open) == ids.count(TOKENIZER.tool_close) == len(calls_in)
    assert TOKENIZER.pad not in ids
    starts = [place for place, number in enumerate(ids) if number == TOKENIZER.im_start]
    for start, message in zip(starts, conversation, strict=True):
        header = TOKENIZER.encode(message.role + "\n")
        assert ids[start + 1 : start + 1 + len(header)] == header


@settings(deadline=None)
@given(st.lists(messages.filter(lambda message: message.role == "assistant"), min_size=1, max_size=3))
def test_parse_gives_back_what_was_rendered(turns: list[Message]) -> None:
    for message in turns:
        rendered = CHAT.render((message,))
        body = [number for number, on in zip(rendered.ids, rendered.loss_mask, strict=True) if on]
        assert CHAT.parse(body) == message
        if not message.tool_calls:
            assert CHAT.parse(body[:-1]) == message


@pytest.mark.slow
@settings(deadline=None)
@given(conversations, messages.filter(lambda message: message.role == "assistant"), conversations)
def test_continuation_is_what_render_has_at_that_place(past: Conversation, turn: Message, new: Conversation) -> None:
    prompt = CHAT.render(past, add_generation_prompt=True).ids
    whole = CHAT.render((*past, turn, *new), add_generation_prompt=True).ids
    closed = CHAT.render((*past, turn)).ids[: -len(TOKENIZER.encode("\n"))]
    assert closed[: len(prompt)] == prompt
    assert closed[-1] == TOKENIZER.im_end
    assert closed + CHAT.continuation(new) == whole


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"name": "x"}',
        '{"name": 1, "arguments": {}}',
        '{"name": "x", "arguments": "y"}',
        '{"name": "x", "arguments": {"a": NaN}}',
        "[" * 100_000,
        '{"name": "x", "arguments": {"a": ' + "9" * 10_000 + "}}",
    ],
)
def test_a_malformed_call_keeps_the_content_and_is_named_invalid(text: str) -> None:
    ids = [*TOKENIZER.encode("So: "), TOKENIZER.tool_open, *TOKENIZER.encode(text), TOKENIZER.tool_close]
    message = CHAT.parse([*ids, TOKENIZER.im_end, *TOKENIZER.encode("not read")])
    assert message == Message("assistant", "So: ", (ToolCall(INVALID, {"text": text}),))


def test_a_call_that_was_cut_short_is_invalid_even_if_it_reads_well() -> None:
    text = '{"name": "calculator", "arguments": {}}'
    message = CHAT.parse([TOKENIZER.tool_open, *TOKENIZER.encode(text)])
    assert [call.name for call in message.tool_calls] == [INVALID]


@settings(deadline=None)
@given(st.lists(st.integers(-2, 500), max_size=40))
def test_any_ids_at_all_parse(ids: list[int]) -> None:
    assert CHAT.parse(ids).role == "assistant"


def as_template_input(conversation: Conversation) -> list[dict[str, Any]]:
    return [message_to_json(message) for message in conversation]


def test_the_jinja_template_says_the_same() -> None:
    template = environment().from_string(CHAT_TEMPLATE)
    assert template.render(messages=as_template_input(TALK), add_generation_prompt=True) == AS_TEXT
    unpacked = as_template_input(TALK)
    for message in unpacked:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    assert template.render(messages=unpacked, add_generation_prompt=True) == AS_TEXT
    bare = [{"role": "assistant", "content": None}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert template.render(messages=bare) == (
        "<|endoftext|><|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_transformers_apply_chat_template_gives_our_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for conversation in (TALK, TALK[1:2], (Message("user", "1 + 1 = ?\n\nThink."), Message("assistant", "2"))):
        for prompt in (True, False):
            ids = theirs.apply_chat_template(
                as_template_input(conversation), add_generation_prompt=prompt, return_dict=False
            )
            assert ids == CHAT.render(conversation, add_generation_prompt=prompt).ids


@settings(deadline=None)
@given(messages)
def test_messages_survive_the_json_of_openai(message: Message) -> None:
    assert message_from_json(json.loads(json.dumps(message_to_json(message)))) == message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "JSON object"),
        ({"role": "robot", "content": "x"}, "role"),
        ({"content": "x"}, "role"),
        ({"role": ["user"], "content": "x"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": 3}, "content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content"),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "list"),
        ({"role": "assistant", "tool_calls": [3]}, "tool call"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": [1]}}]}, "object"),
    ],
)
def test_a_message_of_the_wrong_shape_is_refused_with_the_reason(data: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        message_from_json(data)
