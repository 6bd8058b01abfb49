"""The chat template of a model made elsewhere, as token ids.

Owns: how a foreign Jinja template is rendered so that no text can become a special token, what an assistant learns of
it, and what is done where a template knows less than our messages say. Knows nothing of models and files.

The template never sees a content. It is rendered with a sign in the place of each, which gives text of its own, in
which special tokens count, and places, into which each content is encoded alone by the twin that has no specials. What
comes out depends on the roles alone, so it is rendered once for every order of roles.

Where a template does not know a role, the message goes where it can be read: a tool's result into a user's message, a
system message in front of the user's first. Tool calls are written by this file, not by the template: between the
tokens <tool_call> and </tool_call> where the vocabulary has them, else as that text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stateofgpt.errors import CheckpointError, DataError
from stateofgpt.text.messages import Message, Rendered, Role, call_to_text
from stateofgpt.text.sandbox import ChatTemplate
from stateofgpt.text.specials import OWN, TOOL_CLOSE, TOOL_OPEN
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.text.turns import TurnReader

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
)
PLAIN = (
    "{%- if bos_token is defined -%}{{- bos_token -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- message['role'] + ':\\n' + message['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:\\n' -}}{%- endif -%}\n"
)
MOST_SHAPES = 4096  # orders of roles that are remembered
_SHAPE = tuple[Role, ...]
_After = Literal["start", "special", "text"]


@dataclass(frozen=True)
class _Fixed:
    """Ids of the template's own."""

    ids: tuple[int, ...]
    special: bool = False
    learned: bool = False


@dataclass(frozen=True)
class _Slot:
    """Where the content of message `index` goes. `lead`: spaces before it that are encoded with it; `after`: what
    stands before; the template strips it on the left and right, or writes it as JSON, or not."""

    index: int
    lead: str
    after: _After
    strip_left: bool
    strip_right: bool
    as_json: bool
    learned: bool = False


_Part = _Fixed | _Slot


