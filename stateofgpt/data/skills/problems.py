"""Owns the problems: what may be asked of the assistant, the right answer, and which problems training never sees.

A problem belongs to the held-out split when the sha256 of its key falls in a tenth of all values. The key names what is
asked and not how, and all arithmetic skills share it: a sum held out for one manner of answering is held out for all.
Sums of two one-digit numbers are too few to hold any out; the talk's own comparison (California and Alaska) always is.

It knows nothing about answers in words, tools, models or files.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from stateofgpt.data.skills import wordings
from stateofgpt.data.skills.arithmetic import evaluate, expression_key, format_number
from stateofgpt.data.skills.facts import FIELDS, STATES, Field, find_state
from stateofgpt.errors import DataError

Split = Literal["train", "heldout"]

SKILLS: tuple[str, ...] = (
    "arithmetic",
    "arithmetic_direct",
    "arithmetic_steps",
    "arithmetic_tool",
    "fact",
    "compare",
    "copy",
    "reverse",
    "count",
    "sort",
    "names",
    "greet",
    "thanks",
    "identity",
    "decline",
)
ARITHMETIC = SKILLS[:4]

_ALWAYS_HELD_OUT = frozenset({"compare:Alaska|California"})
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is canonical ("5115", "fox, lamp") and empty where the answer is free; `key` names the
    problem whatever its wording; `meta` holds its parts (JSON values only)."""

    skill: str
    question: str
    answer: str
    key: str
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """The problem as a JSON object; `problem_from_json` reads it back."""
    return {
        "skill": problem.skill,
        "question": problem.question,
        "answer": problem.answer,
        "key": problem.key,
        "meta": dict(problem.meta),
    }


