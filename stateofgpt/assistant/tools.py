"""Owns the tools of the assistant: a calculator and a look-up of the fifty states.

A tool never raises out of `Toolbox.call`: what goes wrong is its answer, "error: ...", so that the model can read it.
It knows nothing about models, sessions or how a call is written as tokens.
"""

from __future__ import annotations

import ast
import copy
import difflib
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from stateofgpt.data.skills.arithmetic import format_number
from stateofgpt.data.skills.facts import STATES, find_state
from stateofgpt.errors import ToolError
from stateofgpt.text.chat import ToolCall

MAX_EXPRESSION = 200  # characters
MAX_BITS = 400  # of any numerator or denominator on the way: about 120 digits
MAX_DIGITS = 60  # of a result

_SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-"})  # times, division and minus signs
_FIELDS = ("population", "area")
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Works out an expression of numbers with + - * / and brackets.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": 'for example "4729*386"'}},
                "required": ["expression"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "The population (2020 census) or the area (square miles) of a state of the USA.",
            "parameters": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "description": "the state, for example Ohio"},
                    "field": {"type": "string", "enum": list(_FIELDS)},
                },
                "required": ["name", "field"],
                "additionalProperties": False,
            },
        },
    },
)


class Toolbox:
    """The tools an assistant may call, by name. Holds no state: one may serve any number of sessions."""

    def __init__(self) -> None:
        self._tools: Mapping[str, Callable[[Mapping[str, Any]], str]] = MappingProxyType(
            {"calculator": _calculator, "lookup": _lookup}
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tools."""
        return tuple(self._tools)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools as OpenAI function schemas, new objects each time."""
        return copy.deepcopy(list(_SCHEMAS))

    def call(self, call: ToolCall) -> str:
        """What the tool answers: its result, or "error: ..." in one line. Never raises."""
        tool = self._tools.get(call.name)
        if tool is None:
            return f"error: there is no tool {_shown(call.name)}; the tools are {', '.join(self._tools)}"
        try:
            return tool(call.arguments)
        except ToolError as error:
            return f"error: {error}"
        except (ArithmeticError, ValueError, TypeError, RecursionError, MemoryError, AttributeError):
            return f"error: {call.name} cannot work on what it was given"


def calculate(expression: str) -> str:
    """The value of an expression of decimal numbers, + - * / and brackets: a whole number as it is, else one decimal.

    The expression is parsed and its tree walked; nothing is ever evaluated as code. ToolError says what is wrong.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ToolError(f"the expression has {len(expression)} characters; the calculator takes {MAX_EXPRESSION}")
    text = expression.translate(_SIGNS).strip().removesuffix("=").strip()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 39,538,223
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # 0386
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f"{_shown(expression)} is no expression of numbers with + - * / and brackets") from None
    result = format_number(_value(tree.body, text))
    if len(result) > MAX_DIGITS:
        raise ToolError(f"the result has more than {MAX_DIGITS} digits")
    return result


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            value = _number(ast.get_source_segment(text, node) or "")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = _value(operand, text)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            value = _value(left, text) + _value(right, text)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            value = _value(left, text) - _value(right, text)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            value = _value(left, text) * _value(right, text)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            divisor = _value(right, text)
            if divisor == 0:
                raise ToolError("division by zero")
            value = _value(left, text) / divisor
        case _:
            raise ToolError("the calculator knows numbers, + - * / and brackets only")
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ToolError("a number on the way is too large for the calculator")
    return value


def _number(source: str) -> Fraction:
    """A number from its own digits (so that 0.1 is a tenth); powers of ten would make it huge, and are refused."""
    if any(not (c.isascii() and c.isdigit()) and c != "." for c in source):
        raise ToolError(f"{_shown(source)} is no decimal number")
    try:
        return Fraction(Decimal(source))
    except InvalidOperation:
        raise ToolError(f"{_shown(source)} is no decimal number") from None


def _calculator(arguments: Mapping[str, Any]) -> str:
    (expression,) = _texts(arguments, "calculator", ("expression",))
    return calculate(expression)


def _lookup(arguments: Mapping[str, Any]) -> str:
    name, field = _texts(arguments, "lookup", ("name", "field"))
    field = field.strip().casefold()
    if field not in _FIELDS:
        raise ToolError(f"lookup has no field {_shown(field)}; use {' or '.join(_FIELDS)}")
    state = find_state(name)
    if state is None:
        known = {state.name.casefold(): state.name for state in STATES}
        near = difflib.get_close_matches(name.strip().casefold()[:40], known, n=1)
        hint = f"did you mean {known[near[0]]}?" if near else "lookup knows the fifty states of the USA"
        raise ToolError(f"there is no state {_shown(name)}; {hint}")
    return str(state.population_2020 if field == "population" else state.area_sq_mi)


def _texts(arguments: Mapping[str, Any], tool: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments, which must be exactly these and texts."""
    if set(arguments) != set(names):
        given = ", ".join(map(str, arguments)) or "nothing"
        raise ToolError(f"{tool} takes {' and '.join(names)}, not {_shown(given)}")
    values = tuple(arguments[name] for name in names)
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise ToolError(f"{tool} takes {name} as text, not {_shown(value)}")
    return values


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    return repr(text if len(text) <= 40 else text[:37] + "...")
