"""The pieces of a page: tables, bars, cards, sections, and the page around them.

Owns HTML and the wording of numbers. Knows nothing about runs. Everything is `Markup`: a plain `str` is text from
somewhere (a model, a user's folder, a file name) and is escaped wherever it lands. There is no script in the page, and
its only style is `style.css` beside this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup

LONGEST_TEXT = 1200
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_TOOL_CALL = re.compile(
    r"<tool_call>(.*?)(?:</tool_call>|$)|\[(\w+ [^\[\]\n]*)\](?= →|$)", re.DOTALL
)  # wire, transcript


# --- numbers -----------------------------------------------------------------------------------------------------


def count(value: float | None) -> str:
    """1234 -> '1,234'; from a million on '1.23 million'."""
    if value is None:
        return "–"
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of digits and a true minus sign."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """0.734 -> '73%'."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def size(n_bytes: float | None) -> str:
    """Bytes in the decimal units that disks are sold in."""
    if n_bytes is None:
        return "–"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """75 -> '1 min 15 s'."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def probability(value: float | None) -> str:
    """A p-value: '< 0.001' or three digits."""
    if value is None:
        return "–"
    return "<\u00a00.001" if value < 0.001 else f"=\u00a0{value:.3f}"


# --- text --------------------------------------------------------------------------------------------------------


def clean(text: object, longest: int = LONGEST_TEXT) -> str:
    """Any text, made printable, and cut when very long."""
    shown = printable(str(text).replace("\r\n", "\n"))
    return shown if len(shown) <= longest else shown[:longest].rstrip() + " …"


def printable(text: str) -> str:
    """The text with control characters as pictures of themselves and half characters (lone surrogates) as '?'."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return _CONTROL.sub(lambda c: chr(0x2400 + ord(c[0])) if c[0] != "\x7f" else "␡", whole)


def said(text: object, longest: int = LONGEST_TEXT) -> Markup:
    """What a model or a person wrote, as it is, with tool calls set apart and written like calls."""
    shown, parts, at = clean(text, longest), [], 0
    for call in _TOOL_CALL.finditer(shown):
        parts.append(Markup("{}").format(shown[at : call.start()]))
        parts.append(Markup('<code class="call">{}</code>').format(_call(call[1] or call[2] or "")))
        at = call.end()
    parts.append(Markup("{}").format(shown[at:]))
    inner = Markup("").join(parts) if shown.strip() else Markup('<span class="quiet">(nothing)</span>')
    return Markup('<div class="said" dir="auto">{}</div>').format(inner)


def _call(inner: str) -> str:
    """{"name": "calculator", "arguments": {"expression": "1 + 2"}} as calculator(1 + 2); anything else as it is."""
    try:
        call = json.loads(inner)
        return f"{call['name']}({', '.join(map(str, call['arguments'].values()))})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return inner.strip()


def title_of(name: str) -> str:
    """A key as words: 'arithmetic_steps' -> 'arithmetic steps'."""
    return clean(name, 60).replace("_", " ")


# --- pieces ------------------------------------------------------------------------------------------------------


def tag(model: str) -> Markup:
    """The name of a model with its colour."""
    return Markup('<span class="tag c-{}">{}</span>').format(colour_of(model), model_name(model))


def model_name(model: str) -> str:
    """A model's name as it is written: 'sft' -> 'SFT'."""
    return {"base": "Base", "sft": "SFT", "rl": "RL"}.get(model, clean(model, 40))


def colour_of(model: str) -> str:
    """The colour class of a model: its stage's, wherever it appears."""
    known = {"base": "base", "sft": "sft", "reward": "reward", "rl": "rl"}
    return next((colour for name, colour in known.items() if name in model.lower()), "1")


def bar(value: float | None, colour: str, label: str | None = None) -> Markup:
    """A share between 0 and 1 as a bar with its number beside it."""
    if value is None:
        return Markup('<span class="quiet">–</span>')
    return Markup('<span class="bar c-{}" style="--v:{:.1f}%"><i></i><b>{}</b></span>').format(
        colour, 100 * min(max(value, 0.0), 1.0), percent(value) if label is None else label
    )


def stacked(parts: Sequence[tuple[str, float, str]]) -> Markup:
    """Shares of a whole as one bar: (name, share, colour); a share is written out where there is room."""
    segments = [
        Markup('<span class="c-{}" style="flex-grow:{:.4f}" title="{}">{}</span>').format(
            colour, share, f"{name} {percent(share)}", percent(share) if share >= 0.09 else ""
        )
        for name, share, colour in parts
        if share > 0
    ]
    about = ", ".join(f"{name} {percent(share)}" for name, share, _ in parts)
    return Markup('<div class="stacked" role="img" aria-label="{}">{}</div>').format(about, Markup("").join(segments))


