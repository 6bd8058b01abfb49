"""In what manner plain sums were answered: directly, in written steps, or by calculator. Owns the counting."""

from __future__ import annotations

from collections.abc import Sequence

from stateofgpt.assistant.session import Turn
from stateofgpt.data.skills import Problem, manner_of
from stateofgpt.data.skills.problems import ARITHMETIC

MANNERS = ("direct", "steps", "tool")


def shares(asked: Sequence[Problem], turns: Sequence[Turn]) -> dict[str, float]:
    """`share_MANNER` of the answers to plain sums; all 0 where none was asked."""
    manners = [manner_of(t.messages) for p, t in zip(asked, turns, strict=True) if p.skill == ARITHMETIC[0]]
    return {f"share_{m}": sum(m == made for made in manners) / max(1, len(manners)) for m in MANNERS}
