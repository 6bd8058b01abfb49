"""The simulated labeller: right beats wrong, the manner asked for counts, noise is seeded, ceilings are true."""

from __future__ import annotations

import math
import random

import pytest

from stateofgpt.data.skills import SKILLS, Problem, demonstrate, problem
from stateofgpt.data.skills.arithmetic import worked
from stateofgpt.rl.labeller import SimulatedLabeller, form_faults, noise_ceiling, pairs_of
from stateofgpt.text.chat import Conversation, Message, ToolCall

LABELLER = SimulatedLabeller(seed=1, noise=0.4)
SUM = Problem("arithmetic", "What is 4729 + 386?", "5115", "4729+386", {"a": 4729, "op": "+", "b": 386, "manner": ""})


def said(text: str) -> Conversation:
    return (Message("assistant", text),)


def called(name: str, result: str, text: str, **arguments: str) -> Conversation:
    return Message("assistant", "", (ToolCall(name, arguments),)), Message("tool", result), Message("assistant", text)


@pytest.mark.parametrize("skill", SKILLS)
def test_every_demonstration_is_scored_high_and_nonsense_low(skill: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        asked = problem(skill, rng, "train")
        good = demonstrate(asked, rng)[1:]
        assert form_faults(good) == ()
        assert LABELLER.score(asked, good) > 1.0
        assert -1.0 <= LABELLER.score(asked, said("fish fish fish fish fish")) < 0


def test_a_right_answer_beats_a_wrong_one_in_any_form() -> None:
    worst_right = LABELLER.score(SUM, said(worked(4729, "+", 386)))
    assert LABELLER.score(SUM, said("5116.")) < worst_right - 1
    assert LABELLER.prefer(SUM, said("5115"), said("5116.")) == 1.0
    assert LABELLER.prefer(SUM, said("5116."), said("5115.")) == 0.0
    assert LABELLER.prefer(SUM, said("5115."), said("5115.")) == 0.5


def test_between_right_answers_the_shorter_is_mildly_better() -> None:
    tool = called("calculator", "5115", "The answer is 5115.", expression="4729+386")
    steps, short = said(worked(4729, "+", 386)), said("5115.")
    assert LABELLER.score(SUM, short) > LABELLER.score(SUM, tool) > LABELLER.score(SUM, steps) > 1.0


def test_the_manner_asked_for_is_respected() -> None:
    asked = Problem("arithmetic_steps", "", "5115", "", {**SUM.meta, "manner": "steps"})
    shown = LABELLER.score(asked, said(worked(4729, "+", 386)))
    assert shown > LABELLER.score(asked, said("5115.")) > LABELLER.score(asked, said("5116."))


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (said(""), "no answer"),
        ((), "no answer"),
        (said("5115"), "no full stop"),
        (said("well 5115."), "no beginning"),
        (said("5115.\n5115."), "repetition"),
        (said("yes yes yes yes 5115."), "repetition"),
        (said("5115.\nHuman: more."), "markup"),
        (called("calculator", "error: no", "5115."), "failed tool call"),
        ((Message("assistant", "", (ToolCall("invalid", {"text": "{"}),)),), "failed tool call"),
        (called("f", "1", "", a="b")[:2] + called("f", "1", "One.", a="b"), "the same call twice"),
    ],
)
def test_faults_of_form_are_named_and_cost(messages: Conversation, fault: str) -> None:
    assert fault in form_faults(messages)
    clean = called("calculator", "5115", "The answer is 5115.", expression="4729+386")
    assert LABELLER.score(SUM, messages) < LABELLER.score(SUM, clean)


def test_ranks_are_seeded_and_equal_answers_share_one() -> None:
    answers = [said("5115."), said("5116."), said("5115."), said("")]
    ranks = LABELLER.rank(SUM, answers, 0)
    assert ranks == SimulatedLabeller(1, 0.4).rank(SUM, answers, 0)
    assert ranks[0] == ranks[2] and min(ranks) == 1
    silent = SimulatedLabeller(seed=1, noise=0.0)
    assert silent.rank(SUM, answers, 0) == (1, 3, 1, 4)
    near = [said("5116."), said("5117.."), said("51180.")]
    assert len({LABELLER.rank(SUM, near, index) for index in range(50)}) > 2


def test_the_noise_has_the_stated_size() -> None:
    """Two answers whose true scores are d apart are ranked rightly with probability Phi(d / (noise * sqrt 2))."""
    a, b = said("5116."), said("5116. " + "x" * 94 + ".")
    d = LABELLER.score(SUM, a) - LABELLER.score(SUM, b)
    assert d == pytest.approx(0.3 * 96 / 300)
    labeller = SimulatedLabeller(seed=0, noise=0.1)
    n = 4000
    right = sum(labeller.rank(SUM, [a, b], index) == (1, 2) for index in range(n)) / n
    assert right == pytest.approx(0.5 * (1 + math.erf(d / (0.1 * math.sqrt(2)) / math.sqrt(2))), abs=0.025)


def test_the_ceiling_is_the_share_of_labels_that_the_truth_gets_right() -> None:
    assert pairs_of([0.1, 0.5, 0.5], (2, 1, 2)) == [(0.5, 0.1), (0.5, 0.5)]
    assert noise_ceiling([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (2.0, 0.0)]) == 0.625
    assert noise_ceiling([]) == 1.0
