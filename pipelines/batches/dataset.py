"""Batches from converted data: a tf.data pipeline over either record layout, or over the log itself.

    training:    records, or the log -> parse -> pools of rows -> permute each pool -> cut into batches -> prefetch
    evaluation:  records, or the log -> parse -> cut into batches -> prefetch

A pool lies in memory and has as many rows as fit into ``shuffle_megabytes``: all of the split, if it is not larger.
All its rows are permuted, so that such a split is shuffled as a whole every epoch. A larger one is dealt out to pools
anew every epoch, in runs of records: :mod:`pipelines.batches.order`. How the log is read (``parquet``):
:mod:`pipelines.batches.log_reader`. To leave out batches (``start_step``), pools of records before theirs are not read.

A batch is a dict (B = batch_size, L = max_length, n = length)::

    {"features": {name: int32 [B] | int32 [B, L] (0-padded) | float32 [B] (raw, NaN = missing) | float32 [B, n]},
     "labels": {task: float32 [B], 0 outside the task's space},
     "weights": {task: float32 [B], the row's weight (1 if the task has none) inside the task's space, 0 outside it and
                 in padding rows},
     "group": int64 [B], "item": int64 [B] (those the schema has), "row_id": int64 [B] (-1 in padding rows)}

Training batches are a function of (seed, epoch, reader) alone, whatever TensorFlow's global seed: an epoch can be
re-entered at any step. Evaluation keeps input order and pads the last batch.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from pipelines import records
from pipelines.batches import log_reader, log_streams, order
from pipelines.manifest import INPUT_FORMATS, Manifest, Shard
from pipelines.schema import Feature, Schema
from pipelines.tfrecord import CorruptRecord, Example, Writer, scan
from stem_util.errors import UserError, did_you_mean

ON_CORRUPT = ("fail", "skip")

SHUFFLE_MEGABYTES = 1024
"""Default size of a pool."""

_BYTES_AT_A_TIME = 2 << 20
"""Rows that are parsed or permuted in one go: small enough for the processor's caches."""
_BLOCK_ROWS = 128
"""Records of the rows layout that are handled as a block, one element of a data set."""
_OPEN_RUNS = 16
"""How many runs of records are read side by side."""
_CHECKED_RECORDS = 64
"""How many records are parsed together to find one that does not parse."""
_READ_BYTES = 256 << 10

Columns = dict[str, tf.Tensor]
"""Tensors of some rows by record key: int32 / float32 features and labels, int64 keys."""


