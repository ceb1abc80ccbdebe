"""Batches from converted data: a tf.data pipeline that reads records of either layout, or the log itself.

    training:    records, or the log -> parse -> pools of rows -> permute each pool -> cut into batches -> prefetch
    evaluation:  records, or the log -> parse -> cut into batches -> prefetch

A pool is held in memory; it has as many rows as fit into ``shuffle_megabytes``. The rows of a pool are permuted, so a
split that fits in one pool is shuffled as a whole in every epoch. The records of a larger split are dealt out to pools
in runs, differently in every epoch (:mod:`pipelines.batches.order`). :mod:`pipelines.batches.log_reader` reads the log
(``parquet``). With ``start_step``, pools of records that hold skipped batches only are not read.

A batch is a dict (B = batch_size, L = max_length, n = length)::

    {"features": {name: int32 [B] | int32 [B, L] (0-padded) | float32 [B] (raw, NaN = missing) | float32 [B, n]
                        (of a feature with two hashes int32 [B, 2] | int32 [B, 2 L])},
     "labels": {task: float32 [B], 0 outside the task's space},
     "weights": {task: float32 [B], the row's weight (1 if the task has none) inside the task's space, 0 outside it and
                 in padding rows},
     "group": int64 [B], "item": int64 [B] (if the schema names them), "row_id": int64 [B] (-1 in padding rows)}

Training batches depend on (seed, epoch, reader) alone, not on TensorFlow's global seed, so an epoch can be continued at
any step. Evaluation keeps the input order and pads the last batch.

Several processes read one training split in ``parts``, each of which has its own rows and gives an equal share of every
batch. The rows of all processes' batches together depend on the number of parts, not on that of the processes: one
process that reads all six parts, two that read three each and three that read two each make the same global batches.
"""

from __future__ import annotations

import functools
import math

import tensorflow as tf

from pipelines.batches import log_dataset, log_reader, order
from pipelines.batches.batch import beside_each_other, of_tasks, pad, to_batch
from pipelines.batches.damage import readable
from pipelines.batches.parsing import read_records, row_bytes
from pipelines.batches.pools import permuted, pools_of_log, pools_of_records
from pipelines.manifest import INPUT_FORMATS, Manifest
from stem_util.errors import UserError, did_you_mean

ON_CORRUPT = ("fail", "skip")
SHUFFLE_MEGABYTES = 1024
"""The default size of a pool."""


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
    parts: int = 0,
    on_corrupt: str = "fail",
    shuffle_megabytes: int = SHUFFLE_MEGABYTES,
    run_kilobytes: int = 0,
    device: str | None = None,
) -> tf.data.Dataset:
    """One epoch of a split as batches of static size.

    Args:
      manifest: manifest of the converted data.
      split: ``train``, ``validation`` or ``test``.
      batch_size: B. Training drops the remainder; evaluation pads the last batch with rows of weight 0 and row_id -1.
      input_format: ``blocks`` (fast) or ``rows``, or ``parquet``: the log, with the conversion's vocabularies.
      training: shuffle by seed, epoch and reader, rather than keep the input order.
      seed: seed of the shuffle, 0 or more.
      epoch: number of the epoch; each has another order and other batches.
      start_step: skip this many batches; the rest are the same as without skipping.
      reader: (index, count): read part ``index`` of ``count``; over all readers each row is read once. When training on
        records, a part is made of runs of records, others in every epoch, and all have the same number of rows, up to
        one. Otherwise it is made of whole shards (or row groups, permuted in training) if there are at least ``count``
        of them, else of every ``count``-th record (row).
      parts: when training on records, the number of parts, of which each reader reads ``parts / count``; ``count`` by
        default.
      on_corrupt: ``fail``, or ``skip`` damaged records, which are counted and logged. A log has none.
      shuffle_megabytes: size of a pool. Two pools of each part are in memory at a time; with ``rows`` and ``parquet``,
        three. If the split (or a part of it) is larger than a pool, this and ``run_kilobytes`` decide its batches.
      run_kilobytes: size of the runs in which a split larger than a pool is read; the rows of a run share a pool.
        0: one block, or 128 rows.
      device: prefetch to this device, e.g. ``/GPU:0``. No other transformation may then follow.

    Raises:
      UserError: the split, format or policy does not exist; data or log are missing, or have changed since the
        conversion or the epoch before; the log is CSV; there are no rows, or fewer than a training batch.
      CorruptRecord: a shard is shorter than the manifest says (``fail``). Damage inside a shard of the right size, and
        any fault of a log, shows only while it is read, as a tf.errors.OpError: so iterate inside
        :func:`pipelines.batches.damage.naming_corrupt_records`.
    """
    index, count = reader
    if not 0 <= index < count:
        raise ValueError(f"reader should be (index, count) with 0 <= index < count, but is {reader}")
    parts = parts or count
    if parts % count or batch_size % (parts // count) or (input_format == "parquet" and parts != count):
        raise ValueError(f"{count} readers of {input_format} cannot make batches of {batch_size} of {parts} parts")
    if start_step < 0:
        raise ValueError(f"start_step should be 0 or more, but is {start_step}")
    # Refuses too few rows.
    count_batches(manifest, split, batch_size, training=training, input_format=input_format, on_corrupt=on_corrupt)
    checked = input_format != "parquet" and on_corrupt == "fail"
    manifest.check(manifest.shards(split, input_format) if checked else ())  # the reader of a log checks the log
    schema = manifest.record_schema
    if training:
        pool_rows = max(1, (shuffle_megabytes << 20) // row_bytes(schema))
        own = parts // count
        share = batch_size // own
        skipped = start_step * share

        def read_part(part: int) -> tf.data.Dataset:
            if input_format == "parquet":
                pools = pools_of_log(manifest, split, pool_rows, (seed, epoch), reader)
            else:
                shards = readable(manifest, split, input_format, on_corrupt)
                reads = order.pools(
                    shards,
                    input_format,
                    pool_rows=pool_rows,
                    run_bytes=run_kilobytes << 10,
                    seed=(seed, epoch),
                    reader=(part, parts),
                )
                pools = pools_of_records(schema, shards, reads, input_format, skipped)
            rows = permuted(schema, pools, skipped, share, (seed, epoch, part))
            return rows.rebatch(share, drop_remainder=True)

        batches = beside_each_other([read_part(part) for part in range(index * own, (index + 1) * own)])
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

    if manifest.chosen:
        batches = batches.map(functools.partial(of_tasks, manifest.chosen))

    options = tf.data.Options()
    options.deterministic = True
    # The readers share the rows already; a strategy that sharded them again would lose rows.
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
    """The number of batches in an epoch of a single reader; readers that share a batch make as many.

    Raises:
      UserError: as in :func:`read_batches`.
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
    """Refuses a split, format or policy that does not exist."""
    for name, value, allowed in (
        ("split", split, tuple(manifest.splits)),
        ("input_format", input_format, INPUT_FORMATS),
        ("on_corrupt", on_corrupt, ON_CORRUPT),
    ):
        if value not in allowed:
            raise UserError(
                f"{name} should be one of {', '.join(allowed)}, but is '{value}'{did_you_mean(value, allowed)}"
            )
