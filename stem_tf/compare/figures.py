"""Pictures of a report: matplotlib figures as inline SVG."""

from __future__ import annotations

import io
import itertools
from typing import Any

from stem_tf import report
from stem_util.errors import UserError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Okabe and Ito's, which people with the common colour blindnesses can tell apart; one per arm, in the plan's order."""

_numbers = itertools.count()


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
    """The figure as ``<svg ...>``, with text as text and ids that no other figure of the page has; closes it."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"stem-tf-{next(_numbers)}"}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot().close(figure)
    whole = text.getvalue()
    return whole[whole.index("<svg") :].strip()
