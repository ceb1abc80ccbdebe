"""Vocabularies as binary assets of a SavedModel, one file per vocabulary, which the graph reads; any size, any bytes.

::

    strings   count: int64 | length of each value: int32 [count] | the values' bytes, one after another
    int64     count: int64 | values: int64 [count]

All is little-endian. The first value is the empty one, which scores as rare values do (a vocabulary may be empty, a
lookup table may not). The vocabulary follows in the order of its ids, with the empty value for ids that are free. The
format has lengths rather than separators, so that no byte in a value can break it. A text file would break on newlines,
and a constant in the graph would exceed protobuf's limit of 2 GB. `KnownValues` and `export.ancestor` read the files,
too, without TensorFlow.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf
from tensorflow.python.ops.lookup_ops import (
    TableInitializerBase,
)  # the base class for static tables; TensorFlow does not export it

from pipelines.log.casts import EMPTY
from pipelines.vocabulary import RARE_ID

_COUNT_BYTES, _LENGTH_BYTES = 8, 4
_ROWS_AT_A_TIME = 1 << 18


def write(values: pa.ChunkedArray, path: Path) -> None:
    """Writes the values of a vocabulary (int64 or binary) in the order of their ids."""
    with open(path, "wb") as file:
        file.write(np.array([1 + len(values)], "<i8").tobytes())
        if pa.types.is_integer(values.type):
            file.write(np.array([EMPTY["int64"]], "<i8").tobytes())
            for chunk in values.chunks:
                file.write(chunk.to_numpy().astype("<i8", copy=False).tobytes())
            return
        file.write(np.zeros(1, "<i4").tobytes())
        for chunk in values.chunks:
            file.write(pc.binary_length(chunk).to_numpy().astype("<i4", copy=False).tobytes())
        for start in range(0, len(values), _ROWS_AT_A_TIME):
            file.write(b"".join(values.slice(start, _ROWS_AT_A_TIME).to_pylist()))


class VocabularyInitializer(TableInitializerBase):
    """Fills a static table ``raw value -> id`` from an asset.

    Args:
      path: the asset's file. It is copied into the SavedModel, and then read from there, wherever that is.
      dtype: ``int64`` or ``string``.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        super().__init__(tf.as_dtype(dtype), tf.int32)
        self._asset = self._track_trackable(tf.saved_model.Asset(str(path)), "_asset")

    def initialize(self, table: tf.lookup.StaticHashTable) -> tf.Operation:
        data = tf.io.read_file(self._asset.asset_path)
        keys = _integers(data) if self.key_dtype == tf.int64 else _strings(data)
        ids = tf.where(keys == keys[0], RARE_ID, tf.range(tf.size(keys)) + RARE_ID)
        return tf.raw_ops.LookupTableImportV2(table_handle=table.resource_handle, keys=keys, values=ids)


def lookup_table(path: Path, dtype: str) -> tf.lookup.StaticHashTable:
    """The lookup table of the asset at ``path``, with int32 ids; values that are not in the vocabulary are rare."""
    return tf.lookup.StaticHashTable(VocabularyInitializer(path, dtype), RARE_ID)


def _integers(data: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_raw(data, tf.int64)[1:]


def _strings(data: tf.Tensor) -> tf.Tensor:
    count = tf.io.decode_raw(tf.strings.substr(data, 0, _COUNT_BYTES), tf.int64)[0]
    lengths = tf.strings.substr(data, tf.constant(_COUNT_BYTES, tf.int64), _LENGTH_BYTES * count)
    lengths = tf.cast(tf.io.decode_raw(lengths, tf.int32), tf.int64)
    first = _COUNT_BYTES + _LENGTH_BYTES * count
    return tf.strings.substr(data, first + tf.cumsum(lengths, exclusive=True), lengths)
