"""The weights that add the tasks' losses up: fixed, decaying, or learned from each task's uncertainty or gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tensorflow as tf

from pipelines.schema import Task
from stem_tf.training.gradnorm import GradNorm

Kind = Literal["static", "decaying", "uncertainty", "gradnorm"]


class Weighting(tf.Module):
    """Adds up the tasks' losses L_k.

    - ``static``: ``sum_k w_k L_k`` (PLE Eq. 8).
    - ``decaying``: ``sum_k w_k gamma_k^t L_k`` (PLE Eq. 10), t the steps or the epochs done.
    - ``uncertainty``: ``sum_k w_k (a_k exp(-s_k) L_k + s_k / 2)``, s_k = log sigma_k^2 learned from 0, a_k 1 for
      cross-entropies and 1/2 for squared errors (Kendall et al., CVPR 2018, Eq. 10 and 7).
    - ``gradnorm``: ``sum_k w_k L_k``, w learned from the norms of the tasks' gradients (Chen et al., ICML 2018), see
      :class:`~stem_tf.training.gradnorm.GradNorm`.

    Args:
      tasks: the schema's tasks.
      weights: w of each task, in the schema's order.
      kind: one of the above.
      gamma: gamma of each task, in the schema's order.
      gamma_per: whether t counts ``step`` or ``epoch``.
      alpha, learning_rate: of ``gradnorm``.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        weights: Sequence[float],
        kind: Kind = "static",
        gamma: Sequence[float] = (),
        gamma_per: Literal["step", "epoch"] = "epoch",
        alpha: float = 0.0,
        learning_rate: float = 0.0,
    ) -> None:
        super().__init__(name="weighting")
        self.kind, self.gamma_per = kind, gamma_per
        self.initial = tf.constant(weights, tf.float32)
        self.gamma = tf.constant(gamma, tf.float32)
        self.half = tf.constant([1.0 if task.type == "binary" else 0.5 for task in tasks])
        self.log_variances: list[tf.Variable] = (
            [tf.Variable(tf.zeros(len(tasks)), name="log_variances")] if kind == "uncertainty" else []
        )
        self.grad_norm = GradNorm(weights, alpha, learning_rate) if kind == "gradnorm" else None

    def weights(self, step: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        """The factor on each task's loss, ``[T]``."""
        if self.kind == "decaying":
            done = tf.cast(step if self.gamma_per == "step" else epoch, tf.float32)
            return self.initial * tf.pow(self.gamma, done)
        if self.kind == "uncertainty":
            return self.initial * self.half * tf.exp(-self.log_variances[0])
        return self.initial if self.grad_norm is None else tf.identity(self.grad_norm.weights)

    def __call__(self, losses: tf.Tensor, step: tf.Tensor, epoch: tf.Tensor, share: float) -> tf.Tensor:
        """The loss, a scalar, from the tasks' losses ``[T]``.

        ``share`` is 1 / replicas, the weight of terms that are not sums over rows.
        """
        total = tf.reduce_sum(self.weights(step, epoch) * losses)
        if self.kind == "uncertainty":
            total += self.rest(share)
        return total

    def rest(self, share: float) -> tf.Tensor:
        """What the loss has beside the weighted losses, a scalar."""
        if self.kind == "uncertainty":
            return share * tf.reduce_sum(self.initial * self.log_variances[0] / 2.0)
        return tf.constant(0.0)
