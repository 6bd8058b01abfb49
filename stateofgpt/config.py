"""Frozen dataclasses as configuration: overrides from the command line, to and from plain JSON, and a fingerprint.

Owns: how a dotted key finds its field, how a string becomes the field's type, and what is refused. Knows nothing of any
particular configuration; those live beside their consumers.

    apply_overrides(recipe, {"pretrain.lr": "0.02", "pretrain.betas": "0.9,0.95"})
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from stateofgpt.errors import ConfigError

T = TypeVar("T")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the closest known name, or nothing."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # "lr" for "pretrain.lr"
        close = [candidate for candidate in known if name in candidate.split(".") or candidate.endswith("_" + name)][:1]
    return f'; did you mean "{close[0]}"?' if close else ""


# ---------------------------------------------------------------------------------------------------------- overrides


def apply_overrides(config: T, overrides: Mapping[str, str]) -> T:
    """A copy of `config` (a frozen dataclass) with dotted keys set from strings, each parsed by its field's type.

    The middle of a key may be left out where only one key fits: `pretrain.lr` for `pretrain.loop.optim.lr`.
    All overrides of one dataclass are applied together, so its `__post_init__` judges the final values.
    Raises ConfigError for an unknown key (with a suggestion) and for a value its field cannot take.
    """
    if not overrides:
        return config
    known = keys(config)
    whole: dict[str, str] = {}
    for key, text in overrides.items():
        full = _whole_key(key, known)
        if full in whole:
            raise ConfigError(f'the setting "{full}" is given twice')
        whole[full] = text
    return _apply(config, whole, prefix="", known=known)


def _whole_key(key: str, known: tuple[str, ...]) -> str:
    """The one known key with this beginning, this end and these parts in this order; `key` itself if there is none."""
    parts = key.split(".")
    if key in known or len(parts) < 2:
        return key
    fits = [k for k in known if k.split(".")[0] == parts[0] and k.split(".")[-1] == parts[-1] and _within(parts, k)]
    if len(fits) > 1:
        raise ConfigError(f'"{key}" could be {" or ".join(fits)}; say which')
    return fits[0] if fits else key


def _within(parts: list[str], key: str) -> bool:
    rest = iter(key.split("."))
    return all(part in rest for part in parts)  # `in` walks on from where the last part was found


def keys(config: object, prefix: str = "") -> tuple[str, ...]:
    """Every dotted key that can be overridden, in declaration order."""
    found: list[str] = []
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        inside = value if _is_config(value) else _default_of(hint)
        found += keys(inside, f"{prefix}{name}.") if inside is not None else [prefix + name]
    return tuple(found)


def _apply(config: T, overrides: Mapping[str, str], prefix: str, known: tuple[str, ...]) -> T:
    hints = _hints(type(config))
    nested: dict[str, dict[str, str]] = {}
    changes: dict[str, Any] = {}
    for key, text in overrides.items():
        head, dot, rest = key.partition(".")
        if head not in hints or (dot and not rest):
            full = prefix + key
            raise ConfigError(f'unknown setting "{full}"{suggestion(full, known) or _list(prefix, hints)}')
        if dot:
            nested.setdefault(head, {})[rest] = text
        else:
            changes[head] = parse(text, hints[head], prefix + key)
    for head, inner in nested.items():
        value = changes.get(head, getattr(config, head))
        if value is None:
            value = _default_of(hints[head])
        if not _is_config(value):
            full = f"{prefix}{head}.{next(iter(inner))}"
            raise ConfigError(f'unknown setting "{full}": "{prefix}{head}" is a single value{suggestion(full, known)}')
        changes[head] = _apply(value, inner, f"{prefix}{head}.", known)
    return cast(T, _build(lambda: replace(cast(Any, config), **changes), prefix, changes))


def parse(text: str, hint: Any, key: str) -> Any:
    """The string `text` as a value of type `hint`; ConfigError naming `key` when it cannot be one."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _parse_union(text, args, key)
    if origin is Literal:
        for choice in args:
            if text == str(choice):
                return choice
        names = [str(choice) for choice in args]
        raise ConfigError(f'{key} must be one of {", ".join(names)}, not "{text}"{suggestion(text, names)}')
    if origin is tuple:
        return _parse_tuple(text, args, key)
    if hint is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise ConfigError(f'{key} must be true or false, not "{text}"')
    if hint is int:
        return _parse_int(text, key)
    if hint is float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise ConfigError(f'{key} must be a number, not "{text}"')
        return number
    if hint is str:
        return text
    if hint is Path:
        return Path(text).expanduser()
    raise ConfigError(f"{key} cannot be set on the command line; set its parts ({key}.NAME VALUE) or write a recipe")


