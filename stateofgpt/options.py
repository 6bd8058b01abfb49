"""How the words of a command are read: declared options, typed overrides, and mistakes told as our errors.

Owns: the argument parser and the kinds of values. Knows nothing of the verbs, nor of what an override sets.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any, NoReturn

from stateofgpt.config import suggestion
from stateofgpt.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Argparse whose mistakes are our errors, and whose verbs know which options they declared."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(**kwargs)
        self.declared: set[str] = {"--help"}
        self.flags: set[str] = {"--help"}

    def option(self, name: str, **kwargs: Any) -> None:
        self.declared.add(name)
        if kwargs.get("action") == "store_true":
            self.flags.add(name)
        self.add_argument(name, **kwargs)

    def closest(self, name: str) -> str:
        """`; did you mean "--port"?`, comparing what follows the dashes, or nothing."""
        return suggestion(name[2:], [known[2:] for known in self.declared]).replace('"', '"--', 1)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def take_overrides(arguments: list[str], parser: Parser) -> tuple[list[str], dict[str, str]]:
    """Split `--dotted.key value` and `--dotted.key=value` from the options that the verb declares itself."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    takes_overrides = parser.get_default("takes_overrides")
    queue = list(arguments)
    while queue:
        token = queue.pop(0)
        name, equals, value = token.partition("=")
        if token == "--":
            return [*rest, token, *queue], overrides
        if not name.startswith("--"):
            rest.append(token)
        elif name in parser.declared:
            rest.append(token)
            if not equals and queue and name not in parser.flags:
                rest[-1] = f"{name}={queue.pop(0)}"  # so that a prompt may begin with a dash
        elif not takes_overrides or ("." not in name and parser.closest(name)):
            known = ", ".join(sorted(parser.declared))
            raise ConfigError(f'unknown option "{name}"{parser.closest(name) or f"; there are {known}"}')
        elif not equals and (not queue or queue[0].startswith("--")):
            raise ConfigError(f"{name} needs a value")
        else:
            overrides[name[2:].replace("-", "_")] = value if equals else queue.pop(0)
    return rest, overrides


def number(kind: Callable[[str], Any], low: float, what: str, high: float = math.inf) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high or number == math.inf:
            raise argparse.ArgumentTypeError(f'must be {what}, not "{text}"')
        return number

    return convert


def _amount(text: str) -> float:
    """1e9, 7B, 1.4T, 300k: a number with the letter of a thousand, a million ..."""
    letters = {"k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    return float(text[:-1]) * letters[text[-1]] if text[-1:] in letters else float(text)


to_amount = number(_amount, 1e-6, "a number above 0, as 1e9, 7B or 1.4T")
to_share = number(float, 0.001, "a share, 0.001 to 1", 1.0)
to_seed = number(int, 0, "a whole number from 0", 2**63 - 1)
to_count = number(int, 1, "a whole number from 1")
to_minutes = number(float, 0.01, "a number of minutes")
to_temperature = number(float, 0.0, "a number from 0")
to_seconds = number(float, 0.0, "a number of seconds", 3600.0)
to_port = number(int, 0, "a port, 0 to 65535", 65535)


def to_text(text: str) -> str:
    """An argument's bytes as UTF-8: what is none becomes the replacement character, as in every other text."""
    return os.fsencode(text).decode("utf-8", "replace")
