"""The report as a page, as Markdown and as JSON, on made-up sections."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from stem_tf.compare import figures, page, text
from stem_tf.compare.document import Cell, Details, Figure, Section, Table

EVIL = (
    "<script>alert(1)</script>",
    "\"quoted\" & 'single'",
    "a|b`c`*d*_e_",
    "line\nbreak\r\n# heading",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "x" * 60,
    "\x00\x1b[31m",
    "\udc80 not UTF-8",
    "$\\frac$ ${{7*7}}",
    "</style></svg>",
)
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Parsed(HTMLParser):
    """Checks that tags are balanced, and keeps tags with attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def drawn(label: str) -> Figure:
    figure, axes = figures.pyplot().subplots(figsize=(3, 2))
    axes.plot([0, 1], [0, 1], marker="o", label=label)
    axes.legend()
    axes.set_xticks([0, 1], [label, "b"])
    return Figure(figures.svg(figure), alt=f"a line: {label}", caption=f"It shows `{label}`.")


def everything(name: str) -> Section:
    cells = (Cell(name, "good", 0.4, f"hint {name}"), Cell(name, "bad", -2.0), Cell("-", "unsure", math.nan), name)
    table = Table((name, "b", "c", "d"), (cells, (name, *cells[:3])), caption=f"**Numbers** of {name}", left=(3,))
    shown = name.replace("\udc80", "")  # only paths hold such bytes
    blocks = (f"The arm `{name}` is **better** than {name}.", table, drawn(shown), Details(name, (table, drawn(shown))))
    return Section("all", f"Title {name}", f"Lead {name}", blocks, {"values": np.array([1.0, math.nan]), name: 1})


@pytest.mark.parametrize("name", EVIL)
def test_names_may_hold_any_character(tmp_path: Path, name: str) -> None:
    path = page.write(name, [everything(name), Section("b", "B", "Nothing.")], tmp_path, subject=name)
    parsed = Parsed(path.read_text(encoding="utf-8"))
    assert not {"script", "i", "iframe", "link", "img"} & {tag for tag, _ in parsed.tags}
    assert [tag for tag, _ in parsed.tags].count("style") == 3  # the page's, and one in each figure
    assert text.one_line(name).replace("\udc80", "\\udc80") in "".join(parsed.text)
    found = json.loads((tmp_path / "report.json").read_bytes())
    assert found["sections"]["all"]["values"] == [1.0, None] and found["sections"]["b"] == {}
    tables = [line for line in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert len(tables) == 8
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in tables)


def test_a_page_loads_nothing_and_its_ids_differ(tmp_path: Path) -> None:
    path = page.write("t", [everything("x"), Section("b", "B", "Nothing.", (drawn("y"),))], tmp_path)
    source = path.read_text(encoding="utf-8")
    parsed = Parsed(source)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    linked = [attributes[key] or "" for _, attributes in parsed.tags for key in attributes if key.endswith("href")]
    assert {"#all", "#b"} <= set(linked) and {target.lstrip("#") for target in linked} <= set(ids)
    assert not any("src" in attributes for _, attributes in parsed.tags)
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", source)


def test_markdown_is_as_written(tmp_path: Path) -> None:
    table = Table(("arm", "AUC"), (("ple|x", Cell(".71", "good")), ("stem_net", Cell("-", "muted"))), "Test rows")
    blocks = ("# no `he*d` heading, **b_**", table, Details("More", ("1. no list", Figure("<svg/>", "bars", "Read."))))
    page.write("A <b>", [Section("k", "T", "L is **worse**.", blocks)], tmp_path, subject="S")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "\n\n".join(
        (
            "# A \\<b\\>",
            "S",
            "## T",
            "> L is **worse**.",
            "\\# no `he*d` heading, **b\\_**",
            "Test rows",
            "| arm | AUC |\n| :-- | --: |\n| ple\\|x | ▲ .71 |\n| stem_net | - |",
            "### More",
            "1\\. no list",
            "*Figure: bars* Read.\n",
        )
    )


def test_a_page_above_the_limit_goes_without_folded_figures(tmp_path: Path) -> None:
    large = Figure(f"<svg>{' ' * page.LIMIT}</svg>", "a line: large", "")
    small, shown = drawn("small"), drawn("shown")
    section = Section("k", "T", "L", (shown, Details("More", (small, large))))
    written = page.write("t", [section], tmp_path).read_text(encoding="utf-8")
    assert len(written) < page.LIMIT
    assert shown.svg in written and small.svg in written
    assert "A figure is left out here to keep the page below 1 MB. It shows: a line: large" in written


def test_shades() -> None:
    assert [page.shade(value) for value in (None, math.nan, 0.0)] == ["", "", "#ffffff"]
    assert page.shade(1.0) == page.shade(7.0) == "#80b8d8" and page.shade(-1.0) == "#eaae80"


def test_spans() -> None:
    assert list(text.spans("a `b*` **c**\nd ` e")) == [
        ("plain", "a "), ("code", "b*"), ("plain", " "), ("strong", "c"), ("plain", " d ` e"),
    ]  # fmt: skip


def test_labels_of_figures_are_not_formulas_but_powers_are() -> None:
    figure, axes = figures.pyplot().subplots()
    axes.semilogy([1, 2], [1, 1000], label="$x^{$")
    axes.legend()
    axes.set_xticks([1, 2], ["$\\frac$", "汉"])
    drawn = figures.svg(figure)
    assert "$x^{$" in drawn and "$\\frac$" in drawn and "汉" in drawn and "mathdefault" not in drawn


def test_one_line() -> None:
    assert text.one_line(" a\t b\r\nc\x00\u202e ") == "a b c\ufffd\ufffd"


@pytest.mark.parametrize("arms", (1, 8, 9, 16))
def test_arms_have_styles_of_their_own(arms: int) -> None:
    assert len(set(figures.styles(map(str, range(arms))).values())) == arms


def test_a_percentage_stays_on_one_line() -> None:
    assert text.html("with 80 % of <rows>, a % b") == "with 80\N{NO-BREAK SPACE}% of &lt;rows&gt;, a % b"
