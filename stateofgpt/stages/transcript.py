"""How an answer with tool calls is written down for people to read, in results and reports."""

from __future__ import annotations

from stateofgpt.text.chat import Conversation


def written(messages: Conversation) -> str:
    """An answer in one line of text: tool calls in brackets, what they returned after an arrow.

    "[calculator 4729+386] → 5115 The answer is 5115."
    """
    parts = []
    for message in messages:
        calls = [f"[{c.name} {' '.join(str(v) for v in c.arguments.values())}]" for c in message.tool_calls]
        text = f"→ {message.content}" if message.role == "tool" else message.content
        parts += [part for part in (text, *calls) if part]
    return " ".join(parts)
