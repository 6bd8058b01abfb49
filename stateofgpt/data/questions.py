"""Prompts of people's, from a file: what a policy is asked where no right answer is known.

Owns which rows hold a prompt, that none is asked twice, and which are held out. A row is `{"prompt": text or
messages}`, or `{"messages": [...]}`, whose prompt is all up to the last message of the user; a file of votes in any
form that is known gives the prompts that people voted on. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stateofgpt.data.comparisons import as_messages, as_prompt, checked_prompt
from stateofgpt.data.preferences import text_key
from stateofgpt.data.skills import Problem
from stateofgpt.data.tasks import FileTasks
from stateofgpt.data.vote_file import each_row, read_comparisons
from stateofgpt.data.votes import form_of
from stateofgpt.errors import DataError
from stateofgpt.text.chat import Conversation

SKILL = "prompt"  # a problem of this kind has no answer


def read_questions(path: Path | str) -> list[Conversation]:
    """The different prompts of a file, in its order. DataError where a row is wrong or there is none."""
    path = Path(path)
    found: dict[str, Conversation] = {}
    for place, row in each_row(path):
        if _is_vote(row):
            if found:
                raise DataError(f"{path}:{place}: this row is a vote, and those before it are prompts; divide the file")
            return _of_votes(path)
        try:
            prompt = _prompt(row)
        except DataError as failure:
            raise DataError(f"{path}:{place}: {failure}") from failure
        found.setdefault(text_key(prompt), prompt)
    if not found:
        raise DataError(f'{path} holds no prompts; each line is a JSON object as {{"prompt": "What is 2 + 2?"}}')
    return list(found.values())


def _is_vote(row: Any) -> bool:
    try:
        return isinstance(row, Mapping) and bool(form_of(row))
    except DataError:
        return False


def _prompt(row: Any) -> Conversation:
    if isinstance(row, DataError):
        raise row
    if "prompt" in row:
        prompt = as_prompt(row["prompt"])
    elif "messages" in row:
        messages = list(as_messages(row["messages"]))
        while messages and messages[-1].role != "user":
            messages.pop()
        prompt = checked_prompt(tuple(messages))
    else:
        raise DataError("the row has neither prompt nor messages")
    if prompt[-1].role != "user":
        raise DataError("the prompt does not end with a message of the user, so there is nothing to answer")
    return prompt


def _of_votes(path: Path) -> list[Conversation]:
    votes = read_comparisons(path)
    if 2 * votes.n_faults > votes.n_rows:
        raise DataError(f"more than half of the rows of {path} are no votes; the first: {votes.faults[0]}")
    found = {text_key(r.prompt): r.prompt for r in votes.rankings if r.prompt[-1].role == "user"}
    if not found:
        raise DataError(f"no prompt of {path} ends with a message of the user, so there is nothing to answer")
    return list(found.values())


class Questions(FileTasks):
    """Prompts as tasks without a check: every one once an epoch, in a fresh order; a tenth of them is held out."""

    def __init__(self, prompts: Sequence[Conversation], seed: int) -> None:
        self.prompts = {text_key(prompt): prompt for prompt in prompts}
        super().__init__([Problem(SKILL, p[-1].content, "", key) for key, p in self.prompts.items()], seed)

    def conversation(self, problem: Problem) -> Conversation:
        """What is asked."""
        return self.prompts[problem.key]

    def check(self, problem: Problem, messages: Conversation) -> float:
        raise DataError("a prompt of people's has no right answer that is known; let a reward model score it")
