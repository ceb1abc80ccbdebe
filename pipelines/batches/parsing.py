"""Reads records of either layout, in the order of the shards, and parses them into columns.

Columns are a dict from record key to a tensor with some rows; :func:`pipelines.records.shapes` has the keys, types and
widths.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from pipelines import records
from pipelines.manifest import Shard
from pipelines.schema import Feature, Schema

Columns = dict[str, tf.Tensor]
"""From record key to a tensor: int32 or float32 features, float32 labels and weights, int64 keys."""
_BYTES_AT_A_TIME = 2 << 20
"""Bytes of the rows that are parsed or permuted in one go: small enough for the processor's caches."""
BLOCK_ROWS = 128
"""Records of the rows layout that are handled like one block, as one element of a data set."""


def row_bytes(schema: Schema) -> int:
    """The size of a row in memory, in bytes."""
    return sum(np.dtype(kind).itemsize * max(width, 1) for _, (kind, width) in records.shapes(schema))


def rows_at_a_time(schema: Schema) -> int:
    """The number of rows that are parsed or permuted in one go."""
    return max(1, _BYTES_AT_A_TIME // row_bytes(schema))


def read_records(schema: Schema, shards: list[Shard], layout: str, reader: tuple[int, int]) -> tf.data.Dataset:
    """A data set of columns with some rows each, in the order of the shards."""
    index, count = reader
    if len(shards) >= count:
        found = tf.data.TFRecordDataset([shard.path for shard in shards[index::count]])
    else:
        found = tf.data.TFRecordDataset([shard.path for shard in shards]).shard(count, index)
    return parsed(schema, found if layout == "blocks" else found.batch(BLOCK_ROWS), shards, layout)


def parsed(schema: Schema, blocks: tf.data.Dataset, shards: list[Shard], layout: str) -> tf.data.Dataset:
    """Parses a data set of blocks (one record, or a vector of records of ``rows``) into columns with some rows each."""
    rows = rows_at_a_time(schema)
    if layout == "blocks":
        block_rows = sum(shard.rows for shard in shards) / sum(shard.records for shard in shards)
        groups = blocks.batch(max(1, int(rows / block_rows)))
    else:
        groups = blocks.rebatch(rows)
    parse = functools.partial(_PARSERS[layout], schema)
    return groups.map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


@dataclass(frozen=True)
class Column:
    """One key of a record: its type in a batch, its width (0: one value), and the feature behind it, if any."""

    dtype: tf.DType
    width: int
    feature: Feature | None = None


def columns_of(schema: Schema) -> dict[str, Column]:
    """The keys of a record, in the order of :func:`pipelines.records.shapes`."""
    features = {f"feature:{feature.name}": feature for feature in schema.features}
    shapes = records.shapes(schema)
    return {key: Column(tf.as_dtype(kind), width, features.get(key)) for key, (kind, width) in shapes}


def _parse_blocks(schema: Schema, blocks: tf.Tensor) -> Columns:
    """Serialised blocks [G] -> columns [rows, ...] in the order of the blocks."""

    def parse(blocks: np.ndarray) -> list[np.ndarray]:
        return list(records.parse(schema, blocks.tolist()).values())

    columns = columns_of(schema)
    values = tf.numpy_function(parse, [blocks], [column.dtype for column in columns.values()], stateful=False)
    shapes = ([None, width] if width else [None] for _, (_, width) in records.shapes(schema))
    return dict(zip(columns, map(tf.ensure_shape, values, shapes), strict=True))


def parse_rows(schema: Schema, rows: tf.Tensor) -> Columns:
    """Serialised rows [B] -> columns [B, ...]."""
    spec: dict[str, Any] = {}
    for key, column in columns_of(schema).items():
        dtype = tf.float32 if column.dtype == tf.float32 else tf.int64  # tf.Example has no int32
        if column.feature and column.feature.kind == "multivalent":
            spec[key] = tf.io.RaggedFeature(dtype)
        else:
            spec[key] = tf.io.FixedLenFeature([column.width] if column.width else [], dtype)
    parsed = tf.io.parse_example(rows, spec)
    result = {}
    for key, column in columns_of(schema).items():
        values = parsed[key]
        if isinstance(values, tf.RaggedTensor):
            values = values.to_tensor(shape=[None, column.width])
        result[key] = tf.cast(values, column.dtype)
    return result


_PARSERS = {"blocks": _parse_blocks, "rows": parse_rows}