def legend(parts: Iterable[tuple[str, str]]) -> Markup:
    """Names beside their colours: (name, colour)."""
    items = (Markup('<span class="tag c-{}">{}</span>').format(colour, name) for name, colour in parts)
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str, text_columns: int = 1) -> Markup:
    """A table that scrolls by itself where the page is too narrow.

    The first `text_columns` and columns of bars are set left, numbers right.
    """
    filled = [list(row) for row in rows]
    drawn = {i for row in filled for i, value in enumerate(row) if isinstance(value, Markup) and "<" in value}
    css = [Markup("") if i < text_columns or i in drawn else Markup(' class="n"') for i in range(len(head))]
    header = Markup("").join(Markup('<th scope="col"{}>{}</th>').format(css[i], name) for i, name in enumerate(head))
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], Markup("").join(Markup("<td{}>{}</td>").format(css[i], row[i]) for i in range(1, len(row)))
        )
        for row in filled
    )
    return Markup(
        '<div class="tabled"><p class="caption">{c}</p><div class="scroll" role="region" aria-label="{c}" tabindex="0">'
        '<table{k} aria-label="{c}"><thead><tr>{h}</tr></thead><tbody>{b}</tbody></table></div></div>'
    ).format(c=caption, k=Markup(' class="duo"') if len(head) == 2 else Markup(""), h=header, b=body)


def grid(items: Iterable[Markup], kind: str = "charts") -> Markup:
    """Items side by side where there is room; empty items vanish."""
    kept = [item for item in items if item]
    return Markup('<div class="{}">{}</div>').format(kind, Markup("").join(kept)) if kept else Markup("")


def figure(inner: Markup, caption: str = "") -> Markup:
    """A picture with a caption; nothing when there is no picture."""
    under = Markup("<figcaption>{}</figcaption>").format(caption) if caption else Markup("")
    return Markup("<figure>{}{}</figure>").format(inner, under) if inner else Markup("")


def card(head: object, inner: object, kind: str = "") -> Markup:
    """A text with a small heading over it."""
    return Markup('<div class="card {}"><div class="head">{}</div>{}</div>').format(kind, head, inner)


def more(summary: str, inner: Markup) -> Markup:
    """Something that is folded away until asked for."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, inner) if inner else Markup("")


def paragraph(text: object, kind: str = "") -> Markup:
    """A paragraph of the page's own words."""
    return Markup('<p class="{}">{}</p>').format(kind, text) if kind else Markup("<p>{}</p>").format(text)


def missing(what: str, command: str) -> Markup:
    """The place of something that is not there, and the command that makes it."""
    return Markup('<p class="missing">{} <code>{}</code></p>').format(f"{what} To make it:", command)


# --- the page ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A chapter: what it is about, what was found in one sentence, and the evidence."""

    id: str
    title: str
    finding: object
    body: Markup
    colour: str = ""


def page(title: str, head: Markup, sections: Sequence[Section], foot: Markup) -> str:
    """The whole document."""
    style = (files("stateofgpt.report") / "style.css").read_text("utf-8")
    contents = Markup("").join(
        Markup('<li><a class="c-{}" href="#{}">{}</a></li>').format(s.colour or "none", s.id, s.title) for s in sections
    )
    chapters = Markup("\n").join(
        Markup(
            '<section id="{i}" class="c-{c}" aria-labelledby="{i}-title"><h2 id="{i}-title"><a href="#{i}">{t}</a></h2>'
            '<p class="finding">{f}</p>{b}</section>'
        ).format(i=s.id, c=s.colour or "none", t=s.title, f=s.finding, b=s.body)
        for s in sections
    )
    return printable(
        Markup(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            "<title>{title}</title><style>{style}</style></head><body>"
            '<a class="skip" href="#{first}">Skip to the report</a>'
            '<main><header>{head}</header>\n<nav class="toc" aria-label="Contents"><ol>{contents}</ol></nav>'
            "{chapters}\n<footer>{foot}</footer></main></body></html>\n"
        ).format(
            first=sections[0].id,
            title=title,
            style=Markup(style),
            contents=contents,
            head=head,
            chapters=chapters,
            foot=foot,
        )
    )
