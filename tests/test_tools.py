"""Tools: the calculator agrees with exact fractions, evaluates nothing, and no call ever raises."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest

from stateofgpt.assistant.tools import Toolbox, calculate
from stateofgpt.data.skills import STATES
from stateofgpt.text.chat import ToolCall


def ask(tool: str, /, **arguments: Any) -> str:
    return Toolbox().call(ToolCall(tool, arguments))


def test_the_calculator_agrees_with_exact_arithmetic() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b, c = (rng.randrange(1, 10_000) for _ in range(3))
        op = rng.choice("+-*")
        whole = {"+": a + b, "-": a - b, "*": a * b}[op]
        assert ask("calculator", expression=f"{a} {op} {b}") == str(whole)
        assert ask("calculator", expression=f"({a}{op}{b})*{c}/{c}") == str(whole)
        share = Fraction(a, b)
        got = Fraction(ask("calculator", expression=f"{a}/{b}"))
        assert abs(got - share) <= (Fraction(1, 20) if share >= 1 else Fraction(1, 200) * share)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("39538223/733391", "53.9"),
        ("39,538,223 / 733,391", "53.9"),
        ("4729*386 =", "1825394"),
        ("0386+1", "387"),
        ("0.1+0.2", "0.3"),
        ("-(2+3)*+4", "-20"),
        ("2 × 3 ÷ 4", "1.5"),
        ("1.50", "1.5"),
    ],
)
def test_the_calculator_reads_what_people_write(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "9**9**9**9", "1<<99", "__import__('os').system('true')", "True+1", "a+1", "[1]*9", "1e999", "0x10",
        "1j", "(" * 150, "-" * 199 + "1", "1" * 201, "9" * 60 + "*" + "9" * 60, "1/0", "1/(2-2)", "3 4", "1,2", "'1'",
        "1\x002", "1_000", "lambda: 1", "f'{1}'", "(1).real", "\ud800", "nan", "max(1,2)",
    ],
)  # fmt: skip
def test_anything_else_is_an_error_in_one_line(expression: str) -> None:
    answer = ask("calculator", expression=expression)
    assert answer.startswith("error: ") or expression.strip("-") == "1"
    assert "\n" not in answer and len(answer) < 160


def test_lookup_finds_every_state_whatever_the_case() -> None:
    for state in STATES:
        assert ask("lookup", name=state.name.upper(), field="population") == str(state.population_2020)
        assert ask("lookup", name=f" {state.name.lower()} ", field="Area") == str(state.area_sq_mi)


def test_lookup_suggests_the_state_that_was_meant() -> None:
    assert ask("lookup", name="Californa", field="area").endswith("did you mean California?")
    assert "fifty states" in ask("lookup", name="Mars", field="area")
    assert "population or area" in ask("lookup", name="Ohio", field="people")


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("invalid", {"text": "{"}),
        ToolCall("", {}),
        ToolCall("calculator", {}),
        ToolCall("calculator", {"expression": 3}),
        ToolCall("calculator", {"expression": "1", "more": 1}),
        ToolCall("lookup", {"name": ["Ohio"], "field": "area"}),
        ToolCall("lookup", {"name": None, "field": None}),
        ToolCall("calculator", {"expression": 10**5000}),
        ToolCall("calculator", None),  # type: ignore[arg-type]
    ],
)
def test_a_malformed_call_is_answered_and_never_raises(call: ToolCall) -> None:
    assert Toolbox().call(call).startswith("error: ")


def test_the_schemas_name_the_tools_and_cannot_be_changed_from_outside() -> None:
    toolbox = Toolbox()
    schemas = toolbox.schemas()
    assert [schema["function"]["name"] for schema in schemas] == list(toolbox.names) == ["calculator", "lookup"]
    schemas[0]["function"]["parameters"]["properties"].clear()
    assert toolbox.schemas()[0]["function"]["parameters"]["properties"]
