"""Owns the demonstrations: how a good answer to each problem reads, tool calls and tool results included.

It knows nothing about tokens, files or how the tools are carried out; what a tool returns is written here from the
facts, and a test shows that the assistant's own tools return the same.
"""

from __future__ import annotations

import random
from typing import Any

from stateofgpt.data.skills import wordings
from stateofgpt.data.skills.arithmetic import worked
from stateofgpt.data.skills.facts import Field, find_state
from stateofgpt.data.skills.names import known_names
from stateofgpt.data.skills.problems import ARITHMETIC, Problem
from stateofgpt.text.chat import Conversation, Message, ToolCall


def demonstrate(problem: Problem, rng: random.Random, manner: str | None = None) -> Conversation:
    """The whole conversation: the question, the assistant's turns, the tools' answers.

    Arithmetic is answered in `manner` ("direct", "steps" or "tool"), else as the problem asks, else in any of the
    three that it can be answered in, with equal chances, as several people would.
    """
    user = Message("user", problem.question)
    if problem.skill in ARITHMETIC:
        return (user, *_arithmetic(problem, rng, manner))
    if problem.skill == "fact":
        state, name = problem.meta["state"], problem.meta["field"]
        return (user, *_lookup(state, name), Message("assistant", fact_sentence(state, name)))
    if problem.skill == "compare":
        return (user, *_compare(problem))
    return (user, Message("assistant", plain_answer(problem, rng)))


def plain_answer(problem: Problem, rng: random.Random, manner: str = "direct") -> str:
    """The answer in one text with no tool: what stands after "A:" in a pretraining document."""
    skill = problem.skill
    if skill in ARITHMETIC:
        if manner == "steps":
            return worked(problem.meta["a"], problem.meta["op"], problem.meta["b"])
        return f"{problem.answer}."
    if skill == "fact":
        return fact_sentence(problem.meta["state"], problem.meta["field"])
    if skill == "compare":
        name = problem.meta["field"]
        both = " ".join(fact_sentence(problem.meta[which], name) for which in ("first", "second"))
        return f"{both} {compare_sentence(problem.answer)}"
    if skill == "count":
        return f"There are {problem.answer}."
    if skill in wordings.LIST_ANSWERS:
        return wordings.LIST_ANSWERS[skill].format(l=problem.answer)
    if skill == "names":
        return rng.choice(wordings.NAME_ANSWERS).format(n=rng.choice(known_names()))
    if skill == "decline":
        return wordings.DECLINE[problem.meta["topic"]][2]
    free = {"greet": wordings.GREET_ANSWERS, "thanks": wordings.THANKS_ANSWERS, "identity": wordings.IDENTITY_ANSWERS}
    return rng.choice(free[skill])


def fact_sentence(state: str, field: Field) -> str:
    """One figure in words: "Ohio has 11799448 people." or "Ohio has 44826 square miles."."""
    return f"{state} has {_figure(state, field)} {'people' if field == 'population' else 'square miles'}."


def compare_sentence(ratio: str) -> str:
    """The answer of a comparison: "About 53.9 times."."""
    return f"About {ratio} times."


def manners_of(problem: Problem) -> tuple[str, ...]:
    """The manners an arithmetic problem can be answered in: written steps only for + and for - that stays above 0."""
    a, op, b = problem.meta["a"], problem.meta["op"], problem.meta["b"]
    return ("direct", "steps", "tool") if op == "+" or (op == "-" and a >= b) else ("direct", "tool")


def _arithmetic(problem: Problem, rng: random.Random, manner: str | None) -> Conversation:
    manner = manner or problem.meta.get("manner") or rng.choice(manners_of(problem))
    if manner != "tool":
        return (Message("assistant", plain_answer(problem, rng, manner)),)
    expression = f"{problem.meta['a']}{problem.meta['op']}{problem.meta['b']}"
    closing = Message("assistant", f"The answer is {problem.answer}.")
    return (*_call("calculator", {"expression": expression}, problem.answer), closing)


def _compare(problem: Problem) -> Conversation:
    name = problem.meta["field"]
    first, second = problem.meta["first"], problem.meta["second"]
    expression = f"{_figure(first, name)}/{_figure(second, name)}"
    return (
        *_lookup(first, name),
        *_lookup(second, name),
        *_call("calculator", {"expression": expression}, problem.answer),
        Message("assistant", compare_sentence(problem.answer)),
    )


def _lookup(state: str, field: Field) -> Conversation:
    return _call("lookup", {"name": state, "field": field}, _figure(state, field))


def _call(tool: str, arguments: dict[str, Any], result: str) -> Conversation:
    return Message("assistant", "", (ToolCall(tool, arguments),)), Message("tool", result)


def _figure(name: str, field: Field) -> str:
    state = find_state(name)
    if state is None:
        raise ValueError(f"{name} is no state of the table")
    return str(state.figure(field))
