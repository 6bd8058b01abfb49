"""From a constraint to a grammar, and a check of it in a process that may die of it.

Owns: `Constraint`, what llguidance makes of one, its limits, and the small program that tries a stranger's source under
limits of processor time and memory, which a library in our own process cannot be given (an intersection of two hundred
patterns took twenty gigabytes). Knows nothing of vocabularies and engines, and imports nothing heavy: the program
starts for every new source.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from stateofgpt.errors import ConfigError, ModelError

Kind = Literal["json_schema", "regex", "choice", "grammar", "json"]

LONGEST = 1 << 16  # characters of a source
CHOICES = 1000
SECONDS = 1.0  # of processor time for the check
MEMORY = 1 << 28  # bytes of addresses for the check, above what Python and the library have taken
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # or blanks go on for ever


@dataclass(frozen=True)
class Constraint:
    """`source` is a JSON Schema (object), a regular expression, a JSON list of strings of which one is to be chosen, or
    a grammar in llguidance's dialect of Lark; for "json", any JSON object, it is empty.
    """

    kind: Kind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"constraint is {self.kind!r}; there are {', '.join(get_args(Kind))}")
        if len(self.source) > LONGEST:
            raise ConfigError(f"the {self.kind} has {len(self.source):,} characters; {LONGEST:,} are the most")


def library() -> Any:
    """The package llguidance; ModelError where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise ModelError(
            "constrained answers need the package llguidance; install stateofgpt with its extra `constrained`"
        ) from error
    return llguidance


def matcher_of(constraint: Constraint, vocabulary: Any) -> Any:
    """llguidance's matcher for a vocabulary of its kind, at the beginning. ValueError where the source is wrong or too
    much, or nothing it allows could begin."""
    found = library()
    limits = found.LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,  # 1 to 2 kB each
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
    kind, source, make = constraint.kind, constraint.source, found.LLMatcher
    if kind in ("json_schema", "json"):
        grammar = make.grammar_from_json_schema(source if kind != "json" else '{"type": "object"}', overrides=_COMPACT)
    elif kind == "regex":
        grammar = make.grammar_from_regex(source)
    else:
        grammar = make.grammar_from_lark(source if kind == "grammar" else _one_of(source))
    made = make(vocabulary, grammar, log_level=0, limits=limits)
    if not made.is_error():
        made.compute_bitmask()
    if made.is_error():
        raise ValueError(made.get_error())
    return made


def _one_of(source: str) -> str:
    """A grammar for a JSON list of strings."""
    try:
        choices = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise ValueError("it must be a JSON list of strings, none of them empty")
    if len(choices) > CHOICES:
        raise ValueError(f"it has {len(choices):,} strings, {CHOICES:,} are the most")
    return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices)


# ---------------------------------------------------------------------------------------------------------- the check


def check(constraint: Constraint) -> None:
    """Try a source in a process of its own. ConfigError says what is wrong with it, or that it takes too much."""
    command = [sys.executable, "-m", "stateofgpt.infer.grammar", constraint.kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    source = constraint.source.encode("utf-8", errors="replace")
    try:
        done = subprocess.run(command, input=source, capture_output=True, timeout=10 * SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise too_much(constraint) from None
    if done.returncode == REFUSED:
        raise ConfigError(f"the {constraint.kind} cannot be used: {short(done.stdout.decode(errors='replace'))}")
    if done.returncode:
        raise too_much(constraint)


def too_much(constraint: Constraint) -> ConfigError:
    """What is said of a source that passed a limit."""
    return ConfigError(f"the {constraint.kind} takes over {SECONDS:g} s or too much memory to read; make it simpler")


def short(text: str) -> str:
    """The first line of what a library has to say."""
    lines: Sequence[str] = text.strip().splitlines() or ["it says no reason"]
    return lines[0][:200]


REFUSED = 3


class _Bytes:
    """The vocabulary of the check: every byte, and an end."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> int:
    """The program: the kind is its argument, the source its input. 0: good; REFUSED, with the reason printed."""
    found = library()
    vocabulary = found.LLTokenizer(found.TokenizerWrapper(_Bytes()))
    constraint = Constraint(sys.argv[1], sys.stdin.buffer.read().decode("utf-8"))  # type: ignore[arg-type]
    _limit()
    try:
        matcher_of(constraint, vocabulary)
    except Exception as error:  # of a library: whatever it is, the source was the reason
        print(short(str(error)))
        return REFUSED
    return 0


def _limit() -> None:
    """From here on the machine ends this process when it takes too much."""
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
    except (OSError, ValueError):
        pass  # where addresses cannot be counted, time alone is the limit


if __name__ == "__main__":
    sys.exit(main())
