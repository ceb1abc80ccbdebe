"""Advice for a value that conversion refuses, other than dropping its row."""

from __future__ import annotations

import re
from typing import Any, Literal

from pipelines.log import csv_text

Wanted = Literal["id", "text", "number", "label", "time"]

_MISSING = set("null nil na n/a #n/a <na> none nan \\n - -- ? missing undefined unknown".split())
_WHOLE = re.compile(r"[-+]?\d+")
_WHOLE_FLOAT = re.compile(r"[-+]?\d+\.0*")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
_GROUPED = re.compile(r"[-+]?\d{1,3}([,.' _]\d{3})+")
_LARGE = (
    "int64 ends at 2^63 - 1: when the log is written, cast such ids to text{}, or to the int64 of the same bits "
    "(numpy: ids.view('int64'))"
)


def way_out(value: Any, wanted: Wanted, path: str, *, csv: bool, served: bool) -> str:
    """The advice, as a clause for the end of an error, or "".

    Args:
      value: the value in the log; bytes if it is not UTF-8.
      wanted: what it should have been.
      path: the file that holds it.
      csv: whether that is a CSV file.
      served: whether the schema came with an exported model, and so cannot be changed.
    """
    text = value.strip() if isinstance(value, str) else None
    if wanted == "text" or isinstance(value, bytes):
        clause = csv_text.utf8_advice(path) if csv else ""
    elif csv and text is not None and text.lower() in _MISSING:
        clause = f"if it means a missing value, --csv_nulls=,{text} says so"
    elif wanted == "id":
        clause = _of_id(value, text, served)
    elif wanted == "label" and (text is None or _NUMBER.fullmatch(text)):
        clause = "say which values mean 1, as in equals: 5 or at_least: 4"
    elif wanted == "label":
        clause = f'say which value means 1, as in equals: "{text}"'
    elif wanted == "time":
        clause = "a time is a number, or text as 2024-01-31 10:00:00"
    elif text is not None and any(map(str.isdigit, text)):
        clause = "write numbers as in 1234.5"
    elif text is not None and text.lower() in ("true", "false"):
        clause = "write 0 and 1"
    else:
        clause = "" if served else "kind: categorical with dtype: string takes any text"
    return f"; {clause}" if clause else ""


def _of_id(value: Any, text: str | None, served: bool) -> str:
    if text is None or _WHOLE.fullmatch(text):
        return _LARGE.format("" if served else " (dtype: string)")
    if _WHOLE_FLOAT.fullmatch(text):
        return "floats beyond 2^53 are rounded: write ids as whole numbers (pandas: the nullable type Int64)"
    if _GROUPED.fullmatch(text):
        return f"write it without separators: {re.sub('[^-0-9]', '', text)}"
    if served:
        return "the model takes int64"
    return "dtype: string takes any text" if value else ""
