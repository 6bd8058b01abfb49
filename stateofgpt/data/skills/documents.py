"""Owns the pretraining documents of skills: plain texts in which a base model meets what the assistant will be asked.

Questions and answers in blocks of one skill (so that a base model can be shown a few and continue), written additions
as exercises, tables of figures, lists of invented names, notes on the tools. Never chat markup, and only what belongs
to the split asked for. It knows nothing about tokens, files or mixtures.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from stateofgpt.data.skills.arithmetic import worked
from stateofgpt.data.skills.demonstrate import demonstrate, manners_of, plain_answer
from stateofgpt.data.skills.facts import FIELDS, STATES
from stateofgpt.data.skills.names import known_names
from stateofgpt.data.skills.problems import ARITHMETIC, Problem, Split, problem
from stateofgpt.text.chat import ToolCall

_BLOCK_SKILLS = (
    "arithmetic_direct",
    "arithmetic_steps",
    "arithmetic_steps",
    "fact",
    "compare",
    "copy",
    "reverse",
    "count",
    "sort",
    "names",
    "decline",
    "identity",
)

# Who asks and who answers in interviews, lessons and help pages: written in many ways, Q and A the commonest.
# The very words of the trick on the base model ("Human", "Helpful assistant") never stand together here.
_QA_SHARE = 0.6
_ASKING = ("Question", "User", "Student", "Visitor", "Human", "Customer", "Reader", "Traveller", "Child", "Guest")
_ANSWERING = ("answer", "assistant", "teacher", "guide", "librarian", "clerk", "robot", "editor", "host", "friend")
_KIND_OF = ("", "", "Kind ", "Patient ", "Friendly ", "Wise ", "Helpful ", "Old ", "Cheerful ")


def document(rng: random.Random, split: Split = "train") -> str:
    """One document of 50 to 1500 characters."""
    kinds: tuple[Callable[[random.Random, Split], str], ...] = (_block, _exercises, _table, _names, _small_talk, _notes)
    return rng.choices(kinds, (44, 20, 5, 9, 12, 10))[0](rng, split)


def question_and_answer(drawn: Problem, rng: random.Random) -> str:
    """The form that few-shot prompting continues: "Q: ...", and "A: ..." on the next line."""
    manner = "steps" if drawn.skill == "arithmetic_steps" else "direct"
    return f"Q: {drawn.question}\nA: {plain_answer(drawn, rng, manner)}"


def _speakers(rng: random.Random) -> tuple[str, str]:
    """Labels of one who asks and one who answers."""
    asks, answers = rng.choice(_ASKING), rng.choice(_KIND_OF) + rng.choice(_ANSWERING)
    if answers == "Helpful assistant":
        answers = "Answer"
    return asks, answers[0].upper() + answers[1:]


def _block(rng: random.Random, split: Split) -> str:
    skill = rng.choice(_BLOCK_SKILLS)
    n = rng.randint(2, 4) if skill == "arithmetic_steps" else rng.randint(3, 8)
    asks, answers = ("Q", "A") if rng.random() < _QA_SHARE else _speakers(rng)
    blocks = [question_and_answer(problem(skill, rng, split), rng) for _ in range(n)]
    return "\n\n".join(f"{asks}:{block[2:]}".replace("\nA:", f"\n{answers}:", 1) for block in blocks)


def _exercises(rng: random.Random, split: Split) -> str:
    """Written sums, one after another."""
    sums: list[str] = []
    wanted = rng.randint(2, 4)
    while len(sums) < wanted:
        drawn = problem(rng.choice(("arithmetic", "arithmetic_steps", "arithmetic_steps")), rng, split)
        if "steps" in manners_of(drawn):
            sums.append(worked(drawn.meta["a"], drawn.meta["op"], drawn.meta["b"]))
    return "\n\n".join(sums)


def _table(rng: random.Random, split: Split) -> str:
    """Figures of some states; a figure whose question is held out is left out, since it would give the answer away."""
    field = rng.choice(FIELDS)
    rows: dict[str, str] = {}
    for _ in range(rng.randint(8, 16)):
        drawn = problem("fact", rng, split)
        if drawn.meta["field"] == field:
            rows[drawn.meta["state"]] = drawn.answer
    title = "Population of the states in 2020" if field == "population" else "Area of the states in square miles"
    body = [f"{state.name}: {rows[state.name]}" for state in STATES if state.name in rows]
    return "\n".join([title, *body])


def _names(rng: random.Random, split: Split) -> str:
    names = rng.sample(known_names(), rng.randint(8, 30))
    heading = rng.choice(("Names of creatures", "Invented names", "Creatures of the forest", "Names of dragons"))
    if rng.random() < 0.3:
        return f"{heading}:\n" + "\n".join(f"{i}. {name}" for i, name in enumerate(names, 1))
    return f"{heading}: {', '.join(names)}."


def _small_talk(rng: random.Random, split: Split) -> str:
    """A conversation with somebody helpful: a greeting, some questions of any kind, thanks."""
    lines = []
    asks, answers = _speakers(rng)
    gap = rng.choice(("\n", "\n\n"))
    kinds = ("identity", "decline", "names", "fact", "count", "copy", "reverse")
    for skill in ("greet", *rng.sample(kinds, rng.randint(2, 4)), "thanks"):
        drawn = problem(skill, rng, split)
        lines.append(f"{asks}: {drawn.question}{gap}{answers}: {plain_answer(drawn, rng)}")
    return gap.join(lines)


def _notes(rng: random.Random, split: Split) -> str:
    """Who says what when tools are used: the words of a call, met before the first demonstration."""
    entries = []
    for _ in range(rng.randint(2, 4)):
        drawn = problem(rng.choice(("arithmetic_tool", "arithmetic_tool", "fact", "compare")), rng, split)
        shown = demonstrate(drawn, rng, "tool" if drawn.skill in ARITHMETIC else None)
        said = (f"{m.role}: {_written(m.tool_calls[0]) if m.tool_calls else m.content}" for m in shown)
        entries.append("\n".join(said))
    return "\n\n".join(entries)


def _written(call: ToolCall) -> str:
    pairs = ", ".join(f'"{name}": "{value}"' for name, value in call.arguments.items())
    return f'{{"name": "{call.name}", "arguments": {{{pairs}}}}}'