def _parse_union(text: str, args: tuple[Any, ...], key: str) -> Any:
    if type(None) in args and text.lower() in ("none", "null"):
        return None
    options = [arg for arg in args if arg is not type(None)]
    problem = ConfigError(f"{key} cannot be set on the command line")
    for option in options:
        try:
            return parse(text, option, key)
        except ConfigError as error:
            problem = error
    raise problem


def _parse_tuple(text: str, args: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.strip().strip("()[]").split(",")]
    parts = [part for part in parts if part]
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(parse(part, args[0], key) for part in parts)
    if len(parts) != len(args):
        raise ConfigError(f'{key} must be {len(args)} values with commas between them, not "{text}"')
    return tuple(parse(part, arg, key) for part, arg in zip(parts, args, strict=True))


def _parse_int(text: str, key: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)  # 2e6 is a fine way to write a count
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise ConfigError(f'{key} must be a whole number, not "{text}"')
    return int(number)


# ----------------------------------------------------------------------------------------------------- to and from JSON


def to_dict(config: object) -> dict[str, Any]:
    """The configuration as plain JSON values: paths as strings, tuples as lists. `from_dict` undoes it."""
    if not _is_config(config):
        raise TypeError(f"to_dict takes a dataclass instance, not {type(config).__name__}")
    return {field.name: _plain(getattr(config, field.name)) for field in fields(cast(Any, config)) if field.init}


def _plain(value: Any) -> Any:
    if _is_config(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a configuration holds plain values, not {type(value).__name__}")


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """The dataclass `cls` from plain JSON values. Unknown and missing keys, and wrong types, raise ConfigError."""
    return _read_config(cls, data, prefix="")


def _read_config(cls: type[T], data: Any, prefix: str) -> T:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or cls.__name__} must be a table of settings, not {data!r}")
    hints = _hints(cls)
    for key in data:
        if key not in hints:
            hint = suggestion(str(key), hints) or _list(prefix, hints)
            raise ConfigError(f'unknown setting "{prefix}{key}"{hint}')
    required = {f.name for f in fields(cast(Any, cls)) if f.default is MISSING and f.default_factory is MISSING}
    for name in hints:
        if name in required and name not in data:
            raise ConfigError(f'the setting "{prefix}{name}" is missing')
    values = {key: _read(hints[key], value, prefix + key) for key, value in data.items()}
    return cast(T, _build(lambda: cls(**values), prefix, values))


def _read(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return _read_config(cast(Any, hint), value, key + ".")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        problem = ConfigError(f"{key} cannot be {value!r}")
        for option in args:
            if option is not type(None):
                try:
                    return _read(option, value, key)
                except ConfigError as error:
                    problem = error
        raise problem
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_read(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
        if len(args) == len(value):
            return tuple(_read(arg, item, key) for arg, item in zip(args, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {name: _read(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    raise ConfigError(f"{key} must be {getattr(hint, '__name__', str(hint))}, not {value!r}")


def fingerprint(config: object) -> str:
    """sha256 (hex) of the configuration's canonical JSON: equal configurations, equal fingerprints."""
    data = config if isinstance(config, Mapping) else to_dict(config)
    text = json.dumps(_plain(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- details


def _is_config(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cast(Any, cls)) if field.init}


def _default_of(hint: Any) -> Any | None:
    """An instance of the one dataclass an optional field may hold, or None where there is no such default."""
    candidates = [arg for arg in (get_args(hint) or (hint,)) if is_dataclass(arg) and isinstance(arg, type)]
    if len(candidates) != 1 or get_origin(hint) not in (Union, types.UnionType):
        return None
    try:
        return candidates[0]()
    except TypeError:
        return None


def _build(make: Any, prefix: str, values: Mapping[str, Any]) -> Any:
    try:
        return make()
    except ValueError as error:  # a __post_init__ that refuses a value
        raise ConfigError(f"{prefix}{' and '.join(values)}: {error}") from error


def _list(prefix: str, hints: Mapping[str, Any]) -> str:
    names = ", ".join(hints)
    return f"; the settings {'of ' + prefix.rstrip('.') if prefix else 'here'} are {names}"
