"""Per-task losses over each task's own sample space (PLE Eq. 9), and the weights that add them up (Eq. 8 and 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tensorflow as tf
import tensorflow_recommenders as tfrs

from pipelines.manifest import LabelScale
from pipelines.schema import Task


class TaskLoss(tfrs.tasks.Ranking):
    """Sum of the losses of the rows inside a task's space: binary cross-entropy on logits, or squared error.

    ``sum_i weight_i * loss(y_i, o_i)``: the row's weight, 1 where the schema has none, 0 outside the space. The caller
    divides by the sum of the weights over all replicas, which a mean taken here could not know.

    Args:
      task: of the schema.
      label_smoothing: e, binary labels become ``y (1 - e) + e / 2``.
      positive_weight: factor on a binary task's rows of label 1; they still count once in the denominator.
      scale: of a standardised label, which the output then stands for.
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


class Weighting(tf.Module):
    """Adds up the tasks' losses L_k.

    - ``static``: ``sum_k w_k L_k`` (PLE Eq. 8).
    - ``decaying``: ``sum_k w_k gamma_k^t L_k`` (PLE Eq. 10), t the steps or the epochs done.
    - ``uncertainty``: ``sum_k w_k (a_k exp(-s_k) L_k + s_k / 2)``, s_k = log sigma_k^2 learned from 0, a_k 1 for
      cross-entropies and 1/2 for squared errors (Kendall et al., CVPR 2018, Eq. 10 and 7).

    Args:
      tasks: of the schema.
      weights: w, by task in the schema's order.
      kind: one of the above.
      gamma: by task.
      gamma_per: whether t counts ``step`` or ``epoch``.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        weights: Sequence[float],
        kind: Literal["static", "decaying", "uncertainty"] = "static",
        gamma: Sequence[float] = (),
        gamma_per: Literal["step", "epoch"] = "epoch",
    ) -> None:
        super().__init__(name="weighting")
        self.kind, self.gamma_per = kind, gamma_per
        self.initial = tf.constant(weights, tf.float32)
        self.gamma = tf.constant(gamma, tf.float32)
        self.half = tf.constant([1.0 if task.type == "binary" else 0.5 for task in tasks])
        self.log_variances: list[tf.Variable] = (
            [tf.Variable(tf.zeros(len(tasks)), name="log_variances")] if kind == "uncertainty" else []
        )

    def weights(self, step: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        """What each task's loss is multiplied by, ``[T]``."""
        if self.kind == "decaying":
            done = tf.cast(step if self.gamma_per == "step" else epoch, tf.float32)
            return self.initial * tf.pow(self.gamma, done)
        if self.kind == "uncertainty":
            return self.initial * self.half * tf.exp(-self.log_variances[0])
        return self.initial

    def __call__(self, losses: tf.Tensor, step: tf.Tensor, epoch: tf.Tensor, share: float) -> tf.Tensor:
        """The loss, a scalar, of the tasks' ``[T]``; ``share`` is this replica's of what no row has a part in."""
        total = tf.reduce_sum(self.weights(step, epoch) * losses)
        if self.kind == "uncertainty":
            total += share * tf.reduce_sum(self.initial * self.log_variances[0] / 2.0)
        return total