def problem_from_json(data: Mapping[str, Any]) -> Problem:
    """The problem of a JSON object written by `problem_to_json`; DataError where it is none."""
    texts = {name: data.get(name) for name in ("skill", "question", "answer", "key")}
    wrong = [name for name, value in texts.items() if not isinstance(value, str)]
    meta = data.get("meta", {})
    if wrong or not isinstance(meta, Mapping):
        raise DataError(f"a problem needs the text {wrong[0] if wrong else 'keys, and an object'!r} in {sorted(data)}")
    return Problem(**{name: str(value) for name, value in texts.items()}, meta=dict(meta))


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to: a pure function of its key."""
    if problem.key in _ALWAYS_HELD_OUT:
        return "heldout"
    if problem.skill in ARITHMETIC and max(problem.meta["a"], problem.meta["b"]) < 10:
        return "train"
    digest = hashlib.sha256(problem.key.encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0 else "train"


def problem(skill: str, rng: random.Random, split: Split) -> Problem:
    """A problem of `skill` from `split`, drawn with `rng` (the same draws give the same problem)."""
    make = _MAKERS.get(skill)
    if make is None:
        raise DataError(f"there is no skill {skill!r}; the skills are {', '.join(SKILLS)}")
    for _ in range(10_000):
        drawn = make(skill, rng)
        if split_of(drawn) == split:
            return drawn
    raise DataError(f"the skill {skill!r} has no problem in the split {split!r}; use train or heldout")


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _sum(rng: random.Random, op: str, least_digits: int) -> tuple[int, int]:
    """Operands of a sum: mostly three to five digits, the shorter one at most two digits shorter."""
    if op == "*":
        return _number(rng, rng.choice((1, 2, 3, 3, 4, 4))), _number(rng, rng.choice((1, 2, 2, 3, 3, 4)))
    if op == "/":
        divisor = rng.randrange(2, 100)
        return divisor * rng.randrange(2, 1000), divisor
    shares = (1, 3, 7, 10, 8) if op == "+" else (1, 3, 6, 8, 0)
    most = max(rng.choices((1, 2, 3, 4, 5), shares)[0], least_digits)
    other = max(least_digits, min(most, most - rng.choice((0, 0, 1, 2))), 1)
    a, b = _number(rng, most), _number(rng, other)
    if (op == "-" and b > a) or (op == "+" and rng.random() < 0.5):
        a, b = b, a
    return a, b


def _arithmetic(skill: str, rng: random.Random) -> Problem:
    manner = skill.partition("_")[2]
    if manner in ("direct", "steps"):  # the two manners are compared on the same sums
        op = "+"
    else:
        op = rng.choices("+-*/", (11, 4, 4, 1))[0]
    a, b = _sum(rng, op, 2 if manner in ("direct", "steps") else 1)
    gap = "" if rng.random() < 0.1 else " "
    question = rng.choice(wordings.PLAIN).format(e=f"{a}{gap}{op}{gap}{b}")
    if manner:
        question += " " + rng.choice(wordings.MANNERS[manner])
    meta = {"a": a, "op": op, "b": b, "manner": manner}
    return Problem(skill, question, format_number(evaluate(a, op, b)), expression_key(a, op, b), meta)


def _fact(skill: str, rng: random.Random) -> Problem:
    state = rng.choice(STATES)
    name = rng.choice(FIELDS)
    question = rng.choice(wordings.FACT[name]).format(s=state.name)
    meta = {"state": state.name, "field": name}
    return Problem(skill, question, str(state.figure(name)), f"fact:{state.name} {name}", meta)


def _compare(skill: str, rng: random.Random) -> Problem:
    while True:
        name = rng.choice(FIELDS)
        first, second = rng.sample(STATES, 2)
        if first.figure(name) < second.figure(name):
            first, second = second, first
        if first.figure(name) >= 1.2 * second.figure(name):
            return compare_problem(first.name, second.name, name, rng.choice(wordings.COMPARE[name]))


def compare_problem(first: str, second: str, name: Field, wording: str) -> Problem:
    """The comparison of two states by name, `first` being the larger; `wording` has the slots {a} and {b}."""
    a, b = find_state(first), find_state(second)
    if a is None or b is None:
        raise DataError(f"there is no state {(second if a else first)!r} in the table of the fifty states")
    answer = format_number(evaluate(a.figure(name), "/", b.figure(name)))
    key = "compare:" + "|".join(sorted((a.name, b.name)))
    meta = {"first": a.name, "second": b.name, "field": name}
    return Problem("compare", wording.format(a=a.name, b=b.name), answer, key, meta)


def _items(rng: random.Random, kind: str, n: int) -> list[str]:
    if kind == "numbers":
        return [str(x) for x in rng.sample(range(100), n)]
    return rng.sample(wordings.ITEMS if kind == "words" else "abcdefghijklmnopqrstuvwxyz", n)


def _list(skill: str, rng: random.Random) -> Problem:
    if skill == "sort":
        kind = rng.choice(("numbers", "numbers", "letters"))
        items = _items(rng, kind, rng.randint(3, 5))
        answer = sorted(items, key=int) if kind == "numbers" else sorted(items)
        wording = rng.choice(wordings.SORT[kind])
    elif skill == "count":
        kind = rng.choice(("words", "letters"))
        items = _items(rng, kind, rng.randint(2, 8))
        answer = [str(len(items))]
        wording = rng.choice(wordings.COUNT)
    else:
        kind = rng.choice(("words", "words", "letters", "numbers"))
        items = _items(rng, kind, rng.randint(3, 6) if skill == "copy" else rng.randint(3, 5))
        answer = items if skill == "copy" else items[::-1]
        wording = rng.choice(wordings.COPY if skill == "copy" else wordings.REVERSE)
    listed = ", ".join(items)
    return Problem(skill, wording.format(l=listed), ", ".join(answer), f"{skill}:{listed}", {"items": items})


def _free(skill: str, question: str, **meta: str) -> Problem:
    return Problem(skill, question, "", f"{skill}:{question.lower()}", meta)


def _names(skill: str, rng: random.Random) -> Problem:
    return _free(skill, rng.choice(wordings.NAMES).format(k=rng.choice(wordings.KINDS)))


def _greet(skill: str, rng: random.Random) -> Problem:
    return _free(skill, rng.choice(wordings.GREETINGS) + rng.choice(wordings.GREETING_TAILS))


def _thanks(skill: str, rng: random.Random) -> Problem:
    return _free(skill, rng.choice(wordings.THANKS) + rng.choice(wordings.THANKS_TAILS))


def _identity(skill: str, rng: random.Random) -> Problem:
    asked, head = rng.choice(wordings.IDENTITY), rng.choice(wordings.IDENTITY_HEADS)
    mark = "." if asked.endswith("yourself") else "?"
    if ":" in head:
        asked = asked[0].lower() + asked[1:]
    return _free(skill, head.format(q=asked) + mark)


def _decline(skill: str, rng: random.Random) -> Problem:
    topic = rng.choice(tuple(wordings.DECLINE))
    asked, slots, _ = wordings.DECLINE[topic]
    slot = rng.choice(slots)
    own = slot == "I"
    question = rng.choice(asked).format(x=slot, be="am" if own else "is", s="" if own else "s")
    return _free(skill, question, topic=topic)


_MAKERS: Mapping[str, Callable[[str, random.Random], Problem]] = MappingProxyType(
    {
        **dict.fromkeys(ARITHMETIC, _arithmetic),
        "fact": _fact,
        "compare": _compare,
        **dict.fromkeys(("copy", "reverse", "count", "sort"), _list),
        "names": _names,
        "greet": _greet,
        "thanks": _thanks,
        "identity": _identity,
        "decline": _decline,
    }
)