def dataset(
    manifest: Manifest,
    split: str,
    *,
    batch_size: int,
    input_format: str = "blocks",
    training: bool,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    reader: tuple[int, int] = (0, 1),
    on_corrupt: str = "fail",
    shuffle_megabytes: int = SHUFFLE_MEGABYTES,
    run_kilobytes: int = 0,
    device: str | None = None,
) -> tf.data.Dataset:
    """One epoch of a split as batches of static size.

    Args:
      manifest: of the converted data.
      split: ``train``, ``validation`` or ``test``.
      batch_size: B. Training drops the remainder; evaluation pads the last batch with rows of weight 0 and row_id -1.
      input_format: ``blocks`` (fast) or ``rows``, or ``parquet``: the log, with the conversion's vocabularies.
      training: shuffle (by seed, epoch and reader) or keep input order.
      seed: of the shuffle, 0 or more.
      epoch: changes order and composition of the batches.
      start_step: leave out this many batches; the others are those of the whole epoch.
      reader: (index, count): read one part of ``count``; over all readers each row is read once. Training on records:
        runs of them, dealt out anew every epoch. Else whole shards (row groups; permuted, in training) where there are
        at least ``count`` of them, or every ``count``-th record (row).
      on_corrupt: ``fail``, or ``skip`` damaged records (logged and counted). A log has none.
      shuffle_megabytes: size of a pool; two are in memory at a time, of ``rows`` and ``parquet`` three. With
        ``run_kilobytes`` it decides the batches of a split (a reader's part) that is larger.
      run_kilobytes: read at least so much in one go of a split that is larger than a pool; the rows share a pool.
        0: one block, or 128 rows.
      device: prefetch to this device, e.g. ``/GPU:0``. The data set must then be iterated as it is.

    Raises:
      UserError: a split, format or policy that does not exist; data or a log that are missing or have changed since
        they were converted, or since the epoch before; a CSV log; no rows, or fewer than a training batch.
      CorruptRecord: a shard is shorter than the manifest says (``fail``). Damage inside a shard of the right size, and
        what is wrong inside a log, shows when it is read, as a tf.errors.OpError: read inside
        :func:`naming_corrupt_records`.
    """
    index, count = reader
    if not 0 <= index < count:
        raise ValueError(f"reader should be (index, count) with 0 <= index < count, but is {reader}")
    if start_step < 0:
        raise ValueError(f"start_step should be 0 or more, but is {start_step}")
    # Refuses too few rows.
    steps(manifest, split, batch_size, training=training, input_format=input_format, on_corrupt=on_corrupt)
    records = input_format != "parquet" and on_corrupt == "fail"
    manifest.check(manifest.shards(split, input_format) if records else ())  # a log is looked at by its reader
    schema = manifest.schema
    if training:
        pool_rows = max(1, (shuffle_megabytes << 20) // _row_bytes(schema))
        skipped = start_step * batch_size
        if input_format == "parquet":
            pools = _pools_of_log(manifest, split, pool_rows, (seed, epoch), reader)
        else:
            shards = _readable(manifest, split, input_format, on_corrupt)
            run_bytes = run_kilobytes << 10
            reads = order.pools(
                shards, input_format, pool_rows=pool_rows, run_bytes=run_bytes, seed=(seed, epoch), reader=reader
            )
            pools = _pools_of_records(schema, shards, reads, input_format, skipped)
        rows = _permuted(schema, pools, skipped, batch_size, (seed, epoch, index))
        batches = rows.rebatch(batch_size, drop_remainder=True)
    else:
        if input_format == "parquet":
            columns = _read_log(log_reader.plan(manifest, split, shuffle=None, reader=reader), manifest, split, False)
        else:
            shards = _readable(manifest, split, input_format, on_corrupt)
            columns = _read_records(schema, shards, input_format, reader)
        rows = columns.map(functools.partial(_batch, schema), tf.data.AUTOTUNE, deterministic=True)
        batches = rows.rebatch(batch_size).skip(start_step).map(lambda batch: _pad(batch, batch_size))

    options = tf.data.Options()
    options.deterministic = True
    # Readers are assigned above; a strategy that sharded once more would lose rows.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    batches = batches.with_options(options)
    if device is not None:
        # Any transformation after this one would bring the batches back to the host.
        return batches.apply(tf.data.experimental.prefetch_to_device(device, buffer_size=2))
    return batches.prefetch(tf.data.AUTOTUNE)


def _read_records(schema: Schema, shards: list[Shard], layout: str, reader: tuple[int, int]) -> tf.data.Dataset:
    """The columns of some rows at a time, in the order of the shards."""
    index, count = reader
    if len(shards) >= count:
        records = tf.data.TFRecordDataset([shard.path for shard in shards[index::count]])
    else:
        records = tf.data.TFRecordDataset([shard.path for shard in shards]).shard(count, index)
    return _parsed(schema, records if layout == "blocks" else records.batch(_BLOCK_ROWS), shards, layout)


def _parsed(schema: Schema, blocks: tf.data.Dataset, shards: list[Shard], layout: str) -> tf.data.Dataset:
    """Blocks, each serialised in one record or (``rows``) in a vector of records -> columns of some rows at a time."""
    rows = _rows_at_a_time(schema)
    if layout == "blocks":
        block_rows = sum(shard.rows for shard in shards) / sum(shard.records for shard in shards)
        groups = blocks.batch(max(1, int(rows / block_rows)))
    else:
        groups = blocks.rebatch(rows)
    parse = functools.partial(_PARSERS[layout], schema)
    return groups.map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _read_log(plan: log_reader.Plan, manifest: Manifest, split: str, training: bool) -> tf.data.Dataset:
    """The columns of a window of the log at a time."""
    from tensorflow_io.arrow import ArrowStreamDataset

    count = min(len(os.sched_getaffinity(0)), log_reader.SIDE_BY_SIDE, len(plan.parts))
    streams = log_streams.Streams(plan, count)
    _reading[manifest.data_dir, split] = streams
    schema = log_reader.arrow_schema(manifest.schema)
    # In order, a process is ahead of the others only by what is held here of the part that it reads.
    ahead = 1 if training else min(max(part.windows for part in plan.parts), log_reader.SIDE_BY_SIDE)
    sources = [ArrowStreamDataset.from_schema(endpoint, schema, batch_mode="auto") for endpoint in streams.endpoints]
    weakref.finalize(sources[0], streams.close)  # iterators keep the data sets that they read
    turns = tf.data.Dataset.from_tensor_slices(np.asarray(plan.order, np.int64) % count)
    windows = tf.data.Dataset.choose_from_datasets([source.prefetch(ahead) for source in sources], turns)

    def parse(number: tf.Tensor, columns: tuple[tf.Tensor, ...]) -> Columns:
        named = dict(zip(schema.names, columns, strict=True))
        whole = tf.debugging.assert_equal(named.pop(log_reader.WINDOW)[-1], tf.cast(number, tf.int32), message=_CUT_OFF)
        for key, (_, width) in records.shapes(manifest.schema):
            named[key] = tf.ensure_shape(named[key], [None, width] if width else [None])
        with tf.control_dependencies([whole]):
            return {key: tf.identity(values) for key, values in named.items()}

    rows = windows.enumerate().map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return rows.filter(lambda columns: columns["key:row_id"][0] >= 0)  # a window without rows has one row that is none


_CUT_OFF = "the stream of a window was cut off"
_reading: weakref.WeakValueDictionary[tuple[str, str], log_streams.Streams] = weakref.WeakValueDictionary()
"""The latest streams of a split, to ask what went wrong in them."""


def steps(
    manifest: Manifest,
    split: str,
    batch_size: int,
    *,
    training: bool,
    input_format: str = "blocks",
    on_corrupt: str = "fail",
) -> int:
    """The number of batches of an epoch for a single reader.

    Raises:
      UserError: as :func:`dataset`.
    """
    if batch_size < 1:
        raise UserError(f"the batch size should be at least 1, but is {batch_size}")
    if input_format == "parquet":
        _check(manifest, split, input_format, on_corrupt)
        rows = manifest.rows(split)
    else:
        rows = sum(shard.rows for shard in _readable(manifest, split, input_format, on_corrupt))
    if not rows:
        raise UserError(f"the split '{split}' of {manifest.data_dir} has no rows")
    if not training:
        return math.ceil(rows / batch_size)
    if rows < batch_size:
        raise UserError(
            f"the batch size {batch_size:,} is larger than the {rows:,} rows of the split '{split}' of "
            f"{manifest.data_dir}; choose a smaller one"
        )
    return rows // batch_size


def diagnose(manifest: Manifest, split: str, layout: str = "blocks") -> CorruptRecord | None:
    """Reads every record of a split and returns the first that is damaged or does not parse, or None.

    Raises:
      UserError: a shard is missing.
    """

    def parse(payloads: list[bytes]) -> None:
        if layout == "blocks":
            records.parse(manifest.schema, payloads)
        else:
            _parse_rows(manifest.schema, tf.constant(payloads, tf.string))

    try:
        for shard in _checked(manifest, split, layout, "fail"):
            pending: list[tuple[int, bytes]] = []
            try:
                for record in scan(shard.path):
                    pending.append(record)
                    if len(pending) == _CHECKED_RECORDS:
                        _check_parses(shard.path, pending, parse)
                        pending = []
            finally:
                _check_parses(shard.path, pending, parse)
    except CorruptRecord as error:
        return error
    return None


@contextlib.contextmanager
def naming_corrupt_records(manifest: Manifest, split: str, input_format: str = "blocks") -> Iterator[None]:
    """Turns TensorFlow's errors about a split's records or log, which name no file, into ones that do.

    Raises:
      CorruptRecord: names the shard and the offset of the first bad record.
      UserError: a shard has gone, or a file of the log has gone or changed.
      JobError: a process that reads the log was killed.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if input_format == "parquet":
            streams = _reading.get((manifest.data_dir, split))
            found = None if streams is None else streams.failure
        else:
            found = _damage(manifest, split, input_format, error)
        if found is None:
            raise
        raise found from error


def _damage(manifest: Manifest, split: str, layout: str, error: tf.errors.OpError) -> Exception | None:
    """The damaged record behind an error, if there is one."""
    if isinstance(error, tf.errors.InvalidArgumentError):
        words = ("arse example", "ParseExample", "Ragged", records.BadBlock.__name__)
        related = any(word in str(error) for word in words)
    elif isinstance(error, tf.errors.UnknownError):  # raised in Python
        related = any(word.__name__ in str(error) for word in (CorruptRecord, FileNotFoundError))
    else:
        related = isinstance(error, tf.errors.DataLossError | tf.errors.NotFoundError)
    return diagnose(manifest, split, layout) if related else None


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def _readable(manifest: Manifest, split: str, layout: str, on_corrupt: str) -> list[Shard]:
    """The split's shards that hold rows, as they are or (``skip``) repaired."""
    _check(manifest, split, layout, on_corrupt)
    shards = _checked(manifest, split, layout, on_corrupt)
    if on_corrupt == "skip":
        shards = [_repaired(shard, os.stat(shard.path).st_mtime_ns) for shard in shards]
    return [shard for shard in shards if shard.rows]


def _check(manifest: Manifest, split: str, input_format: str, on_corrupt: str) -> None:
    """Refuses what does not exist."""
    for name, value, allowed in (
        ("split", split, tuple(manifest.splits)),
        ("input_format", input_format, INPUT_FORMATS),
        ("on_corrupt", on_corrupt, ON_CORRUPT),
    ):
        if value not in allowed:
            raise UserError(
                f"{name} should be one of {', '.join(allowed)}, but is '{value}'{did_you_mean(value, allowed)}"
            )


def _checked(manifest: Manifest, split: str, layout: str, on_corrupt: str) -> list[Shard]:
    """The split's shards: all exist and (``fail``) have the manifest's sizes."""
    shards = manifest.shards(split, layout)
    for shard in shards:
        try:
            size = os.path.getsize(shard.path)
        except FileNotFoundError:
            raise UserError(f"{shard.path} is missing; restore it, or convert the log again") from None
        if size != shard.bytes and on_corrupt == "fail":
            for _ in scan(shard.path):  # a file cut inside a record: names the record
                pass
            raise CorruptRecord(shard.path, size, f"the file ends here; the manifest says {shard.bytes:,} bytes")
    return shards


@functools.cache
def _repaired(shard: Shard, mtime_ns: int) -> Shard:
    """``shard`` itself when it is sound, else a temporary copy that holds its good records only.

    The cache saves a second look at a file that has not changed.
    """
    del mtime_ns
    try:
        records = tf.data.TFRecordDataset(shard.path).reduce(np.int64(0), lambda n, _: n + 1)  # much faster than scan
        if int(records) == shard.records:
            return shard
    except tf.errors.DataLossError:
        pass
    rows, first, start = 0, None, 0
    descriptor, path = tempfile.mkstemp(suffix=".tfrecord", dir=_scratch())
    os.close(descriptor)
    os.unlink(path)  # Writer wants to create it
    with Writer(path) as writer:
        while True:
            try:
                for _, payload in scan(shard.path, start):
                    writer.write(payload)
                    row_ids = Example.FromString(payload).features.feature["key:row_id"]
                    rows += len(row_ids.int64_list.value) or len(b"".join(row_ids.bytes_list.value)) // 8
            except CorruptRecord as error:
                first = first or error
                if error.end is not None:
                    start = error.end
                    continue
            break
    where = f"offset {first.offset:,} ({first.why})" if first else f"its end ({os.path.getsize(shard.path):,} bytes)"
    lost = shard.records - writer.records
    logging.warning(
        "%s: skipped %s records (%s rows) from %s", shard.path, f"{lost:,}", f"{shard.rows - rows:,}", where
    )
    return Shard(path, rows, writer.records, writer.bytes, writer.sha256)


@functools.lru_cache(maxsize=1)
def _scratch() -> str:
    """A directory for repaired shards, removed when the process ends."""
    path = tempfile.mkdtemp(prefix="stem-repaired-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _check_parses(path: str, found: list[tuple[int, bytes]], parse: Callable[[list[bytes]], None]) -> None:
    """Raises CorruptRecord for the first of the (offset, payload) in ``found`` that ``parse`` refuses."""

    def refusal(payloads: list[bytes]) -> str:
        try:
            parse(payloads)
        except tf.errors.InvalidArgumentError as error:
            return error.message
        except records.BadBlock as error:
            return str(error)
        return ""

    if not refusal([payload for _, payload in found]):
        return
    for offset, payload in found:
        if why := refusal([payload]):
            raise CorruptRecord(path, offset, f"the record does not parse: {why}")


# ---------------------------------------------------------------------------------------------------------------------
# Order


def _row_bytes(schema: Schema) -> int:
    """Of a row in memory."""
    return sum(np.dtype(kind).itemsize * max(width, 1) for _, (kind, width) in records.shapes(schema))


def _rows_at_a_time(schema: Schema) -> int:
    return max(1, _BYTES_AT_A_TIME // _row_bytes(schema))


def _pools_of_records(
    schema: Schema, shards: list[Shard], reads: list[order.Runs], layout: str, skipped: int
) -> tf.data.Dataset:
    """Elements (number of a pool, rows before it, its packed rows), without pools that lie in the first ``skipped``."""
    ends = np.cumsum([runs.rows.sum() for runs in reads], dtype=np.int64)
    first = int(np.searchsorted(ends, skipped, "right"))
    numbers = np.arange(first, len(reads))
    pools = tf.data.Dataset.from_tensor_slices((numbers, np.append(0, ends)[numbers]))
    if layout == "rows":
        rows = _rows_of_pool(schema, shards, reads)
        return pools.flat_map(lambda number, before: rows(number).map(lambda packed: (number, before, packed)))
    widths = {key: width for key, (_, width) in records.shapes(schema) if width}
    dtypes = {_SINGLE: tf.int32} | {key: _columns(schema)[key].dtype for key in widths}

    def fill(number: np.int64) -> list[np.ndarray]:
        packed = _filled(schema, [shard.path for shard in shards], reads[number])
        return [packed[key] for key in dtypes]

    def read(number: tf.Tensor, before: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
        filled = tf.numpy_function(fill, [number], list(dtypes.values()), stateful=False)
        packed = {key: tf.ensure_shape(v, [None, widths.get(key)]) for key, v in zip(dtypes, filled, strict=True)}
        return number, before, packed

    return pools.map(read)


def _filled(schema: Schema, paths: list[str], runs: order.Runs) -> dict[str, np.ndarray]:
    """The packed rows of blocks, as :func:`_packed` makes them of columns.

    TensorFlow's parser takes twice the work, and its rows are held twice.
    """
    rows, words = int(runs.rows.sum()), 0
    packed = {}
    for key, (kind, width) in records.shapes(schema):
        if width:
            packed[key] = _aligned(rows, width, kind)
        else:
            words += np.dtype(kind).itemsize // 4
    packed[_SINGLE] = _aligned(rows, words, np.int32)
    payloads = (
        payload
        for shard, offset, count, _ in zip(*runs, strict=True)
        for _, payload in itertools.islice(scan(paths[shard], offset), count)
    )
    # A quarter of what TensorFlow does in one go, to stay in the caches while columns become rows.
    blocks = max(1, _rows_at_a_time(schema) // 4 * int(runs.records.sum()) // max(rows, 1))
    start = 0
    while messages := list(itertools.islice(payloads, blocks)):
        columns, word = records.parse(schema, messages), 0
        count = len(columns["key:row_id"])
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


def _aligned(rows: int, width: int, kind: type) -> np.ndarray:
    """[rows, width], not initialised, where TensorFlow takes it without a copy."""
    size = rows * width * np.dtype(kind).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(kind).reshape(rows, width)


def _rows_of_pool(
    schema: Schema, shards: list[Shard], reads: list[order.Runs]
) -> Callable[[tf.Tensor], tf.data.Dataset]:
    """By the number of a pool of the ``rows`` layout: a data set of one element, its packed rows."""
    paths = tf.constant([shard.path for shard in shards])
    record_bytes = -(-sum(shard.bytes for shard in shards) // sum(shard.records for shard in shards))
    splits = tf.constant(np.cumsum([0, *(len(runs.shard) for runs in reads)]), tf.int64)
    shard, offset, count, _ = (tf.constant(np.concatenate(values), tf.int64) for values in zip(*reads, strict=True))

    def blocks(shard: tf.Tensor, offset: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        # TFRecordDataset has no offsets. A buffer much larger than a run would be filled in vain.
        size = tf.minimum(count * record_bytes, _READ_BYTES)
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[paths[shard]], compression_type="", buffer_size=size, byte_offsets=[offset]
        )
        found = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(count)
        return found.batch(_BLOCK_ROWS)

    def rows(number: tf.Tensor) -> tf.data.Dataset:
        runs = (values[splits[number] : splits[number + 1]] for values in (shard, offset, count))
        read = tf.data.Dataset.from_tensor_slices(tuple(runs)).interleave(
            blocks, cycle_length=_OPEN_RUNS, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        packed = _parsed(schema, read, shards, "rows").map(_packed, tf.data.AUTOTUNE, deterministic=True)
        return packed.rebatch(_ALL)

    return rows


def _pools_of_log(
    manifest: Manifest, split: str, pool_rows: int, seed: tuple[int, int], reader: tuple[int, int]
) -> tf.data.Dataset:
    """Elements (number of a pool, rows before it, its packed rows)."""
    plan = log_reader.plan(manifest, split, shuffle=seed, reader=reader)
    # Pools of equal size, as far as is known before the log is read.
    rows = min(manifest.rows(split), sum(unit.rows for part in plan.parts for unit in part.units))
    pool_rows = math.ceil(rows / math.ceil(rows / pool_rows))
    packed = _read_log(plan, manifest, split, True).map(_packed, tf.data.AUTOTUNE, deterministic=True)
    return packed.rebatch(pool_rows).enumerate().map(lambda number, rows: (number, number * pool_rows, rows))


def _permuted(
    schema: Schema, pools: tf.data.Dataset, skipped: int, batch_size: int, seed: tuple[int, ...]
) -> tf.data.Dataset:
    """The rows of pools in their final order, as the dict of a batch, without the first ``skipped``."""
    slice_rows = batch_size * max(1, _rows_at_a_time(schema) // batch_size)

    def permutation(number: np.int64, rows: np.int64) -> np.ndarray:
        return np.random.default_rng([*seed, int(number)]).permutation(rows)  # faster than TensorFlow's

    def slices(number: tf.Tensor, before: tf.Tensor, pool: dict[str, tf.Tensor]) -> tf.data.Dataset:
        rows = tf.shape(pool[_SINGLE], tf.int64)[0]
        order = tf.ensure_shape(tf.numpy_function(permutation, [number, rows], tf.int64, stateful=False), [None])

        def read(start: tf.Tensor) -> dict[str, Any]:
            places = order[start : start + slice_rows, tf.newaxis]
            # gather_nd is faster than gather.
            return _batch(
                schema, _unpacked(schema, {key: tf.gather_nd(values, places) for key, values in pool.items()})
            )

        starts = tf.data.Dataset.range(tf.maximum(skipped - before, 0), rows, slice_rows)
        return starts.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    return pools.prefetch(1).flat_map(slices)


_ALL = 2**62
_SINGLE = "single"


def _packed(columns: Columns) -> dict[str, tf.Tensor]:
    """Columns by record key -> those of single values as one matrix int32 [rows, words]: a row lies together."""
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
    for key, column in _columns(schema).items():
        if key in packed:
            columns[key] = packed[key]
        elif column.dtype.size == 4:
            columns[key] = tf.bitcast(words[start], column.dtype)
            start += 1
        else:
            columns[key] = tf.bitcast(tf.transpose(words[start : start + 2]), column.dtype)
            start += 2
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Parsing


@dataclass(frozen=True)
class _Column:
    """One key of a record: its type in a batch, and the feature behind it, if any."""

    dtype: tf.DType
    feature: Feature | None = None


def _columns(schema: Schema) -> dict[str, _Column]:
    """The keys of a record, in the order of :func:`pipelines.records.shapes`."""
    features = {f"feature:{feature.name}": feature for feature in schema.features}
    return {key: _Column(tf.as_dtype(kind), features.get(key)) for key, (kind, _) in records.shapes(schema)}


def _parse_blocks(schema: Schema, blocks: tf.Tensor) -> Columns:
    """Serialised blocks [G] -> columns [rows, ...] in the order of the blocks."""

    def parse(blocks: np.ndarray) -> list[np.ndarray]:
        return list(records.parse(schema, blocks.tolist()).values())

    columns = _columns(schema)
    values = tf.numpy_function(parse, [blocks], [column.dtype for column in columns.values()], stateful=False)
    shapes = ([None, width] if width else [None] for _, (_, width) in records.shapes(schema))
    return dict(zip(columns, map(tf.ensure_shape, values, shapes), strict=True))


def _parse_rows(schema: Schema, rows: tf.Tensor) -> Columns:
    """Serialised rows [B] -> columns [B, ...]."""
    spec: dict[str, Any] = {}
    for key, column in _columns(schema).items():
        dtype = tf.float32 if column.dtype == tf.float32 else tf.int64  # tf.Example knows no int32
        if column.feature and column.feature.kind == "multivalent":
            spec[key] = tf.io.RaggedFeature(dtype)
        elif column.feature and column.feature.kind == "dense":
            spec[key] = tf.io.FixedLenFeature([column.feature.length], dtype)
        else:
            spec[key] = tf.io.FixedLenFeature([], dtype)
    parsed = tf.io.parse_example(rows, spec)
    result = {}
    for key, column in _columns(schema).items():
        values = parsed[key]
        if isinstance(values, tf.RaggedTensor) and column.feature:
            values = values.to_tensor(shape=[None, column.feature.max_length])
        result[key] = tf.cast(values, column.dtype)
    return result


_PARSERS = {"blocks": _parse_blocks, "rows": _parse_rows}


def _batch(schema: Schema, columns: Columns) -> dict[str, Any]:
    """Columns by record key -> the nested dict of a batch."""
    labels = {task.name: columns[f"label:{task.name}"] for task in schema.tasks}
    inside = {name: tf.logical_not(tf.math.is_nan(label)) for name, label in labels.items()}
    batch: dict[str, Any] = {
        "features": {f.name: columns[f"feature:{f.name}"] for f in schema.features},
        "labels": {name: tf.where(inside[name], label, 0.0) for name, label in labels.items()},
        "weights": {name: tf.cast(mask, tf.float32) for name, mask in inside.items()},
    }
    for task in schema.tasks:
        if task.row_weight is not None:
            batch["weights"][task.name] *= columns[f"weight:{task.row_weight}"]
    return batch | {name: columns[f"key:{name}"] for name in ("group", "item", "row_id") if f"key:{name}" in columns}


def _pad(batch: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Fills a batch up to ``batch_size`` rows: weights 0, row_id -1, single ids 1 (rare), everything else 0."""
    missing = batch_size - tf.shape(batch["row_id"])[0]
    constants = tf.nest.map_structure(lambda _: 0, batch)
    constants["row_id"] = -1
    for name, value in batch["features"].items():
        constants["features"][name] = int(value.dtype == tf.int32 and value.shape.rank == 1)

    def fill(value: tf.Tensor, constant: int) -> tf.Tensor:
        paddings = [[0, missing]] + [[0, 0]] * (value.shape.rank - 1)
        padded = tf.pad(value, paddings, constant_values=tf.cast(constant, value.dtype))
        return tf.ensure_shape(padded, [batch_size, *value.shape[1:]])

    return tf.nest.map_structure(fill, batch, constants)
