"""The trivial answers: the train mean of each label per group (user) and per item, smoothed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipelines import input as inputs
from pipelines.manifest import Manifest
from pipelines.schema import Task
from stem_tf import metrics
from stem_tf.metrics import smoothed_means
from stem_tf.predictions import Predictions
from stem_tf.workdir import replace_file

PRIOR_ROWS = 5
_BATCH_ROWS = 8192

Scores = dict[str, NDArray[np.float64]]


class TrivialAnswers:
    """Train means by key, in arrays ``<key>/<task>/keys`` (sorted), ``<key>/<task>/means`` and ``<key>/<task>/unseen``.

    Args:
      arrays: as :func:`fit` makes them.
    """

    def __init__(self, arrays: Mapping[str, NDArray]) -> None:
        self._arrays = arrays

    def scores(self, key: str, predictions: Predictions) -> Scores:
        """The answers ``[N]`` by task for the rows of ``predictions``; a key not seen in train gets the train mean.

        A task without train rows is left out.

        Args:
          key: ``group`` or ``item``.
          predictions: of a split that has this key.
        """
        keys = getattr(predictions, key)
        result = {}
        for task in predictions.labels:
            known, means, unseen = (self._arrays[f"{key}/{task}/{part}"] for part in ("keys", "means", "unseen"))
            if not len(known):
                continue
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            result[task] = np.where(known[place] == keys, means[place], unseen)
        return result


def load(cache: Path, manifest: Manifest, data: Any) -> TrivialAnswers:
    """The trivial answers kept in ``cache``, or fitted on the train split and kept there.

    Args:
      cache: an .npz file whose name identifies the data.
      manifest: of the data.
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


def compare(tasks: Sequence[Task], predicted: Predictions, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """By task, the AUC of a binary task or the MSE of a regression that ``scores`` would reach."""
    result = {}
    for task in tasks:
        if task.name in scores:
            metric = metrics.auc if task.type == "binary" else metrics.mse
            name = task.name
            result[name] = metric(predicted.labels[name], scores[name], predicted.weights[name])
    return result


def fit(manifest: Manifest, data: Any) -> dict[str, NDArray]:
    """Reads the train split once."""
    present = [key for key, column in (("group", manifest.schema.group), ("item", manifest.schema.item)) if column]
    tasks = manifest.schema.task_names
    columns: dict[str, list[NDArray]] = {name: [] for name in [*present, *tasks]}
    dataset = inputs.dataset(
        manifest,
        "train",
        batch_size=_BATCH_ROWS,
        input_format=data.input_format,
        training=False,
        on_corrupt=data.on_corrupt,
    )

    def keys_and_labels(batch: Mapping[str, Any]) -> dict[str, tf.Tensor]:
        # NaN again where a row is outside the task's space, so that keys and labels stay side by side.
        labels = {task: tf.where(batch["weights"][task] > 0, batch["labels"][task], np.nan) for task in tasks}
        return {**labels, **{key: batch[key] for key in present}}

    with inputs.naming_corrupt_records(manifest, "train", data.input_format):
        for batch in dataset.map(keys_and_labels).as_numpy_iterator():
            for name, values in batch.items():
                columns[name].append(values)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    arrays: dict[str, NDArray] = {}
    for key in present:
        for task in tasks:
            inside = ~np.isnan(joined[task])
            keys, labels = joined[key][inside], joined[task][inside]
            known = np.unique(keys)
            arrays[f"{key}/{task}/keys"] = known
            arrays[f"{key}/{task}/means"] = smoothed_means(keys, labels, known, PRIOR_ROWS)
            arrays[f"{key}/{task}/unseen"] = np.asarray(labels.mean(dtype=np.float64) if len(labels) else np.nan)
    return arrays
