"""People's votes on answers, in the forms in which they are published: one row in, a ranking or a thumb out.

Owns which form a row has and what it means. Knows nothing of files (`data/vote_file.py`), models or tokens. The forms:

    ranked        prompt, completions, ranks
    pairs         prompt, chosen, rejected                    (a margin, 0 to 1, may say how clear it was)
    transcripts   chosen, rejected: whole texts of "Human:" and "Assistant:" turns
    conversations chosen, rejected: whole lists of messages
    thumbs        prompt, completion, label                   (true or false; paired within a prompt)
    annotators    instruction, input, response1, response2, annotator1, annotator2 ...   (0 a tie, 1, 2)
    arena         conversation_a, conversation_b, winner      (model_a, model_b, tie)
                  prompt, response_a, response_b, winner

Sources: hh-rlhf (arXiv 2204.05862), TRL's preference and unpaired preference types, PandaLM (2306.05087), Chatbot
Arena (2403.04132).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stateofgpt.data.comparisons import (
    MAX_VOTES,
    Ranking,
    as_completion,
    as_messages,
    as_prompt,
    checked_completion,
    checked_prompt,
    margin_of,
    ranking_from_row,
)
from stateofgpt.data.transcripts import is_transcript, read_transcript
from stateofgpt.errors import DataError
from stateofgpt.text.chat import Conversation, Message

FORMS = ("ranked", "pairs", "transcripts", "conversations", "thumbs", "annotators", "arena")
_ANNOTATOR = re.compile(r"annotator_?\d+")
_ANSWERS = (("response_a", "response_b"), ("answer_a", "answer_b"), ("completion_a", "completion_b"))
_WINNERS = {
    "model_a": 0, "a": 0, "model_b": 1, "b": 1, "tie": None, "tie (bothbad)": None, "tie (both bad)": None,
    "both_bad": None, "bothbad": None,
}  # fmt: skip


@dataclass(frozen=True)
class Thumb:
    """One answer and whether somebody liked it. Comparisons are made of those that answer one prompt."""

    prompt: Conversation
    completion: Conversation
    liked: bool


def form_of(row: Mapping[str, Any]) -> str:
    """The form of a row by its keys, one of FORMS; DataError where it has none."""
    keys = row.keys()
    if "completions" in keys:
        return "ranked"
    if {"chosen", "rejected"} <= keys:
        if row.get("prompt") is not None:
            return "pairs"
        return "transcripts" if isinstance(row["chosen"], str) else "conversations"
    if "winner" in keys:
        return "arena"
    if any(_ANNOTATOR.fullmatch(str(key)) for key in keys):
        return "annotators"
    if {"completion", "label"} <= keys:
        return "thumbs"
    shown = ", ".join(sorted(str(key)[:30] for key in keys)[:6]) or "nothing"
    raise DataError(
        f"the row has {shown}; it needs chosen and rejected, completions and ranks, completion and label, winner, or "
        "annotator1 and responses"
    )


def vote_from_row(row: Mapping[str, Any]) -> Ranking | Thumb:
    """What one row says; DataError with what is wrong with it."""
    vote = _READERS[form_of(row)](row)
    if isinstance(vote, Ranking) and any(
        vote.completions[i] == vote.completions[j] for i, j in vote.pairs()
    ):  # such a pair can teach nothing and be judged by nobody
        raise DataError("a better and a worse answer are the same text")
    return vote


def pair_up(thumbs: Sequence[Thumb], most: int = 64) -> Ranking | None:
    """The ranking of answers to one prompt: liked ones share rank 1, others rank 2; None where all are alike.

    Beyond `most` answers the first ones are taken, evenly from both sides.
    """
    liked = [thumb.completion for thumb in thumbs if thumb.liked]
    others = [thumb.completion for thumb in thumbs if not thumb.liked and thumb.completion not in liked]
    if not liked or not others:
        return None
    half = most // 2
    liked = liked[: max(half, most - len(others))]
    others = others[: most - len(liked)]
    return Ranking(thumbs[0].prompt, (*liked, *others), (1,) * len(liked) + (2,) * len(others))


# ------------------------------------------------------------------------------------------------------------ the forms


def _pair(row: Mapping[str, Any]) -> Ranking:
    if not is_transcript(row["prompt"]):
        return ranking_from_row(row)
    prompt = read_transcript(row["prompt"])
    if prompt[-1] == Message("assistant", ""):  # "...\n\nAssistant:" is where an answer begins
        prompt = prompt[:-1]
    prompt = checked_prompt(prompt)
    answers = [_text(row[key], key).strip() for key in ("chosen", "rejected")]
    best, worst = (as_completion(answer, prompt) for answer in answers)
    return Ranking(prompt, (best, worst), (1, 2), margin=margin_of(row))


def _transcripts(row: Mapping[str, Any]) -> Ranking:
    chosen, rejected = (_text(row[key], key) for key in ("chosen", "rejected"))
    if not is_transcript(chosen) or not is_transcript(rejected):
        raise DataError(
            'chosen and rejected are texts without a prompt; give one, or let both be transcripts that begin "Human:"'
        )
    return _divided(read_transcript(chosen), read_transcript(rejected), margin_of(row))


def _divided(chosen: Conversation, rejected: Conversation, margin: float | None) -> Ranking:
    """Two conversations that begin alike: what they share is the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise DataError("chosen and rejected are the same conversation")
    if not shared:
        raise DataError("chosen and rejected begin differently, so there is no prompt they both answer")
    prompt = checked_prompt(chosen[:shared])
    completions = checked_completion(chosen[shared:]), checked_completion(rejected[shared:])
    return Ranking(prompt, completions, (1, 2), margin=margin)


