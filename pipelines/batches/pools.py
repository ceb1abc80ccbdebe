"""Pools: rows that are held in memory together and permuted.

An element of a data set of pools is (number of the pool, number of rows before it, its packed rows). Packed rows hold
all single values of a row side by side in one int32 matrix, so that permuting rows is one gather.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from pipelines import records
from pipelines.batches import log_dataset, log_reader, order
from pipelines.batches.batch import to_batch
from pipelines.batches.parsing import BLOCK_ROWS, Columns, columns_of, parsed, rows_at_a_time
from pipelines.manifest import Manifest, Shard
from pipelines.schema import Schema
from pipelines.tfrecord import scan

_OPEN_RUNS = 16
"""The number of runs of records that are read side by side."""
_READ_BYTES = 256 << 10
_ALL = 2**62
_SINGLE = "single"


def pools_of_records(
    schema: Schema, shards: list[Shard], reads: list[order.Runs], layout: str, skipped: int
) -> tf.data.Dataset:
    """A data set of pools, without those that lie entirely in the first ``skipped`` rows."""
    ends = np.cumsum([runs.rows.sum() for runs in reads], dtype=np.int64)
    first = int(np.searchsorted(ends, skipped, "right"))
    numbers = np.arange(first, len(reads))
    pools = tf.data.Dataset.from_tensor_slices((numbers, np.append(0, ends)[numbers]))
    if layout == "rows":
        rows = _rows_of_pool(schema, shards, reads)
        return pools.flat_map(lambda number, before: rows(number).map(lambda packed: (number, before, packed)))
    widths = {key: width for key, (_, width) in records.shapes(schema) if width}
    dtypes = {_SINGLE: tf.int32} | {key: columns_of(schema)[key].dtype for key in widths}

    def fill(number: np.int64) -> list[np.ndarray]:
        packed = _filled(schema, [shard.path for shard in shards], reads[number])
        return [packed[key] for key in dtypes]

    def read(number: tf.Tensor, before: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
        filled = tf.numpy_function(fill, [number], list(dtypes.values()), stateful=False)
        packed = {key: tf.ensure_shape(v, [None, widths.get(key)]) for key, v in zip(dtypes, filled, strict=True)}
        return number, before, packed

    return pools.map(read)


def _filled(schema: Schema, paths: list[str], runs: order.Runs) -> dict[str, np.ndarray]:
    """Reads blocks into packed rows, the same that :func:`_packed` makes of columns.

    TensorFlow's parser would take twice the work and hold the rows twice.
    """
    rows, words = int(runs.rows.sum()), 0
    packed = {}
    for key, (kind, width) in records.shapes(schema):
        if width:
            packed[key] = _aligned(rows, width, kind)
        else:
            words += np.dtype(kind).itemsize // 4
    packed[_SINGLE] = _aligned(rows, words, np.int32)
    start = 0
    for columns in _read(schema, paths, runs):
        word, count = 0, len(columns["key:row_id"])
        end = start + count
        if end > rows:
            break
        single = np.empty((words, count), np.int32)
        for key, values in columns.items():
            if values.ndim > 1:
                packed[key][start:end] = values
            else:
                size = values.itemsize // 4
                single[word : word + size] = values.view(np.int32).reshape(count, size).T
                word += size
        packed[_SINGLE][start:end] = single.T
        start = end
    if start != rows:
        raise records.BadBlock(f"the blocks of a pool do not have the {rows:,} rows that the manifest says")
    return packed


def _read(schema: Schema, paths: list[str], runs: order.Runs) -> Iterator[dict[str, np.ndarray]]:
    """The columns of the rows of runs, some blocks at a time."""
    # A quarter of what TensorFlow parses in one go, to stay in the caches while columns become rows.
    blocks = max(1, rows_at_a_time(schema) // 4 * int(runs.records.sum()) // max(int(runs.rows.sum()), 1))

    def payloads(shard: int, offset: int, count: int) -> Iterator[bytes]:
        return (payload for _, payload in itertools.islice(scan(paths[shard], offset), count))

    whole = (runs.shard[runs.skip < 0], runs.offset[runs.skip < 0], runs.records[runs.skip < 0])
    found = itertools.chain.from_iterable(map(payloads, *whole))
    while messages := list(itertools.islice(found, blocks)):
        yield records.parse(schema, messages)
    for shard, offset, count, rows, skip in zip(*runs, strict=True):
        if skip >= 0:
            columns = records.parse(schema, list(payloads(shard, offset, count)))
            yield {key: values[skip : skip + rows] for key, values in columns.items()}


def _aligned(rows: int, width: int, kind: type) -> np.ndarray:
    """An uninitialised array [rows, width], aligned so that TensorFlow takes it without a copy."""
    size = rows * width * np.dtype(kind).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(kind).reshape(rows, width)


def _rows_of_pool(
    schema: Schema, shards: list[Shard], reads: list[order.Runs]
) -> Callable[[tf.Tensor], tf.data.Dataset]:
    """Returns a function from the number of a pool (``rows`` layout) to a data set of one element, its packed rows."""
    paths = tf.constant([shard.path for shard in shards])
    record_bytes = -(-sum(shard.bytes for shard in shards) // sum(shard.records for shard in shards))
    splits = tf.constant(np.cumsum([0, *(len(runs.shard) for runs in reads)]), tf.int64)
    shard, offset, count, *_ = (tf.constant(np.concatenate(values), tf.int64) for values in zip(*reads, strict=True))

    def blocks(shard: tf.Tensor, offset: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        # TFRecordDataset cannot start at an offset. A buffer much larger than a run would be filled for nothing.
        size = tf.minimum(count * record_bytes, _READ_BYTES)
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[paths[shard]], compression_type="", buffer_size=size, byte_offsets=[offset]
        )
        found = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(count)
        return found.batch(BLOCK_ROWS)

    def rows(number: tf.Tensor) -> tf.data.Dataset:
        runs = (values[splits[number] : splits[number + 1]] for values in (shard, offset, count))
        read = tf.data.Dataset.from_tensor_slices(tuple(runs)).interleave(
            blocks, cycle_length=_OPEN_RUNS, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        packed = parsed(schema, read, shards, "rows").map(_packed, tf.data.AUTOTUNE, deterministic=True)
        return packed.rebatch(_ALL)

    return rows


def pools_of_log(
    manifest: Manifest, split: str, pool_rows: int, seed: tuple[int, int], reader: tuple[int, int]
) -> tf.data.Dataset:
    """A data set of pools, read from the log."""
    plan = log_reader.plan(manifest, split, shuffle=seed, reader=reader)
    # Pools of equal size, as far as the rows are known before the log is read.
    rows = min(manifest.rows(split), sum(unit.rows for part in plan.parts for unit in part.units))
    pool_rows = math.ceil(rows / math.ceil(rows / pool_rows))
    packed = log_dataset.read(plan, manifest, split, True).map(_packed, tf.data.AUTOTUNE, deterministic=True)
    return packed.rebatch(pool_rows).enumerate().map(lambda number, rows: (number, number * pool_rows, rows))


def permuted(
    schema: Schema, pools: tf.data.Dataset, skipped: int, batch_size: int, seed: tuple[int, ...]
) -> tf.data.Dataset:
    """The rows of pools in their final order, as the dict of a batch, without the first ``skipped`` rows."""
    slice_rows = batch_size * max(1, rows_at_a_time(schema) // batch_size)

    def permutation(number: np.int64, rows: np.int64) -> np.ndarray:
        return np.random.default_rng([*seed, int(number)]).permutation(rows)  # faster than TensorFlow's

    def slices(number: tf.Tensor, before: tf.Tensor, pool: dict[str, tf.Tensor]) -> tf.data.Dataset:
        rows = tf.shape(pool[_SINGLE], tf.int64)[0]
        order = tf.ensure_shape(tf.numpy_function(permutation, [number, rows], tf.int64, stateful=False), [None])

        def read(start: tf.Tensor) -> dict[str, Any]:
            places = order[start : start + slice_rows, tf.newaxis]
            # gather_nd is faster than gather.
            return to_batch(
                schema, _unpacked(schema, {key: tf.gather_nd(values, places) for key, values in pool.items()})
            )

        starts = tf.data.Dataset.range(tf.maximum(skipped - before, 0), rows, slice_rows)
        return starts.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    return pools.prefetch(1).flat_map(slices)


def _packed(columns: Columns) -> dict[str, tf.Tensor]:
    """Packs all columns with single values into one int32 matrix [rows, words]; other columns stay as they are."""
    packed, words = {}, []
    for key, values in columns.items():
        if values.shape.rank > 1:
            packed[key] = values
        elif values.dtype.size == 4:
            words.append(tf.bitcast(values, tf.int32)[tf.newaxis])
        else:
            words.append(tf.transpose(tf.bitcast(values, tf.int32)))
    return packed | {_SINGLE: tf.transpose(tf.concat(words, 0))}


def _unpacked(schema: Schema, packed: dict[str, tf.Tensor]) -> Columns:
    """The inverse of :func:`_packed`."""
    words, columns, start = tf.transpose(packed[_SINGLE]), {}, 0
    for key, column in columns_of(schema).items():
        if key in packed:
            columns[key] = packed[key]
        elif column.dtype.size == 4:
            columns[key] = tf.bitcast(words[start], column.dtype)
            start += 1
        else:
            columns[key] = tf.bitcast(tf.transpose(words[start : start + 2]), column.dtype)
            start += 2
    return columns
