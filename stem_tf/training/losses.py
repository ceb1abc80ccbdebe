"""Per-task losses over each task's own sample space (PLE Eq. 9). :mod:`.loss_weighting` adds them up."""

from __future__ import annotations

import tensorflow as tf
import tensorflow_recommenders as tfrs

from pipelines.manifest import LabelScale
from pipelines.schema import Task


class TaskLoss(tfrs.tasks.Ranking):
    """Sum of the losses of the rows inside a task's space: binary cross-entropy on logits, or squared error.

    ``sum_i weight_i * loss(y_i, o_i)``: the row's weight, 1 where the schema has none, 0 outside the space. The caller
    divides by the sum of the weights over all replicas, which a mean taken here could not know.

    Args:
      task: the schema's task.
      label_smoothing: e, binary labels become ``y (1 - e) + e / 2``.
      positive_weight: factor on a binary task's rows of label 1; they still count once in the denominator.
      scale: mean and standard deviation of a standardised label; the output then predicts that label.
    """

    def __init__(
        self, task: Task, label_smoothing: float = 0.0, positive_weight: float = 1.0, scale: LabelScale | None = None
    ) -> None:
        total = tf.keras.losses.Reduction.SUM
        binary = task.type == "binary"
        loss: tf.keras.losses.Loss = (
            tf.keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=label_smoothing, reduction=total)
            if binary
            else tf.keras.losses.MeanSquaredError(reduction=total)
        )
        super().__init__(loss=loss, name=f"loss_{task.name}")
        self.task, self.positive_weight, self.scale = task, positive_weight if binary else 1.0, scale

    def call(self, labels: tf.Tensor, outputs: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """``[B]`` float32 each -> scalar."""
        if self.task.type == "regression":
            outputs = score(self.task, outputs)
        if self.scale is not None:
            labels = (labels - self.scale.mean) / self.scale.std
        if self.positive_weight != 1.0:
            weights *= 1.0 + (self.positive_weight - 1.0) * labels
        # Keras losses average over the last axis: it has to be of size 1.
        return super().call(labels[:, tf.newaxis], outputs[:, tf.newaxis], sample_weight=weights)


def score(task: Task, output: tf.Tensor, scale: LabelScale | None = None) -> tf.Tensor:
    """A task's score from the network's output, in the units of its label.

    A probability for a binary task; for a regression the value itself, or its sigmoid where the schema says so;
    ``output * std + mean`` where training saw a standardised label.
    """
    if task.type == "binary" or task.output == "sigmoid":
        return tf.sigmoid(output)
    return output if scale is None else output * scale.std + scale.mean
