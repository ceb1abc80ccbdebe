"""Multi-layer perceptrons, one or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from stem_tf.layers.initializers import normal
from stem_tf.layers.seeds import seeds
from stem_tf.layers.sides import Sides


@tf.keras.utils.register_keras_serializable("stem_tf")
class Linear(tf.keras.layers.Layer):
    """``y = x W + b``, or ``count`` of them side by side in one batched product.

    Shapes: x ``[B, D]`` (read by all) or ``[K, B, D]`` -> y ``[B, H]``, or ``[K, B, H]`` where ``count`` = K is given;
    x may be :class:`Sides`, whose products with the request's share of W are made once per request.
    Weights: ``kernel`` ``[D, H]`` or ``[K, D, H]``, Xavier-normal as in the authors' release; ``bias`` ``[H]`` or
    ``[K, 1, H]``, zeros.

    >>> Linear(units=3, count=2)(tf.ones([5, 4])).shape
    TensorShape([2, 5, 3])

    Args:
      units: H.
      count: K, or None for a single one without the leading axis.
      bias: False leaves b out.
    """

    def __init__(self, units: int, count: int | None = None, bias: bool = True, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.units, self.count, self.use_bias = units, count, bias
        self.bias: Any = 0.0

    def build(self, shape: tf.TensorShape) -> None:
        width = shape[-1]
        lead: tuple[int, ...] = () if self.count is None else (self.count,)
        # Glorot's fans of one matrix: the leading axis of a batched kernel is no fan.
        xavier = normal((2.0 / (width + self.units)) ** 0.5)
        self.kernel = self.add_weight("kernel", (*lead, width, self.units), initializer=xavier)
        if self.use_bias:
            self.bias = self.add_weight("bias", (*lead, 1, self.units) if lead else (self.units,), initializer="zeros")
        super().build(shape)

    def call(self, x: tf.Tensor | Sides) -> tf.Tensor:
        if not isinstance(x, Sides):
            return tf.matmul(x, self.kernel) + self.bias
        once = tf.matmul(x.once, x.share(self.kernel, x.once_columns)) + self.bias
        each = tf.matmul(x.each, x.share(self.kernel, x.each_columns))
        requests, rows = tf.shape(once)[-2], tf.shape(each)[-2]
        # Not -1: a reshape cannot tell N where there are no requests.
        by_request = tf.reshape(each, [*each.shape[:-2], requests, rows // tf.maximum(requests, 1), self.units])
        return tf.reshape(by_request + once[..., tf.newaxis, :], tf.shape(each))


def dropout(x: tf.Tensor, rate: float, seed: tf.Tensor | None) -> tf.Tensor:
    """Drops elements of ``x`` with probability ``rate``; the same stateless ``seed`` ``[2]``, the same mask.

    A mask that depends on the step alone (not on a generator's state) is what makes a resumed run bit-equal. Without a
    seed TensorFlow's generator draws one.
    """
    if seed is None:
        seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
    return tf.nn.experimental.stateless_dropout(x, rate, seed, rng_alg="philox")


@tf.keras.utils.register_keras_serializable("stem_tf")
class MLP(tf.keras.layers.Layer):
    """Hidden layers ``dropout(relu(batch_norm(x W + b)))``, then, where ``out`` is given, a last linear layer.

    Shapes: ``[B, D]`` -> ``[B, H]``; ``count`` = K of them side by side: ``[B, D]`` or ``[K, B, D]`` -> ``[K, B, H]``.
    The order linear, batch norm, activation, dropout is the authors' release's.

    >>> MLP([64, 32], out=1)(tf.ones([5, 8])).shape
    TensorShape([5, 1])
    >>> MLP([64, 32], count=4)(tf.ones([5, 8])).shape
    TensorShape([4, 5, 32])

    Args:
      units: widths of the hidden layers; may be empty when ``out`` is given.
      out: width of the last linear layer, which has no activation; None for none.
      count: K, or None.
      dropout: rate after every hidden layer.
      batch_norm: normalises every hidden layer before its activation.
      bias: False leaves the biases of all layers out.
      out_dtype: dtype of the last linear layer; ``float32`` keeps scores exact under mixed bfloat16.

    Raises:
      ValueError: no layers, or a rate outside [0, 1).
    """

    def __init__(
        self,
        units: Sequence[int],
        out: int | None = None,
        count: int | None = None,
        dropout: float = 0.0,
        batch_norm: bool = False,
        bias: bool = True,
        out_dtype: str | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if not units and out is None:
            raise ValueError("an MLP needs at least one of units and out; received units=[] and out=None")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout should be at least 0 and less than 1; received {dropout}")
        self.dropout, self.batch_norm = dropout, batch_norm
        self.hidden = len(units)
        self.linears = [Linear(n, count, bias) for n in units]
        if out is not None:
            self.linears.append(Linear(out, count, bias, dtype=out_dtype))
        # One set of statistics per expert and unit: every axis but the batch's.
        axes = -1 if count is None else [0, 2]
        self.norms = [tf.keras.layers.BatchNormalization(axis=axes) for _ in units if batch_norm]

    def call(self, x: tf.Tensor, training: bool = False, seed: tf.Tensor | None = None) -> tf.Tensor:
        """``seed`` ``[2]`` int32 keys the dropout masks; without it TensorFlow's generator draws one."""
        seed_of = seeds(seed)
        for i, linear in enumerate(self.linears):
            x = linear(x)
            if i == self.hidden:
                break
            if self.batch_norm:
                x = self.norms[i](x, training=training)
            x = tf.nn.relu(x)
            if training and self.dropout:
                x = dropout(x, self.dropout, next(seed_of))
        return x
