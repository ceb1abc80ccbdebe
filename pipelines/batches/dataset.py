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

import functools
import math

import tensorflow as tf

from pipelines.batches import log_dataset, log_reader, order
from pipelines.batches.batch import pad, to_batch
from pipelines.batches.damage import readable
from pipelines.batches.parsing import read_records, row_bytes
from pipelines.batches.pools import permuted, pools_of_log, pools_of_records
from pipelines.manifest import INPUT_FORMATS, Manifest
from stem_util.errors import UserError, did_you_mean

ON_CORRUPT = ("fail", "skip")
SHUFFLE_MEGABYTES = 1024
"""Default size of a pool."""


def read_batches(
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
        :func:`pipelines.batches.damage.naming_corrupt_records`.
    """
    index, count = reader
    if not 0 <= index < count:
        raise ValueError(f"reader should be (index, count) with 0 <= index < count, but is {reader}")
    if start_step < 0:
        raise ValueError(f"start_step should be 0 or more, but is {start_step}")
    # Refuses too few rows.
    count_batches(manifest, split, batch_size, training=training, input_format=input_format, on_corrupt=on_corrupt)
    checked = input_format != "parquet" and on_corrupt == "fail"
    manifest.check(manifest.shards(split, input_format) if checked else ())  # a log is looked at by its reader
    schema = manifest.schema
    if training:
        pool_rows = max(1, (shuffle_megabytes << 20) // row_bytes(schema))
        skipped = start_step * batch_size
        if input_format == "parquet":
            pools = pools_of_log(manifest, split, pool_rows, (seed, epoch), reader)
        else:
            shards = readable(manifest, split, input_format, on_corrupt)
            run_bytes = run_kilobytes << 10
            reads = order.pools(
                shards, input_format, pool_rows=pool_rows, run_bytes=run_bytes, seed=(seed, epoch), reader=reader
            )
            pools = pools_of_records(schema, shards, reads, input_format, skipped)
        rows = permuted(schema, pools, skipped, batch_size, (seed, epoch, index))
        batches = rows.rebatch(batch_size, drop_remainder=True)
    else:
        if input_format == "parquet":
            columns = log_dataset.read(
                log_reader.plan(manifest, split, shuffle=None, reader=reader), manifest, split, False
            )
        else:
            shards = readable(manifest, split, input_format, on_corrupt)
            columns = read_records(schema, shards, input_format, reader)
        rows = columns.map(functools.partial(to_batch, schema), tf.data.AUTOTUNE, deterministic=True)
        batches = rows.rebatch(batch_size).skip(start_step).map(lambda batch: pad(batch, batch_size))

    options = tf.data.Options()
    options.deterministic = True
    # Readers are assigned above; a strategy that sharded once more would lose rows.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    batches = batches.with_options(options)
    if device is not None:
        # Any transformation after this one would bring the batches back to the host.
        return batches.apply(tf.data.experimental.prefetch_to_device(device, buffer_size=2))
    return batches.prefetch(tf.data.AUTOTUNE)


def count_batches(
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
      UserError: as :func:`read_batches`.
    """
    if batch_size < 1:
        raise UserError(f"the batch size should be at least 1, but is {batch_size}")
    _check(manifest, split, input_format, on_corrupt)
    if input_format == "parquet":
        rows = manifest.rows(split)
    else:
        rows = sum(shard.rows for shard in readable(manifest, split, input_format, on_corrupt))
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
