"""Moves what was learned about values from the rows of one data set's tables to those of another's.

A row belongs to a value of a vocabulary, to a bucket (its two bounds), or to a remainder of a hash. Rows of padding
and of rare or missing values stay::

    before   0 padding  1 rare  2 ann  3 bob  4 cat          bob was forgotten, and his id given to dan; eve is new
    after    0 padding  1 rare  2 ann  3 dan  4 cat  5 eve
    origin   0          1       2      -1     4      -1      -1: starts as the row of a new value does

Shapes: R rows of all fields of a packed table one after another, W wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.log.casts import EMPTY
from pipelines.manifest import Manifest
from pipelines.vocabulary import FIRST_ID
from stem_tf.layers.embedding import PackedTable, gather_rows

Values = Callable[[str], pa.ChunkedArray]
"""The values of a feature's vocabulary, in the order of their ids."""

_ROWS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Rows:
    """Where the rows of one feature come from.

    Attributes:
      origin: the row that each value had before, -1 for a new value, -2 for an id that no value has; int32 ``[rows]``.
      before: the number of rows before.
      free: the number of them whose id no value had.
    """

    origin: NDArray[np.int32]
    before: int
    free: int = 0

    def counts(self) -> dict[str, int]:
        """Numbers of values: ``kept``; ``new``; ``reset``, new ones whose id was another value's; ``gone`` ones."""
        new, kept = np.flatnonzero(self.origin == -1), int(np.count_nonzero(self.origin >= 0)) - FIRST_ID
        reset, before = int(np.count_nonzero(new < self.before)), self.before - self.free - FIRST_ID
        return {"kept": kept, "new": len(new) - reset, "reset": reset, "gone": before - kept}


def remap(old: Manifest, old_values: Values, new: Manifest, new_values: Values) -> dict[str, Rows]:
    """Finds the rows of each feature with ids by their values, in two conversions with the same features.

    Args:
      old, new: manifests of the data.
      old_values, new_values: their vocabularies.
    """
    found = {}
    for feature in new.schema.features:
        if not (feature.has_ids or feature.bucketised):
            continue
        name, size, free = feature.name, new.num_ids(feature.name), 0
        origin = np.arange(size, dtype=np.int32)
        if feature.has_vocabulary:
            before, now = old_values(name), new_values(name)
            origin[FIRST_ID:] = _places(before, now)
            free = int(pc.sum(_is_empty(before)).as_py() or 0)
            origin[FIRST_ID:][_is_empty(now).to_numpy()] = -2
        elif feature.bucketised:
            origin[FIRST_ID:] = _places(_buckets(old, name), _buckets(new, name))
        found[name] = Rows(origin, old.num_ids(name), free)
    return found


def _places(old: pa.ChunkedArray, new: pa.ChunkedArray) -> NDArray[np.int32]:
    """The row of each of the ``new`` values among those of the ``old`` ones, -1 where it is not there."""
    places = pc.index_in(new, value_set=old.combine_chunks())
    return (pc.fill_null(places, -1 - FIRST_ID).to_numpy() + FIRST_ID).astype(np.int32, copy=False)


def _is_empty(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which ids no value has: theirs was forgotten."""
    return pc.equal(values, pa.scalar(EMPTY["int64"] if pa.types.is_integer(values.type) else b"", values.type))


def _buckets(manifest: Manifest, feature: str) -> pa.ChunkedArray:
    """The buckets of a feature, each as its two bounds."""
    bounds = np.array([-np.inf, *manifest.constants(feature).boundaries, np.inf])
    pairs = np.stack([bounds[:-1], bounds[1:]], axis=1)
    return pa.chunked_array([pa.array([pair.tobytes() for pair in pairs], pa.binary())])


def move(variable: tf.Variable, values: tf.Tensor, group: PackedTable, rows: Mapping[str, Rows]) -> None:
    """Writes the rows that stay into a packed table or one of its slots; leaves those of new values as they are.

    Call it in the strategy's scope. Beside the arguments it needs memory for some thousand rows.

    Args:
      variable: ``[R, ...]``.
      values: what it held before, ``[R before, ...]``; in the memory of the host.
      group: the packed table.
      rows: of each field.
    """
    for field, there, origin in _fields(group, rows):
        for start in range(0, len(origin), _ROWS_AT_A_TIME):
            part = origin[start : start + _ROWS_AT_A_TIME]
            kept = np.flatnonzero(part >= 0)
            if len(kept):
                with tf.device("CPU:0"):
                    moved = tf.gather(values, field + part[kept].astype(np.int64))
                _write(variable, there + start + kept, moved)


def fill_with_means(group: PackedTable, rows: Mapping[str, Rows]) -> None:
    """Gives the rows of new values the mean over the rows of their feature's values that stay, where there are any."""
    for _, there, origin in _fields(group, rows):
        kept, new = FIRST_ID + np.flatnonzero(origin[FIRST_ID:] >= 0), np.flatnonzero(origin == -1)
        if not len(kept) or not len(new):
            continue
        total = np.zeros(group.width)
        for ids in _pieces(there + kept):
            total += gather_rows(group.table, ids).numpy().sum(axis=0, dtype=np.float64)
        mean = (total / len(kept)).astype(np.float32)
        for ids in _pieces(there + new):
            _write(group.table, ids, tf.constant(np.broadcast_to(mean, [len(ids), len(mean)])))


def _fields(group: PackedTable, rows: Mapping[str, Rows]) -> Iterator[tuple[int, int, NDArray[np.int32]]]:
    """Of each field with ids: its first row before, its first row now, and where its rows come from."""
    before = 0
    for field in (*group.single, *group.bags):
        yield before, group.offsets[field.name], rows[field.name].origin
        before += rows[field.name].before


def _pieces(ids: NDArray) -> Iterator[NDArray]:
    for start in range(0, len(ids), _ROWS_AT_A_TIME):
        yield ids[start : start + _ROWS_AT_A_TIME]


def _write(variable: tf.Variable, ids: NDArray, values: tf.Tensor) -> None:
    """Writes rows ``ids`` ``[N]`` of a variable on all its replicas."""
    tf.distribute.get_strategy().extended.update(variable, _scatter, args=(ids, values))


def _scatter(variable: tf.Variable, ids: NDArray, values: tf.Tensor) -> None:
    variable.scatter_update(tf.IndexedSlices(values, tf.constant(ids, tf.int64)))
