"""What a report is made of, independent of how it is shown: sections of paragraphs, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Tone = Literal["", "good", "bad", "unsure", "muted"]
"""What a cell says, for its colour; its mark in `MARKS` says it without colour."""


class Mark(NamedTuple):
    """How a tone is shown without colour.

    Attributes:
      sign: one character before the cell's text, or "".
      word: what the sign means, for readers who hear the page.
    """

    sign: str = ""
    word: str = ""


MARKS: Mapping[Tone, Mark] = {
    "": Mark(),
    "good": Mark("\N{BLACK UP-POINTING TRIANGLE}", "better"),
    "bad": Mark("\N{BLACK DOWN-POINTING TRIANGLE}", "worse"),
    "unsure": Mark("\N{WHITE CIRCLE}", "undecided"),
    "muted": Mark(),
}


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than a text. Its text is shown as it is, backticks and stars too.

    Attributes:
      text: what is shown.
      tone: what it says.
      shade: from -1 to 1, how strongly a heat map colours it: negative for losses, positive for gains; None for none.
      hint: a longer text, shown when the pointer rests on the cell. Nothing that a reader needs.
    """

    text: str
    tone: Tone = ""
    shade: float | None = None
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """A table. The first column is left-aligned, the others right-aligned unless ``left`` names them.

    Attributes:
      header: [C].
      rows: of C cells each.
      caption: one sentence that says what the numbers are.
      left: places of other left-aligned columns.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    caption: str = ""
    left: tuple[int, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
      svg: ``<svg ...>...</svg>``, as :func:`stem_tf.compare.figures.svg` makes it.
      alt: what it shows, for readers who do not see it, and in Markdown.
      caption: one or two sentences: how to read it.
    """

    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away on a page, and printed in full."""

    summary: str
    blocks: tuple[Block, ...]


Block = str | Table | Figure | Details
"""A paragraph is a str: plain text, in which ``code`` may stand between backticks and **weight** between two stars."""


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
      key: its key in the report's JSON and its anchor on the page.
      title: a short heading.
      lead: one to three sentences with the answer, which a reader who stops here takes home.
      blocks: the evidence.
      data: the same as JSON.
    """

    key: str
    title: str
    lead: str
    blocks: tuple[Block, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
