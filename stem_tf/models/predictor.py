"""What evaluation and export need from a trained model, whichever it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tensorflow as tf
import tensorflow_recommenders as tfrs

from pipelines.manifest import LabelScale
from pipelines.schema import Task
from stem_tf.layers.embedding import PackedTable
from stem_tf.layers.sides import Share, gather_share
from stem_tf.layers.transforms import InputTransform
from stem_tf.models.calibrators import Calibrator
from stem_tf.training.losses import score

Batch = Mapping[str, Any]
"""Of :func:`pipelines.batches.dataset.read_batches`: ``features``, ``labels``, ``weights`` by name; the rows' keys."""

ReadRows = Callable[[PackedTable, tf.Tensor], tf.Tensor]
"""The rows ``[N, W]`` float32 of a packed table at ids ``[N]``."""


class Predictor(tfrs.Model):
    """``{feature: tensor}`` in, ``{task: output}`` out.

    Attributes:
      tasks: the schema's tasks, in its order.
      inputs: numeric transforms.
      scales: mean and standard deviation of standardised labels, by task.
      calibrators: of the tasks whose scores are calibrated; none until :meth:`calibrate` is called.
    """

    tasks: tuple[Task, ...]
    inputs: InputTransform
    scales: Mapping[str, LabelScale]
    calibrators: Mapping[str, Calibrator] = MappingProxyType({})

    @property
    def weight_parts(self) -> dict[str, tf.keras.layers.Layer]:
        """What predictions depend on, without optimizer state: what a best-weights checkpoint holds."""
        raise NotImplementedError

    def call(
        self, features: Mapping[str, tf.Tensor], training: bool = False, read: ReadRows | None = None
    ) -> dict[str, tf.Tensor]:
        """Outputs by task ``[B]`` float32: logits, or values for regressions.

        Args:
          features: as the data holds them.
          training: with dropout, and with the batch's own statistics in batch normalisation.
          read: reads the packed tables' rows; the model's own tables when not given.
        """
        raise NotImplementedError

    def rank(
        self,
        inputs: Mapping[str, tf.Tensor],
        once: Sequence[str],
        each: Sequence[str],
        share: Share = gather_share,
        read: ReadRows | None = None,
    ) -> dict[str, tf.Tensor]:
        """Outputs by task ``[B * N]`` of N candidates for each of B requests.

        Args:
          inputs: transformed; ``[B, ...]`` of the features ``once``, ``[B * N, ...]`` of the features ``each``.
          once: names of user and context features, looked up and multiplied by weights once per request.
          each: names of item features.
          share: gives the two sides' rows of a first layer's weights.
          read: as in :meth:`call`.
        """
        raise NotImplementedError

    @tf.autograph.experimental.do_not_convert
    def predict_step(self, data: Batch) -> dict[str, Any]:
        """Scores by task ``[B]`` float32 beside the batch's labels, weights and keys; logits of calibrated tasks."""
        outputs = self(data["features"])
        kept = {key: value for key, value in data.items() if key != "features"}
        return {**kept, "scores": self.scores(outputs), "logits": {task: outputs[task] for task in self.calibrators}}

    @functools.cached_property
    def predict_on_replicas(self) -> Callable[[Any], dict[str, Any]]:
        """:meth:`predict_step`, compiled, for a batch of a data set distributed over the model's replicas."""

        def predict(batch: Any) -> dict[str, Any]:
            strategy = self.distribute_strategy
            results = strategy.run(self.predict_step, args=(batch,))
            return tf.nest.map_structure(
                lambda values: tf.concat(strategy.experimental_local_results(values), axis=0), results
            )

        return tf.function(predict, autograph=False)

    def scores(self, outputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Scores by task, in the units of their labels, from outputs of any shape; calibrated where there is a
        calibrator."""
        return {
            task.name: self.calibrators[task.name](outputs[task.name])
            if task.name in self.calibrators
            else score(task, outputs[task.name], self.scales.get(task.name))
            for task in self.tasks
        }

    def calibrate(self, calibrators: Mapping[str, Calibrator]) -> None:
        """Gives binary tasks calibrators, and takes away those that the model had."""
        self.calibrators = MappingProxyType(dict(calibrators))
        self.__dict__.pop("predict_on_replicas", None)  # compiled with those that the model had
