"""Experts other than the MLP: factorisation machines with field weights, and the cross network; normalised outputs.

All are K side by side: ``[B, D]``, or one input each ``[K, B, D]``, -> ``[K, B, H]``. Those that read the fields of a
flat embedding are at a model's first level only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from stem_tf.layers.initializers import normal
from stem_tf.layers.mlp import MLP, Linear, dropout
from stem_tf.layers.seeds import seeds
from stem_tf.layers.sides import Sides, joined


@tf.keras.utils.register_keras_serializable("stem_tf")
class FwFM(tf.keras.layers.Layer):
    """H field-weighted factorisation machines per expert (Pan et al., WWW 2018, with FeLV linear terms)::

        y_h = b_h + sum_i <w_ih, v_i> + sum_{i<j} r_ijh <v_i, v_j>

    >>> FwFM(fields=3, units=5, count=2)(tf.ones([7, 3 * 4])).shape
    TensorShape([2, 7, 5])

    Weights: w and b are a :class:`~stem_tf.layers.mlp.Linear`; r ``[K, F (F - 1) / 2, H]``, Xavier-normal.

    Args:
      fields: F; D = F * d.
      units: H.
      count: K.

    Raises:
      ValueError: an input whose width is no multiple of F.
    """

    def __init__(self, fields: int, units: int, count: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.fields = fields
        self.linear = Linear(units, count)
        self.pairs = pairs_of(fields)
        xavier = normal((2.0 / (len(self.pairs) + units)) ** 0.5)
        self.kernel = self.add_weight("pairs", (count, len(self.pairs), units), initializer=xavier)

    def call(self, x: tf.Tensor | Sides, training: bool = False, seed: tf.Tensor | None = None) -> tf.Tensor:
        v = by_field(joined(x), self.fields)
        products = tf.matmul(v, v, transpose_b=True)
        flat = tf.reshape(products, [*v.shape[:-3], -1, self.fields**2])
        first, second = self.pairs.T
        pairs = tf.gather(flat, first * self.fields + second, axis=-1)
        return self.linear(x) + tf.matmul(pairs, self.kernel)


@tf.keras.utils.register_keras_serializable("stem_tf")
class NFwFM(tf.keras.layers.Layer):
    """Neural FM (He and Chua, SIGIR 2017) with field-weighted pairs, the STEM paper's production expert::

        y = MLP(sum_{i<j} r_ij (v_i * v_j)), elementwise, r learned per pair

    It has no linear terms, and products of embeddings start at the square of ``model.init_std``: its own default for
    this expert is larger.

    >>> NFwFM(fields=3, units=[16, 5], count=2)(tf.ones([7, 3 * 4])).shape
    TensorShape([2, 7, 5])

    Weights: r ``[K, F (F - 1) / 2]``, from N(0, 2 / (F (F - 1) / 2 + 1)); the MLP reads ``[K, B, d]``.

    Args:
      fields: F, at least 2; D = F * d.
      units: widths of the MLP's hidden layers; may be empty when ``out`` is given.
      count: K.
      out, dropout, batch_norm: as in :class:`~stem_tf.layers.mlp.MLP`.

    Raises:
      ValueError: fewer than two fields, or an input whose width is no multiple of F.
    """

    def __init__(
        self,
        fields: int,
        units: Sequence[int],
        count: int,
        out: int | None = None,
        dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if fields < 2:
            raise ValueError(f"an NFwFM needs pairs of fields, so at least 2 fields; received {fields}")
        self.fields, self.count = fields, count
        self.pairs = pairs_of(fields)
        xavier = normal((2.0 / (len(self.pairs) + 1)) ** 0.5)
        self.kernel = self.add_weight("pairs", (count, len(self.pairs)), initializer=xavier)
        self.mlp = MLP(units, out, count, dropout=dropout, batch_norm=batch_norm)

    def call(self, x: tf.Tensor | Sides, training: bool = False, seed: tf.Tensor | None = None) -> tf.Tensor:
        v = by_field(joined(x), self.fields)
        columns = tf.reshape(tf.linalg.matrix_transpose(v), [*v.shape[:-3], -1, self.fields])
        # sum_{i<j} r_ij v_i v_j = sum_j v_j (v R)_j with r above R's diagonal: one product instead of F^2 / 2. Columns
        # as rows of one matrix: for B = 1, TensorFlow 2.16 on a CPU multiplies [K, 1, F, F] by [1, B, F, d] wrongly and
        # writes outside its memory (tensorflow/tensorflow#117700).
        above = tf.scatter_nd(self.pairs, tf.transpose(self.kernel), [self.fields, self.fields, self.count])
        pooled = tf.reduce_sum(columns * tf.matmul(columns, tf.transpose(above, [2, 0, 1])), axis=-1)
        pooled = tf.reshape(pooled, [self.count, -1, v.shape[-1]])
        return self.mlp(pooled, training=training, seed=seed)


@tf.keras.utils.register_keras_serializable("stem_tf")
class DCN(tf.keras.layers.Layer):
    """Cross layers below an MLP (DCN-V2, Wang et al., WWW 2021, stacked; cross layers of TensorFlow Recommenders)::

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l        y = MLP(x_L)

    >>> DCN(layers=2, units=[16, 5], count=2)(tf.ones([7, 12])).shape
    TensorShape([2, 7, 5])

    TensorFlow Recommenders' layers compute W x in float32 under every precision policy.

    Args:
      layers: L.
      units: widths of the MLP's hidden layers; may be empty when ``out`` is given.
      count: K.
      out, dropout, batch_norm: as in :class:`~stem_tf.layers.mlp.MLP`.
    """

    def __init__(
        self,
        layers: int,
        units: Sequence[int],
        count: int,
        out: int | None = None,
        dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.count, self.depth = count, layers
        self.mlp = MLP(units, out, count, dropout=dropout, batch_norm=batch_norm)

    def build(self, shape: tf.TensorShape) -> None:
        xavier = shape[-1] ** -0.5

        def cross() -> Any:
            # Built after the network's precision policy has been left: it is this layer's.
            return tfrs.layers.dcn.Cross(kernel_initializer=normal(xavier), dtype=self.dtype_policy)

        self.crosses = [[cross() for _ in range(self.depth)] for _ in range(self.count)]
        super().build(shape)

    @property
    def cross_layers(self) -> list[tf.keras.layers.Layer]:
        """All of :attr:`crosses`, for .keras files: Keras saves layers of a list, not of a list of lists."""
        return [cross for layers in self.crosses for cross in layers]

    def call(self, x: tf.Tensor | Sides, training: bool = False, seed: tf.Tensor | None = None) -> tf.Tensor:
        x = joined(x)
        inputs = tf.unstack(x) if x.shape.rank == 3 else [x] * self.count
        crossed = []
        for x_0, layers in zip(inputs, self.crosses, strict=True):
            x_l = x_0
            for cross in layers:
                x_l = cross(x_0, x_l)
            crossed.append(x_l)
        return self.mlp(tf.stack(crossed), training=training, seed=seed)


@tf.keras.utils.register_keras_serializable("stem_tf")
class NormalisedExperts(tf.keras.layers.Layer):
    """``swish(batch_norm(expert(x)))``, HoME's experts (Wang et al., 2024), then dropout.

    Every unit of every expert has mean 0 and variance 1 over a batch before the activation, times a learned scale and
    plus a learned offset: no expert's outputs are far larger than the others', and none are 0 for all rows, as behind
    a ReLU that has died. As with any batch norm, scores come from moving means and variances.

    >>> NormalisedExperts(MLP([32], out=16, count=2))(tf.ones([5, 8])).shape
    TensorShape([2, 5, 16])

    Args:
      experts: K side by side ``[B, D]`` or ``[K, B, D]`` -> ``[K, B, H]``, which end without an activation.
      dropout: rate after the activation.
    """

    def __init__(self, experts: tf.keras.layers.Layer, dropout: float = 0.0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.experts, self.dropout = experts, dropout
        self.norm = tf.keras.layers.BatchNormalization(axis=[0, 2])  # statistics of each expert and unit

    def call(self, x: tf.Tensor | Sides, training: bool = False, seed: tf.Tensor | None = None) -> tf.Tensor:
        seed_of = seeds(seed)
        y = self.experts(x, training=training, seed=next(seed_of))
        y = tf.nn.silu(self.norm(y, training=training))
        return dropout(y, self.dropout, next(seed_of)) if training and self.dropout else y


def by_field(x: tf.Tensor, fields: int) -> tf.Tensor:
    """``[B, F * d]`` -> ``[B, F, d]``, or ``[K, B, F * d]`` -> ``[K, B, F, d]``."""
    if x.shape[-1] % fields:
        raise ValueError(f"{fields} fields of one width should be {fields} times as wide; received width {x.shape[-1]}")
    return tf.reshape(x, [*x.shape[:-2], -1, fields, x.shape[-1] // fields])


def pairs_of(fields: int) -> np.ndarray:
    """``[F (F - 1) / 2, 2]`` int32: the pairs i < j of fields."""
    return np.array(list(combinations(range(fields), 2)), np.int32).reshape(-1, 2)
