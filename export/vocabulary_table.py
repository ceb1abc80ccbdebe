"""Lookup tables of the graph that read their vocabularies from assets (`export.vocabulary_asset`) by themselves."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf
from tensorflow.python.ops.lookup_ops import (
    TableInitializerBase,
)  # the base class for static tables; TensorFlow does not export it

from export.vocabulary_asset import COUNT_BYTES, LENGTH_BYTES
from pipelines.vocabulary import RARE_ID


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
    count = tf.io.decode_raw(tf.strings.substr(data, 0, COUNT_BYTES), tf.int64)[0]
    lengths = tf.strings.substr(data, tf.constant(COUNT_BYTES, tf.int64), LENGTH_BYTES * count)
    lengths = tf.cast(tf.io.decode_raw(lengths, tf.int32), tf.int64)
    first = COUNT_BYTES + LENGTH_BYTES * count
    return tf.strings.substr(data, first + tf.cumsum(lengths, exclusive=True), lengths)
