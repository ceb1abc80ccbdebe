"""Adam for the network. :mod:`stem_tf.training.table_optimizers` has the optimizers of the tables.

Adam is torch's form of it, as in the authors' release, epsilon outside the bias correction:

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  w = w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from stem_tf.training.learning_rate import Schedule
from stem_tf.training.replicas import update_mirrors

EPSILON = 1e-8


class Betas(NamedTuple):
    """Decay rates of Adam's moments per step, above 0 and below 1."""

    first: float = 0.9
    second: float = 0.999


BETAS = Betas()


class Rate(NamedTuple):
    """What Adam's step t needs beside the moments: scalars, float32.

    Attributes:
      step_size: lr / (1 - b1^t).
      correction: 1 - b2^t.
    """

    step_size: tf.Tensor
    correction: tf.Tensor

    @staticmethod
    def at(learning_rate: tf.Tensor, step: tf.Tensor, betas: Betas = BETAS) -> Rate:
        """The rate of step t = ``step``, which counts from 1."""
        t = tf.cast(step, tf.float32)
        # Not 1 - b^t: in float32 1 - b2 alone would be off by 2e-5 of itself.
        corrections = [-tf.math.expm1(t * math.log(beta)) for beta in betas]
        return Rate(learning_rate / corrections[0], corrections[1])


def moments(
    m: tf.Tensor, v: tf.Tensor, gradient: tf.Tensor, square: tf.Tensor, betas: Betas = BETAS
) -> tuple[tf.Tensor, tf.Tensor]:
    """Adam's moments after a step with ``gradient`` and ``square``: its square, or what v averages in its place."""
    b1, b2 = betas
    return b1 * m + (1.0 - b1) * gradient, b2 * v + (1.0 - b2) * square


def move(m: tf.Tensor, v: tf.Tensor, rate: Rate) -> tf.Tensor:
    """What Adam subtracts from the weights."""
    return rate.step_size * m / (tf.sqrt(v / rate.correction) + EPSILON)


class Adam(tf.Module):
    """Dense Adam over the network's variables as one vector ``[N]``.

    A few large operations replace many small ones, which would take a GPU most of the time to launch.

    Args:
      variables: in the order of the gradients.
      l2: L2 of each variable, ``l2 / 2 * ||w||^2``.
      schedule: learning rate by step.
    """

    def __init__(self, variables: Sequence[tf.Variable], l2: Sequence[float | tf.Tensor], schedule: Schedule) -> None:
        super().__init__(name="adam")
        self.variables_, self.l2, self.schedule = list(variables), list(l2), schedule
        size = sum(variable.shape.num_elements() for variable in variables)
        self.m, self.v = (tf.Variable(tf.zeros([size]), trainable=False, name=f"adam/{name}") for name in "mv")

    def flatten(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor:
        """Gradients in the variables' order as one vector ``[N]``."""
        return tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], axis=0)

    def regularised(self, gradient: tf.Tensor) -> tf.Tensor:
        """The gradient ``[N]`` plus that of L2."""
        if not any(isinstance(l2, tf.Tensor) or l2 for l2 in self.l2):
            return gradient
        return gradient + self.flatten([l2 * w for l2, w in zip(self.l2, self.variables_, strict=True)])

    def apply(self, gradient: tf.Tensor, step: tf.Tensor) -> None:
        """Makes step ``step``, which counts from 1, with a gradient ``[N]`` that is summed over replicas."""
        rate = Rate.at(self.schedule(step - 1), step)
        update_mirrors(self.m, _update, self.v, self.variables_, gradient, rate)


def _update(m: tf.Variable, v: tf.Variable, variables: list[tf.Variable], gradient: tf.Tensor, rate: Rate) -> None:
    new_m, new_v = moments(m, v, gradient, tf.square(gradient))
    m.assign(new_m, read_value=False)
    v.assign(new_v, read_value=False)
    parts = tf.split(move(new_m, new_v, rate), [variable.shape.num_elements() for variable in variables])
    for variable, part in zip(variables, parts, strict=True):
        variable.assign_sub(tf.reshape(part, variable.shape), read_value=False)
