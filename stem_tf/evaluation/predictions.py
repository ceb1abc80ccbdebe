"""Scores of a whole split, in input order: made, measured, written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.batches.damage import naming_corrupt_records
from pipelines.batches.dataset import count_batches, read_batches
from pipelines.manifest import Manifest
from stem_tf import configs
from stem_tf.evaluation import metrics
from stem_tf.models.predictor import Predictor
from stem_tf.training.callbacks import Signals
from stem_util.errors import JobError, UserError, message
from stem_util.files import replace_file
from stem_util.progress import Progress

_ROW_GROUP = 1 << 20
_SAME = 1e-5
"""Scores that differ by less than this share of the largest count as equal: float32 sums may differ in their order."""


@dataclass(frozen=True)
class Predictions:
    """The N rows of a split: 8 bytes per row for each key and each task.

    Attributes:
      row_id: int64 [N], the rows' places in the log, ascending.
      labels, scores: float32 [N] by task; a label is NaN outside the task's space.
      weights: float32 [N] by task that has row weights; 0 outside its space.
      group, item: int64 [N] keys, or None where the schema has none.
    """

    row_id: NDArray[np.int64]
    labels: dict[str, NDArray[np.float32]]
    scores: dict[str, NDArray[np.float32]]
    weights: dict[str, NDArray[np.float32]]
    group: NDArray[np.int64] | None
    item: NDArray[np.int64] | None

    def weights_of(self, task: str) -> NDArray:
        """The weight of each row in the task's metrics, ``[N]``: 0 outside its space."""
        weights = self.weights.get(task)
        return ~np.isnan(self.labels[task]) if weights is None else weights

    def constant(self) -> list[str]:
        """The tasks whose scores do not differ, up to rounding, between the rows of their space."""
        found = []
        for task, labels in self.labels.items():
            scores = self.scores[task][~np.isnan(labels)]
            if len(scores) > 1 and np.ptp(scores) <= _SAME * np.abs(scores).max():
                found.append(task)
        return found


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
      model: a trained model.
      manifest: manifest of the data.
      split: name of the split.
      data: ``config.data``.
      desc: shown while it runs.
      signals: end the work when one comes.
      limit: how many rows to score at most; all when not given.

    Raises:
      UserError: no such split, or no rows in it.
      CorruptRecord: a damaged record.
    """
    dataset = read_batches(manifest, split, training=False, device=single_gpu(model), **configs.reading(data))
    steps = count_batches(manifest, split, training=False, **configs.reading(data))
    rows = manifest.rows(split)
    if limit is not None:
        rows, steps = min(rows, limit), min(steps, -(-limit // data.batch_size))
    kept = _Rows(rows, [task.name for task in model.tasks if task.row_weight])
    batches = model.distribute_strategy.experimental_distribute_dataset(dataset)
    with (
        naming_corrupt_records(manifest, split, data.input_format),
        Progress(rows, unit="rows", desc=desc) as progress,
    ):
        for batch in itertools.islice(batches, steps):
            kept.add(model.predict_on_replicas(batch))
            progress.update(min(data.batch_size, rows - progress.done))  # the last batch is padded
            if signals is not None:
                signals.check()
    return kept.predictions()


class _Rows:
    """Arrays for a known number of rows, filled one batch after another; keeps weights of the tasks ``weighted``."""

    def __init__(self, rows: int, weighted: Sequence[str]) -> None:
        self._rows, self._weighted, self._filled = rows, weighted, 0
        self._arrays: Any = None

    def add(self, outputs: dict[str, Any]) -> None:
        """Adds what ``predict_step`` returns for a batch; leaves out rows beyond the known number."""
        batch = tf.nest.map_structure(lambda values: values.numpy(), outputs)
        weights = batch.pop("weights")
        batch["labels"] = {
            task: np.where(weights[task] > 0, label, np.float32("nan")) for task, label in batch["labels"].items()
        }
        batch["weights"] = {task: weights[task] for task in self._weighted}
        real = batch["row_id"] >= 0  # the last batch is padded
        batch = tf.nest.map_structure(lambda values: values[real][: self._rows - self._filled], batch)
        if self._arrays is None:
            self._arrays = tf.nest.map_structure(lambda values: np.empty(self._rows, values.dtype), batch)
        end = self._filled + len(batch["row_id"])

        def fill(array: NDArray, values: NDArray) -> None:
            array[self._filled : end] = values

        tf.nest.map_structure(fill, self._arrays, batch)
        self._filled = end

    def predictions(self) -> Predictions:
        """The rows that were added: fewer than expected where damaged records were skipped."""
        arrays = tf.nest.map_structure(lambda array: array[: self._filled], self._arrays)
        return Predictions(group=arrays.pop("group", None), item=arrays.pop("item", None), **arrays)


def evaluate(predictions: Predictions, manifest: Manifest) -> metrics.Results:
    """All metrics, by task.

    Raises:
      JobError: a score is not a number.
    """
    for task, scores in predictions.scores.items():
        if not np.isfinite(scores).all():
            raise JobError(f"the model's scores of task '{task}' are not finite: training has diverged")
    types = {task.name: task.type for task in manifest.schema.tasks}
    weights = {task: predictions.weights_of(task) for task in predictions.labels}
    return metrics.evaluate(types, predictions.labels, predictions.scores, weights, predictions.group)


def write(path: Path, manifest: Manifest, split: str, predicted: Predictions) -> None:
    """Writes row_id, the raw group value, then ``label_<task>`` (null outside its space) and ``score_<task>``.

    Tasks that have row weights get ``weight_<task>`` between the two.

    The train split keeps no raw rows: there ``<column>_key`` holds the group's int64 key instead.
    """
    group, raw = manifest.schema.group, Path(manifest.data_dir) / "raw" / split
    with_raw = group is not None and raw.is_dir()

    def part(rows: slice) -> pa.Table:
        columns: dict[str, Any] = {"row_id": pa.array(predicted.row_id[rows])}
        if group is not None and with_raw:
            columns[group] = _raw_values(raw, group, predicted.row_id[rows])
        elif predicted.group is not None:
            columns[f"{group}_key"] = pa.array(predicted.group[rows])
        for task in manifest.schema.task_names:
            columns[f"label_{task}"] = pa.array(predicted.labels[task][rows], from_pandas=True)  # NaN is null
            if task in predicted.weights:
                columns[f"weight_{task}"] = pa.array(predicted.weights[task][rows])
            columns[f"score_{task}"] = pa.array(predicted.scores[task][rows])
        return pa.table(columns)

    parts = (part(slice(start, start + _ROW_GROUP)) for start in range(0, len(predicted.row_id), _ROW_GROUP))
    first = next(parts)
    with replace_file(path) as beside, pq.ParquetWriter(beside, first.schema) as writer:
        for table in itertools.chain([first], parts):
            writer.write_table(table)


def _raw_values(raw: Path, column: str, row_ids: np.ndarray) -> pa.ChunkedArray:
    """The raw values of ``column`` for these rows, both in ascending order; reads the row groups that hold them."""
    inside = (pc.field("row_id") >= row_ids[0]) & (pc.field("row_id") <= row_ids[-1])
    try:
        found = ds.dataset(raw, format="parquet").to_table(columns=["row_id", column], filter=inside)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{raw}: the raw rows cannot be read ({message(error)}); convert the log again") from error
    known = found["row_id"].to_numpy()
    place = np.searchsorted(known, row_ids)
    if not len(known) or place[-1] == len(known) or not np.array_equal(known[place], row_ids):
        raise UserError(f"{raw} lacks rows of the records; convert the log again")
    return found[column].take(pa.array(place))


def single_gpu(model: Predictor) -> str | None:
    """The device to prefetch batches to: the only GPU of a model outside any distribution strategy."""
    gpus = tf.config.list_logical_devices("GPU")
    distributed = isinstance(model.distribute_strategy, tf.distribute.MirroredStrategy)
    return gpus[0].name if len(gpus) == 1 and not distributed else None
