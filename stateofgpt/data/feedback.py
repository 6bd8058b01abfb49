"""Conversations, answers and what people say about them: the only owner of the feedback schema.

SQLAlchemy Core on SQLite (the default) or PostgreSQL (by URL). A conversation is a tree: an answer given again is a
sibling of the first, which stays. What people say is an append-only list of events with idempotency keys; ratings are
derived from it. When a method that writes has returned, what it wrote is on the disk (WAL, `synchronous=FULL`).
Knows nothing of HTTP, models or tokens; what verdicts say about answers is `data/preferences.py`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import sqlalchemy as sa

from stateofgpt.data.database import Database, FeedbackConflict, FeedbackRefused, UnknownMessage
from stateofgpt.data.preferences import Comparison, Rating, StoredMessage, Verdict, compare
from stateofgpt.errors import FeedbackError
from stateofgpt.text.chat import Conversation, message_from_json, message_to_json

SCHEMA_VERSION = 1
MAX_REASON_CHARS = 2_000
MAX_CORRECTION_CHARS = 16_000
LOCAL = "local"  # the author where there are no accounts

_metadata = sa.MetaData()
_sequence = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up by itself for INTEGER only
_meta = sa.Table(
    "meta",
    _metadata,
    sa.Column("key", sa.String(40), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
_conversations = sa.Table(
    "conversations",
    _metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("author", sa.String(80), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
)
_messages = sa.Table(
    "messages",
    _metadata,
    sa.Column("seq", _sequence, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("conversation", sa.ForeignKey("conversations.id"), nullable=False, index=True),
    sa.Column("parent", sa.ForeignKey("messages.id"), index=True),
    sa.Column("role", sa.String(20), nullable=False),
    sa.Column("body", sa.Text, nullable=False),  # JSON list of OpenAI messages: an answer holds its tool calls
    sa.Column("model", sa.String(200)),
    sa.Column("partial", sa.Boolean, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
)
_events = sa.Table(
    "feedback",
    _metadata,
    sa.Column("seq", _sequence, primary_key=True, autoincrement=True),
    sa.Column("key", sa.String(80), nullable=False, unique=True),
    sa.Column("message", sa.ForeignKey("messages.id"), nullable=False, index=True),
    sa.Column("author", sa.String(80), nullable=False),
    sa.Column("rating", sa.String(8)),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("correction", sa.Text, nullable=False),
    sa.Column("retracted", sa.Boolean, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
)


@dataclass(frozen=True)
class Thread:
    """A whole conversation: every branch in the order of writing, and its author's verdict on each answer."""

    id: str
    created: float
    messages: tuple[StoredMessage, ...]
    verdicts: dict[str, Verdict]


@dataclass(frozen=True)
class Counts:
    """How much there is to learn from."""

    conversations: int
    answers: int
    up: int
    down: int
    corrections: int
    comparisons: int


