"""`ladder.json`: a scaling law measured on this machine's own runs, and which law a dial is to go by.

Owns: reading the file (`stages.ladder` writes it), and the rule: a law the user names; else the ladder beside the run,
where it was measured at the same vocabulary and context and nothing speaks against it; else Epoch AI's constants.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stateofgpt.errors import ConfigError, StateOfGptError
from stateofgpt.run import read_json
from stateofgpt.train.scaling import EPOCH, ChinchillaLaw

LADDER = "ladder.json"
EPOCH_NAME = "epoch"
CONSTANTS = ("irreducible", "a_scale", "b_scale", "a", "b")


@dataclass(frozen=True)
class MeasuredLaw:
    """A ladder's law, the vocabulary and context it holds for, and why it should not be trusted (empty: it may be)."""

    law: ChinchillaLaw
    vocab_size: int
    context: int
    doubt: str


def read_law(path: Path) -> MeasuredLaw:
    """The law in a `ladder.json` or in the folder of one; ConfigError when there is none."""
    file = path / LADDER if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"there is no ladder {file}; `sog ladder` makes one")
    try:
        data = read_json(file)
        law = ChinchillaLaw(*(float(data["law"][name]) for name in CONSTANTS))
        if not all(value > 0 and math.isfinite(value) for value in asdict(law).values()):
            raise ValueError("a constant of the law is not a positive number")
        return MeasuredLaw(law, int(data["vocab_size"]), int(data["context"]), str(data["doubt"]))
    except (StateOfGptError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is no ladder's law ({error}); run `sog ladder` again") from error


def choose_law(named: Path | None, beside: Path, vocab_size: int, context: int) -> tuple[ChinchillaLaw, dict[str, Any]]:
    """The law to go by, and what to record of it: its name, its constants, and why a ladder that is there was left.

    ConfigError when the one the user named is missing or was measured at another vocabulary or context.
    """
    if named is not None:
        found = read_law(named)
        if other := _other(found, vocab_size, context):
            raise ConfigError(f"{named} {other}; run a ladder with these, or leave the setting `law` away")
        return found.law, {"name": str(named), **asdict(found.law)}
    left = ""
    if beside.is_file():
        try:
            found = read_law(beside)
            if not (left := found.doubt or _other(found, vocab_size, context)):
                return found.law, {"name": str(beside), **asdict(found.law)}
        except ConfigError as error:
            left = str(error)
    told: dict[str, Any] = {"name": EPOCH_NAME, **asdict(EPOCH)}
    return EPOCH, {**told, "ladder_left": left} if left else told


def _other(found: MeasuredLaw, vocab_size: int, context: int) -> str:
    if (found.vocab_size, found.context) == (vocab_size, context):
        return ""
    return (
        f"was measured at a vocabulary of {found.vocab_size} and a context of {found.context}, "
        f"and this is {vocab_size} and {context}"
    )
