"""GradNorm: weights of the losses that even out how hard each task pulls on what the tasks share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from stem_tf.training.learning_rate import Schedule
from stem_tf.training.optimizers import Adam
from stem_tf.training.replicas import update_mirrors

_LEAST = 0.01
"""The least weight of a task that is trained, in equal shares: at 0 its gradient could not be measured any more. The
weights are scaled to their sum after that."""


class GradNorm(tf.Module):
    """Task weights w ``[T]``, learned beside the network (Chen et al., ICML 2018, section 3 and algorithm 1)::

        G_k    = ||w_k grad L_k||_2, over all weights that more than one task trains
        r_k    = (L_k / L_k(0)) / mean of L_j / L_j(0)                  1 and more: task k learns slower than the mean
        L_grad = sum_k |G_k - mean(G) r_k^alpha|, whose second term is held constant
        w     <- Adam(gradient of L_grad), then w times what gives it the sum that it had at the start

    The paper takes the last shared layer alone for G, to save time: which one that is has no answer for every model
    here, and a task's pull on the tables counts most in a ranking model. L_k(0) is the first loss that is not 0. A task
    without rows in a batch has no part in its means, and a task of weight 0 keeps it.

    Args:
      initial: the weights at the start; their sum stays.
      alpha: how much more a slow task is to pull; at 0 all pull alike.
      learning_rate: of the weights.
    """

    def __init__(self, initial: Sequence[float], alpha: float, learning_rate: float) -> None:
        super().__init__(name="gradnorm")
        self.alpha = alpha
        self.total = float(sum(initial))
        trained = np.array(initial, np.float32) > 0
        self.least = tf.constant(_LEAST * self.total / max(trained.sum(), 1) * trained, tf.float32)
        self.weights = tf.Variable(tf.constant(initial, tf.float32), trainable=False, name="weights")
        self.first = tf.Variable(tf.zeros(len(initial)), trainable=False, name="first_losses")
        self.adam = Adam([self.weights], [0.0], Schedule(learning_rate))

    def gradient(self, norms: tf.Tensor, losses: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        """The gradient of L_grad by w, ``[T]``.

        Args:
          norms: G ``[T]``.
          losses: L ``[T]``, 0 for a task without rows.
          first: L(0) ``[T]``.
        """
        there = tf.cast((losses > 0.0) & (norms > 0.0), tf.float32)

        def mean(values: tf.Tensor) -> tf.Tensor:
            return tf.math.divide_no_nan(tf.reduce_sum(there * values), tf.reduce_sum(there))

        ratios = tf.math.divide_no_nan(losses, first)
        rates = tf.math.divide_no_nan(ratios, mean(ratios))
        goals = mean(norms) * tf.pow(rates, self.alpha)
        return there * tf.sign(norms - goals) * tf.math.divide_no_nan(norms, self.weights)

    def learn(self, norms: tf.Tensor, losses: tf.Tensor, step: tf.Tensor) -> None:
        """Makes step ``step``, which counts from 1, with G and L of the global batch; called in replica context."""
        first = tf.where(self.first > 0.0, self.first, losses)
        gradient = self.gradient(norms, losses, first)
        update_mirrors(self.first, _assign, first)
        self.adam.apply(gradient, step)
        update_mirrors(self.weights, _rescale, self.least, self.total)


def _assign(variable: tf.Variable, value: tf.Tensor) -> None:
    variable.assign(value, read_value=False)


def _rescale(weights: tf.Variable, least: tf.Tensor, total: float) -> None:
    kept = tf.maximum(weights, least)
    weights.assign(kept * (total / tf.reduce_sum(kept)), read_value=False)
