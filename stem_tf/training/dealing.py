"""An epoch on parameter servers: the chief deals batches out to the workers, in the order of a single process.

A batch is done when its worker has sent all updates that it makes and the servers have made them; only then it counts.
One whose worker died before is dealt to another, so that every row is seen at least once: parts of its updates may be
made twice. Up to ``2 * workers`` batches are on their way at a time. At a checkpoint there are none: it holds the steps
of the batches before it and no others, and a run goes on from it with the next batch.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stem_tf.models.ranking_model import RankingModel
from stem_tf.peers import Interrupted
from stem_tf.training import non_finite
from stem_tf.training.callbacks import Callback
from stem_tf.training.servers import LOST, Servers

_AHEAD = 2
"""Batches on their way per worker: the next one is there when a worker is done with one."""
_AGAIN_SECONDS = 0.1
_USED = ("features", "labels", "weights")


class Dealer:
    """Sends batches to the workers, and takes what came of them back in the order in which they were dealt.

    Args:
      servers: the processes.
      model: lies on the servers; prepared for training.
      element_spec: of a data set of batches.
    """

    def __init__(self, servers: Servers, model: RankingModel, element_spec: Any) -> None:
        self._servers, self.most = servers, _AHEAD * servers.workers

        def step(batch: Any, number: tf.Tensor) -> dict[str, tf.Tensor]:
            taken = model.training_step.take(batch, number)
            model.global_step.assign_add(1)
            weights = model.weighting.weights(model.after_start(number + 1), model.epoch)
            return {"losses": taken.losses, "loss": taken.loss, "norm": taken.norm, "weights": weights}

        function = tf.function(step, autograph=False)
        self._step = function.get_concrete_function(_used(element_spec), tf.TensorSpec([], tf.int64))
        self._dealt: queue.Queue[Any] = queue.Queue()
        self._done: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._fetch, daemon=True).start()  # a fetch waits without end where a worker hangs

    def deal(self, batch: Any, number: int) -> None:
        """Sends a batch, the one after ``number`` steps, to the next worker that is free."""
        arguments = (_used(batch), tf.constant(number, tf.int64))
        self._dealt.put(self._servers.coordinator.schedule(self._step, args=arguments))

    def take(self) -> dict[str, Any]:
        """What came of the batch that was dealt first, as NumPy values.

        Waits for it; where it does not come in time, the process ends.
        """
        try:
            done = self._done.get(timeout=self._servers.patience)
        except queue.Empty:
            self._servers.end_waiting()
        if isinstance(done, BaseException):
            raise done
        return dict(done)

    def _fetch(self) -> None:
        while True:
            remote = self._dealt.get()
            try:
                self._done.put(_fetched(remote))
            except Exception as error:  # raised where somebody waits
                self._done.put(error)


def _fetched(remote: Any) -> Any:
    """What came of a batch, once it is done."""
    while True:
        try:
            return remote.fetch()
        except LOST as error:
            if "/job:worker/" not in error.message:
                raise
            # The worker died between the step and this. The coordinator finds out as well, and deals the batch again.
            time.sleep(_AGAIN_SECONDS)


def _used(batch: Any) -> dict[str, Any]:
    """What a step needs of a batch."""
    return {key: batch[key] for key in _USED}


def fit(
    dealer: Dealer,
    model: RankingModel,
    dataset: tf.data.Dataset,
    *,
    first: int,
    steps: int,
    offset: int,
    whole_every: int,
    callbacks: Sequence[Callback],
) -> None:
    """Trains on the rest of an epoch, as ``model.fit`` does in one process.

    ``callbacks`` hear of the batches in their order, when they are done. Their logs are means over the epoch so far.

    Args:
      dealer: of this model.
      model: trained in place; its counters and means are as of the last callback where all batches are done.
      dataset: the epoch's batches from ``first`` on.
      first: steps of the epoch that are done.
      steps: steps of the epoch.
      offset: steps of the epochs before, and of the runs before.
      whole_every: multiple of steps at which all batches that were dealt are done; 0 for the end of the epoch only.
      callbacks: called before the first batch and after each one.

    Raises:
      Interrupted: by a callback; all batches that were dealt are done, and the callbacks have heard of them.
    """
    done = dealt = first
    means = _Means(model, first)
    batches = iter(dataset)

    def take() -> None:
        nonlocal done
        came = dealer.take()
        means.add(came)
        if not (np.isfinite(came["losses"]).all() and np.isfinite(came["norm"])):
            non_finite.note(model, tf.constant(offset + done, tf.int64), came["losses"], came["norm"])
        done += 1
        if done == dealt:
            means.write(offset + done)
        for callback in callbacks:
            callback.on_train_batch_end(done - 1 - first, means.logs(came))

    for callback in callbacks:
        callback.on_epoch_begin(0)
    try:
        while done < steps:
            end = min(steps, (done // whole_every + 1) * whole_every) if whole_every else steps
            while done < end:
                while dealt < min(end, done + dealer.most):
                    dealer.deal(next(batches), offset + dealt)
                    dealt += 1
                take()
    except Interrupted:
        while done < dealt:
            with contextlib.suppress(Interrupted):
                take()
        raise


class _Means:
    """Means of the losses over the epoch so far, counted on the chief; one process counts them in its step.

    Args:
      model: holds the means so far where ``first`` steps of the epoch are done already.
      first: steps of the epoch that are done.
    """

    def __init__(self, model: RankingModel, first: int) -> None:
        self._model = model
        if not first:
            model.reset_metrics()
        self._totals, self._counts = (
            np.array([variable.numpy() for variable in variables], np.float64)
            for variables in zip(*((metric.total, metric.count) for metric in model.metrics), strict=True)
        )
        scales = [model.scales.get(name) for name in model.loss_means]
        self._units = np.array([1.0 if scale is None else scale.std**2 for scale in scales])  # see loss_logs

    def add(self, came: dict[str, Any]) -> None:
        """Adds a batch's losses."""
        self._totals += np.append(came["loss"], came["losses"] * self._units)
        self._counts += 1

    def logs(self, came: dict[str, Any]) -> dict[str, Any]:
        """The logs after a batch, see :func:`stem_tf.training.loss_logs.updated`."""
        names = ["loss", *(f"loss/{name}" for name in self._model.loss_means)]
        logs = dict(zip(names, (self._totals / self._counts).tolist(), strict=True))
        if self._model.weighting.kind != "static":
            logs |= {f"weight/{task.name}": w for task, w in zip(self._model.tasks, came["weights"], strict=True)}
        return logs

    def write(self, step: int) -> None:
        """Writes the means and the number of steps into the model, for a checkpoint."""
        for metric, total, count in zip(self._model.metrics, self._totals, self._counts, strict=True):
            metric.total.assign(total)
            metric.count.assign(count)
        self._model.global_step.assign(step)
