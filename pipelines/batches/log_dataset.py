"""The log as a tf.data data set. Processes without TensorFlow read and encode its windows, and stream them here."""

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
"""The latest streams of each split, by (data directory, split): `failure` looks there for the cause of an error."""


def read(plan: log_reader.Plan, manifest: Manifest, split: str, training: bool) -> tf.data.Dataset:
    """A data set whose elements are the columns of one window of the log each."""
    from tensorflow_io.arrow import ArrowStreamDataset

    count = min(len(os.sched_getaffinity(0)), log_reader.SIDE_BY_SIDE, len(plan.parts))
    streams = log_streams.Streams(plan, count)
    _reading[manifest.data_dir, split] = streams
    schema = log_reader.arrow_schema(manifest.record_schema)
    # When order is kept, a process gets ahead of the others only by what is buffered here of the part that it reads.
    ahead = 1 if training else min(max(part.windows for part in plan.parts), log_reader.SIDE_BY_SIDE)
    sources = [ArrowStreamDataset.from_schema(endpoint, schema, batch_mode="auto") for endpoint in streams.endpoints]
    weakref.finalize(sources[0], streams.close)  # iterators keep their data sets alive
    turns = tf.data.Dataset.from_tensor_slices(np.asarray(plan.order, np.int64) % count)
    windows = tf.data.Dataset.choose_from_datasets([source.prefetch(ahead) for source in sources], turns)

    def parse(number: tf.Tensor, columns: tuple[tf.Tensor, ...]) -> Columns:
        named = dict(zip(schema.names, columns, strict=True))
        whole = tf.debugging.assert_equal(named.pop(log_reader.WINDOW)[-1], tf.cast(number, tf.int32), message=_CUT_OFF)
        for key, (_, width) in records.shapes(manifest.record_schema):
            named[key] = tf.ensure_shape(named[key], [None, width] if width else [None])
        with tf.control_dependencies([whole]):
            return {key: tf.identity(values) for key, values in named.items()}

    rows = windows.enumerate().map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    # An empty window is sent as one row with row_id -1.
    return rows.filter(lambda columns: columns["key:row_id"][0] >= 0)


def failure(manifest: Manifest, split: str) -> Exception | None:
    """The error of the processes that read the split last, or None."""
    streams = _reading.get((manifest.data_dir, split))
    return None if streams is None else streams.failure
