"""Writes a report: one HTML page that needs nothing else, the same as Markdown, and its numbers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from stem_tf.compare import markdown, text
from stem_tf.compare.document import MARKS, Block, Details, Figure, Section, Table
from stem_tf.compare.figures import COLOURS
from stem_util.files import make_directory, write_atomically
from stem_util.version import __version__

LIMIT = 1_000_000
"""Bytes of a page that can be sent by mail and opened on a phone."""
HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"

_LEFT_OUT = "A figure is left out here to keep the page below 1 MB. It shows: {}"
_GAIN, _LOSS = COLOURS[0], COLOURS[1]
_STRONGEST = 0.5
"""Share of the colour in the strongest shade: dark text stays readable on it."""


def write(
    title: str,
    sections: Sequence[Section],
    output: Path,
    *,
    subject: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``report.html``, ``report.md`` and ``report.json``; returns the path of the page.

    A page above 1 MB goes without the largest figures of its folded parts; a sentence stands in the place of each.

    Args:
      title: the page's title.
      sections: in the order of the page. Their keys differ.
      output: the directory to write to.
      subject: one line below the title that says what was compared.
      settings: how the report judged, for the JSON.
    """
    numbers = {"name": title, "version": __version__, "about": subject, "settings": settings or {}}
    numbers |= {"sections": {section.key: section.data for section in sections}}
    texts = {
        HTML: _below_limit(title, subject, sections),
        MARKDOWN: markdown.render(title, subject, sections),
        JSON: json.dumps(_plain(numbers), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    output = make_directory(output)
    for name, content in texts.items():
        write_atomically(output / name, content.encode(errors="backslashreplace"))  # paths that are not UTF-8
    return output / HTML


def _below_limit(title: str, subject: str, sections: Sequence[Section]) -> str:
    whole = render(title, subject, sections)
    excess = len(whole.encode(errors="backslashreplace")) - LIMIT
    if excess <= 0:
        return whole
    left_out = set()
    for figure in sorted(_folded(sections), key=lambda figure: len(figure.svg), reverse=True):
        left_out.add(figure)
        excess -= len(figure.svg)
        if excess <= 0:
            break
    return render(title, subject, [replace(s, blocks=_without(s.blocks, left_out)) for s in sections])


def _folded(sections: Sequence[Section]) -> Iterator[Figure]:
    """The figures inside folded blocks."""

    def figures(blocks: Sequence[Block]) -> Iterator[Figure]:
        for block in blocks:
            if isinstance(block, Figure):
                yield block
            elif isinstance(block, Details):
                yield from figures(block.blocks)

    for section in sections:
        for block in section.blocks:
            if isinstance(block, Details):
                yield from figures(block.blocks)


def _without(blocks: tuple[Block, ...], figures: set[Figure]) -> tuple[Block, ...]:
    def shown(block: Block) -> Block:
        if isinstance(block, Details):
            return replace(block, blocks=_without(block.blocks, figures))
        return _LEFT_OUT.format(block.alt) if block in figures else block

    return tuple(map(shown, blocks))


def render(title: str, subject: str, sections: Sequence[Section]) -> str:
    """The page as one text. It has no scripts, and a policy that forbids a browser to load anything."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": text.html, "plain": text.plain, "line": text.one_line, "shade": shade}
    environment.tests |= {
        "table": lambda block: isinstance(block, Table),
        "figure": lambda block: isinstance(block, Figure),
        "details": lambda block: isinstance(block, Details),
    }
    page = environment.get_template("report.html.j2")
    return page.render(title=title, subject=subject, sections=sections, marks=MARKS, version=__version__)


def shade(value: float | None) -> str:
    """The background of a heat map's cell as ``#rrggbb``: blue for gains, orange for losses; "" where there is none."""
    if value is None or not math.isfinite(value):
        return ""
    colour = _GAIN if value >= 0 else _LOSS
    share = _STRONGEST * min(abs(value), 1.0)
    channels = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(255 + share * (channel - 255)):02x}" for channel in channels)


def _plain(value: Any) -> Any:
    """A tree as JSON has it: NumPy's numbers and arrays as Python's, keys as text, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
