"""Owns the simulated labeller: a documented, seeded stand-in for the people who would rank answers.

**No person is involved.** The labeller knows each problem's right answer, scores an answer by the rules below, and adds
noise when it ranks, as people disagree with each other and with themselves. Because the score without noise is known,
one can measure what cannot be measured with people: how much of the labels' information a reward model finds, and
whether a policy that earns more reward is really better. Rankings by people take its place in the same form
(`data/comparisons.py`); nothing else changes.

The score, between -1 and 1.5:

    right answer, in the manner asked for            1.5
    right number, but not in the manner asked for    0.3
    wrong answer                                    -0.5
    form: each fault of `form_faults`               -0.2, at most -0.6 in all
    brevity: -0.3 for 300 characters and more, in proportion below (tool calls count)

It knows nothing about models, tokens or stages.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stateofgpt.data.skills import COLUMN, Problem, final_text, is_right, new_messages, stated_number
from stateofgpt.text.chat import Conversation, Message

RIGHT, RIGHT_BUT_OTHER_MANNER, WRONG = 1.5, 0.3, -0.5
FAULT_COST, MOST_FAULTS = 0.2, 3
LENGTH_COST, LONG_CHARACTERS = 0.3, 300
LOWEST = -1.0
DEFAULT_NOISE = 0.4

_TURNS = "Q|A|Human|Helpful assistant|user|assistant"
_MARKUP = re.compile(rf"<\|[a-z_]+\|>|</?tool_call>|\ufffd|^(?:{_TURNS}):", re.MULTILINE)
_STUTTER = re.compile(r"\b([a-z]+)(?:\W+\1\b){3,}", re.IGNORECASE)


@dataclass(frozen=True)
class SimulatedLabeller:
    """A simulated human. `noise` is the standard deviation of what it adds to a score when it ranks."""

    seed: int = 0
    noise: float = DEFAULT_NOISE

    def score(self, problem: Problem, messages: Conversation) -> float:
        """The true score of an answer (the assistant's and the tools' new messages), without noise."""
        score = _correctness(problem, messages)
        score -= FAULT_COST * min(len(form_faults(messages)), MOST_FAULTS)
        score -= LENGTH_COST * min(1.0, _characters(messages) / LONG_CHARACTERS)
        return max(LOWEST, score)

    def rank(self, problem: Problem, completions: Sequence[Conversation], index: int) -> tuple[int, ...]:
        """Ranks of the completions of prompt number `index`, 1 the best, after noise seeded by (seed, index, k).

        Equal completions share a rank: no labeller prefers one of two identical answers.
        """
        noisy: list[float] = []
        for k, completion in enumerate(completions):
            same = next((j for j in range(k) if completions[j] == completion), None)
            if same is None:
                noise = random.Random(f"labeller {self.seed} {index} {k}").gauss(0.0, self.noise)
                noisy.append(self.score(problem, completion) + noise)
            else:
                noisy.append(noisy[same])
        return tuple(1 + sum(other > mine for other in noisy) for mine in noisy)

    def prefer(self, problem: Problem, a: Conversation, b: Conversation) -> float:
        """The judge of the arena, without noise: 1.0 where a is better, 0.0 where b is, 0.5 where they are equal."""
        difference = self.score(problem, a) - self.score(problem, b)
        return 0.5 if abs(difference) < 1e-9 else float(difference > 0)


def form_faults(messages: Conversation) -> tuple[str, ...]:
    """What is wrong with the form of an answer, whatever it says; each fault named once."""
    text = final_text(messages)
    answers = [message for message in new_messages(messages) if message.role == "assistant"]
    written = "\n".join(message.content for message in answers)
    calls = [_written(call.name, call.arguments) for message in answers for call in message.tool_calls]
    results = [message.content for message in new_messages(messages) if message.role == "tool"]
    lines = [line for line in written.splitlines() if line.strip() and not COLUMN.match(line)]  # columns may agree
    faults = {
        "no answer": not text,
        "no full stop": bool(text) and text[-1] not in ".!?",
        "no beginning": bool(text) and not (text[0].isupper() or text[0].isdigit() or text[0] == "-"),
        "failed tool call": any(result.startswith("error:") for result in results)
        or any(call.name == "invalid" for message in answers for call in message.tool_calls),
        "the same call twice": len(set(calls)) < len(calls),
        "repetition": len(set(lines)) < len(lines) or _STUTTER.search(written) is not None,
        "markup": _MARKUP.search(written) is not None,
    }
    return tuple(name for name, found in faults.items() if found)


def pairs_of(scores: Sequence[float], ranks: Sequence[int]) -> list[tuple[float, float]]:
    """The pairs of one ranking as (true score of the preferred, true score of the other); ties in rank give none."""
    both = range(len(ranks))
    return [(scores[i], scores[j]) for i in both for j in both if ranks[i] < ranks[j]]


def noise_ceiling(pairs: Iterable[tuple[float, float]]) -> float:
    """The share of noisy pair labels that the true score gets right; an equal true score is a coin's toss (a half).

    No reward model can be expected to predict the labels better. Pairs are those of `pairs_of`; without any, 1.0.
    """
    points = [0.5 if abs(won - lost) < 1e-9 else float(won > lost) for won, lost in pairs]
    return sum(points) / len(points) if points else 1.0


def _correctness(problem: Problem, messages: Conversation) -> float:
    if is_right(problem, messages):
        return RIGHT
    given = [str(problem.meta[name]) for name in ("a", "b") if name in problem.meta]
    stated = stated_number(final_text(messages), given)
    other_manner = problem.meta.get("manner") and stated == problem.answer
    return RIGHT_BUT_OTHER_MANNER if other_manner else WRONG


def _characters(messages: Conversation) -> int:
    """What the assistant wrote, in characters; what the tools returned is not its length."""
    return sum(_length(message) for message in new_messages(messages) if message.role == "assistant")


def _length(message: Message) -> int:
    return len(message.content) + sum(len(_written(call.name, call.arguments)) for call in message.tool_calls)


def _written(name: str, arguments: object) -> str:
    return f"{name} {json.dumps(arguments, default=str, sort_keys=True)}"