class TemplateLayout:
    """The layout that a foreign tokenizer's template gives (see `text.chat.Layout`)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template, notes = _chosen(tokenizer)
        variables = {"eos_token": tokenizer.specials[tokenizer.im_end], **tokenizer.variables}
        self._template = ChatTemplate(self.template, variables)
        self._signs = _unused_signs(self.template)
        names = sorted(tokenizer.specials.values(), key=len, reverse=True)
        self._ids = {name: number for number, name in tokenizer.specials.items()}
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        left, right = self._signs
        self._sign = re.compile(rf"(\t|\\t)?{left}(\d+){right}(\t|\\t)?")
        self._known: dict[tuple[_SHAPE, bool], list[_Part]] = {}
        self._generation = ""  # what the template writes for the assistant to go on from
        self._knows_system = self._shows(("system", "user"), 0)
        self._knows_tools = self._shows(("user", "assistant", "tool"), 2)
        self._newline = "\n" if "<tool_call>\\n" in self.template else ""  # inside of a call's marks
        self._generation = self._generation_prompt()
        self._known.clear()
        self.end, self.reader = self._read_turn()
        self.notes = (*notes, *self._differences())

    # ---- the layout -----------------------------------------------------------------------------------------------

    def render(self, conversation: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        messages = self._folded(conversation)
        return self._filled(self._parts(_roles(messages), add_generation_prompt), messages)

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        told = self._folded(messages)
        whole = [Message("user", ""), Message("assistant", ""), *told]
        parts = self._parts(_roles(whole), True)
        closed = next(i for i, part in enumerate(parts) if isinstance(part, _Slot) and part.index == 1)
        while not (isinstance(part := parts[closed], _Fixed) and part.ids[-1] == self.end):
            closed += 1
        return self._filled(parts[closed + 1 :], whole).ids

    def _filled(self, parts: Sequence[_Part], messages: Sequence[Message]) -> Rendered:
        ids: list[int] = []
        mask: list[int] = []
        for part in parts:
            new = part.ids if isinstance(part, _Fixed) else self._content(part, messages[part.index])
            ids += new
            mask += [int(part.learned)] * len(new)
        return Rendered(ids, mask)

    def _content(self, slot: _Slot, message: Message) -> list[int]:
        text, calls = message.content, message.tool_calls if message.role == "assistant" else ()
        text = text.lstrip() if slot.strip_left else text
        text = text.rstrip() if slot.strip_right and not calls else text
        if slot.as_json:
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        opening, closing, n = self.tokenizer.tool_open, self.tokenizer.tool_close, self._newline
        if opening is None or closing is None:
            written = "".join(f"{TOOL_OPEN}{n}{call_to_text(call)}{n}{TOOL_CLOSE}" for call in calls)
            return self._encode(slot.lead + text + written, slot.after)
        ids = self._encode(slot.lead + text, slot.after)
        for call in calls:
            inside = self.tokenizer.encode_after(n + call_to_text(call) + n, special=True)
            ids += [opening, *inside, closing]
        return ids

    def _encode(self, text: str, after: _After) -> list[int]:
        if not text:
            return []
        if after == "start":
            return self.tokenizer.encode(text)
        return self.tokenizer.encode_after(text, special=after == "special")

    # ---- the template, once for every order of roles --------------------------------------------------------------

    def _parts(self, roles: _SHAPE, add_generation_prompt: bool) -> list[_Part]:
        key = (roles, add_generation_prompt)
        if key not in self._known:
            made = list(self._pieces(self._text(roles, add_generation_prompt), roles))
            if len(self._known) >= MOST_SHAPES:
                self._known.clear()
            self._known[key] = _with_mask(made)
        return self._known[key]

    def _text(self, roles: _SHAPE, add_generation_prompt: bool) -> str:
        left, right = self._signs
        messages = [{"role": role, "content": f"\t{left}{i}{right}\t"} for i, role in enumerate(roles)]
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def _pieces(self, text: str, roles: _SHAPE) -> Iterator[_Part]:
        """The rendered text cut at special tokens and contents, all but the contents encoded."""
        after: _After = "start"
        at = 0
        places = [*self._sign.finditer(text), None]
        for place in places:
            own = text[at : place.start() if place else len(text)]
            learner = place is not None and roles[int(place[2])] == "assistant"
            given = self._given(own) if learner else len(own)
            lead = "" if place is None or (learner and given == len(own)) else own[len(own.rstrip(" ")) :]
            own = own[: len(own) - len(lead)]
            for text_of, learned in ((own[:given], False), (own[given:], True)):
                for part in self._own_pieces(text_of, after):
                    yield replace(part, learned=learned)
                    after = "special" if part.special else "text"
            if place:
                tabs = place[1], place[3]
                yield _Slot(int(place[2]), lead, after, tabs[0] is None, tabs[1] is None, "\\t" in tabs, learner)
                after, at = "text", place.end()

    def _own_pieces(self, text: str, after: _After) -> Iterator[_Fixed]:
        """Text of the template's own, in which special tokens count."""
        begun = 0
        for found in (*self._special.finditer(text), None):
            plain = text[begun : found.start() if found else len(text)]
            if plain:
                yield _Fixed(tuple(self._encode(plain, after)))
                after = "text"
            if found:
                yield _Fixed((self._ids[found[0]],), special=True)
                after, begun = "special", found.end()

    def _given(self, text: str) -> int:
        """How much of the text before an assistant's content is there before it speaks; the rest is for it to write."""
        if not self._generation:
            return len(text.rstrip(" "))
        place = text.rfind(self._generation)
        return len(text) if place < 0 else place + len(self._generation)

    # ---- what the template is like --------------------------------------------------------------------------------

    def _shows(self, roles: _SHAPE, index: int) -> bool:
        """Whether the template takes these roles and writes the content of the message at `index`."""
        try:
            text = self._text(roles, True)
        except (DataError, CheckpointError):
            return False
        return any(int(found[2]) == index for found in self._sign.finditer(text))

    def _generation_prompt(self) -> str:
        bare, asked = (self._text(("user",), add) for add in (False, True))
        return asked.removeprefix(bare) if asked.startswith(bare) else ""

    def _read_turn(self) -> tuple[int, TurnReader]:
        """What closes an assistant's turn, and how one is read."""
        parts = self._parts(("user", "assistant"), False)
        found = ((i, part) for i, part in enumerate(parts) if isinstance(part, _Slot) and part.index == 1)
        at, slot = next(found, (0, None))
        if slot is None:
            raise CheckpointError("the chat template leaves out what an assistant says; give the folder another")
        tail: list[int] = []
        for part in parts[at + 1 :]:
            if isinstance(part, _Fixed) and part.special:
                begun = self._encode(
                    slot.lead + "a", slot.after
                )  # where the vocabulary puts a space, it is sampled too
                lead = self.tokenizer.decode(begun, inner=True).removesuffix("a")
                ends = (part.ids[0], *self.tokenizer.stops)
                return part.ids[0], TurnReader(self.tokenizer, ends, lead, self.tokenizer.decode(tail, inner=True))
            tail += part.ids if isinstance(part, _Fixed) else ()
        raise CheckpointError(
            "the chat template closes an assistant's turn with no special token, so a model could never end one; "
            "give the folder a template that writes eos_token there"
        )

    def _differences(self) -> Iterator[str]:
        if not self._knows_system:
            yield "the chat template has no system messages, so one is put before the user's first words"
        if not self._knows_tools:
            yield "the chat template has no tools, so their results are given as a user's message"
        pasts: tuple[_SHAPE, ...] = (("user",), ("user", "assistant", "user"), ("system", "user"))
        for past in pasts:
            roles: _SHAPE = tuple(role for role in past if role != "system" or self._knows_system)
            prompt, closed = self._probe(roles, True), self._probe((*roles, "assistant"), False)
            closed = closed[: len(closed) - closed[::-1].index(self.end)]
            whole = self._probe((*roles, "assistant", "user"), False)
            if closed[: len(prompt)] != prompt or whole[: len(closed)] != closed:
                yield (
                    "the chat template writes the past anew when a conversation goes on, so each turn is rendered in "
                    "full and what was sampled is not a part of later prompts as it was"
                )
                return

    def _probe(self, roles: _SHAPE, add_generation_prompt: bool) -> list[int]:
        parts = self._parts(roles, add_generation_prompt)
        return self._filled(parts, [Message(role, "a") for role in roles]).ids

    # ---- roles that a template does not know ----------------------------------------------------------------------

    def _folded(self, conversation: Sequence[Message]) -> list[Message]:
        out: list[Message] = []
        waiting: list[str] = []  # system messages that stand before a user's
        results = False  # whether the last message holds tools' results
        for message in conversation:
            if message.role == "system" and not self._knows_system:
                waiting.append(message.content)
            elif message.role == "tool" and not self._knows_tools:
                before = f"{out.pop().content}\n" if results else ""
                out.append(Message("user", before + message.content))
            elif message.role == "user" and waiting:
                out.append(Message("user", "\n\n".join([*waiting, message.content])))
                waiting = []
            else:
                out.append(message)
            results = message.role == "tool" and not self._knows_tools
        return out + [Message("user", text) for text in waiting]


def _with_mask(parts: Sequence[_Part]) -> list[_Part]:
    """The parts, with what follows an assistant's content marked as learned, to the special token that closes it."""
    out: list[_Part] = []
    open_turn = False
    for part in parts:
        if isinstance(part, _Slot):
            open_turn = part.learned
        out.append(replace(part, learned=part.learned or open_turn))
        if isinstance(part, _Fixed) and part.special:
            open_turn = False
    return out


def _roles(messages: Sequence[Message]) -> _SHAPE:
    return tuple(message.role for message in messages)


def _chosen(tokenizer: Tokenizer) -> tuple[str, tuple[str, ...]]:
    """The folder's template, else ChatML where the vocabulary has its tokens, else names and the end token."""
    if tokenizer.template is not None:
        return tokenizer.template, ()
    if {OWN[1], OWN[2]} <= set(tokenizer.specials.values()):
        return CHATML, ("the folder has no chat template, so ChatML is taken",)
    return PLAIN, ("the folder has no chat template, so turns are named by their roles and closed by the end token",)


def _unused_signs(template: str) -> tuple[str, str]:
    """Two characters of private use that the template does not write itself."""
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in template)
    return next(free), next(free)
