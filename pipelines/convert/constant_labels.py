"""Warns of labels that are all 0 or all 1 after a conversion, and suggests the value that was perhaps meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.log import casts, source
from pipelines.log.parts import CsvOptions, Log
from pipelines.manifest import SPLITS, Manifest
from pipelines.schema import Label, Threshold
from stem_util import stores

_ROWS = 1_000_000  # rows to search for values
_VALUES = 10_000  # distinct values to compare
_SHOWN = 3


def warnings(done: Manifest, csv: CsvOptions) -> list[str]:
    """A sentence for each binary task whose labels are all the same in a split."""
    found = []
    for task in done.schema.tasks:
        if task.type != "binary":
            continue
        rates = {name: done.task_rate(name, task.name) for name in SPLITS if done.task_rows(name, task.name)}
        for rate in (0.0, 1.0):
            splits = [name for name, of_split in rates.items() if of_split == rate]
            if not splits:
                continue
            if len(splits) == len(rates):
                text = f"task '{task.name}': every label is {rate:.0f}{_why(task.label, rate, done, csv)}"
            else:
                text = f"task '{task.name}': every label of {' and '.join(splits)} is {rate:.0f}"
            found.append(text)
    return found


def _why(label: Label, rate: float, done: Manifest, csv: CsvOptions) -> str:
    """The end of the warning: the label's condition, and what its column holds."""
    limits = {key: limit for key, limit in label.thresholds.items() if not isinstance(limit, Threshold)}
    if not label.values and not limits:
        return ""
    local = [file.path for file in done.sources if not stores.is_uri(file.path)]
    if not all(map(os.path.exists, local)):  # a recipe removes the log that it has written
        return ""
    log = source.open_log([file.path for file in done.sources], csv)
    column = f"column '{label.column}'"
    if limits:
        written = " and ".join(f"{key}: {limit:g}" for key, limit in limits.items())
        low, high = _range(log, label.column)
        return f": {written} {'always' if rate else 'never'} holds; {column} is from {low:g} to {high:g}"
    wanted = ", ".join(map(repr, label.values))
    if rate:
        return f": {column} is always {wanted}"
    values = _values(log, label.column)
    near = difflib.get_close_matches(str(label.values[0]).strip(), values, _SHOWN, cutoff=0.0)
    more = ", ..." if len(values) > len(near) else ""
    return f": {column} is never {wanted}; nearest of its values: {', '.join(map(repr, near))}{more}"


def _read(log: Log, column: str) -> Iterator[pa.Array]:
    rows = 0
    for unit in log.units:
        for chunk in source.read(log, unit, [column], skip_malformed=True):
            yield casts.plain(chunk.columns[column])
            rows += len(chunk.rows)
            if rows > _ROWS:
                return


def _range(log: Log, column: str) -> tuple[float, float]:
    parts = [casts.to_float64(array, bools=True)[0].drop_null() for array in _read(log, column)]
    floats = np.concatenate([part.to_numpy() for part in parts])
    return (floats.min(), floats.max()) if len(floats) else (np.nan, np.nan)


def _values(log: Log, column: str) -> list[str]:
    """Distinct values of a column, as text."""
    found: dict[Any, None] = {}
    for array in _read(log, column):
        found |= dict.fromkeys(pc.unique(casts.to_text(array)[0]).drop_null().to_pylist())
        if len(found) > _VALUES:
            break
    return list(found)[:_VALUES]
