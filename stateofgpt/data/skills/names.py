"""Owns the invented names: a syllable grammar of some tens of millions of names, and the few that training shows.

Training only ever shows `known_names()`, so that a name a model invents can be checked to be new (not among them) and
plausible (the grammar could have made it). It knows nothing about questions or models.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache

ONSETS = (
    "b", "br", "d", "dr", "f", "fl", "g", "gl", "gr", "h", "k", "kr", "l", "m", "n", "p", "pl", "r", "s", "sh",
    "sk", "sl", "st", "t", "th", "tr", "v", "w", "y", "z",
)  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u", "ae", "ai", "ia", "oo")
CODAS = ("n", "r", "l", "k", "m", "s", "th", "x", "sh", "nd", "rk")

_SYLLABLE = f"(?:{'|'.join(ONSETS)})(?:{'|'.join(VOWELS)})(?:{'|'.join(CODAS)})?"
_NAME = re.compile(f"(?:{_SYLLABLE}){{2,3}}")
_KNOWN_NAMES = 3000


def invent_name(rng: random.Random) -> str:
    """A new name of two or three syllables, as in Velmora, Brakun, Thiarook."""
    while True:
        syllables = []
        for _ in range(rng.choice((2, 2, 3))):
            coda = rng.choice(CODAS) if rng.random() < 0.35 else ""
            syllables.append(rng.choice(ONSETS) + rng.choice(VOWELS[:5] if rng.random() < 0.8 else VOWELS) + coda)
        name = "".join(syllables).capitalize()
        if 4 <= len(name) <= 10:
            return name


@lru_cache(maxsize=1)
def known_names() -> tuple[str, ...]:
    """The names that training may show, always the same."""
    rng = random.Random("names of creatures")
    names: dict[str, None] = {}
    while len(names) < _KNOWN_NAMES:
        names[invent_name(rng)] = None
    return tuple(names)


@lru_cache(maxsize=1)
def _known_set() -> frozenset[str]:
    return frozenset(known_names())


def is_plausible_name(name: str) -> bool:
    """Whether the grammar could have made the name: a capital, two or three syllables, 4 to 10 letters."""
    well_formed = name[:1].isupper() and name[1:] == name[1:].lower() and 4 <= len(name) <= 10
    return well_formed and _NAME.fullmatch(name.lower()) is not None


def is_new_name(name: str) -> bool:
    """Whether training never showed the name."""
    return name not in _known_set()


def read_name(text: str) -> str | None:
    """The one name an answer gives ("Velmora.", "How about Velmora?"); None where it gives none, or several."""
    words = [word for word in re.findall(r"[A-Za-z]+", text) if word not in ("How", "Call", "Maybe", "about", "it")]
    return words[0] if len(words) == 1 and words[0][0].isupper() else None
