"""Vocabularies: counted on train, stored as Parquet, looked up in bulk. `convert.growth` decides who gets which id.

Id 0 is padding, id 1 stands for rare, unseen and missing values, and row i of the file has id i + 2. An id whose value
was forgotten is free: it has the empty value (`casts.EMPTY`) and count 0. The format is Parquet, because no newline,
tab, quote or other character in a raw value can break it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.log.casts import EMPTY
from stem_util.errors import UserError

PADDING_ID = 0
RARE_ID = 1
FIRST_ID = 2

_MERGE_ROWS = 1 << 21
# A table indexed by value is made if it has at most _DENSE entries per value of the vocabulary, plus _DENSE_AT_LEAST.
_DENSE, _DENSE_AT_LEAST = 4, 1 << 16


def encode(values: pa.Array) -> pa.DictionaryArray:
    """Dictionary-encodes values (int64 or string [n]); nulls stay null.

    A dictionary of integers is in ascending order, which makes it cheap to merge with others and to look up.
    """
    encoded = pc.dictionary_encode(values)
    if not pa.types.is_int64(values.type):
        return encoded
    distinct = encoded.dictionary.to_numpy()
    order = np.argsort(distinct)
    ranks = np.empty(len(order) + 1, np.int32)
    ranks[order], ranks[-1] = np.arange(len(order), dtype=np.int32), 0  # the last one for nulls
    mask = encoded.is_null().to_numpy(zero_copy_only=False) if encoded.null_count else None
    return pa.DictionaryArray.from_arrays(pa.array(ranks[_indices(encoded)], mask=mask), pa.array(distinct[order]))


def _indices(values: pa.DictionaryArray) -> np.ndarray:
    """Places in the dictionary, [n]; a null has the place after the last."""
    indices = values.indices
    return (indices.fill_null(len(values.dictionary)) if indices.null_count else indices).to_numpy()


class ValueCounts:
    """Counts values that arrive in pieces, and finds the last time of each. Memory holds each value about once."""

    def __init__(self, dtype: str) -> None:
        self._kind = pa.int64() if dtype == "int64" else pa.binary()
        none = pa.array([], pa.int64())
        self._merged = pa.table({"value": pa.array([], self._kind), "count": none, "time": none})
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def add_encoded(self, values: pa.DictionaryArray, counted: np.ndarray, times: np.ndarray) -> None:
        """Counts values from `encode` where ``counted``, bool [n], is true, at ``times``, int64 [n]; without nulls."""
        size = len(values.dictionary)
        places = _indices(values)[counted]
        counts = np.bincount(places, minlength=size)[:size]
        last = np.full(size + 1, np.iinfo(np.int64).min)
        np.maximum.at(last, places, times[counted])
        present = np.flatnonzero(counts)
        distinct = values.dictionary.take(pa.array(present)).cast(self._kind)
        self.add_counts(pa.table({"value": distinct, "count": counts[present], "time": last[present]}))

    def add_counts(self, table: pa.Table) -> None:
        """Adds a table with columns value, count and time."""
        self._pending.append(table)
        self._pending_rows += len(table)
        # Merging only when the new tables are as long as the merged one keeps the work linear in the values added.
        if self._pending_rows > max(_MERGE_ROWS, len(self._merged)):
            self._merge()

    def _merge(self) -> None:
        table = pa.concat_tables([self._merged, *self._pending])
        if pa.types.is_int64(self._kind) and len(table):
            values, counts, times = (column.to_numpy() for column in table.columns)
            order = np.argsort(values, kind="stable")  # timsort merges sorted runs, at a fifth of a sort's cost
            values = values[order]
            first = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
            count, time = np.add.reduceat(counts[order], first), np.maximum.reduceat(times[order], first)
            self._merged = pa.table({"value": values[first], "count": count, "time": time})
        else:
            grouped = table.group_by("value", use_threads=False).aggregate([("count", "sum"), ("time", "max")])
            renamed = grouped.select(["value", "count_sum", "time_max"]).rename_columns(self._merged.column_names)
            self._merged = renamed.sort_by("value")
        self._pending, self._pending_rows = [], 0

    def table(self) -> pa.Table:
        """Each distinct value (int64 or binary), in ascending order, with its count and last time (int64)."""
        if self._pending:
            self._merge()
        return self._merged


def load(path: str) -> pa.Table:
    """Reads a vocabulary: columns value (int64, or binary holding UTF-8) and count; row i is id i + 2.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return pq.read_table(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as a vocabulary ({why}); convert the log again") from error


class Lookup:
    """Maps raw values to ids.

    Args:
      values: the values of a vocabulary in its order, int64 or binary; those of free ids are empty.
    """

    def __init__(self, values: pa.ChunkedArray) -> None:
        # Integers are found by binary search (12 bytes per value, built by one sort), bytes in a dict.
        self._ids: dict[bytes, int] | None = None
        self._table: np.ndarray | None = None
        if pa.types.is_binary(values.type):
            self._ids = {value: number for number, value in enumerate(values.to_pylist(), start=FIRST_ID)}
            self._ids.pop(EMPTY["string"], None)
        else:
            integers = values.to_numpy()
            order = np.argsort(integers)
            order = order[np.searchsorted(integers, EMPTY["int64"], "right", order) :]  # the free ids come first
            self._sorted, self._sorted_ids = integers[order], (order + FIRST_ID).astype(np.int32)
            span = int(self._sorted[-1]) - int(self._sorted[0]) + 1 if len(order) else 0
            if 0 < span <= _DENSE * len(order) + _DENSE_AT_LEAST:
                self._table = np.full(span + 1, RARE_ID, np.int32)
                self._table[self._sorted - self._sorted[0]] = self._sorted_ids

    def __call__(self, values: pa.DictionaryArray) -> np.ndarray:
        """The ids, int32 [n], of values from `encode`; nulls and values not in the vocabulary get `RARE_ID`."""
        ids = np.append(self._distinct_ids(values.dictionary), np.int32(RARE_ID))
        return ids[_indices(values)]

    def plain(self, values: pa.Array) -> np.ndarray:
        """The same ids for values that are not encoded; integers that lie close together are looked up in a table."""
        if self._table is None:
            return self(encode(values))
        integers = (values.fill_null(EMPTY["int64"]) if values.null_count else values).to_numpy()
        places = (integers - self._sorted[0]).view(
            np.uint64
        )  # values below the first wrap around to far beyond the last
        return self._table[np.minimum(places, np.uint64(len(self._table) - 1)).view(np.int64)]

    def _distinct_ids(self, values: pa.Array) -> np.ndarray:
        if self._ids is not None:
            texts = values.cast(pa.binary()).to_pylist()
            return np.array([self._ids.get(text, RARE_ID) for text in texts], np.int32)
        wanted = values.to_numpy()
        if not len(self._sorted) or not len(wanted):
            return np.full(len(wanted), RARE_ID, np.int32)
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[places] == wanted, self._sorted_ids[places], np.int32(RARE_ID))
