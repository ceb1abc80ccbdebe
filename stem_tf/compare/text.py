"""Words of a report as a page and as Markdown show them. Names of tasks and columns may hold any character."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from markupsafe import Markup, escape

Kind = Literal["plain", "code", "strong"]

_SPANS = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
"""Control characters, and those that turn the direction of all that follows."""
_SHORT = 30
"""Characters of code that fit a line of a phone."""
_BEFORE_PERCENT = re.compile(r"(?<=\d) (?=%)")
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown may read as markup inside a line; an underscore within a word is none."""
_BLOCK = re.compile(r"^(?:([#+=>-])|(\d+)([.)]))")
"""What Markdown may read as a heading, list or rule at the start of a line."""


def one_line(text: str) -> str:
    """The text with runs of white space as one space, and control characters replaced."""
    return _CONTROL.sub("\ufffd", " ".join(text.split()))


def spans(text: str) -> Iterator[tuple[Kind, str]]:
    """Splits a paragraph into plain text, ``code`` between backticks and **weight** between two stars."""
    text, end = one_line(text), 0
    for match in _SPANS.finditer(text):
        if match.start() > end:
            yield "plain", text[end : match.start()]
        yield ("code", match[1]) if match[1] else ("strong", match[2])
        end = match.end()
    if end < len(text):
        yield "plain", text[end:]


def html(text: str) -> Markup:
    """A paragraph's content as HTML; short code and "80 %" never break over two lines."""

    def shown(kind: Kind, part: str) -> Markup:
        match kind:
            case "code":
                return Markup('<code class="short">{}</code>' if len(part) < _SHORT else "<code>{}</code>").format(part)
            case "strong":
                return Markup("<strong>{}</strong>").format(part)
            case "plain":
                return escape(_BEFORE_PERCENT.sub("\N{NO-BREAK SPACE}", part))

    return Markup("").join(shown(kind, part) for kind, part in spans(text))


def plain(text: str) -> str:
    """A paragraph without its marks, for attributes and titles."""
    return "".join(part for _, part in spans(text))


def markdown(text: str) -> str:
    """A paragraph in Markdown."""
    shown = {"plain": "{}", "code": "`{}`", "strong": "**{}**"}
    whole = "".join(shown[kind].format(part if kind == "code" else _escaped(part)) for kind, part in spans(text))
    return _BLOCK.sub(lambda match: f"\\{match[1]}" if match[1] else rf"{match[2]}\{match[3]}", whole)


def literal(text: str) -> str:
    """Text that Markdown shows as it is, also in a cell of a table."""
    return _escaped(one_line(text))


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", text)
