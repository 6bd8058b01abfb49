"""Chat templates of other people, rendered in Jinja's sandbox within limits.

Owns: what a template may do (read the messages, no attributes of Python's, no files, no time), how long it may take and
how much it may write. Knows nothing of tokens, nor of what the messages are.

The limits count steps, not seconds, so that a slow machine gives the same answer as a fast one. No clock is offered
(`strftime_now`): a conversation would become other ids tomorrow. Templates have a date of their own for that case.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from stateofgpt.errors import CheckpointError, DataError

MAX_SOURCE = 200_000  # characters of a template
MAX_TEXT = 2_000_000  # characters of anything it makes
MAX_STEPS = 2_000_000  # lines of its compiled code
MAX_PAD = 10_000  # the widest field it may ask for
_NAME = "<template>"  # jinja's name for the code of a template without a file
_FILTERS_LEFT_OUT = ("center", "filesizeformat", "format", "pprint", "random", "urlize", "wordwrap", "xmlattr")
_GLOBALS_LEFT_OUT = ("lipsum", "cycler", "joiner")
_WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs")
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class Refusal(Exception):
    """A template's own `raise_exception`: it does not take this conversation."""


class TooMuch(SecurityError):
    """A template that goes beyond the limits."""


class ChatTemplate:
    """A compiled chat template. CheckpointError when it is no Jinja, or asks for what is not given."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"the chat template has {len(source):,} characters; at most {MAX_SOURCE:,} are read")
        self.source, self._variables = source, dict(variables)
        # `generation` marks what an assistant learns, for trainers that read it off the template; here it is a bracket
        plain = _GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", source)
        try:
            self._template = _Environment().from_string(plain)
        except (TemplateError, RecursionError, ValueError) as error:
            raise CheckpointError(f"the chat template cannot be read ({error}); put it right in its folder") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. DataError when the template refuses it, CheckpointError when it fails."""
        given = {**self._variables, "messages": [dict(one) for one in messages]}
        out: list[str] = []
        written = 0
        before = sys.gettrace()
        sys.settrace(_Steps())
        try:
            for part in self._template.generate(given, add_generation_prompt=add_generation_prompt):
                written += len(part)
                if written > MAX_TEXT:
                    raise TooMuch(f"it writes more than {MAX_TEXT:,} characters")
                out.append(part)
        except Refusal as refusal:
            raise DataError(f"the model's chat template does not take this conversation: {refusal}") from refusal
        except Exception as error:  # a template can fail in all ways in which Python can
            raise CheckpointError(f"the chat template fails ({type(error).__name__}: {error})") from error
        finally:
            sys.settrace(before)
        return "".join(out)


class _Steps:
    """A trace function that ends a template which runs for too long."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def __call__(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename == _NAME else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        self._left -= 1
        if self._left < 0:
            raise TooMuch(f"it takes more than {MAX_STEPS:,} steps")
        return self._line


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the names that chat templates use, in which nothing grows beyond MAX_TEXT."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        for name in _FILTERS_LEFT_OUT:
            self.filters.pop(name, None)
        for name in _GLOBALS_LEFT_OUT:
            self.globals.pop(name, None)
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded(made) for name, made in self.filters.items()}
        self.filters["join"] = _bounded(_join)
        self.filters["replace"] = _bounded(_replace)
        self.globals["raise_exception"] = _raise

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _PlusForTilde().visit(super()._parse(source, name, filename))
        return tree

    @staticmethod
    def concat(parts: Any) -> str:  # what a block that is set to a name is put together with
        return "".join(_limited(list(parts)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_small(left) and _small(right)):
            raise TooMuch("it works out a power of large numbers")
        if operator == "*" and (
            (_sized(left) and len(left) * abs(_whole(right)) > MAX_TEXT)
            or (_sized(right) and len(right) * abs(_whole(left)) > MAX_TEXT)
        ):
            raise TooMuch("it repeats a text too often")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        if operator == "+" and _sized(left) and _sized(right) and len(left) + len(right) > MAX_TEXT:
            raise TooMuch(f"it makes a text of more than {MAX_TEXT:,} characters")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str):
            if name in _WIDENING and any(abs(_whole(one)) > MAX_PAD for one in (*args, *kwargs.values())):
                raise TooMuch("it asks for a very wide field")
            if name in ("format", "format_map"):
                _check_format(owner)
            if name == "replace" and len(args) > 1:
                _check_replace(owner, str(args[0]), str(args[1]))
            if name == "join" and args:
                args = ([*_limited(list(args[0]), owner)],)
        return _checked(super().call(context, called, *args, **kwargs))


class _PlusForTilde(NodeTransformer):
    """`a ~ b` as `string(a) + string(b)`, which passes `call_binop`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = [nodes.Filter(one, "string", [], [], None, None, lineno=node.lineno) for one in node.nodes]
        whole: nodes.Expr = parts[0]
        for part in parts[1:]:
            whole = nodes.Add(whole, part, lineno=node.lineno)
        return whole


def _bounded(made: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(made)  # jinja marks filters that want its context by an attribute
    def filtered(*args: Any, **kwargs: Any) -> Any:
        return _checked(made(*args, **kwargs))

    return filtered


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and indent > 16:
        raise TooMuch("it asks for a very wide indent")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _join(value: Any, d: str = "", attribute: str | None = None) -> str:
    parts = [one if attribute is None else one[attribute] for one in value]
    return str(d).join(map(str, _limited(parts, str(d))))


def _replace(s: Any, old: str, new: str, count: int = -1) -> str:
    _check_replace(str(s), str(old), str(new))
    return str(s).replace(str(old), str(new), -1 if count is None else count)


def _check_replace(text: str, old: str, new: str) -> None:
    if len(text) + (text.count(old) if old else len(text) + 1) * len(new) > MAX_TEXT:
        raise TooMuch(f"it makes a text of more than {MAX_TEXT:,} characters")


def _check_format(text: str) -> None:
    if re.search(r"\d{5,}|\*", text):
        raise TooMuch("it asks for a very wide field")


def _limited(parts: list[Any], between: str = "") -> list[Any]:
    if sum(len(one) + len(between) for one in parts if _sized(one)) > MAX_TEXT:
        raise TooMuch(f"it makes a text of more than {MAX_TEXT:,} characters")
    return parts


def _checked(value: Any) -> Any:
    if _sized(value) and len(value) > MAX_TEXT:
        raise TooMuch(f"it makes a text of more than {MAX_TEXT:,} characters")
    return value


def _sized(value: Any) -> bool:
    return isinstance(value, (str, bytes, list, tuple))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _small(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= 1000


def _raise(message: str) -> None:
    raise Refusal(" ".join(str(message).split())[:300])
