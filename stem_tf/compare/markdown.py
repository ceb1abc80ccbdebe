"""A report as Markdown, for a pull request or a wiki: words, tables, and what figures show in a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stem_tf.compare.document import MARKS, Block, Cell, Details, Figure, Section, Table
from stem_tf.compare.text import literal, markdown


def render(title: str, subject: str, sections: Sequence[Section]) -> str:
    """The report; folded blocks stand under a heading of their own."""
    blocks = [f"# {markdown(title)}", markdown(subject)]
    for section in sections:
        blocks += [f"## {markdown(section.title)}", f"> {markdown(section.lead)}"]
        blocks += _blocks(section.blocks, level=3)
    return "\n\n".join(blocks) + "\n"


def _blocks(blocks: Sequence[Block], level: int) -> Iterator[str]:
    for block in blocks:
        match block:
            case str():
                yield markdown(block)
            case Table():
                yield from _table(block)
            case Figure():
                yield f"*Figure: {markdown(block.alt)}* {markdown(block.caption)}"
            case Details():
                yield f"{'#' * min(level, 6)} {markdown(block.summary)}"
                yield from _blocks(block.blocks, level + 1)


def _table(table: Table) -> Iterator[str]:
    if table.caption:
        yield markdown(table.caption)
    left = {0, *table.left}
    rules = [":--" if place in left else "--:" for place in range(len(table.header))]
    rows = [map(literal, table.header), rules, *(map(_cell, row) for row in table.rows)]
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return literal(cell)
    mark = MARKS[cell.tone]
    return f"{mark.sign} {literal(cell.text)}" if mark.sign else literal(cell.text)
