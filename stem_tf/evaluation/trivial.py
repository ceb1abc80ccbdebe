"""The trivial answers: the train mean of each label per group (user) and per item, smoothed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.batches.damage import naming_corrupt_records
from pipelines.batches.dataset import read_batches
from pipelines.manifest import Manifest
from pipelines.schema import Task
from stem_tf import configs
from stem_tf.evaluation import metrics
from stem_tf.evaluation.metrics import smoothed_means
from stem_tf.evaluation.predictions import Predictions
from stem_util.files import replace_file

PRIOR_ROWS = 5
_BATCH_ROWS = 8192


class TrivialAnswers:
    """Train means by key, in arrays ``<key>/<task>/keys`` (sorted), ``<key>/<task>/means`` and ``<key>/<task>/unseen``.

    Args:
      arrays: as :func:`fit` makes them.
    """

    def __init__(self, arrays: Mapping[str, NDArray]) -> None:
        self._arrays = arrays

    def scores(self, key: str, predictions: Predictions) -> Iterator[tuple[str, NDArray[np.float64]]]:
        """Yields each task with its answers ``[N]`` for the rows of ``predictions``.

        A key not seen in train gets the train mean. A task without train rows is left out.

        Args:
          key: ``group`` or ``item``.
          predictions: rows of a split that has this key.
        """
        keys = getattr(predictions, key)
        for task in predictions.labels:
            known, means, unseen = (self._arrays[f"{key}/{task}/{part}"] for part in ("keys", "means", "unseen"))
            if not len(known):
                continue
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            yield task, np.where(known[place] == keys, means[place], unseen)


def load(cache: Path, manifest: Manifest, data: Any) -> TrivialAnswers:
    """Reads the trivial answers from ``cache``, or fits them on the train split and writes them there.

    Args:
      cache: an .npz file whose name identifies the data.
      manifest: manifest of the data.
      data: ``config.data``.
    """
    try:
        with np.load(cache) as arrays:
            return TrivialAnswers(dict(arrays))
    except (OSError, ValueError, EOFError):  # not there, or not whole
        pass
    fitted = fit(manifest, data)
    with replace_file(cache) as beside, open(beside, "wb") as file:
        np.savez(file, **fitted)
    return TrivialAnswers(fitted)


def compare(
    tasks: Sequence[Task], predicted: Predictions, scores: Iterable[tuple[str, NDArray[np.float64]]]
) -> dict[str, float]:
    """By task, the AUC of a binary task or the MSE of a regression that ``scores`` would reach."""
    metric_of = {task.name: metrics.auc if task.type == "binary" else metrics.mse for task in tasks}
    return {
        task: metric_of[task](predicted.labels[task], values, predicted.weights_of(task)) for task, values in scores
    }


def fit(manifest: Manifest, data: Any) -> dict[str, NDArray]:
    """Fits the train means; holds 8 bytes per row for each key, and 4 for each task and for its row weights."""
    present = [key for key, column in (("group", manifest.schema.group), ("item", manifest.schema.item)) if column]
    tasks = manifest.schema.task_names
    weighted = [task.name for task in manifest.schema.tasks if task.row_weight]
    rows, filled = manifest.rows("train"), 0
    columns: dict[str, NDArray] = {name: np.empty(rows, np.int64) for name in present}
    columns |= {f"label:{task}": np.empty(rows, np.float32) for task in tasks}
    columns |= {f"weight:{task}": np.empty(rows, np.float32) for task in weighted}
    dataset = read_batches(manifest, "train", training=False, **configs.reading(data) | {"batch_size": _BATCH_ROWS})

    def keys_and_labels(batch: Mapping[str, Any]) -> dict[str, tf.Tensor]:
        # NaN again where a row is outside the task's space, so that keys and labels stay side by side.
        labels = {f"label:{t}": tf.where(batch["weights"][t] > 0, batch["labels"][t], np.nan) for t in tasks}
        weights = {f"weight:{task}": batch["weights"][task] for task in weighted}
        return {**labels, **weights, **{key: batch[key] for key in [*present, "row_id"]}}

    with naming_corrupt_records(manifest, "train", data.input_format):
        for batch in dataset.map(keys_and_labels).as_numpy_iterator():
            real = batch.pop("row_id") >= 0  # the last batch is padded
            end = filled + np.count_nonzero(real)
            for name, values in batch.items():
                columns[name][filled:end] = values[real]
            filled = end
    columns = {name: values[:filled] for name, values in columns.items()}  # damaged records may have been skipped
    arrays: dict[str, NDArray] = {}
    for key in present:
        for task in tasks:
            inside = ~np.isnan(columns[f"label:{task}"])
            keys, labels = columns[key][inside], columns[f"label:{task}"][inside]
            weights = columns[f"weight:{task}"][inside] if task in weighted else None
            known = np.sort(pa.array(keys).unique().to_numpy())
            arrays[f"{key}/{task}/keys"] = known
            arrays[f"{key}/{task}/means"] = smoothed_means(keys, labels, known, PRIOR_ROWS, weights)
            mean = np.average(labels.astype(np.float64), weights=weights) if len(labels) else np.nan
            arrays[f"{key}/{task}/unseen"] = np.asarray(mean)
    return arrays
