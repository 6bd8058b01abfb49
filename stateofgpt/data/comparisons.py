"""Ranked answers, the data of reward modelling.

Owns the rows of a rankings file and what they mean: K completions of one prompt with ranks (1 = best, ties allowed), or
a chosen and a rejected one. Knows nothing of who ranked them (the simulated labeller, people, thumbs) or of tokens;
the forms in which others publish their votes are `data/votes.py`'s.

    {"prompt": "What is 2 + 2?", "completions": ["4", "5", "I do not know."], "ranks": [1, 3, 2]}
    {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "chosen": "4", "rejected": "5"}

A prompt, and each completion, is a text or a list of messages; without `prompt`, chosen and rejected are whole
conversations and the messages they begin with alike are the prompt. A completion whose rank is null was not judged and
is left out. A row may say how clear the case was (`margin`, 0 to 1), and how each of several people ranked (`votes`, a
list of ranks for each).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateofgpt.errors import DataError
from stateofgpt.run import write_atomic
from stateofgpt.text.chat import Conversation, Message, message_from_json, message_to_json
from stateofgpt.text.messages import call_to_text

MAX_LINE_BYTES = 8 << 20  # K long conversations fit many times; a file with one 100 MB line is no rankings file
MAX_COMPLETIONS = 64
MAX_VOTES = 64


@dataclass(frozen=True)
class Ranking:
    """Completions of one prompt, ranked. `problem` is the skill problem behind it, where there is one; `votes` are the
    ranks that each of several people gave, and `margin` (0 to 1) is how clear the case was, where that is known."""

    prompt: Conversation
    completions: tuple[Conversation, ...]
    ranks: tuple[int, ...]
    problem: dict[str, Any] | None = None
    votes: tuple[tuple[int, ...], ...] = ()
    margin: float | None = None

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.ranks):
            raise DataError(f"{len(self.completions)} completions have {len(self.ranks)} ranks; give one rank to each")
        if any(len(vote) != len(self.ranks) for vote in self.votes):
            raise DataError(f"each of the votes must rank all {len(self.ranks)} completions")

    def pairs(self) -> list[tuple[int, int]]:
        """Indices (better, worse) of every pair that the ranks order: K(K-1)/2 of them, less the ties."""
        numbered = range(len(self.ranks))
        return [(i, j) for i in numbered for j in numbered if self.ranks[i] < self.ranks[j]]


def write_rankings(path: Path | str, rankings: Iterable[Ranking]) -> int:
    """Write a rankings file, whole or not at all, and return the number of rows."""
    lines = [json.dumps(_to_json(ranking), ensure_ascii=False) + "\n" for ranking in rankings]
    write_atomic(Path(path), "".join(lines))
    return len(lines)


def _to_json(ranking: Ranking) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": [message_to_json(m) for m in ranking.prompt],
        "completions": [[message_to_json(m) for m in c] for c in ranking.completions],
        "ranks": list(ranking.ranks),
    }
    if ranking.votes:
        row["votes"] = [list(vote) for vote in ranking.votes]
    if ranking.margin is not None:
        row["margin"] = ranking.margin
    return row if ranking.problem is None else {**row, "problem": ranking.problem}


def read_rankings(path: Path | str) -> list[Ranking]:
    """Every ranking in a JSONL file. Raises DataError naming the file and the line of the first row that is wrong."""
    path = Path(path)
    rankings = []
    for number, line in _lines(path):
        try:
            rankings.append(ranking_from_row(object_of(line)))
        except DataError as failure:
            raise DataError(f"{path}:{number}: {failure}") from failure
    if not rankings:
        raise DataError(f"{path} holds no rankings; each line is a JSON object with prompt, completions and ranks")
    return rankings


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; a line over the limit is refused before it is read whole."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MB; "
                                    "a rankings file has one ranking per line")  # fmt: skip
                if line.strip():
                    yield number, line
    except OSError as failure:
        raise DataError(f"cannot read the rankings {path}: {failure.strerror}") from failure


def object_of(line: bytes) -> dict[str, Any]:
    """The JSON object in a line of a file; DataError says what it is instead."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise DataError(f"byte {failure.start + 1} of the line is not UTF-8; save the file as UTF-8") from failure
    try:
        row = json.loads(text)
    except json.JSONDecodeError as failure:
        raise DataError(f"not valid JSON at column {failure.colno} ({failure.msg})") from failure
    except (ValueError, RecursionError) as failure:
        raise DataError("not JSON that can be read: it nests too deeply or holds a number too long") from failure
    if not isinstance(row, dict):
        raise no_object(row)
    return row


def no_object(row: Any) -> DataError:
    """What is said of a row that is some other JSON."""
    names = {list: "list", str: "text", bool: "truth value", type(None): "null"}
    return DataError(f"the row is a JSON {names.get(type(row), 'number')}, it must be an object")


