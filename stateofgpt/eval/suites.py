"""Owns the held-out sets of problems, the ways to ask a model that was never taught to chat, and the counting.

The prompts for a base model are plain text: the question alone, a few examples before it, or a made-up transcript of a
helpful assistant that tricks the model into being one. It knows nothing about models, tokens or run folders.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from stateofgpt.data.skills import (
    Problem,
    compare_problem,
    is_plausible_name,
    is_right,
    known_names,
    plain_answer,
    problem,
)
from stateofgpt.data.skills.wordings import COMPARE
from stateofgpt.text.chat import Conversation, Message

# In no skill, so that the transcript shows what an assistant is and not how the answer goes.
_TRANSCRIPT = (
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What colour is grass?", "Grass is green."),
    ("Which day comes after Monday?", "Tuesday comes after Monday."),
)
_TURN = re.compile(r"\n\s*\n|\n\s*(?:Q|A|Human|Helpful assistant|user|assistant|tool)\s*:|<\|")


def suite(skill: str, n: int, seed: int) -> list[Problem]:
    """`n` held-out problems of a skill, different as long as there are enough; always the same for a seed.

    The first comparison is always the talk's: how many times as many people live in California as in Alaska.
    """
    rng = random.Random(f"suite {skill} {seed}")
    chosen: dict[str, Problem] = {}
    if skill == "compare" and n > 0:
        first = compare_problem("California", "Alaska", "population", COMPARE["population"][0])
        chosen[first.question] = first
    repeats: list[Problem] = []
    for _ in range(20 * n):
        if len(chosen) >= n:
            break
        drawn = problem(skill, rng, "heldout")
        if drawn.question in chosen:
            repeats.append(drawn)
        chosen.setdefault(drawn.question, drawn)
    return (list(chosen.values()) + repeats)[:n]


def conversation(problem: Problem) -> Conversation:
    """The problem as a chat: one message of the user."""
    return (Message("user", problem.question),)


def bare_prompt(problem: Problem) -> str:
    """The question alone: a base model is as likely to go on asking as to answer."""
    return f"{problem.question}\n"


def few_shot_prompt(skill: str, shots: int, problem: Problem, rng: random.Random) -> str:
    """`shots` training problems of the skill with answers, then the problem, ending in "A:"."""
    blocks: list[str] = []
    while len(blocks) < shots:
        shown = _train_problem(skill, rng)
        blocks.append(f"Q: {shown.question}\nA: {plain_answer(shown, rng, _manner(skill))}")
    return "\n\n".join([*blocks, f"Q: {problem.question}\nA:"])


def fake_transcript_prompt(problem: Problem) -> str:
    """A made-up conversation with a helpful assistant that ends where the assistant would answer the problem."""
    turns = [f"Human: {asked}\n\nHelpful assistant: {answer}" for asked, answer in _TRANSCRIPT]
    return "\n\n".join([*turns, f"Human: {problem.question}\n\nHelpful assistant:"])


def read_completion(text: str) -> Conversation:
    """What a base model answered: its continuation up to an empty line or the next turn."""
    answer = _TURN.split(text.strip(), maxsplit=1)[0]
    return (Message("assistant", answer.strip()),)


def score_suite(problems: Sequence[Problem], conversations: Sequence[Conversation]) -> dict[str, int]:
    """How many of the answers are right: {"right": ..., "n": ...}."""
    right = sum(is_right(asked, answer) for asked, answer in zip(problems, conversations, strict=True))
    return {"right": right, "n": len(problems)}


def name_list_prompt(rng: random.Random, shots: int = 5) -> str:
    """The beginning of a list of invented names, for a base model to go on with."""
    return "Names of creatures: " + ", ".join(rng.sample(known_names(), shots)) + ","


def read_names(text: str) -> list[str]:
    """The names of a continued list ("Velmora, Brakun, ..."); a last name that may have been cut is left out."""
    listed, end, _ = re.split(r"[\n]", text, maxsplit=1)[0].partition(".")
    names = [part.strip() for part in listed.split(",")]
    if not end:
        names = names[:-1]
    return [name for name in names if name]


def plausible_share(names: Sequence[str]) -> float:
    """The share of names that the grammar of names could have made; 0.0 where there are none."""
    return sum(map(is_plausible_name, names)) / len(names) if names else 0.0


def _train_problem(skill: str, rng: random.Random) -> Problem:
    return problem(skill, rng, "train")


def _manner(skill: str) -> str:
    return "steps" if skill == "arithmetic_steps" else "direct"
