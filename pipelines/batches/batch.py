"""Makes the nested dict that models take of columns by record key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from pipelines.batches.parsing import Columns
from pipelines.schema import Schema


def to_batch(schema: Schema, columns: Columns) -> dict[str, Any]:
    """Turns columns by record key into the dict of a batch (see :mod:`pipelines.batches.dataset`)."""
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


def of_tasks(names: Sequence[str], batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with the labels and weights of some of its tasks only."""
    return batch | {key: {name: batch[key][name] for name in names} for key in ("labels", "weights")}


def beside_each_other(shares: Sequence[tf.data.Dataset]) -> tf.data.Dataset:
    """Batches that consist of a batch of each data set, in their order."""
    if len(shares) == 1:
        return shares[0]
    return tf.data.Dataset.zip(tuple(shares)).map(
        lambda *batches: tf.nest.map_structure(lambda *values: tf.concat(values, 0), *batches)
    )


def pad(batch: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Pads a batch to ``batch_size`` rows: weights 0, row_id -1, single ids 1 (rare), everything else 0."""
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
