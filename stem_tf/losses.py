"""Per-task losses over each task's own sample space (PLE Eq. 9)."""

from __future__ import annotations

import tensorflow as tf
import tensorflow_recommenders as tfrs

from pipelines.schema import Task


class TaskLoss(tfrs.tasks.Ranking):
    """Sum of the losses of the rows inside a task's space: binary cross-entropy on logits, or squared error.

    ``sum_i weight_i * loss(y_i, o_i)``; the caller divides by the number of rows over all replicas, which a mean taken
    here could not know.
    """

    def __init__(self, task: Task) -> None:
        total = tf.keras.losses.Reduction.SUM
        loss: tf.keras.losses.Loss = (
            tf.keras.losses.BinaryCrossentropy(from_logits=True, reduction=total)
            if task.type == "binary"
            else tf.keras.losses.MeanSquaredError(reduction=total)
        )
        super().__init__(loss=loss, name=f"loss_{task.name}")

    def call(self, labels: tf.Tensor, outputs: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """``[B]`` float32 each -> scalar."""
        # Keras losses average over the last axis: it has to be of size 1.
        return super().call(labels[:, tf.newaxis], outputs[:, tf.newaxis], sample_weight=weights)


def score(task: Task, output: tf.Tensor) -> tf.Tensor:
    """A task's score from the network's output: a probability for a binary task, the value itself for a regression."""
    return tf.sigmoid(output) if task.type == "binary" else output