def _thumb(row: Mapping[str, Any]) -> Thumb:
    label = row["label"]
    known = {"up": True, "down": False, "true": True, "false": False}
    liked = known.get(label.lower()) if isinstance(label, str) else label
    if liked not in (True, False) or isinstance(liked, float):  # 1 and 0 are also meant
        raise DataError("label must be true or false")
    if row.get("prompt") is None:
        raise DataError("the row has no prompt, so its thumb cannot be compared with another")
    prompt = as_prompt(row["prompt"])
    return Thumb(prompt, as_completion(row["completion"], prompt), bool(liked))


def _annotators(row: Mapping[str, Any]) -> Ranking:
    """Ranks by majority, a tie where there is none; the margin is the majority's lead as a share of the votes."""
    for key in ("instruction", "response1", "response2"):
        if key not in row:
            raise DataError(f"a row with annotators needs {key}")
    question, more = _text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")
    prompt = checked_prompt((Message("user", f"{question}\n\n{more}" if more.strip() else question),))
    answers = [as_completion(_text(row[key], key), prompt) for key in ("response1", "response2")]
    names = sorted((str(key) for key in row if _ANNOTATOR.fullmatch(str(key))), key=lambda k: int(re.sub(r"\D", "", k)))
    votes = []
    for name in names[:MAX_VOTES]:
        choice = row[name]
        if choice is None:
            continue
        if isinstance(choice, bool) or choice not in (0, 1, 2):
            raise DataError(f"{name} must be 0 (a tie), 1 or 2")
        votes.append({0: (1, 1), 1: (1, 2), 2: (2, 1)}[choice])
    if not votes:
        raise DataError("nobody voted in this row")
    counts = {vote: votes.count(vote) for vote in set(votes)}
    best = max(counts.values())
    leaders = [vote for vote, n in counts.items() if n == best]
    ranks = leaders[0] if len(leaders) == 1 else (1, 1)
    margin = abs(counts.get((1, 2), 0) - counts.get((2, 1), 0)) / len(votes)
    return Ranking(prompt, tuple(answers), ranks, votes=tuple(votes), margin=margin if ranks != (1, 1) else None)


def _arena(row: Mapping[str, Any]) -> Ranking:
    winner = row["winner"]
    if not isinstance(winner, str) or winner.lower() not in _WINNERS:
        raise DataError("winner must be model_a, model_b or tie")
    won = _WINNERS[winner.lower()]
    ranks = (1, 1) if won is None else (1, 2) if won == 0 else (2, 1)
    if "conversation_a" in row and "conversation_b" in row:
        a, b = as_messages(row["conversation_a"]), as_messages(row["conversation_b"])
        asked = next((i for i, m in enumerate(a) if m.role == "assistant"), len(a))
        if a[:asked] != b[:asked]:
            raise DataError("conversation_a and conversation_b begin differently, so there is no prompt")
        prompt = checked_prompt(a[:asked])
        return Ranking(prompt, (_played(a[asked:]), _played(b[asked:])), ranks)
    for first, second in _ANSWERS:
        if "prompt" in row and first in row and second in row:
            prompt = as_prompt(row["prompt"])
            return Ranking(prompt, (as_completion(row[first], prompt), as_completion(row[second], prompt)), ranks)
    raise DataError("the row names a winner and has no answers; it needs conversation_a and conversation_b, or prompt, "
                    "response_a and response_b")  # fmt: skip


def _played(rest: Conversation) -> Conversation:
    """One side of a battle of several turns: the user's later turns are part of it."""
    if not rest or rest[-1].role != "assistant":
        raise DataError("a conversation of a battle must end with an answer of the assistant")
    for message in rest:
        checked_prompt((Message("user", f"-{message.content}"),))  # what cannot be stored is refused
    return rest


def _text(value: Any, name: str) -> str:
    """Text; a spreadsheet's True and 5 are texts that lost their quotes."""
    if isinstance(value, (bool, int, float)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{name} must be text")
    return value


_READERS: dict[str, Callable[[Mapping[str, Any]], Ranking | Thumb]] = {
    "ranked": ranking_from_row,
    "pairs": _pair,
    "transcripts": _transcripts,
    "conversations": ranking_from_row,
    "thumbs": _thumb,
    "annotators": _annotators,
    "arena": _arena,
}
