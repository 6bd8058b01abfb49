"""Owns the check: whether a conversation ends in the right answer, and in which manner it got there.

It knows nothing about form, length or taste (the labeller's business), nor about models.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import Decimal
from typing import Literal

from stateofgpt.data.skills.arithmetic import COLUMN
from stateofgpt.data.skills.names import is_plausible_name, read_name
from stateofgpt.data.skills.problems import ARITHMETIC, Problem
from stateofgpt.text.chat import Conversation

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "greet": ("hello", "hi", "good", "hey"),
    "thanks": ("welcome",),
    "identity": ("assistant", "stateofgpt"),
    "decline": ("cannot know",),
}
_MOST_WORDS = 40


def new_messages(conversation: Conversation) -> Conversation:
    """The messages after the last one of the user: the assistant's turns and its tools' answers."""
    last_user = max((i for i, message in enumerate(conversation) if message.role == "user"), default=-1)
    return conversation[last_user + 1 :]


def final_text(conversation: Conversation) -> str:
    """What the last message says, if it is the assistant's and no tool call; else nothing."""
    last = conversation[-1] if conversation else None
    if last is None or last.role != "assistant" or last.tool_calls:
        return ""
    return last.content.strip()


def manner_of(conversation: Conversation) -> Literal["direct", "steps", "tool"]:
    """How the last question was answered: with a tool, by written columns, or directly."""
    answers = [message for message in new_messages(conversation) if message.role == "assistant"]
    if any(message.tool_calls for message in answers):
        return "tool"
    return "steps" if any(COLUMN.search(message.content) for message in answers) else "direct"


def stated_number(text: str, given: Collection[str] = ()) -> str | None:
    """The one number a text gives as its answer: that of its last line, which may repeat the `given` numbers.

    None where the last line gives no number or several different ones.
    """
    lines = text.strip().splitlines()
    if not lines:
        return None
    told = lines[-1].rpartition("=")[2]
    numbers = {found.replace(",", "") for found in _NUMBER.findall(told)}
    if len(numbers) > 1:
        numbers -= set(given)
    return numbers.pop() if len(numbers) == 1 else None


def is_right(problem: Problem, conversation: Conversation) -> bool:
    """Whether the last assistant message answers the problem, and in the manner asked for where one was asked for."""
    text = final_text(conversation)
    if not text:
        return False
    skill = problem.skill
    if skill in ARITHMETIC:
        asked = problem.meta.get("manner")
        given = (str(problem.meta["a"]), str(problem.meta["b"]))
        return stated_number(text, given) == problem.answer and asked in ("", None, manner_of(conversation))
    if skill in ("fact", "compare", "count"):
        return _last_number(text) == problem.answer
    if skill == "word_problem":
        told = _last_number(text)
        return told is not None and Decimal(told) == Decimal(problem.answer)
    if skill in ("copy", "reverse", "sort"):
        return _list_of(text) == [item.strip() for item in problem.answer.split(",")]
    if skill == "names":
        name = read_name(text)
        return name is not None and is_plausible_name(name)
    lowered = text.lower()
    short = len(text.split()) <= _MOST_WORDS
    words = _REQUIRED[skill]
    if skill == "greet":
        return short and lowered.startswith(words)
    return short and all(word in lowered for word in words)


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def _list_of(text: str) -> list[str]:
    listed = text.strip().rpartition(":")[2].strip().removesuffix(".")
    return [item.strip() for item in listed.split(",")]
