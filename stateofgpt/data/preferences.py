"""What people's verdicts say: a tree of answers and the ratings on it become pairs (better, worse).

Owns the rules by which a verdict is a comparison. Pure functions: knows no database, no tokenizer and no model.

The rules, for answers to one and the same prompt (the whole conversation before the answer, compared as text):

1. *correction*: a corrected answer is better than the original. Tool calls on the way are kept on both sides,
   so that the pair differs only in what the person changed.
2. *thumbs*: an answer with more thumbs up than down is better than one with more down than up. A person has one
   vote per answer text, the last one given; a tie says nothing.
3. *regenerated*: of two sibling answers, the one the person went on with after seeing both, or the later one when
   it was thumbed up, is better than the other when that has no thumb up.

Unfinished answers are in no pair but with their own correction: that they end early is not the model's doing. Equal
pairs count once, pairs that say the opposite of each other are dropped, and one person or one conversation gives a
bounded number.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stateofgpt.text.chat import Conversation, Message

Rating = Literal["up", "down"]
Source = Literal["correction", "thumbs", "regenerated"]
PAIRS_PER_PROMPT = 64  # one prompt with 100 answers up and 100 down would otherwise give 10 000 pairs of one question


@dataclass(frozen=True)
class StoredMessage:
    """A node of a conversation's tree: what one side said in one turn, with the tool calls made on the way."""

    seq: int
    id: str
    conversation: str
    parent: str | None
    role: str
    messages: Conversation
    model: str | None
    partial: bool
    created: float

    @property
    def text(self) -> str:
        """The last words of the turn: what a person reads as the answer."""
        return self.messages[-1].content if self.messages else ""


