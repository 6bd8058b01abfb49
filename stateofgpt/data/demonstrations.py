"""Owns the demonstrations of supervised finetuning: generated from the skills, taken from dialogues, or the user's own.

User files are JSONL; each row is read as `messages` (OpenAI), ShareGPT (`conversations` of from/value), Alpaca
(`instruction`, `input`, `output`) or GSM8K (`question`, `answer`), by its keys. Generated item i is a pure function of
(seed, i), so that a resumed stage sees the same ones. It knows nothing about tokens, packing or training.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateofgpt.data import gsm8k
from stateofgpt.data.documents import bounded_lines
from stateofgpt.data.skills import SKILLS, demonstrate, problem
from stateofgpt.errors import DataError
from stateofgpt.text.chat import Conversation, Message, message_from_json

MAX_LINE_BYTES = 10_000_000
_ROLES_OF_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool",
    "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class DemonstrationConfig:
    """What the generated demonstrations are made of. A skill's weight is its share before normalising."""

    arithmetic: float = 5.0
    arithmetic_direct: float = 1.0
    arithmetic_steps: float = 5.0
    arithmetic_tool: float = 3.0
    fact: float = 1.5
    compare: float = 4.5
    copy: float = 1.0
    reverse: float = 1.0
    count: float = 0.7
    sort: float = 2.0
    names: float = 2.0
    greet: float = 0.5
    thanks: float = 0.4
    identity: float = 0.5
    decline: float = 0.8
    two_tasks_share: float = 0.08  # of the conversations go on with a second, unrelated task
    dialogue_share: float = 0.05  # of the conversations are human dialogues, where there are any

    def weights(self) -> tuple[float, ...]:
        """The weights in the order of `SKILLS`."""
        return tuple(float(getattr(self, skill)) for skill in SKILLS)


def demonstration(
    seed: int, index: int, config: DemonstrationConfig | None = None, dialogues: Sequence[Conversation] = ()
) -> Conversation:
    """Demonstration `index` of the endless list that belongs to `seed`: always the same for the same arguments."""
    config = config or DemonstrationConfig()
    rng = random.Random(f"demonstration {seed} {index}")
    if dialogues and rng.random() < config.dialogue_share:
        return dialogues[rng.randrange(len(dialogues))]
    weights = config.weights()
    if min(weights) < 0 or sum(weights) <= 0:
        raise DataError("the demonstrations need weights of at least 0 with one above 0; put one skill's weight up")
    tasks = 2 if rng.random() < config.two_tasks_share else 1
    conversation: Conversation = ()
    for skill in rng.choices(SKILLS, weights, k=tasks):
        conversation += demonstrate(problem(skill, rng, "train"), rng)
    return conversation


def demonstrations(
    seed: int, n: int, config: DemonstrationConfig | None = None, dialogues: Sequence[Conversation] = ()
) -> Iterator[Conversation]:
    """The first `n` demonstrations of `seed`."""
    return (demonstration(seed, index, config, dialogues) for index in range(n))


# ------------------------------------------------------------------------------------------------- the user's own files


def read_demonstrations(path: Path) -> list[Conversation]:
    """The conversations of a JSONL file, one a line. DataError names the file, the first bad line and how many more."""
    found: list[Conversation] = []
    faults: list[str] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(bounded_lines(file, MAX_LINE_BYTES), start=1):
                if line is not None and not line.strip():
                    continue
                try:
                    found.append(_read_line(line, first=number == 1))
                except DataError as error:
                    faults.append(f"{path}:{number}: {error}")
    except OSError as error:
        raise DataError(f"the demonstrations {path} cannot be read ({error.strerror}); give a JSONL file") from error
    if faults:
        more = f" (and {len(faults) - 1} more bad lines)" if len(faults) > 1 else ""
        raise DataError(faults[0] + more)
    if not found:
        raise DataError(f"{path} holds no demonstrations; put one JSON object a line, with messages")
    return found


