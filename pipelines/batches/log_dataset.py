"""The log as a tf.data data set: windows that processes without TensorFlow read, encode and stream."""

from __future__ import annotations

import os
import weakref

import numpy as np
import tensorflow as tf

from pipelines import records
from pipelines.batches import log_reader, log_streams
from pipelines.batches.parsing import Columns
from pipelines.manifest import Manifest

_CUT_OFF = "the stream of a window was cut off"
_reading: weakref.WeakValueDictionary[tuple[str, str], log_streams.Streams] = weakref.WeakValueDictionary()
"""The latest streams of each split by (data directory, split), to ask what went wrong in them."""


def read(plan: log_reader.Plan, manifest: Manifest, split: str, training: bool) -> tf.data.Dataset:
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


def failure(manifest: Manifest, split: str) -> Exception | None:
    """What went wrong in the processes that read the split last, if anything did."""
    streams = _reading.get((manifest.data_dir, split))
    return None if streams is None else streams.failure
