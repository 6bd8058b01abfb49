"""The verdict on a reward model, in words, from what `eval/health.py` measured.

Owns the thresholds and the sentences. Knows nothing of how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEWEST_PAIRS = 200  # the 95 % interval of a share is then about 7 points to each side
LARGEST_ECE = 0.08
NEAR_CEILING = 0.9  # of the way from chance
UNITED = 0.75
RULES = {
    "chance": "tossing a coin",
    "longer": "taking the longer answer",
    "shorter": "taking the shorter answer",
    "first": "taking the first answer",
}


def verdict(health: Mapping[str, Any]) -> dict[str, Any]:
    """`word` ("trusted", "with care", "not trusted"), and `reasons`, a sentence each, the gravest first."""
    grave, doubts, good = _accuracy(health)
    for part in (_length, _calibration, _others):
        more_grave, more_doubts, more_good = part(health)
        grave, doubts, good = grave + more_grave, doubts + more_doubts, good + more_good
    word = "not trusted" if grave else "with care" if doubts else "trusted"
    return {"word": word, "reasons": [*grave, *doubts, *good]}


Found = tuple[list[str], list[str], list[str]]  # grave, doubts, good


def _accuracy(health: Mapping[str, Any]) -> Found:
    grave, doubts, good = [], [], []
    n, accuracy, rules = health["n_pairs"], health["accuracy"], health["baselines"]
    best = max(rules, key=lambda name: rules[name]["accuracy"])
    gain = rules[best]["gain"]
    if health["seen"]:
        grave.append("It was trained on these votes, so the numbers say nothing of others.")
    if n < FEWEST_PAIRS:
        doubts.append(f"{n} pairs are too few to be sure of anything finer than coarse differences.")
    told = (
        f"right on {_percent(accuracy['value'])} of {n:,} pairs ({_percent(accuracy['low'])} to "
        f"{_percent(accuracy['high'])}), {RULES[best]} on {_percent(rules[best]['accuracy'])}"
    )
    if gain["low"] > 0.0:
        good.append(f"It is {told}: {100 * gain['value']:.1f} points better, and surely so.")
    elif gain["value"] > 0.0:
        grave.append(f"It is {told}: not surely better.")
    else:
        grave.append(f"It is {told}: no better.")
    if (ceiling := health["ceiling"]) is not None and ceiling > 0.5:
        way = (accuracy["value"] - 0.5) / (ceiling - 0.5)
        text = (
            f"The votes' own noise allows about {_percent(ceiling)}: it is {_percent(way, 0)} of the way from chance."
        )
        (good if way >= NEAR_CEILING else doubts).append(text)
    return grave, doubts, good


def _length(health: Mapping[str, Any]) -> Found:
    bias = health["length"]
    sides = {"longer": bias["longer_better"], "shorter": bias["shorter_better"]}
    worst = min(sides, key=lambda name: sides[name]["accuracy"]["value"])
    part = sides[worst]["accuracy"]
    other = "shorter" if worst == "longer" else "longer"
    if sides[worst]["n"] < 20:
        return [], [], []
    text = (
        f"Where the votes preferred the {worst} answer it is right on {_percent(part['value'])} "
        f"({_percent(part['low'])} to {_percent(part['high'])})"
    )
    if part["high"] < 0.5:
        return [], [f"{text}: it takes {other} for better."], []
    if part["low"] <= 0.5:
        return [], [f"{text}: no better than chance there."], []
    return [], [], [f"{text}: length alone does not decide."]


def _calibration(health: Mapping[str, Any]) -> Found:
    found = health["calibration"]
    if found["ece"] <= LARGEST_ECE:
        return [], [], [f"Its confidence is off by {_percent(found['ece'])} on average."]
    side = "too sure of itself" if found["confidence"] > health["accuracy"]["value"] else "less sure than it could be"
    return [], [f"Its confidence is off by {_percent(found['ece'])} on average: it is {side}."], []


def _others(health: Mapping[str, Any]) -> Found:
    found = health["ensemble"]
    if not found:
        return [], [], []
    text = (
        f"{found['models']} models trained on other draws of the votes disagree on {_percent(found['split'])} of pairs"
    )
    if 1.0 - found["split"] < UNITED:
        return [], [f"{text}: more votes would change its mind often."], []
    return [], [], [f"{text}."]


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
