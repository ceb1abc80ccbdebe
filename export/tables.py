"""Embedding tables as an export stores them: float32, rounded to bfloat16, or to int8 with a scale a row and table.

::

    int8      codes [rows, W]   scales [rows, tables] float32     value = code * scale of its slice

A row's slices are rounded apart: tables of one packed table may differ in size by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tensorflow as tf

from stem_tf.layers.embedding import Embeddings, PackedTable
from stem_tf.models.predictor import Predictor

Kind = Literal["float32", "bfloat16", "int8"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8")
_LARGEST_CODE = 127
_ROWS_AT_A_TIME = 1 << 16


def packed(model: Predictor) -> list[PackedTable]:
    """The packed tables of a model that are looked up by id."""
    parts = [part for part in model.weight_parts.values() if isinstance(part, Embeddings)]
    return [group for part in parts for group in part.groups if group.rows]


def store(model: Predictor, kind: Kind) -> list[StoredTable]:
    """The model's tables in the form ``kind``, an entry a packed table; the model's own get the same values."""
    return [StoredTable(group, kind) for group in packed(model)]


class StoredTable(tf.Module):
    """What a served graph reads in place of a packed table. Rounds the packed table to the values that it gives.

    Args:
      group: of a trained model.
      kind: of :data:`KINDS`.

    Attributes:
      group: as given.
      values: ``[rows, W]``: the group's own variable, bfloat16, or int8 codes.
      scales: ``[rows, tables]`` float32 of int8 codes, else None.
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
            exact = group.table[rows]
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
        """Rows ``ids`` ``[N]``, as float32 ``[N, W]``."""
        scales = None if self.scales is None else tf.nn.embedding_lookup(self.scales, ids)
        return self._floats(tf.nn.embedding_lookup(self.values, ids), scales)

    def _codes(self, exact: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """int8 codes ``[N, W]`` and scales ``[N, tables]``: the largest value of a slice is 127 times its scale."""
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
    """Bytes of all, on disk and in memory."""
    variables = [v for table in stored for v in (table.values, table.scales) if v is not None]
    return sum(v.shape.num_elements() * v.dtype.size for v in variables)


def exact_size(model: Predictor) -> int:
    """Bytes of a model's tables in float32."""
    return sum(group.rows * group.width * tf.float32.size for group in packed(model))
