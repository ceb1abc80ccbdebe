"""Vocabularies: counted on train, ordered by (-count, value), stored as Parquet, looked up in bulk.

Id 0 is padding, id 1 a rare, unseen or missing value, and row i of the file is id i + 2. Parquet, because no newline,
tab, quote or other UTF-8 in a raw value can break it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PADDING_ID = 0
RARE_ID = 1
FIRST_ID = 2

_MERGE_ROWS = 1 << 20


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
        self._binary = pa.types.is_binary(values.type)
        self._index = pd.Index(values.to_numpy())

    def __call__(self, values: pa.Array) -> np.ndarray:
        """int32 [n] of int64 or string [n]; a value that is null or not in the vocabulary is `RARE_ID`."""
        encoded = pc.dictionary_encode(values)
        distinct = encoded.dictionary.cast(pa.binary()) if self._binary else encoded.dictionary
        # One more entry, -1, for the nulls; get_indexer also says -1 for what it does not know.
        found = np.append(self._index.get_indexer(distinct.to_numpy(zero_copy_only=False)), -1)
        ids = np.where(found < 0, RARE_ID, found + FIRST_ID).astype(np.int32)
        indices = encoded.indices
        if indices.null_count:
            indices = indices.fill_null(len(distinct))
        return ids[indices.to_numpy()]
