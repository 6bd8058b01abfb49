"""Suites: held out, repeatable, with the talk's question; prompts for a base model show only training problems."""

from __future__ import annotations

import random
import re

import pytest

from stateofgpt.data.skills import SKILLS, Problem, demonstrate, known_names, split_of
from stateofgpt.data.skills.arithmetic import expression_key
from stateofgpt.eval.suites import (
    bare_prompt,
    conversation,
    fake_transcript_prompt,
    few_shot_prompt,
    name_list_prompt,
    plausible_share,
    read_completion,
    read_names,
    score_suite,
    suite,
)
from stateofgpt.text.chat import Message


@pytest.mark.parametrize("skill", SKILLS)
def test_a_suite_is_held_out_repeatable_and_of_the_size_asked_for(skill: str) -> None:
    problems = suite(skill, 40, seed=0)
    assert len(problems) == 40 and problems == suite(skill, 40, seed=0) != suite(skill, 40, seed=1)
    assert {split_of(p) for p in problems} == {"heldout"}
    assert [conversation(p) for p in problems] == [(Message("user", p.question),) for p in problems]
    rng = random.Random(0)
    assert score_suite(problems, [demonstrate(p, rng) for p in problems]) == {"right": 40, "n": 40}
    assert score_suite(problems, [(Message("assistant", "Fish swim."),)] * 40) == {"right": 0, "n": 40}


def test_large_suites_do_not_repeat_themselves_and_the_talks_question_comes_first() -> None:
    assert len({p.question for p in suite("arithmetic", 300, 0)}) == 300
    first = suite("compare", 1, seed=9)[0]
    assert first.question == "How many times as many people live in California as in Alaska?"
    assert first.answer == "53.9" and suite("compare", 0, 0) == []


def test_few_shot_prompts_show_training_problems_and_end_where_the_answer_begins() -> None:
    (asked,) = suite("arithmetic_steps", 1, 0)
    text = few_shot_prompt("arithmetic_steps", 3, asked, random.Random(0))
    assert text.endswith(f"Q: {asked.question}\nA:") and text.count("Q: ") == 4 and text.count("The answer is") == 3
    shown = re.findall(r"Add (\d+) \+ (\d+):", text)
    for a, b in shown:
        key = expression_key(int(a), "+", int(b))
        assert split_of(Problem("arithmetic", "", "", key, {"a": int(a), "b": int(b)})) == "train"


@pytest.mark.parametrize("skill", SKILLS)
def test_the_fake_transcript_gives_nothing_away(skill: str) -> None:
    (asked,) = suite(skill, 1, 0)
    text = fake_transcript_prompt(asked)
    assert text.endswith(f"Human: {asked.question}\n\nHelpful assistant:") and text.count("Human:") == 4
    assert not re.search(r"\d", text.replace(asked.question, ""))
    assert bare_prompt(asked).strip() == asked.question


@pytest.mark.parametrize(
    ("continued", "answer"),
    [
        (" 5115.\n\nQ: What is 1 + 1?", "5115."),
        (" 5115.\nQ: more", "5115."),
        (" Add 1 + 1:\n1+1+0=2 carry 0\nThe answer is 2.\n\nHuman: more", None),
        ("\n\nGreen.\n\nHuman: x", "Green."),
        (" Green.\nHelpful assistant: x", "Green."),
        ("Yes.<|im_end|>", "Yes."),
        ("", ""),
        (" A: b", "A: b"),
    ],
)
def test_a_completion_is_cut_at_the_next_turn(continued: str, answer: str | None) -> None:
    (message,) = read_completion(continued)
    assert message.role == "assistant"
    assert message.content == ("Add 1 + 1:\n1+1+0=2 carry 0\nThe answer is 2." if answer is None else answer)


def test_lists_of_names_are_prompted_and_read() -> None:
    prompt = name_list_prompt(random.Random(0), shots=4)
    assert prompt.count(",") == 4 and set(prompt[20:-1].split(", ")) <= set(known_names())
    assert read_names(" Brakun, Thia, Ven") == ["Brakun", "Thia"]
    assert read_names(" Brakun, Thia.\nMore: Ven.") == ["Brakun", "Thia"]
    assert plausible_share(["Brakun", "Xqzt"]) == 0.5 and plausible_share([]) == 0.0
