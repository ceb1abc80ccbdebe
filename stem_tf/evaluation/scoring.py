"""Scores every row of a split with a trained model, in input order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.batches.damage import naming_corrupt_records
from pipelines.batches.dataset import count_batches, read_batches
from pipelines.manifest import Manifest
from stem_tf import configs
from stem_tf.evaluation.predictions import Predictions
from stem_tf.models.predictor import Predictor
from stem_tf.training.callbacks import Signals
from stem_util.progress import Progress


def predict(
    model: Predictor,
    manifest: Manifest,
    split: str,
    data: Any,
    *,
    desc: str,
    signals: Signals | None = None,
    limit: int | None = None,
    reader: tuple[int, int] = (0, 1),
) -> Predictions:
    """Scores every row of ``split``, or its first ones, or the part of one of several processes.

    Args:
      model: a trained model.
      manifest: manifest of the data.
      split: name of the split.
      data: ``config.data``.
      desc: shown while it runs.
      signals: end the work when one comes.
      limit: how many rows to score at most; all when not given.
      reader: (index, count): score part ``index`` of ``count``, one for each process of the model's strategy. No
        process waits for another.

    Raises:
      UserError: no such split, or no rows in it.
      CorruptRecord: a damaged record.
    """
    batch_size = data.batch_size // reader[1]
    reading = configs.reading(data) | {"batch_size": batch_size}
    dataset = read_batches(manifest, split, training=False, device=single_gpu(model), reader=reader, **reading)
    steps = count_batches(manifest, split, training=False, **reading)
    rows = manifest.rows(split)
    if limit is not None:
        rows, steps = min(rows, limit), min(steps, -(-limit // data.batch_size))
    share = -(-rows // reader[1])
    kept = _Rows(rows, [task.name for task in model.tasks if task.row_weight])
    batches = _on_replicas(dataset, model.distribute_strategy, batch_size, reader[1])
    with (
        naming_corrupt_records(manifest, split, data.input_format),
        Progress(share, unit="rows", desc=desc) as progress,
    ):
        for batch in itertools.islice(batches, steps):
            kept.add(model.predict_on_replicas(batch))
            progress.update(min(batch_size, share - progress.done))  # the last batch is padded
            if signals is not None:
                signals.check()
    return kept.predictions()


def _on_replicas(
    dataset: tf.data.Dataset, strategy: tf.distribute.Strategy, batch_size: int, processes: int
) -> Iterable[Any]:
    """Batches, each divided among the replicas of this process."""
    if processes == 1:
        return cast(Iterable[Any], strategy.experimental_distribute_dataset(dataset))
    replicas = strategy.num_replicas_in_sync // processes
    shares = iter(dataset.rebatch(batch_size // replicas, drop_remainder=True))
    # A data set that the strategy distributes asks all processes whether they have another batch.
    return (
        strategy.experimental_distribute_values_from_function(lambda context, first=first: first.pop(0))
        for share in shares
        for first in [[share, *itertools.islice(shares, replicas - 1)]]
    )


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
        if self._arrays is None:  # a part without rows
            nothing = np.zeros(0, np.int64)
            return Predictions(nothing, {}, {}, {}, None, None)
        arrays = tf.nest.map_structure(lambda array: array[: self._filled], self._arrays)
        return Predictions(group=arrays.pop("group", None), item=arrays.pop("item", None), **arrays)


def single_gpu(model: Predictor) -> str | None:
    """The device to prefetch batches to: the only GPU of a model outside any distribution strategy."""
    gpus = tf.config.list_logical_devices("GPU")
    several = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
    distributed = isinstance(model.distribute_strategy, several)
    return gpus[0].name if len(gpus) == 1 and not distributed else None
