"""The trivial answers, which look at no feature but the group (user) and the item: what a model should beat.

The train mean of each label per group, smoothed; the same per item; and, where the schema has both, a bias model: the
sum of an intercept, a bias per group and a bias per item (`stem_tf.evaluation.bias`).
"""

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
from stem_tf.evaluation import bias, metrics
from stem_tf.evaluation.metrics import smoothed_means
from stem_tf.evaluation.predictions import Predictions
from stem_util.files import replace_file

PRIOR_ROWS = 5
"""Each group and each item starts from so many rows at the train mean."""

_VERSION = 2  # of the cache: 1 had no biases
_BATCH_ROWS = 8192


class TrivialAnswers:
    """What was fitted on train.

    Args:
      arrays: as :func:`fit` makes them: for each key (``group``, ``item``) and task ``<key>/<task>/keys`` (sorted) and
        ``<key>/<task>/means``, and ``<key>/<task>/biases`` where there are both keys; ``mean/<task>`` and
        ``intercept/<task>``.
      tasks: the tasks, with their types.
    """

    def __init__(self, arrays: Mapping[str, NDArray], tasks: Sequence[Task]) -> None:
        self._arrays, self._tasks = arrays, tasks

    def scores(self, answer: str, predictions: Predictions) -> Iterator[tuple[str, NDArray[np.float64]]]:
        """Yields each task with its answers ``[N]`` for the rows of ``predictions``.

        A key not seen in train gets the train mean, or no bias. A task without train rows is left out.

        Args:
          answer: ``group`` or ``item`` for the means, ``both`` for the bias model.
          predictions: rows of a split that has these keys.
        """
        for task in self._tasks:
            if np.isnan(self._arrays[f"mean/{task.name}"]):
                continue
            if answer != "both":
                mean = float(self._arrays[f"mean/{task.name}"])
                yield task.name, self._of_rows(answer, task.name, "means", predictions, mean)
                continue
            values = self._of_rows("group", task.name, "biases", predictions, 0.0)
            values += self._of_rows("item", task.name, "biases", predictions, 0.0)
            values += self._arrays[f"intercept/{task.name}"]
            yield task.name, 0.5 + 0.5 * np.tanh(values / 2) if task.type == "binary" else values

    def _of_rows(self, key: str, task: str, part: str, predictions: Predictions, unseen: float) -> NDArray[np.float64]:
        """The value of each row's key, [N]."""
        known, values = self._arrays[f"{key}/{task}/keys"], self._arrays[f"{key}/{task}/{part}"]
        keys = getattr(predictions, key)
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[place] == keys, values[place], unseen)


def load(cache: Path, manifest: Manifest, data: Any) -> TrivialAnswers:
    """Reads the trivial answers from ``cache``, or fits them on the train split and writes them there.

    Args:
      cache: an .npz file whose name identifies the data.
      manifest: manifest of the data.
      data: ``config.data``.
    """
    try:
        with np.load(cache) as arrays:
            if arrays["version"] == _VERSION:
                return TrivialAnswers(dict(arrays), manifest.schema.tasks)
    except (OSError, ValueError, EOFError, KeyError):  # not there, not whole, or of a version before versions
        pass
    fitted = fit(manifest, data)
    with replace_file(cache) as beside, open(beside, "wb") as file:
        np.savez(file, **fitted)
    return TrivialAnswers(fitted, manifest.schema.tasks)


def compare(
    tasks: Sequence[Task], predicted: Predictions, scores: Iterable[tuple[str, NDArray[np.float64]]]
) -> dict[str, float]:
    """By task, the AUC of a binary task or the MSE of a regression that ``scores`` would reach."""
    types = {task.name: task.type for task in tasks}
    return {
        task: metrics.main(types[task], predicted.labels[task], values, predicted.weights_of(task))
        for task, values in scores
    }


def fit(manifest: Manifest, data: Any) -> dict[str, NDArray]:
    """Fits means and biases on train.

    Holds 8 bytes per row for each key, 4 for each task and for its row weights, and some 100 while it fits a task.
    """
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
    arrays: dict[str, NDArray] = {"version": np.asarray(_VERSION)}
    for task in manifest.schema.tasks:
        inside = ~np.isnan(columns[f"label:{task.name}"])
        labels = columns[f"label:{task.name}"][inside]
        weights = columns[f"weight:{task.name}"][inside] if task.name in weighted else None
        mean = np.average(labels.astype(np.float64), weights=weights) if len(labels) else np.nan
        arrays[f"mean/{task.name}"] = np.asarray(mean)
        numbers: dict[str, NDArray] = {}
        for key in present:
            keys = columns[key][inside]
            known, numbers[key] = _numbered(keys)
            arrays[f"{key}/{task.name}/keys"] = known
            arrays[f"{key}/{task.name}/means"] = smoothed_means(keys, labels, known, PRIOR_ROWS, weights)
        if len(present) == 2:
            found = bias.fit(numbers["group"], numbers["item"], labels, weights, PRIOR_ROWS, task.type)
            arrays[f"intercept/{task.name}"] = np.asarray(found.intercept)
            arrays[f"group/{task.name}/biases"], arrays[f"item/{task.name}/biases"] = found.users, found.items
    return arrays


def _numbered(keys: NDArray) -> tuple[NDArray, NDArray]:
    """The distinct keys, sorted, and the place of each row's key among them."""
    encoded = pa.array(keys).dictionary_encode()  # faster than np.unique, as it does not sort the rows
    known, places = encoded.dictionary.to_numpy(), encoded.indices.to_numpy()
    order = np.argsort(known)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return known[order], ranks[places]
