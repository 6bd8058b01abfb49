"""Before and after: what one round of improving changed, as numbers and as a table for people.

Owns which numbers are set side by side and what is said of their judges. Pure functions of the stages' results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SIDES = (("before", "after"), ("after", "before"))


def measured(held_out: int, reward: dict[str, Any], policy: dict[str, Any], battles: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the round, in pairs [before, after]; `held_out` counts the comparisons kept for measuring."""
    return {
        "held_out": held_out,
        "comparisons_right": [reward[side]["comparisons"] for side in ("before", "after")],
        "replay_right": [reward[side]["replay_held_out"] for side in ("before", "after")],
        "true_score": [policy["true_sft"], policy["true_rl"]],
        "p_value": policy["p_value"],
        "n": policy["n"],
        "skills_won": _won(battles),
        "skills_battles": battles["battles"],
        "own_won": _won(battles["own"]),
        "own_battles": battles["own"]["battles"],
    }


def summary(
    seconds: dict[str, float], reward: dict[str, Any], policy: dict[str, Any], battles: dict[str, Any]
) -> dict[str, Any]:
    """What an improved run's `summary.json` has in common with any run's."""
    names = ("true_sft", "true_rl", "p_value", "kl", "entropy_sft", "entropy_rl", "stopped", "given_up")
    return {
        "wall_seconds": {"total": round(sum(seconds.values()), 2), **seconds},
        "reward": {key: reward[key] for key in ("pair_accuracy", "n")},
        "rl": {key: policy[key] for key in names if key in policy},
        "arena": battles["leaderboard"],
    }


def table(result: dict[str, Any]) -> str:
    """`measured` as lines of text, each number with who judged it and over what."""
    some = bool(result["held_out"])
    pairs, replayed = result["comparisons_right"], result["replay_right"]
    lines = [("", "before", "after")]
    if pairs[0][1]:
        which = "held out" if some else "learned from: too few to hold some out"
        lines += [("reward model, share of pairs right", "", "")]
        lines += [_row(f"people's comparisons ({which}), {pairs[0][1]}", [right / n for right, n in pairs], "{:.0%}")]
    if replayed[0][1]:
        lines += [_row(f"older rankings (held out), {replayed[0][1]}", [r / n for r, n in replayed], "{:.0%}")]
    p = f"p = {result['p_value']:.2g}"
    lines += [("skills, held-out prompts, judged by the simulated labeller without noise", "", "")]
    lines += [_row(f"mean score of {result['n']} answers ({p})", result["true_score"], "{:.2f}")]
    lines += [_row(f"battles won, ties as half, of {result['skills_battles']}", result["skills_won"], "{:.0%}")]
    if result["own_battles"]:
        which = "of held-out comparisons" if some else "learned from"
        lines += [(f"people's own prompts ({which}), judged by the new reward model", "", "")]
        lines += [_row(f"battles won, ties as half, of {result['own_battles']}", result["own_won"], "{:.0%}")]
    width = max(len(text) for text, _, _ in lines)
    text = "\n".join(f"{text:{width}}  {before:>6}  {after:>6}".rstrip() for text, before, after in lines)
    if result["own_battles"]:
        text += "\nThe new reward model trained the new policy, so its verdict is a check and no proof: talk to both."
    return text


def _row(text: str, numbers: Sequence[float], form: str) -> tuple[str, str, str]:
    before, after = (form.format(number) for number in numbers)
    return f"  {text}", before, after


def _won(battles: dict[str, Any]) -> list[float]:
    """What each side won against the other; a half each where they did not meet."""
    rates = battles.get("win_rates", {})
    return [rates.get(one, {}).get(other, 0.5) for one, other in SIDES]
