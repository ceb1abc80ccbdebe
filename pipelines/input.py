"""Batches from converted data: a tf.data pipeline over either record layout, or over the log itself.

    shards -> blocks, interleaved -> shuffle blocks -> group, parse, permute its rows -> cut into batches -> prefetch
    log -> processes that clean, encode and shuffle windows of rows -> tensorflow-io -> cut into batches -> prefetch

Rows are permuted inside groups of 64 blocks or more, several batches long; a block of the ``rows`` layout is a run of
128 records. How the log is read (``parquet``): see :mod:`pipelines.raw_reader`. To leave out batches (``start_step``)
they are read and parsed, at the speed of the pipeline.

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
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from pipelines import raw_reader, raw_streams
from pipelines.errors import UserError, did_you_mean
from pipelines.manifest import INPUT_FORMATS, Manifest, Shard
from pipelines.schema import Feature, Schema
from pipelines.tfrecord import CorruptRecord, Example, Writer, scan

ON_CORRUPT = ("fail", "skip")

# Least number of blocks that are parsed and permuted together; such a group also covers several batches, so that a
# batch mixes many blocks.
_GROUP_BLOCKS = 64
_GROUP_BATCHES = 4
_SHUFFLE_BLOCKS = 256
_BLOCK_ROWS = 128  # what the rows layout handles as a block
_OPEN_SHARDS = 16

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
      reader: (index, count): read one part of ``count``. Whole shards (row groups) where there are at least ``count``
        of them, else every ``count``-th record (row); over all readers each row is read once.
      on_corrupt: ``fail``, or ``skip`` damaged records (logged and counted). A log has none.
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
    if input_format == "parquet":
        rows = _read_log(manifest, split, training, seed, epoch, reader)
    else:
        shards = _readable(manifest, split, input_format, on_corrupt)
        rows = _read_records(manifest, shards, input_format, batch_size, training, seed, epoch, reader)
    batches = rows.rebatch(batch_size, drop_remainder=training).skip(start_step)
    if not training:
        batches = batches.map(lambda batch: _pad(batch, batch_size))

    options = tf.data.Options()
    options.deterministic = True
    # Readers are assigned above; a strategy that sharded once more would lose rows.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    batches = batches.with_options(options)
    if device is not None:
        # Any transformation after this one would bring the batches back to the host.
        return batches.apply(tf.data.experimental.prefetch_to_device(device, buffer_size=2))
    return batches.prefetch(tf.data.AUTOTUNE)


def _read_records(
    manifest: Manifest,
    shards: list[Shard],
    layout: str,
    batch_size: int,
    training: bool,
    seed: int,
    epoch: int,
    reader: tuple[int, int],
) -> tf.data.Dataset:
    """The rows of some shards in groups of any size, as the dict of a batch."""
    index, count = reader
    by_shard = len(shards) >= count
    random = np.random.default_rng([seed, epoch, index])
    if by_shard:
        shards = shards[index::count]
    paths = [shard.path for shard in shards]

    def read(paths: Any) -> tf.data.Dataset:
        """Blocks, each serialised in one record or (``rows``) in a vector of records."""
        records = tf.data.TFRecordDataset(paths)
        if not by_shard:
            records = records.shard(count, index)
        return records if layout == "blocks" else records.batch(_BLOCK_ROWS)

    if training and by_shard:
        blocks = tf.data.Dataset.from_tensor_slices([paths[i] for i in random.permutation(len(paths))]).interleave(
            read,
            cycle_length=min(_OPEN_SHARDS, len(paths)),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
    else:  # Readers that divide records among themselves have to see them in one order; the shuffle is enough.
        blocks = read(paths)

    records = sum(shard.records for shard in shards)
    block_rows = sum(shard.rows for shard in shards) / records if layout == "blocks" else _BLOCK_ROWS
    group = max(_GROUP_BLOCKS, math.ceil(_GROUP_BATCHES * batch_size / block_rows))
    if training:
        blocks = _shuffle(blocks, max(_SHUFFLE_BLOCKS, 2 * group), _seed(random))
    permutation_seed = _seed(random)

    def parse(number: tf.Tensor, records: tf.Tensor) -> dict[str, Any]:
        columns = _PARSERS[layout](manifest.schema, records)
        if training:
            rows = tf.range(tf.shape(columns["key:row_id"])[0])
            order = tf.random.experimental.stateless_shuffle(rows, tf.stack([permutation_seed, number]))[:, tf.newaxis]
            columns = {key: tf.gather_nd(column, order) for key, column in columns.items()}  # twice as fast as gather
        return _batch(manifest.schema, columns)

    groups = blocks.batch(group) if layout == "blocks" else blocks.rebatch(group * _BLOCK_ROWS)
    return groups.enumerate().map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _read_log(
    manifest: Manifest, split: str, training: bool, seed: int, epoch: int, reader: tuple[int, int]
) -> tf.data.Dataset:
    """The rows of a split of the log, a window at a time, as the dict of a batch."""
    from tensorflow_io.arrow import ArrowStreamDataset

    plan = raw_reader.plan(manifest, split, training=training, seed=seed, epoch=epoch, reader=reader)
    count = min(len(os.sched_getaffinity(0)), raw_reader.SIDE_BY_SIDE, len(plan.parts))
    streams = raw_streams.Streams(plan, count)
    _reading[manifest.data_dir, split] = streams
    schema = raw_reader.arrow_schema(manifest.schema)
    # In order, a process is ahead of the others only by what is held here of the part that it reads.
    ahead = 1 if training else min(max(part.windows for part in plan.parts), raw_reader.SIDE_BY_SIDE)
    sources = [ArrowStreamDataset.from_schema(endpoint, schema, batch_mode="auto") for endpoint in streams.endpoints]
    weakref.finalize(sources[0], streams.close)  # iterators keep the data sets that they read
    turns = tf.data.Dataset.from_tensor_slices(np.asarray(plan.order, np.int64) % count)
    windows = tf.data.Dataset.choose_from_datasets([source.prefetch(ahead) for source in sources], turns)

    def parse(number: tf.Tensor, columns: tuple[tf.Tensor, ...]) -> dict[str, Any]:
        named = dict(zip(schema.names, columns, strict=True))
        whole = tf.debugging.assert_equal(named.pop(raw_reader.WINDOW)[-1], tf.cast(number, tf.int32), message=_CUT_OFF)
        for key, (_, width) in raw_reader.shapes(manifest.schema):
            named[key] = tf.ensure_shape(named[key], [None, width] if width else [None])
        with tf.control_dependencies([whole]):
            return _batch(manifest.schema, {key: tf.identity(values) for key, values in named.items()})

    rows = windows.enumerate().map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return rows.filter(lambda batch: batch["row_id"][0] >= 0)  # a window without rows has one row that is none


_CUT_OFF = "the stream of a window was cut off"
_reading: weakref.WeakValueDictionary[tuple[str, str], raw_streams.Streams] = weakref.WeakValueDictionary()
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
    parse = functools.partial(_PARSERS[layout], manifest.schema)
    try:
        for shard in _checked(manifest, split, layout, "fail"):
            pending: list[tuple[int, bytes]] = []
            try:
                for record in scan(shard.path):
                    pending.append(record)
                    if len(pending) == _GROUP_BLOCKS:
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
        words = ("arse example", "ParseExample", "DecodeRaw", "Ragged", _UNEQUAL)
        related = any(word in str(error) for word in words)
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


def _check_parses(path: str, records: list[tuple[int, bytes]], parse: Callable[[tf.Tensor], Columns]) -> None:
    """Raises CorruptRecord for the first record that ``parse`` refuses."""

    def refusal(payloads: list[bytes]) -> str:
        try:
            parse(tf.constant(payloads, tf.string))
        except tf.errors.InvalidArgumentError as error:
            return error.message
        return ""

    if not refusal([payload for _, payload in records]):
        return
    for offset, payload in records:
        if why := refusal([payload]):
            raise CorruptRecord(path, offset, f"the record does not parse: {why}")


# ---------------------------------------------------------------------------------------------------------------------
# Order


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(2**62))


def _shuffle(records: tf.data.Dataset, buffer: int, seed: int) -> tf.data.Dataset:
    """Shuffles by ``seed`` alone.

    Dataset.shuffle mixes the seed with TensorFlow's global one; inside a function that is the graph's own, set here.
    """

    def shuffled(_: tf.Tensor) -> tf.data.Dataset:
        tf.random.set_seed(0)  # of this graph only
        return records.shuffle(buffer, seed=seed)

    return tf.data.Dataset.from_tensors(0).flat_map(shuffled)


# ---------------------------------------------------------------------------------------------------------------------
# Parsing

_UNEQUAL = "the columns of a block differ in length"
_KINDS: Mapping[str, tf.DType] = {
    "categorical": tf.int32,
    "multivalent": tf.int32,
    "numeric": tf.float32,
    "dense": tf.float32,
}


@dataclass(frozen=True)
class _Column:
    """One key of a record: its type in a batch, and the feature behind it, if any."""

    dtype: tf.DType
    feature: Feature | None = None


def _columns(schema: Schema) -> dict[str, _Column]:
    columns = {f"feature:{f.name}": _Column(_KINDS[f.kind], f) for f in schema.features}
    columns |= {f"label:{task.name}": _Column(tf.float32) for task in schema.tasks}
    columns |= {f"weight:{column}": _Column(tf.float32) for column in schema.row_weights}
    keys = {"key:group": schema.group, "key:item": schema.item, "key:row_id": True}
    return columns | {key: _Column(tf.int64) for key, present in keys.items() if present}


def _parse_blocks(schema: Schema, blocks: tf.Tensor) -> Columns:
    """Serialised blocks [G] -> columns [rows, ...] in the order of the blocks."""
    columns = _columns(schema)
    dtypes = {key: column.dtype for key, column in columns.items()}
    dtypes |= {f"length:{f.name}": tf.int32 for f in schema.features if f.kind == "multivalent"}
    parsed = tf.io.parse_example(blocks, {key: tf.io.FixedLenFeature([], tf.string) for key in dtypes})
    # A column's blocks are little-endian arrays: joining their bytes joins the arrays.
    flat = {key: tf.io.decode_raw(tf.strings.reduce_join(parsed[key]), dtype) for key, dtype in dtypes.items()}
    result = {}
    for key, column in columns.items():
        values, feature = flat[key], column.feature
        if feature and feature.kind == "multivalent":
            ragged = tf.RaggedTensor.from_row_lengths(values, flat[f"length:{feature.name}"])
            values = ragged.to_tensor(shape=[None, feature.max_length])
        elif feature and feature.kind == "dense":
            values = tf.reshape(values, [-1, feature.length])
        result[key] = values
    rows = tf.stack([tf.shape(values)[0] for values in result.values()])
    with tf.control_dependencies([tf.debugging.assert_equal(rows, rows[-1], message=_UNEQUAL)]):
        return {key: tf.identity(values) for key, values in result.items()}


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
