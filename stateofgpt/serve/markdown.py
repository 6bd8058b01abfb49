"""A model's Markdown as HTML that cannot do anything.

Two independent walls: the parser knows no raw HTML, images or links (they stay visible as text), and the sanitiser
lets through only the handful of tags below, without attributes. Nothing here can cause a request.
"""

from __future__ import annotations

import html
from functools import lru_cache

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline

MAX_CHARS = 60_000  # longer answers are shown as plain text: parsing time grows faster than the text
TEXT_TAGS = {"p", "br", "hr", "em", "strong", "code", "pre", "blockquote", "ul", "ol", "li"}
TAGS = TEXT_TAGS | {"h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"}


def render(text: str) -> str:
    """`text`, written by a model, as sanitised HTML."""
    if len(text) > MAX_CHARS:
        return f"<pre>{html.escape(text)}</pre>"
    return nh3.clean(_parser().render(text), tags=TAGS, attributes={}, url_schemes=set())


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 20}).enable("table")
    parser.disable(["image", "link", "autolink", "html_inline", "html_block", "reference", "entity"])
    parser.inline.ruler.before("emphasis", "times", _times)
    return parser


def _times(state: StateInline, silent: bool) -> bool:
    """`3*4*5` is arithmetic: a star between digits is no emphasis."""
    before, star, after = state.src[max(state.pos - 1, 0)], state.src[state.pos], state.src[state.pos + 1 :][:1]
    if star != "*" or not (before.isdigit() and after.isdigit()):
        return False
    if not silent:
        state.pending += "*"
    state.pos += 1
    return True
