"""Foreign chat templates: the ids of `transformers`, structure that no text can change, masks, and the sandbox."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import made_elsewhere as foreign
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_elsewhere import CHATML, INST, SMOL, THINKING, ZEPHYR

from stateofgpt.errors import CheckpointError, DataError
from stateofgpt.text.chat import INVALID, ChatFormat, Conversation, Message, ToolCall, message_to_json
from stateofgpt.text.sandbox import ChatTemplate
from stateofgpt.text.tokenizer import Tokenizer

TALK: Conversation = (
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris, of course."),
    Message("user", "  And of\n\nGermany? "),
)
CALL = ToolCall("calculator", {"expression": "1 + 1"})
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<|pad|>")


def qwen(folder: Path) -> Path:
    return foreign.write(
        folder, foreign.byte_level(*QWEN, modern=True), THINKING, eos_token="<|im_end|>", pad_token="<|pad|>"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("templates")
    return {
        "chatml": foreign.smol(root / "chatml"),
        "zephyr": foreign.llama(root / "zephyr", ZEPHYR),
        "inst": foreign.llama(root / "inst", INST),
        "first": foreign.llama(root / "first", INST, metaspace="first"),
        "always": foreign.llama(root / "always", ZEPHYR, metaspace="always"),
        "qwen": qwen(root / "qwen"),
        "none": foreign.smol(root / "none", None),
        "plain": foreign.write(root / "plain", foreign.byte_level("<|endoftext|>"), eos_token="<|endoftext|>"),
    }


@pytest.fixture(scope="module")
def chats(folders: dict[str, Path]) -> dict[str, ChatFormat]:
    return {name: ChatFormat(Tokenizer.load(folder)) for name, folder in folders.items()}


def text_of(chat: ChatFormat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids, skip_special=False, inner=True)


@pytest.mark.parametrize("name", ["chatml", "zephyr", "inst", "first", "always", "qwen"])
def test_conversations_have_the_ids_of_transformers(folders: dict[str, Path], name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folders[name]))
    chat = ChatFormat(Tokenizer.load(folders[name]))
    talks: list[Conversation] = [TALK[:1], TALK[:2], TALK, (*TALK, Message("assistant", "Berlin."))]
    if name not in ("inst", "first"):
        talks.append((Message("system", "Be brief."), *TALK))
    for talk in talks:
        for prompt in (True, False):
            messages = [message_to_json(message) for message in talk]
            wanted = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert chat.render(talk, add_generation_prompt=prompt).ids == wanted


@pytest.mark.parametrize("name", ["chatml", "zephyr", "inst", "first", "qwen", "none", "plain"])
def test_an_assistant_learns_what_it_has_to_write_and_nothing_else(chats: dict[str, ChatFormat], name: str) -> None:
    chat = chats[name]
    rendered = chat.render(
        (*TALK, Message("assistant", "b", (CALL,)), Message("tool", "2"), Message("assistant", "2."))
    )
    assert len(rendered.ids) == len(rendered.loss_mask)
    learned = text_of(chat, [n for n, on in zip(rendered.ids, rendered.loss_mask, strict=True) if on])
    end, n = chat.tokenizer.token_str(chat.end), "\n" if name == "qwen" else ""
    call = f'b<tool_call>{n}{{"name": "calculator", "arguments": {{"expression": "1 + 1"}}}}{n}</tool_call>'
    before, after = ("", "")
    if name in ("inst", "first"):
        before, after = " ", " "
    last = "<think>\n\n</think>\n\n2." if name == "qwen" else f"{before}2.{after}"
    assert learned == f"{before}Paris, of course.{after}{end}{before}{call}{after}{end}{last}{end}"


hostile = st.lists(
    st.sampled_from([*SMOL, "</s>", "<s>", "<unk>", "\n", " ", "[INST]", "<|user|>\n"]) | st.text(max_size=5),
    max_size=5,
).map("".join)


@st.composite
def dialogues(draw: st.DrawFn) -> Conversation:
    turns = draw(st.integers(1, 3))
    talk: list[Message] = []
    for _ in range(turns):
        talk += [Message("user", draw(hostile)), Message("assistant", draw(hostile))]
    return tuple(talk)


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dialogues())
def test_no_text_changes_the_structure(chats: dict[str, ChatFormat], talk: Conversation) -> None:
    for chat in chats.values():
        specials = chat.tokenizer.specials.keys()
        harmless = tuple(Message(message.role, "a") for message in talk)
        shape = [n for n in chat.render(harmless).ids if n in specials]
        assert [n for n in chat.render(talk).ids if n in specials] == shape


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dialogues(), hostile, hostile)
def test_what_was_sampled_stays_a_prefix(
    chats: dict[str, ChatFormat], past: Conversation, answer: str, question: str
) -> None:
    for name in ("chatml", "none", "zephyr", "plain"):
        chat = chats[name]
        assert not any("writes the past anew" in note for note in chat.notes)
        prompt = chat.render(past[:-1], add_generation_prompt=True).ids
        turn, new = Message("assistant", answer), (Message("user", question),)
        whole = chat.render((*past[:-1], turn, *new), add_generation_prompt=True).ids
        closed = chat.render((*past[:-1], turn)).ids
        closed = closed[: len(closed) - closed[::-1].index(chat.end)]
        assert closed[: len(prompt)] == prompt
        assert closed + chat.continuation(new) == whole


def test_a_template_that_rewrites_the_past_says_so_and_goes_on_within_a_turn(chats: dict[str, ChatFormat]) -> None:
    chat = chats["qwen"]
    assert any("writes the past anew" in note for note in chat.notes)
    results = (Message("tool", "2"), Message("tool", "3"))
    assert text_of(chat, chat.continuation(results)) == (
        "\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_roles_a_template_does_not_know_go_where_they_are_read(chats: dict[str, ChatFormat]) -> None:
    chat = chats["inst"]
    assert any("no system messages" in note for note in chat.notes) and any("no tools" in note for note in chat.notes)
    talk = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "", (CALL,)))
    ids = chat.render((*talk, Message("tool", "2"), Message("tool", "3")), add_generation_prompt=True).ids
    text = text_of(chat, ids)
    assert text.startswith("<s> [INST] Be brief.\n\nHi [/INST] <tool_call>")
    assert text.endswith("</s><s> [INST] 2\n3 [/INST]")
    assert not any("no tools" in note for note in chats["chatml"].notes)
    with pytest.raises(DataError, match="must alternate"):
        chat.render((Message("user", "a"), Message("user", "b")))


def test_without_a_template_chatml_or_the_end_token_is_taken_and_the_reader_is_told(
    chats: dict[str, ChatFormat],
) -> None:
    assert any("ChatML is taken" in note for note in chats["none"].notes)
    prompt = chats["none"].render(TALK[:1], add_generation_prompt=True).ids
    assert text_of(chats["none"], prompt) == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = chats["plain"]
    assert any("named by their roles" in note for note in plain.notes)
    assert text_of(plain, plain.render(TALK[:2]).ids) == (
        "user:\nWhat is the capital of France?<|endoftext|>\nassistant:\nParis, of course.<|endoftext|>\n"
    )


# ------------------------------------------------------------------------------------------------------ sampled turns


@pytest.mark.parametrize("name", ["chatml", "zephyr", "inst", "first", "always", "qwen", "plain"])
def test_a_turn_is_read_and_heard_as_it_was_written(chats: dict[str, ChatFormat], name: str) -> None:
    chat = chats[name]
    for turn in (
        Message("assistant", "Grüße, 你好."),
        Message("assistant", "So:", (CALL, CALL)),
        Message("assistant", ""),
    ):
        rendered = chat.render((TALK[0], turn, TALK[2]))
        ids = [n for n, on in zip(rendered.ids, rendered.loss_mask, strict=True) if on]
        read = chat.parse([*ids, *chat.tokenizer.encode("not read")])
        assert (read.content.rstrip("\n"), read.tool_calls) == (turn.content, turn.tool_calls)
        speech = chat.speech()
        heard = "".join(map(speech.hear, ids)) + speech.end()
        assert heard.strip() == turn.content


def test_marks_that_are_text_are_read_from_sampled_ids_only_and_never_half_shown(chats: dict[str, ChatFormat]) -> None:
    chat = chats["chatml"]
    said = 'a <tool<tool_call>{"name": "x", "arguments": {}}</tool_call> b </tool_call> <tool_call>{"na'
    ids = chat.tokenizer.encode(said)
    message = chat.parse(ids)
    assert message.content == "a <tool b </tool_call> "
    assert message.tool_calls == (ToolCall("x", {}), ToolCall(INVALID, {"text": '{"na'}))
    speech = chat.speech()
    shown = [speech.hear(n) for n in ids]
    assert not any("<tool_call" in text for text in shown)
    assert "".join(shown) + speech.end() == message.content
    tool_text = chat.render((TALK[0], Message("assistant", "", (CALL,)), Message("tool", said)))
    assert sum(tool_text.loss_mask) < len(tool_text.ids) - len(ids)


# ----------------------------------------------------------------------------------------------------------- sandbox

ENDLESS = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
LISTS = "{% set l = range(9999) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = <> %}{% endfor %}{{ ns.x }}"
HARMFUL = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "endless": ENDLESS,
    "endless over lists": LISTS,
    "power": "{{ 9 ** 9 ** 9 }}",
    "repetition": "{{ 'a' * 10 ** 3 * 10 ** 3 * 10 ** 3 }}",
    "tilde": DOUBLING.replace("<>", "ns.x ~ ns.x"),
    "plus": DOUBLING.replace("<>", "ns.x + ns.x"),
    "join": DOUBLING.replace("<>", "[ns.x, ns.x] | join"),
    "join method": DOUBLING.replace("<>", "'b'.join([ns.x, ns.x])"),
    "replace": DOUBLING.replace("<>", "ns.x.replace('a', 'aa')"),
    "replace filter": DOUBLING.replace("<>", "ns.x | replace('a', 'aa')"),
    "block": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% endfor %}",
    "wide": "{{ 'a'.ljust(10 ** 9) }}",
    "format": "{{ '{:>999999999}'.format('a') }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "output": "{% for a in range(9999) %}{{ 'a' * 100000 }}{% endfor %}",
    "mutation": "{{ messages.append(1) }}",
    "failure": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_template_ends_soon_in_one_sentence(name: str) -> None:
    began = time.process_time()
    with pytest.raises(CheckpointError, match="chat template fails") as caught:
        ChatTemplate(HARMFUL[name], {}).render([{"role": "user", "content": "x"}])
    assert time.process_time() - began < 20 and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'a' | nothing }}", "{{ 'a' | center(9) }}", "{% include 'x' %}{% for %}"]
)
def test_a_template_that_is_no_jinja_or_asks_for_what_is_not_given_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate(source, {})


def test_a_template_has_what_templates_use() -> None:
    source = (
        "{%- generation -%}{{ {'a': [1, '<é>']} | tojson }}{%- endgeneration -%}"
        "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i ~ ',' }}{% endfor %}"
        "{{ strftime_now is defined }} {{ messages | length }} {{ bos_token }}"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render([{}]) == '{"a": [1, "<é>"]}0,1,False 1 <s>'


def broken() -> Iterator[tuple[str, str]]:
    yield "{{ messages[0].content }}", "leaves out"
    yield "{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token"
    yield "{{ 1 // 0 }}", "chat template"


@pytest.mark.parametrize(("template", "said"), list(broken()))
def test_a_template_without_an_end_of_turn_is_refused_in_one_sentence(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        ChatFormat(Tokenizer.load(foreign.smol(tmp_path, template)))
    assert "\n" not in str(caught.value)


def test_the_template_is_read_from_its_file_or_from_the_settings(tmp_path: Path) -> None:
    folder = foreign.smol(
        tmp_path / "a", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    )
    assert ChatFormat(Tokenizer.load(folder)).template == CHATML
    (folder / "chat_template.jinja").write_text(CHATML.replace("helpful", "curt"))
    chat = ChatFormat(Tokenizer.load(folder))
    assert "curt" in text_of(chat, chat.render(TALK).ids)
