"""Vocabularies: counted on train, ordered by (-count, value), stored as Parquet, looked up in bulk.

Id 0 is padding, id 1 a rare, unseen or missing value, and row i of the file is id i + 2. Parquet, because no newline,
tab, quote or other UTF-8 in a raw value can break it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.casts import EMPTY_INT

PADDING_ID = 0
RARE_ID = 1
FIRST_ID = 2

_MERGE_ROWS = 1 << 20
# A table by value is made where it has no more entries than this for each value of the vocabulary, and a few.
_DENSE, _DENSE_AT_LEAST = 4, 1 << 16


class ValueCounts:
    """Counts values that come in pieces; holds each distinct value about once."""

    def __init__(self, dtype: str) -> None:
        kind = pa.int64() if dtype == "int64" else pa.binary()
        self._kind = kind
        self._merged = pa.table({"value": pa.array([], kind), "count": pa.array([], pa.int64())})
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def add_values(self, values: pa.Array) -> None:
        """Counts values (int64 or string [n]); nulls are left out."""
        counted = pc.value_counts(values.drop_null())
        self.add_counts(pa.table({"value": counted.field(0).cast(self._kind), "count": counted.field(1)}))

    def add_counts(self, table: pa.Table) -> None:
        """Adds a table of (value, count)."""
        self._pending.append(table)
        self._pending_rows += len(table)
        # Merging only once the news are as long as what is held keeps the work linear in the values added.
        if self._pending_rows > max(_MERGE_ROWS, len(self._merged)):
            self._merge()

    def _merge(self) -> None:
        table = pa.concat_tables([self._merged, *self._pending])
        summed = table.group_by("value", use_threads=False).aggregate([("count", "sum")])
        self._merged = summed.select(["value", "count_sum"]).rename_columns(["value", "count"])
        self._pending, self._pending_rows = [], 0

    def table(self) -> pa.Table:
        """Every value (int64 or binary) once, with its count (int64), in no particular order."""
        if self._pending:
            self._merge()
        return self._merged


def build(pieces: Iterable[pa.Table], dtype: str, min_count: int) -> tuple[pa.Table, int]:
    """Merges counts into a vocabulary.

    Args:
      pieces: tables of `ValueCounts.table`.
      dtype: ``int64`` or ``string``.
      min_count: values seen fewer times are left out (they are rare).

    Returns:
      The vocabulary, columns value and count in order of (-count, value), and how many distinct values there were.
    """
    counts = ValueCounts(dtype)
    for piece in pieces:
        counts.add_counts(piece)
    table = counts.table()
    frequent = table.filter(pc.greater_equal(table["count"], min_count))
    return frequent.sort_by([("count", "descending"), ("value", "ascending")]).combine_chunks(), len(table)


def save(table: pa.Table, path: str) -> None:
    """Writes a vocabulary."""
    pq.write_table(table, path)


def load(path: str) -> pa.Table:
    """Reads a vocabulary: columns value (int64, or binary holding UTF-8) and count; row i is id i + 2."""
    return pq.read_table(path, memory_map=True)


class Lookup:
    """Maps raw values to ids.

    Args:
      values: of a vocabulary, in order: int64 or binary.
    """

    def __init__(self, values: pa.ChunkedArray) -> None:
        # Integers by binary search (12 bytes a value, nothing to build but a sort), bytes in a dict.
        self._ids: dict[bytes, int] | None = None
        self._table: np.ndarray | None = None
        if pa.types.is_binary(values.type):
            self._ids = {value: number for number, value in enumerate(values.to_pylist(), start=FIRST_ID)}
        else:
            integers = values.to_numpy()
            order = np.argsort(integers)
            self._sorted, self._sorted_ids = integers[order], (order + FIRST_ID).astype(np.int32)
            span = int(self._sorted[-1]) - int(self._sorted[0]) + 1 if len(order) else 0
            if 0 < span <= _DENSE * len(order) + _DENSE_AT_LEAST:
                self._table = np.full(span + 1, RARE_ID, np.int32)
                self._table[self._sorted - self._sorted[0]] = self._sorted_ids

    def __call__(self, values: pa.Array) -> np.ndarray:
        """int32 [n] of int64 or string [n]; a value that is null or not in the vocabulary is `RARE_ID`."""
        encoded = pc.dictionary_encode(values)
        # One more entry for the nulls.
        ids = np.append(self._distinct_ids(encoded.dictionary), np.int32(RARE_ID))
        indices = encoded.indices
        return ids[(indices.fill_null(len(ids) - 1) if indices.null_count else indices).to_numpy()]

    def plain(self, values: pa.Array) -> np.ndarray:
        """The same, without looking for equal values first: integers that lie close together are found in a table."""
        if self._table is None:
            return self(values)
        integers = (values.fill_null(EMPTY_INT) if values.null_count else values).to_numpy()
        places = (integers - self._sorted[0]).view(np.uint64)  # below the first: wraps around, far beyond the last
        return self._table[np.minimum(places, np.uint64(len(self._table) - 1)).view(np.int64)]

    def _distinct_ids(self, values: pa.Array) -> np.ndarray:
        if self._ids is not None:
            texts = values.cast(pa.binary()).to_pylist()
            return np.array([self._ids.get(text, RARE_ID) for text in texts], np.int32)
        wanted = values.to_numpy()
        if not len(self._sorted) or not len(wanted):
            return np.full(len(wanted), RARE_ID, np.int32)
        order = np.argsort(wanted)  # neighbours in memory: twice as fast as searching in the order of appearance
        places = np.empty(len(wanted), np.int64)
        places[order] = np.searchsorted(self._sorted, wanted[order])
        places = np.minimum(places, len(self._sorted) - 1)
        return np.where(self._sorted[places] == wanted, self._sorted_ids[places], np.int32(RARE_ID))