class FeedbackStore:
    """The feedback database at a path or an SQLAlchemy URL, made when missing.

    `exclusive` is for a server: a second one on the same file is refused. Raises FeedbackError, one sentence, when the
    database is of a newer version, damaged, locked or full.
    """

    def __init__(self, url_or_path: str | Path, *, exclusive: bool = False, busy_timeout_s: float = 5.0) -> None:
        self._database = Database(url_or_path, exclusive=exclusive, busy_timeout_s=busy_timeout_s)
        self.name = self._database.name
        self._write, self._read = self._database.write, self._database.read
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    # -- conversations -------------------------------------------------------------------------------------------

    def new_conversation(self, author: str = LOCAL, id: str | None = None) -> str:
        """Begin a conversation and return its id."""
        id = id or uuid.uuid4().hex
        with self._write() as connection:
            connection.execute(_conversations.insert().values(id=id, author=author, created=time.time()))
        return id

    def add_message(
        self,
        conversation: str,
        parent: str | None,
        messages: Conversation,
        *,
        model: str | None = None,
        partial: bool = False,
        id: str | None = None,
    ) -> StoredMessage:
        """Store one turn under `parent` (None: the first). A second answer under one parent becomes a sibling."""
        if not messages:
            raise FeedbackRefused("an empty turn cannot be stored: it has no message")
        row = {
            "id": id or uuid.uuid4().hex,
            "conversation": conversation,
            "parent": parent,
            "role": messages[-1].role if messages[-1].role in ("user", "system") else "assistant",
            "body": _storable(json.dumps([message_to_json(message) for message in messages], ensure_ascii=False)),
            "model": model,
            "partial": partial,
            "created": time.time(),
        }
        with self._write() as connection:
            home = conversation if parent is None else _conversation_of(connection, parent)
            if home != conversation:
                raise UnknownMessage(f"message {parent!r} is not part of conversation {conversation!r}")
            if not connection.scalar(sa.select(_conversations.c.id).where(_conversations.c.id == conversation)):
                raise UnknownMessage(f"there is no conversation {conversation!r}")
            seq = connection.execute(_messages.insert().values(**row)).inserted_primary_key
        return _node({**row, "seq": seq[0] if seq else 0})

    def message(self, id: str) -> StoredMessage:
        """One turn; UnknownMessage when there is none."""
        with self._read() as connection:
            row = connection.execute(_messages.select().where(_messages.c.id == id)).mappings().first()
        if row is None:
            raise UnknownMessage(f"there is no message {id!r}")
        return _node(row)

    def path(self, id: str, author: str | None = None) -> tuple[StoredMessage, ...]:
        """The turns from the root down to and including message `id`; with `author`, of a conversation of theirs."""
        by_id = {node.id: node for node in self.thread(self.message(id).conversation, author).messages}
        nodes = [by_id[id]]
        while nodes[-1].parent is not None:
            nodes.append(by_id[nodes[-1].parent])
        return tuple(reversed(nodes))

    def history(self, id: str) -> Conversation:
        """What was said from the root down to and including message `id`, tool calls and results among it."""
        return tuple(message for node in self.path(id) for message in node.messages)

    def thread(self, conversation: str, author: str | None = None) -> Thread:
        """A conversation with all its branches; UnknownMessage when there is none, or none of `author`'s."""
        with self._read() as connection:
            head = connection.execute(_conversations.select().where(_conversations.c.id == conversation)).first()
            if head is None or author not in (None, head.author):
                raise UnknownMessage(f"there is no conversation {conversation!r}")
            mine = _messages.c.conversation == conversation
            rows = connection.execute(_messages.select().where(mine).order_by(_messages.c.seq)).mappings().all()
            verdicts = _fold(
                connection.execute(
                    sa.select(_events).join(_messages, _messages.c.id == _events.c.message).where(mine)
                    .order_by(_events.c.seq)
                ).mappings()
            )  # fmt: skip
        own = {verdict.message: verdict for verdict in verdicts if verdict.author == head.author}
        return Thread(head.id, head.created, tuple(_node(row) for row in rows), own)

    def conversations(self, limit: int = 50, author: str | None = None) -> list[tuple[str, float, str]]:
        """(id, time of beginning, first words) of the newest conversations."""
        first = sa.select(sa.func.min(_messages.c.seq)).group_by(_messages.c.conversation)
        query = (
            sa.select(_conversations.c.id, _conversations.c.created, _messages.c.body)
            .join(_messages, _messages.c.conversation == _conversations.c.id)
            .where(_messages.c.seq.in_(first))
            .order_by(_conversations.c.created.desc()).limit(limit)
        )  # fmt: skip
        with self._read() as connection:
            rows = connection.execute(query if author is None else query.where(_conversations.c.author == author)).all()
        return [(id, created, str(json.loads(body)[0].get("content") or "")[:80]) for id, created, body in rows]

    # -- feedback ------------------------------------------------------------------------------------------------

    def rate(
        self,
        message: str,
        key: str,
        rating: Rating | None = None,
        *,
        reason: str = "",
        correction: str = "",
        retracted: bool = False,
        author: str = LOCAL,
    ) -> Verdict:
        """Append one event and return the verdict it leads to. `retracted` takes back all said before.

        The same `key` again is the same event and changes nothing; with other content it is a FeedbackConflict.
        """
        _check(key, rating, reason, correction, retracted)
        event = {
            "message": message, "author": author, "rating": rating, "reason": _storable(reason.strip()),
            "correction": _storable(correction.strip()), "retracted": retracted,
        }  # fmt: skip
        with self._write() as connection:
            role = connection.scalar(sa.select(_messages.c.role).where(_messages.c.id == message))
            if role is None:
                raise UnknownMessage(f"there is no message {message!r}")
            if role != "assistant":
                raise FeedbackRefused(f"message {message!r} is no answer: only answers can be rated")
            known = connection.execute(_events.select().where(_events.c.key == key)).mappings().first()
            if known is None:
                connection.execute(_events.insert().values(key=key, created=time.time(), **event))
            elif any(known[name] != value for name, value in event.items()):
                raise FeedbackConflict(f"idempotency key {key!r} was used for another event: send a new key")
        return self.verdict(message, author)

    def verdict(self, message: str, author: str = LOCAL) -> Verdict:
        """What `author` thinks of `message` now."""
        query = _events.select().where(_events.c.message == message, _events.c.author == author)
        with self._read() as connection:
            found = list(_fold(connection.execute(query.order_by(_events.c.seq)).mappings()))
        return found[0] if found else Verdict(message, author)

    def comparisons(self, *, per_author: int = 1000, per_conversation: int = 50) -> list[Comparison]:
        """What was said, as pairs of answers, by the rules in `data/preferences.py`; in a fixed order."""
        with self._read() as connection:
            nodes = [_node(row) for row in connection.execute(_messages.select().order_by(_messages.c.seq)).mappings()]
            verdicts = list(_fold(connection.execute(_events.select().order_by(_events.c.seq)).mappings()))
            rows = connection.execute(sa.select(_conversations.c.id, _conversations.c.author))
            authors = {id: author for id, author in rows}
        return compare(nodes, verdicts, authors, per_author=per_author, per_conversation=per_conversation)

    def counts(self) -> Counts:
        """How much feedback there is, retracted votes left out."""
        answers = sa.select(sa.func.count()).select_from(_messages).where(_messages.c.role == "assistant")
        with self._read() as connection:
            conversations = connection.scalar(sa.select(sa.func.count()).select_from(_conversations)) or 0
            n_answers = connection.scalar(answers) or 0
            verdicts = list(_fold(connection.execute(_events.select().order_by(_events.c.seq)).mappings()))
        return Counts(
            conversations=conversations,
            answers=n_answers,
            up=sum(verdict.rating == "up" for verdict in verdicts),
            down=sum(verdict.rating == "down" for verdict in verdicts),
            corrections=sum(bool(verdict.correction) for verdict in verdicts),
            comparisons=len(self.comparisons()),
        )

    # -- the database --------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make the tables of a new database; refuse one of a newer version."""
        with self._write() as connection:
            if not sa.inspect(connection).has_table("meta"):
                _metadata.create_all(connection)
                connection.execute(_meta.insert().values(key="schema_version", value=str(SCHEMA_VERSION)))
            version = connection.scalar(sa.select(_meta.c.value).where(_meta.c.key == "schema_version"))
        if version is None or not version.isdigit() or int(version) > SCHEMA_VERSION:
            raise FeedbackError(
                f"{self.name} has feedback schema {version}, and this version of stateofgpt knows {SCHEMA_VERSION} "
                "at most: update stateofgpt, or choose another file"
            )


