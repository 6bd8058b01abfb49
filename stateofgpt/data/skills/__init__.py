"""The skills: generated problems with known answers, their demonstrations, their texts, and the check of an answer.

Everything is drawn from a `random.Random` that the caller seeds. Knows nothing about tokens, files, tools or models.
"""

from __future__ import annotations

from stateofgpt.data.skills.arithmetic import COLUMN
from stateofgpt.data.skills.check import final_text, is_right, manner_of, new_messages, stated_number
from stateofgpt.data.skills.demonstrate import demonstrate, manners_of, plain_answer
from stateofgpt.data.skills.documents import document
from stateofgpt.data.skills.facts import STATES, State, find_state
from stateofgpt.data.skills.names import is_new_name, is_plausible_name, known_names, read_name
from stateofgpt.data.skills.problems import (
    SKILLS,
    Problem,
    Split,
    compare_problem,
    problem,
    problem_from_json,
    problem_to_json,
    split_of,
)

__all__ = [
    "COLUMN",
    "SKILLS",
    "STATES",
    "Problem",
    "Split",
    "State",
    "compare_problem",
    "demonstrate",
    "document",
    "final_text",
    "find_state",
    "is_new_name",
    "is_plausible_name",
    "is_right",
    "known_names",
    "manner_of",
    "manners_of",
    "new_messages",
    "plain_answer",
    "problem",
    "problem_from_json",
    "problem_to_json",
    "read_name",
    "split_of",
    "stated_number",
]
