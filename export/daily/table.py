"""The days as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from export.daily.state import Day, line
from stem_tf import report

_HEAD = ("day", "rows", "new ids", "AUC served", "AUC of the day", "decision")


def text(days: Sequence[Day]) -> str:
    """A line per day: the mean AUC of what was served and of the day's model on the day's held-back rows, and why."""
    return report.table(list(_HEAD), [_cells(day) for day in days])


def _cells(day: Day) -> list[str]:
    known = line(day)
    auc = [report.number(known[key]) if known[key] != "" else "" for key in ("served_auc", "auc")]
    count = [f"{known[key]:,}" if known[key] != "" else "" for key in ("rows", "new_ids")]
    version = f" version {known['version']}" if known["version"] else ""
    why = f": {known['why']}" if known["why"] else ""
    return [day.name, *count, *auc, f"{known['decision']}{version}{why}"]
