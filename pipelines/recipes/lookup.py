"""Joins columns of a table to the rows of a log, by an integer key."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.log import casts


class Lookup:
    """A table whose rows are found by a key, held in memory: its texts as dictionaries, its integers narrowed.

    Args:
      key: the column of keys, integers without nulls. Of rows with the same key the first is found.
      tables: the rows, with columns of strings and int64; at least one table.
    """

    def __init__(self, key: str, tables: Iterable[pa.Table]) -> None:
        pieces: dict[str, list[pa.Array]] = {}
        for table in tables:
            for name in table.column_names:
                pieces.setdefault(name, []).append(_compact(table[name].combine_chunks()))
        self._keys = _joined(pieces.pop(key)).to_numpy().astype(np.int64)
        order = None if (np.diff(self._keys) > 0).all() else np.argsort(self._keys, kind="stable")
        if order is not None:
            self._keys = self._keys[order]
        self._columns: dict[str, pa.Array] = {}
        for name in list(pieces):
            values = _joined(pieces.pop(name))
            self._columns[name] = values if order is None else values.take(pa.array(order))

    def columns(self, keys: NDArray[np.int64]) -> dict[str, pa.Array]:
        """The columns for some keys, [N] each, as strings and int64.

        Raises:
          KeyError: the first key that is not in the table.
        """
        places = np.searchsorted(self._keys, keys)
        known = places < len(self._keys)
        known[known] = self._keys[places[known]] == keys[known]
        if not known.all():
            raise KeyError(int(keys[int(np.argmin(known))]))
        rows = pa.array(places)
        return {name: _plain(values.take(rows)) for name, values in self._columns.items()}


def _compact(values: pa.Array) -> pa.Array:
    """A dictionary of texts, or integers in the narrowest type that holds them."""
    if pa.types.is_string(values.type):
        return values.dictionary_encode()
    ends = pc.min_max(values)
    low, high = ends["min"].as_py() or 0, ends["max"].as_py() or 0
    for kind in (pa.int8(), pa.int16(), pa.int32()):
        limit = 2 ** (kind.bit_width - 1)
        if -limit <= low and high < limit:
            return values.cast(kind)
    return values


def _joined(pieces: list[pa.Array]) -> pa.Array:
    if pa.types.is_dictionary(pieces[0].type):
        return pa.chunked_array(pieces).unify_dictionaries().combine_chunks()
    widest = max((piece.type for piece in pieces), key=lambda kind: kind.bit_width)
    return pa.concat_arrays([piece.cast(widest) for piece in pieces])


def _plain(values: pa.Array) -> pa.Array:
    return casts.plain(values) if pa.types.is_dictionary(values.type) else values.cast(pa.int64())