def ranking_from_row(row: Mapping[str, Any]) -> Ranking:
    """The ranking of one row in the forms above; DataError says what is wrong with it."""
    problem = row.get("problem")
    if problem is not None and not isinstance(problem, dict):
        raise DataError("problem must be a JSON object or left out")
    margin = margin_of(row)
    if "chosen" in row and "rejected" in row:
        prompt, best, worst = _chosen_rejected(row)
        return Ranking(prompt, (best, worst), (1, 2), problem, margin=margin)
    if missing := [key for key in ("prompt", "completions", "ranks") if key not in row]:
        raise DataError(f"the row has no {missing[0]}; it needs prompt, completions, ranks or prompt, chosen, rejected")
    completions, ranks = row["completions"], row["ranks"]
    if not isinstance(completions, list) or not 2 <= len(completions) <= MAX_COMPLETIONS:
        raise DataError(f"completions must be a list of 2 to {MAX_COMPLETIONS} answers")
    given = _ranks(ranks, len(completions), "ranks")
    votes = row.get("votes") or []
    if not isinstance(votes, list):
        raise DataError("votes must be a list with the ranks that each person gave")
    voted = [_ranks(vote, len(completions), "each of the votes") for vote in votes[:MAX_VOTES]]
    prompt = as_prompt(row["prompt"])
    judged = [k for k, rank in enumerate(given) if rank is not None]
    if len(judged) < 2:
        raise DataError("fewer than two completions have a rank, so nothing is compared")
    return Ranking(
        prompt,
        tuple(as_completion(completions[k], prompt) for k in judged),
        tuple(given[k] or 0 for k in judged),
        problem,
        tuple(tuple(vote[k] or 0 for k in judged) for vote in voted if all(vote[k] for k in judged)),
        margin,
    )


def _ranks(value: Any, n: int, name: str) -> list[int | None]:
    if not isinstance(value, list) or not all(r is None or (type(r) is int and r >= 1) for r in value):
        raise DataError(f"{name} must be a list of whole numbers from 1 (the best) up, or null where none was given")
    if len(value) != n:
        raise DataError(f"{n} completions have {len(value)} ranks; give one rank to each")
    return value


def margin_of(row: Mapping[str, Any]) -> float | None:
    """What a row says of how clear the case was; DataError where it is no number from 0 up."""
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1e6:
        raise DataError("margin must be a number from 0 up (0: hardly better, 1: much better)")
    return float(margin)


def _chosen_rejected(row: Mapping[str, Any]) -> tuple[Conversation, Conversation, Conversation]:
    if "prompt" in row:
        prompt = as_prompt(row["prompt"])
        return prompt, as_completion(row["chosen"], prompt), as_completion(row["rejected"], prompt)
    if not isinstance(row["chosen"], list) or not isinstance(row["rejected"], list):
        raise DataError(
            "the row has no prompt; give one, or let chosen and rejected be message lists that begin with it"
        )
    chosen, rejected = as_messages(row["chosen"]), as_messages(row["rejected"])
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise DataError("chosen and rejected begin differently, so there is no prompt they both answer")
    prompt, best, worst = chosen[:shared], chosen[shared:], rejected[shared:]
    return checked_prompt(prompt), checked_completion(best), checked_completion(worst)


def as_prompt(value: Any) -> Conversation:
    """A text is a user's message."""
    return checked_prompt((Message("user", value),) if isinstance(value, str) else as_messages(value))


def as_completion(value: Any, prompt: Conversation) -> Conversation:
    """A list of messages may repeat the prompt in front, as public preference sets do."""
    messages = (Message("assistant", value),) if isinstance(value, str) else as_messages(value)
    return checked_completion(messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages)


def as_messages(value: Any) -> Conversation:
    """A list of messages, or a single one."""
    if isinstance(value, dict):  # one message, unwrapped
        value = [value]
    if not isinstance(value, list):
        raise DataError("a prompt and a completion must be a text or a list of messages with role and content")
    return tuple(message_from_json(item) for item in value)


def checked_prompt(prompt: Conversation) -> Conversation:
    """The prompt, which says something and can be stored; else DataError."""
    if not prompt or not any(m.content.strip() for m in prompt):
        raise DataError("the prompt is empty")
    return _encodable(prompt)


def checked_completion(completion: Conversation) -> Conversation:
    """The completion: messages of the assistant and of tools; else DataError."""
    if not completion or completion[0].role != "assistant":
        raise DataError("a completion must begin with a message of the assistant")
    if any(m.role not in ("assistant", "tool") for m in completion):
        raise DataError("a completion may hold only messages of the assistant and of tools")
    return _encodable(completion)


def _encodable(conversation: Conversation) -> Conversation:
    r"""JSON may spell half of a surrogate pair ("\ud800"), which is no character and cannot be stored as UTF-8."""
    try:
        for message in conversation:
            message.content.encode()
            for call in message.tool_calls:
                call_to_text(call).encode()
    except UnicodeEncodeError as failure:
        raise DataError("a text holds half of a surrogate pair, which is no character; repair the text") from failure
    return conversation
