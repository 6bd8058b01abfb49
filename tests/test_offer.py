"""An answer that may call somebody else's tools, phase by phase. The model is a script."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from scripted import ScriptedLoop, tokenizer

from stateofgpt.assistant.offer import MAX_CALLS, Caller, Offer, Tool, told
from stateofgpt.assistant.session import CallDelta, Done, TextDelta
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.text.chat import ChatFormat, Message
from stateofgpt.text.specials import TOOL_OPEN
from stateofgpt.text.tokenizer import Tokenizer

ASK = (Message("user", "weather?"),)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OFFER = Offer((Tool("weather", "The weather.", CITY),))


def call(city: str = "Bern", blank: str = " ") -> str:
    return f'{{"name":{blank}"weather",{blank}"arguments":{blank}{{"city":{blank}"{city}"}}}}'


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def foreign() -> Tokenizer:
    """One of another family, in whose vocabulary calls have no marks of their own."""
    from foreign import TEMPLATE, byte_level_tokenizer

    return Tokenizer(byte_level_tokenizer().to_str(), {"chat_template.jinja": TEMPLATE.encode()})


def run(
    loop: ScriptedLoop, offer: Offer = OFFER, constrained: bool = True, **params: Any
) -> tuple[str, list[Any], Any]:
    """The text, the calls (name, arguments as text), and the turn."""
    text, calls = "", []
    caller = Caller(loop, ChatFormat(loop.tokenizer), constrained=constrained)
    for event in caller.stream(ASK, SamplingParams(**{"max_tokens": 400, **params}), offer):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, CallDelta):
            if event.name is not None:
                assert event.index == len(calls)
                calls.append([event.name, ""])
            calls[event.index][1] += event.arguments
        elif isinstance(event, Done):
            assert not loop.open  # nothing is left in the engine
            return text, calls, event.turn
    raise AssertionError("there was no end")


def acts(loop: ScriptedLoop, *lines: str | None) -> None:
    """Let free speech say one line after another, None for a call's mark, and calls be calls."""
    mark, left = loop.tokenizer.tool_open, list(lines)

    def say(_: str, params: SamplingParams) -> Any:
        if params.constraint:
            return call(f"city {len(loop.asked)}")
        said: list[int] = []
        while left:
            line = left.pop(0)
            if line is None:
                opening = [mark] if mark is not None else loop.tokenizer.encode_after(TOOL_OPEN, special=True)
                return [*said, *opening, *loop.tokenizer.encode("more than was asked")]
            said += loop.tokenizer.encode_after(line, special=True)
        return [*said, loop.tokenizer.im_end]

    loop.say = say


@pytest.mark.parametrize("which", ["own", "foreign"])
def test_speech_and_calls_take_turns_in_either_kind_of_vocabulary(which: str, request: pytest.FixtureRequest) -> None:
    loop = ScriptedLoop(request.getfixturevalue(which))
    acts(loop, "Let me see. ", None, "And ", None, "Well.")
    text, calls, turn = run(loop)
    assert text == "Let me see. And Well." and turn.finish == "stop"
    assert [name for name, _ in calls] == ["weather", "weather"]
    assert all(set(json.loads(arguments)) == {"city"} for _, arguments in calls)
    assert [c.arguments for c in turn.messages[0].tool_calls] == [json.loads(arguments) for _, arguments in calls]
    second = loop.tokenizer.decode(loop.asked[2][0], skip_special=False)
    assert second.endswith("</tool_call>") and "Let me see. <tool_call>" in second and "more than" not in second


def test_one_call_is_enough_where_several_are_not_wanted(own: Tokenizer) -> None:
    loop = ScriptedLoop(own)
    acts(loop, None, None)
    assert len(run(loop, replace(OFFER, parallel=False))[1]) == 1


def test_a_model_that_calls_for_ever_is_stopped(own: Tokenizer) -> None:
    loop = ScriptedLoop(own)
    acts(loop, *([None] * 100))
    assert len(run(loop, max_tokens=4000)[1]) == MAX_CALLS
    assert len(run(loop, max_tokens=100)[1]) < MAX_CALLS  # or by its tokens


def test_a_call_cut_by_length_is_told_as_far_as_it_came_and_is_no_call(own: Tokenizer) -> None:
    loop = ScriptedLoop(own)
    acts(loop, None)
    text, calls, turn = run(loop, replace(OFFER, choice="required"), max_tokens=45)
    assert turn.finish == "length" and turn.messages[0].tool_calls == () and text == ""
    assert calls and '{"city"'.startswith(calls[0][1][:7]) and not calls[0][1].endswith("}}")


@pytest.mark.parametrize("blank", ["", " ", "\n  "])
def test_arguments_come_through_whatever_blanks_there_are(own: Tokenizer, blank: str) -> None:
    loop = ScriptedLoop(own, lambda _, __: call(r"B\u00e9\"rn}", blank) + blank)
    _, calls, turn = run(loop, replace(OFFER, choice="required"))
    assert json.loads(calls[0][1]) == {"city": 'Bé"rn}'} == turn.messages[0].tool_calls[0].arguments


def test_without_constraints_what_is_no_call_is_text(own: Tokenizer) -> None:
    opening, closing = own.tool_open, own.tool_close
    assert opening is not None and closing is not None
    good, bad = own.encode(call()), own.encode("{oops")
    said = [*own.encode("Hm. "), opening, *good, closing, opening, *bad, closing, own.im_end]
    text, calls, turn = run(ScriptedLoop(own, lambda _, __: said), constrained=False)
    assert text == "Hm. {oops" and calls == [["weather", '{"city": "Bern"}']] and turn.finish == "stop"


def test_definitions_of_two_tools_do_not_get_mixed_up() -> None:
    def tool(name: str, kind: str) -> Tool:
        reference = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": kind}}}
        return Tool(name, "", reference)

    schema = Offer((tool("f", "string"), tool("g", "integer"))).schema()
    for number, kind in enumerate(("string", "integer")):
        arguments = schema["anyOf"][number]["properties"]["arguments"]
        name = arguments["properties"]["a"]["$ref"].removeprefix("#/$defs/")
        assert schema["$defs"][name] == {"type": kind} and "$defs" not in arguments


@pytest.mark.parametrize(
    "parameters, closed",
    [
        ({"properties": {"a": {}}}, True),
        ({"properties": {"a": {}}, "additionalProperties": True}, False),
        ({"properties": {"a": {}}, "anyOf": [{}]}, False),
        ({}, False),
    ],
)
def test_arguments_that_were_not_declared_are_not_made_up(parameters: dict[str, Any], closed: bool) -> None:
    arguments = Offer((Tool("f", "", parameters),)).schema()["properties"]["arguments"]
    assert (arguments.get("additionalProperties") is False) == closed


def test_the_model_is_told_of_the_tools_once_and_keeps_its_system_message() -> None:
    alone = told(ASK, OFFER)
    assert [message.role for message in alone] == ["system", "user"] and '"weather"' in alone[0].content
    joined = told((Message("system", "Be brief."), *ASK), OFFER)
    assert [message.role for message in joined] == ["system", "user"] and joined[0].content.startswith("Be brief.")
    assert told(ASK, replace(OFFER, choice="none")) == ASK and told(ASK, Offer()) == ASK
