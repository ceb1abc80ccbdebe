"""Scores of a whole split, in input order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipelines import input as inputs
from pipelines.errors import JobError
from pipelines.manifest import Manifest
from stem_tf import metrics
from stem_tf.callbacks import Predicting, Signals
from stem_tf.models.base import Predictor


@dataclass(frozen=True)
class Predictions:
    """Rows of a split, N of them.

    Attributes:
      row_id: int64 [N], the rows' places in the log.
      labels, scores, weights: float32 [N] by task; weight 0 and label 0 outside the task's space.
      group, item: int64 [N] keys, or None where the schema has none.
    """

    row_id: NDArray[np.int64]
    labels: dict[str, NDArray[np.float32]]
    scores: dict[str, NDArray[np.float32]]
    weights: dict[str, NDArray[np.float32]]
    group: NDArray[np.int64] | None
    item: NDArray[np.int64] | None


def predict(
    model: Predictor,
    manifest: Manifest,
    split: str,
    data: Any,
    *,
    desc: str,
    signals: Signals | None = None,
    limit: int | None = None,
) -> Predictions:
    """Scores every row of ``split``, or its first ones.

    Args:
      model: trained.
      manifest: of the data.
      split: its name.
      data: ``config.data``.
      desc: shown while it runs.
      signals: end the work when one comes.
      limit: how many rows to score at most; all when not given.

    Raises:
      UserError: no such split, or no rows in it.
      CorruptRecord: a damaged record.
    """
    dataset = inputs.dataset(manifest, split, training=False, device=single_gpu(model), **reading(data))
    steps = inputs.steps(manifest, split, training=False, **reading(data))
    rows = manifest.rows(split)
    if limit is not None:
        rows, steps = min(rows, limit), min(steps, -(-limit // data.batch_size))
    callback = Predicting(desc, rows, data.batch_size, signals)
    try:
        with inputs.naming_corrupt_records(manifest, split, data.input_format):
            # The number of steps is said: several steps an execution could not end inside one otherwise.
            outputs = model.predict(dataset, steps=steps, verbose=0, callbacks=[callback])
    finally:
        callback.close()
    real = outputs["row_id"] >= 0
    real[rows:] = False
    outputs = tf.nest.map_structure(lambda values: values[real], outputs)
    return Predictions(
        row_id=outputs["row_id"],
        **{name: outputs[name] for name in ("labels", "scores", "weights")},
        **{name: outputs.get(name) for name in ("group", "item")},
    )


def evaluate(predictions: Predictions, manifest: Manifest) -> metrics.Results:
    """All metrics, by task.

    Raises:
      JobError: a score is not a number.
    """
    for task, scores in predictions.scores.items():
        if not np.isfinite(scores).all():
            raise JobError(f"the model's scores of task '{task}' are not finite: training has diverged")
    types = {task.name: task.type for task in manifest.schema.tasks}
    return metrics.evaluate(types, predictions.labels, predictions.scores, predictions.weights, predictions.group)


def reading(data: Any) -> dict[str, Any]:
    """How to read, as :mod:`pipelines.input` takes it, of ``config.data``."""
    return {"batch_size": data.batch_size, "input_format": data.input_format, "on_corrupt": data.on_corrupt}


def single_gpu(model: Predictor) -> str | None:
    """The device to prefetch batches to: the only GPU of a model outside any distribution strategy."""
    gpus = tf.config.list_logical_devices("GPU")
    distributed = isinstance(model.distribute_strategy, tf.distribute.MirroredStrategy)
    return gpus[0].name if len(gpus) == 1 and not distributed else None
