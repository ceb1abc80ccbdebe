"""Stores embedding tables for an export: as float32, rounded to bfloat16, or rounded to int8 with scales.

::

    int8      codes [rows, W]   scales [rows, tables] float32     value = code * scale of its slice

Each row of each table inside a packed table has its own scale, because values of these tables may differ by orders of
magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tensorflow as tf

from stem_tf.layers.embedding import Embeddings, PackedTable, rows_between
from stem_tf.models.predictor import Predictor

Kind = Literal["float32", "bfloat16", "int8"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8")
_LARGEST_CODE = 127
_ROWS_AT_A_TIME = 1 << 16


def packed(model: Predictor) -> list[PackedTable]:
    """The packed tables of a model, from which embeddings are looked up by id."""
    parts = [part for part in model.weight_parts.values() if isinstance(part, Embeddings)]
    return [group for part in parts for group in part.groups if group.rows]


def store(model: Predictor, kind: Kind) -> list[StoredTable]:
    """Stores each packed table of the model in the form ``kind``, and sets the model's tables to the rounded values."""
    return [StoredTable(group, kind) for group in packed(model)]


class StoredTable(tf.Module):
    """A packed table in stored form, which the serving graph reads. Sets the packed table to the rounded values.

    Args:
      group: a packed table of a trained model.
      kind: one of :data:`KINDS`.

    Attributes:
      group: as given.
      values: ``[rows, W]``: the packed table's own float32 variable, or bfloat16 values, or int8 codes.
      scales: ``[rows, tables]`` float32 with int8 codes, else None.
    """

    def __init__(self, group: PackedTable, kind: Kind) -> None:
        super().__init__(name="table")
        # Through a closure: a layer in an attribute would bring all of its weights into the SavedModel.
        self._group = lambda: group
        self.values, self.scales = group.table, None
        if kind == "float32":
            return
        self.values = tf.Variable(tf.zeros(group.table.shape, kind), trainable=False)
        if kind == "int8":
            self.scales = tf.Variable(tf.zeros([group.rows, len(group.tables)]), trainable=False)
        for start in range(0, group.rows, _ROWS_AT_A_TIME):
            rows = slice(start, min(start + _ROWS_AT_A_TIME, group.rows))
            exact = rows_between(group.table, rows.start, rows.stop)
            if self.scales is None:
                self.values[rows].assign(tf.cast(exact, kind))
                rounded = self._floats(self.values[rows], None)
            else:
                codes, scales = self._codes(exact)
                self.values[rows].assign(codes)
                self.scales[rows].assign(scales)
                rounded = self._floats(codes, scales)
            group.table[rows].assign(rounded)

    @property
    def group(self) -> PackedTable:
        return self._group()

    def read(self, ids: tf.Tensor) -> tf.Tensor:
        """Reads rows ``ids`` ``[N]``; float32 ``[N, W]``."""
        scales = None if self.scales is None else tf.nn.embedding_lookup(self.scales, ids)
        return self._floats(tf.nn.embedding_lookup(self.values, ids), scales)

    def _codes(self, exact: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Codes, int8 ``[N, W]``, and scales ``[N, tables]``: the largest absolute value of a slice has code 127."""
        slices = tf.reshape(exact, [-1, len(self.group.tables), self.group.dim])
        scales = tf.reduce_max(tf.abs(slices), axis=2) / _LARGEST_CODE
        codes = tf.round(tf.math.divide_no_nan(slices, scales[:, :, tf.newaxis]))
        codes = tf.clip_by_value(codes, -_LARGEST_CODE, _LARGEST_CODE)
        return tf.cast(tf.reshape(codes, [-1, self.group.width]), tf.int8), scales

    def _floats(self, values: tf.Tensor, scales: tf.Tensor | None) -> tf.Tensor:
        values = tf.cast(values, tf.float32)
        if scales is None:
            return values
        slices = tf.reshape(values, [-1, len(self.group.tables), self.group.dim])
        return tf.reshape(slices * scales[:, :, tf.newaxis], [-1, self.group.width])


def size(stored: Sequence[StoredTable]) -> int:
    """The size of stored tables in bytes, on disk and in memory."""
    variables = [v for table in stored for v in (table.values, table.scales) if v is not None]
    return sum(v.shape.num_elements() * v.dtype.size for v in variables)


def exact_size(model: Predictor) -> int:
    """The size of a model's tables in float32, in bytes."""
    return sum(group.rows * group.width * tf.float32.size for group in packed(model))
