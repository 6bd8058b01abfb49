"""A round of feedback as something to learn from: people's comparisons, what is held out, and what is replayed.

Owns how comparisons are counted and split, how older rankings are mixed in, and the files that hold all of it in the
`reward/` folder of the improved run, so that what is learned from no longer changes once the round has begun:

    comparisons.jsonl         this round's: a person preferred the first of two answers
    earlier.jsonl             those that earlier rounds learned from
    rankings.jsonl            the rankings of the run that the series began with
    rankings_held_out.jsonl   and those it never learned from

Knows nothing of models and of how they are trained.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateofgpt.data.comparisons import Ranking, read_rankings, write_rankings
from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.data.preferences import Comparison, text_key
from stateofgpt.errors import FeedbackError
from stateofgpt.run import Run, Stage
from stateofgpt.text.chat import Conversation

COMPARISONS, EARLIER = "comparisons.jsonl", "earlier.jsonl"
RANKINGS, RANKINGS_HELD_OUT = "rankings.jsonl", "rankings_held_out.jsonl"
FEWEST_TO_SPLIT, FEWEST_HELD_OUT = 20, 3
ONE_IN = 5  # prompts are held out


@dataclass(frozen=True)
class FeedbackSet:
    """What one round learns from, and what it is measured on and never learns from."""

    train: tuple[Ranking, ...]
    held_out: tuple[Ranking, ...]
    earlier: tuple[Ranking, ...]
    replay: tuple[Ranking, ...]
    replay_held_out: tuple[Ranking, ...]

    def mixed(self, seed: int, epochs: int, replay: float) -> list[Ranking]:
        """This round's comparisons `epochs` times, earlier rounds' once, and `replay` old rankings to each of these.

        A step of the ranking loss is the mean over its prompts, so these numbers are also the weights in the loss.
        """
        people = [*self.train * epochs, *self.earlier]
        n = min(len(self.replay), round(replay * len(people)))
        return people + random.Random(f"replay {seed}").sample(self.replay, n)


def gather(run: Run, fewest: int) -> list[Comparison]:
    """The comparisons in a run's feedback; FeedbackError when there are fewer than `fewest`."""
    found: list[Comparison] = []
    said = "nobody has rated an answer yet"
    if run.feedback_path.exists():
        with FeedbackStore(run.feedback_path) as store:
            found, counts = store.comparisons(), store.counts()
        said = (
            f"{counts.up} thumbs up, {counts.down} down, {counts.corrections} corrections; answers to one question pair"
        )
    if len(found) < fewest:
        raise FeedbackError(
            f"the feedback on {run.root} holds {len(found)} distinct comparisons ({said}) and an improvement needs "
            f"{fewest}; in `sog serve` or `sog chat`, regenerate answers and put one thumb up and the other down, or "
            "write what an answer should have been"
        )
    return found


def fingerprint(comparisons: Sequence[Comparison]) -> str:
    """One name for one set of comparisons."""
    texts = [[text_key(part) for part in (c.prompt, c.chosen, c.rejected)] for c in comparisons]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def keep(stage: Stage, comparisons: Sequence[Comparison], old: Stage) -> dict[str, Any]:
    """Store the round's material in `stage`, from the feedback and from the old run's reward stage; returns counts."""
    before = split(_read(old.dir / COMPARISONS))[0]
    parts = {
        COMPARISONS: [Ranking(c.prompt, (c.chosen, c.rejected), (1, 2)) for c in comparisons],
        EARLIER: [*before, *_read(old.dir / EARLIER)],
        RANKINGS: _read(old.dir / RANKINGS),
        RANKINGS_HELD_OUT: _read(old.dir / RANKINGS_HELD_OUT),
    }
    for name, rankings in parts.items():
        if rankings:
            write_rankings(stage.dir / name, rankings)
    return {"comparisons": len(comparisons), "sources": dict(Counter(c.source for c in comparisons))}


def read(stage: Stage) -> FeedbackSet:
    """What `keep` stored."""
    train, held_out = split(_read(stage.dir / COMPARISONS))
    others = (_read(stage.dir / name) for name in (EARLIER, RANKINGS, RANKINGS_HELD_OUT))
    return FeedbackSet(tuple(train), tuple(held_out), *map(tuple, others))


def split(rankings: Sequence[Ranking]) -> tuple[list[Ranking], list[Ranking]]:
    """(to learn from, held out): by a hash of the prompt, so that no prompt is on both sides; none of too few."""
    held_out = [ranking for ranking in rankings if _is_held_out(ranking.prompt)]
    train = [ranking for ranking in rankings if not _is_held_out(ranking.prompt)]
    if len(rankings) < FEWEST_TO_SPLIT or len(held_out) < FEWEST_HELD_OUT or len(train) < len(held_out):
        return list(rankings), []
    return train, held_out


def prompts_of(rankings: Sequence[Ranking]) -> list[Conversation]:
    """The different prompts, in order."""
    return list({text_key(ranking.prompt): ranking.prompt for ranking in rankings}.values())


def told(counts: Mapping[str, Any]) -> str:
    """`24 comparisons (12 thumbs, 8 regenerated, 4 corrections)`."""
    words = {"correction": "corrected", "thumbs": "by thumbs", "regenerated": "by regenerating"}
    sources = ", ".join(f"{n} {words.get(name, name)}" for name, n in sorted(counts["sources"].items()))
    return f"{counts['comparisons']} comparisons ({sources})"


def _is_held_out(prompt: Conversation) -> bool:
    return int(hashlib.sha256(text_key(prompt).encode()).hexdigest(), 16) % ONE_IN == 0


def _read(path: Path) -> list[Ranking]:
    return read_rankings(path) if path.exists() else []
