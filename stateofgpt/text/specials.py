"""Which ids of a vocabulary are no text, and what each is for.

Owns: our own six special tokens, and how the roles of a tokenizer made elsewhere are read from the files beside it
(`tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and the chat template). Knows nothing of
encoding, nor of conversations.

The rules for a tokenizer made elsewhere, each taking the first that is there:

    eot   begins a document   the token <|endoftext|>; the bos token; the eos token
    end   ends a turn         the eos token; the first eos id of generation_config.json; <|im_end|>; eot
    pad   fills a row         the declared pad token, if nothing ends or begins with it; a special token that nothing
                              uses; the declared one all the same, or `end`: told from a real one by its position, and
                              never learned
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from stateofgpt.errors import CheckpointError

OWN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<tool_call>", "</tool_call>")
DOCUMENT, TURN_END = OWN[0], OWN[2]
TOOL_OPEN, TOOL_CLOSE = OWN[4:]
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_SPARE = ("finetune_right_pad", "pad", "unused", "reserved")  # in the names of tokens that are kept for such uses


@dataclass(frozen=True)
class Specials:
    """The ids that no text becomes (`names`), those of them that a text is shown without (`hidden`), and the roles.

    `tool_open` and `tool_close` are None where the vocabulary has no marks for a tool call. `variables` are the names
    of the roles as a chat template asks for them (`bos_token` ...). `notes` say what was chosen in place of a missing
    role, a sentence each.
    """

    names: Mapping[int, str]
    hidden: frozenset[int]
    eot: int
    end: int
    pad: int
    stops: tuple[int, ...]
    im_start: int | None = None
    tool_open: int | None = None
    tool_close: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def own_specials() -> Specials:
    """Those of every tokenizer that is trained here: ids 0 to 5."""
    eot, im_start, im_end, pad, tool_open, tool_close = range(len(OWN))
    return Specials(
        names=dict(enumerate(OWN)),
        hidden=frozenset(range(len(OWN))),
        eot=eot,
        end=im_end,
        pad=pad,
        stops=(im_end, eot),
        im_start=im_start,
        tool_open=tool_open,
        tool_close=tool_close,
        variables={"bos_token": OWN[eot], "eos_token": OWN[im_end], "pad_token": OWN[pad]},
    )


def is_own(data: Mapping[str, Any]) -> bool:
    """Whether a parsed tokenizer.json is one of ours."""
    declared = {token["content"]: token["id"] for token in data["added_tokens"] if token["special"]}
    return declared == {name: number for number, name in enumerate(OWN)}


def find_specials(
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    named: Mapping[str, Any],
    generation: Mapping[str, Any],
    template: str,
) -> Specials:
    """The roles in a tokenizer made elsewhere: its parsed tokenizer.json, tokenizer_config.json (`settings`),
    special_tokens_map.json (`named`), generation_config.json, and its chat template's text.

    CheckpointError when nothing in them can begin a document or end a text.
    """
    vocabulary: Mapping[str, int] = data["model"]["vocab"]
    added = {token["content"]: token for token in data["added_tokens"] if not is_plain(token)}
    variables = {role: name for role in _ROLES if (name := _content(settings.get(role, named.get(role))))}
    ids = {name: int(token["id"]) for name, token in added.items()}
    ids |= {name: vocabulary[name] for name in variables.values() if name not in ids and name in vocabulary}
    variables = {role: name for role, name in variables.items() if name in ids}
    names = {number: name for name, number in ids.items()}
    declared = [n for n in _whole_numbers(generation.get("eos_token_id")) if n in names]

    def of(role: str) -> int | None:
        return ids.get(variables.get(role, ""))

    eot = _first(ids.get(DOCUMENT), of("bos_token"), of("eos_token"), *declared)
    if eot is None:
        raise CheckpointError(
            "it has no token that begins a document or ends a text; name its bos_token or eos_token in "
            "tokenizer_config.json"
        )
    end = _first(of("eos_token"), *declared, ids.get(TURN_END), eot)
    assert end is not None
    named_roles = {name for role, name in variables.items() if role != "pad_token"}
    taken = {eot, end, *declared, *(ids[name] for name in named_roles)}
    unused = [name for name, token in added.items() if token["special"] and name not in (TOOL_OPEN, TOOL_CLOSE)]
    spare = {name: ids[name] for name in unused if ids[name] not in taken and name not in template}
    pad, notes = _padding(of("pad_token"), end, taken, spare, names)
    both = TOOL_OPEN in ids and TOOL_CLOSE in ids
    shown = {ids[name] for name, token in added.items() if not token["special"]} - set(map(ids.get, variables.values()))
    return Specials(
        names=names,
        hidden=frozenset(names.keys() - shown),
        eot=eot,
        end=end,
        pad=pad,
        stops=tuple(dict.fromkeys((end, *declared, eot))),
        im_start=ids.get(OWN[1]),
        tool_open=ids[TOOL_OPEN] if both else None,
        tool_close=ids[TOOL_CLOSE] if both else None,
        variables=variables,
        notes=notes,
    )


def is_plain(token: Mapping[str, Any]) -> bool:
    """Whether an added token is only text: some vocabularies have their runs of spaces there."""
    return not token["special"] and not token["content"].strip()


def _padding(
    declared: int | None, end: int, taken: Collection[int], spare: Mapping[str, int], names: Mapping[int, str]
) -> tuple[int, tuple[str, ...]]:
    """The id of padding, and what is to be said about the choice."""
    if declared is not None and declared not in taken:
        return declared, ()
    why = "has no pad token" if declared is None else "pads with a token that also begins or ends a text"
    if not spare:
        pad = end if declared is None else declared
        return pad, (f"the tokenizer {why} and none to spare, so rows are filled with {names[pad]}, which is masked",)
    meant = (name for word in _SPARE for name in spare if word in name)
    name = next(meant, max(spare, key=lambda one: spare[one]))
    return spare[name], (f"the tokenizer {why}, so rows are filled with {name}, which nothing uses",)


def _content(value: object) -> str | None:
    """The name of a special token: a string, or an object that has it as `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _whole_numbers(value: object) -> list[int]:
    found = value if isinstance(value, list) else [value]
    return [number for number in found if type(number) is int]


def _first(*candidates: int | None) -> int | None:
    return next((number for number in candidates if number is not None), None)