def _check(key: str, rating: str | None, reason: str, correction: str, retracted: bool) -> None:
    if not key or len(key) > 80:
        raise FeedbackRefused("feedback needs an idempotency key of 1 to 80 characters")
    if rating is not None and rating not in get_args(Rating):
        raise FeedbackRefused(f"a rating is 'up' or 'down', not {rating!r}")
    if len(reason) > MAX_REASON_CHARS:
        raise FeedbackRefused(f"the reason has {len(reason)} characters: {MAX_REASON_CHARS} are stored at most")
    if len(correction) > MAX_CORRECTION_CHARS:
        raise FeedbackRefused(f"the correction has {len(correction)} characters: {MAX_CORRECTION_CHARS} at most")
    if not (rating or reason.strip() or correction.strip() or retracted):
        raise FeedbackRefused("empty feedback: give a rating, a reason, a correction or a retraction")


def _storable(text: str) -> str:
    """Half characters (lone surrogates) and NUL cannot be stored as text: `?` and nothing in their place."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "")


def _conversation_of(connection: sa.Connection, message: str) -> str:
    found = connection.scalar(sa.select(_messages.c.conversation).where(_messages.c.id == message))
    if found is None:
        raise UnknownMessage(f"there is no message {message!r}")
    return str(found)


def _node(row: Any) -> StoredMessage:
    return StoredMessage(
        seq=row["seq"],
        id=row["id"],
        conversation=row["conversation"],
        parent=row["parent"],
        role=row["role"],
        messages=tuple(message_from_json(message) for message in json.loads(row["body"])),
        model=row["model"],
        partial=bool(row["partial"]),
        created=row["created"],
    )


def _fold(events: Iterable[Any]) -> Sequence[Verdict]:
    """The verdict of each person on each message: later events complete or change earlier ones."""
    verdicts: dict[tuple[str, str], Verdict] = {}
    for event in events:
        place = (event["message"], event["author"])
        before = verdicts.pop(place, Verdict(*place))
        if event["retracted"]:
            continue
        verdicts[place] = Verdict(
            *place,
            rating=event["rating"] or before.rating,
            reason=event["reason"] or before.reason,
            correction=event["correction"] or before.correction,
        )
    return list(verdicts.values())
