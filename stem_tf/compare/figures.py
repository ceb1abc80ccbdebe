"""Pictures of a report: matplotlib figures as inline SVG."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Iterable
from typing import Any

from stem_tf import report
from stem_util.errors import UserError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Okabe and Ito's, which people with the common colour blindnesses can tell apart."""

_MARKERS = "osD^"
_FONTS = ["DejaVu Sans", "Verdana", "Arial", "sans-serif"]
"""matplotlib measures texts in the first; a browser without it takes one that is no wider."""
_numbers = itertools.count()
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def styles(arms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The colour and the marker of each arm; the marker tells those apart that share a colour, from the ninth on.

    They are the same in all figures if ``arms`` are all of the comparison, in the plan's order.
    """
    return {arm: (COLOURS[i % len(COLOURS)], _MARKERS[i // len(COLOURS) % 4]) for i, arm in enumerate(arms)}


def pyplot() -> Any:
    """matplotlib.pyplot, for files without a display.

    Raises:
      UserError: matplotlib is not installed.
    """
    found = report.plotting()
    if found is None:
        raise UserError("matplotlib is not installed, and a report needs it: pip install 'stem-tf[compare]'")
    return found


def svg(figure: Any) -> str:
    """The figure as ``<svg ...>``, with text as text and ids that no other figure of the page has; closes it.

    A name with dollar signs is shown as it is, not read as a formula.
    """
    import matplotlib

    for text in figure.findobj(matplotlib.text.Text):
        text.set_parse_math(False)
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), matplotlib.ticker.LogFormatter):  # writes powers as formulas
            for label in axis.get_ticklabels():
                label.set_parse_math(True)
    written = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"stem-tf-{next(_numbers)}", "font.sans-serif": _FONTS}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a browser has the font
        figure.savefig(written, format="svg", bbox_inches="tight", metadata=_NO_METADATA)
    pyplot().close(figure)
    whole = written.getvalue()
    whole = re.sub(r"\s*<!--.*?-->", "", whole[whole.index("<svg") :].strip())
    used = set(re.findall(r"#([\w.-]+)", whole))
    return re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", whole)
