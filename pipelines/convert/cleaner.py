"""Turns a chunk of the log into rows that can be counted and encoded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines import hashing
from pipelines.convert import features
from pipelines.convert.bad_rows import BadRows
from pipelines.convert.labels import make_labels, make_weights
from pipelines.convert.raw_columns import integer_columns
from pipelines.convert.rows import Rows
from pipelines.convert.split import LastSplit, SplitPolicy
from pipelines.convert.times import integers, order_keys, time_values
from pipelines.log import casts
from pipelines.log.casts import Lists
from pipelines.log.parts import Chunk
from pipelines.schema import Schema


@dataclass(frozen=True)
class Clock:
    """The column of the log that says when a row happened, and the `time_kind` of its values."""

    column: str
    kind: pa.DataType


@dataclass(frozen=True)
class Cleaner:
    """Turns chunks into rows by a schema, a split policy and a policy for bad rows.

    Attributes:
      schema: what the columns mean.
      split: how rows are divided.
      drop: whether bad rows are skipped and counted; otherwise the first one is an error.
      clock: where a row's time is, if it has one; every row needs it then.
      served: whether the schema came with an exported model, so that errors do not suggest to change it.
    """

    schema: Schema
    split: SplitPolicy
    drop: bool
    clock: Clock | None = None
    served: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns of the log that are needed."""
        names = dict.fromkeys(feature.column for feature in self.schema.features)
        names |= dict.fromkeys(column for task in self.schema.tasks for column in task.columns)
        names |= dict.fromkeys(filter(None, (self.schema.group, self.schema.item)))
        names |= dict.fromkeys([self.clock.column] if self.clock else [])
        return list(names | dict.fromkeys(self.split.columns))

    def clean(self, chunk: Chunk, row_ids: np.ndarray, file: int) -> tuple[Rows, Counter[tuple[str, str]]]:
        """The good rows of a chunk, and the number of bad ones by (column, reason).

        Args:
          chunk: a chunk with all of `columns`.
          row_ids: int64 [n], ids of its rows.
          file: the file's number in the log, for given splits.

        Raises:
          UserError: a row is bad, and bad rows are not dropped; names file, place, column, value and the broken rule.
        """
        bad = BadRows(chunk, self.drop, self.served)
        ids: dict[str, pa.Array] = {}
        lists: dict[str, Lists] = {}
        numerics: dict[str, np.ndarray] = {}
        vectors: dict[str, np.ndarray] = {}
        for feature in self.schema.features:
            array = chunk.columns[feature.column]
            if feature.kind == "categorical":
                ids[feature.name] = features.categorical(array, feature, bad)
            elif feature.kind == "multivalent":
                lists[feature.name] = features.multivalent(array, feature, bad)
            elif feature.kind == "numeric":
                numerics[feature.name] = features.numeric(array, feature, bad)
            else:
                vectors[feature.name] = features.dense(array, feature, bad)
        labels = make_labels(chunk, self.schema.tasks, bad)
        weights = {
            column: make_weights(chunk, column, self.schema.tasks, labels, bad) for column in self.schema.row_weights
        }
        keys = {
            role: self.key(chunk, column, bad)
            for role, column in (("group", self.schema.group), ("item", self.schema.item))
            if column is not None
        }
        split = self.split.divide(_Divided(self, chunk, row_ids, file, bad))
        times = np.zeros(len(row_ids), np.int64)
        if self.clock is not None:
            times = integers(time_keys(chunk, self.clock.column, self.clock.kind, bad), self.clock.kind)
        bad.raise_first()
        rows = Rows(
            np.arange(len(row_ids)), row_ids, split, times, ids, lists, numerics, vectors, labels, weights, keys
        )
        return rows.take(bad.good), bad.counts

    def key(self, chunk: Chunk, column: str, bad: BadRows) -> pa.Array:
        """Raw values of a key column: int64, or text, which is read as int64 if a feature of the column says so."""
        array = chunk.columns[column]
        if casts.is_text(casts.plain_type(array.type)) and column not in integer_columns(self.schema):
            values, wrong = casts.to_text(array)
            bad.add(wrong, column, "not UTF-8", f"column '{column}' is {{}}, which is not UTF-8 text", wanted="text")
        else:
            values, wrong = casts.to_int64(array)
            bad.add(wrong, column, "not an int64", f"column '{column}' is {{}}, which is not an int64", wanted="id")
        missing = casts.to_numpy(values.is_null())
        detail = (
            f"the key column '{column}' is {{}}; every row needs a value: cast missing ones to an id of their own "
            f"when the log is written (pandas: log['{column}'].fillna(0))"
        )
        bad.add(missing & ~wrong, column, "missing key", detail)
        return values.fill_null("" if pa.types.is_string(values.type) else 0) if values.null_count else values

    def splits(self, chunk: Chunk, row_ids: np.ndarray, file: int) -> np.ndarray:
        """The split of every row, uint8 [n]; any for bad rows, which `clean` reports. Arguments as in `clean`."""
        return self.split.divide(_Divided(self, chunk, row_ids, file, BadRows(chunk, drop=True)))

    def times(self, chunk: Chunk, column: str, kind: pa.DataType) -> np.ndarray:
        """The times of a chunk's rows that have one, as uint64 keys in the same order."""
        bad = BadRows(chunk, self.drop)
        keys = time_keys(chunk, column, kind, bad)
        bad.raise_first()
        return keys[bad.good]

    def group_times(self, chunk: Chunk, policy: LastSplit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Group keys and times of a chunk's rows that have both, and the places of these rows in the chunk."""
        bad = BadRows(chunk, self.drop)
        groups = hashing.key64(self.key(chunk, policy.group, bad))
        times = time_keys(chunk, policy.column, policy.kind, bad)
        bad.raise_first()
        return groups[bad.good], times[bad.good], bad.good


@dataclass(frozen=True)
class _Divided:
    """A chunk's rows in the form that a split policy takes: a `pipelines.convert.split.Divided`."""

    cleaner: Cleaner
    chunk: Chunk
    row_ids: np.ndarray
    file: int
    bad: BadRows

    def keys(self, column: str) -> np.ndarray:
        return hashing.key64(self.cleaner.key(self.chunk, column, self.bad))

    def times(self, column: str, kind: pa.DataType) -> np.ndarray:
        return time_keys(self.chunk, column, kind, self.bad)


def time_keys(chunk: Chunk, column: str, kind: pa.DataType, bad: BadRows) -> np.ndarray:
    """Keys of a time column, uint64 [n], that sort as the times do; rows without a time are bad."""
    values, wrong = time_values(chunk.columns[column], kind)
    detail = f"column '{column}' is {{}}, which is not of the column's type {kind}"
    bad.add(wrong, column, "not a time", detail, wanted="time")
    missing = casts.to_numpy(values.is_null()) & ~wrong
    bad.add(missing, column, "missing time", f"the time column '{column}' is {{}}; every row needs a time")
    return order_keys(values.fill_null(pa.scalar(0, pa.int64()).cast(values.type)) if values.null_count else values)