def conversation_from_row(row: Mapping[str, Any]) -> Conversation:
    """The conversation of one row in any of the four forms; DataError says what is wrong with it."""
    if "messages" in row:
        items = _rows(row["messages"], "messages")
        conversation = tuple(message_from_json(item) for item in items)
    elif "conversations" in row:
        conversation = tuple(_sharegpt(item) for item in _rows(row["conversations"], "conversations"))
        if isinstance(row.get("system"), str) and row["system"].strip():
            conversation = (Message("system", row["system"]), *conversation)
    elif "instruction" in row:
        conversation = _alpaca(row)
    elif "question" in row and "answer" in row:
        conversation = gsm8k.demonstration(row, tools=True)
    else:
        keys = ", ".join(sorted(map(str, row))[:5]) or "nothing"
        raise DataError(f"a row needs messages, conversations, or instruction and output; this one has {keys}")
    return _checked(conversation)


def _read_line(line: bytes | None, *, first: bool) -> Conversation:
    if line is None:
        raise DataError(f"the line has more than {MAX_LINE_BYTES:,} bytes; a row is one conversation")
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} of the line is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError("the line is not JSON") from error
    if not isinstance(row, dict):
        raise DataError(f"the line is a JSON {type(row).__name__}, not an object")
    return conversation_from_row(row)


def _rows(value: object, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} must be a list with at least one message")
    return value


def _sharegpt(item: object) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get("value"), str):
        raise DataError("a message of conversations must be an object with the texts from and value")
    role = _ROLES_OF_SHAREGPT.get(str(item.get("from")))
    if role is None:
        raise DataError(f"a message is from {str(item.get('from'))[:40]!r}; use human, gpt, system or tool")
    return message_from_json({"role": role, "content": item["value"]})


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str):
            raise DataError(f"a row with an instruction needs {name} as text")
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise DataError("a row's input must be text")
    question = f"{row['instruction']}\n\n{more}" if more.strip() else row["instruction"]
    return Message("user", question), Message("assistant", row["output"])


def _checked(conversation: Conversation) -> Conversation:
    if not any(m.role == "assistant" and (m.content.strip() or m.tool_calls) for m in conversation):
        raise DataError("the conversation has no answer of the assistant, so there is nothing to learn from it")
    if not any(m.role == "user" and m.content.strip() for m in conversation):
        raise DataError("the conversation has no message of the user")
    return conversation


# ------------------------------------------------------------------------------------------------------ human dialogues


def chitchat_path() -> Path | None:
    """Where the installed chitchat-dataset keeps its dialogues; None where it is not installed."""
    spec = importlib.util.find_spec("chitchat_dataset")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / "dataset.json" if folders else None
    return path if path and path.is_file() else None


def read_dialogues(path: Path, most_turns: int = 6, most_characters: int = 300) -> list[Conversation]:
    """The dialogues of a chitchat-dataset file as chats: the first speaker is the user, the last turn the assistant's.

    Each is cut to at most `most_turns` turns and `most_characters` characters; too short ones are left out.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        dialogues = [dialogue["messages"] for dialogue in data.values()]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"the dialogues {path} cannot be read; install chitchat-dataset again") from error
    chats = (_dialogue(dialogue, most_turns, most_characters) for dialogue in dialogues)
    return [chat for chat in chats if chat]


def _dialogue(turns: Sequence[Any], most_turns: int, most_characters: int) -> Conversation:
    chat: list[Message] = []
    speakers: list[str] = []
    characters = 0
    for turn in turns:
        said = [" ".join(str(part.get("text", "")).split()) for part in turn if isinstance(part, Mapping)]
        text = " ".join(part for part in said if part)
        if not text:
            continue
        speaker = str(turn[0].get("sender"))
        speakers += [speaker] if speaker not in speakers else []
        role: Any = "user" if speaker == speakers[0] else "assistant"
        characters += len(text)
        if len(speakers) > 2 or len(chat) >= most_turns or characters > most_characters:
            break
        if chat and chat[-1].role == role:
            chat[-1] = Message(role, f"{chat[-1].content} {text}")
        else:
            chat.append(Message(role, text))
    while chat and chat[-1].role != "assistant":
        chat.pop()
    return tuple(chat)
