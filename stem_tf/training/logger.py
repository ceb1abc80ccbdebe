"""Writes what a run measures to metrics.jsonl and to TensorBoard: ``tensorboard --logdir runs`` shows all runs.

Under ``RUN/tensorboard`` there is one TensorBoard run for each of ``train``, ``validation`` and, once evaluated,
``evaluation/<split>``. A quantity has the same tag in all of them, so that one chart shows it for all of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams

from stem_tf import configs
from stem_tf.models.predictor import Predictor
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training.monitor import Results
from stem_tf.training.non_finite import check_finite
from stem_tf.workdir import Workdir
from stem_util.errors import JobError, message


class Logger:
    """Writes training losses and validation metrics to metrics.jsonl and TensorBoard, and the config to TensorBoard.

    Args:
      workdir: the run's directory.
      model: the model that is trained.
      config: the run's config, shown in TensorBoard's HParams tab beside ``best_score``.
      steps: steps per epoch.
      first_step: steps of the optimizers before the run's first one.
      writes: whether anything is written; one process of a cluster writes.
    """

    def __init__(
        self,
        workdir: Workdir,
        model: RankingModel,
        config: Any,
        steps: int,
        first_step: int = 0,
        *,
        writes: bool = True,
    ) -> None:
        self._workdir, self._model, self._first_step = workdir, model, first_step
        self._batch_size, self._steps = config.data.batch_size, steps * config.train.epochs
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        if not writes:
            return
        with writing(workdir.tensorboard):
            with tf.summary.create_file_writer(str(workdir.tensorboard)).as_default(step=0):
                hparams.hparams({key: _shown(value) for key, value in configs.flat(config).items()})
            self._writers = {
                kind: tf.summary.create_file_writer(str(workdir.tensorboard / kind)) for kind in ("train", "validation")
            }

    def train(self, epoch: int, step: int, losses: dict[str, float]) -> None:
        """Writes mean losses over the epoch so far. ``epoch`` counts from 0, ``step`` is the steps done in all epochs.

        metrics.jsonl also gets ``rows``, how many rows were trained on so far, those of repeated epochs each time, and
        ``progress``, the share of the steps of all ``train.epochs`` that is done.

        Raises:
          JobError: a loss is not finite.
        """
        if not all(map(math.isfinite, losses.values())):
            check_finite(self._model)
        rate = float(self._model.network_optimizer.schedule(tf.constant(self._first_step + step - 1, tf.int64)))
        values = {"learning_rate": rate, **losses}
        seen = {"rows": step * self._batch_size, "progress": round(step / self._steps, 6)}
        self._append("train", epoch, step, seen | values)
        self._show("train", step, values)

    def validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a finished epoch, named ``<metric>/<task>``."""
        self._append("validation", epoch, step, metrics)
        self._show("validation", step, _as_losses(self._model, metrics))

    def best(self, step: int, score: float | None) -> None:
        """Writes the best validation score so far, for TensorBoard's HParams tab."""
        if score is not None:
            self._show("validation", step, {"best_score": score})

    def close(self) -> None:
        with writing(self._workdir.tensorboard):
            for writer in self._writers.values():
                writer.close()

    def _append(self, kind: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        if not self._writers:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._workdir.append_metrics({"kind": kind, "epoch": epoch + 1, "step": step, **finite})

    def _show(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if not self._writers:
            return
        with writing(self._workdir.tensorboard):
            for name, value in values.items():
                _scalar(self._writers[kind], name, value, step)
            self._writers[kind].flush()


def show_evaluation(
    workdir: Workdir, model: Predictor, split: str, epoch: int | Mapping[str, int], step: int, results: Results
) -> None:
    """Shows the metrics of an evaluation in TensorBoard, each at the step that its weights were trained to.

    A run that may only be read is left as it is.

    Args:
      workdir: the run's directory.
      model: the model that was evaluated.
      split: the split that it was evaluated on.
      epoch: how many epochs its weights were trained for; by task where tasks have best epochs of their own.
      step: how many steps of the next epoch its weights were trained for.
      results: metrics by task.
    """
    if not os.access(workdir.path, os.W_OK):
        return
    ends = {r["epoch"]: r["step"] for r in workdir.read_metrics() if r["kind"] == "validation"}
    steps = {task: ends.get(epoch[task] if isinstance(epoch, Mapping) else epoch, 0) + step for task in results}
    directory = workdir.tensorboard / "evaluation" / split
    with writing(directory):
        writer = tf.summary.create_file_writer(str(directory))
        for task, metrics in results.items():
            for name, value in _as_losses(model, by_metric({task: metrics})).items():
                _scalar(writer, name, value, steps[task])
        writer.close()


def by_metric(results: Results) -> dict[str, float]:
    """``{"auc/click": ...}`` from metrics by task, without those that only describe the data."""
    return {
        f"{name}/{task}": value
        for task, metrics in results.items()
        for name, value in metrics.items()
        if name not in ("rows", "rate")
    }


def _as_losses(model: Predictor, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics with each task's loss as ``loss/<task>``, the tag and the units that it has in training.

    The loss is the logloss, which it replaces, or the mean squared error, over the variance of a standardised label.
    """
    shown = {}
    for name, value in metrics.items():
        metric, _, task = name.partition("/")
        if metric != "logloss":
            shown[name] = value
        if metric in ("logloss", "mse"):
            scale = model.scales.get(task)
            shown[f"loss/{task}"] = value if scale is None else value / scale.std**2
    return shown


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns TensorFlow's errors while it writes into one that names the directory.

    Raises:
      JobError: the directory could not be written, for lack of space or of permission.
    """
    try:
        yield
    except tf.errors.OpError as error:
        raise JobError(f"{directory} could not be written ({message(error)})") from error


def _scalar(writer: tf.summary.SummaryWriter, name: str, value: float, step: int) -> None:
    if math.isfinite(value):
        with writer.as_default(step=step):
            tf.summary.scalar(name, value)


def _shown(value: Any) -> bool | int | float | str:
    """A config's value as TensorBoard takes it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
