"""Does in few operations what exact dense Adam does to rows that no batch reads: deferred decay.

Dense Adam moves every row at every step. A row without a gradient of its own still moves by its momentum and by L2,
whose gradient G = c_k l2 w is clipped by a factor c_k. For every missed step k after the row's last step a::

    m_k = b1 m + (1 - b1) G,   v_k = b2 v + (1 - b2) G^2
    w_k = w - lr_k (m_k / (1 - b1^k)) / (sqrt(v_k / (1 - b2^k)) + eps)

:func:`catch_up` makes these steps in chunks of 1, 2, 4, 8, ... with m and v in closed form and w as an exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from stem_tf.training.optimizers import BETAS, EPSILON, Betas

_GROWTH = 2.0

Function = Callable[[tf.Tensor], tf.Tensor]
Means = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""Returns the means of c and of c^2 over the steps a + 1 to a + L, for a and L ``[U, 1, 1]``."""


class AdamRows(NamedTuple):
    """Rows of a packed table under Adam: weights and both moments, float32.

    Attributes:
      w, m: ``[U, N, D]`` for the N tables side by side in a row.
      v: ``[U, N, D]``, or ``[U, N, 1]`` where an embedding shares one second moment.
    """

    w: tf.Tensor
    m: tf.Tensor
    v: tf.Tensor


def catch_up(
    rows: AdamRows,
    last: tf.Tensor,
    now: tf.Tensor,
    *,
    l2: float | tf.Tensor,
    rate: Function,
    square: Function,
    scales: Means | None = None,
    betas: Betas = BETAS,
) -> AdamRows:
    """The rows after the steps ``last + 1`` to ``now``, in which they had no gradient of their own.

    A chunk of L steps uses the mean of c, the values of lr and of the denominator D in the middle of the chunk, and in
    the sum over m the value of G at its start::

        r   = c lr l2 / D
        w_L = exp(-L r (1 + r / 2)) (w - (1 + k r) lr / D sum_{j<=L} b1^j (m - (1 - b1^a) G) / (1 - b1^(a+k)))
        m_L = b1^L m + (1 - b1^L) c l2 w_L
        v_L = b2^L v + (1 - b2^L) mean(c^2) l2^2 (w^2 + w w_L + w_L^2) / 3

    (1 - r)^L is the share of w that L2 leaves. The sum is what momentum moves, at step k on average, so that L2 has
    less time to pull it back. A gap of n steps takes log2(n) chunks. tests/stem_tf/test_catch_up.py measures how close
    this is to single steps over one gap, benchmarks/quality.py --replay over many gaps in a row.

    Args:
      rows: the rows as of their steps ``last``.
      last: the last step of each row, int32 or int64 ``[U]``, counted from 1; 0 for rows that no step has written.
      now: scalar of the same type.
      l2: one number, or one per column ``[N, D]``.
      rate: learning rate by step, float32; counts steps from 0, as :class:`~stem_tf.training.optimizers.Schedule` does.
      square: squares a gradient ``[U, N, D]``; returns the shape of ``rows.v``.
      scales: means of the factors by which gradients of the missed steps were clipped; None where none were.
      betas: decay rates of the two moments.
    """
    done = tf.cast(last, tf.float32)[:, tf.newaxis, tf.newaxis]
    missed = tf.cast(now - last, tf.float32)[:, tf.newaxis, tf.newaxis]

    def chunk(length: tf.Tensor, a: tf.Tensor, left: tf.Tensor, rows: AdamRows) -> tuple[object, ...]:
        steps = tf.minimum(length, left)
        return length * _GROWTH, a + steps, left - steps, _chunk(rows, a, steps, l2, rate, square, scales, betas)

    state = (tf.constant(1.0), done, missed, rows)
    return tf.while_loop(lambda length, a, left, rows: tf.reduce_any(left > 0.0), chunk, state)[-1]


def _chunk(
    rows: AdamRows,
    a: tf.Tensor,
    steps: tf.Tensor,
    l2: float | tf.Tensor,
    rate: Function,
    square: Function,
    scales: Means | None,
    betas: Betas,
) -> AdamRows:
    """The rows L = ``steps`` ``[U, 1, 1]`` steps after the step ``a`` ``[U, 1, 1]``; L = 0 leaves a row as it is."""
    w, m, v = rows
    b1, (log_1, log_2) = betas.first, (math.log(beta) for beta in betas)
    kept_1, kept_2 = tf.exp(steps * log_1), tf.exp(steps * log_2)
    weight = (1.0 - kept_1) * (b1 / (1.0 - b1))  # sum of b1^j
    tail = tf.math.divide_no_nan(1.0 - kept_1 * (1.0 + steps * (1.0 - b1)), (1.0 - kept_1) * (1.0 - b1))
    middle = (steps + 1.0) / 2.0
    middle_2 = tf.exp(middle * log_2)
    correction = -tf.math.expm1((a + middle) * log_2)
    correction_1 = -tf.math.expm1((a + tf.maximum(tail, 1.0)) * log_1)

    spread: float | tf.Tensor = 1.0  # mean of c^2 over the square of c's mean
    if scales is not None:
        scale, of_squares = scales(a, steps)
        l2, spread = l2 * scale, tf.math.divide_no_nan(of_squares, tf.square(scale))
    g = l2 * w
    g2 = spread * square(g)
    step = rate(a + middle - 1.0) / (
        tf.sqrt(v * (middle_2 / correction) + g2 * ((1.0 - middle_2) / correction)) + EPSILON
    )
    r = l2 * step
    moved = (m + g * tf.math.expm1(a * log_1)) * step * (weight / correction_1)
    new_w = tf.exp(-steps * r * (1.0 + 0.5 * r)) * (w - moved * (1.0 + tail * r))
    new_g = l2 * new_w
    new_m = kept_1 * m + (1.0 - kept_1) * new_g
    # The mean of the square on the straight line from g to new_g, by Simpson's rule.
    new_v = kept_2 * v + ((1.0 - kept_2) / 6.0) * (g2 + spread * (square(new_g) + square(g + new_g)))
    return AdamRows(new_w, new_m, new_v)