@dataclass(frozen=True)
class Verdict:
    """What one person thinks of one answer now: derived from the events, in their order."""

    message: str
    author: str
    rating: Rating | None = None
    reason: str = ""
    correction: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt of which a person preferred the first."""

    prompt: Conversation
    chosen: Conversation
    rejected: Conversation
    source: Source


@dataclass(frozen=True)
class _Candidate:
    comparison: Comparison
    authors: frozenset[str]
    conversations: frozenset[str]


def compare(
    nodes: Sequence[StoredMessage],
    verdicts: Sequence[Verdict],
    authors: Mapping[str, str],
    *,
    per_author: int,
    per_conversation: int,
) -> list[Comparison]:
    """All comparisons that `nodes` and `verdicts` hold; `authors` maps a conversation to the person who had it."""
    tree = _Tree(nodes)
    candidates = [*_corrections(tree, verdicts), *_thumbs(tree, verdicts), *_siblings(tree, verdicts, authors)]
    return list(_capped(_agreed(candidates), per_author, per_conversation))


class _Tree:
    """Nodes by id, by parent, and the text that names a prompt."""

    def __init__(self, nodes: Sequence[StoredMessage]) -> None:
        self.by_id = {node.id: node for node in nodes}
        self.children: dict[str, list[StoredMessage]] = {}
        for node in sorted(nodes, key=lambda node: node.seq):
            if node.parent is not None:
                self.children.setdefault(node.parent, []).append(node)

    def prompt(self, answer: StoredMessage) -> Conversation:
        turns: list[Conversation] = []
        above = answer.parent
        while above is not None and above in self.by_id:
            turns.append(self.by_id[above].messages)
            above = self.by_id[above].parent
        return tuple(message for turn in reversed(turns) for message in turn)


def _corrections(tree: _Tree, verdicts: Iterable[Verdict]) -> Iterator[_Candidate]:
    for verdict in verdicts:
        node = tree.by_id.get(verdict.message)
        if node is None or not verdict.correction.strip() or not node.messages:
            continue
        last = node.messages[-1]
        corrected = Message("assistant", verdict.correction.strip())
        on_the_way = node.messages[:-1] if last.role == "assistant" and not last.tool_calls else node.messages
        yield _Candidate(
            Comparison(tree.prompt(node), (*on_the_way, corrected), node.messages, "correction"),
            frozenset({verdict.author}),
            frozenset({node.conversation}),
        )


def _thumbs(tree: _Tree, verdicts: Iterable[Verdict]) -> Iterator[_Candidate]:
    votes: dict[str, dict[str, dict[str, Rating]]] = defaultdict(lambda: defaultdict(dict))
    shown: dict[tuple[str, str], StoredMessage] = {}
    for verdict in verdicts:
        node = tree.by_id.get(verdict.message)
        if node is None or verdict.rating is None or node.partial:
            continue
        prompt, answer = text_key(tree.prompt(node)), text_key(node.messages)
        votes[prompt][answer][verdict.author] = verdict.rating
        shown.setdefault((prompt, answer), node)
    for prompt, answers in votes.items():
        balance = {answer: Counter(ballots.values()) for answer, ballots in answers.items()}
        liked = [answer for answer, count in balance.items() if count["up"] > count["down"]]
        disliked = [answer for answer, count in balance.items() if count["down"] > count["up"]]
        pairs = [(better, worse) for better in liked[:PAIRS_PER_PROMPT] for worse in disliked[:PAIRS_PER_PROMPT]]
        for better, worse in pairs[:PAIRS_PER_PROMPT]:
            winner, loser = shown[prompt, better], shown[prompt, worse]
            yield _Candidate(
                Comparison(tree.prompt(winner), winner.messages, loser.messages, "thumbs"),
                frozenset({*answers[better], *answers[worse]}),
                frozenset({winner.conversation, loser.conversation}),
            )


def _siblings(tree: _Tree, verdicts: Iterable[Verdict], authors: Mapping[str, str]) -> Iterator[_Candidate]:
    ratings: dict[str, set[str]] = defaultdict(set)
    for verdict in verdicts:
        if verdict.rating is not None:
            ratings[verdict.message].add(verdict.rating)
    for family in tree.children.values():
        answers = [node for node in family if node.role == "assistant" and not node.partial]
        for winner in answers:
            for loser in answers:
                if winner is loser or "down" in ratings[winner.id] or "up" in ratings[loser.id]:
                    continue
                went_on = any(child.seq > max(winner.seq, loser.seq) for child in tree.children.get(winner.id, ()))
                praised = "up" in ratings[winner.id] and winner.seq > loser.seq
                if went_on or praised:
                    yield _Candidate(
                        Comparison(tree.prompt(winner), winner.messages, loser.messages, "regenerated"),
                        frozenset({authors.get(winner.conversation, "")}),
                        frozenset({winner.conversation}),
                    )


def _agreed(candidates: Iterable[_Candidate]) -> Iterator[_Candidate]:
    """Each pair once, without empty, equal and contradictory ones."""
    pairs: dict[tuple[str, str, str], _Candidate] = {}
    for candidate in candidates:
        comparison = candidate.comparison
        key = (text_key(comparison.prompt), text_key(comparison.chosen), text_key(comparison.rejected))
        said_something = any(message.content.strip() for message in comparison.chosen if message.role == "assistant")
        if comparison.prompt and said_something and key[1] != key[2]:
            pairs.setdefault(key, candidate)
    for (prompt, chosen, rejected), candidate in pairs.items():
        if (prompt, rejected, chosen) not in pairs:
            yield candidate


def _capped(candidates: Iterable[_Candidate], per_author: int, per_conversation: int) -> Iterator[Comparison]:
    given_by: Counter[str] = Counter()
    given_in: Counter[str] = Counter()
    for candidate in candidates:
        if any(given_by[author] >= per_author for author in candidate.authors):
            continue
        if any(given_in[conversation] >= per_conversation for conversation in candidate.conversations):
            continue
        given_by.update(candidate.authors)
        given_in.update(candidate.conversations)
        yield candidate.comparison


def text_key(conversation: Conversation) -> str:
    """The text of a conversation as one canonical string: equal keys are equal conversations."""
    return json.dumps(
        [
            [m.role, m.content.strip(), [[call.name, dict(call.arguments)] for call in m.tool_calls]]
            for m in conversation
        ],
        ensure_ascii=False,
        sort_keys=True,
        default=str,
    )
