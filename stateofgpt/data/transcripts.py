"""Conversations written as one text, a speaker's name before each turn: how the Helpful-Harmless votes are published.

Owns how such a text is told from any other and taken apart. Knows nothing of files, votes or tokens.

    "\\n\\nHuman: What is 2 + 2?\\n\\nAssistant: 4."  ->  user "What is 2 + 2?", assistant "4."

A name counts only where a turn can begin: at the start of the text or after an empty line, with a colon.
"""

from __future__ import annotations

import re

from stateofgpt.errors import DataError
from stateofgpt.text.chat import Conversation, Message, Role

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant|System):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant", "System": "system"}


def is_transcript(text: object) -> bool:
    """Whether a value is a text that begins with the name of a speaker."""
    return isinstance(text, str) and _TURN.match(text) is not None


def read_transcript(text: str) -> Conversation:
    """The turns of a transcript, each without the white space around it; DataError when it does not begin with one."""
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise DataError('the text is no transcript; it must begin with "Human:" and have an empty line between turns')
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(
        Message(_ROLES[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
    )
