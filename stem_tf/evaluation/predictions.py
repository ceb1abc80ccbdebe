"""Scores of a whole split, in input order: measured, written and read again. Does not import TensorFlow."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.manifest import Manifest
from pipelines.schema import Schema
from stem_tf.evaluation import metrics
from stem_util.errors import JobError, UserError, message
from stem_util.files import replace_file

_BY_TASK = ("labels", "scores", "weights", "logits")
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
      logits: float32 [N] by task that is calibrated: what its calibrator makes scores of.
    """

    row_id: NDArray[np.int64]
    labels: dict[str, NDArray[np.float32]]
    scores: dict[str, NDArray[np.float32]]
    weights: dict[str, NDArray[np.float32]]
    group: NDArray[np.int64] | None
    item: NDArray[np.int64] | None
    logits: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray]:
        """The arrays by name; :func:`together` takes them."""
        named = {"row_id": self.row_id, "group": self.group, "item": self.item}
        found = {name: array for name, array in named.items() if array is not None}
        for kind in _BY_TASK:
            found |= {f"{kind}/{task}": array for task, array in getattr(self, kind).items()}
        return found

    def weights_of(self, task: str) -> NDArray:
        """The weight of each row in the task's metrics, ``[N]``: 0 outside its space."""
        weights = self.weights.get(task)
        return ~np.isnan(self.labels[task]) if weights is None else weights

    def uncalibrated(self, task: str) -> NDArray[np.float32]:
        """The scores of a calibrated task without its calibrator, ``[N]``: the sigmoid of its logits."""
        return np.exp(-np.logaddexp(0.0, -self.logits[task].astype(np.float64))).astype(np.float32)

    def constant(self) -> list[str]:
        """The tasks whose scores do not differ, up to rounding, between the rows of their space."""
        found = []
        for task, labels in self.labels.items():
            scores = self.scores[task][~np.isnan(labels)]
            if len(scores) > 1 and np.ptp(scores) <= _SAME * np.abs(scores).max():
                found.append(task)
        return found


def together(parts: Sequence[Mapping[str, NDArray]]) -> Predictions:
    """The rows of all parts, in the order of their places in the log, from :meth:`Predictions.arrays` of each part."""
    parts = [part for part in parts if len(part["row_id"])] or parts[:1]
    arrays = parts[0]
    if len(parts) > 1:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(arrays["row_id"], kind="stable")
        arrays = {name: array[order] for name, array in arrays.items()}
    by_task: dict[str, dict[str, NDArray]] = {kind: {} for kind in _BY_TASK}
    for name, array in arrays.items():
        kind, slash, task = name.partition("/")
        if slash:
            by_task[kind][task] = array
    return Predictions(arrays["row_id"], **by_task, group=arrays.get("group"), item=arrays.get("item"))


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
            columns[group] = raw_values(raw, group, predicted.row_id[rows])
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


def raw_values(raw: Path, column: str, row_ids: np.ndarray) -> pa.ChunkedArray:
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


def read(path: Path, schema: Schema) -> Predictions:
    """Reads what :func:`write` has written; ``group`` then holds a number for each distinct value, ``item`` is None.

    Args:
      path: ``<split>.parquet`` of an evaluation.
      schema: schema of the run's data, with the tasks that the run predicts.

    Raises:
      UserError: the file cannot be read, or lacks a column.
    """
    try:
        table = pq.read_table(path)
        group = next((name for name in (schema.group, f"{schema.group}_key") if name in table.column_names), None)
        weighted = [task.name for task in schema.tasks if task.row_weight]

        def floats(kind: str, task: str) -> NDArray[np.float32]:
            return table[f"{kind}_{task}"].combine_chunks().to_numpy(zero_copy_only=False)

        return Predictions(
            row_id=table["row_id"].to_numpy(),
            labels={task: floats("label", task) for task in schema.task_names},
            scores={task: floats("score", task) for task in schema.task_names},
            weights={task: floats("weight", task) for task in weighted},
            group=None
            if group is None
            else table[group].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64),
            item=None,
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({message(error)}); run stem-evaluate again") from error
